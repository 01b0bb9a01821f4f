"""Predictions of a network on a split, in batches and without gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mergesec.contracts import (
    Model,
    Split,
    Task,
    Weights,
)

EVALUATION_BATCH = 256


RESIDENT = 2 << 30
"""Bytes of a split's inputs up to which they stay on a device between passes."""


def resident(split: Split, device: torch.device) -> Split:
    """``split`` with its inputs on ``device``, if they are one tensor that is not too large; for what takes batches
    of it more than once."""
    inputs = split.inputs
    if not isinstance(inputs, Tensor) or inputs.device == device or inputs.nbytes > RESIDENT:
        return split
    return split.with_inputs(inputs.to(device))


def predict(
    task: Task, model: Model, head: Weights, split: Split, device: torch.device,
    change: Callable[[Any], Any] | None = None,
) -> Tensor:  # fmt: skip
    """Predictions int64 ``[N]`` (on the CPU); ``change`` is applied to raw inputs first."""
    return task_outputs(task, model, head, split, device, change, task.predictions).long()


def task_outputs(
    task: Task, model: Model, head: Weights, split: Split, device: torch.device,
    change: Callable[[Any], Any] | None = None, read: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Outputs of a whole split, batched, without gradients; ``read`` reduces each batch."""
    found = []
    with torch.inference_mode():
        for index in torch.split(torch.arange(len(split)), EVALUATION_BATCH):
            inputs = task.batch(split, index, device).inputs
            outputs = task.outputs(model, head, change(inputs) if change else inputs)
            found.append((read(outputs) if read else outputs).cpu())
    return torch.cat(found)


def task_served(task: Task, model: Model, head: Weights, split: Split, device: torch.device) -> Tensor:
    """What a user gets for every row of a split, on the CPU."""
    found = []
    with torch.inference_mode():
        for index in torch.split(torch.arange(len(split)), EVALUATION_BATCH):
            found.append(task.served(model, head, task.batch(split, index, device).inputs).cpu())
    return torch.cat(found)
