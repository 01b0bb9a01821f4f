"""What the battery asks of either side of a backdoor: that it knows only what its card says.

Each check returns None if all is well, else what is wrong. A hook is handed a context that is made of its step
and of nothing else, so the first check looks at the step: with the same experts in it, another target class,
another adversary, more of them and another trigger must give a defense's same step; another merge, coefficient and
defense an attack's. The second runs the component again in a world where all rows
are other ones that its card does not name, and demands the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergesec.conformance.triggers import other_values
from mergesec.contracts import Split, Task
from mergesec.execution.steps import run
from mergesec.execution.store import Store
from mergesec.execution.work import Bench, packed
from mergesec.planning.cards import Card
from mergesec.planning.gridspec import parse_grid
from mergesec.planning.plan import Plan, Step, make_plan, step_key
from mergesec.planning.resolve import Grid, resolve

SECRET_NAMES = {
    "attack": ("coefficient", "scaling", "defense"),
    "defense": ("target", "target_class", "patch", "trigger", "adversary", "adversaries", "victim"),
}
"""Names of parameters that may hold what the other side keeps to itself."""


def says_its_secrets(card: Card) -> str | None:
    """A parameter that is named like the other side's secret says so, so that the planner can keep them apart."""
    for name, parameter in card.parameters.items():
        number = parameter.type in ("int", "float")
        if number and name in SECRET_NAMES[card.kind] and not parameter.secret:
            told = f"card.parameters.{name} may equal a secret of the other side by coincidence"
            return f"{told}: draw it from ctx.generator(), or name the secret ('secret': 'target_class', ...)"
    return None


# --------------------------------------------------------------------------- the cell's coordinates


def blind_to_the_cell(
    raw: Mapping[str, Any], steps: Sequence[Step], grid: Grid, tasks: Sequence[str], name: str
) -> str | None:
    """The defense's steps are those of a cell with another target class, another adversary, and two of them, and of
    one whose attack has another value of each parameter (the trigger's form, size and place among them), if they
    are handed the same experts. ``raw`` is the grid that ``steps`` are of."""
    elsewhere = {"target_class": [1], "adversary": [tasks[1]], "adversaries": [2]}
    if not _planned(raw, elsewhere, grid, "defense", name).has(steps):
        return "a step depends on the cell's target class or adversary"
    (attack,) = raw["axes"]["attacks"]
    entry = grid.catalog.get("attack", attack)
    changed = {k: v for one in other_values(entry, entry.card.parameters).values() for k, v in one.items()}
    other = _planned(raw, {"attacks": [{"name": attack, **changed}]}, grid, "defense", name)
    if other.steps and not other.has(steps):  # none: a parameter of its own would be the secret
        return "a step depends on the cell's trigger"
    return None


def blind_to_the_defender(raw: Mapping[str, Any], steps: Sequence[Step], grid: Grid, name: str) -> str | None:
    """The attack's steps are those of a cell with another merge and another coefficient, and, unless it adapts to
    the defense, with another defense."""
    elsewhere: dict[str, Any] = {"merging": [{"name": "task_arithmetic", "scaling": 0.9}, "simple_average"]}
    if not grid.catalog.get("attack", name).card.adapts:
        elsewhere["defenses"] = ["outlier_test"]
    if not _planned(raw, elsewhere, grid, "attack", name).has(steps):
        return "a step depends on the cell's merge or defense"
    return None


class _Planned(NamedTuple):
    """The steps of a component in a plan."""

    steps: list[Step]

    def has(self, steps: Sequence[Step]) -> bool:
        """Whether each of other ``steps`` is among them, once it is handed the same inputs."""
        return all(
            any(_with_inputs(own, step) == step.key for own in self.steps if own.kind == step.kind)
            for step in steps
        )


def _planned(raw: Mapping[str, Any], axes: Mapping[str, Any], grid: Grid, kind: str, name: str) -> _Planned:
    """Of the grid with other ``axes``, the steps of one component."""
    changed = resolve(parse_grid({**raw, "axes": {**raw["axes"], **axes}}, "conformance"), grid.catalog)
    plan = make_plan(changed, lambda task: "")
    return _Planned([
        s for s in plan.steps.values() if any(r.name == name and r.kind == kind for _, r in s.components)
    ])  # fmt: skip


def _with_inputs(step: Step, like: Step) -> str:
    """The key that a step would have with the inputs of another one."""
    given = dict(like.inputs)
    inputs = [(role, given.get(role, key)) for role, key in step.inputs]
    return step_key(step.kind, [(role, ref.digest) for role, ref in step.components], inputs, step.args)


# --------------------------------------------------------------------------- rows


def blind_to_rows(card: Card, steps: Iterable[Step], plan: Plan, bench: Bench, folder: Path) -> str | None:
    """The first step of each kind gives the same bits where rows that the card does not name are others."""
    blinded = Bench(Store(folder), bench.catalog, torch.device("cpu"))
    kinds = {key: step.kind for key, step in plan.steps.items()}
    tried: set[str] = set()
    for step in steps:
        if step.kind in tried:
            continue
        tried.add(step.kind)
        for _, key in step.inputs:
            if not blinded.store.has(kinds[key], key):
                _copy(plan.steps[key], bench, blinded, card)
        blob, info = run(step, blinded, kinds)
        blinded.store.put(step.kind, step.key, blob, dict(info))
        before = bench.store.read(step.kind, step.key)[1]["digests"]
        if blinded.store.read(step.kind, step.key)[1]["digests"] != before:
            return f"{step.kind} gives other tensors where {_unnamed(card)} are others; the card names {_named(card)}"
    return None


def _named(card: Card) -> str:
    if card.data == "none":
        return "no rows"
    return f"{card.data} {'inputs' if card.unlabelled else 'rows'}"


def _unnamed(card: Card) -> str:
    left = [name for name in ("train", "tuning", "test") if name != card.data]
    also = ["labels of tuning rows"] if card.unlabelled else []
    return ", ".join([f"{name} rows" for name in left] + also)


def _copy(step: Step, source: Bench, target: Bench, card: Card) -> None:
    """An artifact as it is; of data, with other rows where the card names none."""
    blob, meta = source.store.read(step.kind, step.key)
    if step.kind == "data":
        task: Task = source.component(dict(step.components)["task"])
        splits = task.unpack(source.read("data", step.key)[0])
        changed = {n: _other(s, n, card, len(task.classes)) for n, s in splits.items()}
        blob = bytes(packed(task.pack(changed)))
    target.store.put(step.kind, step.key, bytes(blob), meta["info"])


def _other(split: Split, name: str, card: Card, classes: int) -> Split:
    """The split, its first row in every place and labels one further, as far as the card does not name it."""
    wrong: Tensor = (split.targets + 1) % classes
    if name != card.data:
        return Split(split.take(torch.zeros(len(split), dtype=torch.int64)).inputs, wrong)
    return Split(split.inputs, wrong) if card.unlabelled else split
