"""AGA: align a protected expert to the public base, map by map and head by head.

A fine-tuned expert is its base plus something two to three orders of magnitude smaller, so the base
is an anchor for the unknown transform. In this order:

* Attention. For each head and each of Q, K, V (transposed rows) and O (columns), with X the protected
  slice ``[d_model, head_dim]`` and X_base the base's: ``T = (XᵀX + ρI)⁻¹ Xᵀ X_base``, ``X ← X T``, and for
  Q, K, V ``b ← b T``; the output bias stays. The four are solved independently, as published, so
  the function is kept only approximately; ``X T`` is X_base projected on the expert's column space. Both streams of a
  joint attention have maps of their own, fitted each by itself; norms on queries and keys are not in the paper, and
  are not minded.
* MLP. Cost ``−cos(up row i, base up row j)``, linear assignment, rows and biases of up and columns of
  down put in the base's order.

Source: "On the Vulnerability of Parameter-Level Defenses to Model Merging", ECCV 2026; written from the
formulas. One head at a time matters: on whole matrices least squares returns the base itself.
``aga_anchored`` puts other weights in the base's place; that is this benchmark's variation.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mergesec.anatomy import Attention
from mergesec.contracts import Attack, RecoverContext, Weights
from mergesec.surgery import assign, head_columns, head_rows, mix_columns, mix_rows, read, reorder_hidden
from mergesec_methods.protection.attacks._anchors import anchor_weights

CARDS = [
    {
        "name": "aga",
        "kind": "attack",
        "class": "Aga",
        "version": "1",
        "title": "AGA",
        "paper": "On the Vulnerability of Parameter-Level Defenses to Model Merging, ECCV 2026",
        "url": "https://arxiv.org/abs/2606.30360",
        "summary": "anchored least squares per attention head and Hungarian matching of the MLP against the base",
        "threat": "protection",
        "hooks": ["recover"],
        "knowledge": "the published expert and the public base",
        "data": "none",
        "modalities": ["image", "text", "generation"],
        "seeded": False,
        "parameters": {
            "ridge": {
                "type": "float",
                "default": 1e-8,
                "min": 1e-16,
                "max": 1.0,
                "doc": "ridge term ρ of the least squares",
            },
        },
    },
    {
        "name": "aga_anchored",
        "kind": "attack",
        "class": "Aga",
        "version": "1",
        "title": "AGA to other experts",
        "paper": "On the Vulnerability of Parameter-Level Defenses to Model Merging, ECCV 2026",
        "url": "https://arxiv.org/abs/2606.30360",
        "summary": "AGA against the free-rider's own experts instead of the base",
        "threat": "protection",
        "hooks": ["recover"],
        "knowledge": "the published expert and the free-rider's own experts; the base is not used",
        "data": "tuning",
        "modalities": ["image", "text", "generation"],
        "seeded": False,
        "parameters": {
            "ridge": {
                "type": "float",
                "default": 1e-8,
                "min": 1e-16,
                "max": 1.0,
                "doc": "ridge term ρ of the least squares",
            },
            "anchor": {
                "type": "choice",
                "default": "merge",
                "choices": ["own", "merge"],
                "doc": "the free-rider's first expert, or the mean of all his experts",
            },
        },
    },
]


class Aga(Attack):
    """The attack of the cards above."""

    def __init__(self, ridge: float = 1e-8, anchor: str = "base") -> None:
        self.ridge, self.anchor = ridge, anchor

    def recover(self, published: Weights, ctx: RecoverContext) -> dict[str, Tensor]:
        """``published`` aligned to the anchor: attention first, MLP second."""
        reference = anchor_weights(self.anchor, ctx.base, ctx.own)
        recovered = dict(published)
        blocks = ctx.backbone.anatomy().blocks
        for attention in (attention for block in blocks for attention in block.attentions):
            recovered = fitted_heads(recovered, reference, attention, self.ridge)
        for mlp in (mlp for block in blocks for mlp in block.mlps):
            rows = normalize(read(recovered, mlp.up)[0], dim=1)
            anchors = normalize(read(reference, mlp.up)[0], dim=1)
            recovered = reorder_hidden(recovered, mlp, assign(rows @ anchors.T, maximize=True))
        return recovered


def fitted_heads(weights: Weights, base: Weights, attention: Attention, ridge: float) -> dict[str, Tensor]:
    """Every map of an attention fitted to the base's, head by head, each by itself."""
    changed = dict(weights)
    for side in attention.sides:
        for linear in (side.query, side.key, side.value):
            own, anchor = (head_rows(w, linear, attention)[0] for w in (weights, base))
            # Rows of Q, K, V are columns of X, so T acts on them from the left as its transpose.
            changed = mix_rows(changed, attention, linear, fit(own.mT, anchor.mT, ridge).mT)
        if side.output is not None:
            own, anchor = (head_columns(w, attention, side.output) for w in (weights, base))
            changed = mix_columns(changed, attention, side.output, fit(own, anchor, ridge))
    return changed


def fit(own: Tensor, anchor: Tensor, ridge: float) -> Tensor:
    """Ridge solution T of ``own · T ≈ anchor``, both ``[heads, d_model, head_dim]``."""
    gram = own.mT @ own + ridge * torch.eye(own.shape[-1], dtype=own.dtype)
    solution: Tensor = torch.linalg.solve(gram, own.mT @ anchor)
    return solution
