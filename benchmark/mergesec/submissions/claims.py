"""An entry's records against its grid and its code, and its claims against its records. Runs nothing, and loads no torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mergesec.errors import UsageError, nearest
from mergesec.evidence.boards import make_boards
from mergesec.evidence.estimates import AXES, Board
from mergesec.evidence.records import SUBMISSION, Count, Record, read_record
from mergesec.evidence.tables import display
from mergesec.execution.harvest import cell_name
from mergesec.files import brief
from mergesec.planning.catalog import Entry as Registered
from mergesec.planning.cells import Cell
from mergesec.planning.gridspec import Axes
from mergesec.planning.plan import CellPlan, Plan
from mergesec.planning.resolve import Grid
from mergesec.submissions.entry import FILE, RECORDS, Claim, Entry, digest_of_files, record_files
from mergesec.threats import TRIGGERED, Role

SHOWN = 5
"""Cells that a reason names."""
CLOSE = 0.001
"""How far a claimed share may lie from the records': a tenth of a point, what a table rounds to."""
_METHODS = {"defense": "defenses", "attack": "attacks", "merging": "merging"}


# --------------------------------------------------------------------------- the grid


def takes_part(cell: Cell, kind: str, name: str) -> bool:
    """Whether a cell says something of the method."""
    return name in cell.experts if kind == "task" else bool(getattr(cell, kind).name == name)


def removed(own: Grid, preset: Grid, kind: str) -> list[str]:
    """What of a preset an entry's grid has not: tasks, seeds, opponents, settings."""
    wrong = []
    for name in ("merging", "attacks", "defenses"):
        if name != _METHODS[kind]:
            lost = [ref.label for ref in getattr(preset, name) if ref not in getattr(own, name)]
            wrong += [f"axes.{name}: {_listed(lost)} of the preset is missing"] if lost else []
    pairs: dict[str, tuple[Any, Any]] = {
        name: (getattr(own.spec.axes, name), getattr(preset.spec.axes, name))
        for name in Axes.model_fields
        if name not in _METHODS.values()
    }
    pairs["seeds"] = (own.spec.seeds, preset.spec.seeds)
    for name, (mine, theirs) in pairs.items():
        several = isinstance(mine, tuple) and isinstance(theirs, tuple)
        lost = [x for x in theirs if x not in mine] if several else [] if mine == theirs else [theirs]
        wrong += [f"{name}: {_listed(lost)} of the preset is missing"] if lost else []
    same: dict[str, tuple[Any, Any]] = {
        "suite.backbone": (own.backbone, preset.backbone),
        "suite.tasks": (own.tasks, preset.tasks),
        "suite.experts": (own.published, preset.published),
        "recipe": (own.recipe, preset.recipe),
        **{n: (getattr(own.spec, n), getattr(preset.spec, n)) for n in ("protocol", "include", "exclude")},
    }
    return wrong + [f"{name} is not the preset's" for name, (mine, theirs) in same.items() if mine != theirs]


def _listed(things: Iterable[Any]) -> str:
    shown = [brief(str(t)) for t in things]
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return ", ".join(shown[:SHOWN]) + more


# --------------------------------------------------------------------------- the records


class Held(NamedTuple):
    """The sound records of an entry by cell, and what is wrong with them and with the others."""

    records: dict[str, Record]
    wrong: list[str]


def held(entry: Entry, plan: Plan, method: Registered) -> Held:
    """Every planned cell's record, read and compared with its plan."""
    files = record_files(entry.folder)
    home = entry.folder / RECORDS / plan.grid.spec.name
    planned = {cell_name(c.cell): c for c in plan.cells}
    wrong = _digest(entry, files) + _manifest(home, planned)
    if stray := [p for p in files if p.parent != home or p.stem not in {*planned, "grid"}]:
        wrong.append(f"{_listed(p.name for p in stray)}: of no cell of the grid")
        wrong += _of_other_code([p for p in stray if p.parent == home], method)
    missing = [name for name in planned if not (home / f"{name}.json").is_file()]
    wrong += _missing(missing, planned)
    found: dict[str, Record] = {}
    for name in planned.keys() - set(missing):
        try:
            record = read_record(home, name)
        except UsageError as error:
            wrong.append(str(error))
            continue
        if told := _disagreements(record, planned[name], plan, method):
            wrong.append(f"{name}: {told}")
        else:
            found[name] = record
    ordered = {name: found[name] for name in planned if name in found}
    return Held(ordered, wrong + _two_outcomes(ordered.values()))


def _digest(entry: Entry, files: Sequence[Path]) -> list[str]:
    told = entry.submission.records
    if not told:
        return ["records: no digest; bench submit pack fills it"]
    found = digest_of_files(entry.folder, files)
    if told == found:
        return []
    return [
        f"the records have digest {found[:16]}…, {FILE} says {told[:16]}…: changed since they were packed"
    ]


def _manifest(home: Path, planned: Mapping[str, CellPlan]) -> list[str]:
    """Whether ``grid.json`` names the cells that the grid has."""
    try:
        cells = {str(name) for name in json.loads((home / "grid.json").read_bytes())["cells"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return [f"{RECORDS}/{home.name}/grid.json: missing or unreadable"]
    lost, more = sorted(planned.keys() - cells), sorted(cells - planned.keys())
    return [f"grid.json does not name {_listed(lost)}"] * bool(lost) + [
        f"grid.json names {_listed(more)}, which the grid has not"
    ] * bool(more)


def _missing(names: Sequence[str], planned: Mapping[str, CellPlan]) -> list[str]:
    """Cells without a record; a seed of which nothing is there is named as a whole."""
    by_seed: dict[int, list[str]] = {}
    for name in names:
        by_seed.setdefault(planned[name].cell.seed, []).append(name)
    wrong = []
    for seed, lost in sorted(by_seed.items()):
        of_seed = sum(c.cell.seed == seed for c in planned.values())
        if len(lost) == of_seed:
            wrong.append(f"seed {seed} is missing: all its {of_seed} cells")
        else:
            wrong.append(f"{len(lost)} of {of_seed} cells of seed {seed} are missing: {_listed(lost)}")
    return wrong


def _disagreements(record: Record, planned: CellPlan, plan: Plan, method: Registered) -> str:
    """What of a record is not what its cell, this code and this grid make; empty if all is."""
    if record.status != "done":
        return f"{record.status} ({brief(record.reason)})"
    if SUBMISSION in record.provenance:
        return f"provenance.{SUBMISSION} is not for an entry to say"
    made_with = _made_with(record, method)
    mine = takes_part(planned.cell, method.card.kind, method.card.name)
    if mine and method.card.kind != "task" and made_with != method.digest:
        return f"was made by a plugin with digest {brief(made_with)}, the file here has {method.digest}"
    if odd := [
        name for name, value in _axes(planned.cell, plan.grid).items() if getattr(record, name) != value
    ]:
        return f"{', '.join(odd)}: not the cell's"
    if record.steps != dict(planned.roles):
        return "was made with other code, data or settings: its steps are not those of this grid"
    return ""


def _made_with(record: Record, method: Registered) -> str:
    """The digest of the plugin that a record names for the method; empty if it names none."""
    parts = record.provenance.get("components")
    part = parts.get(method.card.name) if isinstance(parts, Mapping) else None
    return str(part.get("digest", "")) if isinstance(part, Mapping) else ""


def _of_other_code(stray: Iterable[Path], method: Registered) -> list[str]:
    """Records that were made by another state of the plugin: its digest is a part of its cells' names."""
    digests: dict[str, int] = {}
    for path in stray:
        with contextlib.suppress(UsageError):
            digest = _made_with(read_record(path.parent, path.stem), method)
            digests[digest] = digests.get(digest, 0) + 1
    return [
        f"{n} of them were made by a plugin with digest {brief(digest)}, the file here has {method.digest}"
        for digest, n in digests.items()
        if digest not in ("", method.digest)
    ]


def _axes(cell: Cell, grid: Grid) -> dict[str, Any]:
    """The coordinates that a record of the cell tells."""
    spec = grid.spec
    return {
        **{name: getattr(cell, name) for name in AXES if hasattr(cell, name)},
        **{name: getattr(cell, name).label for name in ("merging", "attack", "defense")},
        "experts": list(cell.experts), "suite": spec.suite.name, "backbone": grid.backbone.label,
        "protocol": spec.protocol, "grid": spec.name,
    }  # fmt: skip


class Measured(NamedTuple):
    """What was measured where: by which step, what, on which task."""

    step: str
    metric: str
    task: str


def measured(record: Record, key: str) -> Measured:
    """What a record's count is of. Cells, and roles of one cell, may share a step."""
    metric, role, task = key.split("/", 2)
    ends = TRIGGERED if metric in ("asr", "ra") else ""
    names = [Role.VERIFY.of(role)] if metric == "mark" else [f"{role}{ends}", f"{role}:{task}{ends}"]
    step = next((record.steps[name] for name in names if name in record.steps), record.cell)
    return Measured(step, metric, task)


def _two_outcomes(records: Iterable[Record]) -> list[str]:
    """Cells share their controls: what one step measured must be the same wherever it is told."""
    first: dict[Measured, tuple[Count, str]] = {}
    wrong: dict[str, None] = {}
    for record in records:
        for key, counted in record.counts.items():
            place = measured(record, key)
            before, cell = first.setdefault(place, (counted, record.cell))
            if before != counted:
                told = f"{place.metric} on {brief(place.task)} of one and the same step"
                wrong[f"{cell} and {record.cell} tell of {told} differently"] = None
    return list(wrong)[:SHOWN]


# --------------------------------------------------------------------------- the claims


class Supported(NamedTuple):
    """A claimed number beside that of the records, and the interval of the latter."""

    claim: Claim
    found: float
    low: float
    high: float

    @property
    def name(self) -> str:
        row = ", ".join(f"{k} {v}" for k, v in self.claim.row.items())
        return brief(f"{self.claim.column} of {row} on {self.claim.board}", 200)


def supported(claims: Iterable[Claim], records: Sequence[Record]) -> list[Supported]:
    """Each claim with what the records say; UsageError where a claim names no number of their boards."""
    boards = {board.name: board for board in make_boards(records)}
    return [_found(i, claim, boards) for i, claim in enumerate(claims)]


def _found(place: int, claim: Claim, boards: Mapping[str, Board]) -> Supported:
    where = f"{FILE}: claims.{place}"
    if claim.board not in boards:
        raise UsageError(f"{where}.board", f"{brief(claim.board)!r}{nearest(claim.board, boards)}")
    board = boards[claim.board]
    frame = board.frame
    for column, value in claim.row.items():
        if column not in frame:
            raise UsageError(f"{where}.row", f"no column {brief(column)!r}{nearest(column, map(str, frame))}")
        frame = frame[[str(cell) == str(value) for cell in frame[column]]]
    if len(frame) != 1:
        names = display(board)[0][:3]
        raise UsageError(
            f"{where}.row", f"{len(frame)} rows fit; name one by columns such as {', '.join(names)}"
        )
    if claim.column not in board.measures:
        hint = nearest(claim.column, board.measures)
        raise UsageError(f"{where}.column", f"{brief(claim.column)!r} is no measure of the board{hint}")
    row = frame.iloc[0]
    return Supported(claim, *(float(row[claim.column + end]) for end in ("", "_low", "_high")))


def unsupported(claims: Sequence[Supported]) -> list[str]:
    """Claims that the records do not bear out."""
    wrong = [] if claims else ["claims: none; an entry says which numbers it stands for"]
    for one in claims:
        told = one.claim.value
        if told is None:
            wrong.append(f"{one.name}: no value; bench submit pack fills it")
        elif not abs(told - one.found) <= CLOSE:
            interval = f"[{100 * one.low:.1f}, {100 * one.high:.1f}]"
            wrong.append(
                f"{one.name}: claimed {100 * told:.1f}, the records say {100 * one.found:.1f} {interval}"
            )
    return wrong
