"""Cells of an entry run again here: which ones, how, and how far the outcome is from what was submitted."""

from __future__ import annotations

import contextlib
import hashlib
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from mergesec.evidence.records import Count, Record
from mergesec.evidence.statistics import Bootstrap, Estimate, holm, mean
from mergesec.execution.harvest import cell_name
from mergesec.execution.scheduler import Reporter
from mergesec.execution.session import Session, run_session
from mergesec.execution.store import CorruptArtifact
from mergesec.planning.plan import CellPlan, needed_steps
from mergesec.submissions.claims import Measured, measured, takes_part
from mergesec.submissions.findings import Difference

SHARE = 10
"""One cell in so many is run again."""
TOLERANCE = 0.02
"""A difference up to this may be another processor's; larger ones refuse, where chance does not explain them."""


def draw(
    cells: Sequence[CellPlan], kind: str, name: str, content: str, salt: str, full: bool
) -> list[CellPlan]:
    """A tenth of the cells in which the method takes part, and of the others, each rounded up.

    The order is a hash of ``content`` (all that was submitted) and ``salt``. Who submits cannot choose it without
    changing what is submitted; who checks gives a salt that was not known before, so that trying contents until a
    pleasant draw comes up does not help either.
    """
    if full:
        return list(cells)

    def lot(planned: CellPlan) -> str:
        return hashlib.sha256(f"{content}\n{salt}\n{cell_name(planned.cell)}".encode()).hexdigest()

    chosen: set[str] = set()
    for part in (True, False):
        group = sorted((c for c in cells if takes_part(c.cell, kind, name) is part), key=lot)
        chosen |= {cell_name(c.cell) for c in group[: math.ceil(len(group) / SHARE)]}
    return [c for c in cells if cell_name(c.cell) in chosen]


class Manner(NamedTuple):
    """How cells are run."""

    contained: bool = True
    device: str = "auto"
    jobs: int | None = None
    timeout: float | None = 7200.0


def run_again(
    session: Session, chosen: Sequence[CellPlan], reporter: Reporter, manner: Manner
) -> dict[str, Record]:
    """Records of these cells, made here. Whatever a plugin had a part in is made anew; the benchmark's own steps
    may come from the store."""
    part = replace(session, plan=replace(session.plan, cells=list(chosen)))
    _forget(part)
    with tempfile.TemporaryDirectory() as folder:
        done = run_session(
            part, Path(folder), reporter, manner.device, manner.jobs, 1, manner.timeout, manner.contained
        )
    if done.outcome.interrupted:
        raise KeyboardInterrupt
    return {record.cell: record for record in done.records}


def _forget(session: Session) -> None:
    """Remove from the store what plugins made for these cells, and what was made from that."""
    touched: set[str] = set()
    for key, step in needed_steps(session.plan, lambda _: False).items():
        if step.plugins or any(k in touched for _, k in step.inputs):
            touched.add(key)
            with contextlib.suppress(FileNotFoundError, CorruptArtifact):
                session.store.remove(step.kind, key)


# --------------------------------------------------------------------------- how far apart


class Pair(NamedTuple):
    """What one step counted on one task, as submitted and again."""

    metric: str
    role: str
    task: str
    seed: int
    cell: str
    submitted: Count
    again: Count


def pairs(submitted: Mapping[str, Record], again: Mapping[str, Record]) -> list[Pair]:
    """Every count of the cells that were run again; of a step that several cells share, once."""
    found: dict[Measured, Pair] = {}
    for cell, new in again.items():
        for key, ours in new.counts.items():
            metric, role, task = key.split("/", 2)
            pair = Pair(metric, role, task, new.seed, cell, submitted[cell].counts[key], ours)
            found.setdefault(measured(new, key), pair)
    return list(found.values())


def lacking(submitted: Mapping[str, Record], again: Mapping[str, Record]) -> list[str]:
    """Counts that a cell has here and not in what was submitted, or the other way round."""
    odd = {cell: submitted[cell].counts.keys() ^ new.counts.keys() for cell, new in again.items()}
    return [
        f"{cell}: {', '.join(sorted(keys))}: counted on one side alone" for cell, keys in odd.items() if keys
    ]


def other_values(submitted: Mapping[str, Record], again: Mapping[str, Record]) -> list[str]:
    """Numbers that are no rates and differ by more than the tolerance, of 1 or of themselves."""
    told = []
    for cell, new in again.items():
        old = submitted[cell].values
        for name in sorted(old.keys() | new.values.keys()):
            a, b = old.get(name, math.nan), new.values.get(name, math.nan)
            if not abs(a - b) <= TOLERANCE * max(1.0, abs(b)):
                told.append(f"{cell}: {name}: submitted {a:.4g}, run again {b:.4g}")
    return told


def differences(found: Iterable[Pair]) -> list[Difference]:
    """By metric and role: mean rates as submitted and again, the difference with its interval."""
    groups: dict[tuple[str, str], list[Pair]] = {}
    for pair in found:
        groups.setdefault((pair.metric, pair.role), []).append(pair)
    bootstrap = Bootstrap()
    return [_difference(f"{m} of {role}", group, bootstrap) for (m, role), group in groups.items()]


def _difference(what: str, group: Sequence[Pair], bootstrap: Bootstrap) -> Difference:
    def rates(again: bool) -> Estimate:
        return mean([bootstrap.rate(p.task, {p.seed: p.again if again else p.submitted}) for p in group])

    before, after = rates(False), rates(True)
    low, high = (after - before).interval()
    return Difference(what, len(group), before.value, after.value, low, high)


def too_far(found: Sequence[Pair]) -> list[str]:
    """Counts that differ by more than the tolerance, and by more than chance: McNemar's exact test on the samples
    whose outcome changed, all counts one family (Holm)."""
    odd = holm([_level(pair) for pair in found]) if found else []
    wrong = []
    for pair, apart in zip(found, odd, strict=True):
        old, new = (c.k / max(c.n, 1) for c in (pair.submitted, pair.again))
        if apart and abs(new - old) > TOLERANCE:
            what = f"{pair.metric} of {pair.role} on {pair.task}"
            wrong.append(f"{pair.cell}: {what}: submitted {100 * old:.1f}, run again {100 * new:.1f}")
    return wrong


def _level(pair: Pair) -> float:
    """Two-sided level of the changes between two sets of outcomes; 0 where they are not of the same samples."""
    from scipy.special import bdtr

    (old, mask), (new, again) = pair.submitted.arrays(), pair.again.arrays()
    if mask.shape != again.shape or bool((mask != again).any()):
        return 0.0
    up, down = int((new & ~old).sum()), int((old & ~new).sum())
    return min(1.0, 2 * float(bdtr(min(up, down), up + down, 0.5))) if up + down else 1.0


def drifted(found: Iterable[Difference]) -> list[str]:
    """Means over all cells that moved by more than the tolerance, with an interval that leaves 0 out."""
    return [
        f"{d.what}: submitted {100 * d.submitted:.1f}, run again {100 * d.again:.1f}; difference "
        f"[{100 * d.low:.1f}, {100 * d.high:.1f}]"
        for d in found
        if abs(d.again - d.submitted) > TOLERANCE and (d.low > 0 or d.high < 0)
    ]
