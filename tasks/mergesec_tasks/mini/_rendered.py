"""What the eight mini tasks share: seeded rendering of balanced splits."""

from __future__ import annotations

import zlib
from abc import abstractmethod
from typing import ClassVar

import numpy as np
import torch

from mergesec.contracts import DataContext, Split
from mergesec.images import ImageTask
from mergesec_tasks.mini._canvas import NATIVE, SIZE, Canvas, Style

SIZES = {"train": 4000, "tuning": 400, "test": 800}
"""Images per split. Every split has its own random stream, so no image occurs twice."""


class RenderedTask(ImageTask):
    """A task whose images are drawn: subclasses say how one class looks."""

    slug: ClassVar[str]
    """Names the random stream; never changes, or the images would."""
    sizes: ClassVar[dict[str, int]] = SIZES
    native: ClassVar[Style] = NATIVE
    """How this task's own images are photographed."""

    @abstractmethod
    def draw(self, canvas: Canvas, label: int) -> None:
        """Draws class ``label`` on every image of ``canvas``."""

    def render(self, count: int, pool: str, style: Style | None = None, seed: int = 0) -> Split:
        """``count`` images, classes balanced and shuffled; equal arguments give equal bytes.

        ``style`` defaults to the task's own.
        """
        rng = np.random.default_rng([zlib.crc32(self.slug.encode()), zlib.crc32(pool.encode()), seed])
        labels = rng.permutation(np.arange(count) % len(self.classes))
        images = np.empty((count, 3, SIZE, SIZE), dtype=np.uint8)
        for label in range(len(self.classes)):
            rows = np.flatnonzero(labels == label)
            canvas = Canvas(len(rows), rng, pool, style or self.native)
            self.draw(canvas, label)
            images[rows] = canvas.finish()
        return Split(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))

    def load(self, ctx: DataContext) -> dict[str, Split]:
        """The splits; the same for every seed of a grid, as a downloaded data set would be."""
        return {name: self.render(count, name) for name, count in self.sizes.items()}
