"""Ctrl-C at any moment: heard once, told at once, never another error, and the second one ends everything."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from mergesec.cli.main import main
from mergesec.execution.interrupts import EAR
from mergesec.execution.scheduler import History, Reached, Scheduler
from mergesec.execution.store import Store
from mergesec.planning.gridspec import load_grid
from mergesec.planning.plan import Step

MOMENTS = int(os.environ.get("MERGESEC_INTERRUPTS", "8"))
"""At how many moments of a run Ctrl-C is pressed, in this process and in others."""
SEED = int(os.environ.get("MERGESEC_CAMPAIGN_SEED", "1"))


@pytest.fixture(autouse=True)
def _as_at_a_terminal() -> Iterator[None]:
    """Pytest may have been started deaf to Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def _press() -> None:
    signal.raise_signal(signal.SIGINT)


# --------------------------------------------------------------------------- the ear


def test_what_swallows_an_interrupt_does_not_hide_it() -> None:
    with EAR.listening():
        assert EAR.heard == 0
        with pytest.raises(KeyboardInterrupt):
            _press()
        assert EAR.heard == 1
        with EAR.listening():  # inside somebody who listens already
            assert EAR.heard == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with EAR.listening():
        assert EAR.heard == 0


def test_where_it_is_held_nothing_is_raised_but_in_rests() -> None:
    with EAR.listening(), EAR.held():
        _press()
        assert EAR.heard == 1
        assert EAR.rest(lambda: 1, 0) is None  # it came before
        assert EAR.rest(lambda: 1, 1) == 1

        def waits() -> int:
            _press()
            raise AssertionError("goes on after Ctrl-C")

        assert EAR.rest(waits, 1) is None
        _press()
        assert EAR.heard == 3


def test_who_ignores_ctrl_c_goes_on_ignoring_it() -> None:
    with EAR.listening(), EAR.held():
        _press()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with EAR.listening():
        assert EAR.heard == 0  # it was an earlier listener's
        _press()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert EAR.heard == 0


# --------------------------------------------------------------------------- the scheduler


class _Never:
    """An executor whose steps never end; ``closed`` tells that it was told to kill them."""

    def __init__(self) -> None:
        self.slots = [None, None]
        self.asked: list[str] = []
        self.closed = False

    def submit(self, slot: int, step: Step, kinds: Any) -> Future[Any]:
        self.asked.append(step.key)
        return Future()

    def note(self, slot: int) -> str:
        return ""

    def close(self, now: bool = False) -> None:
        self.closed |= now


class _Told:
    def __init__(self) -> None:
        self.stopped: list[tuple[float, int, list[str]]] = []

    def start(self, total: int, cached: int, reached: Reached) -> None:
        return None

    def running(self, labels: Any) -> None:
        list(labels)

    def finished(self, step: Step, answer: Any, reached: Reached) -> None:
        return None

    def stopping(self, done: int, running: list[str]) -> None:
        self.stopped.append((time.monotonic(), done, running))


def _later(seconds: float) -> None:
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()


def _scheduler(root: Path) -> tuple[Scheduler, _Never, _Told, dict[str, Step]]:
    steps = {f"{i:040x}": Step(f"{i:040x}", "merge", (), (), f'{{"task": "t{i}"}}') for i in range(4)}
    never, told = _Never(), _Told()
    return Scheduler(steps, Store(root), never, History(root), told), never, told, steps


def test_the_first_is_answered_at_once_and_the_second_kills(tmp_path: Path) -> None:
    scheduler, never, told, steps = _scheduler(tmp_path)
    started = time.monotonic()
    _later(0.3)
    _later(0.8)
    with pytest.raises(KeyboardInterrupt):
        scheduler.run(steps, 0)
    assert 0.8 <= time.monotonic() - started < 2.0
    ((when, done, running),) = told.stopped
    assert 0.3 <= when - started < 0.7  # not at the next look, a second later
    assert (done, running) == (0, ["merge t0", "merge t1"])
    assert never.closed
    assert len(never.asked) == 2
    assert not list((tmp_path / "claims").iterdir())


def test_one_that_was_swallowed_before_counts(tmp_path: Path) -> None:
    scheduler, never, _, steps = _scheduler(tmp_path)
    with EAR.listening():
        with pytest.raises(KeyboardInterrupt):
            _press()  # say, in a library that catches everything
        outcome = scheduler.run(steps, 0)
    assert outcome.interrupted
    assert not never.asked


STUBBORN = """
from mergesec.execution.interrupts import EAR, impatient
with EAR.listening(), impatient("enough"), EAR.held():
    print("ready", flush=True)
    while True:
        sum(range(10**7))
"""


def test_the_second_ends_whatever_does_not_listen() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"ready\n"
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        started = time.monotonic()
        assert process.wait(20) == 130
        assert time.monotonic() - started < 2.0
        assert process.stderr.read() == b"enough\n"


# --------------------------------------------------------------------------- at any moment of a run


@pytest.fixture
def run(copied: Any, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """``bench run`` of a grid that is computed already, in this process: composed, planned, verified, written."""
    grid = copied.grid("whole", **whole)
    arguments = copied.arguments(grid, "--results", str(copied.results))
    monkeypatch.setenv("MERGESEC_CACHE", str(copied.store))
    monkeypatch.setattr(sys, "argv", ["bench", "run", *arguments])

    def once() -> int:
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        return code if isinstance(code, int) else 0

    return once


def _calls_until(press_at: int) -> Callable[..., None]:
    """A profiler that presses Ctrl-C at the n-th call of a Python function, and counts them."""

    def profile(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            profile.seen += 1  # type: ignore[attr-defined]
            if profile.seen == press_at:  # type: ignore[attr-defined]
                _press()

    profile.seen = 0  # type: ignore[attr-defined]
    return profile


def test_at_any_call_of_a_run_it_is_an_interrupt_and_nothing_else(
    run: Callable[[], int], copied: Any, finished: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(SEED)
    assert run() == 0
    counting = _calls_until(0)
    sys.setprofile(counting)
    try:
        assert run() == 0
    finally:
        sys.setprofile(None)
    total: int = counting.seen  # type: ignore[attr-defined]
    capsys.readouterr()
    for _ in range(MOMENTS):
        moment = rng.randrange(total)
        sys.setprofile(_calls_until(moment))
        try:
            code = run()
        finally:
            sys.setprofile(None)
        told = capsys.readouterr()
        assert code in (0, 130), (moment, code, told.err)
        assert "Traceback" not in told.err, moment
        assert "error:" not in told.err, (moment, told.err)
        if code:
            assert told.err.endswith("interrupted; the same command goes on from here\n"), moment
    assert run() == 0
    assert copied.boards("whole") == finished.boards("whole")
    assert not list(copied.results.rglob(".tmp-*"))


READY = """
from mergesec.cli.main import main
print("ready", flush=True)
main()
"""


def test_at_any_time_of_a_process_it_is_an_interrupt_and_nothing_else(
    copied: Any, whole: dict[str, Any]
) -> None:
    rng = random.Random(SEED)
    grid = copied.grid("whole", **whole)
    program = [sys.executable, "-c", READY, "run", *copied.arguments(grid, "--results", str(copied.results))]
    codes = []
    for _ in range(MOMENTS):
        delay = rng.uniform(0.02, 2.0)
        with subprocess.Popen(
            program, env=copied._environment(), cwd=copied.home, text=True, preexec_fn=_hear,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=120)
        codes.append(process.returncode)
        assert process.returncode in (0, 130), (delay, process.returncode, err)
        assert not re.search(r"Traceback|error:", err), (delay, err)
        assert process.returncode == 0 or err.endswith("goes on from here\n"), (delay, err)
    assert 130 in codes


def _hear() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_what_hydra_makes_of_it_is_an_interrupt_for_python_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def compose(*_: Any, **__: Any) -> None:
        try:
            _press()
        finally:  # as OmegaConf does, which then stumbles over what is half made
            None._invalidate()  # type: ignore[attr-defined]

    monkeypatch.setattr("hydra.compose", compose)
    with pytest.raises(KeyboardInterrupt):
        load_grid("quickstart", ["seeds=[0]"])  # without changes what Hydra made once is remembered
