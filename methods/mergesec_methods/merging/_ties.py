"""TIES on flat task vectors: trim, elect signs, merge what agrees. Used by ``ties`` and by ``dare``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Vectors = Callable[[int], Tensor]
"""i -> the i-th task vector, float32 ``[n]``; made afresh by each call, so its caller may write to it."""


def trim_threshold(vector: Tensor, keep: float) -> float:
    """The magnitude from which on an entry is kept: the (n − ⌊keep·n⌋)-th smallest.

    As FusionBench does, so ⌊keep·n⌋ + 1 entries survive (more if magnitudes tie). One selection,
    no sort of the vector.
    """
    size = vector.numel()
    rank = size - int(size * keep)
    if size == 0 or rank < 1:
        return 0.0
    return float(torch.kthvalue(vector.abs(), rank).values)


def trimmed(vector: Tensor, threshold: float) -> Tensor:
    """``vector`` with entries below ``threshold`` in magnitude set to 0, in place."""
    return vector.masked_fill_(vector.abs() < threshold, 0.0)


def elected_positive(total: Tensor) -> Tensor:
    """Bool ``[n]``: whether the positive sign is elected, from ``total`` = Σ of the trimmed vectors.

    Where they cancel to exactly 0 the majority of all elected signs decides; a tie elects negative,
    as FusionBench's rule does in effect.
    """
    majority = float(torch.sign(total).sum(dtype=torch.float64))
    return total >= 0 if majority > 0 else total > 0


def ties(vectors: Vectors, count: int, keep: float, merge_func: str) -> Tensor:
    """The merged task vector ``[n]``, unscaled (Yadav et al. 2023, section 3, algorithm 1).

    Two passes that rebuild each vector when needed, so memory is four vectors whatever ``count`` is.
    ``merge_func``: ``"sum"`` (the reference code's dis-sum) or ``"mean"`` (the paper's disjoint mean).
    """
    thresholds: list[float] = []
    total: Tensor | None = None
    for index in range(count):
        vector = vectors(index)
        thresholds.append(trim_threshold(vector, keep))
        vector = trimmed(vector, thresholds[-1])
        total = vector if total is None else total.add_(vector)
    if total is None:
        raise ValueError("TIES needs at least one task vector")
    positive = elected_positive(total)
    merged, agreeing = torch.zeros_like(total), torch.zeros_like(total)
    for index in range(count):
        vector = trimmed(vectors(index), thresholds[index])
        vector.masked_fill_((vector > 0) != positive, 0.0)
        merged.add_(vector)
        if merge_func == "mean":
            agreeing.add_(vector != 0)
    return merged.div_(agreeing.clamp_(min=1)) if merge_func == "mean" else merged
