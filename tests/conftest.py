"""What every test folder may use: ``bench`` as a user runs it, and the development data folder.

And the rules of the suite: which tests are slow, which run alone, how parallel workers share them out, and
that no test writes below the checkout.
"""

from __future__ import annotations

import fcntl
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

# Before torch is imported: the networks of tests are too small for more, and workers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

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
        laid = (self.environment.get("PYTHONPATH", ""), os.environ.get("PYTHONPATH", ""))
        path = [*os.pathsep.join(laid).split(os.pathsep), *roots]
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
        return {p.name: p.read_bytes() for p in sorted(folder.glob("*.csv")) if not p.name.startswith("cost")}


@pytest.fixture
def bench(tmp_path: Path) -> BenchRunner:
    """``bench`` with an empty store and results folder."""
    return BenchRunner(tmp_path)


@pytest.fixture(scope="session")
def bench_class() -> type[BenchRunner]:
    """For fixtures of wider scope, which choose their own folder."""
    return BenchRunner


@pytest.fixture
def no_forced_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """FusionBench's gossip collects garbage after every step, half a second each; Python does anyway."""
    monkeypatch.setattr(gc, "collect", lambda *_: 0)


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


# --------------------------------------------------------------------------- the rules of the suite

SLOW = {"packaging", "perf"}
"""Folders whose tests are slow by nature: one installs the package, one measures."""
HEAVY = {"bench", "bench_class", "shared"}
"""Fixtures whose tests are: they start ``bench`` in processes of its own, or read real data."""
ALONE = {"perf"}
"""Folders whose tests measure time or memory: while one of them runs, parallel workers wait."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
KEPT = {".pytest_cache", ".hypothesis", ".benchmarks", "__pycache__"}
"""What test tools and Python may write below the checkout; they do without where they cannot."""


def _folder(item: pytest.Item) -> str:
    return item.path.relative_to(ROOT / "tests").parts[0]


def _turn_in_line(item: pytest.Item) -> int:
    """Installing takes longest, so it starts first; what runs alone comes last, when the others are done."""
    return {"packaging": 0, "perf": 2}.get(_folder(item), 1)


def _is_slow(item: pytest.Item) -> bool:
    uses = set(getattr(item, "fixturenames", ()))
    return _folder(item) in SLOW or item.get_closest_marker("fusionbench") is not None or bool(HEAVY & uses)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is slow by nature; what trains until an outcome shows says so itself."""
    for item in items:
        if _is_slow(item):
            item.add_marker("slow")
    items.sort(key=_turn_in_line)


def pytest_collection_finish() -> None:
    """``MERGESEC_TEST_MKLDNN=0`` runs the tests without MKL-DNN."""
    if os.environ.get("MERGESEC_TEST_MKLDNN") == "0":
        import torch

        torch.backends.mkldnn.enabled = False


@pytest.fixture(autouse=True)
def _own_randomness() -> None:
    """What a test draws without a generator does not depend on which tests ran before it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file stays on one worker, so its fixtures are made once; files go in the order of collection."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


@contextmanager
def _locked(path: Path, kind: int = fcntl.LOCK_EX) -> Iterator[int]:
    with path.open("a") as file:
        fcntl.flock(file, kind)
        yield file.fileno()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Tests of parallel workers run beside each other, except those that run alone.

    Who wants to be alone keeps the gate shut, so that nobody starts, and waits until the room is empty.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    common = Path(item.config.option.basetemp).parent
    alone = _folder(item) in ALONE
    with ExitStack() as held:
        gate = held.enter_context(_locked(common / "gate"))
        held.enter_context(_locked(common / "room", fcntl.LOCK_EX if alone else fcntl.LOCK_SH))
        if not alone:
            fcntl.flock(gate, fcntl.LOCK_UN)
        return (yield)


@pytest.fixture(scope="session")
def once(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``once(name, make)``: a folder that ``make`` filled, once for all parallel workers."""
    base = tmp_path_factory.getbasetemp()
    common = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name: str, make: Callable[[Path], None]) -> Path:
        folder, done = common / name, common / f"{name}.done"
        with _locked(common / f"{name}.lock"):
            if not done.exists():
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return made


_written: list[str] = []


def _is_written(event: str, arguments: tuple[Any, ...]) -> Any:
    """The path that an audited event makes or changes, if it does."""
    if event == "open":
        path, mode, flags = arguments
        return path if (flags or 0) & WRITES or set(mode or "") & set("wax+") else None
    return {"os.mkdir": arguments[:1], "os.rename": arguments[1:2], "os.link": arguments[1:2],
            "os.symlink": arguments[1:2]}.get(event, (None,))[0]  # fmt: skip


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    path = _is_written(event, arguments)
    if not isinstance(path, str | bytes | os.PathLike):
        return
    parts = Path(os.path.abspath(os.fsdecode(path))).parts
    above, below = parts[: len(ROOT.parts)], parts[len(ROOT.parts) :]
    if above == ROOT.parts and below and not KEPT & set(below):
        _written.append("/".join(below))


sys.addaudithook(_watch)


@pytest.fixture(autouse=True)
def _checkout_stays_as_it_is() -> Iterator[None]:
    """A test that writes below the checkout fails: it may be read-only, and others read it."""
    yield
    found = [*_written]
    _written.clear()
    assert not found, f"written below the checkout: {found}"
