"""Task arithmetic with a coefficient for each expert."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mergesec.contracts import ContractError, Expert, MergeContext, Weights
from mergesec.tensorwise import Piece, TensorwiseMerge

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
    },
}


class WeightedTaskArithmetic(TensorwiseMerge):
    """θ = θ0 + Σ_i λ_i τ_i: what task-wise AdaMerging learns the λ_i of, here given. Beside it, it says whether what
    an adaptive merge does to a backdoor is in the coefficients alone."""

    pointwise = True

    def __init__(self, coefficients: Sequence[float]) -> None:
        self.coefficients = [float(value) for value in coefficients]

    def survey(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> list[float]:
        """The λ_i; ContractError if they do not fit the experts."""
        found = self.coefficients or [0.3] * len(experts)
        if len(found) != len(experts):
            raise ContractError(
                f"weighted_task_arithmetic: {len(found)} coefficients for {len(experts)} experts"
            )
        if not all(math.isfinite(value) for value in found):
            raise ContractError(f"weighted_task_arithmetic: coefficients must be finite, not {found}")
        return found

    def combine(self, piece: Piece, out: Tensor, facts: list[float]) -> None:
        """Σ λ_i τ_i"""
        out.zero_()
        for index, coefficient in enumerate(facts):
            out.add_(piece.task_vector(index), alpha=coefficient)

    def facts(self) -> dict[str, Any]:
        return {"coefficients": self.coefficients}
