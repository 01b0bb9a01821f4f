"""WUDI: every task matrix guides the merged one, without data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mergesec.tensorwise import Piece
from mergesec_methods.merging._spectral import NOT_FINITE, NULL, MatrixMerge, eigh, gram

CARD = {
    "name": "wudi",
    "kind": "merging",
    "class": "Wudi",
    "version": "1",
    "title": "WUDI-Merging",
    "paper": "Cheng et al., Whoever started the interference should end it: guiding data-free model merging "
    "via task vectors, ICML 2025",
    "url": "https://arxiv.org/abs/2503.08099",
    "summary": "optimise each merged matrix so that it disturbs no task matrix on its own row space",
    "output": "static",
    "data": "tuning",
    "modalities": ["image", "text"],
    "seeded": False,
    "parameters": {
        "solver": {
            "type": "choice",
            "choices": ["adam", "exact"],
            "default": "adam",
            "doc": "'adam' as published, stopped early; 'exact' the objective's minimum (not published)",
        },
        "iterations": {"type": "int", "default": 300, "min": 0, "max": 100000, "doc": "Adam steps"},
        "learning_rate": {"type": "float", "default": 1e-5, "min": 0.0, "max": 1.0, "doc": "Adam's"},
        "others": {
            "type": "choice",
            "choices": ["mean", "base"],
            "default": "mean",
            "doc": "what is not a linear layer: mean task vector (FusionBench) or left at the base (authors)",
        },
        "scaling": {
            "type": "float",
            "default": 1.0,
            "min": 0.0,
            "max": 10.0,
            "also": ["tuned"],
            "doc": "scaling coefficient λ (none in the paper); 'tuned' picks it from 'grid'",
        },
        "grid": {
            "type": "list",
            "default": [0.25, 0.5, 0.75, 1.0, 1.25, 1.5],
            "doc": "coefficients tried when scaling is 'tuned'",
        },
        "exclude": {
            "type": "list",
            "default": ["embedding", "text_projection"],
            "doc": "two-dimensional tensors whose name contains one of these are no linear layers",
        },
    },
}

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
"""Adam's usual ones. Written out: importing torch.optim costs more than merging a small network."""


class Wudi(MatrixMerge):
    """τ* starts at Σ τ_i and descends on Σ_i ‖(τ* − τ_i) τ_iᵀ‖² / ‖τ_i‖² (Frobenius), matrix by matrix.

    The objective is quadratic: with G = Σ τ_iᵀτ_i / ‖τ_i‖² and B = Σ τ_i τ_iᵀτ_i / ‖τ_i‖² its gradient is
    2 (τ* G − B), one product instead of 2T. Task matrices that are zero ask for nothing.
    """

    def __init__(
        self,
        solver: str,
        iterations: int,
        learning_rate: float,
        others: str,
        scaling: float | str,
        grid: Sequence[float],
        exclude: Sequence[str],
    ) -> None:
        self.solver = solver
        self.iterations = iterations
        self.learning_rate = learning_rate
        self.others = others
        self.scaling = scaling
        self.grid = grid
        self.exclude = exclude

    def matrix(self, base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        exact = self.solver == "exact"
        start = torch.zeros_like(base, dtype=torch.float64 if exact else torch.float32)
        goal, metric = torch.zeros_like(start), start.new_zeros(base.shape[1], base.shape[1])
        for expert in experts:
            tau = (expert - base).to(start.dtype)
            energy = float(torch.linalg.vector_norm(tau, dtype=torch.float64)) ** 2
            if not math.isfinite(energy):
                raise ArithmeticError(NOT_FINITE)
            if energy:
                start += tau
                own = gram(tau).div_(energy)
                metric += own
                goal.addmm_(tau, own)
        return (self._minimum if exact else self._descend)(start, metric, goal).float()

    def _descend(self, point: Tensor, metric: Tensor, goal: Tensor) -> Tensor:
        """Adam (Kingma & Ba 2015, algorithm 1) from ``point``, which is overwritten."""
        gradient, scratch = torch.empty_like(point), torch.empty_like(point)
        mean, square = torch.zeros_like(point), torch.zeros_like(point)
        for step in range(1, self.iterations + 1):
            torch.addmm(goal, point, metric, beta=-2.0, alpha=2.0, out=gradient)
            mean.lerp_(gradient, 1.0 - BETA1)
            square.mul_(BETA2).addcmul_(gradient, gradient, value=1.0 - BETA2)
            torch.sqrt(square, out=scratch).div_((1.0 - BETA2**step) ** 0.5).add_(EPSILON)
            point.addcdiv_(mean, scratch, value=-self.learning_rate / (1.0 - BETA1**step))
        return point

    @staticmethod
    def _minimum(start: Tensor, metric: Tensor, goal: Tensor) -> Tensor:
        """start + (B − start·G) G⁺: the minimum nearest to the start (G is singular if the rows of all
        task matrices together do not span the space)."""
        values, vectors = eigh(metric, len(metric))
        kept = values > NULL**2 * values[-1]
        values, vectors = values[kept], vectors[:, kept]
        error = goal - start @ metric
        return start.addmm_((error @ vectors) / values, vectors.T)

    def combine(self, piece: Piece, out: Tensor, facts: Any) -> None:
        if self.others == "base":
            out.zero_()
        else:
            super().combine(piece, out, facts)
