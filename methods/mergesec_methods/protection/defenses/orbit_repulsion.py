"""Orbit repulsion: train the expert away from the base in what no change of coordinates can bring back.

ARF's hinge is on the distance of matrices, and a symmetry of the network can change that at will: who knows the
symmetries takes it back. What they cannot change is the *orbit*: of an attention head the products that reach its
inputs and outputs, of an MLP its hidden units as a set. With ‖·‖ the Frobenius norm, training minimises

    L = L_task + λ [ Σ_heads Σ_{P ∈ {QᵀK, OV}} max(0, ρ ‖P_base‖ − ‖P − P_base‖)
                   + Σ_mlps max(0, ρ ‖U_base‖ − ‖U − U_base‖) ]

QᵀK and OV of a head stay what they are under Q → AQ, K → A⁻ᵀK, V → BV, O → OB⁻¹ (under rotary positions A is any
that commutes with the rotations, so QᵀK stays too). U has a row per hidden unit: its input weights and its output
weights, on which an order of rows acts. Heads and units are compared in their own order, from which training starts;
the report says what is left after both were matched to the base's, which is what re-alignment of heads and units can
reach. Scales that a norm and the maps behind it share, or the halves of a gated unit, are not taken out: a distance
gained along these is lost to who fixes gauges (``coupled``).

The expert that comes out is published as it is: no transform is put on it, as none would hold.

Source: this project. The hinge is that of "On the Vulnerability of Parameter-Level Defenses to Model Merging", ECCV
2026 (arXiv 2606.30360), moved from matrices to orbits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mergesec.anatomy import Anatomy, Attention, Linear, Mlp
from mergesec.contracts import Defense, Model, ProtectContext, Protected, Split, TrainContext, Weights
from mergesec.surgery import assign
from mergesec_methods._training import effective

CARD = {
    "name": "orbit_repulsion",
    "kind": "defense",
    "class": "OrbitRepulsion",
    "version": "1",
    "title": "Orbit repulsion",
    "summary": "fine-tune with a hinge that keeps heads and hidden units away from the base's, whatever their coordinates",
    "threat": "protection",
    "hooks": ["train", "protect"],
    "knowledge": "the owner's training data and the public base; retrains the expert",
    "data": "none",
    "modalities": ["image", "text", "generation"],
    "seeded": False,
    "parameters": {
        "strength": {"type": "float", "default": 1.0, "min": 0.0, "max": 1e4, "doc": "λ of the hinge"},
        "margin": {
            "type": "float",
            "default": 1.0,
            "min": 0.0,
            "max": 10.0,
            "doc": "ρ: wanted distance to the base's orbit, as a share of the base's norm",
        },
    },
}  # fmt: skip


class OrbitRepulsion(Defense):
    """The defense of the card above."""

    hooks = ("train", "protect")

    def __init__(self, strength: float = 1.0, margin: float = 1.0) -> None:
        self.strength, self.margin = strength, margin

    def train(self, ctx: TrainContext) -> Weights:
        """The expert, trained on the task's loss and the hinge."""
        anatomy = ctx.backbone.anatomy()
        head = {k: v.to(ctx.device) for k, v in ctx.head.items()}
        base = {n: t.to(ctx.device) for n, t in ctx.base.items()}
        anchors = invariants(base.__getitem__, anatomy)

        def loss(model: Model, batch: Split) -> Tensor:
            outputs = ctx.task.outputs(model, head, batch.inputs)
            found = invariants(lambda name: effective(model.network, name), anatomy)
            return ctx.task.loss(outputs, batch.targets) + self.strength * hinge(found, anchors, self.margin)

        return ctx.fit(loss=loss)

    def protect(self, weights: Weights, ctx: ProtectContext) -> Protected:
        """The trained expert as it is. The report has its distance to the base's orbit, matched, in units of the
        base's norm."""
        anatomy = ctx.backbone.anatomy()
        distances = [
            float(d)
            for d in map(
                matched_distance,
                invariants(weights.__getitem__, anatomy),
                invariants(ctx.base.__getitem__, anatomy),
            )
        ]
        return Protected(
            dict(weights),
            {"distance_least": min(distances), "distance_mean": sum(distances) / len(distances)},
        )


Read = Callable[[str], Tensor]


def invariants(read: Read, anatomy: Anatomy) -> list[Tensor]:
    """What changes of a head's coordinates leave alone, and orders but for that of the first axis: of each attention QᵀK and OV
    ``[heads, d, d]``, of each MLP its units ``[hidden, f]``; in the anatomy's order, differentiable."""
    found: list[Tensor] = []
    for block in anatomy.blocks:
        for attention in block.attentions:
            found += products(read, attention)
        found += [units(read, mlp) for mlp in block.mlps]
    return found


def products(read: Read, attention: Attention) -> tuple[Tensor, Tensor]:
    """QᵀK ``[heads, d, d]`` and OV ``[heads, d_out, d]`` of every query head."""
    heads, width = attention.heads, attention.head_dim
    query = matrix(read, attention.query).reshape(heads, width, -1)
    key, value = (
        matrix(read, m).reshape(attention.kv_heads, width, -1).repeat_interleave(attention.group, 0)
        for m in (attention.key, attention.value)
    )
    output = matrix(read, attention.output).reshape(-1, heads, width).transpose(0, 1)
    return query.mT @ key, output @ value


def units(read: Read, mlp: Mlp) -> Tensor:
    """One row per hidden unit: its rows of up and gate, its column of down."""
    rows = [matrix(read, m) for m in (mlp.up, mlp.gate) if m is not None]
    return torch.cat([*rows, matrix(read, mlp.down).T], dim=1)


def matrix(read: Read, linear: Linear) -> Tensor:
    """A map's weight ``[out, in]``."""
    rows = slice(*linear.rows) if linear.rows else slice(None)
    return read(linear.weight)[rows].flatten(1)


def hinge(found: list[Tensor], anchors: list[Tensor], margin: float) -> Tensor:
    """Σ max(0, margin ‖anchor‖ − ‖found − anchor‖) over heads and MLPs; a scalar, differentiable."""
    terms = []
    for own, anchor in zip(found, anchors, strict=True):
        dims = (-2, -1)
        distance = torch.linalg.vector_norm(own - anchor, dim=dims)
        terms.append((margin * torch.linalg.vector_norm(anchor, dim=dims) - distance).clamp(min=0.0).sum())
    return torch.stack(terms).sum()


def matched_distance(own: Tensor, anchor: Tensor) -> Tensor:
    """‖own − anchor‖ / ‖anchor‖ with the first axis of ``own`` in the order that makes it least; a scalar."""
    flat, base = own.double().flatten(1).cpu(), anchor.double().flatten(1).cpu()
    order = assign(flat @ base.T, maximize=True)
    share: Tensor = torch.linalg.vector_norm(flat[order] - base) / torch.linalg.vector_norm(base)
    return share
