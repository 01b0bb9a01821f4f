"""The mini suite's backbone: a deep, narrow vision transformer at 32×32 with a convolutional stem."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from mergesec.anatomy import Anatomy, Attention, Block, Linear, Mlp
from mergesec.contracts import Backbone, Weights

CARD = {
    "name": "mini/vit",
    "kind": "backbone",
    "class": "MiniViT",
    "version": "1",
    "title": "ViT 8 x 96 (mini)",
    "url": "",
    "summary": "8 pre-norm blocks of width 96 on 16 tokens, pretrained by `bench pretrain`",
    "modalities": ["image"],
    "source": "bench pretrain, shifted renderings of the mini tasks",
    "licence": "the project's",
    "pretrain": "mergesec_tasks.mini.pretrain:pretrain",
    "recipe": {
        "optimizer": "adamw",
        "learning_rate": 2e-4,
        "weight_decay": 0.01,
        "schedule": "cosine",
        "warmup": 0.1,
        "epochs": 5,
        "batch_size": 64,
        "gradient_clip": 1.0,
        "precision": "float32",
        "max_train": 0,
    },
    "parameters": {},
}

WIDTH, DEPTH, HEADS, HIDDEN, TOKENS = 96, 8, 4, 192, 16
WEIGHTS_FOLDER = Path(__file__).parent / "weights"
BASE_FILE, HEADS_FILE = "vit.safetensors", "heads.safetensors"


class _Attention(nn.Module):
    """Multi-head self-attention with unpacked maps; tokens ``[N, T, WIDTH]`` in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.v, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        count, length, _ = tokens.shape
        heads = (count, length, HEADS, WIDTH // HEADS)
        query = self.q(tokens).view(heads).transpose(1, 2)
        key = self.k(tokens).view(heads).permute(0, 2, 3, 1)
        value = self.v(tokens).view(heads).transpose(1, 2)
        # Written out: at 16 tokens this is quicker on a CPU than the fused kernel.
        weights = (query @ key * (WIDTH // HEADS) ** -0.5).softmax(dim=-1)
        mixed = (weights @ value).transpose(1, 2).reshape(count, length, WIDTH)
        return cast(Tensor, self.o(mixed))


class _Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self.down(functional.gelu(self.up(tokens), approximate="tanh")))


class _Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH), _Attention()
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), _Mlp()

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        return cast(Tensor, tokens + self.mlp(self.norm2(tokens)))


class Network(nn.Module):
    """Images ``[N, 3, 32, 32]``, normalised, to features ``[N, WIDTH]`` (mean of the tokens)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1),
            nn.GELU(approximate="tanh"),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.GELU(approximate="tanh"),
            nn.Conv2d(64, WIDTH, 3, stride=2, padding=1),
        )
        self.pos = nn.Parameter(torch.randn(1, TOKENS, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(_Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.stem(images).flatten(2).transpose(1, 2) + self.pos
        for block in self.blocks:
            tokens = block(tokens)
        return cast(Tensor, self.norm(tokens.mean(dim=1)))


@cache
def _shipped(name: str) -> dict[str, Tensor]:
    """A shipped file's tensors, float16 on disk, as float32."""
    return {key: value.float() for key, value in load_file(WEIGHTS_FOLDER / name).items()}


def _linear(name: str) -> Linear:
    return Linear(weight=f"{name}.weight", bias=f"{name}.bias")


class MiniViT(Backbone):
    """The mini suite's base. Raw inputs are float images ``[N, 3, 32, 32]`` in [0, 1]."""

    def build(self) -> nn.Module:
        return Network()

    def base_weights(self) -> Weights:
        return {name: value.clone() for name, value in _shipped(BASE_FILE).items()}

    def head(self, task: str) -> Weights | None:
        """``{"weight": [K, 96], "scale": []}`` of a mini task; None for tasks unknown to the base."""
        prefix = f"{task}/"
        found = {
            k.removeprefix(prefix): v.clone() for k, v in _shipped(HEADS_FILE).items() if k.startswith(prefix)
        }
        return found or None

    def features(self, network: nn.Module, inputs: Tensor) -> Tensor:
        return cast(Tensor, network((inputs - 0.5) * 4.0))

    def anatomy(self) -> Anatomy:
        blocks = []
        for index in range(DEPTH):
            attention, mlp = f"blocks.{index}.attn", f"blocks.{index}.mlp"
            query, key, value, output = (_linear(f"{attention}.{part}") for part in "qkvo")
            blocks.append(
                Block(
                    index=index,
                    attention=Attention(query, key, value, output, heads=HEADS, head_dim=WIDTH // HEADS),
                    mlp=Mlp(up=_linear(f"{mlp}.up"), down=_linear(f"{mlp}.down"), hidden=HIDDEN),
                )
            )
        return Anatomy(tuple(blocks))
