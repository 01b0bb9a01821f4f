"""Fine-tuning by recipe: one loop for clean, poisoned and guarded experts."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
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

_PRECISION = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
) -> dict[str, torch.Tensor]:
    """Weights of the encoder fine-tuned from ``base`` on ``split``; the head stays frozen.

    ``seed`` fixes the order of batches and any randomness inside the network. ``loss`` replaces the
    task's own. ContractError if the loss stops being finite.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(len(split))
    if recipe.max_train and recipe.max_train < len(split):
        rows = torch.randperm(len(split), generator=generator)[: recipe.max_train].sort().values
    head = {k: v.to(device) for k, v in head.items()}
    model = Model(backbone, load_network(backbone, base).to(device).train())

    def task_loss(model: Model, batch: Split) -> torch.Tensor:
        return task.loss(task.outputs(model, head, batch.inputs), batch.targets)

    adapted = _adapt(model.network, backbone, recipe, generator) if recipe.lora_rank else []
    objective = loss or task_loss
    steps = recipe.epochs * math.ceil(len(rows) / recipe.batch_size)
    optimizer = _optimizer(model.network, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(recipe, steps))
    precision = _PRECISION[recipe.precision]
    scaler = torch.amp.GradScaler(device.type, enabled=precision is torch.float16)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for _ in range(recipe.epochs):
            order = rows[torch.randperm(len(rows), generator=generator)]
            for index in torch.split(order, recipe.batch_size):
                batch = task.batch(split, index, device)
                with torch.autocast(device.type, dtype=precision, enabled=precision is not None):
                    value = objective(model, batch)
                if not math.isfinite(value.item()):
                    raise ContractError(f"training loss became {value.item()}")
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(value).backward()  # type: ignore[no-untyped-call]
                if recipe.gradient_clip:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.network.parameters(), recipe.gradient_clip)
                scaler.step(optimizer)
                scaler.update()
                schedule.step()
    for module, leaf in adapted:
        parametrize.remove_parametrizations(module, leaf)
    return {k: v.detach().cpu() for k, v in model.network.state_dict().items()}


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
    names: dict[str, None] = {}
    for block in backbone.anatomy().blocks:
        attention, mlp = block.attention, block.mlp
        for linear in (
            attention.query,
            attention.key,
            attention.value,
            attention.output,
            mlp.up,
            mlp.gate,
            mlp.down,
        ):
            if linear is not None:
                names[linear.weight] = None
    places = []
    for name in names:
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
