"""``bench list``: names and one line each."""

from __future__ import annotations

from typing import Annotated

import typer

from mergesec.cli import show
from mergesec.cli.complete import one_of
from mergesec.cli.options import Plugins
from mergesec.planning.cards import KINDS


def main(
    kind: Annotated[
        str,
        typer.Argument(
            help="task, backbone, merging, attack, defense, grid, or all",
            autocompletion=one_of(*KINDS, "grid", "all"),
        ),
    ] = "all",
    plugin: Plugins = None,
) -> None:
    from mergesec.errors import UsageError, nearest
    from mergesec.planning.catalog import load_catalog

    kinds = (*KINDS, "grid")
    wanted = kind.rstrip("s") if kind != "all" else "all"
    if wanted not in (*kinds, "all"):
        raise UsageError("kind", f"{kind!r}{nearest(kind, kinds)}")
    catalog = load_catalog(plugin or ())
    for name in KINDS:
        if wanted not in (name, "all"):
            continue
        cards = [catalog.entries[name][n].card for n in sorted(catalog.entries[name])]
        if name in ("attack", "defense"):
            rows = [[c.name, c.threat, " ".join(c.hooks), c.summary] for c in cards]
            show.table("", [name, "threat", "hooks", ""], rows)
        else:
            show.table("", [name, ""], [[c.name, c.summary] for c in cards])
    if wanted in ("grid", "all"):
        from mergesec.planning.presets import preset_descriptions

        show.table("", ["grid", ""], preset_descriptions())
