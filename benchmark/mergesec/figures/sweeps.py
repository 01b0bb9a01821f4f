"""Which merge methods of a grid differ in one number only: the x-axes of curves, read from the records."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mergesec.evidence.records import Component, Record

LEAST = 3
"""Points a curve needs."""

Methods = Mapping[str, Component]
"""Merge methods by the label that boards show."""


@dataclass(frozen=True)
class Sweep:
    """Methods that are one and the same but for the value of ``parameter``."""

    title: str
    parameter: str
    values: Mapping[str, float]
    """Label as on the boards → value, in increasing order of the value."""


def methods_of(records: Iterable[Record]) -> Methods:
    """The merge methods of these records, by their label; records of before 0.1 do not tell them."""
    return {r.merging: r.components["merging"] for r in records if "merging" in r.components}


def find_sweeps(methods: Methods) -> list[Sweep]:
    """Every parameter that takes at least three numbers while all others stay; ``methods`` by their label."""
    names = {m.name for m in methods.values()}
    sweeps = []
    for name in sorted(names):
        mine = {label: m.parameters for label, m in methods.items() if m.name == name}
        for key in sorted({k for given in mine.values() for k in given}):
            sweeps += _along(name, key, mine)
    return sweeps


def _along(name: str, key: str, given: Mapping[str, Mapping[str, Any]]) -> list[Sweep]:
    """The sweeps of one method along one parameter: its labels grouped by all other parameters."""
    groups: dict[str, dict[str, float]] = {}
    for label, parameters in given.items():
        value = _number(parameters.get(key))
        if value is not None:
            rest = {k: v for k, v in parameters.items() if k != key}
            groups.setdefault(json.dumps(rest, sort_keys=True), {})[label] = value
    found = []
    for rest_text, values in groups.items():
        if len(set(values.values())) >= LEAST:
            rest = json.loads(rest_text)
            told = {k: v for k, v in rest.items() if any(p.get(k) != v for p in given.values())}
            title = f"{name}({', '.join(f'{k}={v}' for k, v in sorted(told.items()))})" if told else name
            found.append(Sweep(title, key, dict(sorted(values.items(), key=lambda item: item[1]))))
    return found


def axis_title(parameter: str) -> str:
    """What stands under an axis along which a parameter grows."""
    return "scaling coefficient λ" if parameter == "scaling" else parameter.replace("_", " ")


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
