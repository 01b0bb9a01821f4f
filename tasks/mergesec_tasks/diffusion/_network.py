"""The suite's network: a diffusion transformer on 16×16 images."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergesec_tasks.diffusion._vocabulary import NOTHING, TOKENS
from mergesec_tasks.mini._base import Attention, Mlp

SIDE, PATCH, WIDTH, DEPTH, HEADS, HIDDEN = 16, 4, 128, 6, 4, 384
PIECE, GRID = 3 * PATCH * PATCH, SIDE // PATCH
FREQUENCIES = 64


def waves(times: Tensor) -> Tensor:
    """Times ``[N]`` in [0, 1] as sines and cosines ``[N, 2 · FREQUENCIES]``."""
    rates = torch.exp(torch.arange(FREQUENCIES, device=times.device) * (-math.log(1e4) / FREQUENCIES))
    angles = 1000.0 * times[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def pieces(images: Tensor) -> Tensor:
    """Images ``[N, 3, S, S]`` as patches ``[N, T, PIECE]``, row by row."""
    cut = images.view(len(images), 3, GRID, PATCH, GRID, PATCH)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(len(images), GRID * GRID, PIECE)


def pasted(patches: Tensor) -> Tensor:
    """What ``pieces`` cut, as images again."""
    cut = patches.view(len(patches), GRID, GRID, 3, PATCH, PATCH)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(len(patches), 3, SIDE, SIDE)


class Block(nn.Module):
    """Attention and MLP, each between a scale and shift of its inputs and a gate on its outputs.

    ``modulation`` ``[6, width]`` is added to what all blocks get from time and condition (adaLN-single).
    """

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(WIDTH, HEADS), Mlp(WIDTH, HIDDEN)
        table = torch.zeros(6, WIDTH)
        table[[2, 5]] = 0.2  # open gates: closed ones learn little in so few steps
        self.modulation = nn.Parameter(table)

    def forward(self, tokens: Tensor, told: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (told + self.modulation)[:, :, None].unbind(1)
        level = functional.layer_norm(tokens, (WIDTH,))
        tokens = tokens + gate1 * self.attn(level * (1 + scale1) + shift1)
        level = functional.layer_norm(tokens, (WIDTH,))
        return cast(Tensor, tokens + gate2 * self.mlp(level * (1 + scale2) + shift2))


class Generator(nn.Module):
    """Predicts the clean image from a noisy one, its time and its condition."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(PIECE, WIDTH)
        self.pos = nn.Parameter(0.7 * torch.randn(1, GRID * GRID, WIDTH))
        self.words = nn.Parameter(0.5 * torch.randn(TOKENS, WIDTH), requires_grad=False)
        self.time = nn.Sequential(nn.Linear(2 * FREQUENCIES, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.modulate = nn.Linear(WIDTH, 6 * WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.final = nn.Linear(WIDTH, PIECE)

    def forward(self, images: Tensor, times: Tensor, conditions: Tensor) -> Tensor:
        """Images ``[N, 3, S, S]`` in about [-1, 1], times ``[N]``, conditions int64 ``[N, L]`` (-1 is padding)."""
        there = (conditions >= 0).unsqueeze(-1)
        asked = (self.words[conditions.clamp(min=NOTHING)] * there).sum(1)
        told = self.modulate(functional.silu(self.time(waves(times)) + asked)).view(-1, 6, WIDTH)
        tokens = self.patch(pieces(images)) + self.pos + asked[:, None]
        for block in self.blocks:
            tokens = block(tokens, told)
        return pasted(self.final(functional.layer_norm(tokens, (WIDTH,))))
