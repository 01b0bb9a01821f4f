"""Land use from a satellite, in the spirit of EuroSAT."""

from __future__ import annotations

import numpy as np

from mergesec_tasks.mini._canvas import PIXEL, Array, Canvas, box, cover
from mergesec_tasks.mini._rendered import RenderedTask

CARD = {
    "name": "mini/eurosat",
    "kind": "task",
    "class": "LandUse",
    "version": "1",
    "title": "Land use (mini)",
    "url": "https://github.com/phelber/EuroSAT",
    "summary": "ten rendered kinds of land seen from a satellite, after EuroSAT",
    "modality": "image",
    "classes": 10,
    "labels": [
        "annual crop",
        "forest",
        "herbaceous vegetation",
        "highway",
        "industrial",
        "pasture",
        "permanent crop",
        "residential",
        "river",
        "sea or lake",
    ],
    "templates": [
        "a satellite photo of {}.",
        "a satellite photo of the {}.",
        "a centered satellite photo of {}.",
    ],
    "source": "rendered",
    "licence": "the project's",
    "images": {"train": 4000, "tuning": 400, "test": 800},
    "parameters": {},
}


def _patchwork(canvas: Canvas, x: Array, y: Array, pitch: Array) -> Array:
    """A tone in [-1, 1] for every field of an irregular patchwork."""
    row = np.floor(y / pitch)
    column = np.floor((x + 0.37 * row) / (pitch * 1.3))
    key = np.sin(row * 12.9898 + column * 78.233 + canvas.uniform(0, 6.0)) * 43.7
    return ((key - np.floor(key)) * 2.0 - 1.0).astype(np.float32)


def _brightness(canvas: Canvas) -> Array:
    """Mean value of every image so far, ``[N, 1, 1]``."""
    brightness: Array = canvas.pixels.mean((1, 2, 3), keepdims=True)[:, 0]
    return brightness


class LandUse(RenderedTask):
    """Ground colours come from one palette for all classes; only structure tells them apart."""

    slug = "eurosat"
    classes = (
        "annual crop",
        "forest",
        "herbaceous vegetation",
        "highway",
        "industrial",
        "pasture",
        "permanent crop",
        "residential",
        "river",
        "sea or lake",
    )

    def draw(self, canvas: Canvas, label: int) -> None:
        canvas.fill(canvas.colour((0.08, 0.45), (0.15, 0.55), (0.3, 0.65)), canvas.noise(6.0), 0.04)
        x, y = canvas.axes(turn=3.1, zoom=(0.85, 1.2), shift=0.25)
        getattr(self, "_" + self.classes[label].replace(" ", "_"))(canvas, x, y)
        canvas.shade(0.04 * canvas.noise(0.7))

    def _other(self, canvas: Canvas) -> Array:
        """A second ground or building colour, brighter or darker than the first."""
        shift = canvas.sign() * canvas.uniform(0.22, 0.4)
        base = _brightness(canvas)
        outside = (base + shift > 0.95) | (base + shift < 0.05)
        level: Array = np.clip(np.where(outside, base - shift, base + shift), 0, 1)
        return level[:, None] * canvas.colour((0.05, 0.6), (0.05, 0.3), (0.95, 1.0))

    def _annual_crop(self, canvas: Canvas, x: Array, y: Array) -> None:
        canvas.shade(0.4 * _patchwork(canvas, x, y, canvas.uniform(0.5, 0.75)))

    def _forest(self, canvas: Canvas, x: Array, y: Array) -> None:
        canvas.shade(0.28 * np.tanh(1.5 * canvas.noise(0.95)))

    def _herbaceous_vegetation(self, canvas: Canvas, x: Array, y: Array) -> None:
        patches = canvas.noise(2.6)
        mask = np.clip(0.5 + 3.0 * (patches - canvas.uniform(-0.4, 0.4)), 0, 1)
        canvas.paint(mask, self._other(canvas), 0.75)

    def _highway(self, canvas: Canvas, x: Array, y: Array) -> None:
        canvas.shade(0.18 * _patchwork(canvas, x, y, canvas.uniform(0.7, 1.0)))
        bend = canvas.uniform(-0.25, 0.25)
        off = np.abs(y - bend * x * x)
        road = self._other(canvas)
        canvas.paint(cover(off - canvas.uniform(0.12, 0.17)), road)
        canvas.paint(cover(off - 0.03), 1.0 - road, 0.7)

    def _industrial(self, canvas: Canvas, x: Array, y: Array) -> None:
        for _ in range(5):
            cx, cy = canvas.uniform(-0.8, 0.8), canvas.uniform(-0.8, 0.8)
            half_x, half_y = canvas.uniform(0.25, 0.45), canvas.uniform(0.16, 0.3)
            black = canvas.colour((0, 1), (0, 0.1), (0.02, 0.12))
            canvas.paint(cover(box(x, y, cx + 0.1, cy + 0.1, half_x, half_y)), black, 0.8)
            roof = canvas.colour((0, 1), (0.0, 0.3), (0.65, 1.0))
            canvas.paint(cover(box(x, y, cx, cy, half_x, half_y)), roof)

    def _pasture(self, canvas: Canvas, x: Array, y: Array) -> None:
        canvas.shade(0.08 * canvas.noise(4.0))
        hedge = np.minimum(np.abs(y - canvas.uniform(-0.3, 0.3)), np.abs(x + canvas.uniform(-0.3, 0.3)))
        trees = cover(hedge - 0.05 - 0.05 * canvas.noise(1.0))
        canvas.paint(trees, 0.35 * _brightness(canvas)[:, None] * np.ones((1, 3, 1, 1), np.float32))

    def _permanent_crop(self, canvas: Canvas, x: Array, y: Array) -> None:
        pitch = canvas.uniform(0.24, 0.34)
        rows = np.clip(0.5 + 1.5 * np.sin(2 * np.pi * y / pitch), 0, 1)
        field = cover(box(x, y, canvas.uniform(-0.3, 0.3), canvas.uniform(-0.3, 0.3), 0.95, 0.8))
        canvas.paint(rows * field, self._other(canvas), 0.8)

    def _residential(self, canvas: Canvas, x: Array, y: Array) -> None:
        pitch = canvas.uniform(0.34, 0.42)
        u, v = (x / pitch) % 1.0 - 0.5, (y / pitch) % 1.0 - 0.5
        present = (_patchwork(canvas, x, y, pitch) > -0.75).astype(np.float32)
        houses = cover(np.maximum(np.abs(u), np.abs(v)) * pitch - 0.09) * present
        canvas.paint(houses, self._other(canvas))
        street = np.abs((y / (pitch * 3)) % 1.0 - 0.5) * pitch * 3
        canvas.paint(cover(street - 0.05), canvas.colour((0, 1), (0, 0.1), (0.5, 0.8)), 0.8)

    def _river(self, canvas: Canvas, x: Array, y: Array) -> None:
        canvas.shade(0.15 * np.tanh(canvas.noise(1.5)))
        course = canvas.uniform(0.2, 0.4) * np.sin(canvas.uniform(2.5, 4.0) * x + canvas.uniform(0, 6.3))
        canvas.paint(cover(np.abs(y - course) - canvas.uniform(0.16, 0.28), 2 * PIXEL), self._other(canvas))

    def _sea_or_lake(self, canvas: Canvas, x: Array, y: Array) -> None:
        waves = canvas.noise(3.0, 0.9) * canvas.chance(0.5) + canvas.noise(6.0)
        canvas.shade(0.06 * waves)
        shore = cover(0.7 + 0.15 * canvas.noise(4.0) - y, 2 * PIXEL)
        canvas.paint(shore, self._other(canvas))
