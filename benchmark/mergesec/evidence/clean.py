"""The board of merges without attack or defense."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from mergesec.evidence.estimates import Board, Reader, Row, grouped, ordered, put, settled
from mergesec.evidence.records import Record
from mergesec.evidence.statistics import Estimate, mean, nothing, ratio, tiers
from mergesec.threats import Role, Threat


def clean_board(records: Sequence[Record], reader: Reader) -> Board | None:
    """Accuracy per merge method and task, absolute and normalised by the expert, beside base and experts."""
    records = [r for r in records if r.threat == Threat.CLEAN]
    if not records:
        return None
    tasks = list(dict.fromkeys(t for r in records for t in r.experts))
    rows: list[Row] = []
    estimates: list[Estimate] = []

    def add(name: str, role: str, group: Sequence[Record], experts: int | str) -> None:
        row: Row = {"method": name, "experts": experts}
        done = settled(row, group)
        overall = reader.rate(done, "acc", role, "all")
        per_task = {t: reader.task(done, role, t) for t in tasks}
        normal = [
            ratio(e, reader.task(done, Role.EXPERT, t))
            for t, e in per_task.items()
            if not math.isnan(e.value)
        ]
        put(row, "accuracy", overall)
        put(row, "normalised", mean(normal))
        for task, estimate in per_task.items():
            row[task] = estimate.value
        rows.append(row)
        estimates.append(overall if role == Role.CLEAN_MERGE else nothing())

    for (merging, experts), group in grouped(records, lambda r: (r.merging, len(r.experts))).items():
        add(merging, Role.CLEAN_MERGE, group, experts)
    for experts in {row["experts"] for row in rows}:  # merges of two and of eight are not one contest
        mine = [i for i, row in enumerate(rows) if row["experts"] == experts]
        for i, tier in zip(mine, tiers([estimates[i] for i in mine]), strict=True):
            rows[i]["tier"] = tier
    add("(experts)", Role.EXPERT, records, 1)
    add("(base)", Role.BASE, records, 0)
    frame = ordered(pd.DataFrame(rows), "accuracy", ascending=False)
    return Board("clean", "Merging without attack or defense", frame, ("accuracy", "normalised"))
