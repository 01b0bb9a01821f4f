"""A case worked out by hand."""

import runpy
from pathlib import Path

import torch

from mergesec.contracts import Expert

NormClip = runpy.run_path(str(Path(__file__).with_name("norm_clip.py")))["NormClip"]


def test_the_long_one_is_cut_to_the_median_length() -> None:
    base = {"w": torch.zeros(2)}
    experts = [Expert(str(v), {"w": torch.tensor([v, 0.0])}) for v in (1.0, -2.0, 8.0)]
    kept = NormClip(factor=1.0).screen(base, experts, None)
    assert [float(e.weights["w"][0]) for e in kept] == [1.0, -2.0, 2.0]
