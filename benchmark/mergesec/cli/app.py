"""The verbs of ``bench``, imported when they are called."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from mergesec.errors import UsageError, nearest

VERBS = {
    "list": "What is registered: tasks, backbones, merge methods, attacks, defenses.",
    "info": "The card of one component: paper, threat model, parameters and defaults.",
    "plan": "What a grid would do: cells, steps, what is cached, hours and disk.",
    "run": "Run a grid and print its boards. The same command resumes.",
    "status": "How far a grid is, and why cells failed.",
    "board": "Boards from records already there.",
    "compare": "Two folders of records beside each other, cell by cell.",
    "combine": "Records of several machines joined into one folder.",
    "figures": "Pictures from records already there, as SVG and PNG, or PDF.",
    "site": "Records as a static site: boards, pictures, a page per method and per cell.",
    "merge": "Merge safetensors files, tensor by tensor, in little memory.",
    "scan": "May this expert be merged? What its weights tell, and how often that is wrong.",
    "submit": "An entry to the benchmark: write, run, pack, check, accept.",
    "plugin": "Check a plugin file against the contracts.",
    "cache": "Show, verify or clear the artifact store.",
    "doctor": "Is this machine fit to run?",
    "pretrain": "Make a shipped pretrained backbone again.",
}
HELP = {"help_option_names": ["-h", "--help"]}


class _Lazy(TyperGroup):
    """Knows every verb's name and help, imports a verb's module only to run it or to complete its words."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """What lists of verbs show."""
        return TyperCommand(cmd_name, short_help=VERBS[cmd_name]) if cmd_name in VERBS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The verb that is called, and the words after it."""
        name, *words = args
        if name in VERBS:
            return name, _verb(name), words
        if ctx.resilient_parsing:  # a shell completes after a verb that is none
            return None, None, words
        raise UsageError("bench", f"no verb {name!r}{nearest(name, VERBS)}")


def _verb(name: str) -> Any:
    module = import_module(f"mergesec.cli.{name}_verb")
    verb = typer.Typer(add_completion=False, context_settings=HELP)
    verb.command(name, help=VERBS[name])(module.main)
    return typer.main.get_command(verb)


# without rich: its panels take twice as long as all the rest of the help
app = typer.Typer(cls=_Lazy, no_args_is_help=True, context_settings=HELP, rich_markup_mode=None)


def _tell_version(asked: bool) -> None:
    if asked:
        from mergesec import __version__

        print(f"mergesec {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_tell_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """MergeSec: the security of model merging, as one reproducible grid."""
