"""Weighted averaging of weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mergesec.contracts import ContractError, Expert, MergeContext, Merged, MergeMethod, Weights
from mergesec.weights import apply_flat, flatten
from mergesec_methods.merging._sums import checked_layout, summed_task_vectors

CARD = {
    "name": "weighted_average",
    "kind": "merging",
    "class": "WeightedAverage",
    "version": "1",
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
            "doc": "one weight per expert, in the order of the experts; empty = equal weights",
        },
        "normalise": {"type": "bool", "default": True, "doc": "divide the weights by their sum first"},
    },
}


class WeightedAverage(MergeMethod):
    """θ = Σ_i w_i θ_i, with Σ w_i = 1 if normalised."""

    def __init__(self, weights: Sequence[float], normalise: bool) -> None:
        self.weights = [float(weight) for weight in weights]
        self.normalise = normalise

    def _coefficients(self, count: int) -> list[float]:
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

    def merge(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Merged:
        """Σ w_i θ_i = θ0 + Σ w_i τ_i + (Σ w_i − 1) θ0; the last term is only there when not normalised."""
        layout = checked_layout(base, experts)
        coefficients = self._coefficients(len(experts))
        total = summed_task_vectors(layout, base, experts, coefficients)
        if not self.normalise:
            total.add_(flatten(layout, base), alpha=math.fsum(coefficients) - 1.0)
        return Merged(apply_flat(layout, base, total), info={"weights": coefficients})
