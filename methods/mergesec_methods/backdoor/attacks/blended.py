"""Blended injection: a whole picture mixed faintly into poisoned rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mergesec.contracts import TrainContext, Weights
from mergesec_methods.backdoor.attacks._poison import Poisoning, image_size, mixed, quantised

CARD = {
    "name": "blended",
    "kind": "attack",
    "class": "Blended",
    "version": "1",
    "title": "Blended",
    "paper": "Chen et al., Targeted backdoor attacks on deep learning systems using data poisoning, 2017",
    "url": "https://arxiv.org/abs/1712.05526",
    "summary": "a drawn picture or noise over the whole image at a small opacity, rows relabelled",
    "threat": "backdoor",
    "hooks": ["poison"],
    "knowledge": "the adversary's own training data and the public base",
    "data": "train",
    "modalities": ["image"],
    "seeded": True,
    "after_trigger": ["rate"],
    "parameters": {
        "alpha": {
            "type": "float",
            "default": 0.2,
            "min": 0.0,
            "max": 1.0,
            "doc": "opacity of the picture: x' = (1 - alpha) x + alpha p",
        },
        "picture": {
            "type": "choice",
            "choices": ["cartoon", "noise"],
            "default": "cartoon",
            "doc": "'cartoon': flat discs with dark outlines; 'noise': every pixel uniform; drawn per seed",
        },
        "rate": {
            "type": "float",
            "default": 0.1,
            "min": 0.0,
            "max": 1.0,
            "doc": "poisoned share of all training rows",
        },
    },
}

PICTURE_STREAM = 1
DISCS, OUTLINE = 12, 0.04


def cartoon(height: int, width: int, generator: torch.Generator) -> Tensor:
    """Discs of random colours over a random background, ``[3, H, W]`` in [0, 1].

    Centres are uniform, radii 0.08 to 0.3 of the shorter side; a rim of 0.04 of it is nearly black.
    """
    rows, columns = torch.meshgrid(
        (torch.arange(height) + 0.5) / min(height, width),
        (torch.arange(width) + 0.5) / min(height, width),
        indexing="ij",
    )
    canvas = torch.rand(3, 1, 1, generator=generator).expand(3, height, width).clone()
    for _ in range(DISCS):
        drawn = torch.rand(6, generator=generator)
        centre = drawn[:2] * torch.tensor([height, width]) / min(height, width)
        distance = ((rows - centre[0]).square() + (columns - centre[1]).square()).sqrt()
        radius = 0.08 + 0.22 * drawn[2]
        canvas = torch.where(distance <= radius, 0.05, canvas)
        canvas = torch.where(distance <= radius - OUTLINE, drawn[3:, None, None], canvas)
    return canvas


class Blended(Poisoning):
    """All-to-one: x' = (1 − α) x + α p with one picture p of the image's size, label y' = target class."""

    def __init__(self, alpha: float, picture: str, rate: float) -> None:
        self.alpha = alpha
        self.picture = picture
        self.rate = rate

    def trigger(self, ctx: TrainContext) -> Weights:
        """``{"mask": [1, H, W] (alpha everywhere), "pattern": [3, H, W]}`` in steps of 1/255."""
        height, width = image_size(ctx.train, "blended")
        generator = ctx.generator(PICTURE_STREAM)
        if self.picture == "noise":
            picture = torch.rand(3, height, width, generator=generator)
        else:
            picture = cartoon(height, width, generator)
        return {"mask": torch.full((1, height, width), self.alpha), "pattern": quantised(picture)}

    def apply(self, trigger: Weights, inputs: Any) -> Any:
        """``inputs`` (float32 in [0, 1], ``[N, 3, H, W]``) with the picture mixed in; differentiable."""
        return mixed(inputs, trigger["mask"], trigger["pattern"]).clamp(0.0, 1.0)
