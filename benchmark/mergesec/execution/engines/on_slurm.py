"""Slurm, through submitit: an array of long-lived workers that share the steps of the plan by leases in the store.

The driver submits workers, looks at store and queue, and submits again what ended early; it never waits for a job's
result. It may die: jobs go on, and the same command finds them by the run's name.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
import sys
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergesec.errors import UsageError
from mergesec.execution.claims import Claims
from mergesec.execution.engines import orders
from mergesec.execution.engines.array_worker import name_of
from mergesec.execution.engines.engine import Assignment, Ways
from mergesec.execution.engines.local import make_slots
from mergesec.execution.engines.orders import Order
from mergesec.execution.engines.queues import BLAMED, ENDED, Queue, Silent, make_queue, run_name
from mergesec.execution.engines.worker import Answer
from mergesec.execution.failures import Failure
from mergesec.execution.interrupts import EAR
from mergesec.execution.scheduler import History, Outcome, Scheduler
from mergesec.execution.store import CHECKPOINTS, Store
from mergesec.files import check_writable
from mergesec.planning.engines import EngineSpec, seconds_of
from mergesec.planning.plan import Step

WORKERS = 4
TIME_LIMIT = "4h"
ROUNDS = 3
"""How many times over all workers may end without anything done before the run is given up."""
PAUSE = 1.0
"""Seconds between two looks at the store, and at least ten times what a look takes."""
LOOKS = {"slurm": 5.0, "local": 1.0}
"""Seconds between two looks at the queue."""
STARTING = 60.0
"""Seconds that another driver of the run has to give its orders."""
JOBS = "MERGESEC_JOBS"


class SlurmEngine:
    """Checks what can be checked before there is work."""

    def __init__(self, spec: EngineSpec, ways: Ways) -> None:
        self._spec, self._ways = spec, ways
        if not ways.device.strip().startswith("cuda"):
            make_slots(ways.device, ways.jobs)  # GPUs are the workers' to find, the rest is wrong here too
        if spec.gpus is not None and spec.gpus != int(spec.gpus):
            raise UsageError("--gpus", f"Slurm gives whole GPUs, got {spec.gpus:g}; --jobs N shares one")

    def run(self, work: Assignment) -> Outcome:
        folder = jobs_folder(work.store.root) / run_name(work.grid, _digest(work.steps))
        check_writable(folder, JOBS)
        folder.chmod(0o700)  # submitit's letters are pickled, so nobody else may write them
        minutes = seconds_of(self._spec.time_limit or TIME_LIMIT) / 60
        queue = make_queue(folder, _options(self._spec), minutes)
        keeper = Keeper(folder, queue, self._spec.workers or WORKERS, work.store)
        attempt = keeper.begin(secrets.token_hex(8))
        order = Order(
            attempt, work.place, self._ways.device, _jobs(self._spec, self._ways, work.place.threads), self._ways.timeout,
            work.frees,
        )  # fmt: skip
        orders.write_order(folder, order, work.steps, work.wanted)
        watch = Watch(
            work.steps, work.store, _Nobody(queue), History(work.store.root), work.reporter, work.goals,
            attempt=attempt, keeper=keeper, frees=work.frees,
        )  # fmt: skip
        try:
            return watch.run(work.wanted, work.cached)
        finally:
            keeper.end()

    def close(self) -> None:
        return None


def jobs_folder(store: Path) -> Path:
    """Where orders and submitit's files of runs lie: ``$MERGESEC_JOBS``, else beside the store, never in it."""
    given = os.environ.get(JOBS)
    home = store.resolve()
    return Path(given).resolve() if given else home.with_name(f"{home.name}.jobs")


def _digest(steps: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(steps).encode()).hexdigest()


def _options(spec: EngineSpec) -> dict[str, Any]:
    """What is asked of sbatch, by submitit's names; what submitit has no name for is handed on."""
    from submitit import SlurmExecutor

    known = SlurmExecutor._valid_parameters()
    told: dict[str, Any] = {"cpus_per_task": math.ceil(spec.cpus or 1)}
    if spec.gpus:
        told["gpus_per_node"] = int(spec.gpus)
    if spec.memory:
        told["mem"] = f"{math.ceil(spec.memory * 1000)}MB"
    more: dict[str, Any] = {}
    for name, value in spec.slurm.items():
        number = int(value) if isinstance(value, str) and value.isdigit() else value
        if name in (*known, "cluster"):
            told[name] = number
        else:
            more[name.replace("_", "-")] = value
    return told | ({"additional_parameters": more} if more else {})


def _jobs(spec: EngineSpec, ways: Ways, threads: int) -> int | None:
    """Steps at once in a worker: as many as its cores have room for, or one for each GPU."""
    if ways.jobs is not None or spec.gpus:
        return ways.jobs
    return max(1, int((spec.cpus or 1) // threads))


class _Nobody:
    """The driver of an array does no step itself."""

    def __init__(self, queue: Queue) -> None:
        self.slots: list[Any] = []
        self._queue = queue

    def submit(self, slot: int, step: Step, kinds: Mapping[str, str]) -> Future[Answer]:
        raise RuntimeError("the driver of an array has no slots")

    def note(self, slot: int) -> str:
        return ""

    def close(self, now: bool = False) -> None:
        if now:
            self._queue.cancel()


class Stalled(RuntimeError):
    """Workers end without getting anything done."""


class Keeper:
    """Keeps as many workers in the queue as there is work for. Of two drivers of a run one does, the other looks on."""

    def __init__(self, folder: Path, queue: Queue, workers: int, store: Store) -> None:
        self._folder, self._queue, self._workers = folder, queue, workers
        self._claims = Claims(store.root, f"driver {os.getpid()}")
        self._key = hashlib.sha256(folder.name.encode()).hexdigest()[:40]
        self._checkpoints = store.root / CHECKPOINTS
        self._told: set[str] = set()
        """Jobs whose end was heard."""
        self._last = ""
        self._sign: Any = None
        self._spent = 0
        """Workers submitted since something was done last."""
        self._looked = 0.0
        self._silent = ""
        self.alive = 0

    def begin(self, fresh: str) -> str:
        """The attempt: that of the jobs that are still in the queue, else a new one, before which all leases of
        the dead are removed."""
        mine = self._claims.take(self._key)
        try:
            states = self._queue.states()
        except Silent as error:
            raise UsageError("--engine", f"the queue does not answer ({error})") from None
        alive = [job for job, state in states.items() if state not in ENDED]
        self.alive = len(alive)
        for job in states.keys() - set(alive):
            self._told.add(job)
            self._claims.bury(name_of(self._queue.name, job), ENDED[states[job]], states[job] in BLAMED)
        if not mine:
            _wait_for_orders(self._folder)
        if (alive or not mine) and orders.given(self._folder):
            _say(f"{len(alive)} jobs of this run are in the queue already: none is submitted twice")
            attempt = orders.read_order(self._folder).attempt
        else:
            self._claims.sweep()
            attempt = fresh
        if mine:
            orders.may_go_on(self._folder)
        if self._queue.name == "local":
            _say("no Slurm here: submitit's local executor runs the workers on this machine")
        return attempt

    def end(self) -> None:
        self._claims.release_all()

    def stop(self) -> None:
        """Workers finish what they are at; those that wait are taken out of the queue."""
        orders.stop(self._folder)
        self._queue.cancel(waiting=True)

    def tend(self, left: int) -> None:
        """Look at the queue, tell of jobs that ended, submit what is missing. Stalled if that has no use."""
        now = time.monotonic()
        if now - self._looked < LOOKS[self._queue.name] or not self._claims.take_or_hold(self._key):
            return
        self._looked = now
        try:
            states = self._queue.states()
        except Silent as error:
            if self._silent != str(error):
                _say(f"the queue does not answer ({error}); waiting")
            self._silent = str(error)
            return
        self._silent = ""
        for job, state in sorted(states.items()):
            if state in ENDED and job not in self._told:
                self._hear(job, state)
        self.alive = sum(state not in ENDED for state in states.values())
        if (missing := min(self._workers, left) - self.alive) > 0 and not orders.stopped(self._folder):
            self._more(missing, left)

    def _hear(self, job: str, state: str) -> None:
        """A job is no more: its steps are free."""
        self._told.add(job)
        name = name_of(self._queue.name, job)
        freed = self._claims.bury(name, f"{name}: {ENDED[state]} ({state})", state in BLAMED)
        if state != "COMPLETED" or freed:
            words = self._queue.last_words(job) if state in BLAMED else ""
            self._last = f"{name}: {ENDED[state]} ({state})" + (f": {words}" if words else "")
            _say(f"{self._last}; {len(freed)} steps of it are taken up again")

    def _more(self, missing: int, left: int) -> None:
        sign = (left, frozenset(path.name for path in self._checkpoints.glob("*")))
        if sign != self._sign:
            self._sign, self._spent = sign, 0
        if self._spent >= ROUNDS * min(self._workers, left):
            raise Stalled(
                f"{self._spent} workers in a row ended with nothing done; {self._last or 'all by themselves'}"
            )
        self._spent += missing
        ids = self._queue.submit(missing)
        self.alive += missing
        _say(
            f"submitted {missing} {'workers' if missing > 1 else 'worker'}: {', '.join(ids[:3])}"
            + ", ..." * (missing > 3)
        )


def _wait_for_orders(folder: Path) -> None:
    """The driver that is there may be just starting."""
    end = time.monotonic() + STARTING
    while not orders.given(folder):
        if time.monotonic() > end:
            raise UsageError("--engine", "another driver of this run is starting; try again in a while")
        time.sleep(PAUSE)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass
class Watch(Scheduler):
    """A scheduler that does nothing itself: it looks at what others commit, and at what they fail."""

    keeper: Keeper | None = None

    def _drive(self) -> None:
        assert self.keeper is not None
        keeper = self.keeper
        while self._remaining or (self.outcome.interrupted and keeper.alive):
            pressed = EAR.heard
            if pressed > 1:
                raise KeyboardInterrupt
            if pressed and not self.outcome.interrupted:
                self.outcome.interrupted = True
                keeper.stop()
                self.reporter.stopping(self.outcome.done, self._under_way())
            started = time.monotonic()
            self._collect()
            try:
                keeper.tend(len(self._remaining))
            except Stalled as error:
                self._give_up(str(error))
                return
            if self.outcome.interrupted and not keeper.alive:
                return
            self.reporter.running(self._under_way())
            pause = max(PAUSE, 10 * (time.monotonic() - started)) if self._remaining else 0.0
            EAR.rest(lambda pause=pause: time.sleep(pause), pressed)  # type: ignore[misc]

    def _under_way(self) -> list[str]:
        return [self.steps[key].label for key in self.claims.elsewhere() if key in self.steps]

    def _collect(self) -> None:
        """What was committed since the last look, and what failed for good."""
        known = self.store.keys(spent=self.frees) & self._remaining
        for key in sorted(known, key=self._order.__getitem__):
            self.outcome.done += 1
            self._found(self.steps[key])
        for failure in self.failures.of(self._remaining):
            if failure.attempt == self.attempt and failure.key in self._remaining:
                self._fail(self.steps[failure.key], failure)

    def _give_up(self, reason: str) -> None:
        for key in sorted(self._remaining, key=self._order.__getitem__):
            if key in self._remaining:  # else blocked by one before it
                step = self.steps[key]
                failure = Failure(key, step.kind, step.label, f"WorkersEnded: {reason}")
                self.failures.note(failure)
                self._fail(step, failure)
