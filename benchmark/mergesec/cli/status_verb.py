"""``bench status``: how far a grid is, from what is stored; of a run known by name alone, from its records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergesec.cli import show
from mergesec.cli.options import (
    Asked,
    DataRoot,
    GridOption,
    Plugins,
    Results,
    Words,
    asked_for,
    results_folder,
    run_name,
)
from mergesec.errors import UsageError
from mergesec.files import brief
from mergesec.planning.presets import nearest_preset, preset_names

if TYPE_CHECKING:
    from mergesec.evidence.records import Record
    from mergesec.execution.failures import Failure
    from mergesec.execution.session import Session
    from mergesec.planning.plan import Step

    Told = tuple[Failure, list[str]]
    """A failed step and the cells that wait for it."""

PRINTED = 2000
"""Letters shown of the end of what a failed step printed."""
SHOWN = 5
"""Cells named under a failed step."""


def main(
    words: Words = None,
    grid: GridOption = None,
    plugin: Plugins = None,
    data_root: DataRoot = None,
    results: Results = None,
    why: Annotated[
        bool, typer.Option("--why", help="of each failed step the cells that wait for it, and its traceback")
    ] = False,
) -> None:
    asked = asked_for(words, grid)
    folder = results_folder(results, run_name(asked.grid)) / "records"
    if _is_run(asked, folder):
        if asked.overrides or plugin or data_root:
            told = f"{asked.grid} is known from its records alone; key=value, --plugin and --data-root need its file"
            raise UsageError("GRID", told)
        failed = _from_records(asked.grid, folder)
    else:
        failed = _from_plan(asked, plugin or (), data_root, folder)
    if why:
        _explain(failed)
    elif failed:
        print(f"{show.many(len(failed), 'step')} failed; --why shows why in full")


def _is_run(asked: Asked, folder: Path) -> bool:
    """Whether a grid is neither a preset nor a file, but was run; UsageError if it is nothing at all."""
    grid = asked.grid
    if grid in preset_names() or "/" in grid or grid.endswith((".yaml", ".yml")):
        return False
    runs = [path.parent.name for path in folder.glob("*/grid.json")]
    if grid not in runs:
        known = nearest_preset(grid, runs)
        raise UsageError(
            "GRID", f"no preset {brief(grid)!r}, and no run of that name in {folder.parent}{known}"
        )
    return True


def _from_plan(asked: Asked, plugins: Sequence[str], data_root: str | None, folder: Path) -> list[Told]:
    from mergesec.evidence.records import read_records
    from mergesec.execution.session import open_session, wanted_steps

    session = open_session(*asked, plugins, data_root)
    wanted = wanted_steps(session)
    ready = sum(all(k not in wanted for _, k in c.roles) for c in session.plan.cells)
    print(f"cells: {ready} of {len(session.plan.cells)} computed; steps still to run: {len(wanted)}")
    if wanted:
        _pace(session, wanted)
    try:
        _table(read_records(folder, session.grid.spec.name))
    except UsageError:
        print(f"no records in {folder.parent} yet")
    return _failed_steps(session)


def _pace(session: Session, wanted: Mapping[str, Step]) -> None:
    """What runs now, how fast, and how long it will take."""
    from mergesec.execution.session import RECENT, pace_of

    pace = pace_of(session, wanted)
    known = pace.left is not None
    left = (
        f"about {show.duration(pace.left or 0.0)} left" if known else "too little is measured to say how long"
    )
    if not pace.running:
        print(f"no run is at it now; {left}" + (", one step at a time" if known else ""))
        return
    rate = f"{show.many(pace.recent, 'step')} in the last {RECENT / 60:.0f} minutes"
    print(f"running: {show.many(len(pace.running), 'step')} at once; {rate}; {left}")
    for label, seconds in pace.running[:SHOWN]:
        print(f"  {label}, for {show.duration(seconds)}")
    if len(pace.running) > SHOWN:
        print(f"  ... and {len(pace.running) - SHOWN} more")


def _failed_steps(session: Session) -> list[Told]:
    """Steps of the plan that failed and did not succeed since, with the cells that wait for them."""
    from mergesec.execution.failures import Failures
    from mergesec.execution.harvest import cell_name

    done = session.store.keys()
    found = []
    for failure in Failures(session.store.root):
        if failure.key in done or failure.key not in session.plan.steps:
            continue
        waiting = {failure.key}
        for key, step in session.plan.steps.items():  # in an order that respects dependencies
            if key not in done and any(needed in waiting for _, needed in step.inputs):
                waiting.add(key)
        cells = [c.cell for c in session.plan.cells if any(key in waiting for _, key in c.roles)]
        found.append((failure, list(map(cell_name, cells))))
    return found


def _from_records(run: str, folder: Path) -> list[Told]:
    from mergesec.evidence.records import read_records
    from mergesec.execution.failures import Failures
    from mergesec.files import default_root

    records = read_records(folder, run)
    done = sum(record.status == "done" for record in records)
    print(
        f"cells: {done} of {len(records)} done in {folder.parent}; its file would tell the steps still to run"
    )
    _table(records)
    bad = [record for record in records if record.status in ("failed", "blocked")]
    told = [(f, [r.cell for r in bad if _waits(r, f)]) for f in Failures(default_root())]
    return [(failure, cells) for failure, cells in told if cells]


def _waits(record: Record, failure: Failure) -> bool:
    return failure.key in record.steps.values() or record.reason == failure.blocks


def _table(records: Iterable[Record]) -> None:
    counts = Counter((r.status, r.reason) for r in records)
    rows = [[status, str(n), reason] for (status, reason), n in counts.most_common()]
    show.table("last run's records", ["status", "cells", "reason"], rows)


def _explain(failed: Sequence[Told]) -> None:
    from mergesec.execution.logs import read_log
    from mergesec.files import default_root, plain

    if not failed:
        print("no failure is kept in the store for this grid")
    for failure, cells in failed:
        print(f"failed: {failure.label}; waiting for it: {show.many(len(cells), 'cell')}")
        for cell in cells[:SHOWN]:
            print(f"  {cell}")
        if len(cells) > SHOWN:
            print(f"  ... and {len(cells) - SHOWN} more")
        print(failure.trace.rstrip() or failure.reason)
        if printed := read_log(default_root(), failure.key):
            print("it printed:", *(plain(line) for line in printed[-PRINTED:].splitlines()), sep="\n  ")
        print()
