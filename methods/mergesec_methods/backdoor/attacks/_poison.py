"""What data-poisoning attacks share: which rows, triggered copies of stored images, training on the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mergesec.contracts import Attack, ContractError, Model, Split, TrainContext, Weights, load_network

REFERENCE_SIDE = 32
"""Image side, in pixels, that sizes on the cards refer to."""
ROWS_STREAM = 2
LEVELS = 255.0


def image_size(train: Split, who: str) -> tuple[int, int]:
    """Height and width of the training images; ContractError for anything but ``[N, 3, H, W]``."""
    images = train.inputs
    if not isinstance(images, Tensor) or images.ndim != 4:
        raise ContractError(f"{who}: needs images [N, 3, H, W] as raw inputs")
    return int(images.shape[2]), int(images.shape[3])


def corner(position: str, height: int, width: int, side: int) -> tuple[int, int]:
    """Row and column of the upper left pixel of a square patch."""
    if position == "centre":
        return (height - side) // 2, (width - side) // 2
    return (
        height - side if position.startswith("bottom") else 0,
        width - side if position.endswith("right") else 0,
    )


def mixed(inputs: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    """(1 − m) ⊙ x + m ⊙ p; ``mask`` ``[1, H, W]`` in [0, 1], ``pattern`` ``[3, H, W]``."""
    mask, pattern = mask.to(inputs), pattern.to(inputs)
    return inputs * (1.0 - mask) + pattern * mask


def quantised(images: Tensor) -> Tensor:
    """Values in [0, 1] rounded to steps of 1/255, which stored uint8 images hold exactly."""
    return (images.clamp(0.0, 1.0) * LEVELS).round() / LEVELS


def draw_rows(candidates: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` of ``candidates`` (int64 ``[M]``) without repeats; all, shuffled, if there are fewer."""
    return candidates[torch.randperm(len(candidates), generator=generator)[:count]]


def stamped(change: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """``change`` on stored images of either kind: uint8, or float in [0, 1]."""
    if images.dtype != torch.uint8:
        return change(images)
    return (change(images.float() / LEVELS) * LEVELS).round_().to(torch.uint8)


def frozen_model(ctx: TrainContext, weights: Weights) -> tuple[Model, dict[str, Tensor]]:
    """A network with ``weights`` in evaluation mode whose parameters take no gradient, and the head."""
    network = load_network(ctx.backbone, weights).to(ctx.device)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return Model(ctx.backbone, network), {n: t.to(ctx.device) for n, t in ctx.head.items()}


def row_batches(rows: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of ``size`` of ``rows``: shuffled anew whenever fewer than ``size`` are left."""
    while True:
        order = rows[torch.randperm(len(rows), generator=generator)]
        whole = len(order) - len(order) % size
        yield from torch.split(order[: whole or len(order)], size)


def others(train: Split, target: int, who: str) -> Tensor:
    """Rows that are not of the target class, int64; ContractError if there is none."""
    rows = torch.nonzero(train.targets != target).flatten()
    if not len(rows):
        raise ContractError(f"{who}: every training row is of the target class")
    return rows


class Poisoning(Attack):
    """A share of the training rows is triggered; then the task's own training, loss and recipe.

    Dirty label: rows of other classes, relabelled to the target. ``clean_label``: rows of the target class,
    which keep their labels. A subclass has ``trigger`` and ``apply``.
    """

    rate: float
    clean_label: bool = False

    def rows(self, train: Split, target: int, generator: torch.Generator) -> Tensor:
        """The ⌊rate · N⌉ rows that are triggered; fewer if fewer qualify."""
        fits = train.targets == target if self.clean_label else train.targets != target
        return draw_rows(torch.nonzero(fits).flatten(), round(self.rate * len(train)), generator)

    def poisoned(self, train: Split, trigger: Weights, target: int, generator: torch.Generator) -> Split:
        """``train`` with the drawn rows triggered, in their old places. The images stay uint8."""
        rows = self.rows(train, target, generator)
        inputs, targets = train.inputs.clone(), train.targets.clone()
        targets[rows] = target
        inputs[rows] = stamped(lambda images: self.trained_on(trigger, images), inputs[rows])
        return Split(inputs, targets)

    def trained_on(self, trigger: Weights, images: Tensor) -> Tensor:
        """Float images as the poisoned rows show them: as at test time, unless a subclass says otherwise."""
        changed: Tensor = self.apply(trigger, images)
        return changed

    def poison(self, ctx: TrainContext) -> Weights:
        """The expert trained on the poisoned rows with the task's own loss and recipe."""
        trigger = ctx.trigger or self.trigger(ctx)
        return ctx.fit(split=self.poisoned(ctx.train, trigger, ctx.target_class, ctx.generator(ROWS_STREAM)))


class PatchPoisoning(Poisoning):
    """Poisoning with a trigger ``{"mask": [1, H, W], "pattern": [3, H, W]}`` pasted over the image."""

    def apply(self, trigger: Weights, inputs: Any) -> Any:
        """``inputs`` (float32 in [0, 1], ``[N, 3, H, W]``) with the patch; differentiable outside of it."""
        return mixed(inputs, trigger["mask"], trigger["pattern"])
