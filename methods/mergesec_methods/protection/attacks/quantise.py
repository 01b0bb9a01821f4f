"""Rounding: the free-rider stores the published expert at low precision before he merges it.

``bf16``: every floating tensor to bfloat16 and back. ``int8``: every tensor of two or more dimensions,
row by row (an output unit's weights), to 255 equal steps symmetric about 0 — step ``max|row| / 127``,
round half to even — and back; vectors (biases, norms) stay, as is usual. Some protections need digits
that rounding takes: a protected model that is worse alone after it has not kept its promise. It undoes
nothing by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergesec.contracts import Attack, RecoverContext, Weights

CARD = {
    "name": "quantise",
    "kind": "attack",
    "class": "Quantise",
    "version": "1",
    "title": "Rounding",
    "summary": "round the published weights to bfloat16, or to 8-bit integers row by row",
    "threat": "protection",
    "hooks": ["recover"],
    "knowledge": "the published expert only",
    "data": "none",
    "modalities": ["image", "text", "generation"],
    "seeded": False,
    "parameters": {
        "bits": {
            "type": "choice",
            "default": "int8",
            "choices": ["bf16", "int8"],
            "doc": "bfloat16, or symmetric 8-bit integers with one step per row",
        },
    },
}

LEVELS = 127


def rounded_rows(tensor: Tensor) -> Tensor:
    """``tensor`` ``[rows, ...]`` on a grid of ±127 steps per row, in its own type."""
    rows = tensor.double().reshape(len(tensor), -1)
    step = rows.abs().amax(dim=1, keepdim=True) / LEVELS
    whole = torch.round(rows / torch.where(step > 0, step, 1.0))
    return (whole * step).reshape(tensor.shape).to(tensor.dtype)


class Quantise(Attack):
    """The attack of the card above."""

    def __init__(self, bits: str = "int8") -> None:
        self.bits = bits

    def recover(self, published: Weights, ctx: RecoverContext) -> dict[str, Tensor]:
        """``published`` rounded; types and shapes stay, so do tensors that are not floats."""
        return {n: self._rounded(t) if t.is_floating_point() else t for n, t in published.items()}

    def _rounded(self, tensor: Tensor) -> Tensor:
        if self.bits == "bf16":
            return tensor.bfloat16().to(tensor.dtype)
        return rounded_rows(tensor) if tensor.ndim >= 2 and tensor.numel() else tensor
