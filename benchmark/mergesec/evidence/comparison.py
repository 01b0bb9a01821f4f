"""Two folders of records compared, cell by cell and row by row of the boards, paired by test sample and seed.

A difference is B minus A. Both sides are resampled alike, so what they have in common cancels: identical outcomes
differ by exactly nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pandas as pd

from mergesec.errors import UsageError
from mergesec.evidence.backdoor import backdoor_rates
from mergesec.evidence.boards import make_boards
from mergesec.evidence.estimates import Cell, Reader, Row, cell_of, grouped
from mergesec.evidence.fitting import NAMES
from mergesec.evidence.protection import protection_rates
from mergesec.evidence.records import Record
from mergesec.evidence.sides import Side, disagreements, machine
from mergesec.evidence.statistics import Estimate
from mergesec.threats import Role, Threat

ACROSS = ("grid", "protocol")
"""Axes in which two records may differ and still be of one cell: a protocol is told as the reason."""


class Pair(NamedTuple):
    """The records of one cell on both sides."""

    a: Record
    b: Record

    @property
    def alike(self) -> bool:
        """Whether the outcome of every test sample is the same."""
        return self.a.counts == self.b.counts


@dataclass
class Comparison:
    """What two sides have in common and in what they differ. ``table`` holds everything, a line each."""

    pairs: int = 0
    alike: int = 0
    """Pairs whose outcomes are the same, sample for sample."""
    lines: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def of(self, kind: str) -> list[Row]:
        """Lines of one kind: ``row``, ``cell``, ``value``, ``tier``, ``missing``, ``incomparable``."""
        return [line for line in self.lines if line["kind"] == kind]

    @property
    def table(self) -> pd.DataFrame:
        """All lines; columns that a kind does not know are empty."""
        return pd.DataFrame(self.lines, columns=list(COLUMNS))

    def beyond(self, tolerance: float) -> list[Row]:
        """Rows and cells that differ by more than ``tolerance`` (a share), rows first."""
        return [
            r
            for kind in ("row", "cell")
            for r in self.of(kind)
            if abs(r["difference"]) > tolerance + ROUNDING
        ]


ROUNDING = 1e-12
SAME = 1e-6
"""Numbers that are no rates and differ by less, relatively, are the same."""
COLUMNS = (
    "kind", "grid", "board", "cell", "seed", *NAMES[2:], "measure", "A", "B", "difference", "low", "high", "seeds",
    "cells", "why",
)  # fmt: skip


def compare(a: Side, b: Side, across_versions: bool = False) -> Comparison:
    """Everything that can be said of two sides. ``across_versions``: components whose version or code differs are
    compared all the same. UsageError if they have no grid in common."""
    result = Comparison()
    reader = Reader()
    for mine, other in _grids(a, b, result):
        before, after = a.records(mine), b.records(other)
        pairs = _pair(before, after, mine, across_versions, result)
        result.pairs += len(pairs)
        result.alike += sum(pair.alike for pair in pairs)
        for kind, groups in (("row", _rows(pairs)), ("cell", [[p] for p in pairs])):
            for group in groups:
                result.lines += _lines(kind, mine, group, reader)
        result.lines += [line for pair in pairs for line in _values(mine, pair)]
        if any(not pair.alike for pair in pairs) or len(before) != len(after):
            result.lines += _tiers(mine, before, after)
        result.notes += _machines(pairs)
    result.notes = list(dict.fromkeys(result.notes))
    return result


def _grids(a: Side, b: Side, result: Comparison) -> list[tuple[str, str]]:
    """Which grids are laid beside each other: those of one name; of two folders with one grid each, those two."""
    if len(a.homes) == len(b.homes) == 1:
        return [(next(iter(a.homes)), next(iter(b.homes)))]
    for side, grids, others in (("B", a.homes, b.homes), ("A", b.homes, a.homes)):
        result.lines += [
            {"kind": "missing", "grid": grid, "why": f"the grid is not in {side}"}
            for grid in grids
            if grid not in others
        ]
    both = [(grid, grid) for grid in a.homes if grid in b.homes]
    if not both:
        known = ", ".join([*a.homes][:10]), ", ".join([*b.homes][:10])
        raise UsageError("compare", f"no grid in common: {known[0]} in A, {known[1]} in B")
    return both


# --------------------------------------------------------------------------- pairs


def _pair(
    before: Sequence[Record], after: Sequence[Record], grid: str, across_versions: bool, result: Comparison
) -> list[Pair]:
    """The pairs that can be compared; what is missing or cannot be is noted."""
    mine, other = _by_cell(before), _by_cell(after)
    pairs = []
    for cell, record in mine.items():
        twin = other.get(cell)
        if twin is None:
            result.lines.append(_about(record, grid, "missing", "not in B"))
        elif why := _obstacle(record, twin, across_versions):
            missing = "done" in (record.status, twin.status) and record.status != twin.status
            result.lines.append(_about(record, grid, "missing" if missing else "incomparable", why))
        elif record.status == "done":
            pairs.append(Pair(record, twin))
    result.lines += [_about(r, grid, "missing", "not in A") for cell, r in other.items() if cell not in mine]
    return pairs


def _by_cell(records: Iterable[Record]) -> dict[Cell, Record]:
    return {cell_of(record, *ACROSS): record for record in records}


def _obstacle(a: Record, b: Record, across_versions: bool) -> str:
    """Why two records of a cell cannot be compared; empty if they can, or if neither is done."""
    if a.status != b.status and "done" in (a.status, b.status):
        side, other = ("B", b) if a.status == "done" else ("A", a)
        return f"{other.status} in {side}" + (f": {other.reason}" if other.reason else "")
    if a.status != "done":
        return ""
    if a.protocol != b.protocol:
        return f"other protocol: {a.protocol} against {b.protocol}"
    wrong = disagreements(a, b)
    if across_versions:
        wrong = [w for w in wrong if not w.startswith(("version of ", "code of "))]
    sizes = [n for n in a.counts if n in b.counts and not _same_samples(a, b, n)]
    return "; ".join([*(f"other {w}" for w in wrong[:3]), *(f"other test samples: {n}" for n in sizes[:1])])


def _same_samples(a: Record, b: Record, name: str) -> bool:
    mine, other = a.counts[name], b.counts[name]
    return (mine.total, mine.n, mine.mask) == (other.total, other.n, other.mask)


def _labels(record: Record) -> Row:
    return {
        "attack": record.attack, "defense": record.defense, "method": record.merging, "experts": len(record.experts),
        "adversaries": record.adversaries, "target_task": record.target_task, "protected": record.protected,
        "secrets": record.secrets,
    }  # fmt: skip


def _about(record: Record, grid: str, kind: str, why: str) -> Row:
    return {
        "kind": kind,
        "grid": grid,
        "cell": record.cell,
        "seed": record.seed,
        **_labels(record),
        "why": why,
    }


# --------------------------------------------------------------------------- differences


def _clean_rates(records: Sequence[Record], reader: Reader) -> dict[str, Estimate]:
    roles = {"accuracy": Role.CLEAN_MERGE, "experts": Role.EXPERT, "base": Role.BASE}
    return {name: reader.rate(records, "acc", role, "all") for name, role in roles.items()}


_RATES: Mapping[Threat, tuple[str, Callable[[Sequence[Record], Reader], dict[str, Estimate]]]] = {
    Threat.CLEAN: ("clean", _clean_rates),
    Threat.BACKDOOR: ("backdoor", backdoor_rates),
    Threat.PROTECTION: ("protection_cells", protection_rates),
}
"""By threat: the board whose rows are compared, and its measures."""


def _rows(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """The pairs of each row of the detailed boards."""
    of = {id(pair.a): pair for pair in pairs}
    groups = grouped([p.a for p in pairs], lambda r: (r.threat, *_labels(r).values()))
    return [[of[id(record)] for record in group] for group in groups.values()]


def _lines(kind: str, grid: str, pairs: Sequence[Pair], reader: Reader) -> list[Row]:
    """One line for each measure in which a group of pairs differs; one line for all if it does in none."""
    first = pairs[0].a
    board, rates = _RATES[Threat(first.threat)]
    opening: Row = {"kind": kind, "grid": grid, "board": board, **_labels(first), "cells": len(pairs)}
    if kind == "cell":
        opening |= {"cell": first.cell, "seed": first.seed}
    if all(pair.alike for pair in pairs):
        return [{**opening, "measure": "all", "difference": 0.0, "low": 0.0, "high": 0.0}]
    before, after = (rates([pair[side] for pair in pairs], reader) for side in (0, 1))
    found = []
    for measure, mine in before.items():
        change = after[measure] - mine
        if not math.isnan(change.value):
            low, high = change.interval()
            found.append(
                {**opening, "measure": measure, "A": mine.value, "B": after[measure].value,
                 "difference": change.value, "low": low, "high": high, "seeds": change.seeds}
            )  # fmt: skip
        elif math.isnan(mine.value) != math.isnan(after[measure].value):
            side = "A" if math.isnan(mine.value) else "B"
            found.append(
                {**opening, "kind": "incomparable", "measure": measure, "why": f"undefined in {side}"}
            )
    return found


def _values(grid: str, pair: Pair) -> list[Row]:
    """A line for each number of a cell that is no rate and differs: distances, marks, how generated images look.
    They are not of single test samples, so there is no paired interval."""
    before, after = pair.a.values, pair.b.values
    return [
        {**_about(pair.a, grid, "value", ""), "measure": name, "A": before.get(name), "B": after.get(name),
         "difference": after.get(name, math.nan) - before.get(name, math.nan)}
        for name in dict.fromkeys([*before, *after])
        if not math.isclose(before.get(name, math.nan), after.get(name, math.nan), rel_tol=SAME, abs_tol=SAME)
    ]  # fmt: skip


# --------------------------------------------------------------------------- tiers and machines


def _tiers(grid: str, before: Sequence[Record], after: Sequence[Record]) -> list[Row]:
    """Rows of the boards whose tier is another."""
    mine, other = (_tiers_of(records) for records in (before, after))
    return [
        {"kind": "tier", "grid": grid, "board": key[0], **dict(key[1]), "A": mine[key], "B": other[key],
         "difference": other[key] - mine[key]}
        for key in mine
        if key in other and mine[key] != other[key] and not (math.isnan(mine[key]) and math.isnan(other[key]))
    ]  # fmt: skip


def _tiers_of(records: Sequence[Record]) -> dict[tuple[str, tuple[tuple[str, Any], ...]], float]:
    found = {}
    for board in make_boards(records):
        if "tier" in board.frame:
            for _, row in board.frame.iterrows():
                key = (board.name, tuple((c, row[c]) for c in NAMES if c in board.frame))
                found[key] = float(row["tier"])
    return found


def _machines(pairs: Iterable[Pair]) -> list[str]:
    """In what software and devices differ, with the number of cells."""
    counted: Counter[str] = Counter()
    for a, b in pairs:
        mine, other = machine(a), machine(b)
        counted.update(
            f"{what} {mine[what]} in A, {other[what]} in B"
            for what in mine
            if what in other and mine[what] != other[what]
        )
    return [f"{told} ({n} cells)" for told, n in counted.items()]
