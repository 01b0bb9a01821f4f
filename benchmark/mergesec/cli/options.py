"""Options several verbs share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from mergesec.cli.complete import grid_names, run_names
from mergesec.errors import UsageError
from mergesec.files import default_results, is_file

_SAME = "the same as GRID"

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="GRID|KEY=VALUE",
        help="a preset's name or a YAML file; then what to change, in Hydra's override syntax",
        autocompletion=grid_names,
        show_default=False,
    ),
]
GridOption = Annotated[str | None, typer.Option("--grid", help=_SAME, autocompletion=grid_names)]
RunName = Annotated[
    str | None,
    typer.Argument(
        metavar="GRID",
        help="name of a grid that was run, or its file",
        autocompletion=run_names,
        show_default=False,
    ),
]
RunOption = Annotated[str | None, typer.Option("--grid", help=_SAME, autocompletion=run_names)]
Plugins = Annotated[list[str] | None, typer.Option("--plugin", help="a file with a component and its card")]
DataRoot = Annotated[
    str | None, typer.Option("--data-root", help="folder of local tasks (or $MERGESEC_DATA)")
]
Results = Annotated[
    str | None,
    typer.Option(
        "--results",
        help="folder of records and leaderboards; default: results, in a checkout of MergeSec outputs",
    ),
]

Columns = Annotated[
    str | None,
    typer.Option(
        "--columns", help="columns to show, a,b,c, beside those that name a row", show_default=False
    ),
]
Wide = Annotated[
    bool, typer.Option("--wide", help="all columns; one block a row where they do not fit the terminal")
]


class Asked(NamedTuple):
    """A grid and what to change of it."""

    grid: str
    overrides: tuple[str, ...]


def asked_for(words: Sequence[str] | None, option: str | None) -> Asked:
    """The grid, given as the bare word or with ``--grid``, and the overrides; UsageError unless it is one grid."""
    overrides = tuple(word for word in words or () if _is_override(word))
    bare = [word for word in words or () if not _is_override(word)]
    if len(bare) > 1:
        raise UsageError("GRID", f"one at a time, got {bare[0]!r} and {bare[1]!r}; overrides are key=value")
    return Asked(one_grid(bare[0] if bare else None, option), overrides)


def one_grid(word: str | None, option: str | None) -> str:
    """The grid, given as GRID or with ``--grid``; UsageError if neither is there, or both and they differ."""
    if word and option and word != option:
        raise UsageError("--grid", f"{option!r}, but GRID is {word!r}; give one of them")
    grid = word or option
    if not grid:
        raise UsageError("GRID", "is needed: a YAML file or a name; bench list grid shows the presets")
    return grid


def results_folder(given: str | None, grid: str = "") -> Path:
    """``--results``, or its default; to read a ``grid``, where its records are."""
    return Path(given) if given is not None else default_results(grid)


def run_name(grid: str) -> str:
    """Under which name the records of a grid lie: a file's ``name``, else what was given."""
    path = Path(grid)
    if path.suffix != ".yaml" or not is_file(path):
        return grid
    named = re.search(r"^name: *([^\s#]+)", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return named[1].strip("\"'") if named else path.stem


def _is_override(word: str) -> bool:
    return ("=" in word or word.startswith("~")) and not is_file(Path(word))
