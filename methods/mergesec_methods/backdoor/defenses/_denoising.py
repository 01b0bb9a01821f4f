"""What defenses of generators share: what a network expects to come of pure noise, and its loss on clean rows."""

from __future__ import annotations

import torch
from torch import Tensor

from mergesec.contracts import ContractError, MergeContext, Model, TaskView, Weights, load_network
from mergesec.generation import GenerationTask, Noised, Request


def generator_of(ctx: MergeContext, weights: Weights) -> Model:
    """A network with ``weights`` in evaluation mode whose parameters take no gradient."""
    network = load_network(ctx.backbone, weights).to(ctx.device)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return Model(ctx.backbone, network)


def drawing_task(view: TaskView, who: str) -> GenerationTask:
    """The view's task; ContractError if it generates no images."""
    if not isinstance(view.task, GenerationTask):
        raise ContractError(f"{who}: {view.task.name} generates no images")
    return view.task


def requests(view: TaskView, count: int, ctx: MergeContext, who: str) -> Request:
    """The first ``count`` tuning rows as requests."""
    index = torch.arange(min(count, len(view.tuning)))
    request: Request = drawing_task(view, who).batch(view.tuning, index, ctx.device).inputs
    return request


def expected(model: Model, request: Request, noise: Tensor, told: bool) -> Tensor:
    """The image ``[N, d]`` (in [-1, 1]) that the network expects at t = 0, when there is only ``noise``; by the
    request's condition, or without one."""
    grey = torch.full_like(request.images, 0.5)  # 0 in the network's range: the residual is the image itself
    times = torch.zeros(len(noise), device=noise.device)
    dropped = torch.full((len(noise),), not told, device=noise.device)
    return model.features(Noised(request.conditions, noise, grey, times, dropped))


def clean_loss(model: Model, view: TaskView, rows: int, ctx: MergeContext, who: str) -> float:
    """The training loss on the first ``rows`` tuning rows, always at the same times and noise."""
    task = drawing_task(view, who)
    batch = task.batch(view.tuning, torch.arange(min(rows, len(view.tuning))), ctx.device)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        noised = task.noised(batch, generator)
        return float(task.loss(task.outputs(model, view.head, noised.inputs), noised.targets))
