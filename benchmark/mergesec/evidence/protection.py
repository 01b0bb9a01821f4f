"""Boards of protection: every cell, per defense its worst case, distances, ownership."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pandas as pd

from mergesec.evidence.estimates import (
    Board,
    Cell,
    Common,
    Reader,
    Row,
    about_tiers,
    average,
    cell_of,
    common_cells,
    fewest_seeds,
    grouped,
    only,
    ordered,
    put,
    put_tiers,
    settled,
    value,
)
from mergesec.evidence.records import Record
from mergesec.evidence.statistics import Estimate, largest, nothing, ratio, tiers_of_largest
from mergesec.threats import Role, Threat

LEAST_LOSS = 0.01
"""Recovery is undefined where protecting cost the merge at most one point: nothing to recover."""
STANDARD = "aga"
"""The published attack every protection is held to, shown beside the best known one."""

_RATES = (
    ("UMP-", Role.EXPERT, "subject"), ("UMP+", Role.PUBLISHED, "subject"),
    ("UMP_attacked", Role.RECOVERED, "subject"), ("MMP-", Role.CLEAN_MERGE, "subject"),
    ("MMP+", Role.PROTECTED_MERGE, "subject"), ("MMP_attacked", Role.MERGE, "subject"),
    ("free_rider-", Role.CLEAN_MERGE, "others"), ("free_rider+", Role.PROTECTED_MERGE, "others"),
    ("free_rider_attacked", Role.MERGE, "others"), ("base", Role.BASE, "subject"),
    ("UMP+_bf16", Role.PUBLISHED_BF16, "subject"),
)  # fmt: skip


def protection_boards(records: Sequence[Record], reader: Reader) -> list[Board]:
    """Every defense × attack × method, and per defense its worst case over attacks and methods."""
    records = [r for r in records if r.threat == Threat.PROTECTION]
    if not records:
        return []
    detail, tried = _detail(records, reader)
    boards = [_summary(records, tried, reader), detail, _victims(records, reader)]
    return [b for b in (*boards, _distances(records), ownership_board(records, reader)) if b is not None]


def _setting(record: Record) -> tuple[Any, ...]:
    """What a row of the detailed boards is about."""
    return (
        record.defense, record.attack, record.merging, len(record.experts), record.protected, record.secrets,
    )  # fmt: skip


def _opening(setting: tuple[Any, ...], several: bool) -> Row:
    defense, attack, merging, experts, protected, secrets = setting
    row: Row = {"defense": defense, "attack": attack, "method": merging, "experts": experts}
    if several:
        row |= {"protected": protected, "secrets": secrets if protected > 1 else "own"}
    return row


class _Tried(NamedTuple):
    """What an attack came to over all finished cells of a row of the detailed board."""

    cells: int
    recovery: Estimate
    merged: Estimate


def _detail(records: Sequence[Record], reader: Reader) -> tuple[Board, dict[tuple[Any, ...], _Tried]]:
    """Every row, and of each what the board of defenses looks at, so that it is not counted twice."""
    rows: list[Row] = []
    tried: dict[tuple[Any, ...], _Tried] = {}
    several = any(r.protected > 1 for r in records)
    measures: tuple[str, ...] = ()
    groups = grouped(records, _setting)
    opened = {setting: _opening(setting, several) for setting in groups}
    finished = {setting: settled(opened[setting], group) for setting, group in groups.items()}
    for (setting, done), part in zip(finished.items(), _rates_of(finished.values(), reader), strict=True):
        row = opened[setting]
        for name, estimate in part.items():
            put(row, name, estimate)
        row["max_abs_dlogit"] = _greatest(done, "max_abs_dlogit")
        rows.append(row)
        tried[setting] = _Tried(len(done), part["recovery"], part["MMP_attacked"])
        measures = tuple(part)
    frame = pd.DataFrame(rows)
    return Board("protection_cells", "Protection: every defense × attack × method", frame, measures), tried


_BY_VICTIM = (
    "UMP-", "UMP+", "MMP-", "MMP+", "MMP_attacked", "free_rider-", "free_rider+", "free_rider_attacked", "base",
    "recovery",
)  # fmt: skip


def _victims(records: Sequence[Record], reader: Reader) -> Board | None:
    """The rows of the board of every cell, one for each victim: whether a finding is one of all of them. None where
    there is but one."""
    done = [r for r in records if r.status == "done"]
    if len({r.subject for r in done}) < 2:
        return None
    several = any(r.protected > 1 for r in records)
    groups = grouped(done, lambda r: (*_setting(r), r.subject))
    rows: list[Row] = []
    for (key, mine), part in zip(groups.items(), _rates_of(groups.values(), reader), strict=True):
        row: Row = {"victim": key[-1], **_opening(key[:-1], several)}
        row |= {"cells_done": len(mine), "cells_expected": len(mine), "seeds": fewest_seeds(mine)}
        for name in _BY_VICTIM:
            put(row, name, part[name])
        rows.append(row)
    note = "As on the board of every cell, victim by victim: finished cells only."
    return Board("protection_victims", "Protection: victim by victim", pd.DataFrame(rows), _BY_VICTIM, note)


def protection_rates(records: Sequence[Record], reader: Reader) -> dict[str, Estimate]:
    """The rates of one row of the board of every cell."""
    return next(_rates_of([records], reader))


def _rates_of(rows: Collection[Sequence[Record]], reader: Reader) -> Iterator[dict[str, Estimate]]:
    wanted = [("acc", role, which) for _, role, which in _RATES]
    for records, found in zip(rows, reader.rates_of(rows, wanted), strict=True):
        part = dict(zip((name for name, *_ in _RATES), found, strict=True))
        yield part | {"recovery": _recovery(records, part["MMP-"], part["MMP+"], part["MMP_attacked"])}


def _recovery(
    records: Sequence[Record], before: Estimate, protected: Estimate, attacked: Estimate
) -> Estimate:
    """What share of the merge's loss an attack brings back. Attack none is the protection as it stands: it
    recovers nothing by definition."""
    if not records or records[0].attack == "none" or records[0].defense == "none":
        return nothing()
    return ratio(attacked - protected, before - protected, LEAST_LOSS)


_MERGES = (Role.CLEAN_MERGE, Role.PROTECTED_MERGE, Role.MERGE)


def _trial(records: Sequence[Record], known: _Tried, reader: Reader) -> _Tried:
    """What an attack came to over some of the cells of its row; over all of them it is known."""
    if len(records) == known.cells:
        return known
    rates = reader.rates(records, [("acc", role, "subject") for role in _MERGES])
    return _Tried(len(records), _recovery(records, *rates), rates[2])


def _greatest(records: Sequence[Record], name: str) -> float:
    return max((r.values[name] for r in records if name in r.values), default=math.nan)


# --------------------------------------------------------------------------- per defense


@dataclass
class _Contestant:
    """A defense: its cells that are compared, and by what attack and method it is tried in them."""

    row: Row
    unattacked: list[Record] = field(default_factory=list)
    """One record for each of the compared cells without their attacks; none unless it has them all."""
    trials: dict[tuple[Any, ...], list[Record]] = field(default_factory=dict)
    """By attack, method and what else a row of the detailed board names; none unless it has all cells that are
    compared."""


def _summary(records: Sequence[Record], known: Mapping[tuple[Any, ...], _Tried], reader: Reader) -> Board:
    contestants = _contestants(records)
    contest: list[list[Estimate]] = []
    for one in contestants:
        row, plain = one.row, one.unattacked
        row["seeds"] = fewest_seeds(plain)
        before = reader.rate(plain, "acc", Role.EXPERT, "subject")
        published = reader.rate(plain, "acc", Role.PUBLISHED, "subject")
        put(row, "stand_alone", published)
        put(row, "stand_alone_loss", before - published)
        put(row, "stand_alone_loss_bf16", before - reader.rate(plain, "acc", Role.PUBLISHED_BF16, "subject"))
        put(row, "MMP-", reader.rate(plain, "acc", Role.CLEAN_MERGE, "subject"))
        put(row, "MMP+", reader.rate(plain, "acc", Role.PROTECTED_MERGE, "subject"))
        names = [f"{attack} + {method}" for attack, method, *_ in one.trials]
        defense = row["defense"]
        trials = {key: _trial(group, known[defense, *key], reader) for key, group in one.trials.items()}
        recovered = {key: trial.recovery for key, trial in trials.items()}
        standard, _ = largest([e for key, e in recovered.items() if key[0] == STANDARD])
        put(row, f"recovery_{STANDARD}", standard)
        most, at = largest(list(recovered.values()))
        row["recovered_by"] = names[at] if at >= 0 else ""
        put(row, "worst_recovery", most)
        worst, at = largest([trial.merged for trial in trials.values()])
        row["worst_by"] = names[at] if at >= 0 else ""
        put(row, "worst_merged", worst)
        contest.append([] if defense == "none" else list(recovered.values()))
    rows = [one.row for one in contestants]
    put_tiers(rows, tiers_of_largest(contest))
    frame = ordered(pd.DataFrame(rows), "worst_recovery", ascending=True)
    measures = (
        "stand_alone", "stand_alone_loss", "stand_alone_loss_bf16", "MMP-", "MMP+", f"recovery_{STANDARD}",
        "worst_recovery", "worst_merged",
    )  # fmt: skip
    note = (
        f"Sorted by recovery under the strongest attack and method, lower protects better; recovery_{STANDARD} is the "
        "standard attack. Recovery is a share of what protecting cost the merge (MMP- minus MMP+): a protection that "
        "costs it little is weak whatever its recovery; no number where it cost less than one point or cannot be told "
        "from nothing. All numbers are over the same cells (cells_compared); a defense that lacks some of them has "
        "none: see the board of every cell."
    )
    return Board(
        "protection", "Protection: per defense, worst case", frame, measures, note + about_tiers(rows)
    )


def _contestants(records: Sequence[Record]) -> list[_Contestant]:
    """The defenses, with the records on the cells that those which can be compared have in common. The
    undefended rows do not choose the cells: they are there to be looked at."""
    found, done = [], {}
    for (defense,), group in grouped(records, lambda r: (r.defense,)).items():
        row: Row = {"defense": defense}
        done[defense] = settled(row, group)
        row["max_abs_dlogit"] = _greatest(done[defense], "max_abs_dlogit")
        found.append(_Contestant(row))
    choosing = {d: mine for d, mine in done.items() if d != "none"} or done
    common = common_cells({d: {cell_of(r, "defense") for r in mine} for d, mine in choosing.items()})
    compared = [r for mine in done.values() for r in only(mine, common.cells, "defense")]
    bare = {cell_of(r, "defense", "attack") for r in compared}
    for one in found:
        _take(one, done[one.row["defense"]], common, bare)
    return found


def _take(one: _Contestant, done: Sequence[Record], common: Common, bare: set[Cell]) -> None:
    """Give a contestant its records of the compared cells."""
    first = {cell_of(r, "defense", "attack"): r for r in reversed(done)}
    if bare and bare <= first.keys():
        one.unattacked = [first[cell] for cell in first if cell in bare]
    mine = only(done, common.cells, "defense")
    one.row["cells_compared"] = len(mine)
    if mine and len(mine) == len(common.cells):
        one.trials = grouped(mine, lambda r: _setting(r)[1:])


# --------------------------------------------------------------------------- distances and marks


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
                found = average(group, value(f"distance{suffix}/{which}/{kind}"))
                if not math.isnan(found):
                    row[f"{which}/{kind}"] = found
        row["max_abs_dlogit"] = _greatest(group, f"max_abs_dlogit{suffix}")
        conditions = [float(c) for r in group if (c := _reported(r, "condition")) is not None]
        row["condition"] = max(conditions, default=math.nan)
        rows.append(row)
    if not any(f"to_base/{kind}" in row for row in rows for kind in KINDS):
        return None
    note = "Attack none is the published expert, others what the attack made of it. to_x = ‖θ − x‖ / ‖x‖, means by subject; condition and max_abs_dlogit are maxima."
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
    records = [r for r in records if "\nmark/" in "\n".join(["", *r.counts])]
    if not records:
        return None
    rows: list[Row] = []
    several = any(r.protected > 1 for r in records)
    for setting, group in grouped(records, _setting).items():
        row = _opening(setting, several)
        done = settled(row, group)
        for suspect in SUSPECTS:
            row[f"verified/{suspect}"] = average(done, value(f"detected/{suspect}"))
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
