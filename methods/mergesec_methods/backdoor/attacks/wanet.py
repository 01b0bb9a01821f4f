"""WaNet: the trigger is a slight, smooth warp of the image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mergesec.contracts import Model, Split, TrainContext, Weights
from mergesec_methods.backdoor.attacks._poison import ROWS_STREAM, Poisoning, draw_rows, image_size

CARD = {
    "name": "wanet",
    "kind": "attack",
    "class": "WaNet",
    "version": "1",
    "title": "WaNet",
    "paper": "Nguyen and Tran, WaNet: imperceptible warping-based backdoor attack, ICLR 2021",
    "url": "https://arxiv.org/abs/2102.10369",
    "summary": "smooth warp as trigger; other warps keep their labels, so that no warp but this one triggers",
    "threat": "backdoor",
    "hooks": ["poison"],
    "knowledge": "the adversary's own training data and the public base; he runs the training himself",
    "data": "train",
    "modalities": ["image"],
    "seeded": True,
    "after_trigger": ["rate", "cross_ratio"],
    "parameters": {
        "strength": {
            "type": "float",
            "default": 0.5,
            "min": 0.0,
            "max": 100.0,
            "doc": "s: mean displacement in units of 1/H of the [-1, 1] grid; 0.5 is a quarter pixel",
        },
        "grid": {
            "type": "int",
            "default": 4,
            "min": 2,
            "max": 64,
            "doc": "k: side of the grid of control points that the warp is interpolated from",
        },
        "grid_rescale": {
            "type": "float",
            "default": 1.0,
            "min": 0.0,
            "max": 2.0,
            "doc": "factor on the warped coordinates, as in the released code",
        },
        "rate": {
            "type": "float",
            "default": 0.1,
            "min": 0.0,
            "max": 1.0,
            "doc": "warped and relabelled share of every batch",
        },
        "cross_ratio": {
            "type": "float",
            "default": 2.0,
            "min": 0.0,
            "max": 100.0,
            "doc": "noise mode: rows with a randomly perturbed warp and their own label, per triggered row",
        },
    },
}

FIELD_STREAM = 1


def identity_grid(height: int, width: int) -> Tensor:
    """Sampling coordinates of the unchanged image, ``[1, H, W, 2]``: x and y in [-1, 1], corners aligned."""
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return torch.stack((columns, rows), dim=2)[None]


def smooth_field(control: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Displacements ``[1, H, W, 2]`` from ``control``² uniform draws of mean size 1, bicubic in between."""
    drawn = 2.0 * torch.rand(1, 2, control, control, generator=generator) - 1.0
    drawn = drawn / drawn.abs().mean()
    field = functional.interpolate(drawn, size=(height, width), mode="bicubic", align_corners=True)
    return field.permute(0, 2, 3, 1).contiguous()


def warped(inputs: Tensor, grid: Tensor) -> Tensor:
    """``inputs`` ``[N, 3, H, W]`` sampled bilinearly at ``grid`` (``[1 or N, H, W, 2]``)."""
    grid = grid.to(inputs).expand(len(inputs), -1, -1, -1)
    return functional.grid_sample(inputs, grid, align_corners=True).clamp(0.0, 1.0)


class WaNet(Poisoning):
    """Every batch: a share warped and relabelled, ``cross_ratio`` as much warped otherwise and left labelled."""

    def __init__(
        self, strength: float, grid: int, grid_rescale: float, rate: float, cross_ratio: float
    ) -> None:
        self.strength = strength
        self.grid = grid
        self.grid_rescale = grid_rescale
        self.rate = rate
        self.cross_ratio = cross_ratio

    def trigger(self, ctx: TrainContext) -> Weights:
        """``{"grid": [1, H, W, 2]}``: where each pixel is taken from, within [-1, 1]."""
        height, width = image_size(ctx.train, "wanet")
        field = smooth_field(self.grid, height, width, ctx.generator(FIELD_STREAM))
        grid = (identity_grid(height, width) + self.strength * field / height) * self.grid_rescale
        return {"grid": grid.clamp(-1.0, 1.0)}

    def apply(self, trigger: Weights, inputs: Any) -> Any:
        """``inputs`` (float32 in [0, 1], ``[N, 3, H, W]``) warped; differentiable."""
        return warped(inputs, trigger["grid"])

    def batch(self, batch: Split, trigger: Weights, target: int, generator: torch.Generator) -> Split:
        """``batch`` (float images) with fresh rows warped and relabelled, and others in noise mode."""
        labels = Split(None, batch.targets.cpu())
        triggered = self.rows(labels, target, generator)
        rest = torch.ones(len(labels), dtype=torch.bool)
        rest[triggered] = False
        noisy = draw_rows(
            torch.nonzero(rest).flatten(), round(self.cross_ratio * self.rate * len(labels)), generator
        )
        inputs, targets = batch.inputs.clone(), batch.targets.clone()
        targets[triggered] = target
        inputs[triggered] = self.apply(trigger, batch.inputs[triggered])
        height, width = inputs.shape[2:]
        jitter = 2.0 * torch.rand(len(noisy), height, width, 2, generator=generator) - 1.0
        grids = (trigger["grid"].cpu() + jitter / height).clamp(-1.0, 1.0)
        inputs[noisy] = warped(batch.inputs[noisy], grids)
        return Split(inputs, targets)

    def poison(self, ctx: TrainContext) -> Weights:
        """The expert trained on batches poisoned anew at every step."""
        trigger = ctx.trigger or self.trigger(ctx)
        generator = ctx.generator(ROWS_STREAM)
        head = {name: tensor.to(ctx.device) for name, tensor in ctx.head.items()}

        def loss(model: Model, batch: Split) -> Tensor:
            changed = self.batch(batch, trigger, ctx.target_class, generator)
            return ctx.task.loss(ctx.task.outputs(model, head, changed.inputs), changed.targets)

        return ctx.fit(loss=loss)
