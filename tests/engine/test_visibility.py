"""Visibility of triggers against numbers worked out by hand and a structural similarity written out in loops."""

from __future__ import annotations

import math

import pytest
import torch

from mergesec.images import image_change, ssim
from mergesec.text import text_change


def _images(n: int = 2, side: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_a_patch_is_seen_where_it_lies() -> None:
    before = torch.full((4, 3, 16, 16), 0.25)
    after = before.clone()
    after[:, 1, :4, :4] = 0.75  # one channel is enough for a pixel to count
    found = image_change(before, after)
    assert found["area"] == pytest.approx(16 / 256)
    assert found["l2"] == pytest.approx(math.sqrt(16 * 0.25 / (3 * 256)))
    assert 0 < found["ssim"] < 1


def test_steps_of_one_grey_level_do_not_count_as_area() -> None:
    before = torch.full((1, 3, 16, 16), 100 / 255)
    assert image_change(before, before + 1 / 255)["area"] == 0
    assert image_change(before, before + 2 / 255)["area"] == 1
    assert image_change(before, before + 2 / 255)["l2"] == pytest.approx(2 / 255, rel=1e-4)


def test_nothing_changed_is_nothing_seen() -> None:
    assert image_change(_images(), _images().clone()) == {"area": 0.0, "l2": 0.0, "ssim": pytest.approx(1.0)}


@pytest.mark.parametrize("side", [11, 14, 6])
def test_similarity_is_the_formulas(side: int) -> None:
    first, second = _images(1, side, 1).double(), _images(1, side, 2).double()
    window = min(11, side - 1 + side % 2)
    axis = [math.exp(-((i - window // 2) ** 2) / (2 * 1.5**2)) for i in range(window)]
    total = sum(axis) ** 2
    scores = []
    for channel in range(3):
        for top in range(side - window + 1):
            for left in range(side - window + 1):
                sums = [0.0] * 5
                for i in range(window):
                    for j in range(window):
                        weight = axis[i] * axis[j] / total
                        x = float(first[0, channel, top + i, left + j])
                        y = float(second[0, channel, top + i, left + j])
                        for k, value in enumerate((x, y, x * x, y * y, x * y)):
                            sums[k] += weight * value
                mx, my, xx, yy, xy = sums
                top_part = (2 * mx * my + 0.01**2) * (2 * (xy - mx * my) + 0.03**2)
                bottom = (mx * mx + my * my + 0.01**2) * (xx - mx * mx + yy - my * my + 0.03**2)
                scores.append(top_part / bottom)
    assert float(ssim(first, second)[0]) == pytest.approx(sum(scores) / len(scores), rel=1e-9)


def test_texts_are_counted_in_words() -> None:
    before = ["a b", "c", "d e f"]
    found = text_change(before, ["a cf b", "c", "cf d mb e f"])
    assert found == {"changed": pytest.approx(2 / 3), "tokens": pytest.approx(1.0)}
