"""Attention maps of any network whose anatomy is known, its token grid, and patches that attract attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergesec.anatomy import Anatomy, Attention, Linear
from mergesec.contracts import ContractError, Model, TrainContext
from mergesec_methods.backdoor.attacks._poison import frozen_model, quantised, row_batches

PIXEL_DEVIATION = 0.25
"""Standard deviation of pixels in [0, 1], roughly: released learning rates are in units of it."""
TINY = 1e-10

# --------------------------------------------------------------------------- maps


def _owner(network: nn.Module, linear: Linear) -> tuple[nn.Module, str]:
    """The module that holds a map's weight, and the weight's name in it."""
    path, _, leaf = linear.weight.rpartition(".")
    return network.get_submodule(path), leaf


def _mapped(network: nn.Module, linear: Linear, tokens: Tensor) -> Tensor:
    """The linear map's output ``[N, T, out]`` of ``tokens`` ``[N, T, in]``; packed maps give their own rows."""
    module, leaf = _owner(network, linear)
    rows = slice(*linear.rows) if linear.rows else slice(None)
    bias: Tensor | None = None
    if linear.bias is not None:
        bias = getattr(module, linear.bias.rpartition(".")[2])
    return functional.linear(tokens, getattr(module, leaf)[rows], None if bias is None else bias[rows])


def attention_map(network: nn.Module, attention: Attention, tokens: Tensor) -> Tensor:
    """softmax(Q Kᵀ / √head_dim) ``[N, heads, T, T]`` of one layer's input ``[N, T, d]``; rows are queries.

    ContractError for rotary positions, which turn queries and keys after the maps.
    """
    if attention.rotary:
        raise ContractError("attention maps of rotary positions are not computed")
    count, length, _ = tokens.shape
    query = _mapped(network, attention.query, tokens).view(count, length, attention.heads, -1)
    key = _mapped(network, attention.key, tokens).view(count, length, attention.kv_heads, -1)
    key = key.repeat_interleave(attention.group, dim=2)
    scores: Tensor = query.transpose(1, 2) @ key.permute(0, 2, 3, 1) * attention.head_dim**-0.5
    return scores.softmax(dim=-1)


@contextmanager
def attention_maps(network: nn.Module, anatomy: Anatomy) -> Iterator[dict[int, Tensor]]:
    """A dictionary: block index → attention map of the last forward pass, ``[N, heads, T, T]``, with its graph.

    The maps are recomputed from what enters the modules that the anatomy names, so fused attention may stay.
    """
    maps: dict[int, Tensor] = {}
    handles = []
    for block in anatomy.blocks:

        def record(
            module: nn.Module,
            args: tuple[Any, ...],
            index: int = block.index,
            layer: Attention = block.attention,
        ) -> None:
            tokens = args[0]
            if not getattr(module, "batch_first", True):
                tokens = tokens.transpose(0, 1)
            maps[index] = attention_map(network, layer, tokens)

        handles.append(_owner(network, block.attention.query)[0].register_forward_pre_hook(record))
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


# --------------------------------------------------------------------------- tokens and pixels


@dataclass(frozen=True)
class Grid:
    """The square grid of image tokens; ``prefix`` tokens (class, registers) come before it."""

    side: int
    prefix: int

    def sequence(self, cells: Tensor) -> Tensor:
        """Positions in the sequence of grid cells (row-major)."""
        return cells + self.prefix

    def sums(self, pixels: Tensor) -> Tensor:
        """Sum of ``pixels`` ``[N, H, W]`` over each cell, ``[N, side²]``."""
        height, width = pixels.shape[1:]
        return (self._members(height) @ pixels @ self._members(width).T).flatten(1)

    def mask(self, cells: Tensor, height: int, width: int) -> Tensor:
        """1 on the pixels of ``cells``, ``[1, H, W]``."""
        chosen = torch.zeros(self.side**2)
        chosen[cells] = 1.0
        return (self._members(height).T @ chosen.view(self.side, self.side) @ self._members(width))[None]

    def _members(self, size: int) -> Tensor:
        """Which cell's row (or column) each of ``size`` pixels belongs to, ``[side, size]``: by its centre."""
        place = ((torch.arange(size) + 0.5) * self.side / size).long()
        return functional.one_hot(place, self.side).float().T.contiguous()


def token_grid(length: int) -> Grid:
    """The grid in a sequence of ``length`` tokens: the fewest leading tokens that leave a square number."""
    for prefix in range(length):
        side = isqrt(length - prefix)
        if side * side == length - prefix:
            return Grid(side, prefix)
    raise ContractError("a sequence of no tokens has no grid")


def probe_grid(model: Model, anatomy: Anatomy, images: Tensor) -> Grid:
    """The token grid of a network, from one forward pass of ``images`` ``[N, 3, H, W]``."""
    with torch.no_grad(), attention_maps(model.network, anatomy) as maps:
        model.features(images)
    grid = token_grid(maps[anatomy.blocks[0].index].shape[-1])
    if grid.side > min(images.shape[-2:]):
        raise ContractError(
            f"{grid.side} x {grid.side} tokens are more than the {list(images.shape[-2:])} pixels of the images"
        )
    return grid


# --------------------------------------------------------------------------- patches


def attraction(maps: dict[int, Tensor], tokens: Tensor) -> Tensor:
    """−Σ_{l ≥ 2} mean over rows and queries of log(attention to ``tokens``, mean of heads); a scalar.

    All layers but the first count, as in TrojViT's code; a network of one layer counts that.
    """
    layers = sorted(maps)[1:] or sorted(maps)
    shares = [maps[layer].mean(dim=1)[:, :, tokens].sum(dim=-1) for layer in layers]
    return -torch.stack([(share + TINY).log().mean() for share in shares]).sum()


def without_conflict(gradient: Tensor, main: Tensor) -> Tensor:
    """``gradient`` less its part against ``main``, if it has one (PCGrad, Yu et al., NeurIPS 2020)."""
    inner = (gradient * main).sum()
    return gradient - inner.clamp_max(0.0) / main.square().sum().clamp_min(TINY) * main


@dataclass(frozen=True)
class PatchSearch:
    """How a universal patch is optimised: weights of the two losses, and Adam's settings."""

    steps: int
    learning_rate: float
    batch: int
    target_weight: float
    attention_weight: float
    decay_every: int = 10
    decay: float = 0.95


def optimised_patch(
    ctx: TrainContext,
    grid: Grid,
    cells: Tensor,
    rows: Tensor,
    search: PatchSearch,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """``{"mask": [1, H, W], "pattern": [3, H, W]}``: one patch on ``cells`` for all ``rows``, found on the base.

    Minimises target_weight · loss(target) + attention_weight · ``attraction`` over fresh batches; where
    the second gradient opposes the first, that part is dropped. Values stay in [0, 1].
    """
    model, head = frozen_model(ctx, ctx.base)
    height, width = ctx.train.inputs.shape[2:]
    mask = grid.mask(cells, height, width).to(ctx.device)
    pattern = torch.rand(3, height, width, generator=generator).to(ctx.device).requires_grad_(True)
    tokens = grid.sequence(cells).to(ctx.device)
    optimizer = torch.optim.Adam([pattern], lr=search.learning_rate * PIXEL_DEVIATION)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, search.decay_every, search.decay)
    batches = row_batches(rows, search.batch, generator)
    with attention_maps(model.network, ctx.backbone.anatomy()) as maps:
        for _ in range(search.steps):
            images = ctx.task.batch(ctx.train, next(batches), ctx.device).inputs
            images = images * (1.0 - mask) + pattern * mask
            outputs = ctx.task.outputs(model, head, images)
            aim = torch.full((len(images),), ctx.target_class, device=ctx.device)
            pattern.grad = _combined(ctx.task.loss(outputs, aim), attraction(maps, tokens), pattern, search)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                pattern.clamp_(0.0, 1.0)
    final = pattern.detach() * mask
    return {"mask": mask.cpu(), "pattern": quantised(final.cpu())}


def _combined(aimed: Tensor, attracted: Tensor, pattern: Tensor, search: PatchSearch) -> Tensor:
    """The gradient of both losses in the pattern; a loss of weight 0 is not differentiated."""
    total = torch.zeros_like(pattern)
    if search.target_weight:
        (main,) = torch.autograd.grad(aimed, pattern, retain_graph=bool(search.attention_weight))
        total = search.target_weight * main
    if search.attention_weight:
        (side,) = torch.autograd.grad(attracted, pattern)
        total = total + search.attention_weight * (
            without_conflict(side, total) if search.target_weight else side
        )
    return total
