"""``bench board``: boards again, from records alone."""

from __future__ import annotations

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
    boards, paths = publish(records, folder, run)
    print_boards(boards, columns, wide)
    for path in paths:
        print(path)
