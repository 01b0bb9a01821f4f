"""The board of merges without attack or defense."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from mergesec.evidence.estimates import (
    Board,
    Reader,
    Row,
    about_tiers,
    cell_of,
    common_cells,
    grouped,
    only,
    ordered,
    put,
    put_tiers,
    settled,
)
from mergesec.evidence.records import Record
from mergesec.evidence.statistics import mean, nothing, ratio, tiers
from mergesec.threats import Role, Threat


def clean_board(records: Sequence[Record], reader: Reader) -> Board | None:
    """Accuracy per merge method and task, absolute and normalised by the expert, beside base and experts."""
    records = [r for r in records if r.threat == Threat.CLEAN]
    if not records:
        return None
    tasks = list(dict.fromkeys(t for r in records for t in r.experts))
    rows: list[Row] = []

    def add(name: str, role: str, group: Sequence[Record], experts: int | str) -> None:
        row: Row = {"method": name, "experts": experts}
        done = settled(row, group)
        per_task = {t: reader.task(done, role, t) for t in tasks}
        normal = [
            ratio(e, reader.task(done, Role.EXPERT, t))
            for t, e in per_task.items()
            if not math.isnan(e.value)
        ]
        put(row, "accuracy", reader.rate(done, "acc", role, "all"))
        put(row, "normalised", mean(normal))
        for task, estimate in per_task.items():
            row[task] = estimate.value
        rows.append(row)

    for (merging, experts), group in grouped(records, lambda r: (r.merging, len(r.experts))).items():
        add(merging, Role.CLEAN_MERGE, group, experts)
    for experts in dict.fromkeys(
        row["experts"] for row in rows
    ):  # merges of two and of eight are not one contest
        _rank([row for row in rows if row["experts"] == experts], records, reader)
    note = about_tiers(rows).strip()
    add("(experts)", Role.EXPERT, records, 1)
    add("(base)", Role.BASE, records, 0)
    frame = ordered(pd.DataFrame(rows), "accuracy", ascending=False)
    return Board("clean", "Merging without attack or defense", frame, ("accuracy", "normalised"), note)


def _rank(rows: Sequence[Row], records: Sequence[Record], reader: Reader) -> None:
    """Tiers of methods over the cells that they have in common."""
    mine = {
        row["method"]: [
            r
            for r in records
            if r.status == "done" and (r.merging, len(r.experts)) == (row["method"], row["experts"])
        ]
        for row in rows
    }
    common = common_cells({m: {cell_of(r, "merging") for r in group} for m, group in mine.items()})
    accuracy = {
        m: reader.rate(only(group, common.cells, "merging"), "acc", Role.CLEAN_MERGE, "all")
        if m in common.rows
        else nothing()
        for m, group in mine.items()
    }
    put_tiers(rows, tiers(list(accuracy.values())))
