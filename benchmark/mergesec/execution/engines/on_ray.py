"""Ray: steps as tasks of a cluster that runs, or of one started on this machine.

A task hands its step to a worker process of its own node, the same as the local engine's, which lives as long as
Ray keeps the task's process. Only answers travel; results go into the store, which all nodes must see.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from mergesec.errors import UsageError
from mergesec.execution.engines.engine import Assignment, Ways, drive
from mergesec.execution.engines.local import Seat, make_slots
from mergesec.execution.engines.worker import Answer, Slot, Workplace
from mergesec.execution.failures import explain
from mergesec.execution.scheduler import Outcome
from mergesec.planning.engines import EngineSpec
from mergesec.planning.plan import Step

GB = 1e9
_PATIENCE = 5.0
"""Seconds within which a cluster's door must open."""


class Needs(NamedTuple):
    """What a step takes of a node."""

    cpus: float
    gpus: float
    memory: float
    """Bytes; 0 where nothing was said."""

    def fit(self, resources: Mapping[str, float]) -> int:
        """How many steps a node has room for."""
        rooms = [resources.get(name, 0.0) / need for name, need in self._named() if need]
        return int(min(rooms) + 1e-9) if rooms else 0

    def _named(self) -> tuple[tuple[str, float], ...]:
        return (("CPU", self.cpus), ("GPU", self.gpus), ("memory", self.memory))

    def __str__(self) -> str:
        told = (f"{self.cpus:g} CPU", f"{self.gpus:g} GPU", f"{self.memory / GB:g} GB of memory")
        return ", ".join(words for words, (_, need) in zip(told, self._named(), strict=True) if need)


class RayEngine:
    """Connects, or starts a cluster; ``UsageError`` for an address where there is none."""

    def __init__(self, spec: EngineSpec, ways: Ways) -> None:
        self._spec, self._ways = spec, ways
        self._address = spec.address or os.environ.get("RAY_ADDRESS") or "local"
        self._own = False
        self._needs = Needs(0, 0, 0)
        _knock(self._address)

    def run(self, work: Assignment) -> Outcome:
        import ray

        if not ray.is_initialized():  # not before there is work: it takes seconds
            _connect(self._address, self._ways)
            self._own = True
        self._needs = _needs(self._spec, self._ways, ray.cluster_resources())
        slots = min(self._room(), max(1, len(work.wanted)))
        return drive(work, RayExecutor(slots, self._needs, work.place, self._ways.timeout))

    def _room(self) -> int:
        """Steps at once: what was asked for, or what the nodes have room for now."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = sum(map(self._needs.fit, nodes))
        if not room and not self._spec.workers:
            field = "--gpus" if self._needs.gpus and not any("GPU" in node for node in nodes) else "--engine"
            raise UsageError(
                field,
                f"no node of the Ray cluster has {self._needs}; give --workers N if nodes are started when work waits",
            )
        return self._spec.workers or room

    def close(self) -> None:
        import ray

        if self._own:
            ray.shutdown()


def _connect(address: str, ways: Ways) -> None:
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    own: dict[str, Any] = {}
    if address == "local":
        os.environ.setdefault("RAY_worker_niceness", "0")  # else workers give way to whatever else runs here
        own = {"num_cpus": ways.jobs or len(make_slots("cpu", None)), "include_dashboard": False}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        where = "--address" if address != "local" else "--engine"
        raise UsageError(where, f"no Ray cluster at {address!r} ({_short(error)})") from None


def _knock(address: str) -> None:
    """UsageError unless somebody listens there: Ray itself waits long for a door that is not there."""
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()
    except (OSError, ValueError, OverflowError) as error:
        hint = "; write host:port, as `ray start` tells it" if not (host and port.isdigit()) else ""
        raise UsageError("--address", f"no Ray cluster at {address!r} ({_short(error)}){hint}") from None


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _needs(spec: EngineSpec, ways: Ways, resources: Mapping[str, float]) -> Needs:
    """A core and, where there are GPUs, one of them, unless something else was asked for."""
    device, _, each = ways.device.partition("*")
    device = device.partition(":")[0].strip()
    if device not in ("auto", "cpu", "cuda"):
        make_slots(ways.device, None)  # says what is wrong with it
    share = 1 / int(each) if each.strip().isdigit() and int(each) else 1.0
    gpus = spec.gpus if spec.gpus is not None else share * (resources.get("GPU", 0) > 0)
    if device == "cpu":
        gpus = 0.0
    if device == "cuda" and not gpus:
        raise UsageError("--device", "cuda was asked for, but the Ray cluster has no GPU; try --device cpu")
    return Needs(spec.cpus or 1.0, gpus, (spec.memory or 0.0) * GB)


class RayExecutor:
    """A task for each step, as many at once as there are slots."""

    def __init__(self, slots: int, needs: Needs, place: Workplace, timeout: float | None) -> None:
        import ray

        self.slots: list[Any] = list(range(slots))
        # tried again by the scheduler, which knows what a step's failure means
        self._do = ray.remote(
            num_cpus=needs.cpus, num_gpus=needs.gpus, memory=needs.memory or None, max_retries=0
        )(do)
        self._told = ray.put(
            (place, timeout, {k: v for k, v in os.environ.items() if k.startswith("MERGESEC_")})
        )
        self._refs: dict[int, Any] = {}

    def submit(self, slot: int, step: Step, kinds: Mapping[str, str]) -> Future[Answer]:
        told: Future[Answer] = Future()
        ref = self._refs[slot] = self._do.remote(step, dict(kinds), self._told)

        def tell(future: Future[Any]) -> None:
            told.set_result(_answer(future))

        ref.future().add_done_callback(tell)
        return told

    def note(self, slot: int) -> str:
        return ""

    def close(self, now: bool = False) -> None:
        import ray

        for ref in self._refs.values() if now else ():
            with contextlib.suppress(Exception):
                ray.cancel(ref, force=True)


def _answer(future: Future[Any]) -> Answer:
    """A task's answer; one that never came tells what became of its process or node."""
    from ray import exceptions

    try:
        answer: Answer = future.result()
        return answer
    except exceptions.RayTaskError as error:
        return Answer("error", *explain(error))
    except exceptions.RayError as error:
        lost = {
            "OutOfMemoryError": "Ray's memory monitor ended the worker: out of memory",
            "NodeDiedError": "its node was lost",
            "WorkerCrashedError": "the worker ended while running it",
        }
        name = type(error).__name__
        return Answer("died", f"WorkerDied: {lost.get(name, _short(error))} (Ray: {name})")
    except Exception as error:
        return Answer("error", *explain(error))


# --------------------------------------------------------------------------- on a node

_SEATS: dict[Slot, Seat] = {}
"""The worker beside this process: one, since Ray gives a task's process to one step at a time."""


def do(step: Step, kinds: dict[str, str], told: tuple[Workplace, float | None, dict[str, str]]) -> Answer:
    """A task: have the worker beside this process run a step on what Ray reserved for it."""
    import ray

    place, timeout, environment = told
    os.environ.update(environment)
    if not Path(place.store).is_dir():
        return Answer("error", f"StoreMissing: {socket.gethostname()} does not see the store {place.store!r}")
    gpus = ",".join(map(str, ray.get_gpu_ids()))
    return _seat(Slot("cuda", gpus) if gpus else Slot("cpu"), place).ask(step, kinds, timeout)


def _seat(slot: Slot, place: Workplace) -> Seat:
    seat = _SEATS.get(slot)
    if seat is None or seat.place != place:
        for other in _SEATS.values():
            other.close()
        _SEATS.clear()
        seat = _SEATS[slot] = Seat(slot, place)
    return seat
