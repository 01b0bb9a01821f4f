"""Concrete task arithmetic and Concrete AdaMerging."""

from __future__ import annotations

from collections.abc import Sequence

from mergesec.contracts import Expert, MergeContext, Merged, MergeMethod, Weights
from mergesec_methods.merging._adaptation import Blend, adapt_coefficients, means, progress, streams_of
from mergesec_methods.merging._concrete import ConcreteMask, final_mask, learn_mask

CARDS = [
    {
        "name": "concrete_task_arithmetic",
        "kind": "merging",
        "class": "ConcreteTaskArithmetic",
        "version": "1",
        "title": "Concrete task arithmetic",
        "paper": "Tang et al., Concrete subspace learning based interference elimination, 2023",
        "url": "https://arxiv.org/abs/2312.06173",
        "summary": "task arithmetic under a mask shared by all task vectors, learnt by entropy minimisation",
        "output": "static",
        "data": "tuning",
        "modalities": ["image", "text"],
        "seeded": True,
        "trial": {"steps": 5},
        "parameters": {
            "scaling": {
                "type": "float",
                "default": 0.3,
                "min": -10.0,
                "max": 10.0,
                "doc": "scaling coefficient λ",
            },
            "lr": {
                "type": "float",
                "default": 0.001,
                "min": 0.0,
                "max": 10.0,
                "doc": "Adam's step size for the mask's logits",
            },
            "steps": {
                "type": "int",
                "default": 2000,
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
            "temperature": {
                "type": "float",
                "default": 0.5,
                "min": 0.001,
                "max": 100.0,
                "doc": "temperature of the relaxed Bernoulli distribution",
            },
            "final": {
                "type": "choice",
                "choices": ["continuous", "discrete"],
                "default": "continuous",
                "doc": "the merged model's mask: a relaxed or a 0/1 sample",
            },
        },
    },
    {
        "name": "concrete_adamerging",
        "kind": "merging",
        "class": "ConcreteAdaMerging",
        "version": "1",
        "title": "Concrete AdaMerging",
        "paper": "Tang et al., Concrete subspace learning based interference elimination, 2023",
        "url": "https://arxiv.org/abs/2312.06173",
        "summary": "a mask shared by all task vectors is meta-learnt, then AdaMerging runs under it",
        "output": "static",
        "data": "tuning",
        "modalities": ["image", "text"],
        "seeded": True,
        "trial": {"mask_steps": 3, "steps": 3},
        "parameters": {
            "granularity": {
                "type": "choice",
                "choices": ["layer", "task"],
                "default": "layer",
                "doc": "one coefficient per task and tensor ('layer'), or per task",
            },
            "init": {
                "type": "float",
                "default": 0.3,
                "min": -10.0,
                "max": 10.0,
                "doc": "all coefficients before adaptation",
            },
            "mask_lr": {
                "type": "float",
                "default": 0.001,
                "min": 0.0,
                "max": 10.0,
                "doc": "Adam's step size for the mask's logits",
            },
            "inner_lr": {
                "type": "float",
                "default": 1.0,
                "min": 0.0,
                "max": 10.0,
                "doc": "Adam's step size for the coefficients while the mask is learnt",
            },
            "mask_steps": {
                "type": "int",
                "default": 1000,
                "min": 0,
                "max": 1000000,
                "doc": "steps that learn the mask; each sees two batches per task",
            },
            "lr": {
                "type": "float",
                "default": 0.001,
                "min": 0.0,
                "max": 10.0,
                "doc": "Adam's step size for the coefficients under the final mask",
            },
            "steps": {
                "type": "int",
                "default": 1000,
                "min": 0,
                "max": 1000000,
                "doc": "AdaMerging's steps under the final mask; each sees one batch per task",
            },
            "batch_size": {
                "type": "int",
                "default": 16,
                "min": 1,
                "max": 65536,
                "doc": "unlabelled inputs per task and batch",
            },
            "temperature": {
                "type": "float",
                "default": 0.5,
                "min": 0.001,
                "max": 100.0,
                "doc": "temperature of the relaxed Bernoulli distribution",
            },
            "final": {
                "type": "choice",
                "choices": ["continuous", "discrete"],
                "default": "continuous",
                "doc": "the merged model's mask: a relaxed or a 0/1 sample",
            },
        },
    },
]


class ConcreteTaskArithmetic(MergeMethod):
    """θ = θ0 + λ m ⊙ Σ_i τ_i, m learnt; λ is taken as given, so there is no inner problem."""

    def __init__(
        self, scaling: float, lr: float, steps: int, batch_size: int, temperature: float, final: str
    ) -> None:
        self.scaling = scaling
        self.lr = lr
        self.steps = steps
        self.batch_size = batch_size
        self.temperature = temperature
        self.final = final

    def merge(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Merged:
        """The merged weights; ``info`` holds λ and the entropy before and after."""
        blend = Blend(base, experts, ctx.backbone, ctx.device)
        mask = ConcreteMask(blend, self.temperature, ctx)
        coefficients = blend.coefficients("task", self.scaling)
        streams = streams_of(experts, self.batch_size, ctx)
        losses = learn_mask(blend, mask, streams, coefficients, self.lr, self.steps)
        blend.assemble(coefficients, final_mask(mask, self.final))
        return Merged(blend.result(base), info={"scaling": self.scaling, "entropy": progress(losses)})


class ConcreteAdaMerging(MergeMethod):
    """θ^l = θ0^l + Σ_i λ_i^l m^l ⊙ τ_i^l: m by meta-learning around one step of AdaMerging, then λ."""

    def __init__(
        self,
        granularity: str,
        init: float,
        mask_lr: float,
        inner_lr: float,
        mask_steps: int,
        lr: float,
        steps: int,
        batch_size: int,
        temperature: float,
        final: str,
    ) -> None:
        self.granularity = granularity
        self.init = init
        self.mask_lr = mask_lr
        self.inner_lr = inner_lr
        self.mask_steps = mask_steps
        self.lr = lr
        self.steps = steps
        self.batch_size = batch_size
        self.temperature = temperature
        self.final = final

    def merge(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Merged:
        """The merged weights; ``info`` holds the mean λ per task and both loops' entropies."""
        blend = Blend(base, experts, ctx.backbone, ctx.device)
        mask = ConcreteMask(blend, self.temperature, ctx)
        coefficients = blend.coefficients(self.granularity, self.init)
        streams = streams_of(experts, self.batch_size, ctx)
        masked = learn_mask(blend, mask, streams, coefficients, self.mask_lr, self.mask_steps, self.inner_lr)
        blend.vectors.mul_(final_mask(mask, self.final))
        losses = adapt_coefficients(blend, streams, coefficients, self.lr, self.steps, clamp=False)
        info = {
            "coefficients": means(coefficients, experts),
            "mask_entropy": progress(masked),
            "entropy": progress(losses),
        }
        return Merged(blend.result(base), info=info)
