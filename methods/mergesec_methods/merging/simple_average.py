"""Simple averaging of weights."""

from __future__ import annotations

from collections.abc import Sequence

from mergesec.contracts import Expert, MergeContext, Merged, MergeMethod, Weights
from mergesec.weights import apply_flat
from mergesec_methods.merging._sums import checked_layout, summed_task_vectors

CARD = {
    "name": "simple_average",
    "kind": "merging",
    "class": "SimpleAverage",
    "version": "1",
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


class SimpleAverage(MergeMethod):
    """θ = (1/T) Σ_i θ_i."""

    def merge(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Merged:
        """The mean, as θ0 + (1/T) Σ τ_i: tensors that no expert changed stay the base's bit by bit."""
        layout = checked_layout(base, experts)
        total = summed_task_vectors(layout, base, experts, [1.0] * len(experts))
        return Merged(apply_flat(layout, base, total, 1.0 / len(experts)))
