"""Simple averaging of weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mergesec.tensorwise import Piece, Rule, TensorwiseMerge, fused_mean, running_mean

CARD = {
    "name": "simple_average",
    "kind": "merging",
    "class": "SimpleAverage",
    "version": "2",
    "title": "Simple average",
    "paper": "Wortsman et al., Model soups, ICML 2022",
    "url": "https://arxiv.org/abs/2203.05482",
    "summary": "the mean of the experts' weights",
    "output": "static",
    "data": "none",
    "modalities": ["image", "text"],
    "seeded": False,
    "parameters": {},
}


class SimpleAverage(TensorwiseMerge):
    """θ = (1/T) Σ_i θ_i. Tensors that no expert changed stay the base's bit by bit."""

    yields = "weights"
    pointwise = True

    def combine(self, piece: Piece, out: Tensor, facts: Any) -> None:
        running_mean(piece, out)

    def fused(self, rule: Rule, piece: Piece, facts: Any) -> bool:
        return fused_mean(rule, piece)

    def facts(self) -> dict[str, Any]:
        return {}
