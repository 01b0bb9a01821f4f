"""A case worked out by hand; whether the contracts are kept, ``bench plugin check`` says."""

import runpy
from pathlib import Path

import torch

Fresh = runpy.run_path(str(Path(__file__).with_name("plugin.py")))["Fresh"]


def test_the_last_digits_are_gone() -> None:
    published = {"w": torch.tensor([1.0, 1.0 + 2.0**-12]), "n": torch.tensor(3)}
    recovered = Fresh().recover(published, None)
    assert recovered["w"].tolist() == [1.0, 1.0]
    assert recovered["w"].dtype == torch.float32 and recovered["n"] == 3
