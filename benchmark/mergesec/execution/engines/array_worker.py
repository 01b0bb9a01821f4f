"""A worker of an array: takes ready steps of the plan until none is left, and shares them with the others by leases."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mergesec.execution.engines.local import LocalExecutor, make_slots
from mergesec.execution.engines.orders import read_order, read_steps, stopped
from mergesec.execution.engines.worker import Answer
from mergesec.execution.interrupts import EAR
from mergesec.execution.scheduler import History, Reached, Scheduler
from mergesec.execution.store import Store
from mergesec.files import write_atomic
from mergesec.planning.plan import Step

LOOK = 1.0
"""Seconds between two looks at whether to stop."""


class _Diary:
    """Tells the job's own log."""

    def start(self, total: int, cached: int, reached: Reached) -> None:
        print(f"{total} steps to share", flush=True)

    def running(self, labels: Iterable[str]) -> None:
        return None

    def finished(self, step: Step, answer: Answer, reached: Reached) -> None:
        if answer.seconds or answer.status != "ok":
            print(f"{step.label}: {answer.message or f'{answer.seconds:.1f} s'}", flush=True)

    def stopping(self, done: int, running: list[str]) -> None:
        print(f"stopping; still at {', '.join(running) or 'nothing'}", flush=True)


def name_of(cluster: str, job: str) -> str:
    """As whom a job claims steps, so that whoever reads the queue finds them."""
    return f"{cluster} job {job}"


def ending_file(folder: Path, job: str) -> Path:
    """Where a worker says that it came to its own end."""
    return folder / "ended" / f"{job}.txt"


def work(place: str) -> None:
    """The life of a job; ``place`` is the folder of its order."""
    from submitit import JobEnvironment

    job = JobEnvironment()
    folder = Path(place)
    # in the place of submitit's own answer, which is to submit the job again: that is the driver's business
    signal.signal(signal.SIGTERM, _drain)
    signal.signal(
        signal.SIGUSR2, signal.SIG_IGN
    )  # a warning, up to a minute early: checkpoints are there anyway
    parent = os.getppid() if job.cluster == "local" else None
    threading.Thread(target=_watch, args=(folder, parent), daemon=True).start()
    order = read_order(folder)
    steps, wanted = read_steps(folder)
    store = Store(Path(order.place.store))
    executor = LocalExecutor(make_slots(order.device, order.jobs), order.place, order.timeout)
    scheduler = Scheduler(
        steps, store, executor, History(store.root), _Diary(),
        who=name_of(job.cluster, job.job_id), attempt=order.attempt, frees=order.frees,
    )  # fmt: skip
    missing = {key: steps[key] for key in wanted if not store.has(steps[key].kind, key)}
    try:
        outcome = scheduler.run(missing, len(steps) - len(missing))
    finally:
        executor.close(now=True)
    word = "stopped" if outcome.interrupted else "finished"
    write_atomic(ending_file(folder, job.job_id), f"{word}, {outcome.done} steps\n".encode())


def _drain(signum: int, frame: Any) -> None:
    """Take no more steps; those under way go on as long as they may, and keep checkpoints."""
    EAR.heard = max(EAR.heard, 1)


def _watch(folder: Path, parent: int | None) -> None:
    """Stop when the driver says so; a job without a queue ends with its parent."""
    while True:
        time.sleep(LOOK)
        if parent is not None and os.getppid() != parent:
            os._exit(1)
        if stopped(folder):
            _drain(0, None)
