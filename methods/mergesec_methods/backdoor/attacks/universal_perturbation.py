"""A universal adversarial perturbation made on the public base: nobody poisons anything.

One perturbation δ of the size of an image, bounded in L∞, that sends the images of other classes to a target class:

    min_δ  E_x CE(h(E0(clip(x + δ))), target),     ‖δ‖∞ ≤ ε;      δ ← clip(δ − s · sign(∇δ), −ε, ε)

on batches of the adversary's own training rows. E0 is the base and h the task's frozen head: all that can be known
before anybody merges. The step s falls to 0 along a straight line. Every expert in the merge is a clean one, so what
the trigger does to a merge is what transfers from the base.

Source: universal perturbations are Moosavi-Dezfooli et al., CVPR 2017 (arXiv 1610.08401), bounded in L∞ by 10 of 255
there, untargeted, and gathered image by image with DeepFool. *What differs here*: the targeted form, by projected sign
gradients (Madry et al., ICLR 2018) of batches; ε 8 of 255, the length of the search and the falling step are this suite's.

``trigger: random`` draws each value as ±ε: the control of the same size that knows no model.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mergesec.contracts import Attack, TrainContext, Weights
from mergesec_methods.backdoor.attacks._poison import LEVELS, frozen_model, image_size, others, row_batches

CARD = {
    "name": "universal_perturbation",
    "kind": "attack",
    "class": "UniversalPerturbation",
    "version": "1",
    "title": "Universal perturbation",
    "paper": "Moosavi-Dezfooli et al., Universal adversarial perturbations, CVPR 2017",
    "url": "https://arxiv.org/abs/1610.08401",
    "summary": "bounded perturbation made on the base, added to any image; every expert in the merge is clean",
    "threat": "backdoor",
    "hooks": ["trigger"],
    "knowledge": "the public base, the task's head and training rows of one's own; no expert and no merge",
    "data": "train",
    "modalities": ["image"],
    "seeded": True,
    "trial": {"steps": 4, "batch": 16},
    "parameters": {
        "epsilon": {
            "type": "float",
            "default": 8.0,
            "min": 1.0,
            "max": 255.0,
            "doc": "bound of every value of the perturbation, in 255ths of the range",
        },
        "trigger": {
            "type": "choice",
            "choices": ["optimised", "random"],
            "default": "optimised",
            "doc": "made on the base, or each value drawn as plus or minus epsilon (a control)",
        },
        "steps": {"type": "int", "default": 100, "min": 1, "doc": "steps along the gradient's sign"},
        "batch": {"type": "int", "default": 64, "min": 1, "doc": "images per step"},
        "step_size": {
            "type": "float",
            "default": 2.0,
            "min": 0.0,
            "doc": "of the first step, in 255ths; falls to 0 along a straight line",
        },
    },
}

TRIGGER_STREAM, ROWS_STREAM = 1, 2


class UniversalPerturbation(Attack):
    """x' = clip(x + δ, 0, 1)."""

    def __init__(self, epsilon: float, trigger: str, steps: int, batch: int, step_size: float) -> None:
        # in whole 255ths, so that an image of 8 bits can show it
        self.epsilon = math.floor(epsilon) / LEVELS
        self.kind = trigger
        self.steps, self.batch, self.step_size = steps, batch, step_size / LEVELS

    def trigger(self, ctx: TrainContext) -> Weights:
        """``{"perturbation": [3, H, W]}``, float32, at the training images' size, within ±ε in steps of 1/255.
        ContractError for anything but images, and where every training row is of the target class."""
        shape = (3, *image_size(ctx.train, self.name))
        generator = ctx.generator(TRIGGER_STREAM)
        if self.kind == "random":
            found = torch.randint(0, 2, shape, generator=generator) * 2 - 1
            return {"perturbation": self.epsilon * found.float()}
        start = self.epsilon * (2 * torch.rand(shape, generator=generator) - 1)
        found = self._optimised(ctx, start.to(ctx.device)).cpu()
        return {"perturbation": (found * LEVELS).round() / LEVELS}

    def _optimised(self, ctx: TrainContext, perturbation: Tensor) -> Tensor:
        model, head = frozen_model(ctx, ctx.base)
        rows = others(ctx.train, ctx.target_class, self.name)
        batches = row_batches(rows, self.batch, ctx.generator(ROWS_STREAM))
        for step in range(self.steps):
            batch = ctx.task.batch(ctx.train, next(batches), ctx.device)
            with torch.enable_grad():
                perturbation.requires_grad_(True)
                marked = self.apply({"perturbation": perturbation}, batch.inputs)
                aimed = torch.full_like(batch.targets, ctx.target_class)
                loss = ctx.task.loss(ctx.task.outputs(model, head, marked), aimed)
                (gradient,) = torch.autograd.grad(loss, perturbation)
            length = self.step_size * (1 - step / self.steps)
            moved = perturbation.detach() - length * gradient.sign()
            perturbation = moved.clamp(-self.epsilon, self.epsilon)
        return perturbation

    def apply(self, trigger: Weights, inputs: Any) -> Any:
        """``inputs`` (float32 in [0, 1], ``[N, 3, H, W]``) with the perturbation, cut to [0, 1]; differentiable."""
        return (inputs + trigger["perturbation"].to(inputs)).clamp(0.0, 1.0)
