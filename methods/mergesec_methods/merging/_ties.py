"""TIES on task vectors: trim, elect signs, merge what agrees. Used by ``ties`` and by ``dare``."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    found = magnitude_ranks(all_pieces(base, experts), len(experts), size, [rank], vector)
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
    agreeing = piece.scratch("agreeing").zero_()
    surplus = piece.scratch("surplus").zero_()
    for index, threshold in enumerate(thresholds):
        tau = vector(piece, index)
        trim_(tau, threshold)
        total.add_(tau)
        if merge_func == "mean":  # counts: agreeing + opposing and agreeing − opposing
            sign = torch.sign(tau, out=piece.scratch("sign"))
            surplus.add_(sign)
            agreeing.add_(sign.abs_())
        mass.add_(tau.abs_())
    positive = torch.ge(total, 0.0, out=piece.scratch("sign"))
    up = torch.add(total, mass, out=piece.scratch("tau"))
    down = total.sub_(mass)
    select(positive, up, down, out=out).mul_(0.5)
    if merge_func == "mean":
        up, down = torch.add(agreeing, surplus, out=piece.scratch("tau")), agreeing.sub_(surplus)
        out.div_(select(positive, up, down, out=up).mul_(0.5).clamp_(min=1.0))


def trim_(vector: Tensor, threshold: float) -> Tensor:
    """``vector`` with entries below ``threshold`` in magnitude set to 0, in place (those equal to it stay)."""
    if threshold <= 0.0:
        return vector
    below = float(torch.nextafter(torch.tensor(threshold), torch.tensor(-math.inf)))
    return torch.ops.aten.hardshrink.out(vector, below, out=vector)  # type: ignore[no-any-return]
