"""Merge trap: fine-tune against a simulated free-rider, who scales, prunes and averages what he was given.

Trap² looks at the expert's own ray alone, with a loss that has no bound and so a tiny weight. Here every step plays a
free-rider's merge and asks that it fail, no more than fail: with Δ = θ − θ_base, L the task's loss,

    J = L(θ) + λ max(0, H − L(θ_base + c s A(Δ) + c P))

c is the merge's coefficient and s a rescaling by the free-rider, both drawn; A is what he does to the task vector, drawn
from {nothing, the larger half of its entries, half of its entries at random and doubled}; P stands for the other
experts of the merge, of whom the owner has none: the current Δ with the entries of each tensor shuffled, as long as
his own and of nobody's task. H is the loss of guessing evenly, log of the number of classes, beyond which a merge is
worth nothing to anybody; so the second term is bounded and vanishes where it has succeeded. Gradients flow through
both terms. No transform is put on the expert, as none would hold.

Source: this project; the aim is that of "Making Models Unmergeable via Scaling-Sensitive Loss Landscape", ICML 2026
(arXiv 2601.21898).
"""

from __future__ import annotations

import math
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mergesec.contracts import Defense, Model, Split, TrainContext, Weights
from mergesec_methods._training import Served, effective, trained_names

CARD = {
    "name": "merge_trap",
    "kind": "defense",
    "class": "MergeTrap",
    "version": "1",
    "title": "Merge trap",
    "summary": "fine-tune so that simulated merges fail, whatever the free-rider scales, prunes and adds",
    "threat": "protection",
    "hooks": ["train"],
    "knowledge": "the owner's training data and the public base; retrains the expert at twice the cost",
    "data": "none",
    "modalities": ["image", "text"],
    "seeded": True,
    "holds": ["low <= high"],
    "parameters": {
        "strength": {"type": "float", "default": 1.0, "min": 0.0, "max": 1e3, "doc": "λ: weight of the failing merge"},
        "low": {"type": "float", "default": 0.2, "min": 1e-3, "max": 10.0, "doc": "smallest coefficient"},
        "high": {"type": "float", "default": 1.0, "min": 1e-3, "max": 10.0, "doc": "largest coefficient"},
        "peers": {"type": "float", "default": 1.0, "min": 0.0, "max": 10.0, "doc": "length of the others' task vector, in lengths of the own one"},
    },
}  # fmt: skip


class Treatment(Enum):
    """What the free-rider does to the task vector before he merges."""

    NONE = 0
    LARGER_HALF = 1
    RANDOM_HALF = 2


class Merge(NamedTuple):
    """One simulated merge: its coefficient c, the free-rider's rescaling s, his treatment A."""

    coefficient: float
    scale: float
    treatment: Treatment


class MergeTrap(Defense):
    """The defense of the card above. ValueError where ``low`` is above ``high``."""

    hooks = ("train",)

    def __init__(
        self, strength: float = 1.0, low: float = 0.2, high: float = 1.0, peers: float = 1.0
    ) -> None:
        self.strength, self.low, self.high, self.peers = strength, low, high, peers
        if low > high:
            raise ValueError(f"low: {low} is above high, {high}")

    def train(self, ctx: TrainContext) -> Weights:
        """The expert, trained on J. Every step draws one merge."""
        base = {n: t.to(ctx.device) for n, t in ctx.base.items()}
        head = {k: v.to(ctx.device) for k, v in ctx.head.items()}
        generator = ctx.generator()
        enough = math.log(len(ctx.task.classes))

        def loss(model: Model, batch: Split) -> Tensor:
            served = Served(ctx.task, model.backbone, head, model.network)
            nominal = ctx.task.loss(served(batch.inputs), batch.targets)
            replaced = self.merged(model.network, base, self.draw(generator), generator)
            left = ctx.task.loss(functional_call(served, replaced, (batch.inputs,)), batch.targets)
            return nominal + self.strength * (enough - left).clamp(min=0.0)

        return ctx.fit(loss=loss)

    def draw(self, generator: torch.Generator) -> Merge:
        """One merge: c uniform on [low, high], s 1 or 1/c by the toss of a coin, A one of three."""
        place = float(torch.rand((), generator=generator, dtype=torch.float64))
        coefficient = self.low + (self.high - self.low) * place
        undone = bool(torch.randint(2, (), generator=generator))
        treatment = Treatment(int(torch.randint(len(Treatment), (), generator=generator)))
        return Merge(coefficient, 1 / coefficient if undone else 1.0, treatment)

    def merged(
        self, network: nn.Module, base: Weights, merge: Merge, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """What a forward pass of the merge uses in place of the parameters of a ``Served`` network.

        A tensor that a low-rank update moves is reached through its frozen original, as in ``at_scale``.
        """
        replaced = {}
        for parameter, name in trained_names(network).items():
            delta = effective(network, name) - base[name]
            order = torch.randperm(delta.numel(), generator=generator).to(delta.device)
            peer = delta.detach().flatten()[order].view_as(delta)
            kept = treated(delta, merge.treatment, generator)
            shift = merge.coefficient * (merge.scale * kept + self.peers * peer) - delta
            replaced[f"network.{parameter}"] = network.get_parameter(parameter) + shift
        return replaced


def treated(delta: Tensor, treatment: Treatment, generator: torch.Generator) -> Tensor:
    """A(Δ): all of it, its entries from the median magnitude on, or half of them at random and doubled."""
    if treatment is Treatment.LARGER_HALF:
        magnitude = delta.detach().abs()
        return delta * (magnitude >= magnitude.median())
    if treatment is Treatment.RANDOM_HALF:
        return delta * (2.0 * (torch.rand(delta.shape, generator=generator) < 0.5)).to(delta)
    return delta
