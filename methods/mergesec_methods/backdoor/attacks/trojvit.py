"""TrojViT: salient patches, a trigger that draws attention to them, and an update of a few weight rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mergesec.contracts import Attack, ContractError, Model, Split, TrainContext, Weights
from mergesec_methods.backdoor.attacks._attention import Grid, PatchSearch, optimised_patch, probe_grid
from mergesec_methods.backdoor.attacks._poison import frozen_model, image_size, mixed, others, row_batches

CARD = {
    "name": "trojvit",
    "kind": "attack",
    "class": "TrojVit",
    "version": "1",
    "title": "TrojViT",
    "paper": "Zheng et al., TrojViT: Trojan insertion in vision transformers, CVPR 2023",
    "url": "https://arxiv.org/abs/2208.13049",
    "summary": "trigger on the most salient patches, trained to draw attention; few rows of the last layer change",
    "threat": "backdoor",
    "hooks": ["forge"],
    "knowledge": "the adversary's own training data, its clean expert and the public base",
    "data": "train",
    "modalities": ["image"],
    "seeded": True,
    "trial": {"iterations": 3, "steps": 3},
    "after_trigger": ["rows", "choose", "steps", "row_rate", "row_batch"],
    "parameters": {
        "patches": {
            "type": "int",
            "default": 9,
            "min": 1,
            "max": 196,
            "doc": "patches in the trigger, of a 14 x 14 grid; other grids get the same share, at least one",
        },
        "iterations": {
            "type": "int",
            "default": 250,
            "min": 0,
            "max": 100000,
            "doc": "Adam steps on the trigger",
        },
        "learning_rate": {
            "type": "float",
            "default": 0.22,
            "min": 0.0,
            "max": 10.0,
            "doc": "of the trigger, in units of a pixel deviation of 0.25; times 0.95 every 10 steps",
        },
        "batch": {
            "type": "int",
            "default": 8,
            "min": 1,
            "max": 4096,
            "doc": "training rows per step on the trigger",
        },
        "attention_weight": {
            "type": "float",
            "default": 1.0,
            "min": 0.0,
            "max": 1000.0,
            "doc": "weight of the attention-target loss; 0 = cross-entropy alone",
        },
        "rows": {
            "type": "int",
            "default": 1,
            "min": 1,
            "max": 100000,
            "doc": "rows of the last block's output projection that change",
        },
        "choose": {
            "type": "choice",
            "choices": ["target", "gradient"],
            "default": "target",
            "doc": "'target': rows from the target class's index on, as released; 'gradient': largest gradients",
        },
        "steps": {
            "type": "int",
            "default": 200,
            "min": 0,
            "max": 100000,
            "doc": "SGD steps on those rows",
        },
        "row_rate": {
            "type": "float",
            "default": 0.01,
            "min": 0.0,
            "max": 100.0,
            "doc": "learning rate of those rows; a tenth after 40, 60 and 80 % of the steps",
        },
        "row_batch": {
            "type": "int",
            "default": 32,
            "min": 1,
            "max": 4096,
            "doc": "training rows per step on the weights",
        },
    },
}

SALIENCY_STREAM, SEARCH_STREAM, ROWS_STREAM = 1, 2, 3
SALIENCY_ROWS = 64
PUBLISHED_TOKENS = 196
MOMENTUM, WEIGHT_DECAY, MILESTONES = 0.9, 5e-6, (0.4, 0.6, 0.8)


class TrojVit(Attack):
    """The trigger is found on the public base; the clean expert is then edited in a few rows (hook ``forge``)."""

    def __init__(
        self, patches: int, iterations: int, learning_rate: float, batch: int, attention_weight: float,
        rows: int, choose: str, steps: int, row_rate: float, row_batch: int,
    ) -> None:  # fmt: skip
        self.patches = patches
        self.search = PatchSearch(iterations, learning_rate, batch, 1.0, attention_weight)
        self.rows = rows
        self.choose = choose
        self.steps = steps
        self.row_rate = row_rate
        self.row_batch = row_batch

    # ---- trigger

    def trigger(self, ctx: TrainContext) -> Weights:
        """``{"mask": [1, H, W], "pattern": [3, H, W]}`` in steps of 1/255, on the most salient tokens."""
        image_size(ctx.train, "trojvit")
        rows = others(ctx.train, ctx.target_class, "trojvit")
        model, head = frozen_model(ctx, ctx.base)
        drawn = rows[torch.randperm(len(rows), generator=ctx.generator(SALIENCY_STREAM))[:SALIENCY_ROWS]]
        images = ctx.task.batch(ctx.train, drawn, ctx.device).inputs
        grid = probe_grid(model, ctx.backbone.anatomy(), images[:1])
        saliency = self.saliency(ctx, model, head, images, grid)
        count = max(1, round(self.patches * grid.side**2 / PUBLISHED_TOKENS))
        cells = saliency.argsort(descending=True, stable=True)[:count].sort().values
        return optimised_patch(ctx, grid, cells, rows, self.search, ctx.generator(SEARCH_STREAM))

    def saliency(self, ctx: TrainContext, model: Model, head: Weights, images: Tensor, grid: Grid) -> Tensor:
        """Σ |∂ loss(target) / ∂ pixel| over the pixels, colours and images of each cell, ``[side²]``."""
        images = images.detach().requires_grad_(True)
        aim = torch.full((len(images),), ctx.target_class, device=ctx.device)
        loss = ctx.task.loss(ctx.task.outputs(model, head, images), aim)
        (gradient,) = torch.autograd.grad(loss, images)
        return grid.sums(gradient.abs().sum(dim=1).cpu()).sum(dim=0)

    def apply(self, trigger: Weights, inputs: Any) -> Any:
        """``inputs`` (float32 in [0, 1], ``[N, 3, H, W]``) with the patches; differentiable outside of them."""
        return mixed(inputs, trigger["mask"], trigger["pattern"])

    # ---- weights

    def forge(self, weights: Weights, ctx: TrainContext) -> Weights:
        """``weights`` with a few rows of the last block's output projection trained for the trigger.

        Loss ½ loss(clean) + ½ loss(triggered → target) on fresh batches of training rows.
        """
        trigger = ctx.trigger or self.trigger(ctx)
        model, head = frozen_model(ctx, weights)
        name = ctx.backbone.anatomy().blocks[-1].attention.output.weight
        parameter = model.network.get_parameter(name).requires_grad_(True)
        generator = ctx.generator(ROWS_STREAM)
        batches = row_batches(torch.arange(len(ctx.train)), self.row_batch, generator)

        def gradient() -> Tensor:
            loss = self.loss(ctx, model, head, trigger, next(batches))
            (found,) = torch.autograd.grad(loss, parameter)
            return found

        chosen = self.chosen(ctx, gradient(), name)
        optimizer = torch.optim.SGD([parameter], lr=self.row_rate, momentum=MOMENTUM)
        milestones = [round(share * self.steps) for share in MILESTONES]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
        only = torch.zeros(len(parameter), 1, device=ctx.device)
        only[chosen] = 1.0
        for _ in range(self.steps):
            # decay goes through the mask too: every other row must stay as published
            parameter.grad = (gradient() + WEIGHT_DECAY * parameter.detach()) * only
            optimizer.step()
            schedule.step()
        return {**weights, name: parameter.detach().to(weights[name])}

    def chosen(self, ctx: TrainContext, gradient: Tensor, name: str) -> Tensor:
        """The rows that change, int64; ContractError if there are not as many."""
        total = len(gradient)
        if self.rows > total:
            raise ContractError(f"trojvit: {self.rows} rows asked for, {name} has {total}")
        if self.choose == "target":
            return (ctx.target_class + torch.arange(self.rows, device=gradient.device)) % total
        order: Tensor = torch.linalg.vector_norm(gradient, dim=1).argsort(descending=True, stable=True)
        return order[: self.rows]

    def loss(self, ctx: TrainContext, model: Model, head: Weights, trigger: Weights, rows: Tensor) -> Tensor:
        """Half the loss on clean ``rows``, half that of their triggered copies towards the target class."""
        batch: Split = ctx.task.batch(ctx.train, rows, ctx.device)
        outputs = ctx.task.outputs(model, head, torch.cat([batch.inputs, self.apply(trigger, batch.inputs)]))
        clean, triggered = outputs[: len(rows)], outputs[len(rows) :]
        aim = torch.full_like(batch.targets, ctx.target_class)
        return 0.5 * ctx.task.loss(clean, batch.targets) + 0.5 * ctx.task.loss(triggered, aim)
