"""Boards of the backdoor threat: every cell, the Pareto fronts, the worst attack per defense, the best defense per attack."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
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
    put_nothing,
    put_origin,
    put_tiers,
    settled,
    value,
)
from mergesec.evidence.records import Record
from mergesec.evidence.statistics import (
    FEWEST_SEEDS,
    Estimate,
    combined,
    inseparable,
    largest,
    mean,
    nothing,
    tiers,
    tiers_of_largest,
)
from mergesec.threats import Role, Threat

AFFORDABLE = 0.02
"""Accuracy that a defense may cost to be called an attack's best answer."""
AFFORDABLE_RECALL = 0.10
"""And accuracy on the target class: giving that class up is no answer."""
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
_SETTING = ("attack", "method", "defense", "experts", "adversaries", "target_task")
"""Columns that say which setting a row is of."""
_VISIBILITY = ("area", "l2", "ssim", "changed", "tokens")
Rates = dict[str, Estimate]


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
    part: Rates = field(default_factory=dict)
    level: Rates = field(default_factory=dict)
    """Rates over the cells that are compared in this contest; empty if the setting lacks some of them."""
    shared: list[Record] = field(default_factory=list)
    """The records of those cells."""
    adversaries_rows: list[Row] = field(default_factory=list)
    """One for each adversary, where there are several."""

    @property
    def contest(self) -> Contest:
        return Contest(self.attack, self.experts, self.adversaries, self.target_task)

    @property
    def pair(self) -> str:
        return self.method if self.defense == "none" else f"{self.method} + {self.defense}"

    def cells(self, *without: str) -> set[Cell]:
        """Its cells without the axes in which competitors differ."""
        return {cell_of(r, *without) for r in self.done}

    def rates_over(self, records: Sequence[Record], reader: Reader) -> Rates:
        """Its rates over some of its records; over all of them they are known."""
        return self.part if len(records) == len(self.done) else backdoor_rates(records, reader)


def backdoor_boards(records: Sequence[Record], reader: Reader) -> list[Board]:
    """Detailed board, Pareto fronts, defenses, attacks; those that the records support."""
    records = [r for r in records if r.threat == Threat.BACKDOOR]
    if not records:
        return []
    settings = _settings(records, reader)
    boards = [
        _cells_board(settings, reader), _adversaries(settings), _pareto(settings),
        _defenses(settings, reader), _attacks(settings, reader),
    ]  # fmt: skip
    return [b for b in boards if b is not None]


def _settings(records: Sequence[Record], reader: Reader) -> list[Setting]:
    several = {r.adversaries for r in records if r.attack != "none"} - {1}
    elsewhere = any(r.target_task for r in records)
    contested = len({r.subject for r in records if r.attack != "none" and r.status == "done"}) > 1
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
        found.part = backdoor_rates(done, reader)
        if contested and attack != "none":  # now, while what was counted for the row is at hand
            found.adversaries_rows = _by_adversary(found, reader)
        settings.append(found)
    for setting, plain in _beside_undefended(settings):
        setting.part |= _price(plain.done if plain else [], setting.done, reader)
    _level(settings, reader)
    return settings


def backdoor_rates(records: Sequence[Record], reader: Reader) -> Rates:
    """The rates of one row of the board of every cell, but for what needs other rows."""
    control = control_of(records)
    names = (*(name for name, *_ in _RATES), "succession_control", "transfer_control", "clean", "harmed")
    also = [
        ("asr", control, "target"), ("asr", control, "others"),
        ("ra", Role.CLEAN_MERGE, "others"), ("ra", Role.MERGE, "others"),
    ]  # fmt: skip
    found = reader.rates(records, [*((m, role, which) for _, m, role, which in _RATES), *also])
    part = dict(zip(names, found, strict=True))
    clean, harmed, transferred = (part.pop(name) for name in ("clean", "harmed", "transfer_control"))
    return part | {
        "backdoor": part["succession"] - part["succession_control"],
        "backdoor_transfer": part["transfer"] - transferred,
        "transfer_harm": clean - harmed,
        "target_recall": reader.recall(records, Role.MERGE),
        "target_recall_clean_merge": reader.recall(records, Role.CLEAN_MERGE),
    }


def control_of(records: Sequence[Record]) -> Role:
    """What a backdoor is read beside: the same defense on clean experts, where all records have that (those of
    before 0.1 have not), else the clean merge without a defense."""
    known = bool(records) and all(
        any(name.startswith(f"acc/{Role.DEFENDED_CLEAN_MERGE}/") for name in r.counts) for r in records
    )
    return Role.DEFENDED_CLEAN_MERGE if known else Role.CLEAN_MERGE


PRICE = ("DER", "accuracy_cost", "target_recall_cost")
"""What a defense gains and costs against the same cells without it."""


def _price(plain: Sequence[Record], defended: Sequence[Record], reader: Reader) -> Rates:
    """``PRICE`` over the cells that are there with and without the defense."""
    shared = {cell_of(r, "defense") for r in plain} & {cell_of(r, "defense") for r in defended}
    if not shared:
        return {name: nothing() for name in PRICE}
    before, after = (only(side, shared, "defense") for side in (plain, defended))
    asr, accuracy = (
        reader.rate(before, *what) - reader.rate(after, *what)
        for what in (("asr", Role.MERGE, "target"), ("acc", Role.MERGE, "all"))
    )
    recall = reader.recall(before, Role.MERGE) - reader.recall(after, Role.MERGE)
    rating = _der(asr, accuracy)
    if (control := control_of(after)) is not Role.CLEAN_MERGE:
        # what it costs a merger whom nobody attacks: beside a poisoned merge a repair may look free
        accuracy, recall = (
            find(after, Role.CLEAN_MERGE) - find(after, control)
            for find in (lambda rs, role: reader.rate(rs, "acc", role, "all"), reader.recall)
        )
    return dict(zip(PRICE, (rating, accuracy, recall), strict=True))


def _der(asr: Estimate, accuracy: Estimate) -> Estimate:
    """Defense effectiveness rating, [max(0, ΔASR) − max(0, ΔACC) + 1] / 2."""
    if math.isnan(asr.value) or math.isnan(accuracy.value):
        return nothing()
    return combined(lambda a, b: (np.maximum(a, 0) - np.maximum(b, 0) + 1) / 2, asr, accuracy)


def _level(settings: Sequence[Setting], reader: Reader) -> None:
    """Rates of settings that compete, over the cells that those which can be compared have in common."""
    pairs = ("merging", "defense")
    for group in _by([s for s in settings if s.done], lambda s: s.contest).values():
        common = common_cells({s.pair: s.cells(*pairs) for s in group})
        for setting in group:
            if setting.pair in common.rows:
                setting.shared = only(setting.done, common.cells, *pairs)
                setting.level = setting.rates_over(setting.shared, reader)


def _beside_undefended(settings: Sequence[Setting]) -> list[tuple[Setting, Setting | None]]:
    """Each setting with the same one without a defense; None for those that have none."""
    plain = {(s.contest, s.method): s for s in settings if s.defense == "none"}
    return [(s, None if s.defense == "none" else plain.get((s.contest, s.method))) for s in settings]


def _put_known(row: Row, numbers: Mapping[str, float]) -> None:
    """Columns for what is known; a column that no row knows is left out of the board."""
    row.update({name: number for name, number in numbers.items() if not math.isnan(number)})


def _looks_and_data(row: Row, done: Sequence[Record], sides: Sequence[str]) -> None:
    """Columns on what a trigger looks like, whom a screen kept out, and rows of data. What was measured by the
    clock is on the board of costs alone: the others come out the same in every run."""
    if "attack" in sides:
        _put_known(
            row, {f"visibility/{name}": average(done, value(f"visibility/{name}")) for name in _VISIBILITY}
        )
    if "defense" in sides:
        screens = {"caught": "screen/caught", "false_alarms": "screen/false"}
        _put_known(row, {column: average(done, value(name)) for column, name in screens.items()})
    for side in sides:
        _put_known(row, {f"{side}_rows": average(done, partial(_rows, side))})


_COEFFICIENTS = {
    "coefficient": "coefficient/malicious", "coefficient_others": "coefficient/others",
    "coefficient_control": "coefficient/control",
}  # fmt: skip


def _put_coefficients(row: Row, done: Sequence[Record]) -> None:
    """The coefficient that a merge gave to the malicious experts, to the others, and to the same task's clean one."""
    _put_known(row, {column: average(done, value(name)) for column, name in _COEFFICIENTS.items()})


def _rows(side: str, record: Record) -> float | None:
    """Rows of data of an attack or a defense, where the record tells."""
    return record.cost.get(side, {}).get("rows")


# --------------------------------------------------------------------------- every cell


def _cells_board(settings: Sequence[Setting], reader: Reader) -> Board:
    """Per attack × method × defense: accuracy and ASR beside the controls, visibility, data used."""
    measures = tuple(settings[0].part)
    for setting in settings:
        for name in measures:
            put(setting.row, name, setting.part[name])
        _put_coefficients(setting.row, setting.done)
        _looks_and_data(setting.row, setting.done, ("attack", "defense"))
    for contest in _by(settings, lambda s: (s.contest, s.method)).values():
        common = common_cells({s.defense: s.cells("defense") for s in contest})
        ranked = [
            reader.rate(only(s.done, common.cells, "defense"), "asr", Role.MERGE, "target")
            if s.defense in common.rows and s.attack != "none"
            else nothing()
            for s in contest
        ]
        put_tiers([s.row for s in contest], tiers(ranked, higher_is_better=False))
    note = (
        "ASR on non-target samples. `backdoor` = succession minus the same trigger on `succession_control`: the clean "
        "merge, under the same defense where the records have that. `transfer_harm` "
        "= right answers under the trigger that benign tasks lose against the clean merge. `target_recall`: accuracy on "
        "the target class, which ASR leaves out. Tiers rank defenses within one attack and method over their common cells."
    )
    rows = [s.row for s in settings]
    if any("coefficient" in row for row in rows):
        note += (
            " `coefficient`: of the malicious experts, where the merge has one per expert, `coefficient_others` of the "
            "others, `coefficient_control` of the same tasks' experts in the control."
        )
    return Board(
        "backdoor", "Backdoor: attack × method × defense", pd.DataFrame(rows), measures, note + about_tiers(rows)
    )  # fmt: skip


_BY_ADVERSARY = (
    "BA", "ASR_alone", "succession", "succession_control", "backdoor", "target_recall", "target_recall_clean_merge"
)  # fmt: skip


def _by_adversary(setting: Setting, reader: Reader) -> list[Row]:
    """A setting's row of the board of every cell, adversary by adversary."""
    rows: list[Row] = []
    for (adversary,), mine in grouped(setting.done, lambda r: (r.subject,)).items():
        row: Row = {**{k: v for k, v in setting.row.items() if k in _SETTING}, "adversary": adversary}
        row["cells_done"] = row["cells_expected"] = len(mine)
        row["seeds"] = fewest_seeds(mine)
        rates = backdoor_rates(mine, reader)
        for name in _BY_ADVERSARY:
            put(row, name, rates[name])
        _put_coefficients(row, mine)
        rows.append(row)
    return rows


def _adversaries(settings: Sequence[Setting]) -> Board | None:
    """The rows of the board of every cell, one for each adversary: whether a finding is one of all of them. None
    where there is but one."""
    rows = [row for setting in settings for row in setting.adversaries_rows]
    if not rows:
        return None
    note = "As on the board of every cell, adversary by adversary: finished cells only."
    return Board(
        "backdoor_adversaries", "Backdoor: adversary by adversary", pd.DataFrame(rows), _BY_ADVERSARY, note
    )


# --------------------------------------------------------------------------- Pareto fronts


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


_POINTS = ("BA", "succession", "backdoor")


def _pareto(settings: Sequence[Setting]) -> Board | None:
    """Per attack: which pairs of method and defense no other pair beats in accuracy and ASR at once."""
    rows: list[Row] = []
    for group in _by([s for s in settings if s.attack != "none" and s.done], lambda s: s.contest).values():
        mine = _front([s for s in group if _measured(s)])
        rows += sorted(mine, key=lambda r: (r["front"] == "no", -r["BA"]))
        for setting in group:
            if not _measured(setting):
                row = {**_identity(setting), "cells_compared": 0}
                put_nothing(row, *_POINTS)
                rows.append(
                    {**row, "front": "", "front_share": math.nan, "dominated_by": "", "tier": math.nan}
                )
    if not rows:
        return None
    note = (
        "front: no other pair of the same attack has at least its accuracy (BA) and at most its ASR (succession) and "
        "is better in one. front_share: share of draws in which that holds; tier 2 where it holds in at most "
        "2.5 % of them. dominated_by: the pair that does so in most draws. All numbers are over the same cells "
        "(cells_compared); a pair that lacks some of them has none."
    )
    title = "Backdoor: accuracy against ASR, Pareto fronts"
    return Board("backdoor_pareto", title, pd.DataFrame(rows), _POINTS, note + about_tiers(rows))


def _identity(setting: Setting) -> Row:
    keys = (
        "attack", "method", "defense", "experts", "adversaries", "target_task", "cells_done", "cells_expected",
        "seeds", "verified", "contained",
    )  # fmt: skip
    return {k: setting.row[k] for k in keys if k in setting.row}


def _front(contest: Sequence[Setting]) -> list[Row]:
    """A row for each of the pairs that are compared."""
    if not contest:
        return []
    point, share, front = dominance(
        [s.level["BA"] for s in contest], [s.level["succession"] for s in contest]
    )
    enough = all(min(s.level[name].seeds for name in ("BA", "succession")) >= FEWEST_SEEDS for s in contest)
    rows = []
    for i, setting in enumerate(contest):
        over = [int(j) for j in np.flatnonzero(point[i])]
        best = max(over, key=lambda j: share[i][j]) if over else None
        row = {
            **_identity(setting),
            "seeds": fewest_seeds(setting.shared),
            "cells_compared": len(setting.shared),
        }
        for name in _POINTS:
            put(row, name, setting.level[name])
        row["front"] = "no" if over else "yes"
        row["front_share"] = float(front[i])
        row["dominated_by"] = contest[best].pair if best is not None else ""
        row["tier"] = (1 if front[i] > UNLIKELY or not over else 2) if enough else math.nan
        rows.append(row)
    return rows


# --------------------------------------------------------------------------- per defense


def _named(setting: Setting) -> str:
    """Attack, method and, where they are not the usual ones, adversaries and target task."""
    extra = f" × {setting.adversaries}" if setting.adversaries > 1 else ""
    aim = f" → {setting.target_task}" if setting.target_task else ""
    return f"{setting.attack}{extra}{aim} + {setting.method}"


_DEFENSE = (
    "worst_backdoor", "worst_ASR", "mean_backdoor", "accuracy_cost", "worst_accuracy_cost", "target_recall_cost",
    "worst_target_recall_cost", "RA", "DER",
)  # fmt: skip


def _defenses(settings: Sequence[Setting], reader: Reader) -> Board | None:
    """Per defense: the attack and method under which most of a backdoor is left, and what it costs."""
    attacked = [s for s in settings if s.attack != "none" and not math.isnan(s.part["backdoor"].value)]
    groups = {d: group for (d,), group in _by(attacked, lambda s: (s.defense,)).items()}
    if not groups:
        return None
    common = common_cells({d: set().union(*(s.cells("defense") for s in g)) for d, g in groups.items()})
    plain = {(s.contest, s.method): s for s in groups.get("none", ())}
    rows, contest = [], []
    for defense, group in groups.items():
        row: Row = {"defense": defense, **_completeness([s for s in settings if s.defense == defense])}
        left: list[Estimate] = []
        row["cells_compared"] = 0
        if defense in common.rows:
            left = _worst(row, group, plain, common, reader)
        else:
            put_nothing(row, *_DEFENSE)
            row["worst_by"] = ""
        _looks_and_data(row, [r for s in settings if s.defense == defense for r in s.done], ("defense",))
        rows.append(row)
        contest.append(left)
    put_tiers(rows, tiers_of_largest(contest))
    note = (
        "worst_backdoor: the largest ASR minus the same trigger on the control (the clean merge, under the same defense "
        "where the records have that), over attacks and methods. accuracy_cost, target_recall_cost: accuracy, and that "
        "on the target class, without minus with the defense. All "
        "over the cells that the compared defenses have in common (cells_compared); a defense that lacks some of them "
        "has no numbers here: see the board of every cell."
    )
    frame = ordered(pd.DataFrame(rows), "worst_backdoor", ascending=True)
    title = "Backdoor: per defense, worst attack"
    return Board("backdoor_defenses", title, frame, _DEFENSE, note + about_tiers(rows))


def _worst(
    row: Row, group: Sequence[Setting], plain: Mapping[Any, Setting], common: Common, reader: Reader
) -> list[Estimate]:
    """Fill a defense's row over the compared cells; what is left of each backdoor."""
    tried = [(s, mine) for s in group if (mine := only(s.done, common.cells, "defense"))]
    parts = []
    for setting, mine in tried:
        twin = plain.get((setting.contest, setting.method))
        before = twin.done if twin and setting.defense != "none" else []
        parts.append(setting.rates_over(mine, reader) | _price(before, mine, reader))
    left = [p["backdoor"] for p in parts]
    worst, at = largest(left)
    put(row, "worst_backdoor", worst)
    row["worst_by"] = _named(tried[at][0])
    put(row, "worst_ASR", parts[at]["succession"])
    put(row, "mean_backdoor", mean(left))
    for name in ("accuracy_cost", "target_recall_cost"):
        costs = _known(p[name] for p in parts)
        put(row, name, mean(costs))
        put(row, f"worst_{name}", largest(costs)[0])
    put(row, "RA", mean([p["RA"] for p in parts]))
    put(row, "DER", mean(_known(p["DER"] for p in parts)))
    compared = [r for _, mine in tried for r in mine]
    row["cells_compared"], row["seeds"] = len(compared), fewest_seeds(compared)
    return left


def _known(estimates: Iterable[Estimate]) -> list[Estimate]:
    return [e for e in estimates if not math.isnan(e.value)]


def _by(settings: Iterable[Setting], key: Any) -> dict[tuple[Any, ...], list[Setting]]:
    groups: dict[tuple[Any, ...], list[Setting]] = {}
    for setting in settings:
        groups.setdefault(key(setting), []).append(setting)
    return groups


def _completeness(group: Sequence[Setting]) -> Row:
    done = [r for s in group for r in s.done]
    row: Row = {
        "cells_done": sum(s.row["cells_done"] for s in group),
        "cells_expected": sum(s.row["cells_expected"] for s in group),
        "seeds": fewest_seeds(done),
    }
    put_origin(row, done)
    return row


# --------------------------------------------------------------------------- per attack


@dataclass
class _Answer:
    """What answers an attack: a defense over the methods that were run with and without it, or a pair."""

    name: str
    asr: Estimate
    backdoor: Estimate
    cost: Estimate
    recall_cost: Estimate


def _answers(group: Sequence[Setting]) -> list[_Answer]:
    """Every defense against an attack."""
    plain = {s.method: s for s in group if s.defense == "none" and _measured(s)}
    found = []
    for (defense,), mine in _by(group, lambda s: (s.defense,)).items():
        both = [(plain[s.method].level, s.level) for s in mine if _measured(s) and s.method in plain]
        if defense != "none" and both:
            asr, left = (mean([after[name] for _, after in both]) for name in ("succession", "backdoor"))
            cost, recall = (
                mean([before[name] - after[name] for before, after in both])
                for name in ("BA", "target_recall")
            )
            found.append(_Answer(defense, asr, left, cost, recall))
    return found


def _pairs(group: Sequence[Setting]) -> list[_Answer]:
    """Every pair of method and defense against an attack; its cost is against the most accurate undefended merge."""
    measured = [s for s in group if _measured(s)]
    plain = [s for s in measured if s.defense == "none"]
    if not plain:
        return []
    best = max(plain, key=lambda s: s.level["BA"].value).level
    of = {s.method: s.level for s in plain}
    return [
        _Answer(
            s.pair, s.level["succession"], s.level["backdoor"], best["BA"] - s.level["BA"],
            of.get(s.method, best)["target_recall"] - s.level["target_recall"],
        )
        for s in measured
    ]  # fmt: skip


def _best(answers: Sequence[_Answer]) -> list[_Answer]:
    """The affordable answers that cannot be told from the one with the lowest ASR; of those the cheapest, with
    all that cannot be told from it, cheapest first."""
    cheap = [a for a in answers if a.cost.value <= AFFORDABLE and not a.recall_cost.value > AFFORDABLE_RECALL]
    if not cheap:
        return []
    lowest = min(range(len(cheap)), key=lambda i: cheap[i].asr.value)
    good = [cheap[i] for i in inseparable([a.asr for a in cheap], lowest)]
    good.sort(key=lambda a: (a.cost.value, a.name))
    return [good[i] for i in inseparable([a.cost for a in good], 0)]


_BEFORE = (
    "CA", "BA", "ASR_alone", "acc_alone", "succession", "succession_clean_merge", "succession_base", "backdoor",
    "transfer", "transfer_clean_merge", "backdoor_transfer", "transfer_harm",
)  # fmt: skip


def _attacks(settings: Sequence[Setting], reader: Reader) -> Board | None:
    """Per attack: what is left of it in undefended merges, and what answers it best."""
    rows: list[Row] = []
    attacked = [s for s in settings if s.attack != "none"]
    for league in _by(attacked, lambda s: s.contest[1:]).values():
        mine, ranked = _league(league, reader)
        put_tiers(mine, tiers(ranked))
        rows += mine
    if not rows:
        return None
    answers = (
        "best_ASR", "best_backdoor", "best_cost", "best_target_recall_cost", "best_pair_ASR", "best_pair_BA",
    )  # fmt: skip
    note = (
        "Without a defense, over the cells that the compared attacks have in common (cells_compared). best_defense: of "
        "the defenses that cost at most 2 points of accuracy and 10 of the target class's, those whose mean ASR cannot "
        "be told from the lowest, and of these the cheapest; numbers are the first one's. Several names cannot be told "
        "apart. best_pair: the same among pairs at most 2 points below the most accurate undefended merge. Both over "
        "the cells of the board of Pareto fronts. With one seed, what can be told apart is so for these trainings only."
    )
    frame = pd.DataFrame(rows)
    title = "Backdoor: per attack, best defense"
    return Board("backdoor_attacks", title, frame, (*_BEFORE, *answers), note + about_tiers(rows))


def _league(settings: Sequence[Setting], reader: Reader) -> tuple[list[Row], list[Estimate]]:
    """Rows of the attacks on merges of one size by one number of adversaries, and what they are ranked by."""
    groups = {attack: group for (attack,), group in _by(settings, lambda s: (s.attack,)).items()}
    plain = {a: [r for s in g if s.defense == "none" for r in s.done] for a, g in groups.items()}
    common = common_cells({a: {cell_of(r, "attack") for r in mine} for a, mine in plain.items()})
    rows, ranked = [], []
    for attack, group in groups.items():
        row: Row = {"attack": attack, "experts": group[0].experts}
        row |= {k: group[0].row[k] for k in ("adversaries", "target_task") if k in group[0].row}
        row |= _completeness(group)
        mine = only(plain[attack], common.cells, "attack") if attack in common.rows else []
        row["cells_compared"], row["seeds"] = len(mine), fewest_seeds(mine)
        part = backdoor_rates(mine, reader)
        for name in _BEFORE:
            put(row, name, part[name])
        _put_best(row, group)
        _looks_and_data(row, [r for s in group for r in s.done], ("attack",))
        rows.append(row)
        ranked.append(part["backdoor"])
    return rows, ranked


def _put_best(row: Row, group: Sequence[Setting]) -> None:
    """The best defenses and pairs against one attack."""
    defenses, pairs = _best(_answers(group)), _best(_pairs(group))
    row["best_defense"] = " or ".join(a.name for a in defenses)
    first = defenses[0] if defenses else None
    put(row, "best_ASR", first.asr if first else nothing())
    put(row, "best_backdoor", first.backdoor if first else nothing())
    put(row, "best_cost", first.cost if first else nothing())
    put(row, "best_target_recall_cost", first.recall_cost if first else nothing())
    row["best_pair"] = " or ".join(a.name for a in pairs)
    level = {s.pair: s.level for s in group}
    put(row, "best_pair_ASR", pairs[0].asr if pairs else nothing())
    put(row, "best_pair_BA", level[pairs[0].name]["BA"] if pairs else nothing())
