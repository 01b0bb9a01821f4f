"""Local engine: one spawned worker per device slot, so a crash or hang of one step stays there.

Torch-free here: ``CUDA_VISIBLE_DEVICES`` and the thread count are set in the child before torch loads.
Each worker has a pipe of its own and no lock, so that a kill at any moment is seen as the end of its pipe.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import NamedTuple

from mergesec.errors import UsageError
from mergesec.execution.engines.worker import WHERE, Answer, Slot, Workplace, ending, serve
from mergesec.execution.failures import portable, shown_file
from mergesec.planning.plan import Step

TIMED_OUT = "TimeoutError: the step took longer than --step-timeout and was stopped"


def visible_gpus() -> list[str]:
    """The GPUs that CUDA would show here, as ``CUDA_VISIBLE_DEVICES`` names them, without loading torch."""
    present = _present_gpus()
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return [name for name in present or () if name.isdigit()]
    return parse_visible(listed, present)


def parse_visible(listed: str, present: Sequence[str] | None) -> list[str]:
    """What ``CUDA_VISIBLE_DEVICES`` shows of the GPUs that are ``present`` (None: not known, all are believed).

    CUDA's own rules: all indices or all UUIDs (the first entry says which; an unambiguous beginning of a UUID
    will do); spaces around a name do not count; the first entry that is no GPU ends the list; a name given
    twice shows nothing at all.
    """
    entries = [entry.strip() for entry in listed.split(",")]
    uuids = entries[0].startswith(("GPU-", "MIG-"))
    kind = re.compile(rf"{entries[0][:4]}.+" if uuids else r"\+?(\d+).*")
    found: list[str] = []
    for entry in entries:
        match = kind.fullmatch(entry)
        if match is None:
            break
        name = entry if uuids else str(int(match[1]))
        if name in found:
            return []
        if present is not None and not _is_one(name, present):
            break
        found.append(name)
    return found


def _is_one(name: str, present: Sequence[str]) -> bool:
    return name in present or (not name.isdigit() and sum(other.startswith(name) for other in present) == 1)


def _present_gpus() -> list[str] | None:
    """Indices and UUIDs of all GPUs and their parts; None where the driver's tool cannot tell."""
    try:
        out = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if out.returncode:
        return None
    indices = re.findall(r"^GPU (\d+):", out.stdout, re.MULTILINE)
    return [*indices, *re.findall(r"UUID: ([\w/-]+)", out.stdout)]


DEVICES = "auto, cpu, cuda, cuda:0,1, mps; *N behind it for N workers on each GPU"


def make_slots(device: str, jobs: int | None) -> list[Slot]:
    """Slots for ``--device auto|cpu|cuda|cuda:0,1|mps`` and ``--jobs`` (per GPU, or in all on the CPU).

    ``cuda*4``: four workers on each GPU, whatever ``jobs`` says of the CPU. ``auto`` takes the GPUs that CUDA shows.
    """
    if jobs is not None and jobs < 1:
        raise UsageError("--jobs", f"must be at least 1, got {jobs}")
    place, star, times = device.partition("*")
    match = re.fullmatch(r"(auto|cpu|cuda|mps)(?::([\w, /-]+))?", place.strip())
    if match is None or (match[2] and match[1] != "cuda"):
        raise UsageError("--device", f"{device!r}; valid: {DEVICES}")
    if star and not re.fullmatch(r"\s*[1-9]\d{0,2}\s*", times):
        raise UsageError("--per-gpu", f"must be a number from 1 to 999, got {times!r}")
    each = int(times) if star else jobs or 1
    if match[1] == "mps":
        return [Slot("mps")] * each
    gpus = visible_gpus() if match[1] != "cpu" else []
    if match[2]:
        gpus = _chosen(match[2], gpus)
    if match[1] == "cuda" and not gpus:
        raise UsageError("--device", f"cuda was asked for, but {_none_visible()}; try --device cpu")
    if gpus:
        return [Slot("cuda", g) for g in gpus for _ in range(each)]
    return [Slot("cpu")] * (jobs or _cores())


def _chosen(asked: str, visible: Sequence[str]) -> list[str]:
    """The GPUs named after ``cuda:``, as CUDA_VISIBLE_DEVICES names them."""
    chosen = [name.strip() for name in asked.strip(", ").split(",")]
    for place, name in enumerate(chosen):
        if name not in visible:
            shown = ", ".join(visible) or f"none ({_none_visible()})"
            raise UsageError("--device", f"no GPU {name or repr(name)}; found {shown}")
        if name in chosen[:place]:
            raise UsageError(
                "--device", f"GPU {name} is named twice; --per-gpu says how many workers each has"
            )
    return chosen


def _none_visible() -> str:
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (
        "no GPU is visible" if listed is None else f"with CUDA_VISIBLE_DEVICES={listed!r} no GPU is visible"
    )


def _cores() -> int:
    with contextlib.suppress(AttributeError):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def no_interrupts() -> Iterator[None]:
    """Processes started inside never see Ctrl-C, not even before they can say so themselves."""
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


_starting = threading.Lock()


@contextlib.contextmanager
def _no_main() -> Iterator[None]:
    """Workers started inside do not run their parent's script again: a script or notebook needs no guard."""
    main = sys.modules["__main__"]
    with _starting:
        kept = {name: getattr(main, name) for name in ("__file__", "__spec__") if hasattr(main, name)}
        main.__spec__ = None
        if "__file__" in kept:
            del main.__file__
        try:
            yield
        finally:
            for name, value in kept.items():
                setattr(main, name, value)


class _Ended(NamedTuple):
    """How a worker ended: its exit code, and where it was if it could still tell."""

    code: int | None
    words: str = ""


def _last_words(words: Connection) -> str:
    """What a worker that is gone wrote of its stacks, files named as tracebacks do."""
    said = b""
    while words.poll(0.1) and (more := os.read(words.fileno(), 1 << 16)):
        said += more
    lines = said.decode(errors="replace").splitlines()
    kept = [line for line in lines if not line.startswith("Extension modules:")]
    text = re.sub(r'File "([^"]+)"', lambda m: f'File "{shown_file(m[1])}"', "\n".join(kept))
    return portable(text).strip()


class Seat:
    """One worker process and the pipe to it. A lost worker is replaced at the next question."""

    def __init__(self, slot: Slot, place: Workplace) -> None:
        self.place = place
        self._arguments = (slot, place, os.getpid())
        self._process: SpawnProcess | None = None
        self._pipe: Connection | None = None
        self._words: Connection | None = None
        """Where the interpreter writes its stacks when it crashes or is asked to; else silent."""
        self._closed = False
        self.note = ""
        """What the worker said last of the step it is at."""

    def ask(self, step: Step, kinds: dict[str, str], timeout: float | None) -> Answer:
        """Have the worker run ``step``. Loading torch does not count against ``timeout`` (seconds)."""
        try:
            pipe = self._ready()
            pipe.send((step, kinds))
            end = None if timeout is None else time.monotonic() + timeout
            while True:
                if not pipe.poll(None if end is None else max(0.0, end - time.monotonic())):
                    self._ask_where()
                    return Answer("error", TIMED_OUT, self._end(kill=True).words)
                answer: Answer | str = pipe.recv()
                if isinstance(answer, Answer):
                    # a guest that crashed left its stacks where a worker would
                    if answer.status == "died" and self._words is not None:
                        return replace(answer, trace=_last_words(self._words))
                    return answer
                self.note = answer
        except (EOFError, OSError):
            ended = self._end(kill=True)
            told = f"WorkerDied: the worker ended while running it ({ending(ended.code)})"
            return Answer("died", told, ended.words)
        finally:
            self.note = ""

    def _ready(self) -> Connection:
        if self._process is not None and not self._process.is_alive():
            self._end(kill=True)
        if self._pipe is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._words, words = context.Pipe(duplex=False)
            self._process = context.Process(target=serve, args=(theirs, words, *self._arguments))
            with no_interrupts(), _no_main():
                self._process.start()
            theirs.close()  # the worker's is now the only one, so that its death ends the pipe
            words.close()
            if self._closed:
                raise EOFError
            self._pipe.recv()
        return self._pipe

    def _ask_where(self) -> None:
        """Have a worker that does not answer write down what it is at; it does so in the middle of C code."""
        if self._process is not None and self._process.pid is not None and self._words is not None:
            with contextlib.suppress(OSError):
                os.kill(self._process.pid, WHERE)
                self._words.poll(2.0)

    def _end(self, kill: bool) -> _Ended:
        """Wait for the worker to be gone."""
        process, pipe, self._process, self._pipe = self._process, self._pipe, None, None
        words, self._words = self._words, None
        if pipe is not None:
            pipe.close()  # an idle worker takes this as the end
        if process is None:
            return _Ended(None)
        if not kill:
            process.join(10)
        elif not self._closed:
            process.join(0.2)  # its own exit code says more than that of the kill below
        process.kill()
        process.join()
        with words or contextlib.nullcontext():
            return _Ended(process.exitcode, _last_words(words) if kill and words is not None else "")

    def kill(self) -> None:
        """End the worker whatever it is at, from another thread than the one that asks."""
        self._closed = True
        process = self._process
        if process is not None and process.pid is not None:
            with contextlib.suppress(OSError):
                process.kill()

    def close(self) -> None:
        """Dismiss an idle worker."""
        self._end(kill=False)


class LocalExecutor:
    """A worker per slot; one that dies or is timed out takes nothing but its step with it."""

    def __init__(self, slots: list[Slot], place: Workplace, timeout: float | None) -> None:
        self.slots, self._timeout = slots, timeout
        self._seats = [Seat(slot, place) for slot in slots]
        self._threads = ThreadPoolExecutor(len(slots), "slot")

    def submit(self, slot: int, step: Step, kinds: Mapping[str, str]) -> Future[Answer]:
        """Run ``step`` on an idle slot."""
        return self._threads.submit(self._seats[slot].ask, step, dict(kinds), self._timeout)

    def note(self, slot: int) -> str:
        """How far the step on a slot is, as it tells; empty if it does not."""
        return self._seats[slot].note

    def close(self, now: bool = False) -> None:
        """Stop the workers; ``now`` kills what is running."""
        for seat in self._seats if now else ():
            seat.kill()
        self._threads.shutdown(wait=True)
        for seat in self._seats:
            seat.close()
