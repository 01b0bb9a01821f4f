"""Two cases worked out by hand."""

import runpy
from pathlib import Path

import pytest
import torch

from mergesec.contracts import Expert

GeometricMedian = runpy.run_path(str(Path(__file__).with_name("geometric_median.py")))["GeometricMedian"]


def merged(*values: tuple[float, float]) -> torch.Tensor:
    base = {"w": torch.ones(2), "n": torch.tensor(3)}
    experts = [Expert(str(v), {"w": 1 + torch.tensor(v), "n": torch.tensor(3)}) for v in values]
    found = GeometricMedian(steps=200).merge(base, experts, None).shared
    assert found["n"] == 3
    weights: torch.Tensor = found["w"] - 1
    return weights


def test_of_three_on_a_line_it_is_the_middle_one() -> None:
    """Not the mean, 34."""
    assert merged((0.0, 0.0), (1.0, 0.0), (101.0, 0.0)).tolist() == pytest.approx([1.0, 0.0], abs=0.02)


def test_of_a_square_it_is_the_centre() -> None:
    assert merged((0.0, 0.0), (2.0, 0.0), (0.0, 2.0), (2.0, 2.0)).tolist() == pytest.approx([1.0, 1.0])
