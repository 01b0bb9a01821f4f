"""A worker process: gets ready, answers one step after another, ends with its parent."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mergesec.execution.failures import explain
from mergesec.planning.plan import Step


@dataclass(frozen=True)
class Slot:
    """One place a step can run: ``cpu`` or a GPU index."""

    device: str
    gpu: str = ""


@dataclass(frozen=True)
class Workplace:
    """What a worker needs to know; never part of a key."""

    store: str
    plugins: tuple[str, ...]
    data_root: str | None
    threads: int


@dataclass(frozen=True)
class Answer:
    """What came of a step. ``status``: ok, error, died, corrupt (``key`` names the input) or full.

    ``message`` is one line; ``trace`` an error's whole traceback.
    """

    status: str
    message: str = ""
    trace: str = ""
    key: str = ""
    seconds: float = 0.0
    peak_mb: float = 0.0
    bytes: int = 0


WHERE = signal.SIGUSR1
"""Asks a worker that does not answer for its stacks."""
_PLACE: tuple[Slot, Workplace] | None = None


_BENCH: Any = None


def serve(pipe: Connection, words: Connection, slot: Slot, place: Workplace, parent: int) -> None:
    """A worker's life: get ready, say so, answer questions until the pipe ends.

    Its stacks go into ``words`` if it crashes, or is asked for them by the signal ``WHERE``.
    """
    faulthandler.enable(words.fileno())
    faulthandler.register(WHERE, words.fileno())
    _prepare(slot, place, parent)
    with contextlib.suppress(EOFError, OSError):
        pipe.send(None)
        with contextlib.suppress(Exception):
            _bench().report = pipe.send
        while True:
            pipe.send(_work(*pipe.recv()))


def _prepare(slot: Slot, place: Workplace, parent: int) -> None:
    """Before torch loads: device, threads; Ctrl-C is the parent's; leave when the parent is gone."""
    global _PLACE
    _PLACE = (slot, place)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["CUDA_VISIBLE_DEVICES"] = slot.gpu
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(place.threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    with contextlib.suppress(Exception):  # told again, and then reported, at the first step
        _bench()  # loading torch must not count against the first step's time-out


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _bench() -> Any:
    """The worker's bench, made once: this is where torch loads."""
    global _BENCH
    if _BENCH is None:
        import torch

        from mergesec.execution.store import Store
        from mergesec.execution.work import Bench
        from mergesec.planning.catalog import load_catalog

        assert _PLACE is not None
        slot, place = _PLACE
        torch.set_num_threads(place.threads)
        torch.use_deterministic_algorithms(True, warn_only=True)
        root = Path(place.data_root) if place.data_root else None
        _BENCH = Bench(Store(Path(place.store)), load_catalog(place.plugins), torch.device(slot.device), root)
    return _BENCH


def _work(step: Step, kinds: dict[str, str]) -> Answer:
    from mergesec.execution.store import CorruptArtifact
    from mergesec.files import Full

    start = time.perf_counter()
    try:
        bench = _bench()
        from mergesec.execution.steps import run

        blob, info = run(step, bench, kinds)
        seconds, peak = time.perf_counter() - start, peak_mb(bench)
        facts = {**info, "seconds": seconds, "peak_mb": peak, "device": device_name(bench)}
        bench.store.put(step.kind, step.key, blob, facts)
    except CorruptArtifact as error:
        return Answer("corrupt", str(error), key=error.key)
    except Full as error:
        return Answer("full", str(error))
    except BaseException as error:  # a component may raise anything, SystemExit included
        return Answer("error", *explain(error), seconds=time.perf_counter() - start)
    return Answer("ok", seconds=seconds, peak_mb=peak, bytes=len(blob))


def peak_mb(bench: Any) -> float:
    """Peak memory of this worker so far, MiB: GPU memory on CUDA, resident set elsewhere."""
    if bench.device.type == "cuda":
        import torch

        return float(torch.cuda.max_memory_allocated() / 2**20)
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**20 if sys.platform == "darwin" else 2**10)


def device_name(bench: Any) -> str:
    if bench.device.type == "cuda":
        import torch

        return str(torch.cuda.get_device_name())
    return "cpu"
