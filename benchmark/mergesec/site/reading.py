"""What a folder of results holds: grids with their good records, and the files that are left out and why."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mergesec.errors import UsageError
from mergesec.evidence.estimates import Cell, cell_of
from mergesec.evidence.records import GRID_NAME, Record, read_record
from mergesec.files import plain


class Broken(NamedTuple):
    """A file that is left out."""

    grid: str
    file: str
    why: str

    def __str__(self) -> str:
        return f"{plain(self.grid)}/{plain(self.file)}: {plain(self.why)}"


@dataclass(frozen=True)
class Grid:
    """The readable records of a grid, and what was left out."""

    name: str
    spec: Mapping[str, Any] = field(default_factory=dict)
    """The resolved grid file."""
    records: tuple[Record, ...] = ()
    broken: tuple[Broken, ...] = ()


def grid_names(records: Path) -> list[str]:
    """Names of the folders that hold a grid's records; UsageError if there is none."""
    found = sorted(path.parent.name for path in records.glob("*/grid.json"))
    if not found:
        raise UsageError("--results", f"no grid was run there: {str(records)!r} holds no NAME/grid.json")
    return found


def read_grids(records: Path) -> Iterator[Grid]:
    """Every grid, one after the other, so that only one is held at a time."""
    for name in grid_names(records):
        yield read_grid(records / name)


def read_grid(home: Path) -> Grid:
    """A grid's records; a broken one is named and left out."""
    try:
        if not re.fullmatch(GRID_NAME, home.name):
            raise ValueError("not a grid's name: letters, digits, '.', '_' and '-'")
        told = json.loads((home / "grid.json").read_bytes())
        names, spec = [str(name) for name in told["cells"]], told.get("spec", {})
        if not isinstance(spec, dict):
            raise ValueError("its spec is no mapping")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return Grid(home.name, broken=(Broken(home.name, "grid.json", f"unreadable ({brief_of(error)})"),))
    good: dict[Cell, Record] = {}
    broken: list[Broken] = []
    for name in dict.fromkeys(names):
        try:
            record = read_record(home, name)
        except UsageError as error:
            broken.append(Broken(home.name, f"{name[:200]}.json", error.message))
            continue
        first = good.setdefault(cell_of(record), record)
        if first is not record:
            broken.append(Broken(home.name, f"{name}.json", f"of the same cell as {first.cell}"))
    return Grid(home.name, spec, tuple(good.values()), tuple(broken))


def brief_of(error: Exception) -> str:
    """An error in a few words."""
    return (str(error) or type(error).__name__).splitlines()[0][:120]
