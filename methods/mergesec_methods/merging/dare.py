"""DARE: drop and rescale task vectors, then merge."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from mergesec.contracts import Expert, MergeContext, Merged, MergeMethod, Weights
from mergesec.weights import FlatLayout, add_task_vector, apply_flat, zeros_flat
from mergesec_methods.merging._scaling import scaled_merge
from mergesec_methods.merging._sums import checked_layout
from mergesec_methods.merging._ties import ties

CARD = {
    "name": "dare",
    "kind": "merging",
    "class": "Dare",
    "version": "1",
    "title": "DARE",
    "paper": "Yu et al., Language models are Super Mario, ICML 2024",
    "url": "https://arxiv.org/abs/2311.03099",
    "summary": "drop a random share of each task vector, rescale the rest, then average, add or run TIES",
    "output": "static",
    "data": "tuning",
    "modalities": ["image", "text"],
    "seeded": True,
    "parameters": {
        "base_method": {
            "type": "choice",
            "choices": ["average", "task_arithmetic", "ties"],
            "default": "task_arithmetic",
            "doc": "how the dropped task vectors are merged; 'average' takes no scaling coefficient",
        },
        "drop": {
            "type": "float",
            "default": 0.5,
            "min": 0.0,
            "max": 0.9999,
            "doc": "probability p that an entry of a task vector is dropped",
        },
        "rescale": {"type": "bool", "default": True, "doc": "divide what is left by 1 − p"},
        "scaling": {
            "type": "float",
            "default": 0.3,
            "min": 0.0,
            "max": 10.0,
            "also": ["tuned"],
            "doc": "scaling coefficient λ; 'tuned' picks it from 'grid' on the tuning split",
        },
        "grid": {
            "type": "list",
            "default": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
            "doc": "coefficients tried when scaling is 'tuned'",
        },
        "keep": {
            "type": "float",
            "default": 0.2,
            "min": 0.0,
            "max": 1.0,
            "doc": "share kept by TIES' trimming (base_method 'ties' only)",
        },
        "merge_func": {
            "type": "choice",
            "choices": ["sum", "mean"],
            "default": "sum",
            "doc": "TIES' aggregation (base_method 'ties' only)",
        },
    },
}

BLOCK = 1 << 22
"""Entries drawn at a time: bounds the memory of the random numbers."""


def drop_(vector: Tensor, drop: float, rescale: bool, generator: torch.Generator) -> Tensor:
    """τ̃ = m ⊙ τ / (1 − p), m ~ Bernoulli(1 − p) per entry per Yu et al., in place.

    ``generator`` is a CPU generator, so that the mask is the same on every device.
    """
    for part in torch.split(vector, BLOCK):
        dropped = torch.rand(part.numel(), generator=generator) < drop
        part.masked_fill_(dropped.to(part.device), 0.0)
    return vector.div_(1.0 - drop) if rescale else vector


def streams(experts: Sequence[Expert]) -> list[int]:
    """A random stream per expert, from its task's name: the order of the experts does not matter.

    A second expert of the same task gets a stream of its own.
    """
    seen: dict[str, int] = {}
    result = []
    for expert in experts:
        count = seen[expert.task] = seen.get(expert.task, 0) + 1
        result.append(zlib.crc32(f"dare/{expert.task}/{count}".encode()))
    return result


class Dare(MergeMethod):
    """Drop and rescale, then average, task arithmetic or TIES."""

    def __init__(
        self,
        base_method: str,
        drop: float,
        rescale: bool,
        scaling: float | str,
        grid: Sequence[float],
        keep: float,
        merge_func: str,
    ) -> None:
        self.base_method = base_method
        self.drop = drop
        self.rescale = rescale
        self.scaling = scaling
        self.grid = grid
        self.keep = keep
        self.merge_func = merge_func

    def merge(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Merged:
        """The merged weights. With 'average' the coefficient is 1/T and ``scaling`` is not used."""
        layout = checked_layout(base, experts)
        total = self._combined(layout, base, experts, ctx)
        if self.base_method == "average":
            return Merged(apply_flat(layout, base, total, 1.0 / len(experts)))
        return scaled_merge(
            self.scaling, self.grid, lambda value: Merged(apply_flat(layout, base, total, value)), ctx
        )

    def _combined(
        self, layout: FlatLayout, base: Weights, experts: Sequence[Expert], ctx: MergeContext
    ) -> Tensor:
        chosen = streams(experts)

        def vector(index: int) -> Tensor:
            flat = add_task_vector(zeros_flat(layout, base), layout, base, experts[index].weights)
            return drop_(flat, self.drop, self.rescale, ctx.generator(chosen[index]))

        if self.base_method == "ties":
            return ties(vector, len(experts), self.keep, self.merge_func)
        total = vector(0)
        for index in range(1, len(experts)):
            total.add_(vector(index))
        return total
