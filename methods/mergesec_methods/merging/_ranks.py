"""Exact order statistics of task vectors' magnitudes without sorting or holding the vectors.

A strided sample brackets each wanted value; one pass counts what lies below the bracket and keeps
what lies inside; the value is then selected exactly among those few. A bracket that missed (the
sample was unlucky) is widened to everything, so the result never depends on the sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mergesec.contracts import Expert, Weights
from mergesec.tensorwise import Piece, Workspace, pieces
from mergesec.weights import mergeable, owners

SAMPLE = 1 << 20
Chunks = Callable[[], Iterator[Piece]]
Vector = Callable[[Piece, int], Tensor]
"""(piece, index of the expert) -> its task vector ``[n]`` there, in scratch memory."""


def task_vector(piece: Piece, index: int) -> Tensor:
    """τ of one expert, as it is."""
    return piece.task_vector(index)


def all_pieces(base: Weights, experts: Sequence[Expert]) -> Chunks:
    """Chunks of the whole network, tied tensors once."""
    tied = owners(base)

    def chunks() -> Iterator[Piece]:
        for name, tensor in base.items():
            if mergeable(tensor) and name not in tied:
                yield from pieces(name, tensor, [e.weights[name] for e in experts], Workspace(tensor.device))

    return chunks


def tensor_pieces(name: str, base: Tensor, experts: Sequence[Tensor]) -> Chunks:
    """Chunks of one tensor."""
    return lambda: pieces(name, base, experts, Workspace(base.device))


@dataclass
class _Bracket:
    """The interval [low, high] that should hold the ``rank``-th smallest magnitude (1-based)."""

    rank: int
    low: float
    high: float
    below: int = 0
    inside: list[Tensor] = field(default_factory=list)

    def look(self, magnitudes: Tensor, dropped: int = 0) -> None:
        """Count and keep what concerns this bracket; ``dropped`` entries below it are not in ``magnitudes``.

        NumPy's comparisons are the faster ones on a CPU.
        """
        self.below += dropped
        if magnitudes.device.type == "cpu":
            array = magnitudes.numpy()
            under = np.less(array, self.low)
            self.below += int(np.count_nonzero(under))
            inside = np.flatnonzero(np.greater(np.less_equal(array, self.high), under))
            self.inside.append(torch.from_numpy(array[inside]))
        else:
            self.below += int((magnitudes < self.low).sum())
            self.inside.append(magnitudes[(magnitudes >= self.low) & (magnitudes <= self.high)])

    def value(self) -> float | None:
        """The exact value; None if it lies outside the bracket."""
        kept = torch.cat(self.inside) if self.inside else torch.empty(0)
        local = self.rank - self.below
        if not 1 <= local <= kept.numel():
            return None
        return _select(kept, [local])[0]


def magnitude_ranks(
    chunks: Chunks,
    count: int,
    size: int,
    ranks: Sequence[int],
    vector: Vector = task_vector,
    sample: int = SAMPLE,
) -> list[list[float]]:
    """The ``rank``-th smallest |τ_i| (1-based) of ``size`` entries, for each rank, per expert ``[count]``.

    A rank below 1 gives 0.0, one above ``size`` infinity. Memory: a few blocks and the ``sample``, whose
    size changes the time taken, never the result.
    """
    wanted = sorted({rank for rank in ranks if 1 <= rank <= size})
    if size <= sample:
        brackets = [[_Bracket(rank, 0.0, math.inf) for rank in wanted[:1]] for _ in range(count)]
        _look(chunks, brackets, vector)
        kept = [torch.cat(own[0].inside) if own else torch.empty(0) for own in brackets]
        found: list[dict[int, float | None]] = [
            dict(zip(wanted, _select(k, wanted), strict=True)) for k in kept
        ]
    else:
        brackets = _sampled(chunks, count, size, wanted, vector, sample)
        _look(chunks, brackets, vector)
        found = [{b.rank: b.value() for b in own} for own in brackets]
        for index, own in enumerate(found):
            for rank in [r for r, value in own.items() if value is None]:
                wide = [[_Bracket(rank, 0.0, math.inf)] if i == index else [] for i in range(count)]
                _look(chunks, wide, vector)
                own[rank] = wide[index][0].value()
    edge = {rank: 0.0 if rank < 1 else math.inf for rank in ranks}
    return [[(own.get(rank) or 0.0) if rank in own else edge[rank] for rank in ranks] for own in found]


def _select(values: Tensor, ranks: Sequence[int]) -> list[float]:
    """The ``rank``-th smallest (1-based) of ``values``, for each rank; may reorder ``values``."""
    places = [rank - 1 for rank in ranks]
    if places and values.device.type == "cpu":
        array = values.numpy()
        array.partition(places)
        return [float(array[place]) for place in places]
    return [float(torch.kthvalue(values, rank).values) for rank in ranks]


def _look(chunks: Chunks, brackets: Sequence[Sequence[_Bracket]], vector: Vector) -> None:
    for piece in chunks():
        for index, own in enumerate(brackets):
            if own:
                magnitudes, dropped = vector(piece, index).abs_(), 0
                if len(own) > 1:  # one look at all entries, the others only at what is left
                    whole = magnitudes.numel()
                    magnitudes = _at_least(magnitudes, own[0].low)
                    dropped = whole - magnitudes.numel()
                for bracket in own:
                    bracket.look(magnitudes, dropped)


def _at_least(magnitudes: Tensor, low: float) -> Tensor:
    """The entries from ``low`` on."""
    if low <= 0.0:
        return magnitudes
    if magnitudes.device.type == "cpu":
        array = magnitudes.numpy()
        return torch.from_numpy(array[np.flatnonzero(np.greater_equal(array, low))])
    return magnitudes[magnitudes >= low]


def _sampled(
    chunks: Chunks, count: int, size: int, wanted: Sequence[int], vector: Vector, sample: int
) -> list[list[_Bracket]]:
    """Brackets four standard errors wide on each side, from every ``stride``-th entry.

    The stride is odd, so that it does not walk along the columns of power-of-two wide matrices.
    """
    stride = (size // sample) | 1
    parts: list[list[Tensor]] = [[] for _ in range(count)]
    for piece in chunks():
        offset = -piece.start % stride
        for index in range(count):
            parts[index].append(_strided(piece, index, offset, stride, vector))
    result = []
    for own in parts:
        ordered = torch.sort(torch.cat(own)).values
        total = ordered.numel()
        brackets = []
        for rank in wanted:
            share = rank / size
            margin = 4 * math.sqrt(share * (1 - share) * total) + 2
            low, high = math.floor(share * total - margin), math.ceil(share * total + margin)
            brackets.append(
                _Bracket(
                    rank,
                    float(ordered[low]) if low >= 0 else 0.0,
                    float(ordered[high]) if high < total else math.inf,
                )
            )
        result.append(brackets)
    return result


def _strided(piece: Piece, index: int, offset: int, stride: int, vector: Vector) -> Tensor:
    if vector is task_vector:  # only the sampled entries are subtracted
        return (piece.experts[index][offset::stride] - piece.base[offset::stride]).abs_()
    return vector(piece, index)[offset::stride].abs()
