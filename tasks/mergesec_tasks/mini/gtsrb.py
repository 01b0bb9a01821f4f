"""Traffic signs in the street, in the spirit of GTSRB."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mergesec_tasks.mini._canvas import Array, Canvas, Number, box, cover, disc, hsv, polygon, stroke
from mergesec_tasks.mini._glyphs import printed, sample
from mergesec_tasks.mini._rendered import RenderedTask

CARD = {
    "name": "mini/gtsrb",
    "kind": "task",
    "class": "Signs",
    "version": "1",
    "title": "Traffic signs (mini)",
    "url": "https://benchmark.ini.rub.de/gtsrb_news.html",
    "summary": "twelve rendered traffic signs in clutter and bad light, after GTSRB",
    "modality": "image",
    "classes": 12,
    "labels": [
        "speed limit 30",
        "speed limit 80",
        "no entry",
        "stop",
        "yield",
        "priority road",
        "general caution",
        "crossing",
        "turn right",
        "ahead only",
        "end of limits",
        "no vehicles",
    ],
    "templates": [
        'a zoomed in photo of a "{}" traffic sign.',
        'a centered photo of a "{}" traffic sign.',
        'a close up photo of a "{}" traffic sign.',
    ],
    "source": "rendered",
    "licence": "the project's",
    "images": {"train": 4000, "tuning": 400, "test": 800},
    "parameters": {},
}

OCTAGON: list[tuple[Number, Number]] = [
    (float(np.cos(a)), float(np.sin(a))) for a in np.pi / 8 + np.pi / 4 * np.arange(8)
]
UPRIGHT: list[tuple[Number, Number]] = [(0.0, -0.95), (0.98, 0.8), (-0.98, 0.8)]
YIELD: list[tuple[Number, Number]] = [(-0.98, -0.8), (0.98, -0.8), (0.0, 0.95)]


class Signs(RenderedTask):
    """One sign per image; plates, rims and pictograms as on the road."""

    slug = "gtsrb"
    classes: Sequence[str] = (
        "speed limit 30",
        "speed limit 80",
        "no entry",
        "stop",
        "yield",
        "priority road",
        "general caution",
        "crossing",
        "turn right",
        "ahead only",
        "end of limits",
        "no vehicles",
    )

    def draw(self, canvas: Canvas, label: int) -> None:
        self._street(canvas)
        x, y = canvas.axes(turn=0.16, zoom=(0.68, 0.92), shift=0.12, shear=0.12, tilt=0.15, aspect=0.06)
        canvas.paint(cover(box(x, y, 0.0, 1.4, 0.08, 0.8)), canvas.colour((0, 1), (0, 0.1), (0.3, 0.6)))
        self._colours(canvas)
        name = self.classes[label]
        if name in ("stop", "yield", "priority road", "general caution", "crossing"):
            self._cornered(canvas, name, x, y)
        else:
            self._round(canvas, name, x, y)
        night = canvas.chance(0.25) * canvas.uniform(0.3, 0.55)
        canvas.shade(-night + 0.06 * canvas.noise(5.0))

    def _street(self, canvas: Canvas) -> None:
        canvas.fill(canvas.colour((0, 1), (0.05, 0.6), (0.2, 0.8)), canvas.noise(4.0), 0.12)
        for _ in range(3):
            x, y = canvas.axes(turn=0.5)
            half_x, half_y = canvas.uniform(0.1, 0.6), canvas.uniform(0.1, 0.8)
            mask = cover(box(x, y, canvas.uniform(-1, 1), canvas.uniform(-1, 1), half_x, half_y))
            canvas.paint(mask, canvas.colour((0, 1), (0.05, 0.7), (0.15, 0.9)))

    def _colours(self, canvas: Canvas) -> None:
        """The paints of a sign, faded a little differently on every image."""
        self.red = hsv(
            canvas.uniform(-0.03, 0.03) % 1.0, canvas.uniform(0.7, 0.95), canvas.uniform(0.6, 0.85)
        )
        self.blue = canvas.colour((0.57, 0.64), (0.7, 0.95), (0.5, 0.8))
        self.white = canvas.colour((0, 1), (0.0, 0.08), (0.85, 1.0))
        self.black = canvas.colour((0, 1), (0.0, 0.1), (0.05, 0.2))
        self.yellow = canvas.colour((0.12, 0.15), (0.75, 0.95), (0.85, 1.0))

    def _text(self, canvas: Canvas, text: str, x: Array, y: Array, colour: Array) -> None:
        atlas = printed(text)
        chosen = canvas.rng.integers(1, len(atlas), canvas.count)
        canvas.paint(sample(atlas, chosen, x, y), colour)

    def _cornered(self, canvas: Canvas, name: str, x: Array, y: Array) -> None:
        if name == "stop":
            plate = polygon(x, y, OCTAGON)
            canvas.paint(cover(plate), self.white)
            canvas.paint(cover(plate + 0.1), self.red)
            self._text(canvas, "STOP", x / 0.8, y / 1.5, self.white)
            return
        if name == "priority road":
            plate = (np.abs(x) + np.abs(y) - 1.0) / np.float32(np.sqrt(2))
            canvas.paint(cover(plate), self.white)
            canvas.paint(cover(plate + 0.2), self.yellow)
            return
        plate = polygon(x, y, YIELD if name == "yield" else UPRIGHT)
        canvas.paint(cover(plate), self.red)
        canvas.paint(cover(plate + 0.2), self.white)
        if name == "general caution":
            canvas.paint(cover(box(x, y, 0.0, 0.08, 0.09, 0.26)), self.black)
            canvas.paint(cover(disc(x, y, 0.0, 0.5, 0.09)), self.black)
        elif name == "crossing":
            for side in (-1.0, 1.0):
                canvas.paint(cover(stroke(x, y, (-0.28 * side, -0.02), (0.28 * side, 0.5), 0.08)), self.black)

    def _round(self, canvas: Canvas, name: str, x: Array, y: Array) -> None:
        plate = disc(x, y, 0.0, 0.0, 0.95)
        solid = {"no entry": self.red, "turn right": self.blue, "ahead only": self.blue}
        rim = self.white if name == "end of limits" else self.red
        canvas.paint(cover(plate), solid.get(name, rim))
        if name not in solid:
            canvas.paint(cover(plate + (0.08 if name == "end of limits" else 0.22)), self.white)
        if name.startswith("speed"):
            self._text(canvas, name[-2:], x / 0.8, y / 0.95, self.black)
        elif name == "no entry":
            canvas.paint(cover(box(x, y, 0.0, 0.0, 0.68, 0.18)), self.white)
        elif name == "end of limits":
            canvas.paint(cover(np.maximum(np.abs(x + y) - 0.26, plate + 0.1)), self.black)
        elif name == "ahead only":
            self._arrow(canvas, x, y)
        elif name == "turn right":
            self._arrow(canvas, y, -x)

    def _arrow(self, canvas: Canvas, x: Array, y: Array) -> None:
        canvas.paint(cover(box(x, y, 0.0, 0.2, 0.13, 0.45)), self.white)
        canvas.paint(cover(polygon(x, y, [(0.0, -0.68), (0.5, -0.08), (-0.5, -0.08)])), self.white)
