"""``bench board``: boards again, from records alone."""

from __future__ import annotations

from pathlib import Path

from mergesec.cli.options import Results, RunName, RunOption, one_grid, run_name


def main(name: RunName = None, grid: RunOption = None, results: Results = "results") -> None:
    run = run_name(one_grid(name, grid))
    from mergesec.cli.run_verb import print_boards
    from mergesec.evidence.records import read_records
    from mergesec.execution.session import publish

    records = read_records(Path(results) / "records", run)
    boards, paths = publish(records, Path(results), run)
    print_boards(boards)
    for path in paths:
        print(path)
