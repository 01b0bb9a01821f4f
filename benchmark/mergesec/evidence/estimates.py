"""What every board is made with: the axes of a cell, estimates over records, common cells, rows."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from operator import attrgetter, is_
from typing import Any, NamedTuple, TypeVar

import pandas as pd

from mergesec.errors import UsageError
from mergesec.evidence.records import Count, Record, count, is_claimed
from mergesec.evidence.statistics import FEWEST_SEEDS, TOGETHER, Bootstrap, Estimate, mean, nothing
from mergesec.threats import accomplices

Row = dict[str, Any]
Which = str
"""``subject``, ``target`` (the task a backdoor aims at), ``others`` (benign contributors' tasks that no backdoor
aims at) or ``all``."""
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Board:
    """One leaderboard. ``measures`` are the columns that have ``_low`` and ``_high`` beside them."""

    name: str
    title: str
    frame: pd.DataFrame
    measures: tuple[str, ...]
    note: str = ""


# --------------------------------------------------------------------------- axes

OUTCOMES = frozenset(
    {"schema_version", "cell", "components", "drawn", "status", "reason", "contained", "counts", "values", "facts",
     "steps", "cost", "provenance"}
)  # fmt: skip
"""What a record tells of its cell. Every other field is an axis: two cells that differ in one are never mixed."""
AXES = tuple(name for name in Record.model_fields if name not in OUTCOMES)
_ALL_AXES = attrgetter(*AXES)
Place = tuple[Any, ...]
"""A cell's axes, some of them left out."""


class Cell(NamedTuple):
    """A cell as rows that compete share it: its place and its seed."""

    place: Place
    seed: int


def place_of(record: Record, *without: str) -> Place:
    """All axes of a record but the seed and those named; of experts that were drawn, their number."""
    values = _axes_but(without, tuple(record.drawn))(record)
    place = tuple([v if type(v) is str or type(v) is int else _fixed(v) for v in values])
    counted = "experts" in record.drawn and "experts" not in without
    return (*place, len(record.experts)) if counted else place


@lru_cache(maxsize=256)
def _axes_but(without: tuple[str, ...], drawn: tuple[str, ...]) -> attrgetter[tuple[Any, ...]]:
    """Reads all axes of a record but the seed and these."""
    left = {"seed", *without, *drawn}
    return attrgetter(*(name for name in AXES if name not in left))


def cell_of(record: Record, *without: str) -> Cell:
    """Place and seed of a record; ``without``: the axes in which competitors differ."""
    return Cell(place_of(record, *without), record.seed)


def _fixed(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(value) if set(map(type, value)) == {str} else tuple(map(_fixed, value))
    return json.dumps(value, sort_keys=True) if isinstance(value, dict) else value


def canonical(records: Iterable[Record]) -> list[Record]:
    """Records in an order of their own: by their axes, ``none`` first, numbers as numbers. UsageError if two are
    of the same cell."""
    seen: dict[Cell, str] = {}
    for record in (records := list(records)):
        _claim(seen, cell_of(record), record)
    return sorted(records, key=lambda r: [_natural(str(value)) for value in _ALL_AXES(r)])


def _claim(seen: dict[Any, str], place: Any, record: Record) -> None:
    if place in seen:
        raise UsageError(
            "records", f"{seen[place]} and {record.cell} are of one cell: no axis tells them apart"
        )
    seen[place] = record.cell


@lru_cache(maxsize=4096)
def _natural(text: str) -> tuple[tuple[int, float, str], ...]:
    """A value's text as it sorts: ``none`` and what is empty first, the numbers in it as numbers."""
    parts = re.split(r"(\d+(?:\.\d+)?)", "" if text == "none" else text)
    return tuple((1, float(p), "") if i % 2 else (0, 0.0, p) for i, p in enumerate(parts))


# --------------------------------------------------------------------------- estimates


Gathered = dict[tuple[str, int], dict[str, dict[int, Count]]]
"""Outcomes by subject and number of the cell, task and seed."""


@dataclass
class Reader:
    """Estimates over a group of records. There is one weighting: a cell is the mean of its tasks, a subject the
    mean of its cells, the result the mean of its subjects."""

    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    _last: tuple[list[Record], list[int]] = ([], [])
    """The records that were read last, and of each the cell without its seed: a row is read many times."""

    def rate(self, records: Iterable[Record], metric: str, role: str, which: Which) -> Estimate:
        """Mean rate; seeds paired, never pooled with samples."""
        return self.rates(records, [(metric, role, which)])[0]

    def rates(self, records: Iterable[Record], wanted: Sequence[tuple[str, str, Which]]) -> list[Estimate]:
        """Mean rates, each by metric, role and which tasks."""
        return next(self.rates_of([records], wanted))

    def rates_of(
        self, groups: Iterable[Iterable[Record]], wanted: Sequence[tuple[str, str, Which]]
    ) -> Iterator[list[Estimate]]:
        """``rates`` of each group. The outcomes of several are counted together: a dozen at a time take three times
        as long as hundreds do."""
        waiting: list[list[Gathered]] = []
        ahead: list[tuple[str, Mapping[int, Count]]] = []
        for group in groups:
            waiting.append(found := self._wanted(list(group), wanted))
            ahead += [rate for gathered in found for counted in gathered.values() for rate in counted.items()]
            if len(ahead) >= TOGETHER:
                yield from self._means(waiting, ahead)
                waiting, ahead = [], []
        yield from self._means(waiting, ahead)

    def _wanted(self, records: list[Record], wanted: Sequence[tuple[str, str, Which]]) -> list[Gathered]:
        tasks = {which: [_tasks(r, which) for r in records] for which in {which for *_, which in wanted}}
        found = []
        for metric, role, which in wanted:
            name = f"{metric}/{role}/"
            counted = [
                {t: r.counts.get(name + t) for t in own} for r, own in zip(records, tasks[which], strict=True)
            ]
            found.append(self._gathered(records, counted))
        return found

    def _means(
        self, groups: Iterable[Sequence[Gathered]], ahead: Iterable[tuple[str, Mapping[int, Count]]]
    ) -> Iterator[list[Estimate]]:
        self.bootstrap.tell(ahead)
        for group in groups:
            yield [self._mean(cells) for cells in group]

    def task(self, records: Iterable[Record], role: str, task: str) -> Estimate:
        """Accuracy of ``role`` on one task."""
        records = list(records)
        return self._mean(
            self._gathered(records, [{task: r.counts.get(f"acc/{role}/{task}")} for r in records])
        )

    def recall(self, records: Iterable[Record], role: str) -> Estimate:
        """Accuracy of ``role`` on the samples of the target class, where a backdoor aims: those that ASR leaves
        out."""
        records = list(records)
        return self._mean(self._gathered(records, [{_aim(r): _inside_target(r, role)} for r in records]))

    def _gathered(self, records: list[Record], counted: Sequence[Mapping[str, Count | None]]) -> Gathered:
        """What was counted in each record, where anything was, by subject and cell, task and seed."""
        cells: Gathered = {}
        for record, cell, found in zip(records, self._cells(records), counted, strict=True):
            for task, one in found.items():
                if one is not None:
                    tasks = cells.setdefault((record.subject, cell), {})
                    tasks.setdefault(task, {})[record.seed] = one
        return cells

    def _mean(self, cells: Gathered) -> Estimate:
        subjects: dict[str, list[Estimate]] = {}
        for (subject, _), tasks in cells.items():
            rates = [self.bootstrap.rate(task, counts) for task, counts in tasks.items()]
            subjects.setdefault(subject, []).append(mean(rates))
        return mean([mean(cell) for cell in subjects.values()])

    def _cells(self, records: list[Record]) -> list[int]:
        """Of each record the number of its cell without the seed. UsageError if two are of the same cell."""
        before, numbers = self._last
        if len(before) != len(records) or not all(map(is_, before, records)):
            seen: dict[Cell, str] = {}
            places: dict[Place, int] = {}
            numbers = []
            for record in records:
                cell = cell_of(record)
                _claim(seen, cell, record)
                numbers.append(places.setdefault(cell.place, len(places)))
            self._last = (records, numbers)
        return numbers


def _aim(record: Record) -> str:
    return record.target_task or record.subject


def _tasks(record: Record, which: Which) -> list[str]:
    if which in ("subject", "target"):
        return [record.subject if which == "subject" else _aim(record)]
    if which == "all":
        return list(record.experts)
    spoken = {
        _aim(record),
        *accomplices(record.experts, record.subject, record.target_task, record.company, record.seed)[
            : record.adversaries
        ],
    }
    return [t for t in record.experts if t not in spoken]


def _inside_target(record: Record, role: str) -> Count | None:
    """Right answers on the target class; None where no ASR tells which samples those are, or there are none."""
    task = _aim(record)
    accuracy, hit = record.counts.get(f"acc/{role}/{task}"), record.counts.get(f"asr/{role}/{task}")
    if accuracy is None or hit is None or hit.n == hit.total:
        return None
    return count(accuracy.arrays()[0], ~hit.arrays()[1])


def value(name: str) -> Callable[[Record], float | None]:
    """A number of a record by its name among ``values``."""
    return lambda record: record.values.get(name)


def average(records: Iterable[Record], number: Callable[[Record], float | None]) -> float:
    """Mean of a number over the records that have it, in the weighting of rates: by seed, cell, subject."""
    subjects: dict[str, dict[Place, list[float]]] = {}
    for record in records:
        if (found := number(record)) is not None:
            subjects.setdefault(record.subject, {}).setdefault(place_of(record), []).append(found)
    means = [_plain_mean([_plain_mean(v) for v in cells.values()]) for cells in subjects.values()]
    return _plain_mean(means)


def _plain_mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else math.nan


# --------------------------------------------------------------------------- common cells


class Common(NamedTuple):
    """Who can be compared with whom, and on which cells."""

    rows: frozenset[Any]
    cells: frozenset[Cell]


def common_cells(cells: Mapping[K, Collection[Cell]]) -> Common:
    """The rows and the cells that all of them have: the choice with the most (rows × cells), of equals that with
    more rows. Nothing else of a record decides. None if no two rows share a cell."""
    sets = {row: frozenset(mine) for row, mine in cells.items() if mine}
    distinct = list(dict.fromkeys(sets.values()))
    choices = dict.fromkeys(
        [*distinct, *(a & b for i, a in enumerate(distinct) for b in distinct[:i] if a & b)]
    )
    best, score = Common(frozenset(), frozenset()), (0, 0)
    for choice in choices:
        rows = [row for row, mine in sets.items() if choice <= mine]
        reached = (len(rows) * len(choice), len(rows))
        if len(rows) >= min(2, len(sets)) and reached > score:
            best, score = Common(frozenset(rows), choice), reached
    return best


def only(records: Iterable[Record], cells: Collection[Cell], *without: str) -> list[Record]:
    """The records of these cells."""
    return [r for r in records if cell_of(r, *without) in cells]


# --------------------------------------------------------------------------- rows


def put(row: Row, name: str, estimate: Estimate) -> None:
    """Add an estimate to a row: ``name``, ``name_low``, ``name_high``; ``name_seeds`` where it rests on another
    number of seeds than the row."""
    row[name] = estimate.value
    row[f"{name}_low"], row[f"{name}_high"] = estimate.interval()
    if estimate.seeds and estimate.seeds != row.get("seeds", estimate.seeds):
        row[f"{name}_seeds"] = estimate.seeds


def put_nothing(row: Row, *names: str) -> None:
    """Columns of a row that cannot be compared."""
    for name in names:
        put(row, name, nothing())


def put_tiers(rows: Iterable[Row], tiers: Iterable[int]) -> None:
    """Add tiers; none where there is none."""
    for row, tier in zip(rows, tiers, strict=True):
        row["tier"] = tier or math.nan


def about_tiers(rows: Iterable[Row]) -> str:
    """What a board's note says where it has no tiers."""
    if any(not math.isnan(row.get("tier", math.nan)) for row in rows):
        return ""
    return f" No tiers: fewer than {FEWEST_SEEDS} seeds cannot tell rows apart."


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
    row["seeds"] = fewest_seeds(done)
    put_origin(row, done)
    if len(done) < len(records):
        row["reason"] = _reasons(records)
    return done


def put_origin(row: Row, done: Sequence[Record]) -> None:
    """Whose numbers a row's are: ``verified`` is ``re-run``, ``claimed`` (cells of an accepted entry that were not
    run again), or how many were; ``contained`` is ``no`` if in any cell a plugin could have seen test data."""
    claimed = sum(is_claimed(r) for r in done)
    parts = f"re-run {len(done) - claimed}/{len(done)}" if claimed < len(done) else "claimed"
    row["verified"] = (parts if claimed else "re-run") if done else ""
    row["contained"] = ("no" if any(r.contained == "no" for r in done) else "yes") if done else ""


def _reasons(records: Iterable[Record]) -> str:
    """Why cells are not done, the commonest first; what blocked a cell is told by what failed."""
    counted = Counter(
        f"{r.status}: {r.reason}" if r.reason else r.status for r in records if r.status != "done"
    )
    return "; ".join(f"{n} {told}" for told, n in counted.most_common(3))


def fewest_seeds(records: Iterable[Record]) -> int:
    """How many seeds the least replicated of these cells has."""
    seeds: dict[Place, set[int]] = {}
    for record in records:
        seeds.setdefault(place_of(record), set()).add(record.seed)
    return min(map(len, seeds.values()), default=0)


def ordered(frame: pd.DataFrame, by: str, ascending: bool) -> pd.DataFrame:
    """Rows sorted by a column; ties stay as they were, what has no value comes last."""
    return frame.sort_values(by, ascending=ascending, kind="stable", na_position="last").reset_index(
        drop=True
    )
