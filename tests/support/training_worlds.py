"""A micro task and backbone, a network away from the base, and the contexts of protections that train."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mergesec.conformance import micro
from mergesec.contracts import (
    DataContext,
    Model,
    ProtectContext,
    Recipe,
    TaskView,
    TrainContext,
    load_network,
)
from mergesec.training import _adapt, fit
from mergesec_methods._training import effective

CPU = torch.device("cpu")


class World:
    """The micro task and backbone, a network away from the base, and contexts around them."""

    def __init__(self, rank: int = 0, epochs: int = 1, max_train: int = 64, seed: int = 5) -> None:
        self.seed = seed
        self.task, self.backbone = micro.Bars(), micro.MicroViT()
        self.base = self.backbone.base_weights()
        generator = torch.Generator().manual_seed(0)
        self.away = {
            n: t + 0.03 * torch.randn(t.shape, generator=generator) if t.is_floating_point() else t
            for n, t in self.base.items()
        }
        self.head = {"weight": torch.randn(4, micro.WIDTH, generator=generator), "scale": torch.tensor(4.0)}
        self.splits = self.task.load(DataContext(CPU, 0))
        self.batch = self.task.batch(self.splits["train"], torch.arange(16), CPU)
        self.recipe = Recipe(
            lora_rank=rank, max_train=max_train, epochs=epochs, batch_size=16, learning_rate=3e-3
        )
        self.losses: list[Any] = []

    def context(self, train: bool = False) -> TrainContext:
        """With ``train`` the real recipe; else ``fit`` only catches the loss it is given."""

        def run(loss: Any = None) -> Any:
            self.losses.append(loss)
            if not train:
                return {}
            return fit(
                self.backbone,
                self.task,
                self.base,
                self.head,
                self.splits["train"],
                self.recipe,
                self.seed,
                CPU,
                loss,
            )

        return TrainContext(
            CPU,
            self.seed,
            self.task,
            self.backbone,
            self.base,
            self.head,
            self.splits["train"],
            self.recipe,
            run,
        )

    def protect_context(self) -> ProtectContext:
        view = TaskView(self.task, self.head, self.splits["tuning"])
        return ProtectContext(CPU, self.seed, self.backbone, self.base, view)

    def model(self, weights: dict[str, Tensor]) -> Model:
        return Model(self.backbone, load_network(self.backbone, weights).train())

    def task_loss(self, model: Model) -> Tensor:
        return self.task.loss(self.task.outputs(model, self.head, self.batch.inputs), self.batch.targets)

    def gradients(self, weights: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The task's loss at ``weights`` and its gradient, by plain autograd."""
        model = self.model(weights)
        loss = self.task_loss(model)
        loss.backward()
        return loss.detach(), {n: p.grad for n, p in model.network.named_parameters()}

    def low_rank(self) -> nn.Module:
        """The base with a low-rank update that is not zero."""
        network = load_network(self.backbone, self.base).train()
        generator = torch.Generator().manual_seed(3)
        _adapt(network, self.backbone, Recipe(lora_rank=2), generator)
        for name, parameter in network.named_parameters():
            if name.endswith(".b"):
                parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
        return network


def plain(world: World, network: nn.Module) -> dict[str, Tensor]:
    """What a network with parametrisations computes with, under the plain names."""
    return {
        n: effective(network, n).detach().clone() if t.is_floating_point() else t
        for n, t in world.base.items()
    }
