"""PCB-Merging: weigh every entry of every task vector by how it competes within and between tasks."""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from mergesec.contracts import Expert, MergeContext, Weights
from mergesec.tensorwise import Piece, Span, TensorwiseMerge, Workspace, sweep
from mergesec.weights import flat_layout
from mergesec_methods.merging._ranks import Chunks, all_pieces, magnitude_ranks

CARD = {
    "name": "pcb",
    "kind": "merging",
    "class": "Pcb",
    "version": "1",
    "title": "PCB-Merging",
    "paper": "Du et al., Parameter competition balancing for model merging, NeurIPS 2024",
    "url": "https://arxiv.org/abs/2410.02396",
    "summary": "score entries within and between task vectors, keep the best, average them by score",
    "output": "static",
    "data": "tuning",
    "modalities": ["image", "text", "generation"],
    "seeded": False,
    "parameters": {
        "formula": {
            "type": "choice",
            "choices": ["released", "paper"],
            "default": "released",
            "doc": "the scores of the authors' code, which differ from the paper's equations, or the latter",
        },
        "keep": {
            "type": "float",
            "default": 0.05,
            "min": 0.0,
            "max": 1.0,
            "doc": "share r of entries kept per task vector, by score over the whole vector",
        },
        "clip": {
            "type": "float",
            "default": 0.0001,
            "min": 0.0,
            "max": 0.49,
            "doc": "share of magnitudes clipped at either end (formula 'released' only)",
        },
        "scaling": {
            "type": "float",
            "default": 1.2,
            "min": 0.0,
            "max": 10.0,
            "also": ["tuned"],
            "doc": "scaling coefficient λ; 'tuned' picks it from 'grid' on the tuning split",
        },
        "grid": {
            "type": "list",
            "default": [0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0],
            "doc": "coefficients tried when scaling is 'tuned'",
        },
    },
}


class _Scores(ABC):
    """Scores β_i of one block, all experts at once, kept in the block's scratch memory."""

    def __init__(self) -> None:
        self._latest = threading.local()  # a thread is done with a block before it takes the next

    def __call__(self, piece: Piece, index: int) -> Tensor:
        """β of one expert ``[n]``; read-only."""
        if getattr(self._latest, "piece", None) is not piece:
            self.score(piece)
            self._latest.piece = piece
        return piece.scratch(("beta", index))

    def positive(self, piece: Piece, index: int) -> Tensor:
        """max(β, 0), to be written to."""
        return torch.clamp(self(piece, index), min=0.0, out=piece.scratch("part"))

    def negative(self, piece: Piece, index: int) -> Tensor:
        """min(β, 0), to be written to."""
        return torch.clamp(self(piece, index), max=0.0, out=piece.scratch("part"))

    @abstractmethod
    def score(self, piece: Piece) -> None:
        """Fill ``piece.scratch(("beta", i))`` for every expert i."""

    @abstractmethod
    def entry(self, piece: Piece, index: int) -> Tensor:
        """What is averaged ``[n]``, in scratch memory."""

    @abstractmethod
    def weight(self, scores: Tensor, threshold: float, top: float, out: Tensor) -> Tensor:
        """The weights ``[n]`` that follow from the scores; 0 below the threshold."""


class _Released(_Scores):
    """β_i = exp(T x_i²) tanh(τ_i Σ_j τ_j), x_i the clipped magnitude scaled to [0, 1] over the network.

    Weights grow linearly from 0 at the threshold to 1 at the highest score.
    """

    def __init__(self, limits: Sequence[Sequence[float]]) -> None:
        super().__init__()
        self.limits = limits

    def score(self, piece: Piece) -> None:
        count = len(piece.experts)
        total = piece.task_vector(0, "total")
        for index in range(1, count):
            total.add_(piece.task_vector(index))
        for index, (low, high) in enumerate(self.limits):
            tau = piece.task_vector(index)
            size = torch.abs(tau, out=piece.scratch("size")).clamp_(low, high).sub_(low)
            size.mul_(1.0 / (high - low) if high > low else 0.0)
            beta = torch.mul(tau, total, out=piece.scratch(("beta", index))).tanh_()
            beta.mul_(size.mul_(size).mul_(count).exp_())

    def entry(self, piece: Piece, index: int) -> Tensor:
        low, high = self.limits[index]
        tau = piece.task_vector(index)
        sign = torch.sign(tau, out=piece.scratch("size"))
        return tau.abs_().clamp_(low, high).mul_(sign)

    def weight(self, scores: Tensor, threshold: float, top: float, out: Tensor) -> Tensor:
        torch.clamp(scores, threshold, top, out=out).sub_(threshold)
        return out.mul_(1.0 / (top - threshold) if top > threshold else 0.0)


class _Paper(_Scores):
    """β_i = softmax(T·norm(τ_i ⊙ τ_i)) ⊙ Σ_j softmax(norm(τ_i ⊙ τ_j)), each over the network's D entries.

    norm scales to [0, 1]. Softmaxes are multiplied by D (a factor common to all scores) so that they
    are of order 1. Weights are the scores from the threshold on.
    """

    def __init__(self, chunks: Chunks, count: int) -> None:
        super().__init__()
        self.pairs = [(i, j) for i in range(count) for j in range(i, count)]
        self.ranges = dict.fromkeys(self.pairs, (math.inf, -math.inf))
        self.logs: dict[object, float] = dict.fromkeys([*self.pairs, *range(count)], 0.0)
        self._find_ranges(chunks)
        self._find_sums(chunks)

    def _find_ranges(self, chunks: Chunks) -> None:
        """The least and the largest τ_i ⊙ τ_j of every pair."""
        found: list[list[tuple[float, float]]] = []

        def visit(span: Span, workspace: Workspace) -> None:
            piece = self._task_vectors(span.piece(workspace))
            ends = [torch.aminmax(self._product(piece, pair)) for pair in self.pairs]
            found.append([(float(least), float(most)) for least, most in ends])

        sweep(chunks(), visit)
        for pair, parts in zip(self.pairs, zip(*found, strict=True), strict=False):
            self.ranges[pair] = min(least for least, _ in parts), max(most for _, most in parts)

    def _find_sums(self, chunks: Chunks) -> None:
        """The partition sums; ``fsum`` because blocks arrive in any order."""
        sizes: list[int] = []
        found: dict[object, list[float]] = {key: [] for key in self.logs}

        def visit(span: Span, workspace: Workspace) -> None:
            piece = self._task_vectors(span.piece(workspace))
            sizes.append(piece.base.numel())
            for key, parts in found.items():
                parts.append(float(self._softmax(piece, key).sum(dtype=torch.float64)))

        sweep(chunks(), visit)
        self.logs = {key: math.log(math.fsum(parts) / sum(sizes)) for key, parts in found.items() if parts}

    def _task_vectors(self, piece: Piece) -> Piece:
        for index in range(len(piece.experts)):
            piece.task_vector(index, ("tau", index))
        return piece

    def _product(self, piece: Piece, pair: tuple[int, int]) -> Tensor:
        first, second = (piece.scratch(("tau", index)) for index in pair)
        return torch.mul(first, second, out=piece.scratch("product"))

    def _softmax(self, piece: Piece, key: object) -> Tensor:
        """D times the softmax ``[n]``: intra-balancing for an index, one term of inter-balancing for a pair."""
        pair = key if isinstance(key, tuple) else (key, key)
        sharpness = 1.0 if isinstance(key, tuple) else float(len(piece.experts))
        low, high = self.ranges[pair]
        factor = sharpness / (high - low) if high > low else 0.0
        return self._product(piece, pair).sub_(low).mul_(factor).sub_(self.logs[key]).exp_()

    def score(self, piece: Piece) -> None:
        self._task_vectors(piece)
        betas = [piece.scratch(("beta", index)).zero_() for index in range(len(piece.experts))]
        for first, second in self.pairs:
            term = self._softmax(piece, (first, second))
            betas[first].add_(term)
            if second != first:
                betas[second].add_(term)
        for index, beta in enumerate(betas):
            beta.mul_(self._softmax(piece, index))

    def entry(self, piece: Piece, index: int) -> Tensor:
        return piece.task_vector(index)

    def weight(self, scores: Tensor, threshold: float, top: float, out: Tensor) -> Tensor:
        return torch.ge(scores, threshold, out=out).mul_(scores)


class Pcb(TensorwiseMerge):
    """θ = θ0 + λ Σ_i w_i ⊙ τ_i / Σ_i w_i; the weights w_i follow from scores β_i, 0 but for the best r·D.

    Everything that concerns the whole network (limits, partition sums, thresholds) is a few numbers
    per expert, found in passes over blocks: no score is stored. ``released`` takes five reads of the
    inputs, ``paper`` also two over all pairs of experts.
    """

    def __init__(
        self, formula: str, keep: float, clip: float, scaling: float | str, grid: Sequence[float]
    ) -> None:
        self.formula = formula
        self.keep = keep
        self.clip = clip
        self.scaling = scaling
        self.grid = grid

    def survey(
        self, base: Weights, experts: Sequence[Expert], ctx: MergeContext
    ) -> tuple[_Scores, list[tuple[float, float]]]:
        """The scoring rule, and per expert the score from which on entries are kept and the highest one."""
        chunks, count, size = all_pieces(base, experts), len(experts), flat_layout(base).size
        scores: _Scores
        if self.formula == "released":
            ends = [int(size * self.clip) + 1, max(int(size * (1.0 - self.clip)), 1)]
            scores = _Released(magnitude_ranks(chunks, count, size, ends))
        else:
            scores = _Paper(chunks, count)
        rank = min(int(size * (1.0 - self.keep)), size - 1) + 1
        return scores, _score_ranks(chunks, count, size, rank, scores)

    def combine(self, piece: Piece, out: Tensor, facts: tuple[_Scores, list[tuple[float, float]]]) -> None:
        scores, limits = facts
        out.zero_()
        mass = piece.scratch("mass").zero_()
        for index, (threshold, top) in enumerate(limits):
            weight = scores.weight(scores(piece, index), threshold, top, piece.scratch("weight"))
            mass.add_(weight)
            out.addcmul_(weight, scores.entry(piece, index))
        out.div_(mass.clamp_(min=1e-12))


def _score_ranks(
    chunks: Chunks, count: int, size: int, rank: int, scores: _Scores
) -> list[tuple[float, float]]:
    """Per expert, the ``rank``-th smallest score (1-based) and the highest.

    Positive and negative scores are ranked apart, as magnitudes; the latter only if they are reached.
    """
    found = magnitude_ranks(chunks, count, size, [rank, size], scores.positive)
    if all(threshold > 0.0 for threshold, _ in found):
        return [(threshold, top) for threshold, top in found]
    below = magnitude_ranks(chunks, count, size, [size - rank + 1, 1], scores.negative)
    return [
        (low if low > 0.0 else -minus_low, top if top > 0.0 else -minus_top)
        for (low, top), (minus_low, minus_top) in zip(found, below, strict=True)
    ]
