"""DARE's coins: exact probabilities, independent entries, the same numbers everywhere."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from mergesec_methods.merging.dare import Coins

SIZE = 200_037


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("probability", [0.0, 1e-4, 0.1, 0.25, 0.5, 1 / 3, 0.75, 0.9, 0.996, 0.9999])
def test_share_and_independence(probability: float) -> None:
    heads = Coins(probability).heads(SIZE, seeded(3)).astype(np.float64)
    assert heads.shape == (SIZE,)
    deviation = (probability * (1 - probability) / SIZE) ** 0.5
    assert abs(heads.mean() - probability) <= 5 * deviation
    for lag in (1, 2, 8, 63, 64, 65, 4096):  # within and between words
        joint = (heads[lag:] * heads[:-lag]).mean()
        assert abs(joint - probability**2) <= 5 * deviation + 1e-12


def test_bits_are_spent_on_binary_digits() -> None:
    assert [len(Coins(p).digits) for p in (0.5, 0.25, 0.75, 0.375, 0.1)] == [1, 2, 2, 3, 8]
    assert Coins(0.5).rest == 0.0
    assert Coins(0.1).rest == pytest.approx(0.1 * 256 - 25)


def test_every_digit_and_the_rest_decide() -> None:
    """The same bits give nested sets: a larger probability keeps what a smaller one kept."""
    shares = (0.1, 0.1003, 0.101, 0.3, 0.3001)
    rows = [Coins(p).heads(SIZE, seeded(7)) for p in shares]
    for smaller, larger in pairwise(rows):
        same = np.logical_and(smaller, ~larger).mean()
        assert same < 1 / 256  # only the entries that drew once more may differ


def test_repeats_by_seed_and_is_pinned() -> None:
    coins = Coins(0.3)
    first = coins.heads(1000, seeded(1))
    assert np.array_equal(first, Coins(0.3).heads(1000, seeded(1)))
    assert not np.array_equal(first, coins.heads(1000, seeded(2)))
    assert "".join(map(str, first[:40].astype(int))) == "1110000000001000010000000000001101001010"
