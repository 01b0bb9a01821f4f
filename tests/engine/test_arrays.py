"""An array of workers: what it is told, how it is kept up, and what becomes of it when jobs or the driver die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import at_naps, comparable, napping, wait_for
from safetensors.torch import save

from mergesec.errors import UsageError
from mergesec.execution.claims import Claims
from mergesec.execution.engines import on_slurm, orders, queues
from mergesec.execution.engines.engine import Ways
from mergesec.execution.engines.on_slurm import Keeper, SlurmEngine, Stalled, Watch, jobs_folder
from mergesec.execution.engines.orders import Order, needed_for, packed, read_order, read_steps, write_order
from mergesec.execution.engines.queues import ENDED, LocalQueue, Silent, make_queue, run_name
from mergesec.execution.engines.worker import Workplace
from mergesec.execution.failures import Failure, Failures
from mergesec.execution.guests.containment import Walls
from mergesec.execution.scheduler import History
from mergesec.execution.session import open_session
from mergesec.execution.store import Store
from mergesec.planning.engines import EngineSpec
from mergesec.planning.plan import Plan, Step

# --------------------------------------------------------------------------- what workers are told


@pytest.fixture(scope="module")
def plan(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    home = tmp_path_factory.mktemp("plan")
    raw = {
        "name": "g", "suite": {"backbone": "micro/vit", "tasks": ["micro/bars", "micro/blobs"]},
        "axes": {
            "merging": ["ties", {"name": "task_arithmetic", "scaling": "tuned", "grid": [0.1, 0.3]}],
            "attacks": ["none", "realign", "badnets"], "defenses": ["none", "params", "clp"],
        },
    }  # fmt: skip
    (home / "g.yaml").write_text(json.dumps(raw))
    return open_session(str(home / "g.yaml"), (), (str(micro),), store=home / "store").plan


PLACE = Workplace("store", ("a.py",), None, 2, True, Walls(("code",), ("data", "more")))


def test_an_order_comes_back_as_it_was_given(tmp_path: Path, plan: Plan) -> None:
    order = Order("now", PLACE, "cuda", None, 7.5)
    write_order(tmp_path, order, plan.steps, list(plan.steps)[-3:])
    assert read_order(tmp_path) == order
    bare = replace(order, place=replace(PLACE, walls=None), jobs=3)
    write_order(tmp_path, bare, plan.steps, plan.steps)
    assert read_order(tmp_path) == bare
    steps, wanted = read_steps(tmp_path)
    assert list(steps.items()) == list(plan.steps.items())
    for key, step in steps.items():  # refs are equal by their text alone
        assert [asdict(ref) for _, ref in step.components] == [
            asdict(r) for _, r in plan.steps[key].components
        ]
    assert wanted == list(plan.steps)


def test_workers_are_told_of_all_that_the_wanted_steps_rest_on(plan: Plan) -> None:
    last = next(key for key, step in reversed(plan.steps.items()) if step.kind == "evaluate")
    found = {step.key for step in needed_for(plan.steps, [last])}
    assert last in found
    assert len(found) < len(plan.steps)
    assert all(k in found for key in found for _, k in plan.steps[key].inputs)


def test_a_component_is_written_once(plan: Plan) -> None:
    told = packed(plan.steps.values(), plan.steps)
    refs = {ref.text for step in plan.steps.values() for _, ref in step.components}
    assert len(told["refs"]) == len(refs)
    assert len(json.dumps(told)) < 400 * len(plan.steps)


# --------------------------------------------------------------------------- a queue that is only played


class _Played:
    """A queue whose jobs are in the state that a test says."""

    name = "slurm"

    def __init__(self) -> None:
        self.jobs: dict[str, str] = {}
        self.arrays: list[int] = []
        self.dumb = False
        self.calls: list[bool] = []

    def submit(self, number: int) -> list[str]:
        self.arrays.append(number)
        ids = [f"{len(self.arrays)}_{n}" for n in range(number)]
        self.jobs |= dict.fromkeys(ids, "PENDING")
        return ids

    def states(self) -> dict[str, str]:
        if self.dumb:
            raise Silent("squeue: down")
        return dict(self.jobs)

    def cancel(self, waiting: bool = False) -> None:
        self.calls.append(waiting)

    def last_words(self, job: str) -> str:
        return "Killed"


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Keeper, _Played]]:
    monkeypatch.setitem(on_slurm.LOOKS, "slurm", 0.0)
    queue = _Played()

    def keeper(workers: int = 2) -> tuple[Keeper, _Played]:
        return Keeper(tmp_path / "run", queue, workers, Store(tmp_path / "store")), queue

    return keeper


def test_there_are_as_many_workers_as_asked_for_and_no_more_than_steps(played: Any) -> None:
    keeper, queue = played(4)
    assert keeper.begin("now") == "now"
    keeper.tend(3)
    keeper.tend(3)
    assert queue.arrays == [3]
    queue.jobs = {"1_0": "RUNNING", "1_1": "COMPLETED", "1_2": "COMPLETING"}
    keeper.tend(1)
    assert queue.arrays == [3]
    queue.jobs = {"1_0": "COMPLETED", "1_1": "COMPLETED", "1_2": "COMPLETED"}
    keeper.tend(1)
    assert queue.arrays == [3, 1]
    assert keeper.alive == 1


@pytest.mark.parametrize("state", sorted(set(ENDED) - {"COMPLETED"}))
def test_how_a_job_ended_is_told_and_its_steps_are_free(
    played: Any, state: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keeper, queue = played(1)
    keeper.begin("now")
    keeper.tend(5)
    worker = Claims(tmp_path / "store", "slurm job 1_0")
    assert worker.take("c" * 40)
    queue.jobs["1_0"] = state
    keeper.tend(5)
    said = capsys.readouterr().err
    assert f"slurm job 1_0: {ENDED[state]} ({state})" in said
    assert "1 steps of it are taken up again" in said
    assert queue.arrays == [1, 1]
    heir = Claims(tmp_path / "store")
    assert heir.take("c" * 40)
    deaths, last = heir.deaths("c" * 40)
    assert deaths == (state in ("FAILED", "OUT_OF_MEMORY", "UNKNOWN"))
    assert state in last


def test_workers_that_get_nothing_done_are_not_replaced_for_ever(played: Any) -> None:
    keeper, queue = played(2)
    keeper.begin("now")
    for _ in range(3):
        keeper.tend(9)
        queue.jobs = dict.fromkeys(queue.jobs, "FAILED")
    with pytest.raises(Stalled, match=r"6 workers in a row .* slurm job 3_1: failed \(FAILED\): Killed"):
        keeper.tend(9)
    assert queue.arrays == [2, 2, 2]


def test_a_checkpoint_is_something_done(played: Any, tmp_path: Path) -> None:
    keeper, queue = played(1)
    keeper.begin("now")
    for number in range(5):
        keeper.tend(1)
        Store(tmp_path / "store").keep("d" * 40, 0, bytes([number]))
        queue.jobs = dict.fromkeys(queue.jobs, "TIMEOUT")
    assert queue.arrays == [1] * 5


def test_a_queue_that_does_not_answer_is_waited_for(played: Any, capsys: pytest.CaptureFixture[str]) -> None:
    keeper, queue = played(1)
    keeper.begin("now")
    keeper.tend(2)
    queue.dumb = True
    keeper.tend(2)
    keeper.tend(2)
    assert capsys.readouterr().err.count("squeue: down") == 1
    queue.dumb = False
    keeper.tend(2)
    assert queue.arrays == [1]


def test_a_driver_that_comes_again_goes_on_with_its_jobs(played: Any, tmp_path: Path) -> None:
    keeper, queue = played(2)
    attempt = keeper.begin("first")
    write_order(tmp_path / "run", Order(attempt, PLACE, "cpu", 1, None), {}, [])
    keeper.tend(9)
    second, _ = played(2)
    assert second.begin("second") == "first"  # the first is alive, and this one only looks on
    second.tend(9)
    keeper.end()
    second.tend(9)  # now it is the one that submits, and finds both jobs
    assert queue.arrays == [2]
    queue.jobs["1_0"] = "NODE_FAIL"
    second.tend(9)
    assert queue.arrays == [2, 1]
    second.end()
    queue.jobs = dict.fromkeys(queue.jobs, "COMPLETED")
    third, _ = played(2)
    assert third.begin("third") == "third"


def test_after_a_stop_nobody_is_submitted(played: Any, tmp_path: Path) -> None:
    keeper, queue = played(2)
    keeper.begin("now")
    keeper.tend(9)
    keeper.stop()
    assert queue.calls == [True]
    queue.jobs = dict.fromkeys(queue.jobs, "COMPLETED")
    keeper.tend(9)
    assert queue.arrays == [2]
    assert keeper.alive == 0
    orders.may_go_on(tmp_path / "run")
    assert not orders.stopped(tmp_path / "run")


def test_a_second_driver_waits_for_the_orders_of_the_first(
    played: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_slurm, "PAUSE", 0.01)
    monkeypatch.setattr(on_slurm, "STARTING", 0.05)
    first, _ = played()
    first.begin("first")
    second, _ = played()
    with pytest.raises(UsageError, match="another driver of this run is starting"):
        second.begin("second")


# --------------------------------------------------------------------------- a driver that looks on


class _Worker(threading.Thread):
    """Commits what it is told to, and fails the rest."""

    def __init__(self, store: Store, keys: dict[str, bool], attempt: str) -> None:
        super().__init__()
        self.store, self.keys, self.attempt = store, keys, attempt

    def run(self) -> None:
        for key, good in self.keys.items():
            time.sleep(0.05)
            if good:
                self.store.put("merge", key, save({"w": torch.zeros(1)}), {})
            else:
                Failures(self.store.root).note(
                    Failure(key, "merge", "merge x", "ValueError: no", "", self.attempt)
                )


class _Heard:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.ends: list[str] = []
        self.stops = 0

    def start(self, total: int, cached: int, reached: Any) -> None:
        assert (total, cached) == (4, 0)

    def running(self, labels: Any) -> None:
        list(labels)

    def finished(self, step: Step, answer: Any, reached: Any) -> None:
        self.ends.append(f"{step.key[0]} {answer.status}")

    def stopping(self, done: int, running: list[str]) -> None:
        self.stops += 1


@pytest.fixture
def watch(played: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Watch, _Played, _Heard]:
    """Four steps, the last two of which need the second; a driver of two workers."""
    monkeypatch.setattr(on_slurm, "PAUSE", 0.01)
    a, b, c, d = (letter * 40 for letter in "abcd")
    needs: dict[str, tuple[tuple[str, str], ...]] = {a: (), b: (), c: (("x", b),), d: (("x", c),)}
    steps = {key: Step(key, "merge", (), inputs, "{}") for key, inputs in needs.items()}
    keeper, queue = played()
    keeper.begin("now")
    store, heard = Store(tmp_path / "store"), _Heard()
    nobody = on_slurm._Nobody(queue)
    found = Watch(steps, store, nobody, History(store.root), heard, [{a}, {d}], attempt="now", keeper=keeper)
    store.root.mkdir(exist_ok=True)
    return found, queue, heard


def test_a_run_is_settled_from_the_store_and_from_failures(watch: tuple[Watch, _Played, _Heard]) -> None:
    driver, queue, heard = watch
    worker = _Worker(driver.store, {"a" * 40: True, "b" * 40: False}, "now")
    worker.start()
    outcome = driver.run(driver.steps, 0)
    worker.join()
    assert outcome.done == 1
    assert outcome.failed == {"b" * 40: "ValueError: no"}
    assert sorted(outcome.blocked) == ["c" * 40, "d" * 40]
    assert heard.ends == ["a ok", "b error"]
    assert queue.arrays == [2]


def test_an_older_attempts_failure_is_not_this_ones(watch: tuple[Watch, _Played, _Heard]) -> None:
    driver, _, _ = watch
    Failures(driver.store.root).note(Failure("b" * 40, "merge", "merge x", "ValueError: no", "", "before"))
    worker = _Worker(driver.store, {letter * 40: True for letter in "abcd"}, "now")
    worker.start()
    outcome = driver.run(driver.steps, 0)
    worker.join()
    assert (outcome.done, outcome.failed) == (4, {})


def test_after_ctrl_c_the_driver_waits_for_its_jobs_and_leaves(watch: tuple[Watch, _Played, _Heard]) -> None:
    driver, queue, heard = watch

    def press() -> None:
        wait_for(lambda: queue.arrays)
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: queue.calls)
        queue.jobs = dict.fromkeys(queue.jobs, "COMPLETED")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    presser = threading.Thread(target=press)
    presser.start()
    try:
        outcome = driver.run(driver.steps, 0)
    finally:
        presser.join()
        signal.signal(signal.SIGINT, before)
    assert outcome.interrupted
    assert (heard.stops, queue.calls, queue.arrays) == (1, [True], [2])


def test_if_workers_get_nowhere_what_is_ready_failed_and_the_rest_is_blocked(
    watch: tuple[Watch, _Played, _Heard], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, queue, _ = watch
    monkeypatch.setattr(queue, "states", lambda: dict.fromkeys(queue.jobs, "FAILED"))
    outcome = driver.run(driver.steps, 0)
    assert sorted(outcome.failed) == ["a" * 40, "b" * 40]
    assert sorted(outcome.blocked) == ["c" * 40, "d" * 40]
    assert outcome.failed["a" * 40].startswith(
        "WorkersEnded: 6 workers in a row ended with nothing done; slurm job"
    )
    assert Failures(driver.store.root).read("a" * 40) is not None


# --------------------------------------------------------------------------- Slurm's own words


SQUEUE = """12_0|RUNNING
12_1|PENDING
13|CANCELLED
"""


def _program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_states_come_from_the_queue_and_of_old_jobs_from_the_accounts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    _program(tmp_path, "sbatch", "exit 1")
    _program(tmp_path, "squeue", f"printf '{SQUEUE}'; echo \"$@\" >> {tmp_path}/asked")
    (tmp_path / "array.json").write_text(
        json.dumps({"queue": "slurm", "jobs": {"12_0": 1, "11_4": 1, "10_0": 1}})
    )
    queue = make_queue(tmp_path, {}, 60)
    seen = {"12_0": "RUNNING", "12_1": "PENDING", "13": "CANCELLED"}
    assert queue.states() == {**seen, "11_4": "UNKNOWN", "10_0": "UNKNOWN"}
    _program(tmp_path, "sacct", "printf '11_4|CANCELLED by 0\\n10_0|OUT_OF_ME+\\n'")
    assert queue.states() == {**seen, "11_4": "CANCELLED", "10_0": "OUT_OF_ME"}
    assert f"--name=mergesec-{tmp_path.name}" in (tmp_path / "asked").read_text()
    _program(tmp_path, "squeue", "echo no controller >&2; exit 1")
    with pytest.raises(Silent, match="no controller"):
        queue.states()


def test_a_local_jobs_end_is_told_apart(tmp_path: Path) -> None:
    begun = {"born": "never", "until": time.time() + 60}
    jobs = {str(10**7 + n): dict(begun) for n in range(4)}
    killed, ended, late, cancelled = jobs
    jobs[late]["until"] = time.time() - 1
    jobs[cancelled]["cancelled"] = True
    jobs[str(os.getpid())] = {"born": queues.birth(os.getpid()), "until": 0}
    (tmp_path / "array.json").write_text(json.dumps({"queue": "local", "jobs": jobs}))
    (tmp_path / "ended").mkdir()
    (tmp_path / "ended" / f"{ended}.txt").touch()
    assert LocalQueue(tmp_path, {}, 1).states() == {
        killed: "FAILED", ended: "COMPLETED", late: "TIMEOUT", cancelled: "CANCELLED", str(os.getpid()): "RUNNING",
    }  # fmt: skip


def test_options_become_sbatchs() -> None:
    pytest.importorskip("submitit", reason="needs pip install 'mergesec[slurm]'")
    spec = EngineSpec(
        name="slurm", cpus=1.5, gpus=2, memory=16,
        slurm={"partition": "gpu", "array_parallelism": "8", "licenses": "slot:1", "cluster": "local"},
    )  # fmt: skip
    assert on_slurm._options(spec) == {
        "cpus_per_task": 2, "gpus_per_node": 2, "mem": "16000MB", "partition": "gpu", "array_parallelism": 8,
        "cluster": "local", "additional_parameters": {"licenses": "slot:1"},
    }  # fmt: skip


def test_bad_options_are_named() -> None:
    with pytest.raises(UsageError, match=r"--gpus: Slurm gives whole GPUs, got 0.5"):
        SlurmEngine(EngineSpec(name="slurm", gpus=0.5), Ways())
    with pytest.raises(UsageError, match="--device"):
        SlurmEngine(EngineSpec(name="slurm"), Ways("gpu"))
    with pytest.raises(UsageError, match="cluster=moon; valid: slurm, local"):
        make_queue(Path(), {"cluster": "moon"}, 1)


def test_jobs_lie_beside_the_store_and_not_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MERGESEC_JOBS", raising=False)
    assert jobs_folder(tmp_path / "store") == tmp_path / "store.jobs"
    monkeypatch.setenv("MERGESEC_JOBS", str(tmp_path / "x"))
    assert jobs_folder(tmp_path / "store") == tmp_path / "x"
    assert run_name("a grid/of mine", "0123456789abcdef") == "a-grid-of-mine-0123456789ab"


# --------------------------------------------------------------------------- jobs that run


@pytest.fixture
def slurm(bench: Any) -> Any:
    pytest.importorskip("submitit", reason="needs pip install 'mergesec[slurm]'")
    return bench


def _jobs(bench: Any) -> list[str]:
    (record,) = (bench.home / "store.jobs").glob("*/array.json")
    return list(json.loads(record.read_text())["jobs"])


def _ordered(bench: Any) -> float:
    """When workers were given their orders."""
    return max((p.stat().st_mtime for p in (bench.home / "store.jobs").glob("*/order.json")), default=0.0)


def _shared_by_two_after_deaths(bench: Any, *options: str) -> tuple[str, list[str]]:
    """Two workers at a merge each; the driver is killed and started again, then a worker is; what the second driver
    said, and the jobs of the first."""
    arguments = [*napping(bench, "array", 3), "--engine", "slurm", "--workers", "2", *options]
    driver = bench.start("run", *arguments)
    wait_for(lambda: len(at_naps(bench.store)) == 2)
    driver.kill()
    driver.communicate()
    first, before = _ordered(bench), _jobs(bench)
    second = bench.start("run", *arguments)
    wait_for(lambda: _ordered(bench) > first)
    os.kill(at_naps(bench.store)[0]["process"], signal.SIGKILL)
    wait_for(lambda: len(_jobs(bench)) > len(before))
    (bench.home / "go").touch()
    out, err = second.communicate(timeout=200)
    assert second.returncode == 0, out + err
    assert "3 of 3 cells done" in out
    assert "2 jobs of this run are in the queue already: none is submitted twice" in err
    assert "failed (FAILED)" in err
    assert "1 steps of it are taken up again" in err
    assert not list(bench.store.rglob("*.pkl"))
    return err, before


def test_on_one_machine_a_killed_driver_finds_its_jobs_and_a_killed_job_is_replaced(slurm: Any) -> None:
    _, before = _shared_by_two_after_deaths(slurm, "--slurm", "cluster=local")
    assert len(before) == 2
    assert len(_jobs(slurm)) == 3
    here = comparable(slurm.results / "records" / "array")
    ran = slurm(
        "run", *napping(slurm, "array", 3), "--results", str(slurm.home / "plain")
    )  # from the store alone
    assert ran.code == 0
    assert comparable(slurm.home / "plain" / "records" / "array") == here


def test_a_time_limit_that_is_too_short_is_named_and_does_not_go_on_for_ever(slurm: Any) -> None:
    arguments = napping(slurm, "short", 1)
    ran = slurm(
        "run",
        *arguments,
        "--engine",
        "slurm",
        "--workers",
        "1",
        "--time-limit",
        "1s",
        "--slurm",
        "cluster=local",
    )
    assert ran.code == 1
    assert "reached its time limit (TIMEOUT)" in ran.err
    assert "WorkersEnded: 3 workers in a row ended with nothing done" in ran.err
    assert ran.err.count("submitted 1 worker") == 3


@pytest.fixture
def daemons(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Slurm's own daemons, unpacked and started here."""
    script = shared / "slurm" / "slurm_here.sh"
    if not script.is_file() or os.getuid():
        pytest.skip("Slurm's daemons need root and shared/slurm beside the development data")
    home = tmp_path / "slurm"
    with (tmp_path / "slurm.log").open("wb") as log:  # the daemons keep it open
        ran = subprocess.run(
            ["bash", str(script), "start", str(home)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False,
            env={**os.environ, "SLURM_HERE_PORT": str(20000 + os.getpid() % 20000)}, timeout=150,
        )  # fmt: skip
    if ran.returncode:
        subprocess.run(["bash", str(script), "stop", str(home)], check=False, capture_output=True)
        pytest.skip("Slurm's packages cannot be had here, or its daemons do not start")
    told = subprocess.run(
        ["bash", "-c", f". {home}/env.sh; echo $SLURM_CONF; echo $LD_LIBRARY_PATH; echo $PATH"],
        capture_output=True, text=True, check=True,
    ).stdout.split("\n")  # fmt: skip
    yield dict(zip(("SLURM_CONF", "LD_LIBRARY_PATH", "PATH"), told, strict=False))
    subprocess.run(["bash", str(script), "stop", str(home)], check=False, capture_output=True)


@pytest.mark.shared
def test_on_slurm_itself(slurm: Any, daemons: dict[str, str]) -> None:
    slurm.environment.update(daemons)
    err, before = _shared_by_two_after_deaths(slurm)
    assert sorted(job.partition("_")[2] for job in before) == ["0", "1"]
    assert "submitted 1 worker" in err
    assert len(_jobs(slurm)) == 3
