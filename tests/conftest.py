"""What every test folder may use: ``bench`` as a user runs it, and the development data folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
MICRO = ROOT / "benchmark" / "mergesec" / "conformance" / "micro.py"
PROGRAM = "from mergesec.cli.main import main; main()"


def _hear_interrupts() -> None:
    """A shell starts background jobs deaf to Ctrl-C, and children inherit that; tests may run in one."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class Ran:
    """What a finished command left."""

    code: int
    out: str
    err: str


@dataclass
class BenchRunner:
    """``bench`` in processes of its own, on a store and a results folder of its own."""

    home: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def store(self) -> Path:
        return self.home / "store"

    @property
    def results(self) -> Path:
        return self.home / "results"

    def _environment(self) -> dict[str, str]:
        roots = [str(ROOT / top) for top in ("benchmark", "tasks", "methods")]
        path = [*self.environment.get("PYTHONPATH", "").split(os.pathsep), *roots]
        fixed = {"MERGESEC_CACHE": str(self.store), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        outer = {k: v for k, v in os.environ.items() if not k.startswith("MERGESEC_")}
        joined = {"PYTHONPATH": os.pathsep.join(p for p in path if p)}
        return {**outer, **fixed, **self.environment, **joined}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """The command, running, in a process group of its own."""
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments], env=self._environment(), cwd=self.home, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            preexec_fn=_hear_interrupts,
        )  # fmt: skip

    def __call__(self, *arguments: str, timeout: float = 240) -> Ran:
        """Run to the end; what it started is killed if it takes longer than ``timeout`` seconds."""
        process = self.start(*arguments)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return Ran(process.returncode, out, err)

    def grid(self, name: str = "tiny", **changes: Any) -> Path:
        """A grid file on the micro world; ``changes`` replace top-level fields and axes."""
        axes = {"merging": ["simple_average", "ties"]}
        fields: dict[str, Any] = {
            "name": name,
            "suite": {"name": "micro", "backbone": "micro/vit", "tasks": ["micro/bars", "micro/blobs"]},
            "axes": {**axes, **changes.pop("axes", {})},
            "recipe": {"epochs": 1},
            **changes,
        }
        path = self.home / f"{name}.yaml"
        path.write_text(yaml.safe_dump(fields, sort_keys=False))
        return path

    def arguments(self, grid: Path | str, *more: str, plugins: tuple[Path, ...] = ()) -> list[str]:
        loaded = [a for p in (MICRO, *plugins) for a in ("--plugin", str(p))]
        return ["--grid", str(grid), *loaded, *more]

    def run(self, grid: Path | str, *more: str, plugins: tuple[Path, ...] = (), timeout: float = 240) -> Ran:
        """``bench run`` of a grid with the micro world loaded, one worker unless ``more`` says otherwise."""
        jobs = () if "--jobs" in more else ("--jobs", "1")
        arguments = self.arguments(grid, *jobs, *more, plugins=plugins)
        return self("run", *arguments, "--results", str(self.results), timeout=timeout)

    def boards(self, name: str) -> dict[str, bytes]:
        """The leaderboard CSVs of a grid by file name, without measured cost."""
        folder = self.results / "leaderboards" / name
        return {p.name: p.read_bytes() for p in sorted(folder.glob("*.csv")) if p.name != "cost.csv"}


@pytest.fixture
def bench(tmp_path: Path) -> BenchRunner:
    """``bench`` with an empty store and results folder."""
    return BenchRunner(tmp_path)


@pytest.fixture(scope="session")
def bench_class() -> type[BenchRunner]:
    """For fixtures of wider scope, which choose their own folder."""
    return BenchRunner


@pytest.fixture(scope="session")
def micro() -> Path:
    """The micro world's plugin file."""
    return MICRO


@pytest.fixture(scope="session")
def shared() -> Path:
    """The development data folder: ``$MERGESEC_SHARED``, else ``../shared`` beside the checkout."""
    folder = Path(os.environ.get("MERGESEC_SHARED") or ROOT.parent / "shared")
    if not (folder / "data").is_dir():
        pytest.skip("no development data: set MERGESEC_SHARED or put shared/ beside the checkout")
    return folder
