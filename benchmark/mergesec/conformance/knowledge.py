"""What the battery asks of either side of a backdoor: that it knows only what its card says.

Each check returns None if all is well, else what is wrong. A hook is handed a context that is made of its step
and of nothing else, so the first check looks at the step: with the same experts in it, another target class,
another adversary and more of them must give the same step. The second runs the component again in a world where all rows
are other ones that its card does not name, and demands the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
    """The defense's steps are those of a cell with another target class, another adversary, and two of them, if
    they are handed the same experts. ``raw`` is the grid that ``steps`` are of."""
    axes = {
        **raw["axes"],
        "target_class": [1],
        "adversary": [tasks[1]],
        "adversaries": [2],
    }
    other = make_plan(
        resolve(parse_grid({**raw, "axes": axes}, "conformance"), grid.catalog), lambda task: ""
    )
    theirs = [
        s
        for s in other.steps.values()
        if any(r.name == name and r.kind == "defense" for _, r in s.components)
    ]
    for step in steps:
        if not any(_with_inputs(t, step) == step.key for t in theirs if t.kind == step.kind):
            return f"{step.label} depends on the cell's target class or adversary"
    return None


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
