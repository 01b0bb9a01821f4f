"""What screens of contributed experts share: robust outlier scores, and which experts are let in."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import gcd, isfinite

import torch
from torch import Tensor

from mergesec.contracts import Expert

CONSISTENT = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""
MEAN_CONSISTENT = 1.2533141373155
"""The same over its mean absolute deviation, √(π/2)."""
RELATIVE_FLOOR = 1e-9
GOLDEN = 0.6180339887498949


def robust_scores(values: Tensor) -> Tensor:
    """(x − median) / (1.4826 · MAD) of ``values`` ``[n]``, float64.

    Where more than half of the values coincide, MAD is 0 and the mean absolute deviation takes its place
    (Iglewicz and Hoaglin, 1993); where all do, the scores are 0. The median of an even number is
    the mean of the middle two.
    """
    values = values.double()
    centred = values - torch.quantile(values, 0.5)
    spread = CONSISTENT * torch.quantile(centred.abs(), 0.5)
    tiny = RELATIVE_FLOOR * float(values.abs().max())
    if float(spread) <= tiny:
        spread = MEAN_CONSISTENT * centred.abs().mean()
    return centred / spread if float(spread) > tiny else torch.zeros_like(centred)


DRAWS = 40_000


@cache
def critical_score(experts: int, statistics: int, level: float, sides: int) -> float:
    """The value that the largest of ``experts`` × ``statistics`` robust scores exceeds with chance ``level``
    when every statistic is independent normal: among few experts the median deviation is so uncertain
    that the usual 3.5 flags an innocent one in every fourth merge of eight (two statistics).

    From ``DRAWS`` simulated merges, always the same ones. ``sides`` 1: upwards only.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(DRAWS * statistics, experts, dtype=torch.float64, generator=generator)
    centred = drawn - torch.quantile(drawn, 0.5, dim=1, keepdim=True)
    scores = centred / (CONSISTENT * torch.quantile(centred.abs(), 0.5, dim=1, keepdim=True))
    largest = (scores if sides == 1 else scores.abs()).amax(dim=1).view(DRAWS, statistics).amax(dim=1)
    return float(torch.quantile(largest, 1.0 - level))


def let_in(experts: Sequence[Expert], suspicion: Tensor, threshold: float) -> list[Expert]:
    """The experts whose ``suspicion`` ``[n]`` is at most ``threshold``, in order; the least suspicious one,
    if it would be none."""
    kept = [e for e, s in zip(experts, suspicion.tolist(), strict=True) if s <= threshold]
    return kept or [experts[int(suspicion.argmin())]]


def rounded(experts: Sequence[Expert], values: Tensor) -> dict[str, float | None]:
    """``values`` ``[n]`` by task, for a report; six digits, and None where nothing could be told."""
    pairs = zip(experts, values.double().tolist(), strict=True)
    return {e.task: float(f"{v:.6g}") if isfinite(v) else None for e, v in pairs}


def strided(count: int) -> Tensor:
    """All of ``count`` rows in the order of steps by the golden section, int64: any stretch of it is spread
    over the split, whether rows are sorted by class or classes alternate, and nothing is drawn."""
    step = max(1, round(GOLDEN * count))
    while gcd(step, count) != 1:
        step += 1
    return torch.arange(count) * step % max(1, count)
