"""A case worked out by hand; whether the contracts are kept, ``bench plugin check`` says."""

import runpy
from pathlib import Path

import torch

Fresh = runpy.run_path(str(Path(__file__).with_name("plugin.py")))["Fresh"]


def test_brightness_tells_the_classes_apart() -> None:
    split = Fresh().load(None)["test"]
    bright = split.inputs.float().mean((1, 2, 3)) > 127
    assert torch.equal(bright.long(), split.targets)
