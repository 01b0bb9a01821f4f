"""A case worked out by hand; whether the contracts are kept, ``bench plugin check`` says."""

import runpy
from pathlib import Path

import torch

from mergesec.contracts import Expert

Fresh = runpy.run_path(str(Path(__file__).with_name("plugin.py")))["Fresh"]


def test_one_expert_far_away_does_not_matter() -> None:
    base = {"w": torch.zeros(2), "n": torch.tensor(3)}
    experts = [Expert(str(v), {"w": torch.tensor([v, -v]), "n": torch.tensor(3)}) for v in (1.0, 2.0, 99.0)]
    merged = Fresh().merge(base, experts, None).shared
    assert merged["w"].tolist() == [2.0, -2.0]
    assert merged["n"] == 3
