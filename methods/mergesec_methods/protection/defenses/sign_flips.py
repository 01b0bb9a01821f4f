"""Random signs on the dimensions of attention heads: the smallest protection that keeps the function.

Per head, with d and e vectors of independent fair signs:

    Q ← diag(d) Q,  K ← diag(d) K,  V ← diag(e) V,  O ← O diag(e)       (Q, K, V with their biases)

A baseline of this benchmark: a protection worth its name does not lose to it. Flipping signs is exact in every
floating type, and leaves all norms, and the magnitude of every weight, as they were.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mergesec.anatomy import Attention
from mergesec.contracts import Defense, ProtectContext, Protected, Weights
from mergesec_methods.protection.defenses._heads import HeadMatrices, scale_heads

CARD = {
    "name": "sign_flips",
    "kind": "defense",
    "class": "SignFlips",
    "version": "1",
    "title": "Sign flips",
    "summary": "baseline: random signs on query/key pairs and on value/output pairs of every head",
    "threat": "protection",
    "hooks": ["protect"],
    "knowledge": "the expert; no base, no data, no training",
    "data": "none",
    "modalities": ["image", "text", "generation"],
    "seeded": True,
    "parameters": {
        "query_key": {"type": "bool", "default": True, "doc": "flip dimensions of queries and keys"},
        "value_output": {"type": "bool", "default": True, "doc": "flip dimensions of values and outputs"},
    },
}


class SignFlips(Defense):
    """The defense of the card above. ``protect`` keeps keys, shapes and dtypes."""

    hooks = ("protect",)

    def __init__(self, query_key: bool = True, value_output: bool = True) -> None:
        self.query_key, self.value_output = query_key, value_output

    def protect(self, weights: Weights, ctx: ProtectContext) -> Protected:
        """The expert with flipped dimensions. The report has the share of dimensions flipped."""
        # a stream per pair, so that switching one off leaves the other's draws as they were
        streams = ctx.generator(0), ctx.generator(1)
        published, flipped = dict(weights), 0.0
        attentions = [a for block in ctx.backbone.anatomy().blocks for a in block.attentions]
        for attention in attentions:
            first = self._signs(attention, self.query_key, streams[0])
            second = self._signs(attention, self.value_output, streams[1])
            flipped += float((torch.cat([first, second]) < 0).double().mean()) / len(attentions)
            left, right = torch.diag_embed(first), torch.diag_embed(second)
            published = scale_heads(published, attention, HeadMatrices(left, left, right, right))
        facts: dict[str, Any] = {"flipped": flipped, "condition": 1.0}
        return Protected(published, facts)

    def _signs(self, attention: Attention, wanted: bool, generator: torch.Generator) -> Tensor:
        """±1, float64 ``[heads, head_dim]``; all 1 where flips are not wanted."""
        ones = torch.ones(attention.heads, attention.head_dim, dtype=torch.float64)
        if not wanted:
            return ones
        return 1 - 2 * torch.bernoulli(ones / 2, generator=generator)
