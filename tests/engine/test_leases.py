"""Leases: made by one of many, alive while touched, taken over from the dead, and never another's to remove."""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from mergesec.execution import claims as claims_module
from mergesec.execution.claims import STALE, Claims, Lease
from mergesec.execution.engines.worker import Answer
from mergesec.execution.failures import Failure, Failures
from mergesec.execution.scheduler import ATTEMPTS, History, Scheduler
from mergesec.execution.store import Store
from mergesec.planning.plan import Step

KEY = "a" * 40


def _lease(root: Path, age: float = 0.0, **changes: Any) -> Path:
    """A lease that another machine made, last touched some seconds ago."""
    fields = {"token": "0" * 16, "machine": "far away", "process": 1, "born": "7", "since": time.time() - age}
    lease = Lease(**{**fields, **changes})
    path = root / "claims" / f"{KEY}.lease"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(asdict(lease)))
    _age(path, age)
    return path


def _age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds, time.time() - seconds))


def _read(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "claims" / f"{KEY}.lease").read_text())
    return found


def test_another_machines_lease_holds_while_it_is_touched(tmp_path: Path) -> None:
    _lease(tmp_path, age=STALE / 2)
    claims = Claims(tmp_path)
    assert not claims.take(KEY)
    assert list(claims.elsewhere()) == [KEY]
    claims.sweep()
    assert claims.taken() == {KEY}


def test_one_that_nobody_touches_is_taken_over_and_says_so(tmp_path: Path) -> None:
    path = _lease(tmp_path, age=STALE + 5)
    claims = Claims(tmp_path, "me")
    assert claims.elsewhere() == {}
    assert claims.take(KEY)
    assert claims.deaths(KEY) == (1, "")
    assert _read(tmp_path)["who"] == "me"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_who_dies_in_the_middle_of_taking_over_leaves_the_step_to_the_next(tmp_path: Path) -> None:
    path = _lease(tmp_path, age=STALE + 5)
    mark = path.parent / f".dead-{_read(tmp_path)['token']}"
    mark.touch()
    assert not Claims(tmp_path).take(KEY)  # somebody is at it
    _age(mark, STALE + 5)
    assert not Claims(tmp_path).take(KEY)  # he is not: the mark goes
    assert Claims(tmp_path).take(KEY)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("age", [0, STALE + 5])
def test_a_torn_lease_is_somebodys_until_it_is_old(tmp_path: Path, age: float) -> None:
    path = _lease(tmp_path)
    path.write_bytes(b"")
    _age(path, age)
    assert Claims(tmp_path).take(KEY) is bool(age)


def test_a_process_number_that_is_anothers_by_now_is_a_dead_holder(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    assert claims.take(KEY)
    mine = _read(tmp_path)
    path = _lease(tmp_path, machine=mine["machine"], process=os.getpid(), born=mine["born"])
    assert not Claims(tmp_path).take(KEY)
    if not mine["born"]:
        pytest.skip("nothing tells here when a process began")
    path.write_text(json.dumps({**_read(tmp_path), "born": "1"}))
    assert Claims(tmp_path).take(KEY)


def test_who_was_taken_for_dead_removes_nothing_when_he_comes_back(tmp_path: Path) -> None:
    slow, other = Claims(tmp_path), Claims(tmp_path)
    assert slow.take(KEY)
    _lease(tmp_path, age=STALE + 5)  # as if his had been that old
    assert other.take(KEY)
    before = _read(tmp_path)
    slow.release(KEY)
    assert _read(tmp_path) == before
    assert not Claims(tmp_path).take(KEY)


def test_of_many_who_find_a_dead_lease_one_takes_it(tmp_path: Path) -> None:
    for _ in range(20):
        path = _lease(tmp_path, age=STALE + 5)
        everybody = [Claims(tmp_path) for _ in range(8)]
        gate, won = threading.Barrier(8), []

        def try_it(claims: Claims, gate: threading.Barrier = gate, won: list[Claims] = won) -> None:
            gate.wait()
            if claims.take(KEY):
                won.append(claims)

        threads = [threading.Thread(target=try_it, args=(claims,)) for claims in everybody]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        won[0].release(KEY)
        assert not path.exists()


def test_a_lease_is_touched_while_it_is_held_and_no_other_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims_module, "BEAT", 0.02)
    claims = Claims(tmp_path)
    assert claims.take(KEY)
    path = tmp_path / "claims" / f"{KEY}.lease"
    _age(path, 1000)
    _until(lambda: time.time() - path.stat().st_mtime < 100)
    path.write_text(json.dumps({**_read(tmp_path), "token": "another"}))  # taken over
    _age(path, 1000)
    time.sleep(0.2)
    assert time.time() - path.stat().st_mtime > 900
    claims.release_all()
    assert path.exists()


def _until(fits: Any) -> None:
    end = time.monotonic() + 10
    while not fits():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_file_servers_clock_counts_not_this_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _lease(tmp_path, age=1)
    ahead = time.time() + 5000
    monkeypatch.setattr(time, "time", lambda: ahead)
    assert not Claims(tmp_path).take(KEY)


def test_the_steps_of_a_job_that_is_gone_are_free_at_once(tmp_path: Path) -> None:
    _lease(tmp_path, who="slurm job 7_1")
    driver = Claims(tmp_path)
    assert driver.bury("slurm job 7_2", "out of memory", blame=True) == []
    assert not Claims(tmp_path).take(KEY)
    assert driver.bury("slurm job 7_1", "out of memory", blame=True) == [KEY]
    assert driver.bury("slurm job 7_1", "out of memory", blame=True) == []
    taker = Claims(tmp_path)
    assert taker.take(KEY)
    assert taker.deaths(KEY) == (1, "out of memory")


def test_a_time_limit_is_not_held_against_a_step(tmp_path: Path) -> None:
    _lease(tmp_path, who="x", deaths=2)
    Claims(tmp_path).bury("x", "reached its time limit", blame=False)
    taker = Claims(tmp_path)
    assert taker.take(KEY)
    assert taker.deaths(KEY) == (2, "reached its time limit")


# --------------------------------------------------------------------------- what a scheduler makes of them


class _Here:
    """Two slots that commit at once."""

    def __init__(self, store: Store) -> None:
        self.store, self.done = store, list[str]()
        self.slots: list[Any] = [0, 1]

    def submit(self, slot: int, step: Step, kinds: Any) -> Any:
        from concurrent.futures import Future

        self.done.append(step.key)
        self.store.put(step.kind, step.key, save({"w": torch.zeros(2)}), {})
        future: Future[Answer] = Future()
        future.set_result(Answer("ok", seconds=0.1))
        return future

    def note(self, slot: int) -> str:
        return ""

    def close(self, now: bool = False) -> None:
        return None


class _Quiet:
    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def _chain() -> dict[str, Step]:
    """KEY, and a step that needs it."""
    other = "b" * 40
    return {KEY: Step(KEY, "merge", (), (), "{}"), other: Step(other, "merge", (), (("x", KEY),), "{}")}


def _scheduler(root: Path, attempt: str = "") -> tuple[Scheduler, _Here]:
    here = _Here(Store(root))
    return Scheduler(_chain(), here.store, here, History(root), _Quiet(), attempt=attempt), here


def test_a_step_that_ends_its_workers_is_given_up(tmp_path: Path) -> None:
    _lease(tmp_path, deaths=ATTEMPTS, ended="slurm job 3: out of memory")
    run, here = _scheduler(tmp_path, "now")
    outcome = run.run(run.steps, 0)
    assert here.done == []
    assert outcome.failed == {
        KEY: "WorkerDied: 3 workers in a row ended while running it; the last: slurm job 3: out of memory"
    }
    assert outcome.blocked["b" * 40].startswith("needs merge, which failed: WorkerDied")
    assert Claims(tmp_path).taken() == set()


@pytest.mark.parametrize(("attempt", "tried"), [("now", 0), ("later", 2), ("", 2)])
def test_what_failed_in_this_attempt_is_not_tried_by_the_next_worker(
    tmp_path: Path, attempt: str, tried: int
) -> None:
    Failures(tmp_path).note(Failure(KEY, "merge", "merge x", "ValueError: no", attempt="now"))
    run, here = _scheduler(tmp_path, attempt)
    outcome = run.run(run.steps, 0)
    assert len(here.done) == tried
    assert outcome.failed == ({} if tried else {KEY: "ValueError: no"})
    assert (Failures(tmp_path).read(KEY) is None) is bool(tried)
