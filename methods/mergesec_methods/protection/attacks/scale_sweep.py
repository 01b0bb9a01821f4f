"""Scale sweep: merge with the published task vector at many lengths and keep the best.

``θ0 + s (θ_published − θ0)`` for every s of a list; the one whose merge is best on the tuning split is
handed back (the nearest to 1 of equally good ones). The adaptive attacker of Trap² does so over
0.1, 0.2, … 9.9 with a common scale for all models in the merge, and stops after ten steps without gain;
here only the protected model is scaled, and the list is shorter and searched to its end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from mergesec.contracts import Attack, ContractError, RecoverContext, Weights
from mergesec.weights import mergeable

CARD = {
    "name": "scale_sweep",
    "kind": "attack",
    "class": "ScaleSweep",
    "version": "1",
    "title": "Scale sweep",
    "paper": "Making Models Unmergeable via Scaling-Sensitive Loss Landscape, ICML 2026",
    "url": "https://arxiv.org/abs/2601.21898",
    "summary": "rescale the protected task vector; the scale whose merge is best on the tuning split",
    "threat": "protection",
    "hooks": ["recover"],
    "knowledge": "the published expert, the public base, the merge and labelled tuning rows of all its tasks; "
    "budget: one merge and one pass over the tuning rows per scale",
    "data": "tuning",
    "tries": True,
    "modalities": ["image", "text", "generation"],
    "seeded": False,
    "trial": {"scales": [0.5, 1.0]},
    "parameters": {
        "scales": {
            "type": "list",
            "default": [0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0],
            "min": 0.0,
            "doc": "the scales tried",
        },
    },
}


def scaled(weights: Weights, base: Weights, scale: float) -> dict[str, Tensor]:
    """θ0 + scale · (θ − θ0), in float64 and rounded once to the type of θ.

    Tensors that are not floats, or not in the base, stay.
    """
    changed = dict(weights)
    for name, tensor in weights.items():
        if mergeable(tensor) and name in base:
            origin = base[name].to(tensor.device).double()
            changed[name] = (origin + scale * (tensor.double() - origin)).to(tensor.dtype)
    return changed


class ScaleSweep(Attack):
    """The attack of the card above. ValueError for a list with anything but numbers from 0 on."""

    def __init__(self, scales: Sequence[float]) -> None:
        numbers = all(type(s) in (int, float) and math.isfinite(s) and s >= 0 for s in scales)
        if not scales or not numbers:
            raise ValueError(f"scales must be numbers from 0 on, got {list(scales)}")
        self.scales = [float(s) for s in scales]

    def recover(self, published: Weights, ctx: RecoverContext) -> dict[str, Tensor]:
        """The rescaled weights whose merge is best."""
        if ctx.score is None:
            raise ContractError(f"{self.name}: needs merges to try")
        best, top = dict(published), -math.inf
        for scale in sorted(set(self.scales), key=lambda s: (abs(s - 1.0), s)):
            candidate = scaled(published, ctx.base, scale)
            score = ctx.score(candidate)
            if score > top:
                best, top = candidate, score
        return best
