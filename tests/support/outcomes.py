"""What a test may ask of training's outcome: bounds that follow from the number of rows, and one base seed.

Processors round differently and training magnifies it: the accuracy of one run on a handful of rows measures
the machine. So such a test pools several seeds, judges rows drawn for it, and asks whether the exact
bounds of a share, or of its change row by row, lie on the claimed side.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

import torch
from scipy.stats import beta
from torch import Tensor

from mergesec.conformance.micro import _Micro
from mergesec.contracts import Split

LEVEL = 1e-3
"""Chance that a bound is on the wrong side of what it bounds."""


class Bounds(NamedTuple):
    """A number lies between these, but for a chance of ``LEVEL`` at either end."""

    low: float
    high: float


def seeds(count: int) -> range:
    """Seeds of independent runs. ``$MERGESEC_TEST_SEED`` (0) chooses them; no two bases share one below 1000 runs."""
    base = 1000 * int(os.environ.get("MERGESEC_TEST_SEED", "0"))
    return range(base, base + count)


def pooled(rows: Iterable[Tensor]) -> Tensor:
    """Rows of all runs, one after the other."""
    return torch.cat([r.flatten().bool() for r in rows])


def share(hits: Tensor, level: float = LEVEL) -> Bounds:
    """Clopper and Pearson's exact bounds of the chance behind ``hits`` bool ``[N]``."""
    count, total = int(hits.sum()), hits.numel()
    low = beta.ppf(level, count, total - count + 1) if count else 0.0
    high = beta.isf(level, count + 1, total - count) if count < total else 1.0
    return Bounds(float(low), float(high))


def change(before: Tensor, after: Tensor) -> Bounds:
    """Exact bounds of how much more often ``after`` bool ``[N]`` is true than ``before`` on the same rows.

    The shares of rows that came and that went are bounded each at half the level, so whatever the
    dependence of the two, their difference is bounded at the whole one.
    """
    came, went = share(after & ~before, LEVEL / 2), share(before & ~after, LEVEL / 2)
    return Bounds(came.low - went.high, came.high - went.low)


def fresh(task: _Micro, count: int, seed: int) -> Split:
    """Rows of a micro task that no split of it holds: as many as a bound needs."""
    return task._split(count, torch.Generator().manual_seed(10_000 + seed))
