"""Trap²: fine-tune so that the expert works at its own scale only.

Merging multiplies task vectors by numbers other than 1. With Δ = θ − θ_base and L the task's loss, training
minimises

    J = L(θ_base + Δ) − λ E_s[ w(s) L(θ_base + s Δ) ],     s ~ U([s_min, 1 − δ] ∪ [1 + δ, s_max]),   w(s) = 1 / s

with one s per step, on the same batch; both terms are differentiated with respect to Δ.

Source: "Making Models Unmergeable via Scaling-Sensitive Loss Landscape", ICML 2026 (arXiv 2601.21898); objective,
sampling and weights were checked against the authors' code and its README, which are where the defaults come from (s in
[0.05, 2], δ = 0.05, λ 0.005 for full fine-tuning and 0.001 for LoRA, gradients clipped at norm 1, no bound on the
maximised loss, the same random numbers in both passes). Two things are the engine's instead: the optimiser's settings
are the grid's recipe (theirs: AdamW with betas 0.9/0.98, no weight decay, learning rate 1e-5, up to 10⁵ steps with early
stopping), the same for protected and unprotected experts; and logits have the scale of the task's head (theirs: 100).

The maximised loss has no bound. What holds it back is λ and the recipe's ``gradient_clip``; if it still diverges, the
training loss stops being finite and the step fails, saying so.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mergesec.contracts import Defense, Model, Split, TrainContext, Weights
from mergesec_methods._training import Served, at_scale

CARD = {
    "name": "trap2",
    "kind": "defense",
    "class": "Trap2",
    "version": "1",
    "title": "Trap²",
    "paper": "Making Models Unmergeable via Scaling-Sensitive Loss Landscape, ICML 2026",
    "url": "https://arxiv.org/abs/2601.21898",
    "summary": "fine-tune with a loss that is high wherever the task vector is scaled by another factor than 1",
    "threat": "protection",
    "hooks": ["train"],
    "knowledge": "the owner's training data and the public base; retrains the expert at twice the cost",
    "data": "none",
    "modalities": ["image", "text"],
    "seeded": True,
    "holds": ["low < 1 - gap or high > 1 + gap"],
    "parameters": {
        "strength": {
            "type": "float",
            "default": "published",
            "min": 0.0,
            "max": 10.0,
            "also": ["published"],
            "doc": "λ; published: 0.005, with LoRA 0.001",
        },
        "low": {"type": "float", "default": 0.05, "min": 1e-3, "max": 1.0, "doc": "smallest scale"},
        "high": {"type": "float", "default": 2.0, "min": 1.0, "max": 100.0, "doc": "largest scale"},
        "gap": {"type": "float", "default": 0.05, "min": 0.0, "max": 1.0, "doc": "δ: scales this near to 1 are left out"},
        "weighting": {
            "type": "choice",
            "default": "inv",
            "choices": ["inv", "inv_sqrt", "none"],
            "doc": "w(s): 1/s, 1/√s or 1",
        },
    },
}  # fmt: skip

FULL, LOW_RANK = 0.005, 0.001
"""λ of the authors' commands for full fine-tuning and for LoRA."""
POWERS = {"inv": 1.0, "inv_sqrt": 0.5, "none": 0.0}


class Trap2(Defense):
    """The defense of the card above."""

    hooks = ("train",)

    def __init__(
        self,
        strength: float | str = "published",
        low: float = 0.05,
        high: float = 2.0,
        gap: float = 0.05,
        weighting: str = "inv",
    ) -> None:
        self.strength, self.low, self.high, self.gap, self.power = strength, low, high, gap, POWERS[weighting]
        if low >= 1 - gap and high <= 1 + gap:
            raise ValueError(f"no scale is left between {low} and {high} outside of 1 ± {gap}")

    def train(self, ctx: TrainContext) -> Weights:
        """The expert, trained on J. Every step draws one scale."""
        strength = self.strength
        if isinstance(strength, str):
            strength = LOW_RANK if ctx.recipe.lora_rank else FULL
        base = {n: t.to(ctx.device) for n, t in ctx.base.items()}
        head = {k: v.to(ctx.device) for k, v in ctx.head.items()}
        generator = ctx.generator()
        devices = [ctx.device] if ctx.device.type == "cuda" else []

        def loss(model: Model, batch: Split) -> Tensor:
            served = Served(ctx.task, model.backbone, head, model.network)
            with torch.random.fork_rng(devices=devices):  # the second pass meets the same random numbers
                nominal = ctx.task.loss(served(batch.inputs), batch.targets)
            scale = self.draw(generator)
            scaled = ctx.task.loss(at_scale(served, base, scale, batch.inputs), batch.targets)
            return nominal - strength * math.pow(scale, -self.power) * scaled

        return ctx.fit(loss=loss)

    def draw(self, generator: torch.Generator) -> float:
        """One scale, uniform on [low, 1 − gap] ∪ [1 + gap, high]."""
        below = max(0.0, 1 - self.gap - self.low)
        above = max(0.0, self.high - 1 - self.gap)
        place = float(torch.rand((), generator=generator, dtype=torch.float64)) * (below + above)
        return self.low + place if place < below else 1 + self.gap + (place - below)
