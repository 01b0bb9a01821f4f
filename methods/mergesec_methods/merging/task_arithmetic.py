"""Task arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

from mergesec.contracts import Expert, MergeContext, Merged, MergeMethod, Weights
from mergesec.weights import apply_flat
from mergesec_methods.merging._scaling import scaled_merge
from mergesec_methods.merging._sums import checked_layout, summed_task_vectors

CARD = {
    "name": "task_arithmetic",
    "kind": "merging",
    "class": "TaskArithmetic",
    "version": "1",
    "title": "Task arithmetic",
    "paper": "Ilharco et al., Editing models with task arithmetic, ICLR 2023",
    "url": "https://arxiv.org/abs/2212.04089",
    "summary": "the base plus the scaled sum of the task vectors",
    "output": "static",
    "data": "tuning",
    "modalities": ["image", "text"],
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


class TaskArithmetic(MergeMethod):
    """θ = θ0 + λ Σ_i τ_i, τ_i = θ_i − θ0 (section 2)."""

    def __init__(self, scaling: float | str, grid: Sequence[float]) -> None:
        self.scaling = scaling
        self.grid = grid

    def merge(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Merged:
        """The merged weights; the sum is built once, whatever number of coefficients is tried."""
        layout = checked_layout(base, experts)
        total = summed_task_vectors(layout, base, experts, [1.0] * len(experts))
        return scaled_merge(
            self.scaling, self.grid, lambda value: Merged(apply_flat(layout, base, total, value)), ctx
        )
