"""Model Stock: per tensor, between the base and the experts' mean, as far as the experts agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mergesec.contracts import ContractError, Expert, MergeContext, Weights
from mergesec.tensorwise import Piece, TensorwiseMerge, running_mean
from mergesec_methods.merging._angles import cosines, inner_products

CARD = {
    "name": "model_stock",
    "kind": "merging",
    "class": "ModelStock",
    "version": "1",
    "title": "Model Stock",
    "paper": "Jang et al., Model Stock: all we need is just a few fine-tuned models, ECCV 2024",
    "url": "https://arxiv.org/abs/2403.19522",
    "summary": "per tensor, interpolate between the base and the experts' mean by the angle between the experts",
    "output": "static",
    "data": "none",
    "modalities": ["image", "text"],
    "seeded": False,
    "experts": [2, 0],
    "parameters": {
        "clip": {
            "type": "bool",
            "default": False,
            "doc": "keep the ratio t in [0, 1]; the published formula leaves it when experts oppose each other",
        },
    },
}
SINGULAR = 1e-6


class ModelStock(TensorwiseMerge):
    """θ = t · mean θ_i + (1 − t) θ0 with t = N cos φ / (1 + (N − 1) cos φ), per tensor.

    cos φ is the mean of the cosines between all pairs of task vectors (the authors' answer for N > 2;
    FusionBench averages the angles instead). A pair with a zero task vector counts as cosine 0, so
    tensors that nobody changed stay the base's. The denominator vanishes where the experts cancel
    (mean cosine −1/(N−1)); the tensor then stays the base's.
    """

    yields = "weights"

    def __init__(self, clip: bool) -> None:
        self.clip = clip

    def facts(self) -> dict[str, Any]:
        return {}

    def survey(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> dict[str, float]:
        """The ratio t by tensor."""
        if len(experts) < 2:
            raise ContractError(f"model_stock takes at least 2 experts, got {len(experts)}")
        return {name: self._ratio(found) for name, found in inner_products(base, experts, True).items()}

    def _ratio(self, products: Tensor) -> float:
        count = len(products)
        pairs = torch.triu_indices(count, count, 1)
        cosine = float(cosines(products)[pairs[0], pairs[1]].mean())
        below = 1.0 + (count - 1) * cosine
        ratio = count * cosine / below if below > SINGULAR else 0.0
        return min(max(ratio, 0.0), 1.0) if self.clip else ratio

    def combine(self, piece: Piece, out: Tensor, facts: dict[str, float]) -> None:
        running_mean(piece, out)
        torch.lerp(piece.base, out, facts[piece.name], out=out)
