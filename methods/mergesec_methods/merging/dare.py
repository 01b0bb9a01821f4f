"""DARE: drop and rescale task vectors, then merge."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergesec.contracts import Expert, MergeContext, Weights
from mergesec.tensorwise import BLOCK, Piece, Rule, TensorwiseMerge
from mergesec_methods.merging._ties import ties_into, trim_thresholds

CARD = {
    "name": "dare",
    "kind": "merging",
    "class": "Dare",
    "version": "3",
    "title": "DARE",
    "paper": "Yu et al., Language models are Super Mario, ICML 2024",
    "url": "https://arxiv.org/abs/2311.03099",
    "summary": "drop a random share of each task vector, rescale the rest, then average, add or run TIES",
    "output": "static",
    "data": "tuning",
    "modalities": ["image", "text", "generation", "answers"],
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


LEVELS = 8
"""Binary digits of a probability that all entries are decided by; the few left draw once more."""


class Coins:
    """Exact Bernoulli draws, probability in [0, 1), that are cheap where the probability has few binary digits.

    A uniform number is compared with p digit by digit, for 64 entries at once: one random bit an entry and
    digit. Entries equal to p in all digits so far (one in 256 after ``LEVELS``) get a number of their own.
    Bits come from SFC64, whose raw output NumPy keeps the same on every machine and version.
    """

    def __init__(self, probability: float) -> None:
        scaled = probability * 2**LEVELS
        whole, self.rest = int(scaled), scaled - int(scaled)
        digits = [whole >> (LEVELS - 1 - i) & 1 for i in range(LEVELS)]
        while digits and not digits[-1] and not self.rest:
            digits.pop()
        self.digits = digits
        self._local = threading.local()

    def heads(self, size: int, generator: torch.Generator) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """``[size]``: true with the probability; the same for generators in the same state."""
        return _unpack(self.words(size, generator))[:size]

    def words(self, size: int, generator: torch.Generator) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        """``heads`` as bits, the first in the lowest; what lies behind the ``size``-th is arbitrary."""
        source = self._source(generator)
        count = -(-size // 64)
        drawn, undecided = np.zeros(count, np.uint64), np.full(count, ~np.uint64(0))
        for place, digit in enumerate(self.digits):
            bits = source.random_raw(count)
            if not place:  # nothing is decided yet
                drawn, undecided = (~bits, bits) if digit else (drawn, ~bits)
            elif digit:  # smaller in this digit: decided
                drawn |= undecided & ~bits
                undecided &= bits
            else:
                undecided &= ~bits
        if self.rest:
            open_ = np.flatnonzero(_unpack(undecided)[:size])
            late = np.zeros(64 * count, np.bool_)
            late[open_] = (source.random_raw(len(open_)) >> 11) * 2.0**-53 < self.rest
            drawn |= np.packbits(late, bitorder="little").view("<u8")
        return drawn

    def _source(self, generator: torch.Generator) -> np.random.SFC64:
        """This thread's SFC64 in a state drawn from ``generator``; setting one is cheaper than making one."""
        source: np.random.SFC64 | None = getattr(self._local, "source", None)
        if source is None:
            source = self._local.source = np.random.SFC64(0)
        state = source.state
        words = torch.empty(3, dtype=torch.int64).random_(generator=generator)
        state["state"]["state"][:3] = words.numpy().view(np.uint64)
        state["state"]["state"][3] = 1
        source.state = state
        source.random_raw(12, output=False)  # as its author prescribes after seeding
        return source


def _unpack(words: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    return np.unpackbits(words.astype("<u8", copy=False).view(np.uint8), bitorder="little").view(np.bool_)


@dataclass
class Dropped:
    """τ̃ = m ⊙ τ / (1 − p), m ~ Bernoulli(1 − p) per entry (Yu et al., section 3).

    The mask of a block comes from a CPU generator of its own, seeded by expert, tensor and position,
    so it is the same on every device, whenever the block is asked for and by whichever thread.
    """

    streams: Sequence[str]
    drop: float
    rescale: bool
    generator: Callable[[int], torch.Generator]
    thresholds: Sequence[float] = ()

    def __post_init__(self) -> None:
        self._coins = Coins(1.0 - self.drop)

    def __call__(self, piece: Piece, index: int) -> Tensor:
        vector = self.masked(piece, index)
        return vector.mul_(self.factor) if self.rescale else vector

    @property
    def factor(self) -> float:
        """What is left of a task vector is multiplied by this."""
        return 1.0 / (1.0 - self.drop) if self.rescale else 1.0

    def source(self, piece: Piece, index: int, start: int) -> torch.Generator:
        """What decides m of one expert for the piece's entries from ``start`` on, at most a block."""
        place = f"dare/{self.streams[index]}/{piece.name}/{piece.start + start}"
        return self.generator(zlib.crc32(place.encode()))

    def words(self, piece: Piece, index: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        """m of one expert for a piece of at most a block, as bits."""
        return self._coins.words(piece.base.numel(), self.source(piece, index, 0))

    def masked(self, piece: Piece, index: int) -> Tensor:
        """m ⊙ τ of one expert, not yet rescaled."""
        vector = piece.task_vector(index)
        for start in range(0, vector.numel(), BLOCK) if self.drop else ():
            part = vector[start : start + BLOCK]
            kept = self._coins.heads(part.numel(), self.source(piece, index, start))
            if part.device.type == "cpu":  # NumPy multiplies by truth values thrice as fast as torch
                array = part.numpy()
                np.multiply(array, kept, out=array)
            else:
                part.mul_(torch.from_numpy(kept).to(part.device))
        return vector


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
            out.add_(facts.masked(piece, index), alpha=facts.factor)

    def fused(self, rule: Rule, piece: Piece, facts: Dropped) -> bool:
        size = piece.base.numel()
        if self.base_method == "ties" or not self.drop or size > BLOCK or size % 64:
            return False  # a block's coins are drawn together
        coins = [facts.words(piece, index) for index in range(len(piece.experts))]
        places = np.array([words.ctypes.data for words in coins], np.int64)
        rule("thinned", places, np.float32(facts.factor))
        return True
