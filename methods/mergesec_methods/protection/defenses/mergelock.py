"""MergeLock: lock every attention head with two secret invertible matrices.

Per head, with A and B drawn independently of each other:

    Q ← A Q,  K ← A⁻ᵀ K,  V ← B V,  O ← O B⁻¹       (Q, K, V with their biases)

so that query·key and output·value are what they were. Nothing else changes; there is no MLP part.

Source: "Model Unmerging: Making Your Models Unmergeable for Secure Model Sharing" (arXiv 2509.01548), of
which the abstract was read: "randomly sample two pairs of invertible matrices and apply them to the
Query-Key and Value-Output branches". Two later papers describe the same map (W_Q R1, W_K R1⁻ᵀ, W_V R2,
R2⁻¹ W_O) and speak of orthogonal or invertible matrices. *Which* matrices are drawn is not told, nor is any
range; that part is a reconstruction and a parameter here:

* ``gaussian``: entries N(0, 1 / head_dim), so that lengths are kept on average;
* ``orthogonal``: uniform over rotations and reflections (Haar), κ = 1;
* ``log_uniform``: U diag(s) Vᵀ with U, V Haar and s log-uniform in [κ^-½, κ^½], κ being ``condition``.

A Gaussian matrix is invertible with probability 1 but its κ has no bound, and what float32 loses grows
with κ. Singular values below the largest divided by ``condition`` are therefore raised to that floor (0: not).
That one matrix per *head* is needed, not one per layer, follows from the softmax per head.

``permute`` adds PaRaMS' rearrangement of the hidden units (the composite "P&L" of arXiv 2606.30360). ``heads`` also puts
the heads in a random order: not published, and what an attack that goes head by head has no answer to.
How exact the result is, and the report: see ``params``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mergesec.anatomy import Attention
from mergesec.contracts import Defense, ProtectContext, Protected, Weights
from mergesec.surgery import reorder_heads
from mergesec_methods.protection.defenses._heads import (
    HeadMatrices,
    apply,
    order_of_heads,
    random_rotations,
    summary,
)
from mergesec_methods.protection.defenses.params import rearrange

CARD = {
    "name": "mergelock",
    "kind": "defense",
    "class": "MergeLock",
    "version": "1",
    "title": "MergeLock",
    "paper": "Model Unmerging: Making Your Models Unmergeable for Secure Model Sharing, 2025",
    "url": "https://arxiv.org/abs/2509.01548",
    "summary": "two independent random invertible matrices per attention head, on query/key and value/output",
    "threat": "protection",
    "hooks": ["protect"],
    "knowledge": "the expert (with permute: and the public base); no data, no training",
    "data": "none",
    "modalities": ["image", "text", "generation"],
    "seeded": True,
    "holds": ["condition >= 1 or condition == 0 and distribution != 'log_uniform'"],
    "parameters": {
        "distribution": {
            "type": "choice",
            "default": "gaussian",
            "choices": ["gaussian", "orthogonal", "log_uniform"],
            "doc": "how the matrices are drawn (not told by the source)",
        },
        "condition": {
            "type": "float",
            "default": 400.0,
            "min": 0.0,
            "max": 1e8,
            "doc": "largest condition number of a matrix; 0 = no bound (gaussian only). 400 is what PaRaMS' "
            "published range allows",
        },
        "permute": {"type": "bool", "default": False, "doc": "rearrange the hidden units as PaRaMS does"},
        "heads": {
            "type": "bool",
            "default": False,
            "doc": "also put the heads in a random order (not published)",
        },
    },
}


class MergeLock(Defense):
    """The defense of the card above. ``protect`` keeps keys, shapes and dtypes."""

    hooks = ("protect",)

    def __init__(
        self,
        distribution: str = "gaussian",
        condition: float = 400.0,
        permute: bool = False,
        heads: bool = False,
    ) -> None:
        self.distribution, self.condition = distribution, condition
        self.permute, self.heads = permute, heads
        if condition < 1 and (condition or distribution == "log_uniform"):
            raise ValueError(f"condition {condition}: a condition number is at least 1")

    def protect(self, weights: Weights, ctx: ProtectContext) -> Protected:
        """The expert with locked heads. The report has condition numbers and effective errors.

        Raises ContractError for attention tensors below float32 precision.
        """
        generator, order = ctx.generator(), ctx.generator(1)
        published, blocks = dict(weights), []
        for block in ctx.backbone.anatomy().blocks:
            facts: dict[str, Any] = {"block": block.index}
            for mlp in block.mlps if self.permute else ():
                published, moved = rearrange(published, ctx.base, mlp)
                facts.update(moved)
            for attention in block.attentions:
                if self.heads:
                    published = reorder_heads(published, attention, *order_of_heads(attention, order))
                published, locked = apply(published, attention, self.draw(attention, generator))
                blocks.append({**facts, **locked})
        return Protected(published, {**summary(blocks, amplifies=True), "blocks": blocks})

    def draw(self, attention: Attention, generator: torch.Generator) -> HeadMatrices:
        """Fresh A and B for one attention layer."""
        first, first_inverse = self._pair(attention, generator)
        second, second_inverse = self._pair(attention, generator)
        return HeadMatrices(first, first_inverse.mT, second, second_inverse)

    def _pair(self, attention: Attention, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Matrices and their inverses, float64 ``[heads, head_dim, head_dim]`` each."""
        heads, size = attention.heads, attention.head_dim
        if self.distribution == "orthogonal":
            rotations = random_rotations(heads, size, generator)
            return rotations, rotations.mT
        if self.distribution == "log_uniform":
            left, right = (random_rotations(heads, size, generator).mT for _ in range(2))
            uniform = torch.rand(heads, size, generator=generator, dtype=torch.float64)
            scales = torch.exp((uniform - 0.5) * math.log(self.condition))
        else:
            gaussian = torch.randn(heads, size, size, generator=generator, dtype=torch.float64)
            left, scales, right = torch.linalg.svd(gaussian / math.sqrt(size))
            if self.condition:
                scales = torch.maximum(scales, scales[:, :1] / self.condition)
        matrix = (left * scales[:, None, :]) @ right
        return matrix, (right.mT / scales[:, None, :]) @ left.mT
