"""Jitter: noise on a published expert, against protections that need its exact values."""

from __future__ import annotations

import torch

from mergesec.contracts import Attack, RecoverContext, Weights

CARD = {
    "name": "jitter",
    "kind": "attack",
    "class": "Jitter",
    "version": "1",
    "title": "Noise on the published weights",
    "summary": "Gaussian noise in units of each tensor's own spread",
    "knowledge": "the published weights",
    "data": "none",
    "threat": "protection",
    "hooks": ["recover"],
    "seeded": True,
    "parameters": {
        "noise": {
            "type": "float",
            "default": 0.01,
            "min": 0.0,
            "max": 1.0,
            "doc": "standard deviation of the noise, in units of the tensor's",
        },
    },
}


class Jitter(Attack):
    """w ← w + noise · std(w) · ε, ε ~ N(0, 1), tensor by tensor in the order of their names: a mapping's own is not
    promised."""

    def __init__(self, noise: float) -> None:
        self.noise = noise

    def recover(self, published: Weights, ctx: RecoverContext) -> Weights:
        """Tensors of fewer than two numbers have no spread and stay as they are."""
        generator = ctx.generator()
        recovered = dict(published)
        for name, w in sorted(published.items()):
            if w.is_floating_point() and w.numel() > 1:
                drawn = torch.randn(w.shape, generator=generator).to(w)
                recovered[name] = w + self.noise * w.std() * drawn
        return recovered
