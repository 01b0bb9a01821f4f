"""Norm clipping: a complete defense in one file, to be read and copied.

A malicious contributor can make a backdoor survive merging by making its task vector long. This
defense screens the contributed experts before the merge and shortens every task vector that is
longer than ``factor`` times the median length. It knows the weights only and draws nothing.

Try it without installing anything::

    bench info norm_clip --plugin examples/entries/norm_clip/norm_clip.py
    bench run --grid examples/norm-clip.yaml --plugin examples/entries/norm_clip/norm_clip.py
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import torch

from mergesec.contracts import Defense, Expert, MergeContext, Weights
from mergesec.weights import add_task_vector, apply_flat, check_same_layout, flat_layout, zeros_flat

CARD = {
    "name": "norm_clip",
    "kind": "defense",
    "class": "NormClip",
    "version": "1",
    "title": "Norm clipping of task vectors",
    "paper": "after the norm thresholding of Sun et al., Can you really backdoor federated learning?, 2019",
    "url": "https://arxiv.org/abs/1911.07963",
    "summary": "shorten task vectors that are longer than a multiple of the median length",
    "threat": "backdoor",
    "hooks": ["screen"],
    "knowledge": "the base and the contributed weights",
    "data": "none",
    "modalities": ["image", "text"],
    "seeded": False,
    "parameters": {
        "factor": {
            "type": "float",
            "default": 1.0,
            "min": 0.1,
            "max": 100.0,
            "doc": "longest task vector allowed, in units of the median length",
        },
    },
}


class NormClip(Defense):
    """τ_i ← τ_i · min(1, factor · median_j ‖τ_j‖₂ / ‖τ_i‖₂), over all floating tensors together."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def screen(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> list[Expert]:
        """The experts in their order; those within the bound are handed back as they came."""
        for expert in experts:
            check_same_layout(base, expert.weights, f"expert '{expert.task}'")
        layout = flat_layout(base)
        lengths: list[float] = []
        for expert in experts:  # one task vector in memory at a time
            vector = add_task_vector(zeros_flat(layout, base), layout, base, expert.weights)
            lengths.append(float(torch.linalg.vector_norm(vector)))
        bound = self.factor * median(lengths)
        kept: list[Expert] = []
        for expert, length in zip(experts, lengths, strict=True):
            if length <= bound:
                kept.append(expert)
                continue
            vector = add_task_vector(zeros_flat(layout, base), layout, base, expert.weights)
            kept.append(Expert(expert.task, apply_flat(layout, base, vector, bound / length)))
        return kept
