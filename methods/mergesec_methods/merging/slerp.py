"""SLERP: two experts along the great circle between them, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mergesec.contracts import ContractError, Expert, MergeContext, Weights
from mergesec.tensorwise import Piece, TensorwiseMerge
from mergesec_methods.merging._angles import inner_products

CARD = {
    "name": "slerp",
    "kind": "merging",
    "class": "Slerp",
    "version": "1",
    "title": "SLERP",
    "paper": "Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985; as done by mergekit",
    "url": "https://github.com/arcee-ai/mergekit",
    "summary": "spherical interpolation between two experts, tensor by tensor",
    "output": "static",
    "data": "none",
    "modalities": ["image", "text"],
    "seeded": False,
    "experts": [2, 2],
    "parameters": {
        "t": {
            "type": "float",
            "default": 0.5,
            "min": 0.0,
            "max": 1.0,
            "doc": "0 is the first expert, 1 the second",
        },
        "parallel": {
            "type": "float",
            "default": 0.9995,
            "min": 0.0,
            "max": 1.0,
            "doc": "tensors with |cosine| above this are interpolated linearly",
        },
    },
}
TINY = 1e-8
"""Norms up to this are not divided by, as in mergekit and FusionBench."""


class Slerp(TensorwiseMerge):
    """θ = sin((1−t)Ω)/sin Ω · θ_1 + sin(tΩ)/sin Ω · θ_2, Ω the angle between the two tensors.

    Works on the weights, not on task vectors, and keeps their lengths: only the directions are
    normalised. (Nearly) parallel and antiparallel tensors: (1−t) θ_1 + t θ_2. Where a tensor is 0
    the angle counts as π/2, as in mergekit and FusionBench. The base gives only integer buffers.
    """

    yields = "weights"

    def __init__(self, t: float, parallel: float) -> None:
        self.t = t
        self.parallel = parallel

    def facts(self) -> dict[str, Any]:
        return {"t": self.t}

    def survey(
        self, base: Weights, experts: Sequence[Expert], ctx: MergeContext
    ) -> dict[str, tuple[float, float] | None]:
        """Both experts' coefficients by tensor; None where the interpolation is linear."""
        if len(experts) != 2:
            raise ContractError(f"slerp takes exactly 2 experts, got {len(experts)}")
        return {
            name: self._coefficients(found) for name, found in inner_products(base, experts, False).items()
        }

    def _coefficients(self, products: Tensor) -> tuple[float, float] | None:
        first, second = (math.sqrt(max(float(products[i, i]), 0.0)) for i in (0, 1))
        length = (first if first > TINY else 1.0) * (second if second > TINY else 1.0)
        cosine = float(products[0, 1]) / length
        if abs(cosine) > self.parallel or abs(cosine) >= 1.0:
            return None
        angle = math.acos(cosine)
        return math.sin((1.0 - self.t) * angle) / math.sin(angle), math.sin(self.t * angle) / math.sin(angle)

    def combine(self, piece: Piece, out: Tensor, facts: dict[str, tuple[float, float] | None]) -> None:
        coefficients = facts[piece.name]
        if coefficients is None:
            torch.lerp(piece.experts[0], piece.experts[1], self.t, out=out)
        else:
            torch.mul(piece.experts[0], coefficients[0], out=out)
            out.add_(piece.experts[1], alpha=coefficients[1])
