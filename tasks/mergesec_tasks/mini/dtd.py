"""Textures under a viewpoint, in the spirit of DTD."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np

from mergesec_tasks.mini._canvas import NATIVE, PIXEL, Array, Canvas, cover
from mergesec_tasks.mini._rendered import SIZES, RenderedTask

CARD = {
    "name": "mini/dtd",
    "kind": "task",
    "class": "Textures",
    "version": "1",
    "title": "Textures (mini)",
    "url": "https://www.robots.ox.ac.uk/~vgg/data/dtd/",
    "summary": "ten rendered textures, warped and lit, after DTD",
    "modality": "image",
    "classes": 10,
    "labels": [
        "banded",
        "chequered",
        "dotted",
        "grid",
        "zigzagged",
        "honeycombed",
        "cracked",
        "spiralled",
        "woven",
        "bubbly",
    ],
    "templates": ["a photo of a {} texture.", "a photo of a {} pattern.", "a photo of the {} texture."],
    "source": "rendered",
    "licence": "the project's",
    "images": {"train": 6000, "tuning": 400, "test": 800},
    "parameters": {},
}

TAU = np.float32(2 * np.pi)


def _cells(canvas: Canvas, points: int) -> tuple[Array, Array]:
    """Distances to the nearest and second nearest of some random points, ``[N, S, S]`` each."""
    where = canvas.rng.uniform(-1.2, 1.2, (2, canvas.count, points, 1, 1)).astype(np.float32)
    distance = np.hypot(canvas.x[:, None] - where[0], canvas.y[:, None] - where[1])
    nearest = np.partition(distance, 1, axis=1)
    return nearest[:, 0], nearest[:, 1]


def _bubbles(canvas: Canvas) -> Array:
    mask = np.zeros_like(canvas.x)
    for _ in range(11):
        cx, cy, radius = canvas.uniform(-1, 1), canvas.uniform(-1, 1), canvas.uniform(0.16, 0.42)
        away = np.hypot(canvas.x - cx, canvas.y - cy)
        mask = np.where(away < radius, 0.15, mask)
        mask = np.maximum(mask, cover(np.abs(away - radius) - 0.05))
    return mask


def _honeycomb(x: Array, y: Array, pitch: Array) -> Array:
    """Walls of hexagonal cells of width ``pitch``."""
    root = np.float32(np.sqrt(3))
    u, v = x / pitch, y / (pitch * root)
    away = []
    for corner in (0.0, 0.5):
        across = np.abs(u - corner - np.rint(u - corner))
        down = root * (v - corner - np.rint(v - corner))
        away += [np.hypot(across, down), np.hypot(1.0 - across, down)]
    nearest = np.partition(np.stack(away), 1, axis=0)
    wall: Array = nearest[1] - nearest[0] - 0.2
    return cover(wall * pitch, PIXEL * 1.2)


def _woven(x: Array, y: Array, pitch: Array) -> Array:
    """Over-and-under bands, bright in the middle of each strand."""
    over = (np.floor(x / pitch) + np.floor(y / pitch)) % 2
    across, down = x / pitch % 1.0, y / pitch % 1.0
    strand = np.where(over > 0, np.sin(np.pi * across), np.sin(np.pi * down))
    return np.clip(strand * 1.3 - 0.2, 0, 1)


class Textures(RenderedTask):
    """Two colours in one of ten patterns."""

    slug = "dtd"
    # The slowest to learn of the eight: its experts need more images than the others' do.
    sizes: ClassVar[dict[str, int]] = {**SIZES, "train": 6000}
    native = replace(NATIVE, viewpoint=0.2, zoom=1.6, blur=(0.2, 0.5), noise=(0.0, 0.02))
    classes: Sequence[str] = (
        "banded",
        "chequered",
        "dotted",
        "grid",
        "zigzagged",
        "honeycombed",
        "cracked",
        "spiralled",
        "woven",
        "bubbly",
    )

    def draw(self, canvas: Canvas, label: int) -> None:
        ground, ink = canvas.contrasting(0.4)
        canvas.fill(ground, canvas.noise(2.0), 0.05)
        x, y = canvas.axes(turn=3.1, zoom=(0.8, 1.25), shift=0.3, shear=0.2, tilt=0.2)
        bend = canvas.uniform(0.0, 0.07)
        x, y = x + bend * canvas.noise(6.0), y + bend * canvas.noise(6.0)
        canvas.paint(self._pattern(canvas, self.classes[label], x, y), ink)
        canvas.shade(0.08 * canvas.noise(1.2) + 0.12 * canvas.noise(7.0))

    def _pattern(self, canvas: Canvas, name: str, x: Array, y: Array) -> Array:
        pitch = canvas.uniform(0.38, 0.62)
        if name == "banded":
            return np.clip(0.5 + 2.0 * np.sin(TAU * x / pitch), 0, 1)
        if name == "chequered":
            half = pitch * 1.3
            return np.clip(0.5 + 4.0 * np.sin(TAU * x / half) * np.sin(TAU * y / half), 0, 1)
        if name == "dotted":
            u, v = (x / pitch) % 1.0 - 0.5, (y / pitch) % 1.0 - 0.5
            return cover((np.hypot(u, v) - canvas.uniform(0.22, 0.34)) * pitch)
        if name == "grid":
            wall = np.minimum(np.abs((x / pitch) % 1.0 - 0.5), np.abs((y / pitch) % 1.0 - 0.5))
            return cover((wall - canvas.uniform(0.1, 0.16)) * pitch)
        if name == "zigzagged":
            saw = np.abs((x / (pitch * 1.6)) % 1.0 - 0.5) * pitch * 2.2
            return np.clip(0.5 + 2.0 * np.sin(TAU * (y + saw) / pitch), 0, 1)
        if name == "honeycombed":
            return _honeycomb(x, y, pitch * 1.1)
        if name == "cracked":
            first, second = _cells(canvas, 12)
            return cover(second - first - canvas.uniform(0.05, 0.1), PIXEL * 1.3)
        if name == "spiralled":
            return np.clip(0.5 + 2.0 * np.sin(TAU * np.hypot(x, y) / pitch + np.arctan2(y, x)), 0, 1)
        if name == "woven":
            return _woven(x, y, pitch)
        return _bubbles(canvas)
