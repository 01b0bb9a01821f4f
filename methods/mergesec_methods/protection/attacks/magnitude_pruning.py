"""Magnitude pruning by the free-rider: keep the largest entries of the protected task vector.

``τ' = τ ⊙ [|τ| ≥ t]`` with t such that ⌊keep · n⌉ entries stay (more if magnitudes tie), n being the
entries of a tensor or of the whole network; nothing is rescaled. Done to the published expert before it
enters any merge, as TIES trims. A protection that moves every weight far leaves its marks in the large
entries, which are the ones kept: this is a control more than a threat.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergesec.contracts import Attack, Expert, RecoverContext, Weights
from mergesec.weights import flat_layout, mergeable
from mergesec_methods.merging._ranks import all_pieces, magnitude_ranks, tensor_pieces

CARD = {
    "name": "magnitude_pruning",
    "kind": "attack",
    "class": "MagnitudePruning",
    "version": "1",
    "title": "Magnitude pruning",
    "summary": "keep the largest share of the protected task vector, the rest becomes the base",
    "threat": "protection",
    "hooks": ["recover"],
    "knowledge": "the published expert and the public base",
    "data": "none",
    "modalities": ["image", "text", "generation"],
    "seeded": False,
    "parameters": {
        "keep": {
            "type": "float",
            "default": 0.2,
            "min": 0.0,
            "max": 1.0,
            "doc": "share of entries kept; no published value for this use, 0.2 is the default of TIES",
        },
        "scope": {
            "type": "choice",
            "default": "tensor",
            "choices": ["tensor", "global"],
            "doc": "rank the entries of each tensor, or those of the whole network",
        },
    },
}


class MagnitudePruning(Attack):
    """The attack of the card above."""

    def __init__(self, keep: float = 0.2, scope: str = "tensor") -> None:
        self.keep, self.scope = keep, scope

    def recover(self, published: Weights, ctx: RecoverContext) -> dict[str, Tensor]:
        """Published values where the task vector is large, the base's elsewhere; other tensors stay."""
        base = {n: b for n, b in ctx.base.items() if mergeable(b) and n in published}
        common = None
        if self.scope == "global":
            victim = Expert(ctx.victim, published)
            size = flat_layout(base).size
            (found,) = magnitude_ranks(all_pieces(base, [victim], True), 1, size, [self._rank(size)])
            common = found[0]
        changed = dict(published)
        for name, origin in base.items():
            tensor = published[name]
            threshold = self._threshold(name, origin, tensor) if common is None else common
            small = (tensor.float() - origin.to(tensor.device).float()).abs() < threshold
            changed[name] = torch.where(small, origin.to(tensor.device, tensor.dtype), tensor)
        return changed

    def _rank(self, size: int) -> int:
        """Which magnitude, counted from the smallest (1-based), is the first to be kept."""
        return size - round(self.keep * size) + 1

    def _threshold(self, name: str, origin: Tensor, tensor: Tensor) -> float:
        size = tensor.numel()
        pieces = tensor_pieces(name, origin, [tensor])
        (found,) = magnitude_ranks(pieces, 1, size, [self._rank(size)])
        return found[0]
