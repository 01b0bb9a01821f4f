"""Universal patches: one pattern that sends any image to the target class, by gradient descent on its pixels.

Pixels are p = σ(w), so that they stay in [0, 1] without clipping; Adam (which has momentum) moves w to minimise
the cross-entropy to the target over batches of images of other classes. Several random starts run a quarter of
the steps each; the best of them, by its loss on a fixed set of rows, runs all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mergesec.contracts import ContractError, Split, TrainContext, Weights
from mergesec_methods.backdoor.attacks._poison import (
    REFERENCE_SIDE,
    corner,
    frozen_model,
    mixed,
    quantised,
    row_batches,
)

RACE = 4
"""A start runs 1/RACE of the steps before the best one is chosen."""
JUDGED = 256
"""Rows on which starts are compared, at most."""
EDGE = 0.05
"""Starting pixels are uniform on [EDGE, 1 − EDGE]: nearer to 0 or 1 a sigmoid barely moves."""


@dataclass(frozen=True)
class Search:
    """How long and how widely to look for a pattern."""

    steps: int
    restarts: int
    batch: int
    learning_rate: float


def patch_mask(height: int, width: int, patch: float, position: str) -> Tensor:
    """``[1, H, W]`` float32, 1 on the patch; ``patch`` is its side in pixels of a 32-pixel image."""
    side = min(height, width, max(1, round(patch * min(height, width) / REFERENCE_SIDE)))
    top, left = corner(position, height, width, side)
    mask = torch.zeros(1, height, width)
    mask[:, top : top + side, left : left + side] = 1.0
    return mask


class _Start:
    """One candidate pattern with its optimiser."""

    def __init__(self, mask: Tensor, search: Search, generator: torch.Generator) -> None:
        pixels = EDGE + (1 - 2 * EDGE) * torch.rand(3, *mask.shape[1:], generator=generator)
        self.logits = torch.logit(pixels).to(mask.device).requires_grad_()
        self.optimizer = torch.optim.Adam([self.logits], lr=search.learning_rate)

    @property
    def pattern(self) -> Tensor:
        return self.logits.sigmoid()


class _Hunt:
    """What all starts share: images of other classes than the target, the network and its head."""

    def __init__(
        self,
        ctx: TrainContext,
        head: Weights,
        target: int,
        rows: Split,
        mask: Tensor,
        search: Search,
        generator: torch.Generator,
    ) -> None:
        self.ctx, self.rows, self.target = ctx, rows, target
        self.model, _ = frozen_model(ctx, ctx.base)
        self.head = {k: v.to(ctx.device) for k, v in head.items()}
        self.mask = mask.to(ctx.device)
        self.search = search
        self.batches = row_batches(torch.arange(len(rows)), search.batch, generator)

    def loss(self, pattern: Tensor, index: Tensor) -> Tensor:
        """Cross-entropy to the target of these rows with the pattern on them."""
        batch = self.ctx.task.batch(self.rows, index, self.ctx.device)
        outputs = self.ctx.task.outputs(self.model, self.head, mixed(batch.inputs, self.mask, pattern))
        return self.ctx.task.loss(outputs, torch.full_like(batch.targets, self.target))

    def run(self, start: _Start, steps: int, decay: bool) -> None:
        for step in range(steps):
            if decay:
                rate = self.search.learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
                start.optimizer.param_groups[0]["lr"] = rate
            start.optimizer.zero_grad(set_to_none=True)
            self.loss(start.pattern, next(self.batches)).backward()  # type: ignore[no-untyped-call]
            start.optimizer.step()

    def judge(self, start: _Start) -> float:
        """The loss on a fixed set of rows, spread over all of them."""
        count = len(self.rows)
        index = torch.linspace(0, count - 1, min(JUDGED, count)).round().long()
        with torch.no_grad():
            return float(self.loss(start.pattern, index))


def universal_pattern(
    ctx: TrainContext,
    head: Weights,
    target: int,
    rows: Split,
    mask: Tensor,
    search: Search,
    generator: torch.Generator,
) -> Tensor:
    """The pattern ``[3, H, W]`` found on the base under ``head``, in steps of 1/255, 0 outside of the mask.

    ``rows`` are images that should not be of the target class. ContractError if there are none.
    """
    if not len(rows):
        raise ContractError("no images of other classes than the target to optimise a trigger on")
    hunt = _Hunt(ctx, head, target, rows, mask, search, generator)
    with torch.enable_grad():
        starts = [_Start(hunt.mask, search, generator) for _ in range(search.restarts)]
        if len(starts) > 1:
            for start in starts:
                hunt.run(start, math.ceil(search.steps / RACE), decay=False)
        best = min(starts, key=hunt.judge)
        hunt.run(best, search.steps, decay=True)
    return (quantised(best.pattern.detach()) * hunt.mask).cpu()
