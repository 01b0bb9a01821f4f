"""Boards of the backdoor threat: every cell, the Pareto fronts, the worst attack per defense, the best defense per attack."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mergesec.evidence.estimates import Board, Reader, Row, grouped, ordered, put, settled
from mergesec.evidence.records import Record
from mergesec.evidence.statistics import Estimate, mean, nothing, tiers
from mergesec.threats import Role, Threat

AFFORDABLE = 0.02
"""Accuracy that a defense may cost to be called an attack's best answer."""
UNLIKELY = 0.025
"""A pair that lies on the Pareto front in at most this share of bootstrap draws is dominated."""

_RATES = (
    ("CA", "acc", Role.CLEAN_MERGE, "all"), ("BA", "acc", Role.MERGE, "all"),
    ("ASR_alone", "asr", Role.POISONED, "target"), ("acc_alone", "acc", Role.POISONED, "subject"),
    ("succession", "asr", Role.MERGE, "target"), ("transfer", "asr", Role.MERGE, "others"),
    ("succession_clean_merge", "asr", Role.CLEAN_MERGE, "target"),
    ("transfer_clean_merge", "asr", Role.CLEAN_MERGE, "others"),
    ("succession_base", "asr", Role.BASE, "target"), ("transfer_base", "asr", Role.BASE, "others"),
    ("RA", "ra", Role.MERGE, "target"),
)  # fmt: skip
_VISIBILITY = ("area", "l2", "ssim", "changed", "tokens")


class Contest(NamedTuple):
    """What pairs of merge method and defense compete in."""

    attack: str
    experts: int
    adversaries: int
    target_task: str


@dataclass
class Setting:
    """One row of the detailed board: an attack on a merge method under a defense."""

    attack: str
    method: str
    defense: str
    experts: int
    adversaries: int
    target_task: str
    row: Row
    done: list[Record]
    part: dict[str, Estimate] = field(default_factory=dict)
    level: dict[str, Estimate] = field(default_factory=dict)
    """BA, succession and backdoor over the cells that all settings of this contest have; over its own if none."""
    shared: int = 0
    """How many cells those are."""

    @property
    def contest(self) -> Contest:
        return Contest(self.attack, self.experts, self.adversaries, self.target_task)

    @property
    def pair(self) -> str:
        return self.method if self.defense == "none" else f"{self.method} + {self.defense}"


def backdoor_boards(records: Sequence[Record], reader: Reader) -> list[Board]:
    """Detailed board, Pareto fronts, defenses, attacks; those that the records support."""
    records = [r for r in records if r.threat == Threat.BACKDOOR]
    if not records:
        return []
    settings = _settings(records, reader)
    boards = [_cells_board(settings), _pareto(settings), _defenses(settings), _attacks(settings)]
    return [b for b in boards if b is not None]


def _settings(records: Sequence[Record], reader: Reader) -> list[Setting]:
    several = {r.adversaries for r in records if r.attack != "none"} - {1}
    elsewhere = any(r.target_task for r in records)
    settings = []
    key = grouped(
        records,
        lambda r: (r.attack, r.merging, r.defense, len(r.experts), r.adversaries, r.target_task),
    )
    for (attack, method, defense, experts, adversaries, target_task), group in key.items():
        row: Row = {"attack": attack, "method": method, "defense": defense, "experts": experts}
        if several:
            row["adversaries"] = adversaries
        if elsewhere:
            row["target_task"] = target_task
        done = settled(row, group)
        found = Setting(attack, method, defense, experts, adversaries, target_task, row, done)
        found.part = _rates(done, reader)
        found.part["backdoor_transfer"] = found.part["transfer"] - found.part["transfer_clean_merge"]
        settings.append(found)
    for setting, plain in _beside_undefended(settings):
        before, after = _paired(plain, setting, reader)
        setting.part["DER"] = _der(before, after) if before else nothing()
        setting.part["accuracy_cost"] = before["BA"] - after["BA"] if before else nothing()
    _level(settings, reader)
    return settings


def _rates(records: Sequence[Record], reader: Reader) -> dict[str, Estimate]:
    part = {name: reader.rate(records, m, role, which) for name, m, role, which in _RATES}
    return part | {"backdoor": part["succession"] - part["succession_clean_merge"]}


def _coordinates(record: Record) -> tuple[Any, ...]:
    """What makes a cell comparable with one of another method or defense."""
    return record.subject, record.target_class, tuple(record.experts), record.seed


def _only(records: Iterable[Record], coordinates: set[tuple[Any, ...]]) -> list[Record]:
    return [r for r in records if _coordinates(r) in coordinates]


def _paired(
    plain: Setting | None, setting: Setting, reader: Reader
) -> tuple[dict[str, Estimate], dict[str, Estimate]]:
    """Rates without and with the defense over the cells that have both; empty if there are none."""
    if plain is None:
        return {}, {}
    shared = {_coordinates(r) for r in plain.done} & {_coordinates(r) for r in setting.done}
    if not shared:
        return {}, {}
    before, after = (_rates(_only(s.done, shared), reader) for s in (plain, setting))
    return before, after


def _level(settings: Sequence[Setting], reader: Reader) -> None:
    """Rates of settings that compete, over the cells that all of them have."""
    for group in _by([s for s in settings if s.done], lambda s: s.contest).values():
        shared = set.intersection(*({_coordinates(r) for r in s.done} for s in group))
        for setting in group:
            setting.shared = len(shared)
            setting.level = _rates(_only(setting.done, shared) or setting.done, reader)


def _beside_undefended(settings: Sequence[Setting]) -> list[tuple[Setting, Setting | None]]:
    """Each setting with the same one without a defense; None for those that have none."""
    plain = {(s.contest, s.method): s for s in settings if s.defense == "none"}
    return [(s, None if s.defense == "none" else plain.get((s.contest, s.method))) for s in settings]


def _der(before: Mapping[str, Estimate], after: Mapping[str, Estimate]) -> Estimate:
    """Defense effectiveness rating, [max(0, ΔASR) − max(0, ΔACC) + 1] / 2."""
    asr, acc = before["succession"] - after["succession"], before["BA"] - after["BA"]
    value = (max(0.0, asr.value) - max(0.0, acc.value) + 1) / 2
    if math.isnan(asr.value) or math.isnan(acc.value):
        return nothing()
    return Estimate(value, (asr.draws.clip(min=0) - acc.draws.clip(min=0) + 1) / 2)


def _average(numbers: Iterable[float]) -> float:
    found = list(numbers)
    return sum(found) / len(found) if found else math.nan


def _told(records: Iterable[Record], name: str) -> float:
    """Mean of a value over the records that have it."""
    return _average(r.values[name] for r in records if name in r.values)


def _rows(records: Iterable[Record], side: str) -> list[float]:
    """Rows of data of an attack or a defense, of the records that tell."""
    return [r.cost[side]["rows"] for r in records if "rows" in r.cost.get(side, {})]


def _put_known(row: Row, numbers: Mapping[str, float]) -> None:
    """Columns for what is known; a column that no row knows is left out of the board."""
    row.update({name: number for name, number in numbers.items() if not math.isnan(number)})


def _looks_and_data(row: Row, done: Sequence[Record], sides: Sequence[str]) -> None:
    """Columns on what a trigger looks like, whom a screen kept out, and rows of data. What was measured by the
    clock is on the board of costs alone: the others come out the same in every run."""
    if "attack" in sides:
        _put_known(row, {f"visibility/{name}": _told(done, f"visibility/{name}") for name in _VISIBILITY})
    if "defense" in sides:
        screens = {"caught": "screen/caught", "false_alarms": "screen/false"}
        _put_known(row, {column: _told(done, name) for column, name in screens.items()})
    for side in sides:
        _put_known(row, {f"{side}_rows": _average(_rows(done, side))})


# --------------------------------------------------------------------------- every cell


def _cells_board(settings: Sequence[Setting]) -> Board:
    """Per attack × method × defense: accuracy and ASR beside the controls, visibility, data used."""
    measures = tuple(settings[0].part)
    for setting in settings:
        for name in measures:
            put(setting.row, name, setting.part[name])
        _looks_and_data(setting.row, setting.done, ("attack", "defense"))
    contests: dict[tuple[Any, ...], list[Setting]] = {}
    for setting in settings:
        contests.setdefault((setting.contest, setting.method), []).append(setting)
    for contest in contests.values():
        ranked = tiers([s.part["succession"] for s in contest], higher_is_better=False)
        for setting, tier in zip(contest, ranked, strict=True):
            setting.row["tier"] = tier if setting.attack != "none" else 0
    note = (
        "ASR on non-target samples. `backdoor` = succession minus the same trigger on the clean merge. Tiers rank "
        "defenses within one attack and method."
    )
    frame = pd.DataFrame([s.row for s in settings])
    return Board("backdoor", "Backdoor: attack × method × defense", frame, measures, note)


# --------------------------------------------------------------------------- Pareto fronts


def _contests(settings: Iterable[Setting]) -> dict[Contest, list[Setting]]:
    """Measured settings under an attack, by what they compete in."""
    found: dict[Contest, list[Setting]] = {}
    for s in settings:
        if s.attack != "none" and _measured(s):
            found.setdefault(s.contest, []).append(s)
    return found


def _measured(s: Setting) -> bool:
    return bool(s.level) and not math.isnan(s.level["BA"].value + s.level["succession"].value)


def dominance(accuracy: Sequence[Estimate], asr: Sequence[Estimate]) -> tuple[Any, Any, Any]:
    """(by estimate ``[n, n]``, by share of draws ``[n, n]``, share of draws on the front ``[n]``).

    Entry [i, j]: j has at least i's accuracy and at most its ASR, and is better in one of them.
    """
    acc, hit = (np.array([e.value for e in part])[:, None] for part in (accuracy, asr))
    drawn_acc, drawn_hit = (np.stack([e.draws for e in part]) for part in (accuracy, asr))

    def beaten(up: Any, down: Any, i: int) -> Any:
        as_good = (up >= up[i]) & (down <= down[i])
        return as_good & ((up > up[i]) | (down < down[i]))

    point = np.stack([beaten(acc, hit, i)[:, 0] for i in range(len(accuracy))])
    share = np.empty(point.shape)
    front = np.empty(len(accuracy))
    for i in range(len(accuracy)):
        over = beaten(drawn_acc, drawn_hit, i)
        share[i], front[i] = over.mean(1), 1 - over.any(0).mean()
    return point, share, front


def _pareto(settings: Sequence[Setting]) -> Board | None:
    """Per attack: which pairs of method and defense no other pair beats in accuracy and ASR at once."""
    rows: list[Row] = []
    for contest in _contests(settings).values():
        point, share, front = dominance(
            [s.level["BA"] for s in contest], [s.level["succession"] for s in contest]
        )
        mine: list[Row] = []
        for i, setting in enumerate(contest):
            over = np.flatnonzero(point[i])
            best = max(over, key=lambda j: share[i][j]) if len(over) else None
            keys = ("attack", "method", "defense", "experts", "adversaries", "target_task")
            row: Row = {k: setting.row[k] for k in keys if k in setting.row}
            row |= {k: setting.row[k] for k in ("cells_done", "cells_expected", "seeds")}
            row["cells_compared"] = setting.shared
            for name in ("BA", "succession", "backdoor"):
                put(row, name, setting.level[name])
            row["front"] = "no" if len(over) else "yes"
            row["front_share"] = float(front[i])
            row["dominated_by"] = contest[best].pair if best is not None else ""
            row["tier"] = 1 if front[i] > UNLIKELY or not len(over) else 2
            mine.append(row)
        rows += sorted(mine, key=lambda r: (r["front"] == "no", -r["BA"]))
    if not rows:
        return None
    note = (
        "front: no other pair of the same attack has at least its accuracy (BA) and at most its ASR (succession) and "
        "is better in one. front_share: share of bootstrap draws in which that holds; tier 2 where it holds in at most "
        "2.5 % of them. dominated_by: the pair that does so in most draws. All numbers are over the cells that all pairs "
        "of the attack have (cells_compared; 0: they have none in common, and each is shown over its own)."
    )
    title = "Backdoor: accuracy against ASR, Pareto fronts"
    return Board("backdoor_pareto", title, pd.DataFrame(rows), ("BA", "succession", "backdoor"), note)


# --------------------------------------------------------------------------- per defense


def _named(setting: Setting) -> str:
    """Attack, method and, where they are not the usual ones, adversaries and target task."""
    extra = f" × {setting.adversaries}" if setting.adversaries > 1 else ""
    aim = f" → {setting.target_task}" if setting.target_task else ""
    return f"{setting.attack}{extra}{aim} + {setting.method}"


def _defenses(settings: Sequence[Setting]) -> Board | None:
    """Per defense: the attack and method under which most of a backdoor is left, and what it costs."""
    rows: list[Row] = []
    contest: list[Estimate] = []
    for (defense,), group in _by(settings, lambda s: (s.defense,)).items():
        attacked = [s for s in group if s.attack != "none" and not math.isnan(s.part["backdoor"].value)]
        if not attacked:
            continue
        worst = max(attacked, key=lambda s: s.part["backdoor"].value)
        row: Row = {"defense": defense, **_completeness(group)}
        put(row, "worst_backdoor", worst.part["backdoor"])
        row["worst_by"] = _named(worst)
        put(row, "worst_ASR", worst.part["succession"])
        put(row, "mean_backdoor", mean([s.part["backdoor"] for s in attacked]))
        costs = [e for s in group if not math.isnan((e := s.part["accuracy_cost"]).value)]
        put(row, "accuracy_cost", mean(costs))
        put(row, "worst_accuracy_cost", max(costs, key=lambda e: e.value, default=nothing()))
        put(row, "RA", mean([s.part["RA"] for s in attacked]))
        ders = [e for s in attacked if not math.isnan((e := s.part["DER"]).value)]
        put(row, "DER", mean(ders))
        _looks_and_data(row, [r for s in group for r in s.done], ("defense",))
        rows.append(row)
        contest.append(worst.part["backdoor"])
    if not rows:
        return None
    for row, tier in zip(rows, tiers(contest, higher_is_better=False), strict=True):
        row["tier"] = tier
    measures = (
        "worst_backdoor", "worst_ASR", "mean_backdoor", "accuracy_cost", "worst_accuracy_cost", "RA", "DER",
    )  # fmt: skip
    note = (
        "worst_backdoor: the largest ASR minus the same trigger on the clean merge, over attacks and methods. "
        "accuracy_cost: BA without minus BA with the defense, over the cells that have both. Compare rows that met the "
        "same attacks and methods."
    )
    frame = ordered(pd.DataFrame(rows), "worst_backdoor", ascending=True)
    return Board("backdoor_defenses", "Backdoor: per defense, worst attack", frame, measures, note)


def _by(settings: Iterable[Setting], key: Any) -> dict[tuple[Any, ...], list[Setting]]:
    groups: dict[tuple[Any, ...], list[Setting]] = {}
    for setting in settings:
        groups.setdefault(key(setting), []).append(setting)
    return groups


def _completeness(group: Sequence[Setting]) -> Row:
    return {
        "cells_done": sum(s.row["cells_done"] for s in group),
        "cells_expected": sum(s.row["cells_expected"] for s in group),
        "seeds": len({r.seed for s in group for r in s.done}),
    }


# --------------------------------------------------------------------------- per attack


@dataclass
class _Answer:
    """A defense against one attack, over the methods that were run with and without it."""

    defense: str
    asr: Estimate
    backdoor: Estimate
    cost: Estimate


def _answers(group: Sequence[Setting]) -> list[_Answer]:
    plain = {s.method: s for s in group if s.defense == "none" and _measured(s)}
    found = []
    for (defense,), mine in _by(group, lambda s: (s.defense,)).items():
        both = [s for s in mine if _measured(s) and s.method in plain]
        if defense != "none" and both:
            asr, left = (mean([s.level[name] for s in both]) for name in ("succession", "backdoor"))
            cost = mean([plain[s.method].level["BA"] - s.level["BA"] for s in both])
            found.append(_Answer(defense, asr, left, cost))
    return found


def _best_pair(group: Sequence[Setting]) -> Setting | None:
    """The pair of method and defense with the lowest ASR among those near the best undefended accuracy."""
    measured = [s for s in group if _measured(s)]
    plain = [s.level["BA"].value for s in measured if s.defense == "none"]
    if not plain:
        return None
    near = [s for s in measured if s.level["BA"].value >= max(plain) - AFFORDABLE]
    return min(near, key=lambda s: s.level["succession"].value, default=None)


_BEFORE = (
    "CA", "BA", "ASR_alone", "acc_alone", "succession", "succession_clean_merge", "succession_base", "backdoor",
    "transfer", "transfer_clean_merge", "backdoor_transfer",
)  # fmt: skip


def _attacks(settings: Sequence[Setting]) -> Board | None:
    """Per attack: what is left of it in undefended merges, and what answers it best."""
    rows: list[Row] = []
    contest: list[Estimate] = []
    attacked = [s for s in settings if s.attack != "none"]
    for _, group in _by(attacked, lambda s: s.contest).items():
        first = group[0]
        row: Row = {"attack": first.attack, "experts": first.experts}
        row |= {k: first.row[k] for k in ("adversaries", "target_task") if k in first.row}
        row |= _completeness(group)
        plain = [s for s in group if s.defense == "none" and not math.isnan(s.part["succession"].value)]
        for name in _BEFORE:
            put(row, name, mean([s.part[name] for s in plain if not math.isnan(s.part[name].value)]))
        cheap = [a for a in _answers(group) if a.cost.value <= AFFORDABLE]
        best = min(cheap, key=lambda a: a.asr.value, default=None)
        row["best_defense"] = best.defense if best else ""
        put(row, "best_ASR", best.asr if best else nothing())
        put(row, "best_backdoor", best.backdoor if best else nothing())
        put(row, "best_cost", best.cost if best else nothing())
        pair = _best_pair(group)
        row["best_pair"] = pair.pair if pair else ""
        put(row, "best_pair_ASR", pair.level["succession"] if pair else nothing())
        put(row, "best_pair_BA", pair.level["BA"] if pair else nothing())
        _looks_and_data(row, [r for s in group for r in s.done], ("attack",))
        rows.append(row)
        contest.append(mean([s.part["backdoor"] for s in plain]))
    if not rows:
        return None
    for row, tier in zip(rows, tiers(contest), strict=True):
        row["tier"] = tier
    answers = ("best_ASR", "best_backdoor", "best_cost", "best_pair_ASR", "best_pair_BA")
    note = (
        "Means over methods without a defense. best_defense: lowest mean ASR among defenses that cost at most 2 points "
        "of accuracy, over the methods run with and without it (best_cost: what it costs). best_pair: lowest ASR among "
        "pairs at most 2 points below the most accurate undefended merge. Both over the cells that all pairs of the "
        "attack have. A minimum over noisy rows is biased downwards."
    )
    frame = pd.DataFrame(rows)
    return Board("backdoor_attacks", "Backdoor: per attack, best defense", frame, (*_BEFORE, *answers), note)
