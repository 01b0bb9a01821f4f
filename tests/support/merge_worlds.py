"""Networks that are one matrix, and a micro world with trained experts: what merges with data are tried on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mergesec.anatomy import Anatomy
from mergesec.classification import ClassificationTask, linear_probe
from mergesec.conformance.micro import Bars, Blobs, MicroViT, Rings
from mergesec.contracts import (
    Backbone,
    DataContext,
    Expert,
    MergeContext,
    Model,
    Recipe,
    Split,
    Task,
    TaskView,
    Weights,
    load_network,
)
from mergesec.training import fit

CPU = torch.device("cpu")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Plain(Backbone):
    """Features are the network's output; the network is whatever ``make`` builds."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        self.make = make

    def build(self) -> nn.Module:
        return self.make()

    def base_weights(self) -> Weights:
        torch.manual_seed(0)
        return self.make().state_dict()

    def anatomy(self) -> Anatomy:
        return Anatomy(())

    def features(self, network: nn.Module, inputs: Any) -> Tensor:
        found: Tensor = network(inputs)
        return found


class Identity(ClassificationTask):
    """Logits are the features."""

    classes = ("0", "1", "2", "3")

    def load(self, ctx: DataContext) -> dict[str, Split]:
        raise AssertionError("never loaded")

    def outputs(self, model: Model, head: Weights, inputs: Any) -> Tensor:
        return model.features(inputs)


def plain_context(
    backbone: Backbone, inputs: Mapping[str, Tensor], targets: Tensor | None = None
) -> MergeContext:
    views = {}
    for task, rows in inputs.items():
        labels = torch.arange(len(rows)) % 4 if targets is None else targets
        views[task] = TaskView(Identity(), {}, Split(rows, labels), rows)
    return MergeContext(CPU, 0, backbone, views, lambda merged: 0.0)


def linear(bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4, bias=bias))


World = tuple[Weights, list[Expert], MergeContext]


@cache
def trained_world(first: int = 0) -> World:
    """Three tasks, an expert each (of seeds from ``first`` on), and what a merge is told of them."""
    torch.set_num_threads(1)
    backbone = MicroViT()
    base = backbone.base_weights()
    recipe = Recipe(learning_rate=2e-3, epochs=2, batch_size=32)
    members, views = [], {}
    tasks: dict[str, Task] = {"bars": Bars(), "blobs": Blobs(), "rings": Rings()}
    for seed, (name, task) in enumerate(tasks.items()):
        splits = task.load(DataContext(CPU, 0))
        model = Model(backbone, load_network(backbone, base))
        with torch.no_grad():
            features = model.features(task.batch(splits["train"], torch.arange(256), CPU).inputs)
        head = linear_probe(features, splits["train"].targets, 4)
        weights = fit(backbone, task, base, head, splits["train"], recipe, first + seed, CPU)
        members.append(Expert(name, weights))
        views[name] = TaskView(task, head, splits["tuning"], splits["tuning"].inputs)
    return base, members, MergeContext(CPU, 0, backbone, views, lambda merged: 0.0)
