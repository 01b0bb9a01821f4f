"""Folders of records that are laid beside each other: reading them, and what two records must agree in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mergesec.errors import UsageError, nearest
from mergesec.evidence.records import Record, read_records
from mergesec.files import brief, is_file

MANIFEST = "grid.json"


class Side(NamedTuple):
    """One of the folders, under the name it was given by."""

    name: str
    homes: dict[str, Path]
    """Of each grid the folder that holds its records."""

    def records(self, grid: str) -> list[Record]:
        """The records of a grid; UsageError if one is not sound."""
        return read_records(self.homes[grid].parent, grid)


def read_side(place: str, grid: str = "") -> Side:
    """A folder of results, of records, or of one grid's records; of it one ``grid`` if one is named. UsageError if
    no grid was run there."""
    folder = Path(place)
    if is_file(folder / MANIFEST):
        homes = {folder.resolve().name: folder.resolve()}
    else:
        found = sorted({*folder.glob(f"records/*/{MANIFEST}"), *folder.glob(f"*/{MANIFEST}")})
        homes = {path.parent.name: path.parent for path in found}
    if not homes:
        raise UsageError(
            brief(place), f"holds no records: neither records/GRID/{MANIFEST} nor {MANIFEST} is there"
        )
    if grid and grid not in homes:
        raise UsageError("--grid", f"no records of {grid!r} in {brief(place)}{nearest(grid, homes)}")
    return Side(place, {grid: homes[grid]} if grid else homes)


def conditions(record: Record) -> dict[str, str]:
    """What a record tells of how it came about, and what another of the same cell must agree in: data, versions of
    components, plugins' code, parameters, recipe. What a machine is like is not among it."""
    told = record.provenance
    found = {f"parameters of {kind}": _text(c.parameters) for kind, c in record.components.items()}
    for task in record.experts:
        found |= _entry(f"data of {task}", told.get("data"), task)
        found |= _entry(f"task {task}", told.get("tasks"), task)
        if isinstance(told.get("partial"), dict):
            found[f"part of {task}"] = str(told["partial"].get(task, "all"))
    components = told.get("components")
    for name, one in components.items() if isinstance(components, Mapping) else ():
        if isinstance(one, Mapping):
            found[f"version of {name}"] = str(one.get("version"))
            found[f"code of {name}"] = str(one.get("digest", "built in"))
    for what in ("backbone", "recipe"):
        found |= {what: _text(told[what])} if isinstance(told.get(what), dict) else {}
    return found


def disagreements(a: Record, b: Record) -> list[str]:
    """In what two records differ that must agree; what only one of them tells is no disagreement."""
    mine, other = conditions(a), conditions(b)
    return [
        f"{what}: {brief(mine[what])} against {brief(other[what])}"
        for what in mine
        if what in other and mine[what] != other[what]
    ]


def machine(record: Record) -> dict[str, str]:
    """The software and devices of a record."""
    versions = record.provenance.get("versions")
    found = {str(k): str(v) for k, v in versions.items()} if isinstance(versions, Mapping) else {}
    devices = record.provenance.get("devices")
    return found | ({"device": ", ".join(map(str, devices))} if isinstance(devices, list) else {})


def _entry(what: str, table: Any, name: str) -> dict[str, str]:
    return {what: _text(table[name])} if isinstance(table, Mapping) and name in table else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
