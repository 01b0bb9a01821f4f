"""``bench board``: boards again, from records alone."""

from __future__ import annotations

import sys
from pathlib import Path

from mergesec.cli import show
from mergesec.cli.options import (
    Columns,
    Results,
    RunName,
    RunOption,
    Wide,
    one_grid,
    results_folder,
    run_name,
)


def main(
    name: RunName = None,
    grid: RunOption = None,
    results: Results = None,
    columns: Columns = None,
    wide: Wide = False,
) -> None:
    run = run_name(one_grid(name, grid))
    from mergesec.cli.run_verb import print_boards
    from mergesec.evidence.records import read_records
    from mergesec.execution.session import publish

    folder = results_folder(results, run)
    records = read_records(folder / "records", run)
    _tell_unlisted(folder / "records" / run, {record.cell for record in records})
    boards, paths = publish(records, folder, run)
    print_boards(boards, columns, wide)
    for path in paths:
        print(path)


def _tell_unlisted(home: Path, listed: set[str]) -> None:
    """Records that were copied here count for nothing: the grid's manifest names its cells."""
    spare = sum(path.stem not in listed for path in home.glob("*-*.json"))
    if spare:
        told = f"{show.many(spare, 'record')} lie beside the grid's {len(listed)} cells and do not count"
        print(f"{told}; bench combine joins the records of several folders", file=sys.stderr)
