"""A case worked out by hand; whether the contracts are kept, ``bench plugin check`` says."""

import runpy
from pathlib import Path

import torch

from mergesec.contracts import Merged

Fresh = runpy.run_path(str(Path(__file__).with_name("plugin.py")))["Fresh"]


def test_half_of_the_task_vector_stays() -> None:
    base = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3)}
    merged = Merged({"w": torch.tensor([3.0, 2.0]), "n": torch.tensor(3)})
    repaired = Fresh(share=0.5).repair(merged, base, None).shared
    assert repaired["w"].tolist() == [2.0, 2.0]
    assert repaired["n"] == 3
