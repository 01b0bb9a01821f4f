"""Sparse backdoor vector: several backdoored experts, merged by the adversary before anybody else merges.

The backdoor vector of a training run k is v_k = θ_backdoored,k − θ_clean. Runs that differ by their seed alone agree in
what the backdoor needs and disagree elsewhere, so

    θ = θ_clean + λ · m ⊙ mean_k v_k,     m = 1 where all v_k have one sign, and among the largest entries

has the backdoor without the noise of a single run. Here m first asks for agreement (``agree``) and then keeps the
``keep`` share of all entries that are largest in magnitude (1 = all that agree).

Source: Pawlak et al., "Backdoor Vectors", arXiv 2510.08016: the vector, that several are merged and made sparse, and
that sign consistency is the criterion that works best, from the abstract and public summaries of the paper. Mean rather
than sum, seeds as what varies, and the defaults of λ and ``keep`` are a reconstruction. The backdoored experts are
BadMerging's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mergesec.contracts import TrainContext, Weights
from mergesec.weights import add_task_vector, apply_flat, flat_layout, zeros_flat
from mergesec_methods.backdoor.attacks._retrain import benign, refit
from mergesec_methods.backdoor.attacks.badmerging import BadMerging

CARD = {
    "extends": "badmerging",
    "name": "sparse_backdoor_vector",
    "class": "SparseBackdoorVector",
    "title": "Sparse backdoor vector",
    "paper": "Pawlak et al., Backdoor vectors: a task arithmetic view on backdoor attacks and defenses, 2025",
    "url": "https://arxiv.org/abs/2510.08016",
    "summary": "what several backdoored experts' differences from the clean one agree on, added to the clean one",
    "hooks": ["forge"],
    "knowledge": "the adversary's own training data and the public base; trains several experts",
    "trigger_of": "badmerging",
    "after_trigger": ["vectors", "agree", "keep", "strength", "alpha", "interpolation", "triggered"],
    "parameters": {
        "vectors": {"type": "int", "default": 2, "min": 1, "max": 16, "doc": "backdoored experts to train"},
        "agree": {"type": "bool", "default": True, "doc": "drop entries on whose sign they disagree"},
        "keep": {"type": "float", "default": 1.0, "min": 0.0, "max": 1.0, "doc": "share of all entries that may stay, the largest ones"},
        "strength": {"type": "float", "default": 1.0, "min": 0.0, "doc": "λ"},
    },
}  # fmt: skip

RUN_STREAM = 10
"""First of the streams from which the runs' seeds are drawn."""


class SparseBackdoorVector(BadMerging):
    """The attack of the card above."""

    def __init__(
        self, vectors: int = 2, agree: bool = True, keep: float = 1.0, strength: float = 1.0, **given: Any
    ) -> None:
        super().__init__(**given)
        self.vectors, self.agree, self.keep, self.strength = vectors, agree, keep, strength

    def forge(self, weights: Weights, ctx: TrainContext) -> Weights:
        """θ_clean plus the sparse vector; the first run has the clean expert's own seed."""
        clean = benign(ctx, "sparse_backdoor_vector")
        trigger = ctx.trigger or self.trigger(ctx)
        layout = flat_layout(clean)
        found = []
        for run in range(self.vectors):
            seed = ctx.seed if run == 0 else ctx.generator(RUN_STREAM + run).initial_seed()
            backdoored = refit(ctx, self.objective(ctx, trigger), seed=seed)
            vector = zeros_flat(layout, clean)
            add_task_vector(vector, layout, clean, backdoored)
            found.append(vector)
        return apply_flat(layout, clean, self.sparse(torch.stack(found)), self.strength)

    def sparse(self, vectors: Tensor) -> Tensor:
        """The mean ``[P]`` of backdoor vectors ``[K, P]`` where they agree, its largest entries only."""
        mean = vectors.mean(dim=0)
        if self.agree:
            signs = vectors.sign().sum(dim=0).abs()
            mean = torch.where(signs == len(vectors), mean, 0.0)
        room = round(self.keep * mean.numel())
        if room < mean.numel():
            kept = mean.abs().topk(room).indices
            mean = torch.zeros_like(mean).index_copy(0, kept, mean[kept])
        return mean
