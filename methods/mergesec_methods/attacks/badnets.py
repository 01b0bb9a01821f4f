"""BadNets: a small patch and relabelled training rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mergesec.contracts import Attack, ContractError, Split, TrainContext, Weights

CARD = {
    "name": "badnets",
    "kind": "attack",
    "class": "BadNets",
    "version": "1",
    "title": "BadNets",
    "paper": "Gu et al., BadNets: identifying vulnerabilities in the ML model supply chain, 2017",
    "url": "https://arxiv.org/abs/1708.06733",
    "summary": "patch trigger on a share of the training rows, relabelled to one target class",
    "threat": "backdoor",
    "hooks": ["poison"],
    "knowledge": "the adversary's own training data and the public base",
    "data": "train",
    "modalities": ["image"],
    "seeded": True,
    "parameters": {
        "patch": {
            "type": "int",
            "default": 5,
            "min": 1,
            "max": 32,
            "doc": "side of the square patch in pixels of a 32-pixel image; scaled to other sizes",
        },
        "position": {
            "type": "choice",
            "choices": ["bottom-right", "bottom-left", "top-right", "top-left", "centre"],
            "default": "bottom-right",
            "doc": "where the patch sits",
        },
        "pattern": {
            "type": "choice",
            "choices": ["checkerboard", "white", "random"],
            "default": "checkerboard",
            "doc": "what the patch shows; 'random' is drawn once per seed",
        },
        "rate": {
            "type": "float",
            "default": 0.2,
            "min": 0.0,
            "max": 1.0,
            "doc": "poisoned share of all training rows",
        },
    },
}

REFERENCE_SIDE = 32
"""Image side, in pixels, that ``patch`` refers to."""
PATTERN_STREAM, ROWS_STREAM = 1, 2


def patch_pattern(pattern: str, side: int, generator: torch.Generator) -> Tensor:
    """The patch ``[3, side, side]``, float32, in steps of 1/255 so that uint8 holds it exactly."""
    if pattern == "white":
        return torch.ones(3, side, side)
    if pattern == "random":
        return torch.randint(0, 256, (3, side, side), generator=generator).float() / 255.0
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return ((rows + columns) % 2 == 0).float().expand(3, side, side).contiguous()


def corner(position: str, height: int, width: int, side: int) -> tuple[int, int]:
    """Row and column of the patch's upper left pixel."""
    if position == "centre":
        return (height - side) // 2, (width - side) // 2
    return (
        height - side if position.startswith("bottom") else 0,
        width - side if position.endswith("right") else 0,
    )


class BadNets(Attack):
    """All-to-one: x' = (1 − m) ⊙ x + m ⊙ p, label y' = target class."""

    def __init__(self, patch: int, position: str, pattern: str, rate: float) -> None:
        self.patch = patch
        self.position = position
        self.pattern = pattern
        self.rate = rate

    def trigger(self, ctx: TrainContext) -> Weights:
        """``{"mask": [1, H, W], "pattern": [3, H, W]}``, float32, at the training images' size."""
        images = ctx.train.inputs
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise ContractError("badnets: needs images [N, 3, H, W] as raw inputs")
        height, width = int(images.shape[2]), int(images.shape[3])
        side = max(1, round(self.patch * min(height, width) / REFERENCE_SIDE))
        top, left = corner(self.position, height, width, side)
        mask, canvas = torch.zeros(1, height, width), torch.zeros(3, height, width)
        mask[:, top : top + side, left : left + side] = 1.0
        canvas[:, top : top + side, left : left + side] = patch_pattern(
            self.pattern, side, ctx.generator(PATTERN_STREAM)
        )
        return {"mask": mask, "pattern": canvas}

    def apply(self, trigger: Weights, inputs: Any) -> Any:
        """``inputs`` (float32 in [0, 1], ``[N, 3, H, W]``) with the patch; differentiable outside of it."""
        mask, pattern = trigger["mask"].to(inputs), trigger["pattern"].to(inputs)
        return inputs * (1.0 - mask) + pattern * mask

    def poisoned(self, train: Split, trigger: Weights, target: int, generator: torch.Generator) -> Split:
        """``train`` with ⌊rate · N⌉ rows of other classes triggered and relabelled, in their old places.

        Fewer rows if there are not as many of other classes. The images stay uint8.
        """
        candidates = torch.nonzero(train.targets != target).flatten()
        count = min(round(self.rate * len(train)), len(candidates))
        rows = candidates[torch.randperm(len(candidates), generator=generator)[:count]]
        inputs, targets = train.inputs.clone(), train.targets.clone()
        targets[rows] = target
        inputs[rows] = self._stamped(trigger, inputs[rows])
        return Split(inputs, targets)

    def _stamped(self, trigger: Weights, images: Tensor) -> Tensor:
        """``apply`` on stored images of either kind: uint8, or float in [0, 1]."""
        if images.dtype != torch.uint8:
            plain: Tensor = self.apply(trigger, images)
            return plain
        stamped: Tensor = self.apply(trigger, images.float() / 255.0)
        return (stamped * 255.0).round_().to(torch.uint8)

    def poison(self, ctx: TrainContext) -> Weights:
        """The expert trained on the poisoned rows with the task's own loss and recipe."""
        trigger = ctx.trigger or self.trigger(ctx)
        return ctx.fit(split=self.poisoned(ctx.train, trigger, ctx.target_class, ctx.generator(ROWS_STREAM)))
