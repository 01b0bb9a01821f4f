"""A world small enough to try any component on in seconds: three tasks of 16×16 images, a two-block ViT.

Loaded as a plugin file, exactly as a stranger's would be. Real training and real merging, no mocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergesec.anatomy import Anatomy, describe
from mergesec.contracts import Backbone, DataContext, Split
from mergesec.images import ImageTask

SIDE, WIDTH, HEADS, DEPTH = 16, 32, 2, 2

CARDS = [
    {
        "name": "micro/bars",
        "kind": "task",
        "class": "Bars",
        "version": "1",
        "title": "Oriented bars",
        "summary": "four orientations of bars in noise",
        "modality": "image",
        "classes": 4,
        "images": {"train": 256, "tuning": 64, "test": 128},
        "licence": "Apache-2.0",
    },
    {
        "name": "micro/blobs",
        "kind": "task",
        "class": "Blobs",
        "version": "1",
        "title": "Blob positions",
        "summary": "a blob in one of four corners",
        "modality": "image",
        "classes": 4,
        "images": {"train": 256, "tuning": 64, "test": 128},
        "licence": "Apache-2.0",
    },
    {
        "name": "micro/rings",
        "kind": "task",
        "class": "Rings",
        "version": "1",
        "title": "Ring sizes",
        "summary": "rings of four radii",
        "modality": "image",
        "classes": 4,
        "images": {"train": 256, "tuning": 64, "test": 128},
        "licence": "Apache-2.0",
    },
    {
        "name": "micro/vit",
        "kind": "backbone",
        "class": "MicroViT",
        "version": "1",
        "title": "Micro ViT",
        "summary": "two pre-norm blocks of width 32, seeded random base",
        "modalities": ["image"],
        "recipe": {"learning_rate": 2e-3, "epochs": 4, "batch_size": 32},
    },
]


class _Micro(ImageTask):
    classes = ("0", "1", "2", "3")
    offset = 0

    def draw(self, label: int, grid: Tensor, jitter: Tensor) -> Tensor:
        """One image's brightness ``[H, W]`` from coordinates ``[2, H, W]`` in [-1, 1] and jitter ``[2]``."""
        raise TypeError("a micro task draws")

    def load(self, ctx: DataContext) -> dict[str, Split]:
        generator = torch.Generator().manual_seed(1000 + self.offset)
        sizes = {"train": 256, "tuning": 64, "test": 128}
        return {name: self._split(n, generator) for name, n in sizes.items()}

    def _split(self, n: int, generator: torch.Generator) -> Split:
        axis = torch.linspace(-1, 1, SIDE)
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"))
        labels = torch.arange(n) % 4
        jitter = 0.3 * torch.rand(n, 2, generator=generator)
        shapes = torch.stack([self.draw(int(k), grid, j) for k, j in zip(labels, jitter, strict=True)])
        colour = 0.5 + 0.5 * torch.rand(n, 3, 1, 1, generator=generator)
        noise = 0.15 * torch.randn(n, 3, SIDE, SIDE, generator=generator)
        images = (shapes[:, None] * colour + noise).clamp(0, 1)
        return Split((255 * images).round().to(torch.uint8), labels)


class Bars(_Micro):
    def draw(self, label: int, grid: Tensor, jitter: Tensor) -> Tensor:
        y, x = grid
        return (torch.sin(8 * (x, y, (x + y) * 0.7, (x - y) * 0.7)[label] + 9 * jitter[0]) > 0).float()


class Blobs(_Micro):
    offset = 1

    def draw(self, label: int, grid: Tensor, jitter: Tensor) -> Tensor:
        centre = torch.tensor([(-1.0, -1.0), (-1.0, 1.0), (1.0, -1.0), (1.0, 1.0)][label])
        return torch.exp(-8 * (grid - (centre * (0.3 + jitter))[:, None, None]).square().sum(0))


class Rings(_Micro):
    offset = 2

    def draw(self, label: int, grid: Tensor, jitter: Tensor) -> Tensor:
        radius = (grid - (jitter - 0.15)[:, None, None]).square().sum(0).sqrt()
        return torch.exp(-80 * (radius - (0.2 + 0.22 * label)).square())


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (f(x).view(n, t, HEADS, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.o(mixed.transpose(1, 2).reshape(n, t, WIDTH))  # type: ignore[no-any-return]


class _Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-norm transformer block; the micro text encoder has the same."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH), _Attention()
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), _Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 4, 4)
        self.pos = nn.Parameter(torch.zeros(1, (SIDE // 4) ** 2, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).transpose(1, 2) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.norm(x).mean(1)  # type: ignore[no-any-return]


class MicroViT(Backbone):
    def build(self) -> nn.Module:
        return _Network()

    def base_weights(self) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            network = _Network()
            nn.init.normal_(network.pos, std=0.5)
        return {k: v.detach().clone() for k, v in network.state_dict().items()}

    def anatomy(self) -> Anatomy:
        return describe({k: tuple(v.shape) for k, v in self.base_weights().items()}, HEADS)

    def features(self, network: nn.Module, inputs: Any) -> Tensor:
        features: Tensor = network((inputs - 0.5) / 0.5)
        return features
