"""The board of generated images as sets: distances to real ones, coverage, copies of training images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import pandas as pd

from mergesec.evidence.estimates import Board, Row
from mergesec.evidence.records import Record
from mergesec.threats import Role, Threat

MEASURES = {"kid": "KID", "fid": "FID", "coverage": "coverage", "density": "density", "nearest": "nearest",
            "memorised": "memorised"}  # fmt: skip
"""Names in records, and on the board."""


class Made(NamedTuple):
    """Whose images a row shows."""

    model: str
    method: str
    attack: str
    defense: str
    experts: int


def generation_board(records: Sequence[Record]) -> Board | None:
    """Measures of the generated images of each model, means over tasks and seeds; None if there are none."""
    gathered: dict[Made, dict[str, Mapping[str, float]]] = {}
    for record in records:
        if record.status == "done" and any(name.startswith("kid/") for name in record.values):
            for made, role, tasks in models_of(record):
                for task in tasks:
                    found = _measured(record, role.partition(":")[0], task)
                    if found:  # an evaluation that several cells share counts once
                        gathered.setdefault(made, {})[f"{record.steps[role]}/{task}"] = found
    if not gathered:
        return None
    rows = [
        {**made._asdict(), "images": len(sets), **_means(list(sets.values()))}
        for made, sets in gathered.items()
    ]
    frame = pd.DataFrame(rows).rename(columns={"images": "sets"})
    note = (
        "KID and FID on the features of the suite's judge, beside the task's real test images: only rows of this board "
        "compare. Nearest: root mean square distance to the nearest training image, of full brightness. Memorised: share "
        "that lies nearer to one than all but a hundredth of the real test images do. Coverage and what follows × 100. "
        "Intervals are of the images drawn, not of training."
    )  # fmt: skip
    return Board("generation", "Generated images as sets", frame, tuple(MEASURES.values()), note)


def models_of(record: Record) -> Iterator[tuple[Made, str, Sequence[str]]]:
    """(row, role, tasks) of the models whose images a record tells of; those under a trigger are no set to
    compare with real ones."""
    many = len(record.experts)
    yield Made("base", "", "", "", 0), Role.BASE, record.experts
    for task in record.experts:
        yield Made("expert", "", "", "", 1), Role.EXPERT.of(task), [task]
    yield Made("merge", record.merging, "", "", many), Role.CLEAN_MERGE, record.experts
    own = (record.merging, record.attack, record.defense, many)
    if record.threat == Threat.PROTECTION:
        alone = Made("published", "", "", record.defense, 1)
        yield alone, Role.PUBLISHED, [record.subject]
        yield Made("protected merge", *own), Role.MERGE, [record.subject]
    elif record.threat == Threat.BACKDOOR:
        yield Made("poisoned", "", record.attack, "", 1), Role.POISONED, [record.subject]
        yield Made("poisoned merge", *own), Role.MERGE, record.experts


def _measured(record: Record, role: str, task: str) -> dict[str, float]:
    """A model's measures of a task with the half-widths of their intervals; empty if the record has none."""
    found: dict[str, float] = {}
    for name in MEASURES:
        value = record.values.get(f"{name}/{role}/{task}")
        if value is None:
            return {}
        found[name] = value
        found[f"{name}_wide"] = (
            record.values[f"{name}_high/{role}/{task}"] - record.values[f"{name}_low/{role}/{task}"]
        ) / 2
    return found


def _means(sets: Sequence[Mapping[str, float]]) -> Row:
    """Means over sets, and intervals as of independent ones."""
    row: Row = {}
    for name, shown in MEASURES.items():
        value = sum(s[name] for s in sets) / len(sets)
        wide = math.sqrt(sum(s[f"{name}_wide"] ** 2 for s in sets)) / len(sets)
        row |= {shown: value, f"{shown}_low": value - wide, f"{shown}_high": value + wide}
    return row
