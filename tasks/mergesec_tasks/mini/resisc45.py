"""Objects from the air, in the spirit of RESISC45."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mergesec_tasks.mini._canvas import Array, Canvas, box, cover, disc, stroke
from mergesec_tasks.mini._rendered import RenderedTask

CARD = {
    "name": "mini/resisc45",
    "kind": "task",
    "class": "Aerial",
    "version": "1",
    "title": "Aerial objects (mini)",
    "url": "https://arxiv.org/abs/1703.00121",
    "summary": "ten rendered objects seen from an aeroplane, after RESISC45",
    "modality": "image",
    "classes": 10,
    "labels": [
        "airplane",
        "baseball diamond",
        "roundabout",
        "intersection",
        "harbor",
        "parking lot",
        "storage tanks",
        "tennis court",
        "stadium",
        "runway",
    ],
    "templates": ["an aerial photo of a {}.", "an aerial view of the {}.", "aerial imagery of a {}."],
    "source": "rendered",
    "licence": "the project's",
    "images": {"train": 4000, "tuning": 400, "test": 800},
    "parameters": {},
}


class Aerial(RenderedTask):
    """Any heading, any ground, one object and some clutter."""

    slug = "resisc45"
    classes: Sequence[str] = (
        "airplane",
        "baseball diamond",
        "roundabout",
        "intersection",
        "harbor",
        "parking lot",
        "storage tanks",
        "tennis court",
        "stadium",
        "runway",
    )

    def draw(self, canvas: Canvas, label: int) -> None:
        self.ground, self.object = canvas.contrasting(0.35)
        canvas.fill(self.ground, canvas.noise(3.0), 0.06)
        for _ in range(3):
            u, v = canvas.axes(turn=3.1)
            clutter = box(u, v, canvas.uniform(-1, 1), canvas.uniform(-1, 1), canvas.uniform(0.1, 0.5), 0.15)
            canvas.paint(cover(clutter), canvas.colour((0, 1), (0.1, 0.6), (0.2, 0.8)), 0.35)
        x, y = canvas.axes(turn=3.1, zoom=(0.75, 1.0), shift=0.15, shear=0.12, aspect=0.1)
        getattr(self, "_" + self.classes[label].replace(" ", "_"))(canvas, x, y)
        canvas.shade(0.05 * canvas.noise(0.8) + 0.08 * canvas.noise(7.0))

    def _airplane(self, canvas: Canvas, x: Array, y: Array) -> None:
        shape = stroke(x, y, (0.0, -0.85), (0.0, 0.8), 0.12)
        for side in (-1.0, 1.0):
            shape = np.minimum(shape, stroke(x, y, (0.0, -0.15), (0.85 * side, 0.3), 0.11))
            shape = np.minimum(shape, stroke(x, y, (0.0, 0.65), (0.35 * side, 0.85), 0.08))
        canvas.paint(cover(shape), self.object)

    def _baseball_diamond(self, canvas: Canvas, x: Array, y: Array) -> None:
        fan = np.maximum(disc(x, y, 0.0, 0.8, 1.6), np.abs(x) + y - 0.8)
        canvas.paint(cover(fan), self.object)
        dirt = np.maximum(disc(x, y, 0.0, 0.8, 0.95), np.abs(x) + y - 0.8)
        canvas.paint(cover(dirt), self.ground)
        infield = (np.abs(x) + np.abs(y - 0.32) - 0.32) / 1.4
        canvas.paint(cover(infield), self.object)

    def _roundabout(self, canvas: Canvas, x: Array, y: Array) -> None:
        roads = np.minimum(np.abs(x), np.abs(y)) - 0.13
        canvas.paint(cover(np.minimum(roads, disc(x, y, 0.0, 0.0, 0.55))), self.object)
        canvas.paint(cover(disc(x, y, 0.0, 0.0, canvas.uniform(0.24, 0.3))), self.ground)

    def _intersection(self, canvas: Canvas, x: Array, y: Array) -> None:
        width = canvas.uniform(0.2, 0.28)
        nearest = np.minimum(np.abs(x), np.abs(y))
        canvas.paint(cover(nearest - width), self.object)
        dashes = (np.sin(14.0 * np.maximum(np.abs(x), np.abs(y))) > 0).astype(np.float32)
        canvas.paint(cover(nearest - 0.04) * dashes, self.ground)

    def _harbor(self, canvas: Canvas, x: Array, y: Array) -> None:
        canvas.paint(cover(np.abs(x) - 0.08), self.object)
        pitch = canvas.uniform(0.36, 0.44)
        v = (y / pitch) % 1.0 - 0.5
        for side in (-1.0, 1.0):
            hull = np.hypot((x - 0.48 * side) / 3.2, v * pitch) - 0.1
            canvas.paint(cover(hull), self.object)

    def _parking_lot(self, canvas: Canvas, x: Array, y: Array) -> None:
        canvas.paint(cover(box(x, y, 0.0, 0.0, 0.95, 0.85)), self.object, 0.85)
        column = np.floor(x / 0.27)
        u = x / 0.27 - column - 0.5
        for number, middle in enumerate((-0.58, 0.0, 0.58)):
            taken = np.sin(column * 12.9 + number * 5.1 + canvas.uniform(0, 6.3)) > -0.55
            car = cover(np.maximum(np.abs(u) * 0.27 - 0.085, np.abs(y - middle) - 0.17)) * taken
            canvas.paint(car * (np.abs(x) < 0.92), self.ground)

    def _storage_tanks(self, canvas: Canvas, x: Array, y: Array) -> None:
        radius = canvas.uniform(0.27, 0.36)
        for cx in (-0.45, 0.45):
            for cy in (-0.45, 0.45):
                there = np.maximum(canvas.chance(0.85), float(cx < 0))
                dark = self.ground * 0.35
                canvas.paint(cover(disc(x, y, cx + 0.1, cy + 0.1, radius)), dark, there)
                canvas.paint(cover(disc(x, y, cx, cy, radius)), self.object, there)

    def _tennis_court(self, canvas: Canvas, x: Array, y: Array) -> None:
        canvas.paint(cover(box(x, y, 0.0, 0.0, 0.62, 0.95)), self.object)
        lines = np.abs(box(x, y, 0.0, 0.0, 0.45, 0.76))
        lines = np.minimum(lines, np.maximum(np.abs(y), np.abs(x) - 0.45))
        lines = np.minimum(lines, np.maximum(np.abs(np.abs(y) - 0.38), np.abs(x) - 0.45))
        lines = np.minimum(lines, np.maximum(np.abs(x), np.abs(y) - 0.38))
        canvas.paint(cover(lines - 0.035), self.ground)

    def _stadium(self, canvas: Canvas, x: Array, y: Array) -> None:
        away = np.hypot(x / 0.75, y / 0.98)
        canvas.paint(cover((away - 1.0) * 0.8), self.object)
        canvas.paint(cover((np.abs(away - 0.8) - 0.04) * 0.8), self.ground, 0.7)
        canvas.paint(cover(box(x, y, 0.0, 0.0, 0.28, 0.46)), self.ground)

    def _runway(self, canvas: Canvas, x: Array, y: Array) -> None:
        canvas.paint(cover(np.abs(x) - 0.33), self.object)
        dashes = (np.sin(10.0 * y + canvas.uniform(0, 6.3)) > 0).astype(np.float32)
        canvas.paint(cover(np.abs(x) - 0.06) * dashes, self.ground)
        taxi = stroke(x, y, (0.0, canvas.uniform(-0.4, 0.4)), (1.6 * canvas.sign(), 0.6), 0.09)
        canvas.paint(cover(np.maximum(taxi, 0.33 - np.abs(x))), self.object)
