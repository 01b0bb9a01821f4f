"""PAINT: patch the base by interpolating towards fine-tuned weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mergesec.contracts import ContractError, Expert, MergeContext, Merged, Weights
from mergesec.tensorwise import Piece, TensorwiseMerge, check_experts, running_mean
from mergesec_methods.merging._tuning import tuning_accuracy

CARD = {
    "name": "paint",
    "kind": "merging",
    "class": "Paint",
    "version": "1",
    "title": "PAINT",
    "paper": "Ilharco et al., Patching open-vocabulary models by interpolating weights, NeurIPS 2022",
    "url": "https://arxiv.org/abs/2208.05592",
    "summary": "interpolate between the base and the experts, all at once or one after the other",
    "output": "static",
    "data": "tuning",
    "modalities": ["image", "text"],
    "seeded": False,
    "parameters": {
        "mode": {
            "type": "choice",
            "choices": ["parallel", "sequential"],
            "default": "parallel",
            "doc": "'parallel' interpolates to the experts' average, 'sequential' patches with one expert "
            "after the other, in the order of the experts",
        },
        "alpha": {
            "type": "float",
            "default": "tuned",
            "min": 0.0,
            "max": 1.0,
            "also": ["tuned"],
            "doc": "mixing coefficient α; 'tuned' picks it from 'grid' on the tuning split, in sequence for "
            "every expert anew on the tasks patched so far",
        },
        "grid": {
            "type": "list",
            "default": [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
            "doc": "coefficients tried when alpha is 'tuned'",
        },
    },
}


class Paint(TensorwiseMerge):
    """θ ← (1 − α) θ + α θ_t (Ilharco et al. 2022).

    Parallel: one step from θ0 to the mean of the θ_t, that is α/T for each of T tasks. Sequential: a
    step per expert. The paper fine-tunes each next expert from the model patched so far; experts that
    are given were all fine-tuned from θ0.
    """

    yields = "weights"
    pointwise = True

    def __init__(self, mode: str, alpha: float | str, grid: Sequence[float]) -> None:
        self.mode = mode
        self.alpha = alpha
        self.grid = grid
        self.scaling = alpha if mode == "parallel" else 1.0
        self.steps: Sequence[float] = ()

    def facts(self) -> dict[str, Any]:
        return {"mode": self.mode, **({"scaling": self.scaling} if self.mode == "parallel" else {})}

    def survey(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Sequence[float]:
        """α per expert of a sequence."""
        if self.mode == "parallel" or self.steps:
            return self.steps
        if isinstance(self.alpha, str):
            raise ContractError(f"{self.name}: alpha 'tuned' needs networks to score; give a number")
        return [self.alpha] * len(experts)

    def combine(self, piece: Piece, out: Tensor, facts: Sequence[float]) -> None:
        if self.mode == "parallel":
            running_mean(piece, out)
            return
        out.copy_(piece.base)
        for expert, alpha in zip(piece.experts, facts, strict=True):
            torch.lerp(out, expert, alpha, out=out)

    def merge(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Merged:
        """The patched weights; ``info`` records α (``scaling`` or one per expert) and, if tuned, every score."""
        if self.mode == "parallel" or self.alpha != "tuned":
            merged = super().merge(base, experts, ctx)
            return (
                merged
                if self.mode == "parallel"
                else replace(merged, info={**merged.info, "alpha": self.alpha})
            )
        check_experts(base, experts)
        values = sorted({float(value) for value in self.grid})
        if not values:
            raise ContractError("alpha 'tuned' needs at least one coefficient in 'grid'")
        steps: list[float] = []
        scores: list[list[Any]] = []
        for count in range(1, len(experts) + 1):
            found = [self._score(base, experts[:count], [*steps, value], ctx) for value in values]
            steps.append(values[found.index(max(found))])  # of equal scores the smallest α
            scores.append(
                [experts[count - 1].task, steps[-1], dict(zip(map(str, values), found, strict=True))]
            )
        info = {**self.facts(), "tuned": True, "steps": scores}
        return Merged(self._patched(base, experts, steps, ctx), info=info)

    def _patched(
        self, base: Weights, experts: Sequence[Expert], steps: Sequence[float], ctx: MergeContext
    ) -> dict[str, Tensor]:
        """θ0 patched with each expert by its own α. Starts from θ0 every time: θ is rounded only once."""
        fixed = copy.copy(self)
        fixed.steps = steps
        return dict(fixed.stream(base, experts, ctx))

    def _score(
        self, base: Weights, experts: Sequence[Expert], steps: Sequence[float], ctx: MergeContext
    ) -> float:
        """Mean tuning accuracy over the tasks patched so far."""
        weights = self._patched(base, experts, steps, ctx)
        return sum(tuning_accuracy(ctx, expert.task, weights) for expert in experts) / len(experts)
