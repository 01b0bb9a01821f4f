"""Means of shares over trainings, and what their intervals cover."""

from __future__ import annotations

import numpy as np
import pytest
from outcomes import seeds

from mergesec.evidence.shares import means
from mergesec_tasks.text._answers import share

ROWS = 60


def measured(hits: int, rows: int = ROWS) -> dict[str, float]:
    value, low, high = share(hits, rows)
    return {"x": value, "x_low": low, "x_high": high}


def test_a_single_training_has_the_interval_of_its_rows() -> None:
    found = means([measured(6)], {"x": "shown"})
    assert [found["shown"], found["shown_low"], found["shown_high"]] == pytest.approx(share(6, ROWS))


def test_trainings_that_differ_widen_it_and_equal_ones_do_not() -> None:
    equal = means([measured(6)] * 3, {"x": "x"})
    assert (equal["x_low"], equal["x_high"]) == pytest.approx(share(6, ROWS)[1:])
    apart = means([measured(k) for k in (6, 0, 30)], {"x": "x"})
    assert apart["x"] == pytest.approx(0.2)
    assert apart["x_low"] == 0.0  # a mean of shares is one
    assert apart["x_high"] > 0.2 + 4.3 * 0.26 / 3**0.5


def test_the_interval_covers_the_mean_of_all_trainings() -> None:
    """95 % or more, with three standard errors of the count: the two parts are added as if both were known."""
    rng, times, inside = np.random.default_rng(next(iter(seeds(1)))), 2000, 0
    for _ in range(times):
        shares = np.clip(rng.normal(0.4, 0.1, size=3), 0, 1)
        found = means([measured(int(rng.binomial(ROWS, p))) for p in shares], {"x": "x"})
        inside += found["x_low"] <= 0.4 <= found["x_high"]
    assert inside / times > 0.95 - 3 * (0.95 * 0.05 / times) ** 0.5
