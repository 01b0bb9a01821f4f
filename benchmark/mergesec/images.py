"""Images as a modality: uint8 ``[N, 3, H, W]`` stored, float32 in [0, 1] once batched; random views, visibility."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mergesec.classification import ClassificationTask
from mergesec.contracts import ContractError, Split
from mergesec.weights import check_finite

LEAST = 1.0 / 255.0
"""A pixel counts as changed if one of its channels moves by more than this."""
_ROUNDING = 1e-6
WINDOW, SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2
"""(K L)² of SSIM for a range L = 1."""


class ImageTask(ClassificationTask):
    """A classification task over images: subclasses name ``classes`` and implement ``load``."""

    def batch(self, split: Split, index: Tensor, device: torch.device) -> Split:
        """Rows ``index`` on ``device``: bytes become float32 in [0, 1]."""
        rows = super().batch(split, index, device)
        inputs = rows.inputs
        return rows.with_inputs(inputs.float().div_(255.0)) if inputs.dtype == torch.uint8 else rows

    def views(self, inputs: Any, kind: str, generator: torch.Generator) -> Tensor:
        """Random views of a batch, as ``recipe.augment`` asks for."""
        return augmented(inputs, kind, generator)

    def check_triggered(self, triggered: Any, inputs: Any, who: str) -> Tensor:
        """ContractError unless ``triggered`` are finite images of the shape of ``inputs``.

        A network fed NaN still names a class, so this would otherwise read as a success of the attack.
        """
        if not isinstance(triggered, Tensor) or triggered.shape != inputs.shape:
            found = list(triggered.shape) if isinstance(triggered, Tensor) else type(triggered).__name__
            raise ContractError(f"{who}.apply returned {found} for inputs {list(inputs.shape)}")
        check_finite({"apply": triggered}, who)
        return triggered

    def visibility(self, inputs: Any, triggered: Any) -> dict[str, float]:
        """``area``, ``l2`` and ``ssim`` of ``image_change``."""
        return image_change(inputs, triggered)


def augmented(images: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Random views of images float ``[N, C, H, W]``: shifted by up to an eighth (edges repeated), mirrored.

    Draws come from the CPU, so every device sees the same views. ContractError for other shapes.
    """
    if images.ndim != 4:
        raise ContractError(f"augment: {kind!r} needs images [N, C, H, W], got {list(images.shape)}")
    count, _, height, width = images.shape
    rows = torch.arange(height).expand(count, -1)
    columns = torch.arange(width).expand(count, -1)
    if "flip" in kind:
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    if "crop" in kind:
        for side, away in ((height, 0), (width, 1)):
            most = side // 8
            shift = torch.randint(-most, most + 1, (count, 1), generator=generator)
            if away:
                columns = columns.gather(1, (torch.arange(side) + shift).clamp(0, side - 1))
            else:
                rows = (rows + shift).clamp(0, side - 1)
    place = images.device
    picked = torch.arange(count, device=place)[:, None, None]
    return images.permute(0, 2, 3, 1)[
        picked, rows.to(place)[:, :, None], columns.to(place)[:, None, :]
    ].permute(0, 3, 1, 2)


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
