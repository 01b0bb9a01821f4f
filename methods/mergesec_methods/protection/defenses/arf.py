"""ARF: train the attention away from the public base, then protect it by an invertible transform.

Attacks that undo a transform align the published weights to the base, which works because a task vector is
two to three orders of magnitude smaller than the base. ARF makes it larger where the transform will be:

    L = L_task + λ Σ_θ max(0, ρ ‖θ_base‖ − ‖θ − θ_base‖)        θ over every W_Q, W_K, W_V, W_O

with Frobenius norms, per matrix. The term pushes a matrix straight away from the base until it is ρ of the base's
length off, then vanishes. Afterwards a transform that keeps the function is put on the heads.

Source: "On the Vulnerability of Parameter-Level Defenses to Model Merging", ECCV 2026 (arXiv 2606.30360), section on
anchor-repulsive fine-tuning, through a published summary; the released code has the attack only. The
summary prints ``min(0, …)`` for the hinge. As a loss to be minimised that would be 0 while the matrix is too near and
then reward distance without end; its text ("pushes out to a preset margin, then no longer interferes") is
the max(0, …) written here. That the norm is one per matrix, not of all matrices together, is our reading of the sum over
θ. The transform is called "the standard invertible matrix transform": MergeLock's here, or PaRaMS'.

The distance has no gradient at the base itself (0 is taken, so the first step is the task's alone).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mergesec.anatomy import Anatomy, Linear
from mergesec.contracts import Defense, Model, ProtectContext, Protected, Split, TrainContext, Weights
from mergesec.surgery import read
from mergesec_methods._training import effective
from mergesec_methods.protection.defenses.mergelock import MergeLock
from mergesec_methods.protection.defenses.params import Params

CARD = {
    "name": "arf",
    "kind": "defense",
    "class": "Arf",
    "version": "1",
    "title": "ARF",
    "paper": "On the Vulnerability of Parameter-Level Defenses to Model Merging, ECCV 2026",
    "url": "https://arxiv.org/abs/2606.30360",
    "summary": "fine-tune with a hinge that keeps attention matrices away from the base, then transform the heads",
    "threat": "protection",
    "hooks": ["train", "protect"],
    "knowledge": "the owner's training data and the public base; retrains the expert",
    "data": "none",
    "modalities": ["image", "text", "generation"],
    "seeded": True,
    "parameters": {
        "strength": {"type": "float", "default": 1.0, "min": 0.0, "max": 1e4, "doc": "λ of the hinge"},
        "margin": {
            "type": "float",
            "default": 0.05,
            "min": 0.0,
            "max": 10.0,
            "doc": "ρ: wanted distance to the base, as a share of the base matrix's norm",
        },
        "transform": {
            "type": "choice",
            "default": "mergelock",
            "choices": ["mergelock", "nonsymmetric", "none"],
            "doc": "what is put on the heads afterwards: MergeLock, or PaRaMS' nonsymmetric scaling",
        },
        "permute": {
            "type": "bool",
            "default": False,
            "doc": "also rearrange the hidden units as PaRaMS does",
        },
    },
}


class Arf(Defense):
    """The defense of the card above."""

    hooks = ("train", "protect")

    def __init__(
        self,
        strength: float = 1.0,
        margin: float = 0.05,
        transform: str = "mergelock",
        permute: bool = False,
    ) -> None:
        self.strength, self.margin = strength, margin
        self.inner: Defense
        if transform == "mergelock":
            self.inner = MergeLock(permute=permute)
        else:
            self.inner = Params(permute=permute, scaling=transform)

    def train(self, ctx: TrainContext) -> Weights:
        """The expert, trained on the task's loss and the hinge."""
        anatomy = ctx.backbone.anatomy()
        base = {m.weight: ctx.base[m.weight].to(ctx.device) for m in attention_linears(anatomy)}
        head = {k: v.to(ctx.device) for k, v in ctx.head.items()}

        def loss(model: Model, batch: Split) -> Tensor:
            outputs = ctx.task.outputs(model, head, batch.inputs)
            repulsion = hinge(model.network, base, anatomy, self.margin)
            return ctx.task.loss(outputs, batch.targets) + self.strength * repulsion

        return ctx.fit(loss=loss)

    def protect(self, weights: Weights, ctx: ProtectContext) -> Protected:
        """The trained expert, transformed. The report has what the transform reports, and how far the attention
        matrices are from the base, before it, in units of the base's norm."""
        distances = relative_distances(weights, ctx.base, ctx.backbone.anatomy())
        protected = self.inner.protect(weights, ctx)
        facts: dict[str, Any] = {
            "distance_least": min(distances),
            "distance_mean": sum(distances) / len(distances),
            "reached": sum(d >= 0.99 * self.margin for d in distances) / len(distances),
        }
        return Protected(protected.weights, {**protected.report, **facts})


def attention_linears(anatomy: Anatomy) -> list[Linear]:
    """Query, key, value and output map of every block, in order."""
    return [linear for block in anatomy.blocks for part in block.attentions for linear in part.maps]


def hinge(network: nn.Module, base: Weights, anatomy: Anatomy, margin: float) -> Tensor:
    """Σ max(0, margin ‖θ_base‖ − ‖θ − θ_base‖) over attention maps; a scalar, differentiable."""
    terms = []
    for linear in attention_linears(anatomy):
        rows = slice(*linear.rows) if linear.rows else slice(None)
        anchor = base[linear.weight][rows]
        distance = torch.linalg.vector_norm(effective(network, linear.weight)[rows] - anchor)
        terms.append((margin * torch.linalg.vector_norm(anchor) - distance).clamp(min=0.0))
    return torch.stack(terms).sum()


def relative_distances(weights: Weights, base: Weights, anatomy: Anatomy) -> list[float]:
    """‖θ − θ_base‖ / ‖θ_base‖ of every attention map, in order."""
    found = []
    for linear in attention_linears(anatomy):
        own, anchor = read(weights, linear)[0], read(base, linear)[0]
        norms = torch.linalg.vector_norm(own - anchor), torch.linalg.vector_norm(anchor)
        found.append(float(norms[0] / norms[1].clamp_min(1e-300)))
    return found
