"""TIES on task vectors: trim, elect signs, merge what agrees. Used by ``ties`` and by ``dare``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mergesec.contracts import Expert, Weights
from mergesec.tensorwise import Piece, select
from mergesec.weights import flat_layout
from mergesec_methods.merging._ranks import Vector, all_pieces, magnitude_ranks, task_vector


def trim_thresholds(
    base: Weights, experts: Sequence[Expert], keep: float, vector: Vector = task_vector
) -> list[float]:
    """Per expert, the magnitude from which on an entry is kept: the (n − ⌊keep·n⌋)-th smallest.

    As FusionBench does, so ⌊keep·n⌋ + 1 entries survive (more if magnitudes tie).
    """
    size = flat_layout(base).size
    rank = size - int(size * keep)
    chunks = all_pieces(base, experts, side_by_side=vector is task_vector)
    found = magnitude_ranks(chunks, len(experts), size, [rank], vector)
    return [own[0] for own in found]


def ties_into(
    piece: Piece, out: Tensor, thresholds: Sequence[float], merge_func: str, vector: Vector = task_vector
) -> None:
    """The merged task vector of one block (Yadav et al. 2023, section 3, algorithm 1) into ``out`` ``[n]``.

    With S = Σ trimmed τ_i and A = Σ |trimmed τ_i| the entries of the elected sign sum to
    (S ± A) / 2; as A ≤ 2·|that sum|, nothing is lost by cancellation. Where S is exactly 0 the
    positive sign is elected. ``merge_func``: ``"sum"`` (the reference code's dis-sum) or ``"mean"``
    (the paper's disjoint mean).
    """
    total, mass = out.zero_(), piece.scratch("mass").zero_()
    counting = merge_func == "mean"
    agreeing, surplus = (
        (piece.scratch(key).zero_() for key in ("agreeing", "surplus")) if counting else (out, out)
    )
    for index, threshold in enumerate(thresholds):
        tau = trim_(vector(piece, index), threshold)
        total.add_(tau)
        if counting:  # agreeing + opposing and agreeing − opposing
            sign = torch.sign(tau, out=piece.scratch("sign"))
            surplus.add_(sign)
            agreeing.add_(sign.abs_())
        mass.add_(tau.abs_())
    if counting:
        positive = torch.ge(total, 0.0, out=piece.scratch("sign"))
        up = torch.add(agreeing, surplus, out=piece.scratch("tau"))
        down = agreeing.sub_(surplus)
        count = select(positive, up, down, out=up).mul_(0.5).clamp_(min=1.0)
    total.add_(mass.copysign_(total)).mul_(0.5)  # 0 counts as positive: a sum that starts at 0 is never −0
    if counting:
        total.div_(count)


def trimmed_below(thresholds: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """The largest magnitude each threshold trims; −1 (none) where nothing is trimmed."""
    wanted = np.array(thresholds, np.float32)
    return np.where(wanted > 0.0, np.nextafter(wanted, np.float32(0.0)), np.float32(-1.0))


def trim_(vector: Tensor, threshold: float) -> Tensor:
    """``vector`` with entries below ``threshold`` in magnitude set to 0, in place (those equal to it stay)."""
    if threshold <= 0.0:
        return vector
    below = float(trimmed_below([threshold])[0])
    return torch.ops.aten.hardshrink.out(vector, below, out=vector)  # type: ignore[no-any-return]
