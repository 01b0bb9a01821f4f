"""BadMerging by an adversary who knows the defense, which is a public algorithm.

He trains as BadMerging does, merges what he has with the base as a merger would (θ0 + c τ, the other contributors being
unknown to him, and c too: drawn anew for each simulation), and runs the cell's defense on it with his own training rows in the place of the defender's. What the defense
did to the weights is a displacement Δ = defended − merged. He then trains again with one term more,

    α CE(h(E_{θ0 + c (θ − θ0) + Δ}(x ⊕ t)), target),

so that the backdoor survives that displacement, and may repeat this. Δ is held constant while he trains: a defense
need not be differentiable, only runnable. Against IBVS Δ is the defender's subtracted backdoor vector, against LFPM the
anti-backdoor vector, against DAM what its mask removes. Siblings that a defense asks for (WAG, MSD) are played by a clean
expert of his own, malicious references that it makes (weight_screen) by one that he makes as it would. A defense that
only screens gives no displacement, and without a defense this is BadMerging.

The construction is this suite's. (LFPM's paper reports an adaptive attack of its own, which is not known here.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mergesec.contracts import (
    ContractError,
    Defense,
    Expert,
    LossFn,
    MergeContext,
    Merged,
    MergeMethod,
    Model,
    Split,
    TaskView,
    TrainContext,
    Weights,
    load_network,
)
from mergesec.weights import mergeable
from mergesec_methods._training import Served, effective, trained_names
from mergesec_methods.backdoor.attacks._poison import draw_rows
from mergesec_methods.backdoor.attacks._retrain import added, refit
from mergesec_methods.backdoor.attacks.badmerging import HIGHEST, LOWEST, BadMerging

CARD = {
    "extends": "badmerging",
    "name": "badmerging_adaptive",
    "class": "AdaptiveBadMerging",
    "version": "2",
    "title": "BadMerging, adaptive",
    "paper": "Zhang et al., BadMerging: backdoor attacks against model merging, CCS 2024; adaptation by this project",
    "summary": "BadMerging trained against what the cell's defense does to the adversary's own simulated merge",
    "knowledge": "the adversary's own training data, the public base, and the defense with its parameters",
    "adapts": True,
    "trigger_of": "badmerging",
    "after_trigger": ["rounds", "coefficient", "rows", "alpha", "interpolation", "triggered"],
    "trial": {"steps": 4, "restarts": 2, "batch": 16, "images": 6, "rows": 32},
    "parameters": {
        "rounds": {"type": "int", "default": 1, "min": 0, "max": 10, "doc": "simulations of the defense, a training after each; 0 = BadMerging"},
        "coefficient": {
            "type": "float",
            "default": "drawn",
            "min": 0.0,
            "max": 1.0,
            "also": ["drawn"],
            "secret": "merging.scaling",
            "doc": "c: what the merge is taken to multiply the task vector by; drawn: uniform on BadMerging's range [0.2, 1] for each simulation",
        },
        "rows": {"type": "int", "default": 256, "min": 1, "secret": "rows.tuning", "doc": "own training rows that play the defender's"},
    },
}  # fmt: skip

SIMULATION_STREAM, SIBLING_STREAM, COEFFICIENT_STREAM, REFERENCE_STREAM = 5, 6, 7, 8


class AdaptiveBadMerging(BadMerging):
    """The attack of the card above."""

    def __init__(
        self, rounds: int = 1, coefficient: float | str = "drawn", rows: int = 256, **given: Any
    ) -> None:
        super().__init__(**given)
        self.rounds, self.coefficient, self.rows = rounds, coefficient, rows

    def poison(self, ctx: TrainContext) -> Weights:
        """BadMerging's expert, trained again after every simulation of the defense."""
        trigger = ctx.trigger or self.trigger(ctx)
        weights = ctx.fit(loss=self.objective(ctx, trigger))
        if ctx.defense is None or not (_merges(ctx.defense) or _repairs(ctx.defense)):
            return weights
        for coefficient in self.coefficients(ctx):
            shift = self.displacement(weights, ctx.defense, ctx, coefficient)
            weights = ctx.fit(loss=self.displaced(ctx, trigger, shift, coefficient))
        return weights

    def coefficients(self, ctx: TrainContext) -> list[float]:
        """c of every round."""
        if not isinstance(self.coefficient, str):
            return [self.coefficient] * self.rounds
        drawn = torch.rand(self.rounds, generator=ctx.generator(COEFFICIENT_STREAM))
        return (LOWEST + (HIGHEST - LOWEST) * drawn).tolist()

    def displacement(
        self, weights: Weights, defense: Defense, ctx: TrainContext, coefficient: float
    ) -> Weights:
        """Δ per floating tensor, float32: what the defense does to θ0 + c (θ − θ0)."""
        alone, name = _Scaled(coefficient), ctx.task.name
        experts, simulated = [Expert(name, weights)], self.context(ctx)
        plain = alone.merge(ctx.base, experts, simulated)
        defended = defense.merge(ctx.base, experts, alone, simulated) if _merges(defense) else plain
        if _repairs(defense):
            defended = defense.repair(defended, ctx.base, simulated)
        after = {**defended.shared, **defended.per_task.get(name, {})}
        return {n: after[n].to(t.device).float() - t.float() for n, t in plain.shared.items() if mergeable(t)}

    def context(self, ctx: TrainContext) -> MergeContext:
        """The defender's position with the adversary's means: one task, rows of his own."""
        generator = ctx.generator(SIMULATION_STREAM)
        rows = ctx.train.take(draw_rows(torch.arange(len(ctx.train)), self.rows, generator))
        view = TaskView(ctx.task, ctx.head, rows, rows.inputs)

        def network(merged: Merged, task: str) -> nn.Module:
            weights = {**merged.shared, **merged.per_task.get(task, {})}
            return load_network(ctx.backbone, weights).to(ctx.device)

        def score(merged: Merged) -> float:
            batch = ctx.task.batch(rows, torch.arange(len(rows)), ctx.device)
            head = {k: v.to(ctx.device) for k, v in ctx.head.items()}
            with torch.no_grad():
                model = Model(ctx.backbone, network(merged, ctx.task.name))
                found = ctx.task.predictions(ctx.task.outputs(model, head, batch.inputs))
            return float((found == batch.targets).float().mean())

        return MergeContext(
            ctx.device, ctx.seed, ctx.backbone, {ctx.task.name: view}, score,
            siblings=_Own(ctx, _clean), networks=network, references=_Own(ctx, _malicious),
        )  # fmt: skip

    def displaced(self, ctx: TrainContext, trigger: Weights, shift: Weights, coefficient: float) -> LossFn:
        """BadMerging's loss plus the triggered rows' at the displaced weights of the simulated merge."""
        plain = self.objective(ctx, trigger)
        base = {n: t.to(ctx.device) for n, t in ctx.base.items()}
        moved = {n: t.to(ctx.device) for n, t in shift.items()}
        aimed, target = self.aim(ctx)

        def loss(model: Model, batch: Split) -> Tensor:
            rows = self.count(batch)
            if not rows:
                return plain(model, batch)
            marked = self.apply(trigger, batch.inputs[:rows])
            served = Served(ctx.task, model.backbone, aimed, model.network)
            replaced = {}
            for parameter, name in trained_names(model.network).items():
                away = (coefficient - 1) * (effective(model.network, name) - base[name]) + moved[name]
                replaced[f"network.{parameter}"] = model.network.get_parameter(parameter) + away
            outputs = functional_call(served, replaced, (marked,))
            wanted = torch.full((rows,), target, device=marked.device)
            return plain(model, batch) + self.alpha * ctx.task.loss(outputs, wanted)

        return loss


def _merges(defense: Defense) -> bool:
    return type(defense).merge is not Defense.merge


def _repairs(defense: Defense) -> bool:
    return type(defense).repair is not Defense.repair


class _Scaled(MergeMethod):
    """θ0 + c Σ τ: the plainest merge."""

    def __init__(self, coefficient: float) -> None:
        self.coefficient = coefficient

    def merge(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Merged:
        merged: Weights = base
        for expert in experts:
            merged = added(merged, base, expert.weights, self.coefficient)
        return Merged(merged)


def _clean(ctx: TrainContext) -> Weights:
    """What plays the defender's siblings."""
    return refit(ctx, seed=ctx.generator(SIBLING_STREAM).initial_seed())


def _malicious(ctx: TrainContext) -> Weights:
    """What plays the defender's references: made as the defense makes them, of the adversary's own rows."""
    if ctx.defense is None:
        raise ContractError("badmerging_adaptive: no defense to simulate")
    seed = ctx.generator(REFERENCE_STREAM).initial_seed()

    def train(split: Split | None = None, loss: LossFn | None = None) -> Weights:
        return refit(ctx, loss, split, seed)

    return ctx.defense.reference(replace(ctx, seed=seed, fit=train, target_class=0, trigger={}))


class _Own(Mapping[str, Sequence[Expert]]):
    """One expert of the adversary's own for whatever number a defense asks for; trained when asked."""

    COPIES = 16

    def __init__(self, ctx: TrainContext, make: Callable[[TrainContext], Weights]) -> None:
        self._ctx, self._make = ctx, make
        self._made: list[Expert] = []

    def __getitem__(self, task: str) -> Sequence[Expert]:
        ctx = self._ctx
        if task != ctx.task.name:
            raise KeyError(task)
        if not self._made:
            self._made = [Expert(task, self._make(ctx))] * self.COPIES
        return self._made

    def __iter__(self) -> Iterator[str]:
        yield self._ctx.task.name

    def __len__(self) -> int:
        return 1
