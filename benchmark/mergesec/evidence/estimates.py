"""What every board is made with: estimates over groups of records, rows, how complete a row is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from mergesec.evidence.records import Count, Record
from mergesec.evidence.statistics import Bootstrap, Estimate, mean
from mergesec.threats import accomplices

Row = dict[str, Any]
Which = str
"""``subject``, ``target`` (the task a backdoor aims at), ``others`` (benign contributors' tasks that no backdoor
aims at) or ``all``."""


@dataclass(frozen=True)
class Board:
    """One leaderboard. ``measures`` are the columns that have ``_low`` and ``_high`` beside them."""

    name: str
    title: str
    frame: pd.DataFrame
    measures: tuple[str, ...]
    note: str = ""


@dataclass
class Reader:
    """Estimates over a group of records."""

    bootstrap: Bootstrap = field(default_factory=Bootstrap)

    def rate(self, records: Iterable[Record], metric: str, role: str, which: Which) -> Estimate:
        """Mean rate over subjects, expert sets and tasks; seeds paired, never pooled with samples."""
        groups: dict[tuple[Any, ...], dict[int, Count]] = {}
        for record in records:
            for task in self._tasks(record, which):
                count = record.counts.get(f"{metric}/{role}/{task}")
                if count is not None:
                    row = (record.merging, record.attack, record.defense)
                    aim = (record.target_class, record.target_task, record.adversaries)
                    place = (row, record.subject, aim, tuple(record.experts), task)
                    groups.setdefault(place, {})[record.seed] = count
        return mean([self.bootstrap.rate(place[-1], counts) for place, counts in groups.items()])

    @staticmethod
    def _tasks(record: Record, which: Which) -> list[str]:
        aim = record.target_task or record.subject
        if which in ("subject", "target"):
            return [record.subject if which == "subject" else aim]
        if which == "all":
            return list(record.experts)
        spoken = {aim, *accomplices(record.experts, record.subject, record.target_task)[: record.adversaries]}
        return [t for t in record.experts if t not in spoken]

    def task(self, records: Iterable[Record], role: str, task: str) -> Estimate:
        """Accuracy of ``role`` on one task."""
        return self.rate([r.model_copy(update={"subject": task}) for r in records], "acc", role, "subject")


def put(row: Row, name: str, estimate: Estimate) -> None:
    """Add an estimate to a row: ``name``, ``name_low``, ``name_high``."""
    row[name] = estimate.value
    row[f"{name}_low"], row[f"{name}_high"] = estimate.interval()


def grouped(
    records: Iterable[Record], key: Callable[[Record], tuple[Any, ...]]
) -> dict[tuple[Any, ...], list[Record]]:
    """Records by key, keys and records in their first order."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def settled(row: Row, records: Sequence[Record]) -> list[Record]:
    """Note how complete the row is; the records that count."""
    done = [r for r in records if r.status == "done"]
    row["cells_done"], row["cells_expected"] = len(done), len(records)
    row["seeds"] = len({r.seed for r in done})
    return done


def ordered(frame: pd.DataFrame, by: str, ascending: bool) -> pd.DataFrame:
    """Rows sorted by a column; ties stay as they were, what has no value comes last."""
    return frame.sort_values(by, ascending=ascending, kind="stable", na_position="last").reset_index(
        drop=True
    )
