"""Exact order statistics of task vectors' magnitudes without sorting or holding the vectors.

A sample brackets each wanted value; one pass counts what lies up to the bracket and keeps what lies
inside; the value is then selected exactly among those few. A bracket that missed is moved and widened,
so the sample decides how long it takes, never the result. Values that many entries share (zeros of
dropped or frozen weights, steps of bfloat16) are counted, not kept.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergesec.contracts import Expert, Weights
from mergesec.tensorwise import Loops, Piece, Span, Workspace, addresses, joined, kernels, spans, sweep
from mergesec.weights import mergeable, outlines, owners

SAMPLE = 1 << 18
SORTED = 1 << 15
"""Up to so many sampled values are sorted once instead of being searched for each bracket."""
DIRECT = 1 << 13
"""Up to so many entries are looked at directly, without a sample."""
Chunks = Callable[[], Iterator[Span]]
Vector = Callable[[Piece, int], Tensor]
"""(piece, index of the expert) -> its task vector ``[n]`` there, in scratch memory. Called from several threads."""


def task_vector(piece: Piece, index: int) -> Tensor:
    """τ of one expert, as it is."""
    return piece.task_vector(index)


def all_pieces(base: Weights, experts: Sequence[Expert], side_by_side: bool = False) -> Chunks:
    """Chunks of the whole network, tied tensors once; small ones in one chunk where an entry's tensor is of no
    interest."""
    tied = owners(base)
    names = [n for n, tensor in outlines(base).items() if mergeable(tensor) and n not in tied]

    def chunks() -> Iterator[Span]:
        if side_by_side:
            return joined(names, base, [e.weights for e in experts])
        tensors = ((name, base[name], [e.weights[name] for e in experts]) for name in names)
        return (span for tensor in tensors for span in spans(*tensor))

    return chunks


def tensor_pieces(name: str, base: Tensor, experts: Sequence[Tensor]) -> Chunks:
    """Chunks of one tensor."""
    return lambda: spans(name, base, experts)


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
    found = [{rank: 0.0 for rank in ranks if rank < 1} for _ in range(count)]
    for own in found:
        own.update((rank, math.inf) for rank in ranks if rank > size)
    if wanted and count:
        drawn = _Sample.take(chunks, count, size, vector, sample)
        searches = [[_Search(rank, size, own) for rank in wanted] for own in drawn]
        while any(search.value is None for own in searches for search in own):
            _look(chunks, searches, vector)
        for own, settled in zip(found, searches, strict=True):
            own.update((search.rank, search.value or 0.0) for search in settled)
    return [[own[rank] for rank in ranks] for own in found]


def _above(value: float) -> float:
    """The next float32 magnitude; 0 after anything negative."""
    if value < 0.0:
        return 0.0
    with np.errstate(over="ignore"):  # infinity is the one after the largest
        return float(np.nextafter(np.float32(value), np.float32(math.inf)))


def _under(value: float) -> float:
    """The float32 magnitude before; -1 (none) before 0."""
    return -1.0 if value <= 0.0 else float(np.nextafter(np.float32(value), np.float32(0.0)))


@dataclass
class _Sample:
    """Magnitudes of one expert drawn from all over its task vector, and whether they are all there are."""

    values: np.ndarray[tuple[int], np.dtype[np.float32]]
    complete: bool
    ordered: bool = False

    @classmethod
    def take(cls, chunks: Chunks, count: int, size: int, vector: Vector, wanted: int) -> list[_Sample]:
        """One entry from each stretch of equal length, at a random place so that no pattern can hide."""
        stride = 1 if size <= min(DIRECT, wanted) else max(size // max(min(wanted, size // 8), 1), 2)
        parts: list[list[Tensor]] = [[] for _ in range(count)]

        def visit(span: Span, workspace: Workspace) -> None:
            length = span.base.numel()
            places = np.arange(-span.start % stride, length, stride)
            if stride > 1:
                source = np.random.PCG64([zlib.crc32(span.name.encode()), span.start])
                places += (source.random_raw(len(places)) % stride).astype(np.int64)
            index = torch.from_numpy(places[places < length]).to(span.base.device)
            if vector is task_vector and stride > 1 and (module := kernels()) and span.plain:
                drawn = np.empty((count, len(index)), np.float32)
                module.gathered(span.base.data_ptr(), addresses(span.experts), index.numpy(), drawn)
                for own, values in zip(parts, drawn, strict=True):
                    own.append(torch.from_numpy(values))
                return
            if vector is task_vector and stride > 1:  # only the drawn entries are subtracted
                origin = span.base[index].float()
                for expert, own in zip(span.experts, parts, strict=True):
                    own.append((expert[index].float() - origin).abs_().cpu())
                return
            piece = span.piece(workspace)
            for position, own in enumerate(parts):
                tau = vector(piece, position)
                own.append((tau if stride == 1 else tau[index]).abs().cpu())

        sweep(chunks(), visit)
        return [cls((torch.cat(own) if own else torch.empty(0)).numpy(), stride == 1) for own in parts]

    def at(self, index: int) -> float:
        """The ``index``-th smallest (0-based): below zero before the first, infinity after the last."""
        if not 0 <= index < len(self.values):
            return -1.0 if index < 0 else math.inf
        return float(self.values[index] if self.ordered else np.partition(self.values, index)[index])

    def range(self, first: int, last: int) -> tuple[float, float]:
        """``at`` of two."""
        if not self.ordered:
            inside = [index for index in {first, last} if 0 <= index < len(self.values)]
            if len(self.values) > SORTED and inside:
                ordered = np.partition(self.values, inside)
                return tuple(float(ordered[i]) if i in inside else self.at(i) for i in (first, last))  # type: ignore[return-value]
            self.values.sort()
            self.ordered = True
        return self.at(first), self.at(last)


@dataclass
class _Search:
    """The ``rank``-th smallest (1-based) magnitude, known to lie above ``floor`` and not above ``ceiling``.

    A look counts the magnitudes up to ``low`` and keeps those strictly between ``low`` and ``high``.
    """

    rank: int
    size: int
    sample: _Sample
    value: float | None = None
    floor: float = -1.0
    ceiling: float = math.inf
    low: float = -1.0
    high: float = math.inf
    single: bool = False
    """Whether only one value fits the bracket, so that counting is enough."""
    width: float = 3.0
    """Half the bracket's width, in standard errors of the sample's order statistic."""
    below: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    inside: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.sample.complete:
            self.value = self.sample.at(self.rank - 1)
        else:
            self.aim()

    def aim(self) -> None:
        """A bracket from the sample, cut to what is possible; a value that fills it is looked at alone.

        The smallest possible value is counted, never kept: often it is one that many entries share.
        """
        total, share = len(self.sample.values), self.rank / self.size
        margin = self.width * math.sqrt(max(share * (1 - share) * total, 1.0)) + 2
        low, high = self.sample.range(math.floor(share * total - margin), math.ceil(share * total + margin))
        if low == high:
            low, high = _under(low), _above(high)
        self.low = min(max(low, _above(self.floor)), _under(self.ceiling))
        self.high = max(min(high, self.ceiling), _above(self.low))
        self.single = _above(_above(self.low)) >= self.high
        self.width *= 8
        self.below, self.counts, self.inside = [], [], []

    def look(self, magnitudes: Tensor, dropped: int) -> None:
        """Count and keep what concerns this bracket; ``dropped`` more entries are not above ``low``.

        NumPy's comparisons are the faster ones on a CPU.
        """
        if magnitudes.device.type == "cpu":
            array = magnitudes.numpy()
            under = np.less_equal(array, np.float32(self.low))
            below = int(np.count_nonzero(under))
            between = np.greater(np.less(array, np.float32(self.high)), under)
            kept = torch.empty(0) if self.single else torch.from_numpy(array[np.flatnonzero(between)])
            count = int(np.count_nonzero(between)) if self.single else len(kept)
        else:
            below = int((magnitudes <= self.low).sum())
            found = magnitudes[(magnitudes > self.low) & (magnitudes < self.high)]
            kept, count = torch.empty(0) if self.single else found.cpu(), len(found)
        self.saw(below + dropped, count, kept)

    def saw(self, below: int, count: int, kept: Tensor) -> None:
        """What a look found: how many are not above ``low``, how many inside, and those if they differ."""
        self.below.append(below)
        self.counts.append(count)
        self.inside.append(kept)

    def settle(self) -> None:
        """The value, if the look found it; else what was learnt, and the next bracket."""
        local = self.rank - sum(self.below)
        if local < 1:
            self.ceiling = self.low
        elif local > sum(self.counts):
            self.floor = _under(self.high)
        elif (values := torch.cat(self.inside).numpy()).size:
            values.partition(local - 1)
            self.value = float(values[local - 1])
        else:  # only one value fits the bracket
            self.value = _above(self.low)
        if self.value is None and _above(self.floor) >= self.ceiling:
            self.value = self.ceiling
        if self.value is None:
            self.aim()


def _look(chunks: Chunks, searches: Sequence[Sequence[_Search]], vector: Vector) -> None:
    """One pass for every search that is not done."""
    open_ = [sorted((s for s in own if s.value is None), key=lambda s: s.low) for own in searches]
    brackets = _Brackets.of(open_)

    def visit(span: Span, workspace: Workspace) -> None:
        piece = span.piece(workspace)
        loops = Loops.of(piece) if vector is task_vector else None
        if loops is not None:
            brackets.look(loops)
            if loops.size == piece.base.numel():
                return
            piece = piece.part(loops.size, piece.base.numel())
        for index, own in enumerate(open_):
            if own:
                magnitudes, dropped = vector(piece, index).abs_(), 0
                own[0].look(magnitudes, 0)
                if len(own) > 1:  # where the first bracket is high, little is left for the others
                    left = _beyond(magnitudes, own[0]) if 20 * own[0].rank > 19 * own[0].size else magnitudes
                    dropped = magnitudes.numel() - left.numel()
                    for search in own[1:]:
                        search.look(left, dropped)

    sweep(chunks(), visit)
    for own in open_:
        for search in own:
            search.settle()


@dataclass(frozen=True)
class _Brackets:
    """The brackets of all searches that are not done, as compiled loops take them: ``[T, J]`` for T experts."""

    looking: list[int]
    """The experts concerned."""
    searches: list[tuple[int, int, _Search]]
    """(row, column, search)."""
    low: np.ndarray[Any, np.dtype[np.float32]]
    high: np.ndarray[Any, np.dtype[np.float32]]
    keep: np.ndarray[Any, np.dtype[np.uint8]]

    @classmethod
    def of(cls, open_: Sequence[Sequence[_Search]]) -> _Brackets:
        looking = [index for index, own in enumerate(open_) if own]
        places = [(r, c, s) for r, index in enumerate(looking) for c, s in enumerate(open_[index])]
        shape = len(looking), max(column for _, column, _ in places) + 1
        low, high = np.full(shape, np.inf, np.float32), np.full(shape, -np.inf, np.float32)
        keep = np.zeros(shape, np.uint8)
        for row, column, search in places:
            low[row, column], high[row, column] = search.low, search.high
            keep[row, column] = not search.single
        return cls(looking, places, low, high, keep)

    def look(self, loops: Loops) -> None:
        """Count and keep what concerns the brackets in one block, for all experts at once."""
        shape, size = self.low.shape, loops.size
        below, inside = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        found = loops.piece.workspace.row("found", self.low.size * size).numpy().reshape(*shape, size)
        base, others = loops.piece.base.data_ptr(), loops.others[self.looking]
        loops.module.bracketed(base, others, size, self.low, self.high, self.keep, below, inside, found)
        under, counts = below.tolist(), inside.tolist()
        for row, column, search in self.searches:
            count = counts[row][column]
            kept = found[row, column, : 0 if search.single else count].copy()
            search.saw(under[row][column], count, torch.from_numpy(kept))


def _beyond(magnitudes: Tensor, search: _Search) -> Tensor:
    """The entries above the search's ``low``."""
    if magnitudes.device.type == "cpu":
        array = magnitudes.numpy()
        return torch.from_numpy(array[np.flatnonzero(np.greater(array, np.float32(search.low)))])
    return magnitudes[magnitudes > search.low]
