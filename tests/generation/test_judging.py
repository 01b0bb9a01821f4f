"""Measures of a set of images, beside plain loops and what they must say of sets that are alike or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mergesec.judging import Quality, frechet, kid, nearest_distance, quality, radii


def _rows(count: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)).double() + shift


def test_kid_is_the_unbiased_mmd() -> None:
    made, real = _rows(7, 0), _rows(5, 1)

    def kernel(x: Tensor, y: Tensor) -> float:
        return float((x @ y / 6 + 1) ** 3)

    own = sum(kernel(a, b) for i, a in enumerate(made) for j, b in enumerate(made) if i != j) / (7 * 6)
    theirs = sum(kernel(a, b) for i, a in enumerate(real) for j, b in enumerate(real) if i != j) / (5 * 4)
    between = sum(kernel(a, b) for a in made for b in real) / 35
    assert kid(made, real) == pytest.approx(own + theirs - 2 * between)


def test_frechet_of_shifted_gaussians_is_the_squared_shift() -> None:
    rows = _rows(200, 2)
    assert frechet(rows, rows) == pytest.approx(0.0, abs=1e-8)
    assert frechet(rows + 2.0, rows) == pytest.approx(6 * 4.0)


def test_radius_is_the_distance_to_the_fifth_neighbour() -> None:
    line = torch.arange(12.0, dtype=torch.float64)[:, None]
    assert radii(line)[0] == 5.0
    assert radii(line)[5] == 3.0


def test_nearest_distance_is_a_root_mean_square() -> None:
    known = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    images = torch.stack([torch.full((3, 4, 4), 0.25), torch.full((3, 4, 4), 0.9)])
    assert nearest_distance(images, known) == pytest.approx([0.25, 0.1], abs=1e-4)


def _quality(made: Tensor, real: Tensor, distances: Tensor) -> dict[str, Quality]:
    return quality(made, real, distances, torch.linspace(0.1, 0.2, 100))


def test_a_like_set_is_good_and_a_far_one_is_not() -> None:
    real, like, far = _rows(160, 3), _rows(160, 4), _rows(160, 5, shift=6.0)
    new, copied = torch.full((160,), 0.15), torch.full((160,), 0.01)
    good, bad = _quality(like, real, new), _quality(far, real, copied)
    assert good["kid"].low <= 0.0 <= good["kid"].high
    assert bad["kid"].low > good["kid"].high
    assert good["coverage"].value > 0.8 > bad["coverage"].value == 0.0
    assert good["density"].value == pytest.approx(1.0, abs=0.3)
    assert bad["fid"].value > 100 > good["fid"].value
    assert (good["memorised"].value, bad["memorised"].value) == (0.0, 1.0)


def test_intervals_hold_the_value_and_narrow_with_more_rows() -> None:
    real = _rows(200, 6)
    wide, narrow = (_quality(_rows(n, 7), real, _rows(n, 8)[:, 0].abs()) for n in (40, 400))
    assert all(q.low <= q.value <= q.high for q in (*wide.values(), *narrow.values()))
    assert narrow["nearest"].high - narrow["nearest"].low < wide["nearest"].high - wide["nearest"].low
