"""Kills and power losses at random moments: the same command goes on, and ends with the records of a quiet run.

Seeded by ``MERGESEC_CAMPAIGN_SEED``; ``MERGESEC_KILLS`` and ``MERGESEC_POWER_LOSSES`` say how many (few by
default, hundreds on demand). Trainings keep a checkpoint every tenth of a second, so most kills fall between
two, and what goes on starts from one.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mergesec.execution.interrupts import PATIENCE
from mergesec.execution.store import Store

SEED = int(os.environ.get("MERGESEC_CAMPAIGN_SEED", "1"))
KILLS = int(os.environ.get("MERGESEC_KILLS", "3"))
LOSSES = int(os.environ.get("MERGESEC_POWER_LOSSES", "1"))
RECENT = 5.0
"""Seconds whose writes a power loss may take with it, flushed or not: some disks lie."""
DEADLINE = 300.0
GRID: dict[str, Any] = {
    "axes": {"merging": ["simple_average"], "attacks": ["none", "badnets"], "adversary": ["micro/bars"]},
    "threats": ["clean", "backdoor"],
    "recipe": {"epochs": 16, "batch_size": 32},
}
"""3 cells, 22 steps, of which three train for a second or so."""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(0),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes through /proc"),
]


@pytest.fixture
def life(bench: Any) -> Any:
    """A ``bench`` whose trainings keep many checkpoints."""
    bench.environment["MERGESEC_CHECKPOINT_SECONDS"] = "0.1"
    return bench


@pytest.fixture(scope="module")
def wanted(bench_class: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The records of a run that nobody disturbs."""
    quiet = bench_class(tmp_path_factory.mktemp("quiet"))
    ran = quiet.run(quiet.grid("life", **GRID))
    assert ran.code == 0, ran.err
    return _records(quiet)


def _records(bench: Any) -> dict[str, Any]:
    """All records but what they cost."""
    folder = bench.results / "records" / "life"
    found = {path.name: json.loads(path.read_bytes()) for path in sorted(folder.glob("*.json"))}
    for record in found.values():
        record.pop("cost", None)
    return found


def _start(bench: Any, results: str = "results") -> subprocess.Popen[str]:
    place = str(bench.home / results)
    arguments = bench.arguments(bench.home / "life.yaml", "--jobs", "1", "--results", place)
    process: subprocess.Popen[str] = bench.start("run", *arguments)
    return process


def _parents() -> dict[int, int]:
    """Each process's parent."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            found[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
    return found


def _below(ancestor: int) -> list[int]:
    """Processes that a process started, and those that they started."""
    parents, found = _parents(), [ancestor]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found[1:]


def _names(store: Path) -> set[str]:
    with contextlib.suppress(OSError):  # a folder that is not there yet
        return {p.name for p in (*store.glob("artifacts/*/*"), *store.glob("checkpoints/*"))}
    return set()


def _committed(store: Path) -> set[str]:
    return {p.stem for p in store.glob("artifacts/*/*.json")}


def _wait_for_moment(rng: random.Random, process: subprocess.Popen[str], store: Path) -> None:
    """Until a random number of files appeared; then a moment more, or until one is being written."""
    if rng.random() < 0.1:
        time.sleep(rng.uniform(0, 1.5))
        return
    left, seen = rng.randint(1, 14), _names(store)
    amid, end = rng.random() < 0.4, time.monotonic() + DEADLINE
    while process.poll() is None:
        assert time.monotonic() < end, "hangs"
        now = _names(store)
        left -= len(now - seen)
        if left <= 0 and (not amid or any(name.startswith(".tmp-") for name in now - seen)):
            break
        seen = now
        time.sleep(0.001 if amid else 0.004)
    if not amid:
        time.sleep(rng.uniform(0, 0.15))


def _gone(process: subprocess.Popen[str]) -> None:
    """Wait until a run and all its workers are gone."""
    end = time.monotonic() + DEADLINE
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.killpg(process.pid, 0)
            assert time.monotonic() < end, "a worker stays behind"
            time.sleep(0.01)


@dataclass
class Campaign:
    """What happened so far."""

    rng: random.Random
    power: bool = False
    """Whether files were damaged on purpose: what nothing reads again may stay so until it is verified."""
    figures: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)

    def check_end(self, bench: Any, wanted: dict[str, Any]) -> None:
        """After a run that ended by itself with code 0: are the records those of a quiet one?"""
        self.figures["runs to the end"] += 1
        found = _records(bench)
        if found != wanted:
            different = [name for name in wanted if found.get(name) != wanted[name]]
            self.lost.append(f"records differ: {different}")
        store = Store(bench.store)
        damaged = [f"{item.kind} {item.key}" for item in store.contents() if not store.verify(item)]
        if self.power:
            self.figures["damaged and not needed again"] += len(damaged)
        else:
            self.lost += [f"damaged at the end: {name}" for name in damaged]

    def tell(self, capsys: pytest.CaptureFixture[str], title: str) -> None:
        figures = ", ".join(f"{number} {what}" for what, number in self.figures.items())
        with capsys.disabled():
            print(f"\n{title} (seed {SEED}): {figures}, {len(self.lost)} losses")
        assert not self.lost, "\n".join(self.lost)


def _fresh(bench: Any, number: int) -> Any:
    """The same bench with a store and results of its own."""
    home = bench.home / str(number)
    home.mkdir()
    found = type(bench)(home, bench.environment)
    found.grid("life", **GRID)
    return found


def test_kills_at_random_moments_lose_nothing(
    life: Any, wanted: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    campaign = Campaign(random.Random(SEED))
    number = 0
    while campaign.figures["effective"] < KILLS or campaign.figures["runs to the end"] < number:
        _live(_fresh(life, number), campaign, wanted)
        number += 1
        if campaign.lost:
            break
    campaign.tell(capsys, "kills")


@contextlib.contextmanager
def _rival(bench: Any, campaign: Campaign) -> Iterator[None]:
    """Now and then another run of the same grid on the same store, which claims steps and is killed at some moment."""
    rng = campaign.rng
    if rng.random() < 0.75:
        yield
        return
    other = _start(bench, "rival")
    try:
        yield
        _wait_for_moment(rng, other, bench.store)
    finally:
        campaign.figures["of a rival"] += _kill("all", other)
        other.communicate(timeout=DEADLINE)


def _live(bench: Any, campaign: Campaign, wanted: dict[str, Any]) -> None:
    """Run a grid to its end; kill the run, its worker or all of it as long as kills are left, at most 12 times."""
    rng, figures, process, kills, workers, how = campaign.rng, campaign.figures, None, 0, 0, ""
    committed: set[str] = set()
    while not campaign.lost:
        if process is None:
            process, workers = _start(bench), 0
        if kills < 12 and figures["effective"] < KILLS:
            with _rival(bench, campaign):
                _wait_for_moment(rng, process, bench.store)
            how = rng.choice(("run", "run", "worker", "all", "Ctrl-C", "Ctrl-C twice"))
            checkpoints = any(bench.store.glob("checkpoints/*.safetensors"))
            if _press(rng, how, process) if how.startswith("Ctrl-C") else _kill(how, process):
                figures["effective"] += 1
                figures[how if how.startswith("Ctrl-C") else f"of {how}"] += 1
                figures["with a checkpoint"] += checkpoints
                kills += 1
                workers += how == "worker"
            figures["kills"] += 1
        else:
            process.wait(DEADLINE)
        now = _committed(bench.store)
        campaign.lost += [f"committed and gone: {key}" for key in sorted(committed - now)]
        committed = now
        if process.poll() is None and how == "worker":
            continue
        _, err = process.communicate(timeout=DEADLINE)
        if process.returncode == 0:
            campaign.check_end(bench, wanted)
            return
        died = process.returncode == -signal.SIGKILL or (process.returncode == 1 and workers >= 3)
        if not died and not (
            how.startswith("Ctrl-C") and process.returncode == 130 and "Traceback" not in err
        ):
            campaign.lost.append(f"code {process.returncode}: {err[-2000:]}")
        if rng.random() < 0.7:  # else the next run meets what the dead one's worker still does
            _gone(process)
        process = None


def _kill(how: str, process: subprocess.Popen[str]) -> bool:
    """Whether there was something left to kill."""
    if process.poll() is not None:
        return False
    with contextlib.suppress(ProcessLookupError):
        if how == "worker":
            below = _below(process.pid)
            if not below:
                return False
            os.kill(below[-1], signal.SIGKILL)
            return True
        if how == "all":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait(DEADLINE)
        return process.returncode == -signal.SIGKILL
    return False


def _listens(process: int) -> bool:
    """Whether it is past the start of the interpreter: the thread that waits for signals is there."""
    with contextlib.suppress(OSError):
        return len(list(Path(f"/proc/{process}/task").iterdir())) > 1
    return False


def _press(rng: random.Random, how: str, process: subprocess.Popen[str]) -> bool:
    """Ctrl-C at a terminal, which every process of a run sees; whether it ended the run."""
    while process.poll() is None and not _listens(process.pid):
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
        if how == "Ctrl-C twice":
            time.sleep(rng.uniform(0.3, 0.8))  # two that come at once are one signal
            os.killpg(process.pid, signal.SIGINT)
            pressed = time.monotonic()
            process.wait(DEADLINE)
            # two seconds, and a machine that others keep busy
            assert time.monotonic() - pressed < 4 * PATIENCE, "a second Ctrl-C does not end a run"
    return process.wait(DEADLINE) == 130


# --------------------------------------------------------------------------- power


def _recent(bench: Any) -> Iterator[Path]:
    """Files that were written in the last seconds before the power went."""
    files = [p for top in (bench.store, bench.results) for p in top.rglob("*") if p.is_file()]
    last = max((p.stat().st_mtime for p in files), default=0.0)
    return (p for p in sorted(files) if p.stat().st_mtime > last - RECENT)


def _damage(rng: random.Random, path: Path) -> str:
    """What a file may look like afterwards."""
    data = path.read_bytes()
    how = rng.choice(("zeroed", "zeroed from a block on", "another's bytes", "cut", "emptied", "not there"))
    place = rng.randrange(len(data) + 1)
    if how == "not there":
        path.unlink()
    else:
        after = {
            "zeroed": bytes(len(data)), "zeroed from a block on": data[: place // 512 * 512].ljust(len(data), b"\0"),
            "cut": data[:place], "emptied": b"", "another's bytes": rng.randbytes(len(data)),
        }  # fmt: skip
        path.write_bytes(after[how])
    return how


def test_power_losses_lose_nothing_that_is_not_made_again(
    life: Any, wanted: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    campaign = Campaign(random.Random(SEED), power=True)
    rng, figures, number = campaign.rng, campaign.figures, 0
    while figures["power losses"] < LOSSES and not campaign.lost:
        bench = _fresh(life, number)
        number += 1
        for _ in range(rng.randint(1, 3)):
            process = _start(bench)
            if rng.random() < 0.2:  # at the very end, when records and boards are being written
                process.wait(DEADLINE)
            else:
                _wait_for_moment(rng, process, bench.store)
            _kill("all", process)
            process.communicate(timeout=DEADLINE)
            _gone(process)
            chosen = [path for path in _recent(bench) if rng.random() < 0.5]
            for path in chosen:
                figures[_damage(rng, path)] += 1
            figures["power losses"] += 1
            figures["files damaged"] += len(chosen)
        process = _start(bench)
        _, err = process.communicate(timeout=DEADLINE)
        if process.returncode == 0:
            campaign.check_end(bench, wanted)
        else:
            campaign.lost.append(f"code {process.returncode}: {err[-2000:]}")
    campaign.tell(capsys, "power losses")
