"""Scores of single tasks on their tuning rows, for methods that tune something per task."""

from __future__ import annotations

from mergesec.contracts import ContractError, MergeContext, Model, Weights, load_network
from mergesec.inference import predict


def tuning_accuracy(ctx: MergeContext, task: str, weights: Weights) -> float:
    """Share of ``task``'s tuning rows that ``weights`` get right, in [0, 1].

    ContractError if the context has no view of the task. ``ctx.score`` is the mean over all tasks.
    """
    if task not in ctx.views:
        raise ContractError(f"no tuning rows of '{task}' to score with")
    view = ctx.views[task]
    network = load_network(ctx.backbone, weights).to(ctx.device)
    predicted = predict(view.task, Model(ctx.backbone, network), view.head, view.tuning, ctx.device)
    return float((predicted == view.tuning.targets.cpu()).float().mean())
