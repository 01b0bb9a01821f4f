"""What an engine is: it is handed the missing steps of one plan and sees to it that they run somewhere."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from mergesec.errors import UsageError
from mergesec.execution.engines.local import LocalExecutor, make_slots
from mergesec.execution.engines.worker import Slot, Workplace
from mergesec.execution.scheduler import Executor, History, Outcome, Reporter, Scheduler
from mergesec.execution.store import Store
from mergesec.planning.engines import EngineSpec
from mergesec.planning.plan import Step


class Ways(NamedTuple):
    """How a worker does steps, wherever it is."""

    device: str = "auto"
    jobs: int | None = None
    timeout: float | None = None
    """Seconds that one step may take."""


@dataclass(frozen=True)
class Assignment:
    """The steps to run, and all that a worker needs to know for it."""

    grid: str
    steps: Mapping[str, Step]
    """All of the plan, in the order of their making."""
    wanted: Mapping[str, Step]
    """What the store lacks of it."""
    goals: Sequence[Collection[str]]
    """Of each cell the keys of its evaluations."""
    store: Store
    place: Workplace
    reporter: Reporter
    frees: bool = False
    """Whether merges go once every step that was to read them is done."""

    @property
    def cached(self) -> int:
        return len(self.steps) - len(self.wanted)


class Engine(Protocol):
    """Runs steps somewhere. Results are in the store when it returns; nothing else comes back."""

    def run(self, work: Assignment) -> Outcome:
        """Run what is wanted, in an order that respects needs. Full if the disk is."""

    def close(self) -> None:
        """Let go of whatever outlives a run; called once, after the last."""


class LocalEngine:
    """Worker processes of this machine."""

    def __init__(self, ways: Ways) -> None:
        self._slots: list[Slot] = make_slots(ways.device, ways.jobs)
        self._timeout = ways.timeout

    def run(self, work: Assignment) -> Outcome:
        return drive(work, LocalExecutor(self._slots[: max(1, len(work.wanted))], work.place, self._timeout))

    def close(self) -> None:
        return None


def drive(work: Assignment, executor: Executor) -> Outcome:
    """Have an executor's slots do the steps from here, one after another."""
    scheduler = Scheduler(
        work.steps, work.store, executor, History(work.store.root), work.reporter, work.goals,
        frees=work.frees,
    )  # fmt: skip
    try:
        return scheduler.run(work.wanted, work.cached)
    finally:
        executor.close(now=scheduler.outcome.interrupted)


def make_engine(spec: EngineSpec, ways: Ways) -> Engine:
    """The engine that was asked for; UsageError for what it cannot be."""
    if spec.name == "ray":
        needed("ray", "ray")
        from mergesec.execution.engines.on_ray import RayEngine

        return RayEngine(spec, ways)
    if spec.name == "slurm":
        needed("submitit", "slurm")
        from mergesec.execution.engines.on_slurm import SlurmEngine

        return SlurmEngine(spec, ways)
    return LocalEngine(ways)


def needed(package: str, extra: str) -> None:
    """UsageError unless a package is installed."""
    if importlib.util.find_spec(package) is None:
        raise UsageError(
            "--engine", f"{extra} needs {package}, which is not installed: pip install 'mergesec[{extra}]'"
        )
