"""``bench board``: boards again, from records alone."""

from __future__ import annotations

from mergesec.cli.options import Results, RunName, RunOption, one_grid, results_folder, run_name


def main(name: RunName = None, grid: RunOption = None, results: Results = None) -> None:
    run = run_name(one_grid(name, grid))
    from mergesec.cli.run_verb import print_boards
    from mergesec.evidence.records import read_records
    from mergesec.execution.session import publish

    folder = results_folder(results, run)
    records = read_records(folder / "records", run)
    boards, paths = publish(records, folder, run)
    print_boards(boards)
    for path in paths:
        print(path)
