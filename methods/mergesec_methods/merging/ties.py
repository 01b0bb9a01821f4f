"""TIES-merging."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mergesec.contracts import Expert, MergeContext, Weights
from mergesec.tensorwise import Piece, Rule, TensorwiseMerge
from mergesec_methods.merging._ties import ties_into, trim_thresholds, trimmed_below

CARD = {
    "name": "ties",
    "kind": "merging",
    "class": "Ties",
    "version": "2",
    "title": "TIES-merging",
    "paper": "Yadav et al., TIES-merging: resolving interference when merging models, NeurIPS 2023",
    "url": "https://arxiv.org/abs/2306.01708",
    "summary": "trim small entries, elect a sign per weight, merge the entries that agree with it",
    "output": "static",
    "data": "tuning",
    "modalities": ["image", "text", "generation", "answers"],
    "seeded": False,
    "parameters": {
        "keep": {
            "type": "float",
            "default": 0.2,
            "min": 0.0,
            "max": 1.0,
            "doc": "share of entries kept per task vector, by magnitude over the whole vector",
        },
        "merge_func": {
            "type": "choice",
            "choices": ["sum", "mean"],
            "default": "sum",
            "doc": "'sum' as in FusionBench and 'dis-sum'; 'mean' as in the paper",
        },
        "scaling": {
            "type": "float",
            "default": 0.3,
            "min": 0.0,
            "max": 10.0,
            "also": ["tuned"],
            "doc": "scaling coefficient λ; 'tuned' picks it from 'grid' on the tuning split",
        },
        "grid": {
            "type": "list",
            "default": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
            "doc": "coefficients tried when scaling is 'tuned'",
        },
    },
}


class Ties(TensorwiseMerge):
    """θ = θ0 + λ · TIES(τ_1 … τ_T)."""

    pointwise = True

    def __init__(self, keep: float, merge_func: str, scaling: float | str, grid: Sequence[float]) -> None:
        self.keep = keep
        self.merge_func = merge_func
        self.scaling = scaling
        self.grid = grid

    def survey(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> list[float]:
        """The trim thresholds."""
        return trim_thresholds(base, experts, self.keep)

    def combine(self, piece: Piece, out: Tensor, facts: Any) -> None:
        ties_into(piece, out, facts, self.merge_func)

    def fused(self, rule: Rule, piece: Piece, facts: Any) -> bool:
        rule("elected" if self.merge_func == "sum" else "elected_mean", trimmed_below(facts))
        return True
