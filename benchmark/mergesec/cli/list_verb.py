"""``bench list``: names and one line each."""

from __future__ import annotations

from typing import Annotated

import typer

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
    from mergesec.cli.listing import print_list

    print_list(kind, plugin or ())
