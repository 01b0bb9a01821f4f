"""A task: images with classes. The head, the loss and the metrics come with ``ImageTask``."""

from __future__ import annotations

import torch

from mergesec.contracts import DataContext, Split
from mergesec.images import ImageTask

CARD = {
    "name": "fresh",
    "kind": "task",
    "class": "Fresh",
    "version": "1",
    "title": "Fresh",
    "summary": "is the image brighter than grey?",
    "modality": "image",
    "classes": 2,
    "images": {"train": 256, "tuning": 64, "test": 128},
    "licence": "Apache-2.0",
}


class Fresh(ImageTask):
    """The same data every time, and no test row in another split."""

    classes = ("dark", "light")

    def load(self, ctx: DataContext) -> dict[str, Split]:
        generator = torch.Generator().manual_seed(0)
        return {name: self.rows(n, generator) for name, n in (("train", 256), ("tuning", 64), ("test", 128))}

    def rows(self, n: int, generator: torch.Generator) -> Split:
        """``n`` images of 16×16, their classes in turn."""
        labels = torch.arange(n) % 2
        images = torch.rand(n, 3, 16, 16, generator=generator) * 0.5 + 0.5 * labels[:, None, None, None]
        return Split((255 * images).to(torch.uint8), labels)
