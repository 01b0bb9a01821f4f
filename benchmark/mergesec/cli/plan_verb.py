"""``bench plan``: what a grid would cost, before anything runs."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Annotated

import typer

from mergesec.cli import show
from mergesec.cli.options import DataRoot, GridOption, Plugins, Words, asked_for
from mergesec.errors import UsageError
from mergesec.files import uncollected

if TYPE_CHECKING:
    from mergesec.execution.session import Session


def main(
    words: Words = None,
    grid: GridOption = None,
    plugin: Plugins = None,
    data_root: DataRoot = None,
    jobs: Annotated[int, typer.Option(help="workers to divide the time by")] = 2,
) -> None:
    asked = asked_for(words, grid)
    if jobs < 1:
        raise UsageError("--jobs", f"must be at least 1, got {jobs}")
    from mergesec.execution.session import open_session

    with uncollected():
        _print_plan(open_session(*asked, plugin or (), data_root), jobs)


def _print_plan(session: Session, jobs: int) -> None:
    from mergesec.execution.scheduler import MERGED, History
    from mergesec.execution.session import wanted_steps

    plan = session.plan
    wanted = wanted_steps(session)
    history = History(session.store.root)
    total, todo = Counter[str](), Counter[str]()
    seconds, size = defaultdict[str, float](float), defaultdict[str, float](float)
    for step in plan.steps.values():
        total[step.kind] += 1
    for step in wanted.values():
        s, b = history.predict(step)
        todo[step.kind] += 1
        seconds[step.kind] += s
        size[step.kind] += b
    rows = [
        [
            kind,
            str(n),
            str(n - todo[kind]),
            str(todo[kind]),
            show.duration(seconds[kind]),
            f"{size[kind] / 1e6:.1f}",
        ]
        for kind, n in total.items()
    ]
    show.table("", ["step", "distinct", "cached or not needed", "to run", "time", "disk MB"], rows)
    threats = Counter(c.cell.threat for c in plan.cells)
    print(f"cells: {len(plan.cells)} ({', '.join(f'{n} {t}' for t, n in threats.items()) or 'none'})")
    print(f"left out: {sum(plan.left_out.values())}")
    for reason, n in plan.left_out.most_common():
        print(f"  {n:>6} × {reason}")
    work, merges = sum(seconds.values()), sum(size[kind] for kind in MERGED) / 1e6
    print(
        f"steps to run: {len(wanted)}; work {show.duration(work)}, about {show.duration(work / jobs)} on {jobs} workers; disk {sum(size.values()) / 1e6:.0f} MB"
    )
    if merges >= 1:
        print(f"of the disk {merges:.0f} MB are merges, which bench run --drop-merges lets go of as it goes")
    print("times are means of earlier runs of the same step here, or rough defaults before there are any")
