"""Cells as data: a row each for the list of a grid's cells, and everything but the bits for the page of one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mergesec.evidence.records import Component, Record
from mergesec.site.names import slug
from mergesec.site.scripts import packed, spread
from mergesec.threats import Role, Threat

PER_SCRIPT = 64
"""Cells that one script holds, about."""
_FIELDS = ("cell", "threat", "method", "attack", "defense", "subject", "seed", "protected", "secrets", "adversaries",
           "target_task", "protocol", "contained", "status", "reason")  # fmt: skip
_AXES = {"merging": "merging", "attack": "attacks", "defense": "defenses"}
"""What a grid calls the axis of each component."""


def buckets(records: Sequence[Record]) -> int:
    """Over how many scripts a grid's cells are spread."""
    return max(1, -(-len(records) // PER_SCRIPT))


def index(grid: str, records: Sequence[Record]) -> dict[str, Any]:
    """The list of a grid's cells, by column."""
    columns: dict[str, list[Any]] = {
        name: [getattr(r, "merging" if name == "method" else name) for r in records] for name in _FIELDS
    }
    columns["experts"] = [len(r.experts) for r in records]
    columns["accuracy"] = [accuracy_of(r) for r in records]
    columns["ASR"] = [asr_of(r) for r in records]
    return {"grid": grid, "scripts": buckets(records), "columns": columns}


def accuracy_of(record: Record) -> float | None:
    """Accuracy of the cell's own merge: on the victim's task (protection), else the mean over tasks."""
    role = Role.CLEAN_MERGE if record.threat == Threat.CLEAN else Role.MERGE
    tasks = [record.subject] if record.threat == Threat.PROTECTION else record.experts
    counts = [record.counts[name] for t in tasks if (name := f"acc/{role}/{t}") in record.counts]
    rates = [c.k / c.n for c in counts if c.n]
    return sum(rates) / len(rates) if rates else None


def asr_of(record: Record) -> float | None:
    """Attack success on the cell's merge, on the task that the backdoor aims at."""
    count = record.counts.get(f"asr/{Role.MERGE}/{record.target_task or record.subject}")
    return count.k / count.n if count is not None and count.n else None


def scripts(grid: str, spec: Mapping[str, Any], records: Iterable[Record], number: int) -> dict[str, bytes]:
    """Script name → bytes: the cells of a grid, spread by name over ``number`` scripts."""
    parts: list[dict[str, Any]] = [{} for _ in range(number)]
    for record in records:
        parts[spread(record.cell, number)][record.cell] = told(record, spec)
    names = [f"cells/{slug(grid)}-{at}" for at in range(number)]
    return {name: packed(name, part) for name, part in zip(names, parts, strict=True)}


def told(record: Record, spec: Mapping[str, Any]) -> dict[str, Any]:
    """A record without the outcome of every sample, and the grid that makes this cell alone."""
    fields = {
        name: getattr(record, name) for name in Record.model_fields if name not in ("counts", "components")
    }
    return {
        **fields,
        "components": {kind: c.model_dump() for kind, c in record.components.items()},
        "counts": {name: [count.k, count.n] for name, count in record.counts.items()},
        "makes": narrowed(record, spec),
        "plugins": _plugins(record),
    }


def narrowed(record: Record, spec: Mapping[str, Any]) -> dict[str, Any]:
    """The grid file, its axes narrowed to this cell; empty if the record or its grid do not tell enough.

    It goes into a file and never into a command line: what a record says is nothing to paste into a shell.
    """
    axes = spec.get("axes")
    if not record.components or not isinstance(axes, Mapping):
        return {}
    mine: dict[str, Any] = {
        plural: [_named(record.components.get(kind), axes.get(plural))] for kind, plural in _AXES.items()
    }
    if record.threat == Threat.PROTECTION:
        mine |= {"victim": [record.subject], "protected": [record.protected], "secrets": [record.secrets]}
    elif record.threat == Threat.BACKDOOR:
        mine |= {
            "adversary": [record.subject], "target_class": [record.target_class],
            "adversaries": [record.adversaries], "target_task": [record.target_task],
        }  # fmt: skip
    mine["experts"] = [list(record.experts)]
    kept = {name: value for name, value in spec.items() if name not in ("include", "exclude", "description")}
    return {
        **kept,
        "name": f"{record.grid}-cell"[:100],
        "threats": [str(record.threat)],
        "seeds": [record.seed],
        "axes": {**axes, **mine},
    }


def _named(component: Component | None, options: Any) -> str | dict[str, Any]:
    """A component as the grid names it, each list of values narrowed to the one of this cell."""
    if component is None:
        return "none"
    found = [_option(component, option) for option in options] if isinstance(options, list) else []
    fits = [option for option in found if option is not None]
    return max(fits, key=len) if fits else {"name": component.name, **component.parameters}


def _option(component: Component, option: Any) -> dict[str, Any] | None:
    """An entry of the grid's axis with this component's values; None if it is of another component."""
    given = {"name": option} if isinstance(option, str) else option
    if not isinstance(given, Mapping) or given.get("name") != component.name:
        return None
    narrow: dict[str, Any] = {}
    for key, value in given.items():
        mine = component.name if key == "name" else component.parameters.get(key)
        if isinstance(value, list) and mine != value:
            if mine not in value:
                return None
            value = mine
        elif mine != value and not isinstance(value, Mapping) and not isinstance(mine, Mapping | list):
            return None
        narrow[key] = value
    return narrow


def _plugins(record: Record) -> list[str]:
    """Names of components that came from plugin files."""
    parts = record.provenance.get("components")
    told = parts if isinstance(parts, Mapping) else {}
    return sorted(str(name) for name, part in told.items() if isinstance(part, Mapping) and "digest" in part)
