"""Generated images side by side, from what evaluations kept: the same conditions and start noise in every row.

Nothing is sampled again, and no torch is needed: bytes of images go from the store to the sheet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mergesec.evidence.records import Record
from mergesec.execution.harvest import cell_name
from mergesec.execution.store import CorruptArtifact, Store, parse_safetensors
from mergesec.figures.canvas import Caption, Picture, file_stem, numbered, part, sheet, strip, wrapped
from mergesec.planning.cells import Cell
from mergesec.planning.plan import CellPlan, Plan
from mergesec.planning.refs import NONE
from mergesec.threats import Role, Threat

STEM = "generated"
_SIDE, _LABEL = 0.42, 2.4
"""Inches: an image, the column of labels."""
_LINE = 0.13


@dataclass
class Sheet:
    """Rows of images ``[n, 3, H, W]`` bytes under labels; rows that two cells share are there once."""

    name: str
    what: str
    rows: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)


def generated_sheets(plan: Plan, store: Store, records: Sequence[Record]) -> list[Sheet]:
    """Sheets of the first seed's cells that are done: a clean one per task and number of experts, one per protection
    and one per backdoor."""
    known = {record.cell: record for record in records if record.status == "done"}
    first = min((planned.cell.seed for planned in plan.cells), default=0)
    sheets: dict[str, Sheet] = {}
    for planned in plan.cells:
        record = known.get(cell_name(planned.cell))
        if record is None or planned.cell.seed != first:
            continue
        for task in _shown(planned.cell):
            found = _rows(planned, task, store)
            if not found:
                continue
            own = _sheet_of(planned.cell, task)
            page = sheets.setdefault(own.name, own)
            page.rows |= {label: images for label, images in found.items() if label not in page.rows}
            page.records.append(record)
    return list(sheets.values())


def _shown(cell: Cell) -> tuple[str, ...]:
    """The tasks whose images tell of a cell."""
    return cell.experts if cell.threat == Threat.CLEAN else (cell.subject,)


def _sheet_of(cell: Cell, task: str) -> Sheet:
    many = len(cell.experts)
    if cell.threat == Threat.CLEAN:
        return Sheet(f"{STEM}-clean-{file_stem(task)}-{many}", f"{task}, {many} experts merged")
    if cell.threat == Threat.PROTECTION:
        name = f"{STEM}-protection-{file_stem(task)}-{file_stem(cell.defense.label)}-{many}"
        return Sheet(name, f"{task} protected by {cell.defense.label}, {many} experts merged")
    name = f"{STEM}-backdoor-{file_stem(task)}-{file_stem(cell.attack.label)}-{many}"
    return Sheet(name, f"{task} poisoned by {cell.attack.label}, {many} experts merged, under the trigger")


def _labels(cell: Cell, task: str) -> Iterator[tuple[str, str]]:
    """(role, label of its row), in the order of the sheet."""
    merging = cell.merging.label
    if cell.threat == Threat.CLEAN:
        yield from ((Role.BASE, "base"), (Role.EXPERT.of(task), "expert"), (Role.CLEAN_MERGE, merging))
    elif cell.threat == Threat.PROTECTION:
        protected = f"{merging}, protected"
        attacked = f"{merging} after {cell.attack.label}" if cell.attack is not NONE else protected
        yield from (
            (Role.EXPERT.of(task), "expert"), (Role.PUBLISHED, "protected expert"),
            (Role.CLEAN_MERGE, f"{merging}, unprotected"), (Role.PROTECTED_MERGE, protected),
            (Role.MERGE, attacked),
        )  # fmt: skip
    else:
        guarded = f"{merging}, {cell.defense.label}" if cell.defense is not NONE else merging
        yield from (
            (Role.BASE.triggered, "base"), (Role.POISONED.triggered, "poisoned expert"),
            (Role.CLEAN_MERGE.triggered, f"{merging}, clean"), (Role.MERGE.triggered, guarded),
        )  # fmt: skip


def _rows(planned: CellPlan, task: str, store: Store) -> Mapping[str, NDArray[np.uint8]]:
    """The images that a cell's evaluations kept of a task, by label."""
    roles, rows = dict(planned.roles), dict[str, NDArray[np.uint8]]()
    for role, label in _labels(planned.cell, task):
        with contextlib.suppress(CorruptArtifact):
            if role in roles and store.has("evaluate", roles[role]):
                found = parse_safetensors(store.read("evaluate", roles[role])[0]).get(f"kept|{task}|images")
                if found is not None:
                    rows.setdefault(label, np.frombuffer(found.data, np.uint8).reshape(found.shape))
    return rows


def generated_pictures(found: Sequence[Sheet]) -> Iterator[Picture]:
    """A picture per sheet; parted if too tall."""
    for page in found:
        labels = {name: wrapped(name, 40) for name in page.rows}
        lines = {name: max(_SIDE, _LINE * len(labels[name])) for name in page.rows}
        many = max(len(images) for images in page.rows.values())
        pages = part(list(page.rows), lines.__getitem__)
        for number, names in enumerate(pages):
            size = (_LABEL + _SIDE * many, 0.3 + sum(lines[name] for name in names))
            figure, panels = sheet(
                size, (len(names), 1), page.what, Caption.of(page.records),
                "Every column has the same condition and start noise.",
            )  # fmt: skip
            for name, axes in zip(names, panels[:, 0], strict=True):
                strip(axes, page.rows[name].astype(np.float64) / 255)
                axes.set_ylabel("\n".join(labels[name]), rotation=0, ha="right", va="center", fontsize=6.5)
            yield Picture(numbered(page.name, number, len(pages)), figure)
