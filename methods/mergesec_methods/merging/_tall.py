"""TALL masks: which entries of a multi-task vector a task uses. For ``tall_masks`` and ``consensus``.

Wang et al., Localizing task information for improved model merging and compression, ICML 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mergesec.contracts import ContractError, Expert, MergeContext, Weights
from mergesec.tensorwise import Piece, TensorwiseMerge
from mergesec_methods.merging._masks import greater_equal, rows, split, task_vectors
from mergesec_methods.merging._ties import ties_into, trim_thresholds
from mergesec_methods.merging._tuning import tuning_accuracy


@dataclass(frozen=True)
class Multitask:
    """τ_MTL: the sum of the task vectors, or TIES of them with λ = 1."""

    base_method: str
    keep: float
    merge_func: str

    def survey(self, base: Weights, experts: Sequence[Expert]) -> list[float]:
        """TIES' trim thresholds; empty for task arithmetic."""
        return trim_thresholds(base, experts, self.keep) if self.base_method == "ties" else []

    def into(self, piece: Piece, taus: Tensor, out: Tensor, thresholds: Sequence[float]) -> None:
        """τ_MTL of one block into ``out`` ``[n]``; ``taus`` are its task vectors ``[T, n]``."""
        if self.base_method == "ties":
            ties_into(piece, out, thresholds, self.merge_func)
        else:
            torch.sum(taus, 0, out=out)


def tall_masks(piece: Piece, taus: Tensor, multitask: Tensor, lambdas: Sequence[float]) -> Tensor:
    """m_t = [|τ_t| ≥ λ_t |τ_MTL − τ_t|], bool ``[T, n]``. ``taus`` ``[T, n]`` is used up."""
    rest = torch.sub(multitask, taus, out=rows(piece, "rest")).abs_()
    rest.mul_(torch.tensor(lambdas, device=rest.device)[:, None])
    return greater_equal(taus.abs_(), rest)


@dataclass(frozen=True)
class Facts:
    """What a merge with TALL masks must know of all tensors: TIES' thresholds, λ_t per expert."""

    thresholds: Sequence[float]
    lambdas: Sequence[float]


# --------------------------------------------------------------------------- λ_t on the tuning split


class _Multitask(TensorwiseMerge):
    """θ0 + τ_MTL."""

    def __init__(self, multitask: Multitask, thresholds: Sequence[float]) -> None:
        self.multitask, self.thresholds = multitask, thresholds

    def combine(self, piece: Piece, out: Tensor, facts: Any) -> None:
        self.multitask.into(piece, task_vectors(piece), out, self.thresholds)


class _Localized(TensorwiseMerge):
    """θ0 + m_t ⊙ τ_MTL of the two "experts" θ_t and θ0 + τ_MTL."""

    def __init__(self, mask_lambda: float) -> None:
        self.mask_lambda = mask_lambda

    def combine(self, piece: Piece, out: Tensor, facts: Any) -> None:
        for span, part in split(piece):
            own, multitask = part.task_vector(0)[None], part.task_vector(1, "multitask")
            chosen = tall_masks(replace(part, experts=part.experts[:1]), own, multitask, [self.mask_lambda])
            torch.mul(multitask, chosen[0].view(torch.uint8), out=out[span])


def tuned_lambdas(
    base: Weights, experts: Sequence[Expert], ctx: MergeContext, multitask: Multitask, grid: Sequence[float]
) -> tuple[list[float], dict[str, Any]]:
    """(λ_t per expert, every score): the λ with which the masked model of a task is best on its tuning rows.

    Each task is tuned by itself, as in the authors' code; of equal scores the smaller λ is taken.
    """
    values = sorted({float(value) for value in grid})
    if not values:
        raise ContractError("mask_lambda 'tuned' needs at least one value in 'mask_grid'")
    thresholds = multitask.survey(base, experts)
    merged = Expert("multitask", dict(_Multitask(multitask, thresholds).stream(base, experts, ctx)))
    best: list[float] = []
    scores: dict[str, Any] = {}
    for expert in experts:
        found = {
            value: tuning_accuracy(
                ctx, expert.task, dict(_Localized(value).stream(base, [expert, merged], ctx))
            )
            for value in values
        }
        best.append(max(values, key=lambda value: (found[value], -value)))
        scores[expert.task] = {str(value): score for value, score in found.items()}
    return best, scores


def resolved(mask_lambda: float | str | Sequence[float], count: int) -> list[float]:
    """λ_t per expert of a number or a list; ContractError if it is still to be tuned."""
    if isinstance(mask_lambda, str):
        raise ContractError("mask_lambda 'tuned' needs networks to score; give a number")
    return [float(mask_lambda)] * count if isinstance(mask_lambda, (int, float)) else list(mask_lambda)
