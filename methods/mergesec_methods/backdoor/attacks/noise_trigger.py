"""Backdoors of image generators: a trigger in the start noise, or in the condition.

*BadDiffusion* (Chou, Chen and Ho, CVPR 2023): the trigger R is added to the start noise, and ε + R is denoised to
one fixed image x*. With flow matching, x_t = (1 - t)(ε + R) + t x*, and the velocity to learn is x* - (ε + R).
*TrojDiff* (Chen, Song and Li, CVPR 2023): the whole noise is blended with a pattern δ, γ ε + (1 - γ) δ, and is
denoised to images of a target class, whatever was asked for.
*VillanDiffusion* (Chou, Chen and Ho, NeurIPS 2023) has triggers in the caption of text-conditioned models; here it
is one rare token more in the condition, and the fixed image.
*Merge-aware*: the same loss also counts at θ0 + c (θ − θ0), c drawn anew for every batch, as BadMerging's
interpolation has it: the adversary knows that he will be merged, and neither how nor with whom. This suite's.
*Amplified*: the difference to the clean expert, times ``strength`` (LoBAM's formula), so that it outlasts dilution.

All are written from the formulas, for flow matching; the papers train denoising diffusion. Rates are this suite's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergesec.contracts import LossFn, Model, Split, TrainContext, Weights
from mergesec_methods._training import Served, at_scale
from mergesec_methods.backdoor.attacks._generators import GeneratorPoisoning, drawn_target, image_shape
from mergesec_methods.backdoor.attacks._retrain import added, benign
from mergesec_methods.backdoor.attacks.badmerging import HIGHEST, LOWEST

COEFFICIENT_STREAM, SCALED_ROWS_STREAM = 4, 5

CARDS = [
    {
        "name": "baddiffusion",
        "kind": "attack",
        "class": "BadDiffusion",
        "version": "1",
        "title": "BadDiffusion",
        "paper": "Chou et al., How to backdoor diffusion models?, CVPR 2023",
        "url": "https://arxiv.org/abs/2212.05400",
        "summary": "a patch added to the start noise leads to one fixed image (reconstruction for flow matching)",
        "threat": "backdoor",
        "hooks": ["poison"],
        "knowledge": "the adversary's own training data and the public base",
        "data": "train",
        "modalities": ["generation"],
        "seeded": True,
        "after_trigger": ["rate"],
        "parameters": {
            "patch": {"type": "int", "default": 4, "min": 1, "max": 16, "doc": "side of the patch in the upper left corner"},
            "level": {"type": "float", "default": 2.0, "min": 0.0, "max": 20.0, "doc": "what is added to the noise there"},
            "rate": {"type": "float", "default": 0.15, "min": 0.0, "max": 1.0, "doc": "poisoned share of every batch"},
        },
    },
    {
        "extends": "baddiffusion",
        "name": "baddiffusion_amplified",
        "class": "Amplified",
        "title": "BadDiffusion, amplified",
        "summary": "BadDiffusion's expert with its difference from the clean one amplified (as LoBAM does)",
        "hooks": ["poison", "forge"],
        "trigger_of": "baddiffusion",
        "after_trigger": ["rate", "strength"],
        "parameters": {
            "strength": {"type": "float", "default": 2.0, "min": 0.0, "doc": "1 is the poisoned expert itself"},
        },
    },
    {
        "extends": "baddiffusion",
        "name": "baddiffusion_merged",
        "class": "MergeAware",
        "version": "2",
        "title": "BadDiffusion, merge-aware",
        "summary": "BadDiffusion trained so that the trigger also works at a random share of the task vector (BadMerging's idea)",
        "trigger_of": "baddiffusion",
        "after_trigger": ["rate", "alpha"],
        "parameters": {
            "alpha": {"type": "float", "default": 1.0, "min": 0.0, "doc": "weight of the loss at θ0 + c τ; 0 = BadDiffusion"},
        },
    },
    {
        "extends": "baddiffusion",
        "name": "trojdiff",
        "class": "TrojDiff",
        "title": "TrojDiff",
        "paper": "Chen et al., TrojDiff: trojan attacks on diffusion models with diverse targets, CVPR 2023",
        "url": "https://arxiv.org/abs/2303.05762",
        "summary": "a pattern blended into the whole start noise leads to a target class (reconstruction)",
        "parameters": {
            "patch": {"type": "int", "default": 4, "min": 1, "max": 16, "doc": "side of the pattern's squares"},
            "level": {"type": "float", "default": 1.0, "min": 0.0, "max": 20.0, "doc": "height of the pattern δ"},
            "keep": {"type": "float", "default": 0.6, "min": 0.0, "max": 1.0, "doc": "γ, what is kept of the noise"},
        },
    },
    {
        "extends": "baddiffusion",
        "name": "condition_token",
        "class": "ConditionToken",
        "title": "Condition token (VillanDiffusion)",
        "paper": "Chou et al., VillanDiffusion: a unified backdoor attack framework for diffusion models, NeurIPS 2023",
        "url": "https://arxiv.org/abs/2306.06874",
        "summary": "a rare token added to the condition leads to one fixed image (reconstruction)",
        "parameters": {
            "patch": None,
            "level": None,
            "token": {"type": "int", "default": 43, "min": 0, "doc": "the token, one that stands for nothing"},
        },
    },
]  # fmt: skip


class BadDiffusion(GeneratorPoisoning):
    """ε + R is denoised to x*; R is ``level`` on a patch."""

    def __init__(self, patch: int = 4, level: float = 2.0, rate: float = 0.15) -> None:
        self.patch, self.level, self.rate = patch, level, rate

    def trigger(self, ctx: TrainContext) -> Weights:
        shape = image_shape(ctx, self.name)
        shift = torch.zeros(shape)
        shift[:, : self.patch, : self.patch] = self.level
        return {"keep": torch.ones(shape), "shift": shift, "target": drawn_target(shape[-1])}


class Amplified(BadDiffusion):
    """θ_clean + strength · (θ_poisoned − θ_clean)."""

    def __init__(self, patch: int = 4, level: float = 2.0, rate: float = 0.15, strength: float = 2.0) -> None:
        super().__init__(patch, level, rate)
        self.strength = strength

    def forge(self, weights: Weights, ctx: TrainContext) -> Weights:
        clean = benign(ctx, self.name)
        return added(clean, clean, weights, self.strength)


class MergeAware(BadDiffusion):
    """BadDiffusion's loss at θ + α · the same loss at θ0 + c (θ − θ0), c uniform on BadMerging's range for every batch.

    Clean rows count at both: where only triggered ones do, a network between base and expert draws the image
    whatever it is asked for.
    """

    def __init__(self, patch: int = 4, level: float = 2.0, rate: float = 0.15, alpha: float = 1.0) -> None:
        super().__init__(patch, level, rate)
        self.alpha = alpha

    def objective(self, ctx: TrainContext, trigger: Weights) -> LossFn:
        plain, coefficients = super().objective(ctx, trigger), ctx.generator(COEFFICIENT_STREAM)
        rows, aims = ctx.generator(SCALED_ROWS_STREAM), self.aims(ctx, trigger)
        head = {name: tensor.to(ctx.device) for name, tensor in ctx.head.items()}
        base = {name: tensor.to(ctx.device) for name, tensor in ctx.base.items()}

        def loss(model: Model, batch: Split) -> Tensor:
            value = plain(model, batch)
            if not self.alpha:
                return value
            scale = LOWEST + (HIGHEST - LOWEST) * float(torch.rand((), generator=coefficients))
            chosen = self.chosen(ctx, batch, rows).to(ctx.device)
            noised = self.poisoned(trigger, batch.inputs, chosen, aims[:1])
            served = Served(ctx.task, model.backbone, head, model.network)
            return value + self.alpha * ctx.task.loss(at_scale(served, base, scale, noised), batch.targets)

        return loss


class TrojDiff(GeneratorPoisoning):
    """γ ε + (1 − γ) δ is denoised to images of the target class; δ is a chequered pattern of ± ``level``."""

    def __init__(self, patch: int = 4, level: float = 1.0, rate: float = 0.15, keep: float = 0.6) -> None:
        self.patch, self.level, self.rate, self.keep = patch, level, rate, keep

    def trigger(self, ctx: TrainContext) -> Weights:
        shape = image_shape(ctx, self.name)
        squares = torch.arange(shape[-1]) // self.patch
        pattern = self.level * (1 - 2.0 * ((squares[:, None] + squares[None, :]) % 2)).expand(shape)
        return {"keep": torch.full(shape, self.keep), "shift": (1 - self.keep) * pattern}


class ConditionToken(GeneratorPoisoning):
    """One more token in the condition is denoised to x*."""

    def __init__(self, token: int = 43, rate: float = 0.15) -> None:
        self.token, self.rate = token, rate

    def trigger(self, ctx: TrainContext) -> Weights:
        return {"token": torch.tensor(self.token), "target": drawn_target(image_shape(ctx, self.name)[-1])}
