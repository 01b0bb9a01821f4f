"""DARE: drop and rescale task vectors, then merge."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergesec.contracts import Expert, MergeContext, Weights
from mergesec.tensorwise import BLOCK, Piece, TensorwiseMerge
from mergesec_methods.merging._ties import ties_into, trim_thresholds

CARD = {
    "name": "dare",
    "kind": "merging",
    "class": "Dare",
    "version": "2",
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


def streams(experts: Sequence[Expert]) -> list[str]:
    """A random stream per expert, from its task's name: the order of the experts does not matter.

    A second expert of the same task gets a stream of its own.
    """
    seen: dict[str, int] = {}
    result = []
    for expert in experts:
        count = seen[expert.task] = seen.get(expert.task, 0) + 1
        result.append(f"{expert.task}/{count}")
    return result


@dataclass
class Dropped:
    """τ̃ = m ⊙ τ / (1 − p), m ~ Bernoulli(1 − p) per entry (Yu et al., section 3).

    The mask of a block comes from a CPU generator of its own, seeded by expert, tensor and position,
    so it is the same on every device and whenever the block is asked for.
    """

    streams: Sequence[str]
    drop: float
    rescale: bool
    generator: Callable[[int], torch.Generator]
    thresholds: Sequence[float] = ()

    def __call__(self, piece: Piece, index: int) -> Tensor:
        vector = piece.task_vector(index)
        for start in range(0, vector.numel(), BLOCK):
            part = vector[start : start + BLOCK]
            place = f"dare/{self.streams[index]}/{piece.name}/{piece.start + start}"
            generator = self.generator(zlib.crc32(place.encode()))
            kept = torch.rand(part.numel(), generator=generator).ge_(self.drop)
            part.mul_(kept.to(part.device))
        return vector.div_(1.0 - self.drop) if self.rescale else vector


class Dare(TensorwiseMerge):
    """Drop and rescale, then average, task arithmetic or TIES. 'average' divides by T and has no λ."""

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
        self.scaling = 1.0 if base_method == "average" else scaling
        self.grid = grid
        self.keep = keep
        self.merge_func = merge_func

    def reach(self, scaling: float, count: int) -> float:
        return 1.0 / count if self.base_method == "average" else scaling

    def survey(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Dropped:
        dropped = Dropped(streams(experts), self.drop, self.rescale, ctx.generator)
        if self.base_method == "ties":
            dropped.thresholds = trim_thresholds(base, experts, self.keep, dropped)
        return dropped

    def combine(self, piece: Piece, out: Tensor, facts: Dropped) -> None:
        if self.base_method == "ties":
            ties_into(piece, out, facts.thresholds, self.merge_func, facts)
            return
        out.zero_()
        for index in range(len(piece.experts)):
            out.add_(facts(piece, index))
