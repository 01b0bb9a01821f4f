"""Options several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

GridOption = Annotated[str, typer.Option("--grid", help="a preset's name or a YAML file")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, in Hydra's override syntax")]
Plugins = Annotated[list[str] | None, typer.Option("--plugin", help="a file with a component and its card")]
DataRoot = Annotated[
    str | None, typer.Option("--data-root", help="folder of local tasks (or $MERGESEC_DATA)")
]
Results = Annotated[str, typer.Option("--results", help="folder for records and leaderboards")]
