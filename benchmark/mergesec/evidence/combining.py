"""Records of several machines joined: one folder with every cell that any of them was asked for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mergesec.errors import UsageError
from mergesec.evidence.estimates import canonical
from mergesec.evidence.records import SCHEMA, Record, grid_folder
from mergesec.evidence.sides import MANIFEST, Side, conditions
from mergesec.files import brief, write_atomic

RANK = {"done": 0, "failed": 1, "blocked": 2, "missing": 3}
"""Of two records of a cell the one that tells more is kept."""


class Part(NamedTuple):
    """A grid's records as one machine has them."""

    side: str
    records: list[Record]
    manifest: dict[str, Any]


class Joined(NamedTuple):
    """A grid of all machines."""

    name: str
    records: list[Record]
    manifest: dict[str, Any]
    shared: int
    """Cells that more than one machine did, with the same outcome."""


def combine(sides: Sequence[Side], name: str = "") -> list[Joined]:
    """Every grid of these folders, joined with those of the same name; with a ``name`` all are parts of one grid.
    UsageError naming the first contradiction."""
    parts: dict[str, list[Part]] = {}
    for side in sides:
        for grid, home in side.homes.items():
            records = side.records(grid)
            if name:
                records = [r.model_copy(update={"grid": name}) for r in records]
            parts.setdefault(name or grid, []).append(Part(f"{side.name} ({grid})", records, _manifest(home)))
    return [join(grid, found) for grid, found in parts.items()]


def join(grid: str, parts: Sequence[Part]) -> Joined:
    """One grid of its parts."""
    _agree(parts)
    kept: dict[str, tuple[str, Record]] = {}
    shared = 0
    for part in parts:
        for record in part.records:
            before = kept.get(record.cell)
            if before and before[1].status == record.status == "done":
                _same_outcome(before, (part.side, record))
                shared += 1
            if before is None or RANK[record.status] < RANK[before[1].status]:
                kept[record.cell] = (part.side, record)
    records = [record for _, record in kept.values()]
    canonical(records)  # two names for one cell
    manifest = {
        "schema_version": SCHEMA,
        "spec": _union([part.manifest.get("spec", {}) for part in parts]),
        "cells": [record.cell for record in records],
    }
    return Joined(grid, records, manifest, shared)


def write_joined(folder: Path, grids: Sequence[Joined]) -> None:
    """The records of each grid and its manifest under ``folder/<grid>/``; UsageError, before anything is written, if
    records of one of them lie there."""
    for one in grids:
        if (home := grid_folder(folder, one.name)).exists():
            raise UsageError("--out", f"{brief(str(home))} is there already; give a new folder")
    for one in grids:
        _write(grid_folder(folder, one.name), one)


def _write(home: Path, joined: Joined) -> None:
    for record in joined.records:
        data = json.dumps(record.model_dump(mode="json"), sort_keys=True) + "\n"
        write_atomic(home / f"{record.cell}.json", data.encode())
    # last: until then nobody reads the others
    write_atomic(home / MANIFEST, (json.dumps(joined.manifest, indent=1, sort_keys=True) + "\n").encode())


def _manifest(home: Path) -> dict[str, Any]:
    found = json.loads((home / MANIFEST).read_bytes())  # read_records has read it before
    return found if isinstance(found, dict) else {}


# --------------------------------------------------------------------------- contradictions


def _agree(parts: Iterable[Part]) -> None:
    """UsageError if two done records were made in ways that may not stand on one board."""
    known: dict[str, tuple[str, str, str]] = {}
    for part in parts:
        for record in part.records:
            for what, value in _common(record).items():
                side, cell, before = known.setdefault(what, (part.side, record.cell, value))
                if before != value:
                    raise UsageError(
                        "combine",
                        f"{what} is {brief(before)} in {side} ({cell}), but {brief(value)} in {part.side} "
                        f"({record.cell}); these are two grids",
                    )


def _common(record: Record) -> dict[str, str]:
    """What all records of a grid share; a method's parameters are the grid's own business."""
    found = {"suite": record.suite, "backbone's name": record.backbone, "protocol": record.protocol}
    if record.status == "done":
        found |= {k: v for k, v in conditions(record).items() if not k.startswith("parameters of ")}
    return found


def _same_outcome(first: tuple[str, Record], second: tuple[str, Record]) -> None:
    """UsageError if two done records of one cell do not say the same of its test samples."""
    (side, a), (other, b) = first, second
    odd = sorted(a.counts.keys() ^ b.counts.keys())
    if odd:
        raise UsageError("combine", f"{a.cell}: {odd[0]} is in one of {side} and {other} only")
    for name, count in a.counts.items():
        if count != (twin := b.counts[name]):
            same = "others of them" if (count.k, count.n) == (twin.k, twin.n) else f"{twin.k} of {twin.n}"
            raise UsageError(
                "combine", f"{a.cell}: {name} is {count.k} of {count.n} in {side}, but {same} in {other}"
            )
    for name, value in a.values.items():
        if value != b.values.get(name):
            raise UsageError(
                "combine", f"{a.cell}: {name} is {value:g} in {side}, but {b.values.get(name)} in {other}"
            )


# --------------------------------------------------------------------------- what the whole was asked for


def _union(specs: Sequence[Any]) -> Any:
    """Specifications as one: lists with what any of them holds, mappings field by field, of what else differs the
    first."""
    first = specs[0]
    if all(isinstance(spec, Mapping) for spec in specs):
        keys = dict.fromkeys(key for spec in specs for key in spec)
        return {key: _union([spec[key] for spec in specs if key in spec]) for key in keys}
    if all(isinstance(spec, list) for spec in specs):
        distinct = {json.dumps(item, sort_keys=True): item for spec in specs for item in spec}
        return list(distinct.values())
    return first
