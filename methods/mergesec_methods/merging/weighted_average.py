"""Weighted averaging of weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mergesec.contracts import ContractError, Expert, MergeContext, Weights
from mergesec.tensorwise import Piece, TensorwiseMerge

CARD = {
    "name": "weighted_average",
    "kind": "merging",
    "class": "WeightedAverage",
    "version": "2",
    "title": "Weighted average",
    "paper": "Matena & Raffel, Merging models with Fisher-weighted averaging, NeurIPS 2022",
    "url": "https://arxiv.org/abs/2111.09832",
    "summary": "a weighted mean of the experts' weights",
    "output": "static",
    "data": "none",
    "modalities": ["image", "text"],
    "seeded": False,
    "parameters": {
        "weights": {
            "type": "list",
            "default": [],
            "min": -1e6,
            "max": 1e6,
            "doc": "one weight per expert, in the order of the experts; empty = equal weights",
        },
        "normalise": {"type": "bool", "default": True, "doc": "divide the weights by their sum first"},
    },
}


class WeightedAverage(TensorwiseMerge):
    """θ = Σ_i w_i θ_i, with Σ w_i = 1 if normalised."""

    pointwise = True

    def __init__(self, weights: Sequence[float], normalise: bool) -> None:
        self.weights = [float(weight) for weight in weights]
        self.normalise = normalise

    def survey(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> list[float]:
        """The coefficients w_i; ContractError if they do not fit the experts."""
        count = len(experts)
        weights = self.weights or [1.0] * count
        if len(weights) != count:
            raise ContractError(f"weighted_average: {len(weights)} weights for {count} experts")
        if not all(math.isfinite(weight) for weight in weights):
            raise ContractError(f"weighted_average: weights must be finite, not {weights}")
        total = math.fsum(weights)
        if not self.normalise:
            return weights
        if total == 0.0:
            raise ContractError("weighted_average: weights that sum to 0 cannot be normalised")
        return [weight / total for weight in weights]

    def combine(self, piece: Piece, out: Tensor, facts: list[float]) -> None:
        """Σ w_i τ_i + (Σ w_i − 1) θ0; the last term is only there when not normalised."""
        out.zero_()
        for index, weight in enumerate(facts):
            out.add_(piece.task_vector(index), alpha=weight)
        if not self.normalise:
            out.add_(piece.base, alpha=math.fsum(facts) - 1.0)

    def facts(self) -> dict[str, Any]:
        return {"weights": self.weights, "normalised": self.normalise}
