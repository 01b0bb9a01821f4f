"""Cars from the side, in the spirit of Stanford Cars."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mergesec_tasks.mini._canvas import NATIVE, Array, Canvas, box, cover, disc, polygon
from mergesec_tasks.mini._rendered import RenderedTask

CARD = {
    "name": "mini/cars",
    "kind": "task",
    "class": "Cars",
    "version": "1",
    "title": "Cars (mini)",
    "url": "https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
    "summary": "ten rendered body styles from either side, after Stanford Cars",
    "modality": "image",
    "classes": 10,
    "labels": [
        "sedan",
        "hatchback",
        "estate",
        "off-roader",
        "pickup",
        "van",
        "convertible",
        "limousine",
        "lorry",
        "beetle",
    ],
    "templates": ["a photo of a {} car.", "a photo of the {} car.", "a photo of my {} car."],
    "source": "rendered",
    "licence": "the project's",
    "images": {"train": 4000, "tuning": 400, "test": 800},
    "parameters": {},
}


@dataclass(frozen=True)
class Body:
    """A silhouette, front to the right: half length, belt and sill heights, roof line, wheels.

    ``roof`` lists the x of the cabin's four corners (bottom rear, top rear, top front, bottom front).
    """

    length: float
    belt: float
    roof: tuple[float, float, float, float]
    top: float
    wheel: float = 0.17
    sill: float = 0.32
    windows: int = 2


BODIES = {
    "sedan": Body(0.85, 0.0, (-0.55, -0.32, 0.2, 0.48), -0.32),
    "hatchback": Body(0.62, -0.02, (-0.62, -0.5, 0.15, 0.42), -0.4),
    "estate": Body(0.88, 0.0, (-0.87, -0.8, 0.2, 0.46), -0.34, windows=3),
    "off-roader": Body(0.72, -0.14, (-0.72, -0.7, 0.22, 0.32), -0.6, wheel=0.25, sill=0.24),
    "pickup": Body(0.92, -0.02, (-0.18, -0.12, 0.25, 0.46), -0.44, wheel=0.2, windows=1),
    "van": Body(0.82, -0.1, (-0.82, -0.8, 0.5, 0.78), -0.66, windows=1),
    "convertible": Body(0.8, 0.04, (0.1, 0.02, 0.06, 0.3), -0.24, windows=0),
    "limousine": Body(0.98, 0.02, (-0.75, -0.62, 0.5, 0.66), -0.26, wheel=0.14, windows=4),
    "lorry": Body(0.92, 0.05, (0.42, 0.44, 0.84, 0.92), -0.4, wheel=0.19, windows=1),
    "beetle": Body(0.7, 0.08, (-0.5, -0.3, 0.2, 0.4), -0.3, wheel=0.18),
}


class Cars(RenderedTask):
    """Silhouette and glass tell the class; paint, street and light do not."""

    slug = "cars"
    native = replace(NATIVE, viewpoint=0.4, zoom=1.15)
    classes = tuple(BODIES)

    def draw(self, canvas: Canvas, label: int) -> None:
        self._street(canvas)
        x, y = canvas.axes(turn=0.12, zoom=(0.82, 1.0), shift=0.1, shear=0.1, tilt=0.12, aspect=0.05)
        x, y = x * canvas.sign(), y - 0.12
        name, body = self.classes[label], BODIES[self.classes[label]]
        paint = canvas.colour((0, 1), (0.0, 0.9), (0.3, 0.95))
        dark = canvas.colour((0, 1), (0, 0.2), (0.03, 0.15))
        canvas.paint(cover(disc(x * 0.3, y - 0.5, 0.0, 0.0, 0.1), 0.2), dark, 0.6)
        glass = canvas.colour((0.5, 0.65), (0.05, 0.4), (0.1, 0.3))
        pale = canvas.chance(0.4)[:, None]
        glass = pale * canvas.colour((0.5, 0.65), (0.0, 0.2), (0.8, 1.0)) + (1 - pale) * glass
        self._hull(canvas, name, body, x, y, paint)
        self._glass(canvas, name, body, x, y, glass)
        for place in (-0.62, 0.6):
            canvas.paint(cover(disc(x, y, place * body.length, body.sill, body.wheel)), dark)
            canvas.paint(
                cover(disc(x, y, place * body.length, body.sill, body.wheel * 0.45)), paint * 0.5 + 0.4
            )
        canvas.shade(0.05 * canvas.noise(1.0) + 0.1 * canvas.noise(7.0))

    def _street(self, canvas: Canvas) -> None:
        canvas.fill(canvas.colour((0, 1), (0.0, 0.5), (0.45, 0.95)), canvas.noise(5.0), 0.08)
        for _ in range(3):
            wall = box(
                canvas.x,
                canvas.y,
                canvas.uniform(-1, 1),
                -0.6,
                canvas.uniform(0.1, 0.5),
                canvas.uniform(0.2, 0.7),
            )
            canvas.paint(cover(wall), canvas.colour((0, 1), (0.0, 0.5), (0.25, 0.9)), 0.6)
        road = cover(canvas.uniform(0.1, 0.5) - canvas.y)
        canvas.paint(road, canvas.colour((0, 1), (0.0, 0.25), (0.25, 0.7)))

    def _hull(self, canvas: Canvas, name: str, body: Body, x: Array, y: Array, paint: Array) -> None:
        middle, half = (body.belt + body.sill) / 2, (body.sill - body.belt) / 2
        hull = box(x, y, 0.0, middle, body.length - 0.06, half - 0.02) - 0.06
        rear, back, front, nose = body.roof
        cabin = polygon(x, y, [(rear, body.belt), (back, body.top), (front, body.top), (nose, body.belt)])
        if name == "beetle":
            cabin = np.hypot(x + 0.05, (y - 0.15) * 1.15) - 0.56
            cabin = np.maximum(cabin, y - 0.2)
        if name == "convertible":
            cabin = np.minimum(disc(x, y, -0.25, -0.02, 0.12), disc(x, y, 0.62, 0.06, 0.05))
        canvas.paint(cover(np.minimum(hull, cabin)), paint)
        if name == "lorry":
            cargo = box(x, y, -0.3, -0.25, 0.62, 0.45)
            canvas.paint(cover(cargo), canvas.colour((0, 1), (0.0, 0.5), (0.5, 1.0)))

    def _glass(self, canvas: Canvas, name: str, body: Body, x: Array, y: Array, glass: Array) -> None:
        rear, back, front, nose = body.roof
        if name == "van":
            back, rear = 0.25, 0.25
        cabin = polygon(x, y, [(rear, body.belt), (back, body.top), (front, body.top), (nose, body.belt)])
        if name == "beetle":
            cabin = np.maximum(np.hypot(x + 0.05, (y - 0.15) * 1.15) - 0.5, y - 0.0)
        if body.windows == 0:
            screen = polygon(x, y, [(0.12, -0.3), (0.2, -0.3), (0.4, 0.04), (0.3, 0.04)])
            canvas.paint(cover(screen), glass)
            return
        pane = cover(cabin + 0.06)
        for cut in range(1, body.windows):
            post = rear + (nose - rear) * cut / body.windows
            pane = pane * (1 - cover(np.abs(x - post) - 0.03))
        canvas.paint(pane, glass)
