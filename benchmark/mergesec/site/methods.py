"""What all grids say of each method: its variants, its boards, its best and worst cells, its cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mergesec.evidence.backdoor import control_of
from mergesec.evidence.estimates import Board
from mergesec.evidence.protection import LEAST_LOSS
from mergesec.evidence.records import Record
from mergesec.site.boards import Sheet
from mergesec.site.cells import accuracy_of, asr_of
from mergesec.site.names import slug
from mergesec.threats import Role, Threat

KEPT = 3
"""Best and worst cells that a page shows of each thing measured."""
COLUMN = {"merging": "method", "attack": "attack", "defense": "defense"}
"""The column of boards that holds each kind."""


class Scale(NamedTuple):
    """What cells of a method are ordered by; ``up`` if more is better for the method."""

    title: str
    up: bool


SCALES: Mapping[tuple[str, Threat], Scale] = {
    ("merging", Threat.CLEAN): Scale("mean accuracy of the merge", True),
    ("merging", Threat.BACKDOOR): Scale("ASR beyond the control", False),
    ("attack", Threat.BACKDOOR): Scale("ASR beyond the control", True),
    ("defense", Threat.BACKDOOR): Scale("ASR beyond the control", False),
    ("merging", Threat.PROTECTION): Scale("merged accuracy on the protected task", True),
    ("attack", Threat.PROTECTION): Scale("share of the merge's loss brought back", True),
    ("defense", Threat.PROTECTION): Scale("merged accuracy on the protected task after the attack", False),
}


class Shown(NamedTuple):
    """A cell on a method's page."""

    value: float
    grid: str
    cell: str
    told: str


@dataclass
class Method:
    """One method under one threat model (merge methods: under each)."""

    kind: str
    name: str
    variants: dict[str, int] = field(default_factory=dict)
    """Label → cells."""
    sheets: dict[str, tuple[str, Threat, int]] = field(default_factory=dict)
    """Slug of a sheet → grid, threat, cells."""
    ends: dict[Threat, tuple[list[Shown], list[Shown]]] = field(default_factory=dict)
    """Best and worst cells by threat model."""
    costs: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    """Grid and row of its board of costs."""

    @property
    def page(self) -> str:
        """Where its page is."""
        return f"methods/{self.kind}-{slug(self.name)}.html"


Methods = dict[tuple[str, str], Method]


def gather(methods: Methods, sheet: Sheet) -> None:
    """Add what a sheet says of each method."""
    for record in sheet.records:
        for kind, name, label in parts(record):
            mine = methods.setdefault((kind, name), Method(kind, name))
            mine.variants[label] = mine.variants.get(label, 0) + 1
            _, _, cells = mine.sheets.get(sheet.slug, ("", sheet.threat, 0))
            mine.sheets[sheet.slug] = (sheet.grid, sheet.threat, cells + 1)
            _place(mine, record)


def gather_costs(methods: Methods, grid: str, boards: Iterable[Board]) -> None:
    """Add a grid's costs."""
    for board in boards:
        if board.name == "cost":
            for row in board.frame.to_dict("records"):
                key = (str(row["kind"]), str(row["name"]).partition("(")[0])
                if key in methods:
                    methods[key].costs.append((grid, {str(k): v for k, v in row.items() if not _nan(v)}))


def _nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def parts(record: Record) -> Iterator[tuple[str, str, str]]:
    """Kind, name and label of the methods that took part."""
    for kind, label in (("merging", record.merging), ("attack", record.attack), ("defense", record.defense)):
        if label != "none":
            component = record.components.get(kind)
            yield kind, component.name if component else label.partition("(")[0], label


def _place(method: Method, record: Record) -> None:
    scale = SCALES.get((method.kind, record.threat))
    value = score(method.kind, record)
    if value is None or scale is None:
        return
    others = [label for kind, _, label in parts(record) if kind != method.kind]
    told = ", ".join([*others, *([record.subject] if record.subject else []), f"seed {record.seed}"])
    shown = Shown(value, record.grid, record.cell, told)
    best, worst = method.ends.setdefault(record.threat, ([], []))
    for kept, up in ((best, scale.up), (worst, not scale.up)):
        kept.append(shown)
        kept.sort(key=lambda s: (-s.value if up else s.value, s.grid, s.cell))
        del kept[KEPT:]


def score(kind: str, record: Record) -> float | None:
    """The number that a kind's cells are ordered by; None where it is not defined."""
    if record.status != "done":
        return None
    if record.threat == Threat.BACKDOOR and (kind != "merging" or record.attack != "none"):
        reached, control = asr_of(record), _rate(record, "asr", control_of([record]))
        return None if reached is None or control is None else reached - control
    if record.threat == Threat.PROTECTION and kind == "attack":
        return _recovered(record)
    return accuracy_of(record) if record.threat != Threat.BACKDOOR else None


def _rate(record: Record, metric: str, role: str) -> float | None:
    count = record.counts.get(f"{metric}/{role}/{record.target_task or record.subject}")
    return count.k / count.n if count is not None and count.n else None


def _recovered(record: Record) -> float | None:
    """Share of what protecting cost the merge that the attack brings back."""
    roles = (Role.CLEAN_MERGE, Role.PROTECTED_MERGE, Role.MERGE)
    before, protected, attacked = (_rate(record, "acc", role) for role in roles)
    if before is None or protected is None or attacked is None or before - protected <= LEAST_LOSS:
        return None
    return (attacked - protected) / (before - protected)
