"""Iso-C: isotropic merging in the common subspace."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mergesec_methods.merging._spectral import MatrixMerge, polar, task_sum

CARD = {
    "name": "iso_c",
    "kind": "merging",
    "class": "IsoC",
    "version": "1",
    "title": "Iso-C",
    "paper": "Marczak et al., No task left behind: isotropic model merging with common and task-specific "
    "subspaces, ICML 2025",
    "url": "https://arxiv.org/abs/2502.04959",
    "summary": "sum the task matrices and set all singular values of the sum to their mean",
    "output": "static",
    "data": "tuning",
    "modalities": ["image", "text", "generation"],
    "seeded": False,
    "parameters": {
        "scaling": {
            "type": "float",
            "default": 1.0,
            "min": 0.0,
            "max": 10.0,
            "also": ["tuned"],
            "doc": "scaling coefficient λ; 'tuned' picks it from 'grid' on the tuning split",
        },
        "grid": {
            "type": "list",
            "default": [0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0],
            "doc": "coefficients tried when scaling is 'tuned'",
        },
        "exclude": {
            "type": "list",
            "default": ["text_projection"],
            "doc": "two-dimensional tensors whose name contains one of these are averaged instead",
        },
    },
}


class IsoC(MatrixMerge):
    """τ* = σ̄ UVᵀ for matrices, with Σ τ_i = U diag(σ) Vᵀ and σ̄ = Σσ / min(m, n) (section 4); else mean τ_i.

    Null singular values of the sum stay null, where an SVD would fill in arbitrary directions.
    """

    def __init__(self, scaling: float | str, grid: Sequence[float], exclude: Sequence[str]) -> None:
        self.scaling = scaling
        self.grid = grid
        self.exclude = exclude

    def matrix(self, base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        factor, nuclear = polar(task_sum(base, experts))
        return factor.mul_(nuclear / min(base.shape))
