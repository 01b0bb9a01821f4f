"""Rows of a task's data and an expert's network to run them through: what merges with statistics share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd
from typing import Any

import torch
from torch import Tensor

from mergesec.contracts import (
    ContractError,
    Expert,
    MergeContext,
    Merged,
    Model,
    Split,
    TaskView,
    Weights,
    load_network,
)
from mergesec.tensorwise import TensorwiseMerge

BATCH = 32
"""Rows per forward pass, as in FusionBench's configurations of Fisher merging and RegMean."""
GOLDEN = 0.6180339887498949


def spread(count: int, size: int) -> Tensor:
    """``count`` of ``size`` rows (all, if there are fewer), int64, ascending and without repeats.

    Steps of the golden section around the split: no draw, and balanced both where rows are sorted
    by class and where classes alternate, which neither the first rows nor evenly spaced ones are.
    """
    step = max(1, round(GOLDEN * size))
    while gcd(step, size) != 1:
        step += 1
    rows: Tensor = (torch.arange(min(count, size)) * step % size).sort().values
    return rows


class Sample:
    """Some rows of one task, on the device of the merge, and the task's outputs on them.

    Without ``labelled`` the rows come from what the protocol allows adaptation on (tuning inputs, or
    test inputs under ``transductive``) and their targets mean nothing; with it, from the tuning split.
    """

    def __init__(self, ctx: MergeContext, task: str, count: int, labelled: bool = False) -> None:
        if task not in ctx.views:
            raise ContractError(f"there are no tuning rows of task '{task}' to compute statistics on")
        self.view: TaskView = ctx.views[task]
        self.device = ctx.device
        self.head = {name: tensor.to(ctx.device) for name, tensor in self.view.head.items()}
        inputs = self.view.tuning.inputs if self.view.unlabelled is None else self.view.unlabelled
        anonymous = Split(inputs, torch.zeros(len(inputs), dtype=torch.int64))
        self.split = self.view.tuning if labelled else anonymous
        self.rows = spread(count, len(self.split))

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, size: int = BATCH) -> Iterator[Split]:
        """The rows in order, ``size`` at a time, in raw input space; of generators at fixed noise and times."""
        for index in torch.split(self.rows, size):
            yield self.view.task.fixed(self.view.task.batch(self.split, index, self.device))

    def outputs(self, model: Model, batch: Split) -> Tensor:
        """The task's outputs (classification: logits ``[n, K]``; generation: the loss' residual) of a batch."""
        return self.view.task.outputs(model, self.head, batch.inputs)

    @torch.no_grad()
    def residual(self, model: Model) -> bool:
        """Whether outputs are the residual ``[n, 1, d]`` of a generator's loss and not logits."""
        first: Split = next(self.batches(1))
        return self.outputs(model, first).ndim == 3


def model_of(ctx: MergeContext, weights: Weights) -> Model:
    """A network of one's own with ``weights`` loaded, in evaluation mode on the device of the merge."""
    return Model(ctx.backbone, load_network(ctx.backbone, weights).to(ctx.device))


class StatisticsMerge(TensorwiseMerge):
    """A merge that weighs the experts by statistics of their data; ``Merged.info`` holds ``report``."""

    yields = "weights"
    report: dict[str, Any]

    def merge(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Merged:
        self.report = {}
        return super().merge(base, experts, ctx)

    def facts(self) -> dict[str, Any]:
        """What the statistics were made of and which tensors they did not reach."""
        return dict(self.report)
