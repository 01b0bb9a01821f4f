"""Steps that measure: test predictions, how visible a trigger is, how far two networks lie apart."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mergesec.anatomy import AnatomyError
from mergesec.contracts import (
    Defense,
    MergeMethod,
    Model,
    Task,
    Weights,
    load_network,
)
from mergesec.execution.contexts import PlainMerge
from mergesec.execution.work import Result, Work
from mergesec.inference import predict, resident, task_served

VISIBILITY_ROWS = 256


def serves_itself(producer: Any) -> bool:
    """Whether a method makes the networks of what it produced by code of its own."""
    if isinstance(producer, MergeMethod):
        return type(producer).network is not MergeMethod.network
    return isinstance(producer, Defense) and type(producer).network is not Defense.network


def network_of(work: Work, role: str, task: str, producer: Any, cast: str = "") -> nn.Module:
    """The network that serves ``task``, as whoever produced the artifact says; ``cast`` rounds its weights."""
    if isinstance(producer, MergeMethod):
        network = producer.network(work.backbone, work.merged(role), task)
    elif isinstance(producer, Defense):
        network = producer.network(work.backbone, work.tensors(role))
    else:
        network = load_network(work.backbone, work.tensors(role))
    if cast:
        kind = getattr(torch, cast)
        network.load_state_dict(
            {
                n: t.to(kind).to(t.dtype) if t.is_floating_point() else t
                for n, t in network.state_dict().items()
            }
        )
    return network.to(work.device).eval()


Maker = Callable[[str, str], Model]
"""(role of an artifact, task) -> the model that serves the task."""


@contextlib.contextmanager
def model_maker(work: Work) -> Iterator[Maker]:
    """Who makes models of the step's artifacts: this process, unless a plugin's own network serves them; then a
    guest does, and only batches and features go between."""
    cast = str(work.args.get("cast", ""))
    producer = None
    if "producer" in work.refs:
        if work.foreign("producer"):
            with work.guests.network(work) as served:
                if served is not None:
                    yield lambda role, task: served.model(role, task, cast)
                    return
            producer = plain_producer(work)
        else:
            producer = work.component("producer")
    made: dict[str, Model] = {}

    def make(role: str, task: str) -> Model:
        """One network for all tasks where they have all weights in common."""
        alike = not isinstance(producer, MergeMethod) or not (
            serves_itself(producer) or work.merged(role).per_task
        )
        if not alike or role not in made:
            made[role] = Model(work.backbone, network_of(work, role, task, producer, cast))
        return made[role]

    yield make


def plain_producer(work: Work) -> MergeMethod | None:
    """Stands in for a plugin's merge method that leaves its networks as the contract has them."""
    return PlainMerge() if work.refs["producer"].kind == "merging" else None


@contextlib.contextmanager
def trigger_of(work: Work) -> Iterator[Callable[[Task, Any], Any]]:
    """What puts the step's trigger on raw inputs of a task; a plugin's attack does so in a guest."""
    name = work.refs["attack"].name
    with contextlib.ExitStack() as stack:
        if work.foreign("attack"):
            apply = stack.enter_context(work.guests.trigger(work))
        else:
            apply = partial(work.component("attack").apply, work.tensors("trigger"))

        def mark(task: Task, inputs: Any) -> Any:
            """ContractError if they no longer are raw inputs of the task."""
            return task.check_triggered(apply(inputs), inputs, name)

        yield mark


def evaluate(work: Work) -> Result:
    """Test predictions (and targets) of every task, optionally under a trigger, and what else the task measures."""
    found: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    with model_maker(work) as maker, contextlib.ExitStack() as stack:
        mark = stack.enter_context(trigger_of(work)) if "attack" in work.refs else None
        for role in work.refs:
            if not role.startswith("task:"):
                continue
            name = role.removeprefix("task:")
            task: Task = work.component(role)
            splits, frozen = work.splits(f"data:{name}", task), work.tensors(f"head:{name}")
            split = splits["test"]
            model, change = maker("model", name), partial(mark, task) if mark else None
            aim = work.tensors("trigger").get("target") if mark else None
            measured = task.measure(model, frozen, splits, work.device, change, aim)
            if measured is None:
                predicted = predict(task, model, frozen, split, work.device, change)
            else:
                predicted = measured.predictions
                values[name] = {n: list(v) for n, v in measured.values.items()}
                found |= {f"kept|{name}|{n}": t for n, t in measured.kept.items()}
                if measured.copies is not None:
                    found[f"copies|{name}"] = measured.copies.int()
            found[f"predictions|{name}"] = predicted.int()
            found[f"targets|{name}"] = split.targets.int()
    return Result(found, {"measures": values} if values else {})


def visibility(work: Work) -> Result:
    """How much the trigger changes the first test inputs of a task."""
    task: Task = work.component("task")
    split = work.splits("data", task)["test"]
    inputs = task.batch(split, torch.arange(min(VISIBILITY_ROWS, len(split))), work.device).inputs
    with trigger_of(work) as mark:
        changed = mark(task, inputs)
    return Result({}, {"rows": len(inputs), "visibility": task.visibility(inputs, changed)})


def compare(work: Work) -> Result:
    """Two networks that should be the same function: largest difference of test outputs, and how far
    the second's weights lie from the first's and from the base."""
    gap = _gap(work, work.args["task"])
    first, second, origin = work.tensors("first"), work.tensors("second"), work.tensors("base")
    facts: dict[str, Any] = {
        "max_abs_dlogit": gap, "report": work.info("second").get("report", {}),
        "to_base": distances(work.backbone, second, origin),
        "to_expert": distances(work.backbone, second, first),
        "expert_to_base": distances(work.backbone, first, origin),
    }  # fmt: skip
    return Result({}, facts)


def _gap(work: Work, name: str) -> float:
    """The largest difference of what the two networks give a user."""
    task: Task = work.component(f"task:{name}")
    split = resident(work.splits(f"data:{name}", task)["test"], work.device)
    with model_maker(work) as maker:
        models = (Model(work.backbone, network_of(work, "first", name, None)), maker("second", name))
        outputs = [task_served(task, m, work.tensors(f"head:{name}"), split, work.device) for m in models]
    return float((outputs[0] - outputs[1]).abs().max())


def distances(backbone: Any, weights: Weights, reference: Weights) -> dict[str, float]:
    """‖θ − θ_ref‖ / ‖θ_ref‖ per kind of tensor (query, key, value, output, up, gate, down, other) and over
    all; tensors of another shape are left out. Kinds are the anatomy's; without one all is ``other``."""
    kinds: dict[str, str] = {}
    try:
        for block in backbone.anatomy().blocks:
            named = [
                (kind, getattr(side, kind))
                for attention in block.attentions
                for side in attention.sides
                for kind in ("query", "key", "value", "output")
            ]
            named += [(kind, getattr(mlp, kind)) for mlp in block.mlps for kind in ("up", "gate", "down")]
            for kind, linear in named:
                if linear is not None:
                    kinds.setdefault(linear.weight, kind)
    except AnatomyError:
        kinds = {}
    sums: dict[str, list[float]] = {}
    for name, tensor in reference.items():
        if tensor.is_floating_point() and name in weights and weights[name].shape == tensor.shape:
            apart = weights[name].to(torch.float64, copy=True).sub_(tensor)
            moved = float(apart.square_().sum())
            size = float(apart.copy_(tensor).square_().sum())
            for kind in (kinds.get(name, "other"), "all"):
                sums.setdefault(kind, [0.0, 0.0])[0] += moved
                sums[kind][1] += size
    # ten digits: the last ones of a sum depend on where in memory its terms lie
    return {
        kind: float(f"{(moved / size) ** 0.5:.10g}") if size else 0.0 for kind, (moved, size) in sums.items()
    }
