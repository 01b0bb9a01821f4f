"""Shares of rows that a task measured for itself, with the ends of their intervals: read off a record, and averaged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import stdev

from mergesec.evidence.estimates import Row
from mergesec.evidence.records import Record

ENDS = ("", "_low", "_high")


def measured(record: Record, where: str, names: Sequence[str]) -> dict[str, float]:
    """Shares ``names`` of ``where`` (``<role>/<task>``) with their ends; empty unless the record has all of them."""
    if not all(f"{name}/{where}" in record.values for name in names):
        return {}
    return {f"{name}{end}": record.values[f"{name}{end}/{where}"] for name in names for end in ENDS}


def means(sets: Sequence[Mapping[str, float]], shown: Mapping[str, str]) -> Row:
    """Means over trainings that were measured on the same rows, as columns of a board: ``shown`` by name in ``sets``.

    95 % intervals: of the rows drawn, and, of several trainings, of these (Student's t), in squares; in [0, 1].
    """
    row: Row = {}
    for name, column in shown.items():
        row[column] = value = sum(s[name] for s in sets) / len(sets)
        training = _of_training([s[name] for s in sets])
        for end, sign in (("_low", -1), ("_high", 1)):
            drawn = sum(abs(s[f"{name}{end}"] - s[name]) for s in sets) / len(sets)
            row[f"{column}{end}"] = min(max(value + sign * math.hypot(drawn, training), 0.0), 1.0)
    return row


def _of_training(values: Sequence[float]) -> float:
    """Half the width of the mean's interval as trainings are drawn; 0 of a single one, of which nobody can tell."""
    if len(values) < 2:
        return 0.0
    from scipy.special import stdtrit

    return float(stdtrit(len(values) - 1, 0.975)) * stdev(values) / math.sqrt(len(values))
