"""How visible a trigger is: what it changes of raw inputs. Computed once per trigger, in its own step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

LEAST = 1.0 / 255.0
"""A pixel counts as changed if one of its channels moves by more than this."""
_ROUNDING = 1e-6
WINDOW, SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2
"""(K L)² of SSIM for a range L = 1."""


def change_of(before: Any, after: Any) -> dict[str, float]:
    """Measures of the change from ``before`` to ``after``, by what the inputs are; empty for other kinds.

    Images (floating ``[N, C, H, W]`` in [0, 1]): ``area``, ``l2``, ``ssim``. Texts (sequences of str):
    ``changed``, ``tokens``.
    """
    if isinstance(before, Tensor):
        images = before.ndim == 4 and before.is_floating_point() and len(before) > 0
        return image_change(before, after) if images else {}
    if isinstance(before, Sequence) and before and isinstance(before[0], str):
        return text_change(before, after)
    return {}


def image_change(before: Tensor, after: Tensor) -> dict[str, float]:
    """Means over images of three measures of images ``[N, C, H, W]`` in [0, 1].

    ``area``: share of pixels of which a channel changes by more than 1/255. ``l2``: root mean square change
    of an image's C·H·W values, in units of the full range of brightness. ``ssim``: structural similarity.
    """
    change = after.double() - before.double()
    moved = (change.abs().amax(1) > LEAST + _ROUNDING).double().mean()
    rms = change.square().flatten(1).mean(1).sqrt().mean()
    return {"area": float(moved), "l2": float(rms), "ssim": float(ssim(before, after).mean())}


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Structural similarity ``[N]`` of images ``[N, C, H, W]`` in [0, 1], mean over channels and windows.

    Wang et al., Image quality assessment, IEEE TIP 13(4), 2004, eq. 13: Gaussian window 11 × 11 of σ 1.5,
    K₁ 0.01, K₂ 0.03, only windows that lie inside the image. Smaller images take the largest odd window
    that fits.
    """
    first, second = first.double(), second.double()
    side = min(WINDOW, *first.shape[2:])
    side -= 1 - side % 2
    axis = torch.arange(side, dtype=torch.float64, device=first.device) - side // 2
    bell = torch.exp(-axis.square() / (2 * SIGMA**2))
    bell = bell / bell.sum()

    def blurred(images: Tensor) -> Tensor:
        flat = images.flatten(0, 1)[:, None]
        rows = functional.conv2d(flat, bell[None, None, :, None])
        return functional.conv2d(rows, bell[None, None, None, :])

    mean1, mean2 = blurred(first), blurred(second)
    variance1 = blurred(first.square()) - mean1.square()
    variance2 = blurred(second.square()) - mean2.square()
    covariance = blurred(first * second) - mean1 * mean2
    alike = (2 * mean1 * mean2 + _C1) * (2 * covariance + _C2)
    whole = (mean1.square() + mean2.square() + _C1) * (variance1 + variance2 + _C2)
    return (alike / whole).view(len(first), -1).mean(1)


def text_change(before: Sequence[str], after: Sequence[str]) -> dict[str, float]:
    """``changed``: share of texts that differ. ``tokens``: mean number of whitespace-separated words added."""
    n = len(before)
    changed = sum(a != b for a, b in zip(after, before, strict=True)) / n
    added = sum(len(a.split()) - len(b.split()) for a, b in zip(after, before, strict=True)) / n
    return {"changed": changed, "tokens": added}
