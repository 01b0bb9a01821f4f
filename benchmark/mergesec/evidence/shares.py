"""Shares of rows that a task measured for itself, with the ends of their intervals: read off a record, and averaged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mergesec.evidence.estimates import Row
from mergesec.evidence.records import Record

ENDS = ("", "_low", "_high")


def measured(record: Record, where: str, names: Sequence[str]) -> dict[str, float]:
    """Shares ``names`` of ``where`` (``<role>/<task>``) with their ends; empty unless the record has all of them."""
    if not all(f"{name}/{where}" in record.values for name in names):
        return {}
    return {f"{name}{end}": record.values[f"{name}{end}/{where}"] for name in names for end in ENDS}


def means(sets: Sequence[Mapping[str, float]], shown: Mapping[str, str]) -> Row:
    """Means over sets, and intervals as of independent ones, as columns of a board: ``shown`` by name in ``sets``."""
    row: Row = {}
    for name, column in shown.items():
        row[column] = value = sum(s[name] for s in sets) / len(sets)
        for end, sign in (("_low", -1), ("_high", 1)):
            wide = math.sqrt(sum((s[f"{name}{end}"] - s[name]) ** 2 for s in sets)) / len(sets)
            row[f"{column}{end}"] = value + sign * wide
    return row
