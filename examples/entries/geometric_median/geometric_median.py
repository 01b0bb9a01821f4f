"""The geometric median of the task vectors: a merge that one expert far away from the others hardly moves."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mergesec.contracts import Expert, MergeContext, Merged, MergeMethod, Weights

CARD = {
    "name": "geometric_median",
    "kind": "merging",
    "class": "GeometricMedian",
    "version": "1",
    "title": "Geometric median of task vectors",
    "paper": "after Pillutla, Kakade and Harchaoui, Robust aggregation for federated learning, 2022",
    "url": "https://arxiv.org/abs/1912.13445",
    "summary": "the point with the least sum of distances to the task vectors",
    "experts": [2, 0],
    "parameters": {
        "steps": {
            "type": "int",
            "default": 8,
            "min": 1,
            "max": 1000,
            "doc": "steps of Weiszfeld's iteration",
        },
    },
}


class GeometricMedian(MergeMethod):
    """Weiszfeld: m ← Σ τ_i / ‖τ_i − m‖ ÷ Σ 1 / ‖τ_i − m‖, from the mean; then θ = θ_base + m."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def merge(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Merged:
        """Integer buffers keep the base's value. Names are sorted: what order a mapping has is not promised, and
        sums of floats depend on it."""
        names = sorted(name for name, tensor in base.items() if tensor.is_floating_point())
        vectors = torch.stack(
            [torch.cat([(e.weights[n] - base[n]).float().flatten() for n in names]) for e in experts]
        )
        middle = vectors.mean(0)
        for _ in range(self.steps):
            nearness = 1 / torch.linalg.vector_norm(vectors - middle, dim=1).clamp(min=1e-12)
            middle = (nearness[:, None] * vectors).sum(0) / nearness.sum()
        parts = middle.split([base[n].numel() for n in names])
        moved = {
            n: base[n] + part.view_as(base[n]).to(base[n].dtype) for n, part in zip(names, parts, strict=True)
        }
        return Merged({**base, **moved})
