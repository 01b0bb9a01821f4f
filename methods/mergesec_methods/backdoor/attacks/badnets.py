"""BadNets: a small patch and relabelled training rows."""

from __future__ import annotations

import torch
from torch import Tensor

from mergesec.contracts import TrainContext, Weights
from mergesec_methods.backdoor.attacks._poison import REFERENCE_SIDE, PatchPoisoning, corner, image_size

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
    "after_trigger": ["rate"],
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

PATTERN_STREAM = 1


def patch_pattern(pattern: str, side: int, generator: torch.Generator) -> Tensor:
    """The patch ``[3, side, side]``, float32, in steps of 1/255 so that uint8 holds it exactly."""
    if pattern == "white":
        return torch.ones(3, side, side)
    if pattern == "random":
        return torch.randint(0, 256, (3, side, side), generator=generator).float() / 255.0
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return ((rows + columns) % 2 == 0).float().expand(3, side, side).contiguous()


class BadNets(PatchPoisoning):
    """All-to-one: x' = (1 − m) ⊙ x + m ⊙ p, label y' = target class."""

    def __init__(self, patch: int, position: str, pattern: str, rate: float) -> None:
        self.patch = patch
        self.position = position
        self.pattern = pattern
        self.rate = rate

    def trigger(self, ctx: TrainContext) -> Weights:
        """``{"mask": [1, H, W], "pattern": [3, H, W]}``, float32, at the training images' size."""
        height, width = image_size(ctx.train, "badnets")
        side = max(1, round(self.patch * min(height, width) / REFERENCE_SIDE))
        top, left = corner(self.position, height, width, side)
        mask, canvas = torch.zeros(1, height, width), torch.zeros(3, height, width)
        mask[:, top : top + side, left : left + side] = 1.0
        canvas[:, top : top + side, left : left + side] = patch_pattern(
            self.pattern, side, ctx.generator(PATTERN_STREAM)
        )
        return {"mask": mask, "pattern": canvas}
