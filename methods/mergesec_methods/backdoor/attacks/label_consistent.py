"""Label-consistent attack: target-class rows made hard by an adversarial perturbation, then marked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mergesec.contracts import Split, TrainContext, Weights
from mergesec_methods.backdoor.attacks._poison import (
    LEVELS,
    REFERENCE_SIDE,
    ROWS_STREAM,
    Poisoning,
    corner,
    frozen_model,
    image_size,
    stamped,
)

CARD = {
    "name": "label_consistent",
    "kind": "attack",
    "class": "LabelConsistent",
    "version": "1",
    "title": "Label-consistent",
    "paper": "Turner et al., Label-consistent backdoor attacks, 2019",
    "url": "https://arxiv.org/abs/1912.02771",
    "summary": "target-class rows perturbed against the base and marked in the corners; labels stay right",
    "threat": "backdoor",
    "hooks": ["poison"],
    "knowledge": "the adversary's own training data and the public base",
    "data": "train",
    "modalities": ["image"],
    "seeded": False,
    "trial": {"steps": 3},
    "after_trigger": ["epsilon", "step_size", "steps", "reduced_amplitude", "rate"],
    "parameters": {
        "epsilon": {
            "type": "float",
            "default": 8.0,
            "min": 0.0,
            "max": 255.0,
            "doc": "largest change of a pixel by the perturbation, in grey levels of 255",
        },
        "step_size": {
            "type": "float",
            "default": 1.5,
            "min": 0.0,
            "max": 255.0,
            "doc": "one PGD step, in grey levels of 255",
        },
        "steps": {
            "type": "int",
            "default": 100,
            "min": 0,
            "max": 10000,
            "doc": "PGD steps",
        },
        "patch": {
            "type": "int",
            "default": 3,
            "min": 1,
            "max": 16,
            "doc": "side of each corner's mark in pixels of a 32-pixel image; scaled to other sizes",
        },
        "corners": {
            "type": "choice",
            "choices": ["all", "bottom-right"],
            "default": "all",
            "doc": "which corners are marked",
        },
        "reduced_amplitude": {
            "type": "float",
            "default": 1.0,
            "min": 0.0,
            "max": 1.0,
            "doc": "strength of the mark on the poisoned rows, of the full range; at test time it is full",
        },
        "rate": {
            "type": "float",
            "default": 0.1,
            "min": 0.0,
            "max": 1.0,
            "doc": "poisoned share of all training rows; at most the target class's rows",
        },
    },
}

PGD_BATCH = 64
ALL_CORNERS = ("top-left", "top-right", "bottom-left", "bottom-right")


class LabelConsistent(Poisoning):
    """x' = clip(PGD(x) + a·s) on rows of the target class, s the ±1 marks in the corners."""

    clean_label = True

    def __init__(
        self, epsilon: float, step_size: float, steps: int, patch: int, corners: str,
        reduced_amplitude: float, rate: float,
    ) -> None:  # fmt: skip
        self.epsilon = epsilon / LEVELS
        self.step_size = step_size / LEVELS
        self.steps = steps
        self.patch = patch
        self.corners = ALL_CORNERS if corners == "all" else (corners,)
        self.amplitude = reduced_amplitude
        self.rate = rate

    def trigger(self, ctx: TrainContext) -> Weights:
        """``{"signs": [1, H, W]}``: +1 and −1 in a checkerboard on each mark, 0 elsewhere."""
        height, width = image_size(ctx.train, "label_consistent")
        side = max(1, round(self.patch * min(height, width) / REFERENCE_SIDE))
        cell = max(1, side // self.patch)
        index = (torch.arange(side) // cell) % 2
        board = 1.0 - 2.0 * ((index[:, None] + index[None]) % 2).float()
        signs = torch.zeros(1, height, width)
        for position in self.corners:
            top, left = corner(position, height, width, side)
            signs[0, top : top + side, left : left + side] = board
        return {"signs": signs}

    def apply(self, trigger: Weights, inputs: Any) -> Any:
        """``inputs`` (float32 in [0, 1], ``[N, 3, H, W]``) with the marks at full amplitude: black and white."""
        return (inputs + trigger["signs"].to(inputs)).clamp(0.0, 1.0)

    def trained_on(self, trigger: Weights, images: Tensor) -> Tensor:
        """Images with the marks at the amplitude of the poisoned rows."""
        return (images + self.amplitude * trigger["signs"].to(images)).clamp(0.0, 1.0)

    def perturbed(self, ctx: TrainContext, rows: Tensor) -> Tensor:
        """Rows ``[n, 3, H, W]``, as stored, after L∞ PGD from the image itself that raises the base's loss
        of the true label."""
        model, head = frozen_model(ctx, ctx.base)
        done = [ctx.train.inputs[:0]]
        for index in torch.split(rows, PGD_BATCH):
            batch = ctx.task.batch(ctx.train, index, ctx.device)
            images = batch.inputs
            low, high = (images - self.epsilon).clamp_min(0.0), (images + self.epsilon).clamp_max(1.0)
            for _ in range(self.steps):
                images = images.detach().requires_grad_(True)
                loss = ctx.task.loss(ctx.task.outputs(model, head, images), batch.targets)
                (gradient,) = torch.autograd.grad(loss, images)
                images = (images.detach() + self.step_size * gradient.sign()).clamp(low, high)
            done.append(stored(images.detach().cpu(), ctx.train.inputs.dtype))
        return torch.cat(done)

    def poison(self, ctx: TrainContext) -> Weights:
        """The expert trained with the task's own loss and recipe on the marked rows in their old places."""
        trigger = ctx.trigger or self.trigger(ctx)
        rows = self.rows(ctx.train, ctx.target_class, ctx.generator(ROWS_STREAM))
        inputs = ctx.train.inputs.clone()
        changed = self.perturbed(ctx, rows)
        inputs[rows] = stamped(lambda images: self.trained_on(trigger, images), changed)
        return ctx.fit(split=Split(inputs, ctx.train.targets.clone()))


def stored(images: Tensor, kind: torch.dtype) -> Tensor:
    """Float images in [0, 1] as the split stores them."""
    return (images * LEVELS).round_().to(torch.uint8) if kind == torch.uint8 else images.to(kind)
