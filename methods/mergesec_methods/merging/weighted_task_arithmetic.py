"""Task arithmetic with a coefficient for each expert."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mergesec.contracts import ContractError, Expert, MergeContext, Weights
from mergesec.tensorwise import Piece, TensorwiseMerge
from mergesec.weights import owners
from mergesec_methods.merging._angles import inner_products

CARD = {
    "name": "weighted_task_arithmetic",
    "kind": "merging",
    "class": "WeightedTaskArithmetic",
    "version": "1",
    "title": "Weighted task arithmetic",
    "paper": "Ilharco et al., Editing models with task arithmetic, ICLR 2023",
    "url": "https://arxiv.org/abs/2212.04089",
    "summary": "the base plus the task vectors, each times a coefficient of its own",
    "output": "static",
    "data": "none",
    "modalities": ["image", "text"],
    "seeded": False,
    "parameters": {
        "coefficients": {
            "type": "list",
            "default": [],
            "min": -10.0,
            "max": 10.0,
            "doc": "one coefficient λ_i per expert, in the order of the experts; empty = 0.3 for each",
        },
        "lengths": {
            "type": "choice",
            "choices": ["kept", "equal"],
            "default": "kept",
            "later": True,
            "doc": "equal: every task vector is brought to their mean length first",
        },
    },
}


class WeightedTaskArithmetic(TensorwiseMerge):
    """θ = θ0 + Σ_i λ_i τ_i: what task-wise AdaMerging learns the λ_i of, here given. Beside it, it says whether what
    an adaptive merge does to a backdoor is in the coefficients alone.

    With ``lengths: equal`` λ_i is multiplied by mean_j ‖τ_j‖ / ‖τ_i‖, over all floating tensors: nobody is heard more
    for being longer (Asymmetric Collapse, arXiv 2607.27240, names lengths as its cause and does not try it).
    """

    pointwise = True

    def __init__(self, coefficients: Sequence[float], lengths: str = "kept") -> None:
        self.coefficients = [float(value) for value in coefficients]
        self.lengths = lengths

    def survey(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> list[float]:
        """The λ_i; ContractError if they do not fit the experts."""
        found = self.coefficients or [0.3] * len(experts)
        if len(found) != len(experts):
            raise ContractError(
                f"weighted_task_arithmetic: {len(found)} coefficients for {len(experts)} experts"
            )
        if not all(math.isfinite(value) for value in found):
            raise ContractError(f"weighted_task_arithmetic: coefficients must be finite, not {found}")
        if self.lengths == "kept":
            return found
        return [value * factor for value, factor in zip(found, _equalising(base, experts), strict=True)]

    def combine(self, piece: Piece, out: Tensor, facts: list[float]) -> None:
        """Σ λ_i τ_i"""
        out.zero_()
        for index, coefficient in enumerate(facts):
            out.add_(piece.task_vector(index), alpha=coefficient)

    def facts(self) -> dict[str, Any]:
        return {
            "coefficients": self.coefficients,
            **({"lengths": "equal"} if self.lengths == "equal" else {}),
        }


def _equalising(base: Weights, experts: Sequence[Expert]) -> list[float]:
    """mean_j ‖τ_j‖ / ‖τ_i‖; 1 for an expert that is the base."""
    tied = owners(base)
    products = [found for name, found in inner_products(base, experts, True).items() if name not in tied]
    squares = [math.fsum(float(found[i, i]) for found in products) for i in range(len(experts))]
    norms = [math.sqrt(square) for square in squares]
    mean = math.fsum(norms) / len(norms)
    return [mean / norm if norm > 0.0 else 1.0 for norm in norms]
