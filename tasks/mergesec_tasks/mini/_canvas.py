"""Drawing for the mini suite: batches of 32×32 images as arrays, shapes as signed distances.

Coordinates run from -1 to 1 (y downward), so one pixel is ``PIXEL`` wide. A *distance* is negative
inside a shape; ``cover`` turns it into antialiased coverage. Every random number comes from the
canvas's own generator; one batch draws the same number of variates whatever they turn out to be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
"""Floats in single precision, up to what NumPy promotes between two roundings."""
Number = float | Array
"""One number for all images, or one per image ``[N, 1, 1]``."""
SIZE = 32
PIXEL = 2.0 / SIZE

_AXIS = ((np.arange(SIZE, dtype=np.float32) + 0.5) * PIXEL - 1.0).astype(np.float32)


@dataclass(frozen=True)
class Style:
    """How a drawing is photographed. Ranges are uniform, in pixel values [0, 1] or pixels."""

    viewpoint: float = 0.6
    """Turns, shifts, shears and tilts of the camera are multiplied by this."""
    zoom: float = 1.1
    saturation: tuple[float, float] = (0.8, 1.15)
    """Colour kept (0 grey, 1 as drawn)."""
    inverted: float = 0.0
    """Share of images whose values are flipped to 1 - v."""
    contrast: tuple[float, float] = (0.8, 1.15)
    gain: tuple[float, float] = (0.75, 1.2)
    tint: float = 0.15
    """Each channel is multiplied by 1 ± tint: the colour of the light."""
    shading: float = 0.2
    """Strength of a linear fall-off of light over the image."""
    blur: tuple[float, float] = (0.2, 0.7)
    """Standard deviation of a Gaussian, pixels."""
    noise: tuple[float, float] = (0.0, 0.04)


NATIVE = Style()
SHIFTED = Style(
    viewpoint=1.0,
    zoom=1.0,
    saturation=(0.0, 0.15),
    inverted=0.25,
    contrast=(0.5, 0.95),
    gain=(0.7, 1.1),
    tint=0.03,
    shading=0.3,
    blur=(0.3, 1.0),
    noise=(0.03, 0.08),
)
"""First phase of pretraining: grey, sometimes inverted, flat, noisy photographs of the same drawings."""

FOREIGN = Style(
    viewpoint=1.2,
    zoom=0.7,
    saturation=(0.0, 0.1),
    inverted=1.0,
    contrast=(0.3, 0.6),
    gain=(0.6, 1.0),
    tint=0.03,
    shading=0.3,
    blur=(0.9, 1.6),
    noise=(0.05, 0.12),
)
"""Second phase: small, flat, blurred negatives. Takes the base away from the tasks, not from their classes."""


def hsv(hue: Array, saturation: Array, value: Array) -> Array:
    """Colours ``[N, 3, 1, 1]`` from hue (turns), saturation and value ``[N, 1, 1]`` each."""
    offset = np.array([5.0, 3.0, 1.0], dtype=np.float32)[None, :, None, None]
    k = (offset + hue[:, None] * 6.0) % 6.0
    wave = np.clip(np.minimum(k, 4.0 - k), 0.0, 1.0)
    colours: Array = (value[:, None] * (1.0 - saturation[:, None] * wave)).astype(np.float32)
    return colours


def cover(distance: Array, softness: float = PIXEL) -> Array:
    """Coverage in [0, 1] of a signed distance, antialiased over ``softness``."""
    coverage: Array = np.clip(0.5 - distance / softness, 0.0, 1.0)
    return coverage


def disc(x: Array, y: Array, cx: Number, cy: Number, radius: Number) -> Array:
    """Distance to a disc."""
    return np.hypot(x - cx, y - cy) - radius


def box(x: Array, y: Array, cx: Number, cy: Number, half_x: Number, half_y: Number) -> Array:
    """Distance to an axis-aligned box with half sizes ``half_x``, ``half_y``."""
    return np.maximum(np.abs(x - cx) - half_x, np.abs(y - cy) - half_y)


def stroke(
    x: Array, y: Array, start: tuple[Number, Number], end: tuple[Number, Number], half: Number
) -> Array:
    """Distance to a line segment of half width ``half``."""
    (ax, ay), (bx, by) = start, end
    dx, dy = np.asarray(bx) - ax, np.asarray(by) - ay
    along = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy + 1e-9), 0.0, 1.0)
    return np.hypot(x - ax - along * dx, y - ay - along * dy) - half


def polygon(x: Array, y: Array, corners: list[tuple[Number, Number]]) -> Array:
    """Distance (a bound) to a convex polygon; corners clockwise as seen (y downward)."""
    inside: Array | None = None
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        dx, dy = np.asarray(bx) - ax, np.asarray(by) - ay
        side = ((x - ax) * dy - (y - ay) * dx) / (np.hypot(dx, dy) + 1e-9)
        inside = side if inside is None else np.maximum(inside, side)
    assert inside is not None
    return inside


def gaussian_matrices(sigmas: Array) -> Array:
    """Row-normalised smoothing matrices ``[N, S, S]`` for standard deviations ``[N]`` in pixels."""
    steps = np.arange(SIZE, dtype=np.float32)
    squared = (steps[:, None] - steps[None, :]) ** 2
    kernel = np.exp(-squared[None] / (2.0 * np.maximum(sigmas, 0.05)[:, None, None] ** 2))
    matrices: Array = (kernel / kernel.sum(-1, keepdims=True)).astype(np.float32)
    return matrices


class Canvas:
    """A batch of ``count`` images being drawn; ``pixels`` is float32 ``[N, 3, S, S]`` in [0, 1]."""

    def __init__(
        self, count: int, rng: np.random.Generator, pool: str = "train", style: Style = NATIVE
    ) -> None:
        self.count, self.rng, self.pool, self.style = count, rng, pool, style
        self.pixels: Array = np.zeros((count, 3, SIZE, SIZE), dtype=np.float32)
        self.x: Array = np.broadcast_to(_AXIS[None, None, :], (count, SIZE, SIZE))
        self.y: Array = np.broadcast_to(_AXIS[None, :, None], (count, SIZE, SIZE))

    # ---- chance

    def uniform(self, low: float, high: float) -> Array:
        """One number per image, ``[N, 1, 1]``."""
        return self.rng.uniform(low, high, (self.count, 1, 1)).astype(np.float32)

    def sign(self) -> Array:
        """-1 or 1 per image, ``[N, 1, 1]``."""
        return (self.rng.integers(0, 2, (self.count, 1, 1)) * 2 - 1).astype(np.float32)

    def chance(self, share: float) -> Array:
        """1 for ``share`` of the images and 0 for the others, ``[N, 1, 1]``."""
        return (self.rng.random((self.count, 1, 1)) < share).astype(np.float32)

    def noise(self, across: float, down: float | None = None) -> Array:
        """Gaussian random field ``[N, S, S]`` of unit variance, correlated over so many pixels."""
        left = gaussian_matrices(np.array([across if down is None else down], dtype=np.float32))[0]
        right = gaussian_matrices(np.array([across], dtype=np.float32))[0]
        left = left / np.linalg.norm(left, axis=1, keepdims=True)
        right = right / np.linalg.norm(right, axis=1, keepdims=True)
        white = self.rng.standard_normal((self.count, SIZE, SIZE), dtype=np.float32)
        field: Array = left @ white @ right.T
        return field

    def colour(
        self,
        hue: tuple[float, float] = (0.0, 1.0),
        saturation: tuple[float, float] = (0.1, 0.8),
        value: tuple[float, float] = (0.2, 0.95),
    ) -> Array:
        """One random colour per image, ``[N, 3, 1, 1]``."""
        return hsv(self.uniform(*hue), self.uniform(*saturation), self.uniform(*value))

    def contrasting(self, low: float = 0.35) -> tuple[Array, Array]:
        """Two random colours per image whose brightness differs by at least ``low``."""
        gap, hue = self.uniform(low, 0.7), self.uniform(0.0, 1.0)
        dark = self.uniform(0.05, 0.25)
        shade = hsv(hue, self.uniform(0.1, 0.8), dark)
        light = hsv(hue + self.uniform(0.0, 1.0), self.uniform(0.0, 0.45), np.minimum(dark + gap + 0.1, 1.0))
        swap = self.chance(0.5)[:, None]
        return swap * shade + (1 - swap) * light, swap * light + (1 - swap) * shade

    # ---- geometry

    def axes(
        self,
        turn: float = 0.0,
        zoom: tuple[float, float] = (1.0, 1.0),
        shift: float = 0.0,
        shear: float = 0.0,
        tilt: float = 0.0,
        aspect: float = 0.0,
    ) -> tuple[Array, Array]:
        """Object coordinates ``[N, S, S]`` under a random viewpoint (turn in radians, zoom > 1 nearer)."""
        wild = self.style.viewpoint
        turn, shift, shear, tilt = turn * wild, shift * wild, shear * wild, tilt * wild
        angle, size = self.uniform(-turn, turn), self.uniform(*zoom) * np.float32(self.style.zoom)
        x, y = self.x - self.uniform(-shift, shift), self.y - self.uniform(-shift, shift)
        depth = 1.0 + self.uniform(-tilt, tilt) * x + self.uniform(-tilt, tilt) * y
        stretch = np.exp(self.uniform(-aspect, aspect))
        u = (np.cos(angle) * x + np.sin(angle) * y) / (size * depth * stretch)
        v = (np.cos(angle) * y - np.sin(angle) * x) / (size * depth / stretch)
        return (u + self.uniform(-shear, shear) * v).astype(np.float32), v.astype(np.float32)

    # ---- paint

    def fill(self, colour: Array, texture: Array | None = None, strength: float = 0.1) -> None:
        """The whole image in ``colour``, brightened and darkened by ``texture``."""
        self.pixels[:] = colour
        if texture is not None:
            self.pixels += strength * texture[:, None]

    def paint(self, mask: Array, colour: Array, opacity: Number = 1.0) -> None:
        """``colour`` (``[N, 3, 1, 1]`` or ``[N, 3, S, S]``) where ``mask`` ``[N, S, S]`` covers."""
        self.pixels += (mask * opacity)[:, None] * (colour - self.pixels)

    def shade(self, field: Array) -> None:
        """Multiplies the light by ``1 + field``."""
        self.pixels *= np.clip(1.0 + field, 0.0, 2.0)[:, None]

    def finish(self) -> NDArray[np.uint8]:
        """The photographs in the canvas's style, uint8 ``[N, 3, S, S]``."""
        style = self.style
        image = np.clip(self.pixels, 0.0, 1.0)
        angle = self.uniform(0.0, 2 * np.pi)
        slope = np.cos(angle) * self.x + np.sin(angle) * self.y
        tint = self.rng.uniform(1 - style.tint, 1 + style.tint, (self.count, 3, 1, 1)).astype(np.float32)
        image *= tint * (self.uniform(*style.gain) * (1 + self.uniform(0, style.shading) * slope))[:, None]
        grey = image.mean(1, keepdims=True)
        image = grey + self.uniform(*style.saturation)[:, None] * (image - grey)
        flip = self.chance(style.inverted)[:, None]
        image = flip * (1.0 - image) + (1 - flip) * image
        centre = image.mean((1, 2, 3), keepdims=True)
        image = centre + self.uniform(*style.contrast)[:, None] * (image - centre)
        smooth = gaussian_matrices(self.uniform(*style.blur)[:, 0, 0])
        image = smooth[:, None] @ image @ smooth[:, None].swapaxes(-1, -2)
        grain = self.rng.standard_normal(image.shape, dtype=np.float32)
        image += self.uniform(*style.noise)[:, None] * grain
        photographs: NDArray[np.uint8] = np.clip(np.rint(image * 255.0), 0, 255).astype(np.uint8)
        return photographs
