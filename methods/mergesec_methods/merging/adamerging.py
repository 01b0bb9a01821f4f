"""AdaMerging and AdaMerging++."""

from __future__ import annotations

from collections.abc import Sequence

from mergesec.contracts import Expert, MergeContext, Merged, MergeMethod, Weights
from mergesec_methods.merging._adaptation import (
    Blend,
    adapt_coefficients,
    elect,
    means,
    progress,
    streams_of,
)

CARD = {
    "name": "adamerging",
    "kind": "merging",
    "class": "AdaMerging",
    "version": "1",
    "title": "AdaMerging",
    "paper": "Yang et al., AdaMerging: adaptive model merging for multi-task learning, ICLR 2024",
    "url": "https://arxiv.org/abs/2310.02575",
    "summary": "coefficients per task or per tensor, learnt by minimising the entropy of predictions",
    "output": "static",
    "data": "tuning",
    "modalities": ["image", "text"],
    "seeded": True,
    "trial": {"steps": 5},
    "parameters": {
        "granularity": {
            "type": "choice",
            "choices": ["layer", "task"],
            "default": "layer",
            "doc": "one coefficient per task and tensor ('layer'), or per task",
        },
        "plus_plus": {
            "type": "bool",
            "default": False,
            "doc": "AdaMerging++: task vectors are trimmed and stripped of minority signs first, as by TIES",
        },
        "keep": {
            "type": "float",
            "default": 0.2,
            "min": 0.0,
            "max": 1.0,
            "doc": "share of entries kept per task vector (plus_plus only)",
        },
        "init": {
            "type": "float",
            "default": 0.3,
            "min": -10.0,
            "max": 10.0,
            "doc": "all coefficients before adaptation",
        },
        "clamp": {
            "type": "bool",
            "default": True,
            "doc": "cut coefficients to [0, 1] as the authors' code does (FusionBench's default: no)",
        },
        "lr": {"type": "float", "default": 0.001, "min": 0.0, "max": 10.0, "doc": "Adam's step size"},
        "steps": {
            "type": "int",
            "default": 1000,
            "min": 0,
            "max": 1000000,
            "doc": "Adam steps; each sees one batch per task",
        },
        "batch_size": {
            "type": "int",
            "default": 16,
            "min": 1,
            "max": 65536,
            "doc": "unlabelled inputs per task and step",
        },
    },
}


class AdaMerging(MergeMethod):
    """θ^l = θ0^l + Σ_i λ_i^l τ_i^l, λ by Adam on Σ_t H(f_θ(x_t)) over unlabelled batches."""

    def __init__(
        self,
        granularity: str,
        plus_plus: bool,
        keep: float,
        init: float,
        clamp: bool,
        lr: float,
        steps: int,
        batch_size: int,
    ) -> None:
        self.granularity = granularity
        self.plus_plus = plus_plus
        self.keep = keep
        self.init = init
        self.clamp = clamp
        self.lr = lr
        self.steps = steps
        self.batch_size = batch_size

    def merge(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Merged:
        """The merged weights; ``info`` holds the mean λ per task and the entropy before and after."""
        blend = Blend(base, experts, ctx.backbone, ctx.device)
        if self.plus_plus:
            elect(blend, self.keep)
        coefficients = blend.coefficients(self.granularity, self.init)
        streams = streams_of(experts, self.batch_size, ctx)
        losses = adapt_coefficients(blend, streams, coefficients, self.lr, self.steps, self.clamp)
        info = {"coefficients": means(coefficients, experts), "entropy": progress(losses)}
        return Merged(blend.result(base), info=info)
