"""Drives a plan through an executor: order, containment, resume, draining.

Failure is local: a failed step blocks its descendants with a reason, the rest goes on. Only results
are stored, so the same command again does exactly what is missing.
"""

from __future__ import annotations

import heapq
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from mergesec.execution.claims import Claims
from mergesec.execution.engines.worker import Answer
from mergesec.execution.failures import Failure, Failures, explain
from mergesec.execution.interrupts import EAR
from mergesec.execution.store import Store
from mergesec.files import Full
from mergesec.planning.plan import Step

ENOUGH = 0.8
"""Share of the work left that must be predicted from measured steps before a run says how long it will take."""
POLL = 1.0
"""Seconds between two looks at steps that other runs on this store are at."""
CHECKS = 5.0
"""Seconds between two looks at whether those runs are still alive."""
MERGED = ("merge", "repair")
"""Kinds of step whose results are merges: as many as the grid is wide, and soon made again."""
FIRST = 1e9
"""Seconds that no step takes."""
ATTEMPTS = 3
"""How often a step is tried again when its worker died or its input proved corrupt."""

_DEFAULT_SECONDS = {
    "data": 5.0, "base": 1.0, "head": 1.0, "expert": 60.0, "poison": 60.0, "guard": 90.0, "trigger": 2.0, "reference": 60.0,
    "forge": 5.0, "protect": 3.0, "recover": 3.0, "examine": 30.0, "screen": 2.0, "merge": 1.0, "repair": 10.0,
    "evaluate": 5.0, "compare": 2.0, "visibility": 1.0, "secret": 2.0, "verify": 3.0,
}  # fmt: skip
_DEFAULT_BYTES = {
    "evaluate": 50_000,
    "compare": 1_000,
    "visibility": 1_000,
    "examine": 1_000,
    "verify": 2_000,
    "head": 10_000,
    "trigger": 20_000,
}


class Executor(Protocol):
    """Does steps. One at a time per slot; ``note`` is what a slot's step said last, ``close(now)`` ends all."""

    slots: list[Any]

    def submit(self, slot: int, step: Step, kinds: Mapping[str, str]) -> Future[Answer]: ...

    def note(self, slot: int) -> str: ...

    def close(self, now: bool = False) -> None: ...


class Reached(NamedTuple):
    """How far a run is: cells whose evaluations are all there, of so many; seconds left, None while what was
    measured so far does not tell."""

    cells: int
    of: int
    remaining: float | None


class Reporter(Protocol):
    """Told what happens; draws progress."""

    def start(self, total: int, cached: int, reached: Reached) -> None: ...

    def running(self, labels: Iterable[str]) -> None: ...

    def finished(self, step: Step, answer: Answer, reached: Reached) -> None: ...

    def stopping(self, done: int, running: list[str]) -> None:
        """After the first Ctrl-C: what is still waited for."""


@dataclass
class Outcome:
    """What a run came to. ``failed`` and ``blocked`` map step keys to reasons."""

    done: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    blocked: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


class History:
    """Seconds and bytes of past steps, by kind and component: what ``plan`` predicts from."""

    def __init__(self, root: Path) -> None:
        self._path = root / "history.jsonl"
        self._sums: dict[str, list[float]] = {}
        if self._path.is_file():
            for line in self._path.read_bytes().splitlines():
                try:
                    row = json.loads(line)
                    what, seconds, size = str(row["what"]), float(row["seconds"]), int(row["bytes"])
                except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                    continue  # a line torn by a kill
                if math.isfinite(seconds):
                    self._note(what, seconds, size)

    def _note(self, what: str, seconds: float, size: int) -> None:
        for name in {what, "|".join(what.split("|")[:2])}:
            sums = self._sums.setdefault(name, [0.0, 0.0, 0.0])
            sums[0] += 1
            sums[1] += seconds
            sums[2] += size

    @staticmethod
    def what(step: Step) -> str:
        """``kind|backbone|methods``; data has no backbone and goes by its task."""
        refs = dict(step.components)
        place = refs.get("backbone") or refs.get("task")
        methods = [refs[role].name for role in ("attack", "defense", "merging") if role in refs]
        return "|".join([step.kind, place.name if place else "", *methods])

    def add(self, step: Step, answer: Answer) -> None:
        what = self.what(step)
        self._note(what, answer.seconds, answer.bytes)
        row = {"what": what, "seconds": round(answer.seconds, 4), "bytes": answer.bytes}
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def predict(self, step: Step) -> tuple[float, float]:
        """(seconds, bytes) expected: as the same step before, else its kind on this backbone, else a default."""
        if (sums := self._closest(step)) is not None:
            count, seconds, size = sums
            return seconds / count, size / count
        return _DEFAULT_SECONDS.get(step.kind, 5.0), float(_DEFAULT_BYTES.get(step.kind, 4_000_000))

    def knows(self, step: Step) -> bool:
        """Whether a prediction rests on anything that was measured."""
        return self._closest(step) is not None

    def _closest(self, step: Step) -> list[float] | None:
        what = self.what(step)
        return self._sums.get(what) or self._sums.get("|".join(what.split("|")[:2]))

    def left(self, groups: Iterable[tuple[Step, int]], pace: float = 1.0) -> float | None:
        """Seconds of work in groups of like steps; None unless most of it is predicted from what was measured."""
        seconds = known = 0.0
        for step, number in groups:
            expected = number * self.predict(step)[0]
            seconds += expected
            known += expected if self.knows(step) else 0.0
        return pace * seconds if known >= ENOUGH * seconds else None


@dataclass
class Scheduler:
    """Runs ``wanted`` steps (keys) of ``steps`` with everything they need that the store lacks."""

    steps: Mapping[str, Step]
    store: Store
    executor: Executor
    history: History
    reporter: Reporter
    goals: Sequence[Collection[str]] = ()
    """Of each cell the keys of its evaluations."""
    who: str = ""
    """As whom steps are claimed, where others have to know."""
    attempt: str = ""
    """What this is part of: a step that failed in it, whoever tried, is not tried again. Empty: only this."""
    frees: bool = False
    """Whether merges go once every step that was to read them is done."""
    outcome: Outcome = field(default_factory=Outcome)
    claims: Claims = field(init=False)
    failures: Failures = field(init=False)
    _missing: dict[str, set[str]] = field(default_factory=dict)
    _waiters: dict[str, set[str]] = field(default_factory=dict)
    _ready: list[tuple[float, int, str]] = field(default_factory=list)
    _tries: dict[str, int] = field(default_factory=dict)
    _order: dict[str, int] = field(default_factory=dict)
    _active: set[str] = field(default_factory=set)
    """Ready or running now."""
    _elsewhere: set[str] = field(default_factory=set)
    """Ready, but claimed by another run."""
    _looked: float = 0.0
    _checked: float = 0.0
    _remaining: set[str] = field(default_factory=set)
    """Taken in and neither done, failed nor blocked."""
    _left_of: Counter[str] = field(default_factory=Counter)
    """How many of those there are, by what history calls alike."""
    _likes: dict[str, Step] = field(default_factory=dict)
    _readers: dict[str, list[str]] = field(default_factory=dict)
    """Of each merge the steps of the plan that read it, where merges are let go of."""
    _open: list[set[str]] = field(default_factory=list)
    """Of each cell the evaluations that are still to come."""
    _cells_done: int = 0
    _cells_of: dict[str, list[int]] = field(default_factory=dict)
    _spent: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """Seconds predicted and seconds taken of steps that were predicted from measured ones."""

    def __post_init__(self) -> None:
        self.claims = Claims(self.store.root, self.who)
        self.failures = Failures(self.store.root)

    def run(self, wanted: Mapping[str, Step], cached: int) -> Outcome:
        """Do the wanted steps. The first Ctrl-C lets running ones finish; the second kills them, and is raised."""
        self._order = {key: i for i, key in enumerate(self.steps)}
        for key, step in self.steps.items() if self.frees else ():
            for _, needed in step.inputs:
                if self.steps[needed].kind in MERGED:
                    self._readers.setdefault(needed, []).append(key)
        if not self.attempt:
            self.claims.sweep()
        for key in wanted:
            self._add(key)
        self._open = [{key for key in goal if key in self._missing} for goal in self.goals]
        self._cells_done = sum(not keys for keys in self._open)
        for cell, keys in enumerate(self._open):
            for key in keys:
                self._cells_of.setdefault(key, []).append(cell)
        self.reporter.start(len(self._missing), cached, self._reached())
        try:
            with EAR.listening(), EAR.held():
                self._drive()
        except BaseException:
            self.executor.close(now=True)
            raise
        finally:
            self.claims.release_all()
        return self.outcome

    def _drive(self) -> None:
        """Launch and collect until nothing is left; after Ctrl-C until nothing runs."""
        running: dict[Future[Answer], tuple[int, Step]] = {}
        idle = list(range(len(self.executor.slots)))
        while self._ready or running or self._elsewhere:
            pressed = EAR.heard
            if pressed > 1:
                raise KeyboardInterrupt
            if pressed and not self.outcome.interrupted:
                self.outcome.interrupted = True
                self._ready.clear()
                self._elsewhere.clear()
                self.reporter.stopping(self.outcome.done, [step.label for _, step in running.values()])
            self._look_elsewhere()
            self._launch(running, idle)
            ended = EAR.rest(lambda: self._wait(running), pressed)
            for future in ended or ():
                slot, step = running.pop(future)
                idle.append(slot)
                self._settle(step, _answer(future))

    def _add(self, key: str) -> None:
        """Take a step in, with whatever it needs that is not stored."""
        stack = [key]
        while stack:
            key = stack.pop()
            if key in self._missing:
                continue
            step = self.steps[key]
            needs = {k for _, k in step.inputs if not self.store.has(self.steps[k].kind, k)}
            self._missing[key] = needs
            for need in needs:
                self._waiters.setdefault(need, set()).add(key)
            if key not in self._remaining:
                self._remaining.add(key)
                self._left_of[self._alike(step)] += 1
            stack += needs
            if not needs:
                self._push(key)

    def _push(self, key: str) -> None:
        # the longest first: trainings must not be what everybody waits for at the end
        seconds, _ = self.history.predict(self.steps[key])
        if any(needed in self._readers for _, needed in self.steps[key].inputs):
            seconds += FIRST  # what lets go of a merge comes before what makes another
        self._active.add(key)
        heapq.heappush(self._ready, (-seconds, self._order[key], key))

    def _launch(self, running: dict[Future[Answer], tuple[int, Step]], idle: list[int]) -> None:
        while self._ready and idle:
            key = heapq.heappop(self._ready)[2]
            step = self.steps[key]
            if not self._claim(step):
                continue
            slot = idle.pop()
            kinds = {k: self.steps[k].kind for _, k in step.inputs}
            running[self.executor.submit(slot, step, kinds)] = (slot, step)
        notes = [(step.label, self.executor.note(slot)) for slot, step in running.values()]
        waits = [f"another run: {self.steps[key].label}" for key in self._elsewhere]
        self.reporter.running([*(f"{label} {note}".rstrip() for label, note in notes), *waits])

    def _claim(self, step: Step) -> bool:
        """Whether the step is ours to do: not if it is done, or another run on this store is at it."""
        if self.store.has(step.kind, step.key) or self._over(step):
            self._found(step)
            return False
        if not self.claims.take(step.key):
            self._elsewhere.add(step.key)
            return False
        if self.store.has(step.kind, step.key):  # committed by whoever held the claim before
            self.claims.release(step.key)
            self._found(step)
            return False
        return not (self._failed_already(step) or self._kills(step))

    def _over(self, step: Step) -> bool:
        """Whether another run made a merge, did all that reads it, and let go of it."""
        readers = [self.steps[key] for key in self._readers.get(step.key, ()) if key in self._remaining]
        return bool(readers) and all(self.store.has(reader.kind, reader.key) for reader in readers)

    def _failed_already(self, step: Step) -> bool:
        """Whether another worker of this attempt saw the step fail."""
        failure = self.failures.read(step.key) if self.attempt else None
        if failure is None or failure.attempt != self.attempt:
            return False
        self.claims.release(step.key)
        self._fail(step, failure)
        return True

    def _kills(self, step: Step) -> bool:
        """Whether too many ended in the middle of the step."""
        deaths, last = self.claims.deaths(step.key)
        if deaths < ATTEMPTS:
            return False
        told = f"; the last: {last}" if last else ""
        self._tries[step.key] = ATTEMPTS
        self._settle(
            step, Answer("died", f"WorkerDied: {deaths} workers in a row ended while running it{told}")
        )
        return True

    def _look_elsewhere(self) -> None:
        """Once a second: what other runs let go of is done, or failed; now and then: whether they died."""
        now = time.monotonic()
        if not self._elsewhere or now - self._looked < POLL:
            return
        self._looked = now
        found = self._elsewhere - self.claims.taken()
        if now - self._checked >= CHECKS:
            self._checked = now
            found = set(self._elsewhere)
        self._elsewhere -= found
        for key in found:
            self._push(key)

    def _wait(self, running: Iterable[Future[Answer]]) -> set[Future[Answer]]:
        """Futures that ended: at once if there are any, else within a second."""
        if not running:
            if self._elsewhere:
                time.sleep(POLL)
            return set()
        return wait(running, timeout=POLL, return_when=FIRST_COMPLETED).done

    def _found(self, step: Step) -> None:
        """Another run on the same store did the step."""
        self._active.discard(step.key)
        self._strike(step.key)
        self.failures.forget(step.key)
        self._release(step.key)
        self.reporter.finished(step, Answer("ok"), self._reached())

    def _settle(self, step: Step, answer: Answer) -> None:
        self.claims.release(step.key)
        if answer.status == "full":
            raise Full(answer.message)
        self._active.discard(step.key)
        if answer.status in ("corrupt", "died") and self.outcome.interrupted:
            return  # not the step's fault; the next run does it
        tries = self._tries[step.key] = self._tries.get(step.key, 0) + 1
        if answer.status in ("corrupt", "died") and tries < ATTEMPTS:
            del self._missing[step.key]
            if answer.key not in self._active:  # else another step that reads it noticed first
                self._missing.pop(answer.key, None)
            self._add(step.key)
            return
        self._strike(step.key)
        if self.history.knows(step):
            self._spent = [
                self._spent[0] + self.history.predict(step)[0], self._spent[1] + answer.seconds,
            ]  # fmt: skip
        if answer.status != "ok":
            reason = Failure(
                step.key, step.kind, step.label, answer.message, answer.trace, self.attempt
            )  # fmt: skip
            self.failures.note(reason)
            self._fail(step, reason, answer)
        else:
            self.failures.forget(step.key)
            self.outcome.done += 1
            if answer.seconds:
                self.history.add(step, answer)
            self._release(step.key)
            self.reporter.finished(step, answer, self._reached())

    def _fail(self, step: Step, failure: Failure, answer: Answer | None = None) -> None:
        """A step failed, here or at another worker; nothing that needs it will run."""
        self._active.discard(step.key)
        self._strike(step.key)
        self.outcome.failed[step.key] = failure.reason
        self._block(failure)
        self.reporter.finished(step, answer or Answer("error", failure.reason), self._reached())

    def _reached(self) -> Reached:
        """Cells that are there, and seconds left by prediction, corrected by how predictions fared so far."""
        pace = self._spent[1] / self._spent[0] if self._spent[0] else 1.0
        work = self.history.left(((self._likes[what], n) for what, n in self._left_of.items() if n), pace)
        remaining = None if work is None else work / max(1, len(self.executor.slots))
        return Reached(self._cells_done, len(self._open), remaining)

    def _alike(self, step: Step) -> str:
        what = self.history.what(step)
        self._likes.setdefault(what, step)
        return what

    def _strike(self, key: str) -> None:
        """A step is no longer to come."""
        if key in self._remaining:
            self._remaining.discard(key)
            self._left_of[self._alike(self.steps[key])] -= 1

    def _release(self, key: str) -> None:
        for cell in self._cells_of.pop(key, ()):
            self._open[cell].discard(key)
            self._cells_done += not self._open[cell]
        for other in sorted(self._waiters.pop(key, ()), key=self._order.__getitem__):
            needs = self._missing[other]
            needs.discard(key)
            if not needs and not self.outcome.interrupted:
                self._push(other)
        self._let_go(self.steps[key])

    def _let_go(self, step: Step) -> None:
        """Drop merges that this step read and no other is to read; one that failed will want its again."""
        waiting = (self._remaining, self.outcome.failed, self.outcome.blocked)
        for _, needed in step.inputs:
            readers = self._readers.get(needed)
            if readers and not any(key in keys for key in readers for keys in waiting):
                self.store.spend(self.steps[needed].kind, needed)

    def _block(self, failure: Failure) -> None:
        """Everything that needs the failed step will not run; say why."""
        stack = [failure.key]
        while stack:
            for other in self._waiters.get(stack.pop(), ()):
                if other not in self.outcome.blocked:
                    self._strike(other)
                    self.outcome.blocked[other] = failure.blocks
                    stack.append(other)


def _answer(future: Future[Answer]) -> Answer:
    try:
        return future.result()
    except Exception as error:
        return Answer("error", *explain(error))


def completed(store: Store, steps: Mapping[str, Step], spent: bool = False) -> Callable[[str], bool]:
    """A fast ``has`` over one snapshot of the store, with ``spent`` also of steps whose facts alone are left."""
    known = store.keys(spent) & steps.keys()
    return known.__contains__
