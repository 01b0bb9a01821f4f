"""A worker process: gets ready, answers one step after another, ends with its parent."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from mergesec.execution.failures import explain
from mergesec.execution.guests.containment import Walls
from mergesec.planning.plan import Step


@dataclass(frozen=True)
class Slot:
    """One place a step can run: ``cpu``, ``mps``, or ``cuda`` and the GPU's index."""

    device: str
    gpu: str = ""


@dataclass(frozen=True)
class Workplace:
    """What a worker needs to know; never part of a key."""

    store: str
    plugins: tuple[str, ...]
    data_root: str | None
    threads: int
    guests: bool = False
    """Whether plugins take part, so that guests will be needed."""
    walls: Walls | None = None
    """What contained guests see; None where plugins are not contained."""


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


class Post(NamedTuple):
    """Where a worker stands: its slot, what it knows, and where stacks are written."""

    slot: Slot
    place: Workplace
    words: int


_POST: Post | None = None
_BENCH: Any = None


def serve(pipe: Connection, words: Connection, slot: Slot, place: Workplace, parent: int) -> None:
    """A worker's life: get ready, say so, answer questions until the pipe ends.

    Its stacks go into ``words`` if it crashes, or is asked for them by the signal ``WHERE``.
    """
    faulthandler.enable(words.fileno())
    signal.signal(WHERE, _ask_guests)
    faulthandler.register(WHERE, words.fileno(), chain=True)
    printed = _prepare(Post(slot, place, words.fileno()), parent)
    with contextlib.suppress(EOFError, OSError):
        pipe.send(None)
        with contextlib.suppress(Exception):
            _bench().report = pipe.send
        while True:
            step, kinds = pipe.recv()
            pipe.send(_work(step, kinds, printed))


def _prepare(post: Post, parent: int) -> int:
    """Before torch loads: device, threads; Ctrl-C is the parent's; leave when the parent is gone. What is printed
    from now on goes to a file without a name, whose number is returned."""
    global _POST
    _POST = post
    slot, place, _ = post
    with tempfile.TemporaryFile() as file:
        printed = os.dup(file.fileno())
    for stream in (1, 2):
        os.dup2(printed, stream)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["CUDA_VISIBLE_DEVICES"] = slot.gpu
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(place.threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    with contextlib.suppress(Exception):  # told again, and then reported, at the first step
        _bench()  # loading torch must not count against the first step's time-out
    return printed


def _ask_guests(*_: Any) -> None:
    """A worker that does not answer may be waiting for a guest."""
    if _BENCH is not None and _BENCH.guests is not None:
        _BENCH.guests.signal(WHERE)


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _bench() -> Any:
    """The worker's bench, made once: this is where torch loads."""
    global _BENCH
    if _BENCH is None:
        import torch

        from mergesec.execution.guests.host import Hosts, Setting
        from mergesec.execution.numerics import settle
        from mergesec.execution.store import Store
        from mergesec.execution.work import Bench
        from mergesec.planning.catalog import load_catalog

        assert _POST is not None
        slot, place, words = _POST
        torch.set_num_threads(place.threads)
        device = torch.device(slot.device)
        settle(device)
        root = Path(place.data_root) if place.data_root else None
        store = Store(Path(place.store))
        setting = Setting(place.plugins, slot.device, place.threads, place.data_root, place.walls, words)
        hosts = Hosts(store, setting)
        _BENCH = Bench(store, load_catalog(place.plugins), device, root, guests=hosts)
        if place.guests:
            hosts.start()
    return _BENCH


def _work(step: Step, kinds: dict[str, str], printed: int) -> Answer:
    from mergesec.execution.logs import Log
    from mergesec.execution.store import CorruptArtifact
    from mergesec.files import Full

    start = time.perf_counter()
    log = Log(Path(_POST.place.store) if _POST else Path(), step.key)
    try:
        bench = _bench()
        from mergesec.execution.guests.host import GuestDied, GuestFailed
        from mergesec.execution.perform import perform

        try:
            blob, info, guest_mb = perform(step, bench, kinds, log)
        except GuestFailed as error:
            return Answer("error", error.reason, error.trace, seconds=time.perf_counter() - start)
        except GuestDied as error:
            return Answer("died", f"WorkerDied: the worker ended while running it ({ending(error.code)})")
        seconds, peak = time.perf_counter() - start, max(guest_mb, peak_mb(bench))
        facts = {**info, "seconds": seconds, "peak_mb": peak, "device": device_name(bench)}
        bench.store.put(step.kind, step.key, blob, facts)
    except CorruptArtifact as error:
        return Answer("corrupt", str(error), key=error.key)
    except Full as error:
        return Answer("full", str(error))
    except BaseException as error:  # a component may raise anything, SystemExit included
        return Answer("error", *explain(error), seconds=time.perf_counter() - start)
    finally:
        with contextlib.suppress(Full):
            _keep_printed(printed, log)
    return Answer("ok", seconds=seconds, peak_mb=peak, bytes=len(blob))


def _keep_printed(printed: int, log: Any) -> None:
    """Move what this worker printed during a step into the step's log."""
    sys.stdout.flush()
    sys.stderr.flush()
    size = os.lseek(printed, 0, os.SEEK_END)
    position = 0
    while position < size:
        part = os.pread(printed, 1 << 16, position)
        position += len(part)
        log.write(part)
    os.ftruncate(printed, 0)
    os.lseek(printed, 0, os.SEEK_SET)
    log.close()


def ending(code: int | None) -> str:
    """An exit code, with the signal that it stands for."""
    if code is None or code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in signal.valid_signals() else "a signal"
    return f"exit code {code}, {name}" + ("; perhaps out of memory" if name == "SIGKILL" else "")


def peak_mb(bench: Any) -> float:
    """Peak memory of this worker so far, MiB: GPU memory on CUDA, resident set elsewhere."""
    if bench.device.type == "cuda":
        import torch

        return float(torch.cuda.max_memory_allocated() / 2**20)
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**20 if sys.platform == "darwin" else 2**10)


def device_name(bench: Any) -> str:
    """Where the steps are done, as records tell it."""
    from mergesec.execution.numerics import told

    return told(bench.device)
