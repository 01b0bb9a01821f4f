"""Fine-tuning by recipe: one loop for clean, poisoned and guarded experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mergesec.contracts import (
    Backbone,
    ContractError,
    LossFn,
    Model,
    Recipe,
    Split,
    Task,
    Weights,
    load_network,
)
from mergesec.inference import resident

_PRECISION = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Watch(Protocol):
    """Told how a training goes, and where it keeps what it would need to go on after a crash."""

    def resume(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was kept last (tensors and JSON facts), or None at a fresh start."""

    def step(self, done: int, steps: int, loss: float) -> None:
        """After every optimizer step."""

    def due(self) -> bool:
        """Whether it is time to keep something."""

    def keep(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Keep this instead of what was kept before."""


def fit(
    backbone: Backbone,
    task: Task,
    base: Weights,
    head: Weights,
    split: Split,
    recipe: Recipe,
    seed: int,
    device: torch.device,
    loss: LossFn | None = None,
    watch: Watch | None = None,
) -> dict[str, torch.Tensor]:
    """Weights of the encoder fine-tuned from ``base`` on ``split``; the head stays frozen.

    ``seed`` fixes the order of batches and any randomness inside the network. ``loss`` replaces the
    task's own. ContractError if the loss stops being finite. With a ``watch`` a training that was cut
    off goes on where it was last kept and ends with the same bits; not with a ``loss`` of its own,
    which may hold state that nobody else knows.
    """
    head = {k: v.to(device) for k, v in head.items()}
    split = resident(split, device)

    def task_loss(model: Model, batch: Split) -> torch.Tensor:
        return task.loss(task.outputs(model, head, batch.inputs), batch.targets)

    training = _Training(task, backbone, base, len(split), recipe, seed, device)
    kept = watch.resume() if watch is not None and loss is None else None
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        if kept is not None:
            training.restore(*kept)
            kept = None  # a copy of the weights that would lie there until the end
        while training.done < training.steps:
            index = training.next_rows()
            value = training.step(task.batch(split, index, device), loss or task_loss)
            if watch is not None:
                watch.step(training.done, training.steps, value)
                if loss is None and training.done < training.steps and watch.due():
                    watch.keep(*training.state())
    return training.weights()


class _Training:
    """One training under way: everything that decides what its next step does."""

    def __init__(
        self, task: Task, backbone: Backbone, base: Weights, rows: int, recipe: Recipe, seed: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.task, self.recipe, self.seed, self.device = task, recipe, seed, device
        self.generator = torch.Generator().manual_seed(seed)
        self.rows = torch.arange(rows)
        if recipe.max_train and recipe.max_train < rows:
            drawn = torch.randperm(rows, generator=self.generator)
            self.rows = drawn[: recipe.max_train].sort().values
        self.model = Model(backbone, load_network(backbone, base).to(device).train())
        network = self.model.network
        self.adapted = _adapt(network, backbone, recipe, self.generator) if recipe.lora_rank else []
        self.per_epoch = math.ceil(len(self.rows) / recipe.batch_size)
        self.steps = recipe.steps or recipe.epochs * self.per_epoch
        self.done = 0
        self.optimizer = _optimizer(network, recipe)
        self.factor = _schedule(recipe, self.steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.factor)
        self.precision = _PRECISION[recipe.precision]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision is torch.float16)
        self.before_epoch = self.generator.get_state()
        self.order = self.rows

    def next_rows(self) -> Tensor:
        """Rows of the next batch: a new order for every epoch."""
        place = self.done % self.per_epoch
        if place == 0:
            self.before_epoch = self.generator.get_state()
            self.order = self.rows[torch.randperm(len(self.rows), generator=self.generator)]
        return self.order[place * self.recipe.batch_size : (place + 1) * self.recipe.batch_size]

    def step(self, batch: Split, objective: LossFn) -> float:
        """One optimizer step; the loss before it."""
        generator = torch.Generator().manual_seed((self.seed + 0x9E3779B1 * (self.done + 1)) % 2**63)
        if self.recipe.augment != "none":
            batch = batch.with_inputs(self.task.views(batch.inputs, self.recipe.augment, generator))
        batch = self.task.noised(batch, generator)
        with torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision is not None):
            value = objective(self.model, batch)
        loss = value.item()
        if not math.isfinite(loss):
            raise ContractError(f"training loss became {loss}")
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(value).backward()  # type: ignore[no-untyped-call]
        if self.recipe.gradient_clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.network.parameters(), self.recipe.gradient_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)  # the next forward pass needs their room
        self.done += 1
        return loss

    def weights(self) -> dict[str, Tensor]:
        """The trained weights, low-rank updates added in."""
        for module, leaf in self.adapted:
            parametrize.remove_parametrizations(module, leaf)
        # optimizer and schedule hold each other, and nobody says when what does is collected
        self.optimizer.state.clear()
        return {k: v.detach().cpu() for k, v in self.model.network.state_dict().items()}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All of it as tensors and JSON facts, from which ``restore`` goes on with the same bits."""
        tensors = {f"network/{k}": v for k, v in self.model.network.state_dict().items()}
        for number, entries in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{number}/{k}": v for k, v in entries.items()}
        rows = self.before_epoch if self.done % self.per_epoch else self.generator.get_state()
        tensors |= {"random/rows": rows, "random/torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state(self.device)
        return tensors, {"done": self.done, "steps": self.steps, "scaler": self.scaler.state_dict()}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        network = {k.removeprefix("network/"): v for k, v in tensors.items() if k.startswith("network/")}
        self.model.network.load_state_dict(network, strict=True)
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer/"):
                _, number, entry = name.split("/")
                state.setdefault(int(number), {})[entry] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.done = int(facts["done"])
        self.schedule.last_epoch = self.done
        for group, initial in zip(self.optimizer.param_groups, self.schedule.base_lrs, strict=True):
            group["lr"] = initial * self.factor(self.done)
        self.scaler.load_state_dict(dict(facts["scaler"]))
        self.generator.set_state(tensors["random/rows"])
        if self.done % self.per_epoch:  # in the middle of an epoch: its order is drawn again
            self.before_epoch = tensors["random/rows"]
            self.order = self.rows[torch.randperm(len(self.rows), generator=self.generator)]
        torch.set_rng_state(tensors["random/torch"])
        if "random/cuda" in tensors and self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random/cuda"], self.device)


class _LowRank(nn.Module):
    """W + (α / r) B A, with W frozen: A ``[r, in]`` normal, B ``[out, r]`` zero at first (Hu et al., ICLR 2022)."""

    def __init__(self, weight: torch.Tensor, recipe: Recipe, generator: torch.Generator) -> None:
        super().__init__()
        rank, (outs, ins) = recipe.lora_rank, weight.shape
        drawn = torch.randn(rank, ins, generator=generator) / math.sqrt(ins)
        self.a = nn.Parameter(drawn.to(weight.device))
        self.b = nn.Parameter(torch.zeros(outs, rank, device=weight.device))
        self.scale = recipe.lora_alpha / rank

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.scale * (self.b @ self.a)


def _adapt(
    network: nn.Module, backbone: Backbone, recipe: Recipe, generator: torch.Generator
) -> list[tuple[nn.Module, str]]:
    """Freeze the network and put a low-rank update on every linear map its anatomy names; where they are."""
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    places = []
    for name in backbone.anatomy().matrices:
        path, _, leaf = name.rpartition(".")
        module = network.get_submodule(path)
        update = _LowRank(getattr(module, leaf), recipe, generator)
        parametrize.register_parametrization(module, leaf, update)
        places.append((module, leaf))
    return places


def _optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW or SGD; no weight decay on vectors (biases, norms, embeddings of one row)."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=0.9)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=True)


def _schedule(recipe: Recipe, steps: int) -> Callable[[int], float]:
    warm = max(1, round(recipe.warmup * steps))

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        if recipe.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return factor
