"""Means with uncertainty: paired hierarchical bootstrap over seeds and test samples, and tiers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mergesec.evidence.records import Count

DRAWS = 1000
Draws = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A point estimate and its bootstrap draws ``[DRAWS]``; draws of two estimates are paired."""

    value: float
    draws: Draws

    def interval(self) -> tuple[float, float]:
        """95 % percentile interval."""
        if np.isnan(self.value):
            return (float("nan"), float("nan"))
        low, high = np.nanpercentile(self.draws, [2.5, 97.5])
        return float(low), float(high)

    def __sub__(self, other: Estimate) -> Estimate:
        return Estimate(self.value - other.value, self.draws - other.draws)


def nothing() -> Estimate:
    """The estimate of what was not measured."""
    return Estimate(float("nan"), np.full(DRAWS, np.nan))


class Bootstrap:
    """Draws resampling weights once per task and seed set, so that every row is resampled alike."""

    def __init__(self) -> None:
        self._samples: dict[tuple[str, int], NDArray[np.float32]] = {}
        self._seeds: dict[tuple[int, ...], NDArray[np.float64]] = {}
        self._rates: dict[tuple[object, ...], Estimate] = {}

    def _sample_weights(self, task: str, total: int) -> NDArray[np.float32]:
        """How often each of ``total`` samples is drawn, ``[DRAWS, total]``."""
        key = (task, total)
        if key not in self._samples:
            rng = _generator("samples", task, total)
            drawn = rng.integers(0, total, (DRAWS, total))
            weights = np.zeros((DRAWS, total), np.float32)
            np.add.at(weights, (np.arange(DRAWS)[:, None], drawn), 1.0)
            self._samples[key] = weights
        return self._samples[key]

    def _seed_weights(self, seeds: tuple[int, ...]) -> NDArray[np.float64]:
        """Share of each seed in each draw, ``[DRAWS, len(seeds)]``."""
        if seeds not in self._seeds:
            rng = _generator("seeds", *seeds)
            self._seeds[seeds] = rng.multinomial(len(seeds), [1 / len(seeds)] * len(seeds), DRAWS) / len(
                seeds
            )
        return self._seeds[seeds]

    def rate(self, task: str, counts: dict[int, Count]) -> Estimate:
        """Mean over seeds of k/n on one task; ``counts`` maps seed to count."""
        if not counts or any(c.n == 0 for c in counts.values()):
            return nothing()
        key = (task, *((seed, counts[seed].hits, counts[seed].mask) for seed in sorted(counts)))
        if key not in self._rates:  # many rows share their controls
            self._rates[key] = self._draw(task, counts)
        return self._rates[key]

    def _draw(self, task: str, counts: dict[int, Count]) -> Estimate:
        seeds = tuple(sorted(counts))
        rates = []
        for seed in seeds:
            hits, mask = counts[seed].arrays()
            weights = self._sample_weights(task, counts[seed].total)
            drawn = weights @ np.stack([hits, mask], 1).astype(np.float32)
            rates.append(drawn[:, 0] / np.maximum(drawn[:, 1], 1))
        draws = (np.stack(rates, 1) * self._seed_weights(seeds)).sum(1)
        return Estimate(float(np.mean([c.k / c.n for c in counts.values()])), draws)


def _generator(*parts: object) -> np.random.Generator:
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def mean(estimates: Sequence[Estimate]) -> Estimate:
    """Mean of estimates, draw by draw; of nothing: nothing."""
    if not estimates:
        return nothing()
    return Estimate(
        float(np.mean([e.value for e in estimates])), np.mean([e.draws for e in estimates], axis=0)
    )


def ratio(top: Estimate, bottom: Estimate, least: float = 0.0) -> Estimate:
    """``top / bottom``; undefined where |bottom| is at most ``least``."""
    if np.isnan(bottom.value) or abs(bottom.value) <= least:
        return nothing()
    with np.errstate(divide="ignore", invalid="ignore"):
        draws = np.where(np.abs(bottom.draws) > least, top.draws / bottom.draws, np.nan)
    return Estimate(top.value / bottom.value, draws)


def tiers(estimates: Sequence[Estimate], higher_is_better: bool = True) -> list[int]:
    """Tier of each estimate, 1 = best. A tier ends where the paired difference to its best is separated."""
    order = sorted(
        (i for i, e in enumerate(estimates) if not np.isnan(e.value)),
        key=lambda i: -estimates[i].value if higher_is_better else estimates[i].value,
    )
    found = [0] * len(estimates)
    tier, leader = 0, -1
    for i in order:
        if leader >= 0:
            low, high = (estimates[leader] - estimates[i]).interval()
            separated = low > 0 if higher_is_better else high < 0
        if leader < 0 or separated:
            tier, leader = tier + 1, i
        found[i] = tier
    return found
