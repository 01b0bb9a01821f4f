"""MagMax: per entry, the task vector that moved furthest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mergesec.tensorwise import Piece, Rule, TensorwiseMerge, select

CARD = {
    "name": "magmax",
    "kind": "merging",
    "class": "MagMax",
    "version": "1",
    "title": "MagMax",
    "paper": "Marczak et al., MagMax: leveraging model merging for seamless continual learning, ECCV 2024",
    "url": "https://arxiv.org/abs/2407.06322",
    "summary": "per weight, keep the entry of largest magnitude among the task vectors",
    "output": "static",
    "data": "tuning",
    "modalities": ["image", "text", "generation"],
    "seeded": False,
    "parameters": {
        "scaling": {
            "type": "float",
            "default": 0.5,
            "min": 0.0,
            "max": 10.0,
            "also": ["tuned"],
            "doc": "scaling coefficient λ; 'tuned' picks it from 'grid' on the tuning split",
        },
        "grid": {
            "type": "list",
            "default": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
            "doc": "coefficients tried when scaling is 'tuned'",
        },
    },
}


class MagMax(TensorwiseMerge):
    """τ* = the entry of τ_i with the largest |τ_i| (section 4). Opposite entries of equal magnitude: the positive."""

    yields = "weights"
    pointwise = True

    def __init__(self, scaling: float | str, grid: Sequence[float]) -> None:
        self.scaling = scaling
        self.grid = grid

    def combine(self, piece: Piece, out: Tensor, facts: Any) -> None:
        """The largest τ is that of the largest weight or of the smallest: two running extremes are enough."""
        high = low = piece.experts[0]
        for expert in piece.experts[1:]:
            high = torch.maximum(high, expert, out=out)
            low = torch.minimum(low, expert, out=piece.scratch("low"))
        # high − θ0 ≥ θ0 − low, each difference exact or rounded alike
        up = torch.sub(high, piece.base, out=piece.scratch("up"))
        down = torch.sub(piece.base, low, out=piece.scratch("down"))
        chosen = torch.ge(up, down, out=up)
        select(chosen, high, low, out=out)

    def fused(self, rule: Rule, piece: Piece, facts: Any) -> bool:
        rule("furthest")
        return True
