"""Estimates with uncertainty over test samples and seeds: paired draws, largest ones, tiers, what is not separable.

Test samples are resampled. Seeds are too few for that: they get a random effect with the t distribution's tails,
drawn as weights of the seeds that every estimate shares, so that differences are paired in both.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mergesec.evidence.records import Count

DRAWS = 1000
LEVEL = 0.05
"""Of intervals, and of all separations of one contest together."""
FEWEST_SEEDS = 5
"""Fewer cannot tell rows apart: no tiers."""
NEAR, FAR = 1.0, 2.0
"""Rows within so many standard errors of the difference to the largest correct its value, and make its interval."""
ROUNDING = 1e-12
"""Rates that differ by less are the same."""
Draws = NDArray[np.float64]
Seeds = tuple[int, ...]


@dataclass(frozen=True)
class Estimate:
    """A point estimate with its draws; draws of two estimates are paired."""

    value: float
    draws: Draws
    """Over seeds and test samples, ``[DRAWS]``."""
    samples: Draws
    """Over test samples alone."""
    effects: Mapping[Seeds, Draws] = field(default_factory=dict)
    """What each seed adds to the value, by the set of seeds that it was averaged over."""
    limits: tuple[float, float] = (-np.inf, np.inf)
    """What the quantity cannot leave."""
    ends: tuple[float, float] | None = None
    """The interval where it is not that of the draws."""

    @property
    def seeds(self) -> int:
        """The fewest seeds that a part of it rests on; with one, the interval speaks of test samples alone."""
        return min(map(len, self.effects), default=0)

    def interval(self) -> tuple[float, float]:
        """95 % interval: percentiles of the draws within the limits."""
        if np.isnan(self.value):
            return (float("nan"), float("nan"))
        low, high = self.ends or np.nanpercentile(self.draws, [100 * LEVEL / 2, 100 - 100 * LEVEL / 2])
        return max(float(low), self.limits[0]), min(float(high), self.limits[1])

    def __sub__(self, other: Estimate) -> Estimate:
        limits = (self.limits[0] - other.limits[1], self.limits[1] - other.limits[0])
        return _linear([(1.0, self), (-1.0, other)], limits)


def nothing() -> Estimate:
    """The estimate of what was not measured."""
    return Estimate(float("nan"), np.full(DRAWS, np.nan), np.full(DRAWS, np.nan))


def _linear(parts: Sequence[tuple[float, Estimate]], limits: tuple[float, float]) -> Estimate:
    """The sum of weighted estimates, draw by draw and seed by seed."""
    effects: dict[Seeds, Draws] = {}
    for weight, part in parts:
        for seeds, effect in part.effects.items():
            effects[seeds] = effects.get(seeds, 0.0) + weight * effect
    return Estimate(
        float(sum(w * e.value for w, e in parts)),
        np.add.reduce([w * e.draws for w, e in parts]),
        np.add.reduce([w * e.samples for w, e in parts]),
        effects, limits,
    )  # fmt: skip


def mean(estimates: Sequence[Estimate]) -> Estimate:
    """Mean of estimates, draw by draw; of nothing: nothing."""
    if not estimates:
        return nothing()
    if len(estimates) == 1:
        return estimates[0] if estimates[0].ends is None else replace(estimates[0], ends=None)
    n = len(estimates)
    low, high = (sum(e.limits[end] for e in estimates) / n for end in (0, 1))
    return _linear([(1 / n, e) for e in estimates], (low, high))


def combined(of: Callable[..., Any], *parts: Estimate) -> Estimate:
    """A smooth function of estimates, draw by draw; what seeds add is taken along its slope."""
    values = [e.value for e in parts]
    effects: dict[Seeds, Draws] = {}
    for i, part in enumerate(parts):
        step = 1e-6 * max(1.0, abs(part.value))
        above, below = ([*values[:i], part.value + s, *values[i + 1 :]] for s in (step, -step))
        slope = float(of(*above) - of(*below)) / (2 * step)
        for seeds, effect in part.effects.items():
            effects[seeds] = effects.get(seeds, 0.0) + slope * effect
    return Estimate(
        float(of(*values)), of(*(e.draws for e in parts)), of(*(e.samples for e in parts)), effects
    )


def ratio(top: Estimate, bottom: Estimate, least: float = 0.0) -> Estimate:
    """``top / bottom``; undefined where bottom is at most ``least``, or cannot be told from none: where more than
    one draw in forty is not above 0."""
    if np.isnan(top.value) or not bottom.value > least or np.mean(bottom.draws <= 0) > LEVEL / 2:
        return nothing()

    def share(a: Any, b: Any) -> Any:
        return np.divide(a, b, out=np.full(np.shape(b), np.nan), where=np.asarray(b) > 0)

    return combined(share, top, bottom)


# --------------------------------------------------------------------------- from counts to draws


def _generator(*parts: object) -> np.random.Generator:
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


@cache
def _seed_weights(seeds: Seeds) -> Draws:
    """Weights ``[DRAWS, len(seeds)]`` that sum to 0 and turn the seeds' values into a draw of their mean's error,
    t-distributed with one degree of freedom less than there are seeds; of one seed: nothing is known."""
    n = len(seeds)
    if n < 2:
        return np.zeros((DRAWS, n))
    rng = _generator("seeds", *seeds)
    normal = rng.standard_normal((DRAWS, n))
    normal -= normal.mean(1, keepdims=True)
    tails = np.sqrt((n - 1) / rng.chisquare(n - 1, DRAWS))
    weights: Draws = normal * tails[:, None] / np.sqrt(n * (n - 1))
    return weights


_AT_ONCE = 32
"""Draws that are made in one go: what they need stays small."""
_TOLD = 256
"""Sums of outcomes that are drawn in one go."""
_KEPT = 2048
"""Rates that are remembered: more than a row of a board has, not every row that ever was."""
TOGETHER = _KEPT // 2
"""Rates that are worth waiting for: of rows that are told together, none is forgotten before it is read."""
_ROOM = 1 << 26
"""Bytes of draws as floats that are kept."""
Drawn = NDArray[np.float32]
Rates = Iterable[tuple[str, Mapping[int, Count]]]
"""What rates are of: a task, and of each seed a count."""


def _often_drawn(task: str, total: int) -> NDArray[np.uint8]:
    """How often each of ``total`` samples is in each draw, ``[DRAWS, total]``."""
    rng = _generator("samples", task, total)
    often = np.empty((DRAWS, total), np.uint8)
    for start in range(0, DRAWS, _AT_ONCE):
        drawn = rng.integers(0, total, (min(_AT_ONCE, DRAWS - start), total))
        places = (drawn + total * np.arange(len(drawn))[:, None]).ravel()
        often[start : start + len(drawn)] = np.bincount(places, minlength=drawn.size).reshape(drawn.shape)
    return often


class Bootstrap:
    """Rates with draws; test samples of a task are drawn once, so that every row is resampled alike.

    Outcomes, summed over the seeds, times how often each sample is drawn is a product of matrices. Its numbers are
    whole, and exact as floats; many at once take a third of what they take one by one (``tell``).
    """

    def __init__(self) -> None:
        self._often: dict[tuple[str, int], NDArray[np.uint8]] = {}
        self._floats: OrderedDict[tuple[str, int], Drawn] = OrderedDict()
        self._masks: dict[tuple[str, int, str], Drawn] = {}
        self._rates: OrderedDict[tuple[object, ...], Estimate] = OrderedDict()

    def _draws(self, task: str, total: int) -> Drawn:
        """``_often_drawn`` as floats ``[total, DRAWS]``, made anew where there is no room for those of all tasks."""
        key = (task, total)
        if key not in self._often:
            self._often[key] = _often_drawn(task, total)
        if key not in self._floats:
            self._floats[key] = self._often[key].T.astype(np.float32, order="C")
            while len(self._floats) > 1 and sum(f.nbytes for f in self._floats.values()) > _ROOM:
                self._floats.popitem(last=False)
        self._floats.move_to_end(key)
        return self._floats[key]

    def _drawn_of(self, task: str, total: int, outcomes: Sequence[Sequence[bytes]]) -> Drawn:
        """How many of each draw's samples are among those whose bits are set, summed over each one's outcomes,
        ``[len(outcomes), DRAWS]``."""
        packed = np.frombuffer(b"".join(p for of_one in outcomes for p in of_one), np.uint8)
        starts = np.cumsum([0, *map(len, outcomes[:-1])])
        bits = np.unpackbits(packed.reshape(sum(map(len, outcomes)), -1), axis=1, count=total)
        found: Drawn = np.add.reduceat(bits, starts, axis=0, dtype=np.float32) @ self._draws(task, total)
        return found

    def tell(self, wanted: Rates) -> None:
        """Draw many rates before they are asked for."""
        fresh: dict[tuple[object, ...], tuple[str, Mapping[int, Count]]] = {}
        for task, counts in wanted:
            key = _key(task, counts)
            if key in self._rates:  # many rows share their controls
                self._rates.move_to_end(key)
            elif counts and all(c.n for c in counts.values()):
                fresh[key] = task, counts
        samples = {key: np.zeros(DRAWS) for key in fresh}
        for (task, total), parts in _parts(fresh).items():
            for start in range(0, len(parts), _TOLD):
                some = parts[start : start + _TOLD]
                drawn = self._drawn_of(task, total, [part.outcomes for part in some])
                for part, row in zip(some, drawn, strict=True):
                    samples[part.key] += np.divide(row, self._of(task, part.first), dtype=np.float64)
        for key, (_, counts) in fresh.items():
            self._rates[key] = _estimate(counts, samples[key] / len(counts))
        while len(self._rates) > max(_KEPT, len(fresh)):
            self._rates.popitem(last=False)

    def _of(self, task: str, count: Count) -> Drawn | np.float32:
        """Of how many samples of each draw the hits are."""
        if count.mask is None:
            return np.float32(count.total)
        key = (task, count.total, count.mask)
        if key not in self._masks:
            drawn = self._drawn_of(task, count.total, [[count.packed()[1]]])[0]
            self._masks[key] = np.maximum(drawn, np.float32(1))
        return self._masks[key]

    def rate(self, task: str, counts: Mapping[int, Count]) -> Estimate:
        """Mean over seeds of k/n on one task; ``counts`` maps seed to count."""
        key = _key(task, counts)
        if key not in self._rates:
            self.tell([(task, counts)])
        return self._rates.get(key) or nothing()


def _key(task: str, counts: Mapping[int, Count]) -> tuple[object, ...]:
    """What a rate is remembered by."""
    return task, *[(seed, c.total, c.hits, c.mask) for seed, c in sorted(counts.items())]


class _Part(NamedTuple):
    """Of a rate the outcomes that are counted in the same samples."""

    key: tuple[object, ...]
    first: Count
    outcomes: list[bytes]


def _parts(
    rates: Mapping[tuple[object, ...], tuple[str, Mapping[int, Count]]],
) -> dict[tuple[str, int], list[_Part]]:
    """The parts of rates, by task and number of samples."""
    found: dict[tuple[str, int], list[_Part]] = {}
    for key, (task, counts) in rates.items():
        alike: dict[tuple[int, str | None], _Part] = {}
        for _, count in sorted(counts.items()):
            part = alike.setdefault((count.total, count.mask), _Part(key, count, []))
            part.outcomes.append(count.packed()[0])
        for (total, _), part in alike.items():
            found.setdefault((task, total), []).append(part)
    return found


def _estimate(counts: Mapping[int, Count], samples: Draws) -> Estimate:
    seeds = tuple(sorted(counts))
    rates = np.array([counts[seed].k / counts[seed].n for seed in seeds])
    effect = rates - rates.mean()
    return Estimate(
        float(rates.mean()), samples + _seed_weights(seeds) @ effect, samples, {seeds: effect}, (0.0, 1.0)
    )


# --------------------------------------------------------------------------- the largest of several


def largest(estimates: Sequence[Estimate]) -> tuple[Estimate, int]:
    """The largest of the true values, and the place of the largest estimate (-1 if nothing was measured).

    The largest of noisy estimates is too high. The maximum is therefore taken inside each draw: by how many
    standard errors the draws of the rows near it exceed their estimates at most. Half of that distribution corrects
    the value, the upper end of the one over all rows within reach gives the low end; the high end is the largest of
    their own. Where one row is clearly the largest, nothing changes.
    """
    measured = [i for i, e in enumerate(estimates) if not np.isnan(e.value)]
    if not measured:
        return nothing(), -1
    place = max(measured, key=lambda i: estimates[i].value)
    best = estimates[place]
    within = {i: 0.0 if i == place else _errors_below(best, estimates[i]) for i in measured}
    far = [estimates[i] for i in measured if within[i] <= FAR]
    if len(far) == 1:
        return best, place
    value = _corrected([estimates[i] for i in measured if within[i] <= NEAR], 50)
    low = min(value, _corrected(far, 100 - 100 * LEVEL / 2))
    high = max(value, *(e.interval()[1] for e in far))
    fewest = min(e.seeds for e in far)
    effects = best.effects
    if fewest < best.seeds:
        effects = {**effects, tuple(range(fewest)): np.zeros(fewest)}
    draws, samples = (
        np.max([_filled(d, e.value) for d, e in pairs], axis=0)
        for pairs in ([(e.draws, e) for e in far], [(e.samples, e) for e in far])
    )
    return Estimate(value, draws, samples, effects, best.limits, (low, high)), place


def _corrected(rows: Sequence[Estimate], percentile: float) -> float:
    """The largest of several rows, less what a percentile of the maximum's excess inside each draw adds to it."""
    values = np.array([e.value for e in rows])
    errors = np.array([_spread(e.draws) for e in rows])
    known = errors > 0
    if len(rows) < 2 or not known.any():
        return float(values.max())
    draws = np.stack([_filled(e.draws, e.value) for e, k in zip(rows, known, strict=True) if k])
    excess = ((draws - values[known, None]) / errors[known, None]).max(0)
    return float((values - max(float(np.percentile(excess, percentile)), 0.0) * errors).max())


def _errors_below(best: Estimate, other: Estimate) -> float:
    """By how many standard errors of the difference an estimate lies below the largest."""
    gap = best - other
    error = _spread(gap.draws)
    if gap.value < ROUNDING:
        return 0.0
    return gap.value / error if error > ROUNDING else np.inf


def _filled(draws: Draws, value: float) -> Draws:
    """Draws in which a ratio was undefined say nothing: the value stands in."""
    return np.where(np.isnan(draws), value, draws)


def _spread(draws: Draws) -> float:
    """A standard error that the tails of few seeds do not blow up: half the distance of the middle 68 %."""
    low, high = np.nanpercentile(draws, [15.865, 84.135])
    return float(high - low) / 2


# --------------------------------------------------------------------------- what can be told apart


def p_values(estimates: Sequence[Estimate]) -> Draws:
    """``[n, n]``: the two-sided level at which the interval of i minus j just leaves 0 out.

    The interval's half-width is the root of the sum of squares of the samples' (normal) and the seeds' (t).
    """
    values = np.array([e.value for e in estimates])
    drawn = [_filled(e.samples, e.value) for e in estimates]
    spread = np.atleast_2d(np.cov(np.stack(drawn)))
    own = np.diag(spread)
    parts = [(np.inf, (own[:, None] + own[None, :] - 2 * spread).clip(min=0))]
    for seeds in dict.fromkeys(seeds for e in estimates for seeds in e.effects if len(seeds) > 1):
        rows = np.stack([np.asarray(e.effects.get(seeds, np.zeros(len(seeds)))) for e in estimates])
        square = ((rows[:, None] - rows[None, :]) ** 2).sum(-1)
        parts.append((len(seeds) - 1, square / (len(seeds) * (len(seeds) - 1))))
    return _level_reached(np.abs(values[:, None] - values[None, :]), parts)


def _level_reached(distance: Draws, parts: Sequence[tuple[float, Draws]]) -> Draws:
    """The level at which a half-width equals ``distance``, by bisection; ``parts`` are degrees of freedom and
    variances. Of test samples alone it is known in closed form."""
    if all(np.isinf(freedom) for freedom, _ in parts):
        with np.errstate(divide="ignore", invalid="ignore"):
            errors = distance / np.sqrt(2 * sum(variance for _, variance in parts))
        levels = np.vectorize(math.erfc, otypes=[float])(np.nan_to_num(errors, nan=np.inf))
        return np.where(distance < ROUNDING, 1.0, levels.clip(min=1e-14))
    from scipy.special import ndtri, stdtrit

    low, high = np.full(distance.shape, -14.0), np.zeros(distance.shape)  # log10 of the level
    for _ in range(40):
        middle = (low + high) / 2
        tail = 1 - 10.0**middle / 2
        width = sum(
            variance * (ndtri(tail) if np.isinf(freedom) else stdtrit(freedom, tail)) ** 2
            for freedom, variance in parts
        )
        wide = width > distance**2
        low, high = np.where(wide, middle, low), np.where(wide, high, middle)
    return np.where(distance < ROUNDING, 1.0, 10.0**high)


def holm(levels: Sequence[float], level: float = LEVEL) -> list[bool]:
    """Which of several hypotheses fall so that at most ``level`` of such families lose a true one."""
    order = sorted(range(len(levels)), key=lambda i: levels[i])
    fallen = [False] * len(levels)
    for rank, i in enumerate(order):
        if levels[i] > level / (len(levels) - rank):
            break
        fallen[i] = True
    return fallen


def tiers(estimates: Sequence[Estimate], higher_is_better: bool = True) -> list[int]:
    """Tier of each estimate, 1 = best; 0 where nothing was measured or seeds are too few."""
    return tiers_of_largest([[e] for e in estimates], higher_is_better)


def tiers_of_largest(groups: Sequence[Sequence[Estimate]], higher_is_better: bool = False) -> list[int]:
    """Tier of each group by its largest value, 1 = best; 0 where nothing was measured or seeds are too few.

    Groups are taken in order. A tier ends where the next group is separated from the tier's first; all pairs of
    groups are one family (Holm). That one largest value exceeds another holds at the level of its clearest row,
    corrected for their number, against every row of the other.
    """
    found = [0] * len(groups)
    sound = [[e for e in group if not np.isnan(e.value)] for group in groups]
    ranked = [i for i, group in enumerate(sound) if group and min(e.seeds for e in group) >= FEWEST_SEEDS]
    if not ranked:
        return found
    tops = {i: max(e.value for e in sound[i]) for i in ranked}
    ranked.sort(key=lambda i: -tops[i] if higher_is_better else tops[i])
    apart = _separated([sound[i] for i in ranked])
    tier, leader = 0, 0
    for at, i in enumerate(ranked):
        if at == 0 or apart[leader, at]:
            tier, leader = tier + 1, at
        found[i] = tier
    return found


def _separated(groups: Sequence[Sequence[Estimate]]) -> NDArray[np.bool_]:
    """``[n, n]``: which groups' largest values differ, all pairs together at ``LEVEL``."""
    flat = [e for group in groups for e in group]
    owner = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    two_sided = p_values(flat)
    values = np.array([e.value for e in flat])
    above = np.where(values[:, None] > values[None, :], two_sided / 2, 1 - two_sided / 2)
    exceeds = np.ones((len(groups), len(groups)))  # level at which i's largest exceeds j's
    for i in range(len(groups)):
        for j in range(len(groups)):
            against = above[np.ix_(owner == i, owner == j)]
            exceeds[i, j] = min(1.0, len(groups[i]) * against.max(1).min())
    pairs = [(i, j) for i in range(len(groups)) for j in range(i)]
    levels = [min(1.0, 2 * min(exceeds[i, j], exceeds[j, i])) for i, j in pairs]
    apart = np.zeros((len(groups), len(groups)), bool)
    for (i, j), fallen in zip(pairs, holm(levels), strict=True):
        apart[i, j] = apart[j, i] = fallen
    return apart


def inseparable(estimates: Sequence[Estimate], best: int) -> list[int]:
    """Places of the estimates that cannot be told from one of them (Holm), itself among them."""
    if len(estimates) < 2:
        return list(range(len(estimates)))
    others = [i for i in range(len(estimates)) if i != best]
    levels = p_values(estimates)[best]
    apart = dict(zip(others, holm([float(levels[i]) for i in others]), strict=True))
    return [i for i in range(len(estimates)) if not apart.get(i, False)]
