"""Sums of task vectors as one flat float32 vector, built in one pass over the experts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mergesec.contracts import ContractError, Expert, Weights
from mergesec.weights import FlatLayout, add_task_vector, check_same_layout, flat_layout, zeros_flat


def checked_layout(base: Weights, experts: Sequence[Expert]) -> FlatLayout:
    """The base's flat layout, after every expert was found to fit it."""
    if not experts:
        raise ContractError("nothing to merge: no expert was handed over")
    for expert in experts:
        check_same_layout(base, expert.weights, f"expert '{expert.task}'")
    return flat_layout(base)


def summed_task_vectors(
    layout: FlatLayout, base: Weights, experts: Sequence[Expert], coefficients: Sequence[float]
) -> Tensor:
    """Σ_i c_i (θ_i − θ0) as ``[layout.size]`` float32.

    Summing differences, not weights: where all experts equal the base the result is exactly zero.
    """
    total = zeros_flat(layout, base)
    for expert, coefficient in zip(experts, coefficients, strict=True):
        add_task_vector(total, layout, base, expert.weights, coefficient)
    return total
