"""``bench board``: boards again, from records alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergesec.cli.options import Results


def main(
    grid: Annotated[str, typer.Option("--grid", help="name of a grid that was run")],
    results: Results = "results",
) -> None:
    from mergesec.cli.run_verb import print_boards
    from mergesec.evidence.records import read_records
    from mergesec.execution.session import publish

    records = read_records(Path(results) / "records", grid)
    boards, paths = publish(records, Path(results), grid)
    print_boards(boards)
    for path in paths:
        print(path)
