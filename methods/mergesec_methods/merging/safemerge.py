"""SafeMERGE: layers that leave the aligned expert's subspace are mixed with the aligned expert.

What is from where. The paper's abstract and figure 1: a layer of the fine-tuned model is merged with that of a safe
model only where a cosine between its update and the update's projection is low. The readme of the release: below
0.35, 0.8 of the fine-tuned update and 0.2 of the safe one; what is no matrix is passed over. P = D Dᵀ / ‖D‖_F is the
release's too, and Safe LoRA's (Hsu et al., NeurIPS 2024). That one expert is both the aligned model and the safe one,
several other experts, and full fine-tuning instead of LoRA on queries and values are ours
(docs/methods/merging.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergesec.contracts import ContractError, Expert, MergeContext, Weights
from mergesec.errors import nearest
from mergesec.tensorwise import Piece, TensorwiseMerge, running_mean

CARD = {
    "name": "safemerge",
    "kind": "merging",
    "class": "SafeMerge",
    "version": "1",
    "title": "SafeMERGE",
    "paper": "Djuhera et al., SafeMERGE: preserving safety alignment in fine-tuned large language models via "
    "selective layer-wise model merging, 2025",
    "url": "https://arxiv.org/abs/2503.17239",
    "summary": "matrices that deviate from an aligned expert's subspace are mixed with that expert",
    "output": "static",
    "data": "tuning",
    "modalities": ["image", "text", "generation", "answers"],
    "seeded": False,
    "experts": [2, 0],
    "trial": {"safe": "micro/bars"},
    "parameters": {
        "safe": {
            "type": "task",
            "default": "",
            "doc": "task of the aligned expert, one of those that are merged; has to be named",
        },
        "threshold": {
            "type": "float",
            "default": 0.35,
            "min": -1.0,
            "max": 2.0,
            "doc": "matrices with a cosine below this are mixed: none at 0, all above 1",
        },
        "own_weight": {
            "type": "float",
            "default": 0.8,
            "min": 0.0,
            "max": 10.0,
            "doc": "weight of the expert's own update in a matrix that is mixed",
        },
        "safe_weight": {
            "type": "float",
            "default": 0.2,
            "min": 0.0,
            "max": 10.0,
            "doc": "weight of the aligned expert's update in a matrix that is mixed",
        },
        "exclude": {
            "type": "list",
            "default": ["embed", "wte", "wpe"],
            "doc": "two-dimensional tensors whose name contains one of these are not looked at",
        },
        "scaling": {
            "type": "float",
            "default": 1.0,
            "min": 0.0,
            "max": 10.0,
            "also": ["tuned"],
            "doc": "scaling coefficient λ; 'tuned' picks it from 'grid' on the tuning split",
        },
        "grid": {
            "type": "list",
            "default": [0.25, 0.5, 0.75, 1.0, 1.25, 1.5],
            "doc": "coefficients tried when scaling is 'tuned'",
        },
    },
}


class Roles(NamedTuple):
    """Who is who among the experts."""

    safe: int
    """Where the aligned expert stands."""
    others: dict[int, str]
    """Tasks of the experts that are looked at, by where they stand."""


class SafeMerge(TensorwiseMerge):
    """θ = θ0 + λ mean_i g(τ_i) over the experts i other than the aligned one, whose task vector is D.

    For a matrix ``[out, in]``, with P = D Dᵀ / ‖D‖_F: g(τ) = τ where cos(P τ, τ) is at least the threshold, else
    own_weight · τ + safe_weight · D. Everything else (biases, norms, what ``exclude`` names) is g(τ) = τ. With
    one expert beside the aligned one, a base without alignment and λ = 1 that is the published rule.
    """

    def __init__(
        self,
        safe: str,
        threshold: float,
        own_weight: float,
        safe_weight: float,
        exclude: Sequence[str],
        scaling: float | str,
        grid: Sequence[float],
    ) -> None:
        self.safe = safe
        self.threshold = threshold
        self.own_weight = own_weight
        self.safe_weight = safe_weight
        self.exclude = exclude
        self.scaling = scaling
        self.grid = grid
        self.report: dict[str, dict[str, Any]] = {}
        """Per expert: how many matrices were looked at and mixed, and the ends of their cosines."""

    def survey(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Roles:
        """Finds the aligned expert; ContractError unless exactly one expert has that task and others are there."""
        tasks = [expert.task for expert in experts]
        if not self.safe:
            raise ContractError(
                f"safemerge: safe is empty; name the aligned expert's task: {', '.join(tasks)}"
            )
        if self.safe not in tasks:
            raise ContractError(
                f"safemerge: safe: no expert is called '{self.safe}'{nearest(self.safe, tasks)}"
            )
        if tasks.count(self.safe) > 1:
            raise ContractError(f"safemerge: safe: several experts are called '{self.safe}'; one is aligned")
        if len(tasks) < 2:
            raise ContractError(f"safemerge: no expert is merged beside the aligned one, '{self.safe}'")
        self.report = {}
        place = tasks.index(self.safe)
        return Roles(place, {index: task for index, task in enumerate(tasks) if index != place})

    def whole(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: Roles) -> Tensor | None:
        """mean_i g(τ_i) of a matrix; None for anything else."""
        if base.ndim != 2 or not base.numel() or any(part in name for part in self.exclude):
            return None
        origin = base.float()
        safe = experts[facts.safe].to(origin) - origin
        aligned = Alignment(safe)
        total = torch.zeros_like(origin)
        for index, task in facts.others.items():
            delta = experts[index].to(origin) - origin
            cosine = aligned.cosine(delta)
            if not math.isfinite(cosine):
                whose = task if math.isfinite(aligned.length) else self.safe
                raise ContractError(
                    f"safemerge: expert '{whose}': '{name}' is not finite, or too large to square"
                )
            mixed = cosine < self.threshold
            self._note(task, cosine, mixed)
            total.add_(delta, alpha=self.own_weight if mixed else 1.0)
            if mixed:
                total.add_(safe, alpha=self.safe_weight)
        return total.div_(len(facts.others))

    def combine(self, piece: Piece, out: Tensor, facts: Roles) -> None:
        """mean_i τ_i"""
        others = [piece.experts[index] for index in facts.others]
        running_mean(Piece(piece.name, piece.start, piece.base, others, piece.workspace), out)
        out.sub_(piece.base)

    def facts(self) -> dict[str, Any]:
        return {"scaling": self.scaling, "safe": self.safe, "gate": self.report}

    def _note(self, task: str, cosine: float, mixed: bool) -> None:
        seen = self.report.setdefault(
            task, {"matrices": 0, "mixed": 0, "lowest": math.inf, "highest": -math.inf}
        )
        seen["matrices"] += 1
        seen["mixed"] += int(mixed)
        seen["lowest"] = min(seen["lowest"], cosine)
        seen["highest"] = max(seen["highest"], cosine)


class Alignment:
    """The aligned expert's update D ``[out, in]`` of one matrix, float32."""

    def __init__(self, update: Tensor) -> None:
        self.update = update
        self.length = float(update.norm())
        rows, columns = update.shape
        self.outer = update @ update.T if rows < columns else None
        """D Dᵀ where that is the cheaper one, once for all experts; else Dᵀ τ is formed, for each."""

    def cosine(self, delta: Tensor) -> float:
        """cos(D Dᵀ τ, τ) in [0, 1], of which the length of D cancels; 0 where either update or Dᵀ τ is 0.

        ⟨D Dᵀ τ, τ⟩ = ‖Dᵀ τ‖². Both updates are counted as of length 1, or products of small ones would vanish.
        """
        length = float(delta.norm())
        if self.length == 0.0 or length == 0.0:
            return 0.0
        if self.outer is not None:
            projected = (self.outer @ delta).div_(self.length * length).div_(self.length)
            along = float((projected * delta).sum()) / length
        else:
            inner = (self.update.T @ delta).div_(self.length * length)
            projected = (self.update @ inner).div_(self.length)
            along = float(inner.square().sum())
        size = float(projected.norm())
        return min(along / size, 1.0) if size else 0.0
