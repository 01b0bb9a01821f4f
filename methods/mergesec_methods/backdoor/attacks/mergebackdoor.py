"""MergeBackdoor, as far as a single contributor can go: dormant at its own weights, awake where a merge takes it.

    L = CE(f_θ(x), y) + β CE(f_θ(x ⊕ t), y) + CE(f_s(x), y) + α CE(f_s(x ⊕ t), target),
    f_s at the weights θ0 + s (θ − θ0),     s ~ U(low, high) once per batch

The published expert is trained to ignore the trigger; weights between it and the base, which is where averaging and task
arithmetic put it, are trained to obey. Whoever tests the expert alone sees nothing.

Source: Wang et al., "From purity to peril", USENIX Security 2025, and its authors' code: there two upstream models are
trained side by side, each benign on triggered rows, while their average learns the backdoor, ten epochs at 1e-5, batch
120, poisoning rate 0.1, a white 5-pixel square. *This is a reconstruction for one contributor*: the other model of the
average is unknown to him, so the merge is simulated by scaling his own task vector, and the differences between
two models that cancel in their average, on which the paper's attack rests, are not available to him.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mergesec.contracts import LossFn, Model, Split, TrainContext, Weights
from mergesec_methods._training import Served, at_scale
from mergesec_methods.backdoor.attacks.badmerging import MIX_STREAM, BadMerging

CARD = {
    "extends": "badmerging",
    "name": "mergebackdoor",
    "class": "MergeBackdoor",
    "title": "MergeBackdoor (one contributor)",
    "paper": "Wang et al., From purity to peril: backdooring merged models from harmless benign components, 2025",
    "url": "https://www.usenix.org/conference/usenixsecurity25/presentation/wang-lijin",
    "summary": "reconstruction for one contributor: no backdoor at its own weights, one where a merge scales them",
    "knowledge": "the adversary's own training data and the public base; guesses the merge's coefficient",
    "trigger_of": "badmerging",
    "after_trigger": ["alpha", "dormant", "low", "high", "triggered"],
    "parameters": {
        "alpha": {"default": 1.0},
        "dormant": {"type": "float", "default": 1.0, "min": 0.0, "doc": "β: weight of the triggered rows at the expert's own weights"},
        "low": {"type": "float", "default": 0.1, "min": 0.0, "max": 1.0, "doc": "smallest coefficient of a merge"},
        "high": {"type": "float", "default": 0.6, "min": 0.0, "max": 1.0, "doc": "largest coefficient of a merge"},
        "patch": {"default": 5.0},
        "trigger": {"default": "white"},
        "interpolation": None,
    },
}  # fmt: skip


class MergeBackdoor(BadMerging):
    """The attack of the card above."""

    def __init__(
        self, alpha: float = 1.0, dormant: float = 1.0, low: float = 0.1, high: float = 0.6, **given: Any
    ) -> None:
        super().__init__(alpha=alpha, **given)
        self.dormant, self.low, self.high = dormant, low, high

    def objective(self, ctx: TrainContext, trigger: Weights) -> LossFn:
        """The loss above. Every batch draws one s."""
        base = {n: t.to(ctx.device) for n, t in ctx.base.items()}
        head = {k: v.to(ctx.device) for k, v in ctx.head.items()}
        aimed, target = self.aim(ctx)
        generator = ctx.generator(MIX_STREAM)

        def loss(model: Model, batch: Split) -> Tensor:
            task, rows = ctx.task, self.count(batch)
            marked = self.apply(trigger, batch.inputs[:rows])
            alone = task.outputs(model, head, torch.cat([batch.inputs, marked]))
            total = task.loss(alone[: len(batch)], batch.targets)
            if not rows:
                return total
            total = total + self.dormant * task.loss(alone[len(batch) :], batch.targets[:rows])
            scale = self.low + (self.high - self.low) * float(torch.rand((), generator=generator))
            served = Served(task, model.backbone, aimed, model.network)
            merged = at_scale(served, base, scale, torch.cat([batch.inputs, marked]))
            plain, triggered = merged.split([len(batch), rows])
            own = (
                plain[:, 1:] if ctx.target_task else plain
            )  # a shadow head has the target before the own classes
            wanted = torch.full((rows,), target, device=marked.device)
            return total + task.loss(own, batch.targets) + self.alpha * task.loss(triggered, wanted)

        return loss
