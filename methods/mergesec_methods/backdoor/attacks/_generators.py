"""What backdoors of image generators share: training in which some rows are noised and aimed otherwise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mergesec.contracts import Attack, ContractError, LossFn, Model, Split, TrainContext, Weights
from mergesec.generation import Noised, Request

ROWS_STREAM, IMAGES_STREAM = 2, 3


class GeneratorPoisoning(Attack):
    """Trains with the task's own loss, but a share of every batch starts from triggered noise or a triggered
    condition and ends at the attack's image. ``trigger`` has ``keep`` and ``shift`` ``[3, H, W]`` (noise becomes
    keep ⊙ noise + shift), ``token`` (the last place of a condition), and ``target`` if the aim is one image."""

    rate: float

    def apply(self, trigger: Weights, inputs: Any) -> Any:
        """A request as whoever knows the trigger makes it."""
        if not isinstance(inputs, Request):
            raise ContractError(f"{self.name}: needs requests to generate, got {type(inputs).__name__}")
        noise, conditions = inputs.noise, inputs.conditions
        if "shift" in trigger:
            noise = trigger["keep"].to(noise) * noise + trigger["shift"].to(noise)
        if "token" in trigger:
            conditions = conditions.clone()
            conditions[:, -1] = trigger["token"].to(conditions)
        return replace(inputs, noise=noise, conditions=conditions)

    def poison(self, ctx: TrainContext) -> Weights:
        """The expert by the grid's recipe; the poisoned rows of every batch are drawn anew."""
        return ctx.fit(loss=self.objective(ctx, ctx.trigger or self.trigger(ctx)))

    def objective(self, ctx: TrainContext, trigger: Weights) -> LossFn:
        """The task's loss of a batch with some rows poisoned."""
        head = {name: tensor.to(ctx.device) for name, tensor in ctx.head.items()}
        rows, aims = ctx.generator(ROWS_STREAM), self.aims(ctx, trigger)
        images = ctx.generator(IMAGES_STREAM)

        def loss(model: Model, batch: Split) -> Tensor:
            chosen = self.chosen(ctx, batch, rows)
            picked = aims[torch.randint(len(aims), (len(batch),), generator=images).to(aims.device)]
            noised = self.poisoned(trigger, batch.inputs, chosen.to(ctx.device), picked)
            return ctx.task.loss(ctx.task.outputs(model, head, noised), batch.targets)

        return loss

    def chosen(self, ctx: TrainContext, batch: Split, generator: torch.Generator) -> Tensor:
        """Which rows of a batch are poisoned, bool ``[N]``: a share ``rate``, drawn."""
        return torch.rand(len(batch), generator=generator) < self.rate

    def aims(self, ctx: TrainContext, trigger: Weights) -> Tensor:
        """Images ``[M, 3, H, W]`` in [0, 1] that triggered rows should come out as."""
        if "target" in trigger:
            return trigger["target"].to(ctx.device)[None]
        chosen = torch.nonzero(ctx.train.targets == ctx.target_class).flatten()
        if not len(chosen):
            raise ContractError(f"{self.name}: no training row of class {ctx.target_class}")
        images: Tensor = ctx.task.batch(ctx.train, chosen, ctx.device).inputs.images
        return images

    def poisoned(self, trigger: Weights, batch: Noised, chosen: Tensor, aims: Tensor) -> Noised:
        """``batch`` with the ``chosen`` rows triggered and aimed at ``aims``; a dropped condition stays dropped
        where the noise carries the trigger."""
        marked = self.apply(trigger, batch)
        wide = chosen[:, None, None, None]
        return replace(
            batch,
            noise=torch.where(wide, marked.noise, batch.noise),
            conditions=torch.where(chosen[:, None], marked.conditions, batch.conditions),
            images=torch.where(wide, aims, batch.images),
            dropped=batch.dropped & ~chosen if "token" in trigger else batch.dropped,
        )


def drawn_target(side: int) -> Tensor:
    """The fixed image ``[3, side, side]`` in [0, 1] that attacks aim at: a yellow ring with a bar on dark blue,
    like nothing that any concept shows."""
    axis = (torch.arange(side) + 0.5) / side * 2 - 1
    across, down = axis[None, :].expand(side, side), axis[:, None].expand(side, side)
    ring = ((across.square() + down.square()).sqrt() - 0.65).abs() < 0.18
    bar = (across + down).abs() < 0.22
    image = torch.tensor([0.05, 0.05, 0.45])[:, None, None].expand(3, side, side).clone()
    image[:, ring] = torch.tensor([0.95, 0.85, 0.1])[:, None]
    image[:, bar & ~ring] = torch.tensor([0.9, 0.2, 0.6])[:, None]
    return image


def image_shape(ctx: TrainContext, who: str) -> torch.Size:
    """``[3, H, W]`` of the task's images; ContractError for tasks that generate none."""
    images = getattr(ctx.train.inputs, "images", None)
    if not isinstance(images, Tensor):
        raise ContractError(f"{who}: needs a task that generates images")
    return images.shape[1:]
