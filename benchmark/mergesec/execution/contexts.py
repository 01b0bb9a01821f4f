"""What each hook is handed: contexts made from a step and its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mergesec.contracts import (
    ContractError,
    Expert,
    LossFn,
    MergeContext,
    Merged,
    MergeMethod,
    Model,
    Recipe,
    Split,
    Task,
    TaskView,
    TrainContext,
    Weights,
)
from mergesec.execution.work import Keeper, Work, unflatten
from mergesec.inference import predict, resident
from mergesec.training import fit
from mergesec.weights import read_only


def view(work: Work, task_name: str, data_role: str, head_role: str, task_role: str) -> TaskView:
    """What may be known of a task: its tuning rows (of the step's own task the half that the step names, if it does),
    and test inputs only if the protocol says so."""
    task: Task = work.component(task_role)
    splits = work.splits(data_role, task)
    half = str(work.args.get("rows", "")) if task_name == work.args.get("task") else ""
    cut = "rows" in work.info(data_role)  # a guest is handed no more than its half
    tuning = half_of(splits["tuning"], "" if cut else half)
    if half and not len(tuning):
        raise ContractError(f"{task_name}: {len(splits['tuning'])} tuning rows are too few to be halved")
    transductive = work.args.get("protocol") == "transductive"
    return TaskView(
        task, work.tensors(head_role), tuning, (splits["test"] if transductive else tuning).inputs
    )


class Views(Mapping[str, TaskView]):
    """Views of tasks, read when asked for: most merges never look at data."""

    def __init__(self, work: Work, tasks: list[str]) -> None:
        self._work, self._tasks, self._read = work, tasks, dict[str, TaskView]()

    def __getitem__(self, task: str) -> TaskView:
        if task not in self._tasks:
            raise KeyError(task)
        if task not in self._read:
            self._read[task] = view(self._work, task, f"data:{task}", f"head:{task}", f"task:{task}")
        return self._read[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)


REFERENCE_ROWS = 10
"""Training rows of the target class that an off-task adversary has (BadMerging, section 5.1: a few images)."""


def train_context(work: Work) -> TrainContext:
    task: Task = work.component("task")
    base_weights, head_weights = work.tensors("base"), work.tensors("head")
    recipe = Recipe(**dict(work.args["recipe"]))
    own = half_of(work.splits("data", task)["train"], recipe.half)
    calls = count()

    def run_recipe(split: Split | None = None, loss: LossFn | None = None) -> Weights:
        return fit(
            work.backbone, task, base_weights, head_weights, own if split is None else split,
            recipe, work.seed, work.device, loss, Keeper(work.bench, work.step.key, next(calls)),
        )  # fmt: skip

    aim, called, reference = _aimed(work)
    return TrainContext(
        device=work.device, seed=work.seed, task=task, backbone=work.backbone, base=base_weights,
        head=head_weights, train=own, recipe=recipe, fit=run_recipe,
        target_class=int(work.args.get("target", 0)),
        trigger=work.tensors("trigger") if "trigger" in work.inputs else {},
        benign=work.tensors("benign") if "benign" in work.inputs else None,
        target_task=aim, target_name=called, reference=reference,
        defense=work.component("defense") if {"attack", "defense"} <= work.refs.keys() else None,
    )  # fmt: skip


class Aim(NamedTuple):
    """Off-task: the task aimed at, the target class's name, and the few of its training rows that the adversary has."""

    task: str = ""
    called: str = ""
    reference: Split | None = None


def _aimed(work: Work) -> Aim:
    if "target" not in work.args:
        return Aim()
    label, aim = int(work.args["target"]), str(work.args.get("target_task", ""))
    aimed: Task = work.component("target" if aim else "task")
    train = work.splits("target_data" if aim else "data", aimed)["train"]
    if label >= len(aimed.classes):
        raise ContractError(f"{aimed.name} has {len(aimed.classes)} classes, none numbered {label}")
    if not aim:
        return Aim()
    rows = reference_rows(train.targets, label, int(work.args["reference"]))
    if not len(rows):
        raise ContractError(f"{aim}: no training row of class {label}")
    return Aim(aim, str(aimed.classes[label]), train.take(rows))


def reference_rows(targets: Tensor, label: int, seed: int) -> Tensor:
    """The rows of class ``label`` that an off-task adversary has: drawn, in their order."""
    rows = torch.nonzero(targets == label).flatten()
    generator = torch.Generator().manual_seed(seed)
    return rows[torch.randperm(len(rows), generator=generator)[:REFERENCE_ROWS]].sort().values


def half_of(split: Split, half: str) -> Split:
    """The first or second half of a split's rows, in their order; the split itself where no half is asked for. Which
    rows are whose is drawn once for all seeds, so that no expert of one half has seen a row of the other."""
    if not half:
        return split
    rows = torch.randperm(len(split), generator=torch.Generator().manual_seed(len(split)))
    middle = (len(split) + 1) // 2
    return split.take((rows[:middle] if half == "first" else rows[middle:]).sort().values)


def trial(work: Work, own: list[Expert]) -> Callable[[Weights], float]:
    """The mean tuning accuracy of the cell's merge with a candidate in the victim's place."""
    method: MergeMethod = work.component("merging")
    victim, base_weights = work.args["task"], work.tensors("base")
    # the merge's own draws matter less than that every candidate meets the same ones
    ctx = merge_context(work, method, work.seed)

    def score(candidate: Weights) -> float:
        experts = {e.task: e for e in own} | {victim: Expert(victim, candidate)}
        order = [experts[t] for t in str(work.args["order"]).split(",")]
        return ctx.score(method.merge(base_weights, order, ctx))

    return score


def fitting(weights: Weights, base_weights: Weights) -> Weights:
    """What can enter a merge: a published network of another topology gives the tensors that fit the
    base by name and shape; the rest stays the base's, as a merging script that skips them leaves it."""
    if weights.keys() == base_weights.keys() and all(
        w.shape == base_weights[n].shape for n, w in weights.items()
    ):
        return weights
    return read_only(
        {
            n: weights[n] if n in weights and weights[n].shape == b.shape else b
            for n, b in base_weights.items()
        }
    )


def further(work: Work, role: str) -> dict[str, list[Expert]]:
    """The experts beside the contributed ones that a defense is handed as ``role``, by task."""
    found: dict[str, list[Expert]] = {}
    for name in work.inputs:
        kind, _, rest = name.partition(":")
        if kind == role:
            task = rest.split(":")[0]
            found.setdefault(task, []).append(Expert(task, work.tensors(name)))
    return found


def merge_context(work: Work, method: MergeMethod, seed: int) -> MergeContext:
    tasks = [r.removeprefix("task:") for r in work.refs if r.startswith("task:")]
    views = Views(work, tasks)
    siblings, references = further(work, "sibling"), further(work, "reference")

    rows: dict[str, Split] = {}

    def score(merged: Merged) -> float:
        """Mean tuning accuracy over tasks; the rows stay on the device for the next candidate."""
        total = 0.0
        for name in tasks:
            network = method.network(work.backbone, merged, name).to(work.device)
            v = views[name]
            if name not in rows:
                rows[name] = resident(v.tuning, work.device)
            predicted = predict(v.task, Model(work.backbone, network), v.head, rows[name], work.device)
            total += float((predicted == v.tuning.targets).float().mean())
        return total / len(tasks)

    def network(merged: Merged, task: str) -> nn.Module:
        return method.network(work.backbone, merged, task).to(work.device).eval()

    wrapped = work.refs["merging"].inner if "merging" in work.refs else ()
    inner = work.bench.component(wrapped[0]) if wrapped else None
    return MergeContext(work.device, seed, work.backbone, views, score, siblings, inner, network, references)


def contributed(work: Work) -> list[Expert]:
    """The experts handed in, after screening if there was one; where another screening says whom it kept
    (``kept``), only those of them."""
    names = [r.removeprefix("expert:") for r in work.inputs if r.startswith("expert:")]
    if "screened" not in work.inputs:
        base_weights = work.tensors("base")
        return [
            Expert(t, fitting(work.tensors(f"expert:{t}"), base_weights), _findings(work, t)) for t in names
        ]
    edited = unflatten(work.tensors("screened"), {}).per_task
    kept = work.info("kept" if "kept" in work.inputs else "screened")["kept"]
    return [Expert(t, edited[t] if t in edited else work.tensors(f"expert:{t}")) for t in kept]


def _findings(work: Work, task: str) -> Weights:
    """What the step's screen found in an expert before."""
    return work.tensors(f"finding:{task}") if f"finding:{task}" in work.inputs else {}


class PlainMerge(MergeMethod):
    """Stands in where a score is asked for before a merge method is known."""

    def merge(self, base: Weights, experts: Any, ctx: MergeContext) -> Merged:
        return Merged(base)
