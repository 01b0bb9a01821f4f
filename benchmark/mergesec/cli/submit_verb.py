"""``bench submit``: an entry to the benchmark, from an empty file to a checked folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergesec.cli import show
from mergesec.cli.complete import one_of
from mergesec.cli.options import DataRoot
from mergesec.cli.progress import Progress

if TYPE_CHECKING:
    from mergesec.submissions.check import Asked
    from mergesec.submissions.findings import Report
    from mergesec.submissions.rerun import Manner

ACTIONS = {
    "new": "write a working plugin with its grid, its test and its submission.yaml",
    "run": "run the entry's grid, then pack",
    "pack": "fill in digests and claimed values from the records",
    "check": "what maintainers run; exit code 0 accepted, 1 refused, 2 malformed",
    "accept": "check, then add the records to --results, marked",
}


def main(
    action: Annotated[str, typer.Argument(help="; ".join(f"{k}: {v}" for k, v in ACTIONS.items()), autocompletion=one_of(*ACTIONS))],
    words: Annotated[list[str], typer.Argument(metavar="FOLDER|NAME [KEY=VALUE]", help="the entry's folder (for new: its name); then what to change of its grid")],
    kind: Annotated[str, typer.Option(help="new: defense, attack, merging or task")] = "",
    full: Annotated[bool, typer.Option("--full", help="check: run every cell again, not a tenth")] = False,
    no_rerun: Annotated[bool, typer.Option("--no-rerun", help="check: run nothing again, verify nothing")] = False,
    salt: Annotated[str, typer.Option(help="check: enters the draw of cells; one that nobody knew before")] = "",
    report: Annotated[Path | None, typer.Option(help="check: also write what was found, as JSON")] = None,
    results: Annotated[Path | None, typer.Option("--results", help="accept: where records and boards go")] = None,
    data_root: DataRoot = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:0,1 or mps; cuda*2: two workers a GPU")] = "auto",
    jobs: Annotated[int | None, typer.Option(help="workers (per GPU, or on the CPU; default one per core)")] = None,
    contained: Annotated[bool, typer.Option("--contained/--not-contained", help="the entry's code sees neither store, data nor network (docs/trust.md)")] = True,
) -> None:  # fmt: skip
    from mergesec.errors import UsageError, nearest
    from mergesec.submissions.check import Asked
    from mergesec.submissions.rerun import Manner

    if action not in ACTIONS:
        raise UsageError("action", f"{action!r}{nearest(action, ACTIONS)}")
    first, *overrides = words
    if odd := [word for word in overrides if "=" not in word]:
        raise UsageError("KEY=VALUE", f"{odd[0]!r}; one entry at a time")
    asked = Asked(full, not no_rerun, salt, data_root, tuple(overrides))
    manner = Manner(contained, device, jobs)
    if action == "new":
        _new(first, kind)
    elif action == "pack":
        _pack(Path(first))
    elif action == "run":
        _run(Path(first), asked, manner)
    else:
        _check(Path(first), asked, manner, report, results if action == "accept" else None, action)


def _new(name: str, kind: str) -> None:
    from mergesec.submissions.fresh import new_entry

    for path in new_entry(name, kind, Path()):
        print(path)
    print(
        f"next: bench plugin check {name}/{name}.py; pytest {name}; bench submit run {name}; bench submit check {name}"
    )


def _pack(folder: Path) -> None:
    from mergesec.submissions.packing import pack

    packed = pack(folder)
    print(f"{show.many(len(packed.records), 'record')}, code {packed.submission.code.digest[:16]}")
    for claim in packed.submission.claims:
        print(f"claims {claim.column} {claim.value} on {claim.board} ({claim.row})")


def _run(folder: Path, asked: Asked, manner: Manner) -> None:
    from mergesec.cli.run_verb import print_boards
    from mergesec.submissions.packing import run_entry

    progress = Progress()
    try:
        finished = run_entry(folder, asked, manner, progress)
    finally:
        progress.stop()
    if finished.outcome.interrupted:
        raise typer.Exit(130)
    print_boards(finished.boards, None, False)
    lost = [r for r in finished.records if r.status != "done"]
    for record in lost:
        print(f"{record.cell}: {record.status} ({record.reason})")
    if lost:
        raise typer.Exit(1)
    _pack(folder)


def _check(
    folder: Path, asked: Asked, manner: Manner, report: Path | None, results: Path | None, action: str
) -> None:
    from mergesec.files import default_results, write_atomic
    from mergesec.submissions.accepting import accept
    from mergesec.submissions.check import check

    progress = Progress()
    try:
        checked = check(folder, asked, manner, progress)
    finally:
        progress.stop()
    _tell(checked.report)
    if report is not None:
        write_atomic(report, (json.dumps(_fields(checked.report), indent=1) + "\n").encode())
    if checked.report.refused:
        print("refused")
        raise typer.Exit(1)
    if action == "accept":
        for path in accept(checked, results or default_results()):
            print(path)
    print(
        "accepted"
        if checked.report.verified
        else "nothing speaks against it, and NOTHING WAS VERIFIED (--no-rerun)"
    )


def _tell(report: Report) -> None:
    show.table("", ["check", "", "why"], [[f.check, f.verdict, f.why] for f in report.findings])
    if not report.rerun:
        return
    told = f"{len(report.rerun)} of {show.many(report.cells, 'cell')} run again"
    rows = [
        [d.what, str(d.cells), f"{100 * d.submitted:.1f}", f"{100 * d.again:.1f}",
         f"{100 * (d.again - d.submitted):+.1f} [{100 * d.low:.1f}, {100 * d.high:.1f}]"]
        for d in report.differences
    ]  # fmt: skip
    show.table(told, ["rate", "counts", "submitted", "run again", "difference"], rows)


def _fields(report: Report) -> dict[str, object]:
    return {
        "accepted": not report.refused, "verified": report.verified, "cells": report.cells,
        "rerun": list(report.rerun), "findings": [f._asdict() for f in report.findings],
        "differences": [d._asdict() for d in report.differences],
    }  # fmt: skip
