"""``bench status``: how far a grid is, from what is stored."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from mergesec.cli import show
from mergesec.cli.options import DataRoot, GridOption, Overrides, Plugins, Results


def main(
    grid: GridOption,
    overrides: Overrides = None,
    plugin: Plugins = None,
    data_root: DataRoot = None,
    results: Results = "results",
) -> None:
    from mergesec.errors import UsageError
    from mergesec.evidence.records import read_records
    from mergesec.execution.session import open_session, wanted_steps

    session = open_session(grid, overrides or (), plugin or (), data_root)
    wanted = wanted_steps(session)
    ready = sum(all(k not in wanted for _, k in c.roles) for c in session.plan.cells)
    print(f"cells: {ready} of {len(session.plan.cells)} computed; steps still to run: {len(wanted)}")
    try:
        records = read_records(Path(results) / "records", session.grid.spec.name)
    except UsageError:
        print(f"no records in {results} yet")
        return
    counts = Counter((r.status, r.reason) for r in records)
    rows = [[status, str(n), reason] for (status, reason), n in counts.most_common()]
    show.table("last run's records", ["status", "cells", "reason"], rows)
