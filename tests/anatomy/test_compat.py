"""The torchvision guard, each case in a fresh interpreter against a torchvision that fails as told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from extras import needs

BROKEN = """
import torch, torchvision.helper
@torch.library.register_fake("torchvision::nms")
def fake_nms(dets, scores, iou_threshold): ...
@torch.library.register_fake("torchvision::qnms")
def fake_qnms(dets, scores, iou_threshold): ...
"""


def run(code: str, folder: Path, package: str | None = None) -> subprocess.CompletedProcess[str]:
    """``code`` in a new interpreter where ``torchvision`` is this source (None: whatever is installed)."""
    if package is not None:
        (folder / "torchvision").mkdir()
        (folder / "torchvision" / "__init__.py").write_text(package)
        (folder / "torchvision" / "helper.py").write_text("")
    path = os.pathsep.join([str(folder), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )


ASK = "from mergesec.compat import ensure_torchvision as e; print(e(), e()); "


@pytest.mark.slow
def test_missing_operators_are_repaired(tmp_path: Path) -> None:
    code = ASK + "import gc, torch; gc.collect(); import torchvision; print(torch.ops.torchvision.nms)"
    plain = run("import torchvision", tmp_path, BROKEN)
    assert "operator torchvision::nms does not exist" in plain.stderr
    result = run(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[:2] == ["repaired", "repaired"]
    assert "torchvision.nms" in result.stdout


def test_healthy_is_left_alone(tmp_path: Path) -> None:
    code = ASK + "import torchvision; assert torchvision.fine; import sys; print('torch' in sys.modules)"
    assert run(code, tmp_path, "fine = 1").stdout.split() == ["healthy", "healthy", "False"]


def test_absent(tmp_path: Path) -> None:
    code = "import sys; sys.modules['torchvision'] = None; " + ASK
    assert run(code, tmp_path).stdout.split() == ["absent", "absent"]


@pytest.mark.parametrize("error", ["RuntimeError('out of memory')", "OSError('no such library')"])
def test_other_errors_pass_through(tmp_path: Path, error: str) -> None:
    result = run(ASK, tmp_path, f"raise {error}")
    assert result.returncode == 1
    assert error.split("'")[1] in result.stderr


@pytest.mark.slow
def test_installed_torchvision_lets_open_clip_and_transformers_load(tmp_path: Path) -> None:
    for package in ("open_clip", "transformers"):
        needs(package)
    code = ASK + "import open_clip; from transformers import ViTModel; print(ViTModel.__name__)"
    result = run(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == "ViTModel"
