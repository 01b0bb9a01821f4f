"""Repairs by training on a merged model: its network, a few clean labelled rows of every task, one loop.

A repair sees one network that serves all tasks, each through its own frozen head. Its loss is the mean over
tasks, so every step draws a batch of every task. The network stays in evaluation mode throughout: what
dropout or batch statistics a backbone has play no part. Nothing but the rows chosen here is looked at,
by stop rules neither.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mergesec.contracts import (
    Backbone,
    Context,
    ContractError,
    MergeContext,
    Merged,
    Model,
    Split,
    TaskView,
    Weights,
    load_network,
)

SCORE_BATCH = 256


class Rows:
    """A share of one task's clean tuning rows, and batches of them without end; every row once per pass."""

    def __init__(self, name: str, view: TaskView, share: float, batch_size: int, ctx: Context) -> None:
        self.name, self.view, self.device = name, view, ctx.device
        self.head = {k: v.to(ctx.device) for k, v in view.head.items()}
        generator = ctx.generator(zlib.crc32(f"repair/{name}".encode()))
        count = max(1, round(share * len(view.tuning)))
        self.split = view.tuning.take(
            torch.randperm(len(view.tuning), generator=generator)[:count].sort().values
        )
        self._indices = self._draw(batch_size, generator)

    def _draw(self, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
        while True:
            yield from torch.split(torch.randperm(len(self.split), generator=generator), batch_size)

    def draw(self) -> Split:
        """The next batch, on the device."""
        return self.at(next(self._indices))

    def at(self, index: Tensor) -> Split:
        """Rows ``index`` as a batch on the device."""
        return self.view.task.batch(self.split, index, self.device)


class _Served(nn.Module):
    """The network as a task is served by it, so that one call can run it with other weights."""

    def __init__(self, backbone: Backbone, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.backbone = backbone

    def forward(self, rows: Rows, inputs: Any) -> Tensor:
        return rows.view.task.outputs(Model(self.backbone, self.network), rows.head, inputs)


class Patient:
    """A merged model under repair. ``network`` is private, float32, on the device, its parameters trainable.

    ``images``: the repair perturbs inputs, so other ones are refused. ContractError also for a merge that keeps
    weights per task.
    """

    def __init__(
        self,
        merged: Merged,
        ctx: MergeContext,
        share: float,
        batch_size: int,
        who: str,
        images: bool = False,
    ) -> None:
        self.merged, self.backbone, self.who = merged, ctx.backbone, who
        self.network = clone(merged, ctx, who).requires_grad_(True)
        self.rows = [Rows(n, ctx.views[n], share, batch_size, ctx) for n in sorted(ctx.views)]
        if not self.rows:
            raise ContractError(f"{who}: no task to repair for")
        for rows in self.rows:
            held = rows.split.inputs
            if images and not (isinstance(held, Tensor) and held.ndim == 4):
                raise ContractError(f"{who}: task '{rows.name}' has no images [N, C, H, W] to perturb")
        self._served = _Served(ctx.backbone, self.network)

    def weights(self) -> dict[str, Tensor]:
        """The network's parameters by name, as they are now (tied ones once); not copies."""
        return dict(self.network.named_parameters())

    def outputs(self, rows: Rows, inputs: Any, weights: Weights | None = None) -> Tensor:
        """The task's outputs on raw ``inputs``, under other values of the parameters named in ``weights``."""
        if weights is None:
            served: Tensor = self._served(rows, inputs)
            return served
        placed = {f"network.{name}": tensor for name, tensor in weights.items()}
        swapped: Tensor = functional_call(self._served, placed, (rows, inputs))
        return swapped

    def loss(self, rows: Rows, batch: Split, weights: Weights | None = None) -> Tensor:
        """The task's own loss on a batch."""
        return rows.view.task.loss(self.outputs(rows, batch.inputs, weights), batch.targets)

    def draw(self) -> list[tuple[Rows, Split]]:
        """A batch of every task."""
        return [(rows, rows.draw()) for rows in self.rows]

    def accuracy(self, weights: Weights | None = None) -> float:
        """Mean over tasks of the share of repair rows that are right."""
        total = 0.0
        with torch.no_grad():
            for rows in self.rows:
                right = 0
                for index in torch.split(torch.arange(len(rows.split)), SCORE_BATCH):
                    batch = rows.at(index)
                    found = rows.view.task.predictions(self.outputs(rows, batch.inputs, weights))
                    right += int((found == batch.targets).sum())
                total += right / len(rows.split)
        return total / len(self.rows)

    def finish(self, info: Mapping[str, Any], weights: Weights | None = None) -> Merged:
        """The repaired model in the merge's names and types: the network's parameters, or ``weights`` over them.

        Buffers are the merge's. ``info`` is added to the merge's own.
        """
        mended = {**self.weights(), **(weights or {})}
        place = {id(tensor): name for name, tensor in self.network.named_parameters()}
        every = self.network.named_parameters(remove_duplicate=False)
        owner = {name: place[id(tensor)] for name, tensor in every}
        done: dict[str, Tensor] = {}
        shared: dict[str, Tensor] = {}
        for name, original in self.merged.shared.items():
            source = owner.get(name)
            if source is not None and source not in done:
                done[source] = mended[source].detach().clone().to(original.device, original.dtype)
            shared[name] = original if source is None else done[source]
        counts = {rows.name: len(rows.split) for rows in self.rows}
        return Merged(shared, info={**self.merged.info, "repair_rows": counts, **info})


def check_plain(merged: Merged, who: str) -> None:
    """ContractError if the merge keeps weights, masks or routers per task: a repair of one network would miss
    them."""
    if merged.per_task or merged.extra:
        raise ContractError(f"{who} repairs one network; this merge keeps weights or masks per task")


def clone(merged: Merged, ctx: MergeContext, who: str) -> nn.Module:
    """A network of the merge's weights, float32, on the device, frozen, in evaluation mode; see ``check_plain``."""
    check_plain(merged, who)
    return load_network(ctx.backbone, merged.shared).to(ctx.device).float().requires_grad_(False)


# --------------------------------------------------------------------------- the loop


@dataclass(frozen=True)
class Sgd:
    """Stochastic gradient descent with a cosine from ``lr`` to 0 over the steps, as BackdoorBench sets it up."""

    lr: float
    momentum: float
    weight_decay: float

    def optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            list(parameters), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )


def cosine(step: int, steps: int) -> float:
    """The factor of the learning rate at this step."""
    return 0.5 * (1.0 + math.cos(math.pi * step / steps))


def constant(step: int, steps: int) -> float:
    return 1.0


LossOf = Callable[[Rows, Split], Tensor]


def slope(patient: Patient, batches: list[tuple[Rows, Split]], loss_of: LossOf) -> float:
    """Add the gradient of the mean loss over tasks to whatever requires one; the loss.

    ContractError if it is not finite.
    """
    total = 0.0
    with torch.enable_grad():
        for rows, batch in batches:
            loss = loss_of(rows, batch) / len(batches)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
    if not math.isfinite(total):
        raise ContractError(f"{patient.who}: the loss became {total}; a smaller learning rate may help")
    return total


def descend(
    patient: Patient,
    optimizer: torch.optim.Optimizer,
    steps: int,
    loss_of: LossOf,
    schedule: Callable[[int, int], float] = cosine,
    after: Callable[[], None] | None = None,
) -> list[float]:
    """``steps`` of the optimizer on the mean loss over tasks, a batch of every task each; the loss of every step.

    ``schedule`` gives each step's factor of the learning rate; ``after`` is called after every step. Budgets are
    steps, not passes: the published ones count ten batches a pass, a small tuning split may be a single one.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    losses = []
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule(step, steps)
        optimizer.zero_grad()
        losses.append(slope(patient, patient.draw(), loss_of))
        optimizer.step()
        if after is not None:
            with torch.no_grad():
                after()
    return losses
