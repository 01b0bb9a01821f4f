"""TSV-M: merging task singular vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergesec_methods.merging._spectral import MatrixMerge, Triplets, leading, polar

CARD = {
    "name": "tsv_m",
    "kind": "merging",
    "class": "TsvM",
    "version": "1",
    "title": "TSV-M",
    "paper": "Gargiulo et al., Task singular vectors: reducing task interference in model merging, CVPR 2025",
    "url": "https://arxiv.org/abs/2412.00081",
    "summary": "keep 1/T of each task matrix's singular triplets and orthogonalise them across tasks",
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
            "doc": "the paper's α; 'tuned' picks it from 'grid' on the tuning split",
        },
        "grid": {
            "type": "list",
            "default": [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0],
            "doc": "coefficients tried when scaling is 'tuned'",
        },
        "exclude": {
            "type": "list",
            "default": ["text_projection"],
            "doc": "two-dimensional tensors whose name contains one of these are averaged instead",
        },
    },
}


class TsvM(MatrixMerge):
    """τ* = P_U diag(s) P_Vᵀ for matrices (TSV-Merge; the authors' code); mean τ_i for the rest.

    [U_1 … U_T], s and [V_1 … V_T] are the ⌊min(m, n) / T⌋ leading triplets of every τ_i; P_U and P_V are
    the polar factors, the nearest matrices with orthonormal columns. A matrix with fewer rows or
    columns than there are tasks keeps no triplet, so it stays the base's.
    """

    def __init__(self, scaling: float | str, grid: Sequence[float], exclude: Sequence[str]) -> None:
        self.scaling = scaling
        self.grid = grid
        self.exclude = exclude

    def matrix(self, base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        count = min(base.shape) // len(experts)
        if not count:
            return torch.zeros_like(base)
        parts: list[Triplets] = []
        for expert in experts:
            parts.append(leading(expert - base, count, single=all(p.single for p in parts)))
        lefts, _ = polar(torch.cat([p.left for p in parts], dim=1))
        rights, _ = polar(torch.cat([p.right for p in parts], dim=1))
        return (lefts * torch.cat([p.sigma for p in parts])) @ rights.T
