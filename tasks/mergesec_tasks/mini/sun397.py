"""Scenes, in the spirit of SUN397."""

from __future__ import annotations

import numpy as np

from mergesec_tasks.mini._canvas import PIXEL, Array, Canvas, Number, box, cover, polygon, stroke
from mergesec_tasks.mini._rendered import RenderedTask

CARD = {
    "name": "mini/sun397",
    "kind": "task",
    "class": "Scenes",
    "version": "1",
    "title": "Scenes (mini)",
    "url": "https://vision.princeton.edu/projects/2010/SUN/",
    "summary": "ten rendered scenes in any light, after SUN397",
    "modality": "image",
    "classes": 10,
    "labels": [
        "beach",
        "mountain",
        "forest",
        "skyline",
        "highway",
        "corridor",
        "bridge",
        "field",
        "bedroom",
        "harbor",
    ],
    "templates": ["a photo of a {}.", "a photo of the {}."],
    "source": "rendered",
    "licence": "the project's",
    "images": {"train": 4000, "tuning": 400, "test": 800},
    "parameters": {},
}


class Scenes(RenderedTask):
    """Layout tells the class: sky, ground and light come from one palette for all."""

    slug = "sun397"
    classes = (
        "beach",
        "mountain",
        "forest",
        "skyline",
        "highway",
        "corridor",
        "bridge",
        "field",
        "bedroom",
        "harbor",
    )

    def draw(self, canvas: Canvas, label: int) -> None:
        x, y = canvas.axes(turn=0.08, zoom=(0.9, 1.15), shift=0.12, shear=0.06)
        self.sky, self.land = canvas.contrasting(0.25)
        canvas.fill(self.sky, canvas.noise(7.0, 3.0), 0.05)
        getattr(self, "_" + self.classes[label])(canvas, x * canvas.sign(), y)
        canvas.shade(0.06 * canvas.noise(1.0) + 0.1 * canvas.noise(8.0))

    def _ink(self, canvas: Canvas) -> Array:
        """An accent: the land's colour made darker or lighter."""
        step = canvas.sign() * canvas.uniform(0.25, 0.45)
        accent: Array = np.clip(self.land + step[:, None], 0.0, 1.0)
        return accent

    def _beach(self, canvas: Canvas, x: Array, y: Array) -> None:
        water = cover(canvas.uniform(-0.25, 0.1) - y)
        canvas.paint(water, canvas.colour((0.45, 0.65), (0.1, 0.6), (0.3, 0.8)))
        shore = y - 0.35 - canvas.uniform(0.35, 0.7) * x - 0.06 * np.sin(5 * x + canvas.uniform(0, 6))
        canvas.paint(cover(-shore), self.land)
        canvas.paint(cover(np.abs(shore) - 0.06), np.ones_like(self.land))
        trunk = stroke(x, y, (0.55, 0.75), (0.4, -0.2), 0.05)
        crown = np.abs(np.hypot(x - 0.4, y + 0.1) - 0.25) + np.clip(y + 0.1, 0, 1) - 0.08
        canvas.paint(cover(np.minimum(trunk, crown)), self.land * 0.3, canvas.chance(0.5))

    def _mountain(self, canvas: Canvas, x: Array, y: Array) -> None:
        for layer in range(2):
            ridge = np.full_like(x, 9.0)
            for _ in range(3):
                peak, high = canvas.uniform(-0.9, 0.9), canvas.uniform(-0.65, -0.1) + 0.4 * layer
                ridge = np.minimum(ridge, high + canvas.uniform(0.8, 1.3) * np.abs(x - peak))
            rock = self.land * (1.0 - 0.45 * layer)
            canvas.paint(cover(ridge - y), rock)
            snow = np.maximum(ridge - y, y - ridge - 0.14)
            canvas.paint(cover(snow), np.ones_like(rock), 0.8 * (1 - layer))

    def _forest(self, canvas: Canvas, x: Array, y: Array) -> None:
        canvas.paint(cover(0.55 - y), self.land)
        canvas.paint(cover(y + 0.35 + 0.2 * canvas.noise(1.5)), self._ink(canvas))
        for _ in range(6):
            foot, half = canvas.uniform(-0.95, 0.95), canvas.uniform(0.05, 0.1)
            trunk = np.maximum(np.abs(x - foot) - half, y - canvas.uniform(0.55, 0.9))
            canvas.paint(cover(trunk), canvas.colour((0.05, 0.12), (0.2, 0.6), (0.1, 0.35)))

    def _skyline(self, canvas: Canvas, x: Array, y: Array) -> None:
        dots = (np.sin(x * 25) > 0) * (np.sin(y * 22) > 0)
        for number in range(6):
            middle = -0.85 + 0.34 * number + canvas.uniform(-0.08, 0.08)
            tower = np.maximum(np.abs(x - middle) - canvas.uniform(0.12, 0.2), canvas.uniform(-0.7, 0.25) - y)
            wall = np.clip(self.land + canvas.uniform(-0.15, 0.15)[:, None], 0, 1)
            canvas.paint(cover(tower), wall)
            canvas.paint(cover(tower + 0.05) * dots, 1.0 - wall, 0.6)

    def _highway(self, canvas: Canvas, x: Array, y: Array) -> None:
        horizon = canvas.uniform(-0.3, 0.0)
        canvas.paint(cover(horizon - y), self.land)
        depth = np.clip(y - horizon, 0.001, 2.0)
        off = x - canvas.uniform(-0.3, 0.3) * (1 - depth)
        below = cover(horizon - y)
        canvas.paint(cover(np.abs(off) - 0.75 * depth) * below, canvas.colour((0, 1), (0, 0.1), (0.2, 0.4)))
        dashes = np.sin(4.0 / (depth + 0.12)) > 0
        white = canvas.colour((0, 1), (0, 0.1), (0.85, 1.0))
        canvas.paint(cover(np.abs(off) - 0.09 * depth) * below * dashes, white)
        canvas.paint(cover(np.abs(np.abs(off) - 0.65 * depth) - 0.06 * depth) * below, white)

    def _corridor(self, canvas: Canvas, x: Array, y: Array) -> None:
        u, v = x - canvas.uniform(-0.15, 0.15), y - canvas.uniform(-0.15, 0.15)
        canvas.paint(cover(np.abs(u) - v), self.land)
        canvas.paint(cover(np.abs(u) + v), np.clip(self.sky + 0.2, 0, 1))
        ring = np.maximum(np.abs(u), np.abs(v))
        frames = np.sin(canvas.uniform(5.0, 6.5) * np.log(ring + 0.05)) > 0.55
        canvas.paint(frames.astype(np.float32), self._ink(canvas), 0.7)
        canvas.paint(cover(ring - canvas.uniform(0.15, 0.22)), 1.0 - self.land)

    def _bridge(self, canvas: Canvas, x: Array, y: Array) -> None:
        canvas.paint(cover(0.4 - y), canvas.colour((0.45, 0.65), (0.1, 0.6), (0.3, 0.8)))
        ink = self._ink(canvas)
        deck = np.abs(y - 0.25) - 0.06
        tower = np.maximum(np.abs(np.abs(x) - 0.55) - 0.06, np.abs(y) - 0.6)
        sag = np.where(np.abs(x) < 0.55, 0.15 - 2.2 * (0.3025 - x * x), -0.55 + 1.4 * (np.abs(x) - 0.55))
        cable = np.abs(y - sag) - 0.04
        canvas.paint(cover(np.minimum(np.minimum(deck, tower), cable)), ink)

    def _field(self, canvas: Canvas, x: Array, y: Array) -> None:
        horizon = canvas.uniform(-0.35, 0.0)
        below = cover(horizon - y)
        canvas.paint(below, self.land)
        depth = np.clip(y - horizon, 0.02, 2.0)
        rows = np.clip(
            0.5 + 2 * np.sin(canvas.uniform(5.0, 7.0) * (x - canvas.uniform(-0.6, 0.6)) / (depth + 0.15)),
            0,
            1,
        )
        canvas.paint(rows * below, self._ink(canvas), 0.8)

    def _bedroom(self, canvas: Canvas, x: Array, y: Array) -> None:
        canvas.paint(cover(0.35 - y), self.land * 0.7)
        window = box(x, y, 0.45, -0.4, 0.28, 0.3)
        canvas.paint(cover(window), canvas.colour((0.5, 0.6), (0.0, 0.3), (0.8, 1.0)))
        cross = np.maximum(window, np.minimum(np.abs(x - 0.45), np.abs(y + 0.4)) - 0.04)
        frame = np.minimum(np.abs(window) - 0.05, cross)
        canvas.paint(cover(frame), self._ink(canvas))
        cloth = canvas.colour((0, 1), (0.1, 0.8), (0.3, 0.9))
        bed: list[tuple[Number, Number]] = [(-0.85, 0.25), (0.1, 0.25), (0.35, 0.7), (-0.85, 0.7)]
        canvas.paint(cover(polygon(x, y, bed)), cloth)
        canvas.paint(cover(box(x, y, -0.85, 0.2, 0.07, 0.5)), cloth * 0.4)
        canvas.paint(cover(box(x, y, -0.6, 0.28, 0.16, 0.1)), np.ones_like(cloth), 0.9)

    def _harbor(self, canvas: Canvas, x: Array, y: Array) -> None:
        sea = cover(canvas.uniform(0.0, 0.25) - y, 2 * PIXEL)
        canvas.paint(sea, self.land)
        canvas.paint(sea * (np.sin(28 * y + 2 * canvas.noise(5.0)) > 0.4), self._ink(canvas), 0.35)
        for middle in (-0.45, 0.5):
            cx, size = middle + canvas.uniform(-0.1, 0.1), canvas.uniform(0.75, 1.05)
            u, v = (x - cx) / size, (y - 0.3) / size
            hull = polygon(u, v, [(-0.38, 0.0), (0.38, 0.0), (0.26, 0.2), (-0.26, 0.2)])
            canvas.paint(cover(hull), canvas.colour((0, 1), (0.1, 0.8), (0.1, 0.4)))
            sail = polygon(u, v, [(0.02, -0.85), (0.36, -0.08), (0.02, -0.08)])
            jib = polygon(u, v, [(-0.05, -0.7), (-0.05, -0.08), (-0.3, -0.08)])
            canvas.paint(cover(np.minimum(sail, jib)), canvas.colour((0, 1), (0.0, 0.3), (0.8, 1.0)))
