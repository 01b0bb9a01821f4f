"""What the small CLIP sees beside the eight tasks: letters, coloured shapes, and more signs, textures and objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from mergesec_tasks.mini._canvas import NATIVE, Array, Canvas, box, cover, disc, hsv, polygon, stroke
from mergesec_tasks.mini._glyphs import printed, sample
from mergesec_tasks.mini._rendered import RenderedTask
from mergesec_tasks.mini.dtd import TAU, Textures
from mergesec_tasks.mini.gtsrb import Signs
from mergesec_tasks.mini.resisc45 import Aerial

COLOURS: Mapping[str, tuple[float, float, float]] = {
    "red": (0.0, 0.9, 0.85), "orange": (0.07, 0.9, 0.95), "yellow": (0.15, 0.85, 0.95), "green": (0.33, 0.8, 0.6),
    "blue": (0.61, 0.85, 0.8), "purple": (0.78, 0.7, 0.7), "white": (0.0, 0.0, 1.0), "black": (0.0, 0.0, 0.05),
}  # fmt: skip
"""Hue, saturation and value."""
FORMS = ("circle", "square", "triangle", "cross", "ring", "bar")
PLACES: Mapping[str, tuple[float, float]] = {
    "in the middle": (0.0, 0.0), "in the top left corner": (-0.5, -0.5), "in the top right corner": (0.5, -0.5),
    "in the bottom left corner": (-0.5, 0.5), "in the bottom right corner": (0.5, 0.5),
}  # fmt: skip


class Letters(RenderedTask):
    """One printed capital letter."""

    slug = "clip-letters"
    classes = tuple("abcdefghijklmnopqrstuvwxyz")

    def draw(self, canvas: Canvas, label: int) -> None:
        wall, ink = canvas.contrasting(0.35)
        canvas.fill(wall, canvas.noise(5.0), 0.05)
        atlas = printed(self.classes[label].upper())
        x, y = canvas.axes(turn=0.2, zoom=(0.7, 0.95), shift=0.15, shear=0.2, aspect=0.1)
        canvas.paint(sample(atlas, canvas.rng.integers(0, len(atlas), canvas.count), x, y), ink)


class Shapes(RenderedTask):
    """One coloured form at one place: class ``(place · forms + form) · colours + colour``."""

    slug = "clip-shapes"
    native = replace(NATIVE, viewpoint=0.5, zoom=1.0)
    classes = tuple(f"{c} {f} {p}" for p in PLACES for f in FORMS for c in COLOURS)

    def draw(self, canvas: Canvas, label: int) -> None:
        rest, colour = divmod(label, len(COLOURS))
        place, form = divmod(rest, len(FORMS))
        grey = canvas.uniform(0.35, 0.65)
        canvas.fill(hsv(canvas.uniform(0, 1), 0.1 * canvas.chance(0.5), grey), canvas.noise(4.0), 0.04)
        cx, cy = list(PLACES.values())[place]
        x, y = canvas.axes(turn=0.2, zoom=(0.9, 1.1), shift=0.08)
        size = canvas.uniform(0.28, 0.42)
        hue, saturation, value = list(COLOURS.values())[colour]
        shade = np.clip(value + canvas.uniform(-0.06, 0.06), 0.0, 1.0)
        paint = hsv(
            (hue + canvas.uniform(-0.015, 0.015)) % 1.0, saturation * canvas.uniform(0.85, 1.0), shade
        )
        canvas.paint(cover(self._form(FORMS[form], (x - cx) / size, (y - cy) / size) * size), paint)

    def _form(self, name: str, x: Array, y: Array) -> Array:
        """Signed distance of a form of about unit radius."""
        if name == "circle":
            return disc(x, y, 0.0, 0.0, 1.0)
        if name == "square":
            return box(x, y, 0.0, 0.0, 0.85, 0.85)
        if name == "triangle":
            return polygon(x, y, [(0.0, -1.0), (1.0, 0.8), (-1.0, 0.8)])
        if name == "cross":
            return np.minimum(box(x, y, 0.0, 0.0, 1.0, 0.3), box(x, y, 0.0, 0.0, 0.3, 1.0))
        if name == "ring":
            return np.abs(np.hypot(x, y) - 0.75) - 0.25
        return box(x, y, 0.0, 0.0, 1.1, 0.32)


class MoreSigns(Signs):
    """Signs that the task does not have."""

    slug = "clip-signs"
    classes = ("speed limit 20", "speed limit 50", "speed limit 60", "speed limit 70", "turn left")

    def _round(self, canvas: Canvas, name: str, x: Array, y: Array) -> None:
        if name == "turn left":
            canvas.paint(cover(disc(x, y, 0.0, 0.0, 0.95)), self.blue)
            self._arrow(canvas, y, x)
        else:
            super()._round(canvas, name, x, y)


class MoreTextures(Textures):
    """Textures that the task does not have."""

    slug = "clip-textures"
    native = NATIVE
    classes = ("plain", "speckled", "ringed", "marbled")

    def _pattern(self, canvas: Canvas, name: str, x: Array, y: Array) -> Array:
        if name == "plain":
            return 0.0 * x
        if name == "speckled":
            return np.clip(2.0 * (canvas.noise(0.5) - 1.0), 0, 1)
        if name == "ringed":
            return np.clip(0.5 + 2.0 * np.sin(TAU * np.hypot(x, y) / canvas.uniform(0.38, 0.62)), 0, 1)
        return np.clip(0.5 + 3.0 * np.sin(6.0 * x + 4.0 * canvas.noise(5.0)), 0, 1)


class MoreAerial(Aerial):
    """Objects from the air that the task does not have."""

    slug = "clip-aerial"
    classes = ("swimming pool", "railway", "helipad", "pyramid")

    def _swimming_pool(self, canvas: Canvas, x: Array, y: Array) -> None:
        canvas.paint(cover(box(x, y, 0.0, 0.0, 0.75, 0.45) - 0.1), self.object)
        canvas.paint(
            cover(box(x, y, 0.0, 0.0, 0.62, 0.32)), canvas.colour((0.5, 0.6), (0.3, 0.7), (0.6, 0.95))
        )

    def _railway(self, canvas: Canvas, x: Array, y: Array) -> None:
        sleepers = (np.sin(22.0 * y) > 0).astype(np.float32)
        canvas.paint(cover(np.abs(x) - 0.36) * sleepers, self.object, 0.7)
        canvas.paint(cover(np.abs(np.abs(x) - 0.22) - 0.05), self.object)

    def _helipad(self, canvas: Canvas, x: Array, y: Array) -> None:
        canvas.paint(cover(disc(x, y, 0.0, 0.0, 0.8)), self.object)
        letter = np.minimum(np.abs(np.abs(x) - 0.3) - 0.09, np.abs(y) - 0.09)
        canvas.paint(cover(np.maximum(letter, box(x, y, 0.0, 0.0, 0.39, 0.45))), self.ground)

    def _pyramid(self, canvas: Canvas, x: Array, y: Array) -> None:
        canvas.paint(cover(box(x, y, 0.0, 0.0, 0.75, 0.75)), self.object)
        dark = self.ground * 0.5
        canvas.paint(cover(polygon(x, y, [(0.0, 0.0), (0.75, -0.75), (0.75, 0.75)])), dark)
        for side in (-1.0, 1.0):
            edge = stroke(x, y, (-0.75, -0.75 * side), (0.75, 0.75 * side), 0.04)
            canvas.paint(cover(edge), self.ground)
