"""The wheel, installed into an empty environment, runs a grid far from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GRID = """
name: wheel
suite: {name: micro, backbone: micro/vit, tasks: [micro/bars, micro/blobs]}
threats: [clean]
axes: {merging: [simple_average]}
recipe: {epochs: 1, max_train: 32}
"""


OUTSIDE = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE")
"""What would tie the new environment to this one, or make each of its processes compile all of torch."""


def _run(*command: str | Path, cwd: Path, **env: str) -> str:
    plain = {k: v for k, v in os.environ.items() if k not in OUTSIDE}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env={**plain, **env}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_exactly_the_three_packages(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names if ".dist-info/" not in n}
    assert tops == {"mergesec", "mergesec_tasks", "mergesec_methods"}
    for needed in (
        "mergesec/py.typed",
        "mergesec/conf/quickstart.yaml",
        "mergesec_tasks/mini/weights/vit.safetensors",
    ):
        assert needed in names


def test_wheel_runs_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    _run(sys.executable, "-m", "venv", venv, cwd=tmp_path)
    python = venv / "bin" / "python"
    # what is imported is compiled then; compiling all takes longer than the rest of the test
    pip = (python, "-m", "pip", "install", "-q", "--no-compile", "-c", ROOT / "constraints.txt")
    _run(*pip, wheel, cwd=tmp_path)
    (tmp_path / "grid.yaml").write_text(GRID)
    micro = _run(
        python, "-c", "import mergesec.conformance as c; print(c.__path__[0] + '/micro.py')", cwd=tmp_path
    ).strip()
    assert str(venv) in micro
    out = _run(
        venv / "bin" / "bench", "run", "--grid", "grid.yaml", "--plugin", micro, cwd=tmp_path,
        MERGESEC_CACHE=str(tmp_path / "store"), OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert "1 of 1 cells done" in out
    assert (tmp_path / "results" / "leaderboards" / "wheel" / "clean.csv").is_file()
    assert "mini/mnist" in _run(venv / "bin" / "bench", "list", "task", cwd=tmp_path)
