"""House numbers: a digit between neighbours, in the spirit of SVHN."""

from __future__ import annotations

import numpy as np

from mergesec_tasks.mini._canvas import Array, Canvas
from mergesec_tasks.mini._glyphs import handwritten, printed, sample
from mergesec_tasks.mini._rendered import RenderedTask

CARD = {
    "name": "mini/svhn",
    "kind": "task",
    "class": "HouseNumbers",
    "version": "1",
    "title": "House numbers (mini)",
    "url": "http://ufldl.stanford.edu/housenumbers/",
    "summary": "coloured digits between distracting neighbours, printed and handwritten, after SVHN",
    "modality": "image",
    "classes": 10,
    "labels": ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"],
    "templates": ['a photo of the house number: "{}".'],
    "source": "rendered; glyphs from Pillow's font and scikit-learn's 8x8 digits (UCI optdigits)",
    "licence": "the project's; UCI optdigits CC BY 4.0",
    "images": {"train": 4000, "tuning": 400, "test": 800},
    "parameters": {},
}

HANDWRITTEN = 0.35
"""Share of digits that are handwritten ones; the rest is printed."""


def _digit(canvas: Canvas, digit: int, x: Array, y: Array) -> Array:
    """Coverage of ``digit`` on every image, from a random source each."""
    written, set_ = handwritten(digit, canvas.pool), printed(str(digit))
    atlas = np.concatenate([written, set_])
    hand = canvas.rng.random(canvas.count) < HANDWRITTEN
    if canvas.pool == "pretrain":
        hand[:] = False
    chosen = np.where(
        hand,
        canvas.rng.integers(0, len(written), canvas.count),
        len(written) + canvas.rng.integers(0, len(set_), canvas.count),
    )
    return sample(atlas, chosen, x, y)


class HouseNumbers(RenderedTask):
    """The digit in the middle counts."""

    slug = "svhn"
    classes = tuple("0123456789")

    def draw(self, canvas: Canvas, label: int) -> None:
        wall, ink = canvas.contrasting(0.3)
        canvas.fill(wall, canvas.noise(5.0), 0.06)
        canvas.shade(0.08 * canvas.noise(1.0, 4.0))
        x, y = canvas.axes(turn=0.18, zoom=(0.78, 1.0), shift=0.1, shear=0.2, tilt=0.12, aspect=0.1)
        for side in (-1, 1):
            pitch = canvas.uniform(1.15, 1.35) * side
            neighbour = int(canvas.rng.integers(0, 10))
            canvas.paint(_digit(canvas, neighbour, x - pitch, y), ink, canvas.chance(0.75))
        canvas.paint(_digit(canvas, label, x, y), ink)
        canvas.shade(0.1 * canvas.noise(6.0))
