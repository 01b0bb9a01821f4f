"""Runs that share a store: each step is done once, whoever does it, and a dead run's claims are free."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from mergesec.execution import scheduler as scheduler_module
from mergesec.execution.claims import Claims
from mergesec.execution.engines.worker import Answer
from mergesec.execution.scheduler import History, Reached, Scheduler
from mergesec.execution.store import Store
from mergesec.planning.plan import Step

KEY = "a" * 40
BLOB = save({"w": torch.zeros(2)})


def _key(number: int) -> str:
    return f"{number:040x}"


@pytest.fixture
def steps() -> dict[str, Step]:
    """Thirty steps: ten that need nothing, and each later one needs the one ten before it."""
    return {
        _key(i): Step(_key(i), "merge", (), (("x", _key(i - 10)),) if i >= 10 else (), "{}")
        for i in range(30)
    }


@dataclass
class _Here:
    """An executor of two slots that takes a little while and commits; ``done`` tells what it was asked for."""

    store: Store
    seconds: float = 0.0
    slots: list[Any] = field(default_factory=lambda: [0, 1])
    done: list[str] = field(default_factory=list)

    def submit(self, slot: int, step: Step, kinds: Any) -> Future[Answer]:
        self.done.append(step.key)
        future: Future[Answer] = Future()

        def commit() -> None:
            self.store.put(step.kind, step.key, BLOB, {})
            future.set_result(Answer("ok", seconds=self.seconds))

        threading.Timer(self.seconds, commit).start()
        return future

    def note(self, slot: int) -> str:
        return ""

    def close(self, now: bool = False) -> None:
        return None


class _Quiet:
    def start(self, total: int, cached: int, reached: Reached) -> None:
        return None

    def running(self, labels: Any) -> None:
        list(labels)

    def finished(self, step: Step, answer: Answer, reached: Reached) -> None:
        return None

    def stopping(self, done: int, running: list[str]) -> None:
        return None


def _scheduler(root: Path, steps: dict[str, Step], seconds: float = 0.0) -> tuple[Scheduler, _Here]:
    store = Store(root)
    here = _Here(store, seconds)
    return Scheduler(steps, store, here, History(root), _Quiet()), here


def _files(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "claims").glob("*"))


# --------------------------------------------------------------------------- claims


def test_a_step_is_claimed_once_and_its_file_goes(tmp_path: Path) -> None:
    one, other = Claims(tmp_path), Claims(tmp_path)
    assert one.take(KEY)
    assert not other.take(KEY)
    assert _files(tmp_path) == [f"{KEY}.lease"]
    one.release(KEY)
    assert _files(tmp_path) == []
    assert other.take(KEY)
    one.release(KEY)  # not its own: nothing happens
    assert not one.take(KEY)
    other.release_all()
    assert one.take(KEY)
    one.release_all()
    assert _files(tmp_path) == []


DIES = """
import os, signal, sys
from pathlib import Path
from mergesec.execution.claims import Claims
claims = Claims(Path(sys.argv[1]))
assert claims.take("a" * 40)
print("taken", flush=True)
sys.stdin.read()
"""


def test_a_dead_runs_claim_is_free_and_its_file_is_swept(tmp_path: Path) -> None:
    program = [sys.executable, "-c", DIES, str(tmp_path)]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"taken\n"
        claims = Claims(tmp_path)
        assert not claims.take(KEY)
        claims.sweep()
        assert _files(tmp_path) == [f"{KEY}.lease"]  # its run is alive
        process.kill()
    (tmp_path / "claims" / "mine.lease").write_text("somebody's")
    claims.sweep()
    assert _files(tmp_path) == ["mine.lease"]
    assert claims.take(KEY)
    claims.release_all()


def test_where_nothing_can_be_locked_work_goes_on(tmp_path: Path, steps: dict[str, Step]) -> None:
    (tmp_path / "claims").write_text("a file in the folder's place")
    run, here = _scheduler(tmp_path, steps)
    assert run.run(steps, 0).done == 30
    assert sorted(here.done) == sorted(steps)


# --------------------------------------------------------------------------- two runs


def test_two_runs_share_the_steps(
    tmp_path: Path, steps: dict[str, Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_module, "POLL", 0.02)
    runs = [_scheduler(tmp_path, steps, 0.01) for _ in range(2)]
    threads = [threading.Thread(target=run.run, args=(steps, 0)) for run, _ in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    done = [here.done for _, here in runs]
    assert sorted(done[0] + done[1]) == sorted(steps)
    assert min(map(len, done)) >= 5  # neither waited for the other to do it all
    assert sum(run.outcome.done for run, _ in runs) == 30
    assert Store(tmp_path).keys() == steps.keys()
    assert _files(tmp_path) == []


def test_a_claimed_step_is_waited_for_while_others_go_on(
    tmp_path: Path, steps: dict[str, Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_module, "POLL", 0.02)
    other = Claims(tmp_path)
    first = _key(3)
    assert other.take(first)
    run, here = _scheduler(tmp_path, steps)
    thread = threading.Thread(target=run.run, args=(steps, 0))
    thread.start()
    while len(here.done) < 27:  # all but it and the two that need it
        assert thread.is_alive()
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(here.done) == 27
    assert thread.is_alive()
    Store(tmp_path).put("merge", first, BLOB, {})  # the other run commits, then lets go
    other.release(first)
    thread.join(60)
    assert run.outcome.done == 29
    assert sorted([*here.done, first]) == sorted(steps)


def test_what_a_dead_run_had_claimed_is_done_here(
    tmp_path: Path, steps: dict[str, Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_module, "POLL", 0.02)
    other = Claims(tmp_path)
    assert other.take(_key(3))
    run, here = _scheduler(tmp_path, steps)
    thread = threading.Thread(target=run.run, args=(steps, 0))
    thread.start()
    while len(here.done) < 27:
        assert thread.is_alive()
        time.sleep(0.01)
    other.release_all()  # as the system does when it dies, without an artifact
    thread.join(60)
    assert run.outcome.done == 30
    assert sorted(here.done) == sorted(steps)


def _comparable(folder: Path) -> dict[str, Any]:
    found = {p.name: json.loads(p.read_text()) for p in folder.glob("*.json")}
    for record in found.values():
        record.pop("cost", None)
    return found


@pytest.mark.slow
def test_two_benches_at_once_do_each_step_once_and_end_with_the_same_records(bench: Any) -> None:
    grid = bench.grid("both", axes={"merging": ["simple_average", "ties", "magmax", "breadcrumbs"]})
    arguments = bench.arguments(grid, "--jobs", "1")
    results = [bench.home / name for name in ("one", "other")]
    runs = [bench.start("run", *arguments, "--results", str(place)) for place in results]
    outs = [run.communicate(timeout=240) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outs
    steps = [int(re.search(r"(\d+) steps run", out)[1]) for out, _ in outs]  # type: ignore[index]
    assert sum(steps) == len(list(bench.store.glob("artifacts/*/*.json")))
    assert _comparable(results[0] / "records" / "both") == _comparable(results[1] / "records" / "both")
    assert not _files(bench.store)
