"""Boards of protection: every cell, per defense its worst case, distances, ownership."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from mergesec.evidence.estimates import Board, Reader, Row, grouped, ordered, put, settled
from mergesec.evidence.records import Record
from mergesec.evidence.statistics import Estimate, nothing, ratio, tiers
from mergesec.threats import Role, Threat

LEAST_LOSS = 0.01
"""Recovery is undefined where protecting cost the merge less than one point: nothing to recover."""


def protection_boards(records: Sequence[Record], reader: Reader) -> list[Board]:
    """Every defense × attack × method, and per defense its worst case over attacks and methods."""
    records = [r for r in records if r.threat == Threat.PROTECTION]
    if not records:
        return []
    rows: list[Row] = []
    merged: dict[int, Estimate] = {}
    recoveries: dict[int, Estimate] = {}
    several = any(r.protected > 1 for r in records)
    key = grouped(records, lambda r: (r.defense, r.attack, r.merging, len(r.experts), r.protected, r.secrets))
    for (defense, attack, merging, experts, protected, secrets), group in key.items():
        row: Row = {"defense": defense, "attack": attack, "method": merging, "experts": experts}
        if several:
            row |= {"protected": protected, "secrets": secrets if protected > 1 else "own"}
        done = settled(row, group)
        part = {
            name: reader.rate(done, "acc", role, which)
            for name, role, which in (
                ("UMP-", Role.EXPERT, "subject"), ("UMP+", Role.PUBLISHED, "subject"),
                ("UMP_attacked", Role.RECOVERED, "subject"), ("MMP-", Role.CLEAN_MERGE, "subject"),
                ("MMP+", Role.PROTECTED_MERGE, "subject"), ("MMP_attacked", Role.MERGE, "subject"),
                ("free_rider-", Role.CLEAN_MERGE, "others"), ("free_rider+", Role.PROTECTED_MERGE, "others"),
                ("free_rider_attacked", Role.MERGE, "others"), ("base", Role.BASE, "subject"),
                ("UMP+_bf16", Role.PUBLISHED_BF16, "subject"),
            )
        }  # fmt: skip
        # attack none is the protection as it stands: it recovers nothing by definition
        undefined = attack == "none" or defense == "none"
        part["recovery"] = (
            nothing()
            if undefined
            else ratio(part["MMP_attacked"] - part["MMP+"], part["MMP-"] - part["MMP+"], LEAST_LOSS)
        )
        for name, estimate in part.items():
            put(row, name, estimate)
        gaps = [r.values["max_abs_dlogit"] for r in done if "max_abs_dlogit" in r.values]
        row["max_abs_dlogit"] = max(gaps) if gaps else math.nan
        merged[len(rows)], recoveries[len(rows)] = part["MMP_attacked"], part["recovery"]
        rows.append(row)
    measures = tuple(part)
    frame = pd.DataFrame(rows)
    detail = Board("protection_cells", "Protection: every defense × attack × method", frame, measures)
    boards = [_protection_summary(rows, records, reader, merged, recoveries), detail]
    return [b for b in (*boards, _distances(records), ownership_board(records, reader)) if b is not None]


STANDARD = "aga"
"""The published attack every protection is held to, shown beside the best known one."""


def _protection_summary(
    rows: list[Row], records: Sequence[Record], reader: Reader,
    merged: Mapping[int, Estimate], recoveries: Mapping[int, Estimate],
) -> Board:  # fmt: skip
    summary: list[Row] = []
    contest: list[Estimate] = []
    for (defense,), group in grouped(records, lambda r: (r.defense,)).items():
        row: Row = {"defense": defense}
        done = settled(row, group)
        before = reader.rate(done, "acc", Role.EXPERT, "subject")
        published = reader.rate(done, "acc", Role.PUBLISHED, "subject")
        put(row, "stand_alone", published)
        put(row, "stand_alone_loss", before - published)
        put(row, "stand_alone_loss_bf16", before - reader.rate(done, "acc", Role.PUBLISHED_BF16, "subject"))
        put(row, "MMP-", reader.rate(done, "acc", Role.CLEAN_MERGE, "subject"))
        put(row, "MMP+", reader.rate(done, "acc", Role.PROTECTED_MERGE, "subject"))
        mine = [i for i, r in enumerate(rows) if r["defense"] == defense and r["cells_done"]]
        standard, _ = _worst([i for i in mine if rows[i]["attack"] == STANDARD], rows, recoveries)
        put(row, f"recovery_{STANDARD}", standard)
        most, row["recovered_by"] = _worst(mine, rows, recoveries)
        put(row, "worst_recovery", most)
        worst, row["worst_by"] = _worst(mine, rows, merged)
        put(row, "worst_merged", worst)
        gaps = [r.values["max_abs_dlogit"] for r in done if "max_abs_dlogit" in r.values]
        row["max_abs_dlogit"] = max(gaps) if gaps else math.nan
        contest.append(most if defense != "none" else nothing())
        summary.append(row)
    for row, tier in zip(summary, tiers(contest, higher_is_better=False), strict=True):
        row["tier"] = tier
    frame = ordered(pd.DataFrame(summary), "worst_recovery", ascending=True)
    measures = (
        "stand_alone", "stand_alone_loss", "stand_alone_loss_bf16", "MMP-", "MMP+", f"recovery_{STANDARD}",
        "worst_recovery", "worst_merged",
    )  # fmt: skip
    note = (
        f"Sorted by recovery under the strongest attack and method, lower protects better; recovery_{STANDARD} is the "
        "standard attack. Recovery is a share of what protecting cost the merge (MMP- minus MMP+): a protection that "
        "costs it little is weak whatever its recovery; no number where it cost less than one point. MMP- and MMP+ are "
        "means over a row's own cells: compare rows that were run in the same settings."
    )
    return Board("protection", "Protection: per defense, worst case", frame, measures, note)


KINDS = ("query", "key", "value", "output", "up", "gate", "down", "other", "all")


def _distances(records: Sequence[Record]) -> Board | None:
    """Per defense and attack: how far the weights lie from the base and from the owner's expert, relative to
    the norm of what they are compared with; condition numbers; largest differences of logits."""
    rows: list[Row] = []
    done = [r for r in records if r.status == "done" and r.defense != "none"]
    for (defense, attack), group in grouped(done, lambda r: (r.defense, r.attack)).items():
        row: Row = {"defense": defense, "attack": attack}
        suffix = "" if attack == "none" else "_recovered"
        for which in ("to_expert", "to_base"):
            for kind in KINDS:
                found = [
                    r.values[f"distance{suffix}/{which}/{kind}"]
                    for r in group
                    if f"distance{suffix}/{which}/{kind}" in r.values
                ]
                if found:
                    row[f"{which}/{kind}"] = sum(found) / len(found)
        gaps = [r.values[f"max_abs_dlogit{suffix}"] for r in group if f"max_abs_dlogit{suffix}" in r.values]
        row["max_abs_dlogit"] = max(gaps) if gaps else math.nan
        conditions = [float(c) for r in group if (c := _reported(r, "condition")) is not None]
        row["condition"] = max(conditions) if conditions else math.nan
        rows.append(row)
    if not any(f"to_base/{kind}" in row for row in rows for kind in KINDS):
        return None
    note = "Attack none is the published expert, others what the attack made of it. to_x = ‖θ − x‖ / ‖x‖, means over cells; condition and max_abs_dlogit are maxima."
    return Board("protection_distances", "Protection: distances", pd.DataFrame(rows), (), note)


def _reported(record: Record, name: str) -> Any:
    return record.facts.get("protection", {}).get(name)


SUSPECTS = (
    Role.PUBLISHED,
    Role.RECOVERED,
    Role.PROTECTED_MERGE,
    Role.MERGE,
    Role.CLEAN_MERGE,
    Role.EXPERT,
    Role.BASE,
)


def ownership_board(records: Sequence[Record], reader: Reader) -> Board | None:
    """Per mark × attack × method: share of queries or bits that answer, and share of cells that verify, on
    each suspect. ``clean_merge``, ``expert`` and ``base`` were never marked: what verifies there is a false alarm."""
    records = [r for r in records if any(name.startswith("mark/") for name in r.counts)]
    if not records:
        return None
    rows: list[Row] = []
    groups = grouped(records, lambda r: (r.defense, r.attack, r.merging, len(r.experts)))
    for (defense, attack, merging, experts), group in groups.items():
        row: Row = {"defense": defense, "attack": attack, "method": merging, "experts": experts}
        done = settled(row, group)
        for suspect in SUSPECTS:
            found = [r.values[f"detected/{suspect}"] for r in done if f"detected/{suspect}" in r.values]
            row[f"verified/{suspect}"] = sum(found) / len(found) if found else math.nan
        for suspect in SUSPECTS:
            put(row, f"mark/{suspect}", reader.rate(done, "mark", suspect, "subject"))
        put(
            row,
            "stand_alone_loss",
            reader.rate(done, "acc", Role.EXPERT, "subject")
            - reader.rate(done, "acc", Role.PUBLISHED, "subject"),
        )
        rows.append(row)
    measures = (*(f"mark/{s}" for s in SUSPECTS), "stand_alone_loss")
    note = "verified = share of cells in which the owner's test says yes; merge is after the free-rider's attack. clean_merge, expert and base bear no mark."
    return Board("ownership", "Ownership: marks after merging", pd.DataFrame(rows), measures, note)


def _worst(mine: Sequence[int], rows: Sequence[Row], of: Mapping[int, Estimate]) -> tuple[Estimate, str]:
    """The owner's worst case among rows: the largest measured estimate, and what attack and method it is."""
    measured = [i for i in mine if not math.isnan(of[i].value)]
    if not measured:
        return nothing(), ""
    place = max(measured, key=lambda i: of[i].value)
    return of[place], f"{rows[place]['attack']} + {rows[place]['method']}"
