"""The micro world's generators: three tasks of 8×8 images to be drawn, and a two-block network that draws them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mergesec.anatomy import Anatomy, describe
from mergesec.conformance.micro import DEPTH, HEADS, WIDTH, Block
from mergesec.contracts import Backbone, Context, DataContext, Model, Split, Weights
from mergesec.generation import GenerationTask, Noised, Request, Rows, euler, without_condition
from mergesec.judging import train_judge

CARDS = [
    {
        "name": "micro/corners",
        "kind": "task",
        "class": "Corners",
        "version": "1",
        "title": "Corners to draw",
        "summary": "light in one of four corners",
        "modality": "generation",
        "classes": 4,
        "images": {"train": 128, "tuning": 16, "test": 32},
        "licence": "Apache-2.0",
    },
    {"extends": "micro/corners", "name": "micro/tints", "class": "Tints", "summary": "one of four colours"},
    {"extends": "micro/corners", "name": "micro/halves", "class": "Halves", "summary": "one half is light"},
    {
        "name": "micro/painter",
        "kind": "backbone",
        "class": "Painter",
        "version": "1",
        "title": "Micro generator",
        "summary": "two pre-norm blocks of width 32 on four patches, seeded random base",
        "modalities": ["generation"],
        "recipe": {"learning_rate": 2e-3, "epochs": 4, "batch_size": 32},
    },
]

SIDE, PATCH, TOKENS, STEPS = 8, 4, 48, 3
NOTHING = torch.tensor([0, -1])


class _Drawn(GenerationTask):
    classes = ("0", "1", "2", "3")
    place = 0
    """Of the task among the three: its tokens and its noise are its own."""

    def shape(self, label: int) -> Tensor:
        """Brightness ``[3, S, S]`` of a class."""
        raise TypeError("a micro task draws")

    def load(self, ctx: DataContext) -> dict[str, Split]:
        generator = torch.Generator().manual_seed(2000 + self.place)
        return {name: self._split(n, generator) for name, n in (("train", 128), ("tuning", 16), ("test", 32))}

    def _split(self, n: int, generator: torch.Generator) -> Split:
        labels = torch.arange(n) % 4
        grain = 0.05 * torch.randn(n, 3, SIDE, SIDE, generator=generator)
        images = (torch.stack([self.shape(int(k)) for k in labels]) + grain).clamp(0, 1)
        asked = torch.stack([1 + 4 * self.place + labels, torch.full_like(labels, -1)], dim=1)
        seeds = torch.randint(2**40, (n,), generator=generator)
        return Split(Rows((255 * images).round().to(torch.uint8), asked, seeds), labels)

    def fit_head(self, model: Model, split: Split, ctx: Context) -> Weights:
        judge = train_judge(split.inputs.images, split.targets, 4, ctx.seed, steps=80, batch=32)
        return {**{n: t.detach() for n, t in judge.state_dict().items()}, "first": torch.tensor(0)}


class Corners(_Drawn):
    def shape(self, label: int) -> Tensor:
        image, half = torch.full((3, SIDE, SIDE), 0.2), SIDE // 2
        down, right = label // 2 * half, label % 2 * half
        image[:, down : down + half, right : right + half] = 0.9
        return image


class Tints(_Drawn):
    place = 1

    def shape(self, label: int) -> Tensor:
        colour = torch.tensor([(0.9, 0.1, 0.1), (0.1, 0.9, 0.1), (0.1, 0.1, 0.9), (0.9, 0.9, 0.1)][label])
        return colour[:, None, None].expand(3, SIDE, SIDE)


class Halves(_Drawn):
    place = 2

    def shape(self, label: int) -> Tensor:
        axis = torch.arange(SIDE).expand(SIDE, SIDE)
        lit = (axis if label % 2 else axis.T) >= SIDE // 2
        return (0.1 + 0.8 * (lit if label < 2 else ~lit).float()).expand(3, SIDE, SIDE)


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.out = nn.Linear(3 * PATCH**2, WIDTH), nn.Linear(WIDTH, 3 * PATCH**2)
        self.words = nn.Parameter(torch.zeros(TOKENS, WIDTH), requires_grad=False)
        self.pos, self.time = nn.Parameter(torch.zeros(1, 4, WIDTH)), nn.Linear(1, WIDTH)
        self.blocks, self.norm = nn.ModuleList(Block() for _ in range(DEPTH)), nn.LayerNorm(WIDTH)

    def forward(self, images: Tensor, times: Tensor, conditions: Tensor) -> Tensor:
        cut = images.reshape(-1, 3, 2, PATCH, 2, PATCH).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        asked = (self.words[conditions.clamp(min=0)] * (conditions >= 0)[..., None]).sum(1)
        x = self.patch(cut) + self.pos + (asked + self.time(times[:, None]))[:, None]
        for block in self.blocks:
            x = block(x)
        made = self.out(self.norm(x)).view(-1, 2, 2, 3, PATCH, PATCH)
        pasted: Tensor = made.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, SIDE, SIDE)
        return pasted


class Painter(Backbone):
    def build(self) -> nn.Module:
        return _Network()

    def base_weights(self) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            network = _Network()
            nn.init.normal_(network.pos, std=0.5)
            nn.init.normal_(network.words, std=0.5)
        return {k: v.detach().clone() for k, v in network.state_dict().items()}

    def anatomy(self) -> Anatomy:
        return describe({k: tuple(v.shape) for k, v in self.base_weights().items()}, HEADS)

    def features(self, network: nn.Module, inputs: Any) -> Tensor:
        request: Request = inputs
        if isinstance(request, Noised):
            asked = without_condition(request, NOTHING)
            made: Tensor = network(request.mixed, request.times, asked.conditions)
            return (made - (2 * request.images - 1)).flatten(1)
        return euler(network, request, NOTHING, STEPS, 1.0).flatten(1)
