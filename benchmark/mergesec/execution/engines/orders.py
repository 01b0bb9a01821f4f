"""What the workers of an array are told, as JSON in a folder that they and the driver see."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mergesec.execution.engines.worker import Workplace
from mergesec.execution.guests.containment import Walls
from mergesec.files import write_atomic
from mergesec.planning.plan import Step
from mergesec.planning.refs import Ref

_ORDER, _STEPS, _STOP = "order.json", "steps.json", "stop"


@dataclass(frozen=True)
class Order:
    """Beside the steps: which attempt this is, and how a worker does them."""

    attempt: str
    place: Workplace
    device: str
    jobs: int | None
    timeout: float | None
    frees: bool = False


def write_order(folder: Path, order: Order, steps: Mapping[str, Step], wanted: Iterable[str]) -> None:
    """Tell workers that start from now on. Full if there is no room."""
    write_atomic(folder / _STEPS, json.dumps(packed(needed_for(steps, wanted), wanted)).encode())
    write_atomic(folder / _ORDER, json.dumps(asdict(order)).encode())


def given(folder: Path) -> bool:
    """Whether somebody gave orders here."""
    return (folder / _ORDER).is_file()


def read_order(folder: Path) -> Order:
    told: dict[str, Any] = json.loads((folder / _ORDER).read_bytes())
    place = told.pop("place")
    walls = place.pop("walls")
    seen = None if walls is None else Walls(*map(tuple, walls))
    plugins = tuple(place.pop("plugins"))
    return Order(place=Workplace(**place, plugins=plugins, walls=seen), **told)


def read_steps(folder: Path) -> tuple[dict[str, Step], list[str]]:
    """All steps that a worker may come to, in their order, and the keys of those that are wanted."""
    return unpacked(json.loads((folder / _STEPS).read_bytes()))


def stop(folder: Path) -> None:
    """Have the workers take no more steps."""
    write_atomic(folder / _STOP, b"")


def may_go_on(folder: Path) -> None:
    (folder / _STOP).unlink(missing_ok=True)


def stopped(folder: Path) -> bool:
    return (folder / _STOP).exists()


# --------------------------------------------------------------------------- steps as JSON


def needed_for(steps: Mapping[str, Step], wanted: Iterable[str]) -> list[Step]:
    """The wanted steps and all that they rest on: an input may prove corrupt, and is made again then."""
    found: set[str] = set()
    stack = list(wanted)
    while stack:
        key = stack.pop()
        if key not in found:
            found.add(key)
            stack += [k for _, k in steps[key].inputs]
    return [step for key, step in steps.items() if key in found]


def packed(steps: Iterable[Step], wanted: Iterable[str]) -> dict[str, Any]:
    """Steps with each component written once, and inputs by their place in the list."""
    refs: dict[str, int] = {}
    told: list[dict[str, Any]] = []
    place: dict[str, int] = {}
    rows = []

    def number(ref: Ref) -> int:
        if ref.text not in refs:
            refs[ref.text] = len(told)
            told.append(asdict(ref))
        return refs[ref.text]

    for step in steps:
        place[step.key] = len(place)
        components = [[role, number(ref)] for role, ref in step.components]
        rows.append(
            [step.key, step.kind, components, [[role, place[k]] for role, k in step.inputs], step.args]
        )
    return {"refs": told, "steps": rows, "wanted": [place[key] for key in wanted]}


def unpacked(told: Mapping[str, Any]) -> tuple[dict[str, Step], list[str]]:
    refs = [_ref(fields) for fields in told["refs"]]
    keys = [row[0] for row in told["steps"]]
    steps = {
        key: Step(
            key, kind, tuple((role, refs[n]) for role, n in components),
            tuple((role, keys[n]) for role, n in inputs), args,
        )
        for key, kind, components, inputs, args in told["steps"]
    }  # fmt: skip
    return steps, [keys[n] for n in told["wanted"]]


def _ref(fields: Mapping[str, Any]) -> Ref:
    bound = tuple((name, tuple(v) if isinstance(v, list) else v) for name, v in fields["parameters"])
    return Ref(**{**fields, "parameters": bound, "inner": tuple(map(_ref, fields["inner"]))})
