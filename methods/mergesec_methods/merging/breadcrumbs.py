"""Model Breadcrumbs: drop outliers and negligible entries of each task vector, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mergesec.contracts import Expert, MergeContext, Weights
from mergesec.tensorwise import Piece, Rule, Span, TensorwiseMerge, Workspace, empty, sweep
from mergesec.weights import mergeable, owners
from mergesec_methods.merging._ranks import magnitude_ranks, tensor_pieces
from mergesec_methods.merging._rows import row_spans
from mergesec_methods.merging._ties import trim_, trimmed_below

CARD = {
    "name": "breadcrumbs",
    "kind": "merging",
    "class": "Breadcrumbs",
    "version": "1",
    "title": "Model Breadcrumbs",
    "paper": "Davari & Belilovsky, Model Breadcrumbs: scaling multi-task model merging with sparse masks, ECCV 2024",
    "url": "https://arxiv.org/abs/2312.06795",
    "summary": "per layer, drop the largest and the small entries of each task vector, then add",
    "output": "static",
    "data": "tuning",
    "modalities": ["image", "text", "generation"],
    "seeded": False,
    "parameters": {
        "keep": {
            "type": "float",
            "default": 0.15,
            "min": 0.0,
            "max": 1.0,
            "doc": "share of entries kept per layer, below the outliers (the paper's γ − β)",
        },
        "outliers": {
            "type": "float",
            "default": 0.006,
            "min": 0.0,
            "max": 1.0,
            "doc": "share of entries of largest magnitude dropped per layer (the paper's 1 − γ)",
        },
        "per": {
            "type": "choice",
            "choices": ["layer", "row"],
            "default": "layer",
            "doc": "what entries are ranked against: their tensor (the paper) or their row (the authors' code)",
        },
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
    },
}
Band = tuple[float, float]
"""Magnitudes from the first to the second number, both included, are kept."""
SAMPLE = 1 << 13
"""Entries sampled per tensor: sorting them must cost less than reading the tensor."""


class Breadcrumbs(TensorwiseMerge):
    """θ = θ0 + λ Σ_i m_i ⊙ τ_i; m_i is 0 for the largest and the smallest |τ_i| of each layer.

    Of n entries ⌊outliers·n⌋ are dropped at the top, then ⌊keep·n⌋ kept (more where magnitudes tie).
    Scalars are kept, as in the authors' code.
    """

    def __init__(
        self, keep: float, outliers: float, per: str, scaling: float | str, grid: Sequence[float]
    ) -> None:
        self.keep = keep
        self.outliers = outliers
        self.per = per
        self.scaling = scaling
        self.grid = grid

    def survey(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> dict[str, list[Band]]:
        """The kept band of every expert by tensor; nothing if rows are ranked."""
        tied = owners(base)
        bands: dict[str, list[Band]] = {}
        if self.per == "layer":
            for name, tensor in base.items():
                if mergeable(tensor) and name not in tied:
                    bands[name] = self._bands(name, tensor, [e.weights[name] for e in experts])
            bands.update({name: bands[owner] for name, owner in tied.items()})
        return bands

    def _ranks(self, size: int) -> tuple[int, int] | None:
        """The lowest and the highest rank kept (1-based, ascending) of ``size``; None for none."""
        kept, top = int(size * self.keep), int(size * self.outliers)
        if not kept or top >= size:
            return None
        return max(size - top - kept, 0) + 1, size - top

    def _bands(self, name: str, base: Tensor, experts: Sequence[Tensor]) -> list[Band]:
        if not base.ndim:
            return [(0.0, math.inf)] * len(experts)
        ranks = self._ranks(base.numel())
        if ranks is None:
            return [(math.inf, math.inf)] * len(experts)
        chunks = tensor_pieces(name, base, experts)
        found = magnitude_ranks(chunks, len(experts), base.numel(), ranks, sample=SAMPLE)
        return [(low, high) for low, high in found]

    def combine(self, piece: Piece, out: Tensor, facts: dict[str, list[Band]]) -> None:
        out.zero_()
        bands = facts.get(piece.name, [(0.0, math.inf)] * len(piece.experts))
        for index, (low, high) in enumerate(bands):
            if low == math.inf:
                continue
            tau = trim_(piece.task_vector(index), low)
            if high < math.inf:
                above = piece.scratch("above")
                torch.ops.aten.hardshrink.out(tau, high, out=above)  # |τ| > high
                tau.sub_(above)
            out.add_(tau)

    def fused(self, rule: Rule, piece: Piece, facts: dict[str, list[Band]]) -> bool:
        bands = facts.get(piece.name, [(0.0, math.inf)] * len(piece.experts))
        below = trimmed_below([low for low, _ in bands])
        below[[low == math.inf for low, _ in bands]] = np.inf
        rule("banded", below, np.array([high for _, high in bands], np.float32))
        return True

    def whole(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: object) -> Tensor | None:
        """Rows are those of the last dimension."""
        if self.per == "layer" or not base.ndim or not base.numel():
            return None
        columns = base.shape[-1]
        out = empty(base.shape, base.device).zero_()
        ranks = self._ranks(columns)
        if ranks is None:
            return out
        flat = out.view(-1)

        def visit(span: Span, workspace: Workspace) -> None:
            piece = span.piece(workspace)
            into = flat[span.start : span.start + span.base.numel()]
            for index in range(len(experts)):
                into.add_(_crumbs(piece, index, columns, ranks))

        sweep(row_spans(name, base, experts, columns), visit)
        return out


def _crumbs(piece: Piece, index: int, columns: int, ranks: tuple[int, int]) -> Tensor:
    """The masked task vector ``[n]`` of whole rows of ``columns`` entries, in scratch memory."""
    tau = piece.task_vector(index)
    size = torch.abs(tau, out=piece.scratch("size")).view(-1, columns)
    low, high = _order_statistics(size, ranks)
    kept = torch.ge(size, low, out=piece.scratch("kept").view(-1, columns))
    return tau.mul_(kept.view(-1)).mul_(torch.le(size, high, out=size).view(-1))


def _order_statistics(rows: Tensor, ranks: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The entries of two ranks (1-based) of each row, each ``[r, 1]``."""
    places = [rank - 1 for rank in ranks]
    if rows.device.type == "cpu":  # a selection per row, not a sort
        ordered = torch.from_numpy(np.partition(rows.numpy(), places, axis=1))
    else:
        ordered = rows.sort(dim=1).values
    return ordered[:, places[0], None], ordered[:, places[1], None]
