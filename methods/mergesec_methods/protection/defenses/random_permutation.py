"""Uniformly random orders of hidden units, of attention heads and of the dimensions inside heads.

All three keep the function and are exact in every floating type. Query heads that share a key and value head stay
together; under rotary positions dimensions of queries and keys stay where they are. A baseline of this benchmark: PaRaMS
looks for the order of the hidden units that is farthest from the base's; any order at all should not do as well.
Orders of heads are a symmetry that none of the published protections uses and that attacks which go head by
head do not look for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mergesec.anatomy import Attention
from mergesec.contracts import Defense, ProtectContext, Protected, Weights
from mergesec.surgery import reorder_heads, reorder_hidden
from mergesec_methods.protection.defenses._heads import HeadMatrices, order_of_heads, scale_heads

CARD = {
    "name": "random_permutation",
    "kind": "defense",
    "class": "RandomPermutation",
    "version": "1",
    "title": "Random permutation",
    "summary": "baseline: random order of hidden units and of attention heads",
    "threat": "protection",
    "hooks": ["protect"],
    "knowledge": "the expert; no base, no data, no training",
    "data": "none",
    "modalities": ["image", "text", "generation"],
    "seeded": True,
    "parameters": {
        "hidden": {"type": "bool", "default": True, "doc": "reorder the hidden units of every MLP"},
        "heads": {"type": "bool", "default": True, "doc": "reorder the heads of every attention layer"},
        "dimensions": {
            "type": "bool",
            "default": False,
            "doc": "reorder the dimensions inside every head, queries/keys and values/outputs apart",
        },
    },
}


class RandomPermutation(Defense):
    """The defense of the card above. ``protect`` keeps keys, shapes and dtypes."""

    hooks = ("protect",)

    def __init__(self, hidden: bool = True, heads: bool = True, dimensions: bool = False) -> None:
        self.hidden, self.heads, self.dimensions = hidden, heads, dimensions

    def protect(self, weights: Weights, ctx: ProtectContext) -> Protected:
        """The expert in a random order. The report has the shares of units and heads moved."""
        # a stream per kind, so that switching one on leaves the draws of the others as they were
        units, heads, inner = ctx.generator(0), ctx.generator(1), ctx.generator(2)
        published = dict(weights)
        moved: dict[str, list[float]] = {"hidden_moved": [], "heads_moved": []}
        for block in ctx.backbone.anatomy().blocks:
            for mlp in block.mlps if self.hidden else ():
                order = torch.randperm(mlp.hidden, generator=units)
                published = reorder_hidden(published, mlp, order)
                moved["hidden_moved"].append(_moved(order))
            for attention in block.attentions:
                if self.heads:
                    groups, members = order_of_heads(attention, heads)
                    published = reorder_heads(published, attention, groups, members)
                    moved["heads_moved"].append(_moved(members))
                if self.dimensions:
                    first, second = (_orders(attention, inner) for _ in range(2))
                    published = scale_heads(
                        published, attention, HeadMatrices(first, first, second, second.mT)
                    )
        facts: dict[str, Any] = {name: sum(s) / len(s) for name, s in moved.items() if s}
        return Protected(published, {**facts, "condition": 1.0})


def _orders(attention: Attention, generator: torch.Generator) -> Tensor:
    """A permutation matrix per head, float64 ``[heads, head_dim, head_dim]``."""
    noise = torch.rand(attention.heads, attention.head_dim, generator=generator)
    return torch.eye(attention.head_dim, dtype=torch.float64)[noise.argsort(dim=1)]


def _moved(order: Tensor) -> float:
    return float((order != torch.arange(len(order))).double().mean())
