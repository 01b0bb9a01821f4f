"""Test inputs under each attack's trigger, from stored triggers and data: what ``sample_sheets`` draws.

The only pictures that need more than records, and torch. Nothing is computed but the triggers' ``apply``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mergesec.contracts import Task
from mergesec.evidence.records import Record
from mergesec.execution.evaluation import trigger_of
from mergesec.execution.harvest import cell_name
from mergesec.execution.store import CorruptArtifact
from mergesec.execution.work import Bench, Work
from mergesec.planning.plan import Plan, Step
from mergesec.planning.refs import NONE, Ref, make_ref, trigger_ref
from mergesec.planning.resolve import Grid
from mergesec.threats import Role

SHOWN = {"image": 6, "text": 3}
"""Test inputs shown, by modality."""
MADE_BY = ("trigger", "data")
"""Inputs of a visibility step: all that is read."""


@dataclass(frozen=True)
class Aim:
    """Where a backdoor works. Attacks with one aim are shown side by side."""

    task: str
    """The task aimed at, whose test inputs are shown."""
    subject: str
    """The task whose trigger it is; another one than ``task`` off-task."""
    target_class: int


@dataclass(frozen=True)
class Triggered:
    """Inputs under the trigger of one attack (or several), and the record's measures of visibility (empty: none yet)."""

    attack: str
    inputs: Any
    visibility: Mapping[str, float]


@dataclass
class Samples:
    """One aim's inputs: images float32 ``[n, 3, H, W]`` in [0, 1] or texts, as they are and triggered."""

    aim: Aim
    modality: str
    target: str
    """Name of the target class."""
    classes: list[str]
    inputs: Any
    rows: list[Triggered]
    records: list[Record] = field(default_factory=list)
    """One cell per row."""


def collect_samples(
    plan: Plan, bench: Bench, records: Sequence[Record]
) -> tuple[list[Samples], dict[str, bool]]:
    """Samples of every aim of the grid, attacks in the grid's order, and the labels of steps that are missing,
    with whether a run of the grid would leave them out, as what needs them is done.

    Attacks that share a trigger share a row; of several seeds the first one whose trigger is there.
    """
    known = {record.cell: record for record in records}
    names = row_names(plan.grid)
    found: dict[Aim, Samples] = {}
    drawn: set[tuple[Aim, str]] = set()
    missing: dict[tuple[Aim, str], tuple[str, bool]] = {}
    for planned in sorted(plan.cells, key=lambda c: c.cell.seed):
        key = dict(planned.roles).get(Role.VISIBILITY)
        record = known.get(cell_name(planned.cell))
        if key is None or record is None:
            continue
        step, cell = plan.steps[key], planned.cell
        if bench.catalog.get("task", cell.aim).card.modality not in SHOWN:
            continue  # start noise is no picture; what is generated from it is, see ``generated``
        where = Aim(cell.aim, cell.subject, cell.target_class), dict(step.components)["attack"].label
        if where in drawn:
            continue
        absent = _absent(plan, bench, step)
        if not absent:
            try:
                _add(found, where[0], names[where[1]], step, plan, bench, record)
                drawn.add(where)
            except CorruptArtifact as error:  # removed by the store
                absent = plan.steps[error.key].label
        if absent:
            missing.setdefault(where, (absent, bench.store.has(step.kind, key)))
    for samples in found.values():
        _sort(samples, list(names.values()))
    return list(found.values()), dict(told for where, told in missing.items() if where not in drawn)


def row_names(grid: Grid) -> dict[str, str]:
    """What the row of each trigger is called, by the trigger's label, in the order of the grid's attacks: the
    attacks that share it, with the parameters that it depends on."""
    names: dict[str, list[str]] = {}
    for attack in grid.attacks:
        if attack is not NONE:
            names.setdefault(trigger_ref(attack, grid.catalog).label, []).append(_own_name(attack, grid))
    return {label: ", ".join(dict.fromkeys(users)) for label, users in names.items()}


def _own_name(attack: Ref, grid: Grid) -> str:
    """The attack's label without what its trigger does not depend on."""
    entry = grid.catalog.get("attack", attack.name)
    if not entry.card.trigger_of:
        return trigger_ref(attack, grid.catalog).label
    kept = {k: v for k, v in attack.parameters if k not in entry.card.after_trigger}
    return make_ref(entry, kept, attack.name, grid.catalog).label


def _sort(samples: Samples, names: Sequence[str]) -> None:
    """Rows in the order of the grid's attacks."""
    pairs = list(zip(samples.rows, samples.records, strict=True))
    pairs.sort(key=lambda pair: names.index(pair[0].attack))
    samples.rows, samples.records = [row for row, _ in pairs], [record for _, record in pairs]


def _absent(plan: Plan, bench: Bench, step: Step) -> str:
    """The label of the first input of a visibility step that the store lacks; empty if it has all."""
    needed = [plan.steps[dict(step.inputs)[role]] for role in MADE_BY]
    return next((s.label for s in needed if not bench.store.has(s.kind, s.key)), "")


def _add(
    found: dict[Aim, Samples], aim: Aim, name: str, step: Step, plan: Plan, bench: Bench, record: Record
) -> None:
    """Put one attack's row into its aim's samples."""
    work = Work(step, bench, {key: plan.steps[key].kind for _, key in step.inputs})
    samples = found.get(aim) or _clean(aim, work)
    own = samples.inputs.clone() if isinstance(samples.inputs, Tensor) else list(samples.inputs)
    with trigger_of(work) as mark:
        marked = mark(work.component("task"), own)
    shown = marked.detach().cpu() if isinstance(marked, Tensor) else list(marked)
    measured = {n: v for n, v in record.values.items() if n.startswith("visibility/")}
    if not measured or record.steps.get(Role.VISIBILITY) != step.key:  # not done, or of another version
        with contextlib.suppress(CorruptArtifact):  # then the picture does without
            told = bench.store.meta("visibility", step.key)["info"]["visibility"]
            measured = {f"visibility/{n}": float(v) for n, v in told.items()}
    samples.rows.append(
        Triggered(name, shown, {n.removeprefix("visibility/"): v for n, v in measured.items()})
    )
    samples.records.append(record)
    found[aim] = samples


def _clean(aim: Aim, work: Work) -> Samples:
    task: Task = work.component("task")
    split = work.splits("data", task)["test"]
    modality = work.bench.catalog.get("task", work.refs["task"].name).card.modality
    rows = pick_rows(split.targets, aim.target_class, SHOWN[modality])
    batch = task.batch(split, rows, work.device)
    names = [str(name) for name in task.classes]
    target = names[aim.target_class] if aim.target_class < len(names) else str(aim.target_class)
    return Samples(aim, modality, target, [names[int(t)] for t in split.targets[rows]], batch.inputs, [])


def pick_rows(targets: Tensor, left_out: int, many: int) -> Tensor:
    """Int64 ``[<= many]``: the first row of each of ``many`` classes, spread evenly over those that occur but
    ``left_out``; where there are fewer classes, their second rows, and so on."""
    labels = sorted(set(targets.tolist()) - {left_out}) or sorted(set(targets.tolist()))
    spread = [labels[i * len(labels) // many] for i in range(many)] if len(labels) > many else labels
    members = [torch.nonzero(targets == label).flatten().tolist() for label in spread]
    turns = range(max(map(len, members), default=0))
    rows = [of[turn] for turn in turns for of in members if turn < len(of)]
    return torch.tensor(rows[:many], dtype=torch.int64)
