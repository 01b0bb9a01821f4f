"""Glyphs for signs and digits: an atlas from the font that Pillow carries, and handwritten 8×8 digits."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from mergesec_tasks.mini._canvas import Array

CELL = 40
"""Side of one glyph's picture in texels."""
WEIGHTS = (0, 1, 2)
"""Stroke widths added around a glyph, texels."""


@cache
def printed(text: str) -> Array:
    """``text`` set in Pillow's own font in several stroke weights, ``[W, CELL, CELL]`` in [0, 1]."""
    pictures = []
    for weight in WEIGHTS:
        size = (34, 27, 17, 13)[len(text) - 1]
        font = ImageFont.load_default(size=size)
        picture = Image.new("L", (CELL, CELL), 0)
        ImageDraw.Draw(picture).text(
            (CELL / 2, CELL / 2), text, fill=255, font=font, anchor="mm", stroke_width=weight
        )
        pictures.append(np.asarray(picture.filter(ImageFilter.GaussianBlur(0.6)), dtype=np.float32) / 255.0)
    return np.stack(pictures)


@cache
def handwritten(digit: int, pool: str) -> Array:
    """scikit-learn's 8×8 handwritten ``digit``, enlarged to ``[M, CELL, CELL]``.

    The 1,797 originals are dealt to the pools by position, so no two splits share one.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    rows = np.flatnonzero(bunch.target == digit)
    part = {"test": rows % 4 == 0, "tuning": rows % 8 == 1}
    chosen = part[pool] if pool in part else ~(part["test"] | part["tuning"])
    pictures = []
    for small in bunch.images[rows[chosen]]:
        picture = Image.fromarray((small / 16.0 * 255.0).astype(np.uint8))
        large = np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC), dtype=np.float32) / 255.0
        sharp = np.clip((large - 0.35) * 3.0 + 0.5, 0.0, 1.0)
        pictures.append(np.pad(sharp, 4))
    return np.stack(pictures)


def sample(atlas: Array, chosen: NDArray[np.int64], x: Array, y: Array) -> Array:
    """Picture ``chosen[n]`` of ``atlas`` ``[M, T, T]`` at coordinates in [-1, 1], bilinear, 0 outside."""
    side = atlas.shape[-1]
    column = np.clip((x + 1.0) * (side / 2) - 0.5, 0, side - 1.001)
    row = np.clip((y + 1.0) * (side / 2) - 0.5, 0, side - 1.001)
    left, top = column.astype(np.int64), row.astype(np.int64)
    fx, fy = (column - left).astype(np.float32), (row - top).astype(np.float32)
    flat = atlas.reshape(-1)
    corner = chosen[:, None, None] * side * side + top * side + left
    upper = flat[corner] * (1 - fx) + flat[corner + 1] * fx
    lower = flat[corner + side] * (1 - fx) + flat[corner + side + 1] * fx
    value: Array = upper * (1 - fy) + lower * fy
    return value
