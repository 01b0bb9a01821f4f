"""Task arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mergesec.tensorwise import Piece, Rule, TensorwiseMerge, fused_mean, running_mean

CARD = {
    "name": "task_arithmetic",
    "kind": "merging",
    "class": "TaskArithmetic",
    "version": "2",
    "title": "Task arithmetic",
    "paper": "Ilharco et al., Editing models with task arithmetic, ICLR 2023",
    "url": "https://arxiv.org/abs/2212.04089",
    "summary": "the base plus the scaled sum of the task vectors",
    "output": "static",
    "data": "tuning",
    "modalities": ["image", "text", "generation", "answers"],
    "seeded": False,
    "parameters": {
        "scaling": {
            "type": "float",
            "default": 0.3,
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


class TaskArithmetic(TensorwiseMerge):
    """θ = θ0 + λ Σ_i τ_i, τ_i = θ_i − θ0 (section 2); computed as θ0 + λT (mean θ_i − θ0)."""

    yields = "weights"
    pointwise = True

    def __init__(self, scaling: float | str, grid: Sequence[float]) -> None:
        self.scaling = scaling
        self.grid = grid

    def reach(self, scaling: float, count: int) -> float:
        return scaling * count

    def combine(self, piece: Piece, out: Tensor, facts: Any) -> None:
        running_mean(piece, out)

    def fused(self, rule: Rule, piece: Piece, facts: Any) -> bool:
        return fused_mean(rule, piece)
