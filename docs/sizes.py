"""What a grid of any size would take, from what the steps of measured grids took. ``generate.py`` calls it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import prod
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from mergesec.evidence.records import Record, read_records

RECORDS = Path(__file__).resolve().parents[1] / "results" / "records"
AXES = ("victims", "seeds", "defenses", "attacks", "merges")


class Kind(NamedTuple):
    """A kind of step: whose cost tells of it, and which axes multiply it."""

    name: str
    role: str
    what: str
    axes: int
    """The first so many of ``AXES``."""
    chain: bool = False
    """Whether one waits for the one before it."""


KINDS = (
    Kind("expert", "expert", "made_seconds", 2, True),
    Kind("protected expert", "published", "made_seconds", 3, True),
    Kind("attacked expert", "recovered", "made_seconds", 4, True),
    Kind("its accuracy alone", "recovered", "seconds", 4),
    Kind("merge", "merge", "made_seconds", 5, True),
    Kind("accuracy of the merge", "merge", "seconds", 5, True),
)


@cache
def _records(grid: str) -> Sequence[Record]:
    return read_records(RECORDS, grid)


@cache
def unit_costs(grid: str) -> Mapping[tuple[str, str], float]:
    """Mean seconds by (role, what), each step counted once."""
    steps: dict[tuple[str, str], dict[str, float]] = {}
    for record in _records(grid):
        for role, cost in record.cost.items():
            for what in ("seconds", "made_seconds"):
                if role in record.steps and what in cost:
                    kind = steps.setdefault((role.partition(":")[0], what), {})
                    kind[record.steps[role]] = cost[what]
    return {kind: fmean(found.values()) for kind, found in steps.items()}


def devices(grid: str) -> str:
    found = {device for r in _records(grid) for device in r.provenance.get("devices", ())}
    return ", ".join(sorted(found))


def content(grids: Sequence[str], sizes: Mapping[str, int]) -> str:
    """The table of a grid whose axes are so long, with the unit costs of each measured grid."""
    counts = [prod(sizes[axis] for axis in AXES[: kind.axes]) for kind in KINDS]
    head = ["step", "how many", *(f"{grid}, {devices(grid)}: seconds each | hours" for grid in grids)]
    rows = [f"| {' | '.join(head)} |", "|---" * (2 + 2 * len(grids)) + "|"]
    for kind, count in zip(KINDS, counts, strict=True):
        cells = []
        for grid in grids:
            each = unit_costs(grid)[kind.role, kind.what]
            cells += [f"{each:.2f}", f"{each * count / 3600:,.0f}"]
        rows.append(f"| {kind.name} | {count:,} | {' | '.join(cells)} |")
    rows += [_sums(grids, "all, on one worker", lambda grid: _hours(grid, counts))]
    rows += [
        _sums(grids, f"on {sizes['workers']} workers", lambda grid: _hours(grid, counts) / sizes["workers"])
    ]
    rows += [_sums(grids, "one after another, on any number of workers", _chain)]
    return "\n".join(rows)


def _sums(grids: Sequence[str], name: str, hours: Callable[[str], float]) -> str:
    told = " | ".join(
        f"| {value:,.0f}" if (value := hours(grid)) >= 10 else f"| {value:.2g}" for grid in grids
    )
    return f"| **{name}** | | {told} |"


def _hours(grid: str, counts: Sequence[int]) -> float:
    costs = unit_costs(grid)
    return sum(costs[k.role, k.what] * count for k, count in zip(KINDS, counts, strict=True)) / 3600


def _chain(grid: str) -> float:
    """Hours of the longest chain of needs, at mean costs."""
    return sum(unit_costs(grid)[kind.role, kind.what] for kind in KINDS if kind.chain) / 3600
