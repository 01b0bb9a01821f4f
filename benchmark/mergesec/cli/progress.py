"""How a run tells how far it is: two live lines on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from mergesec.cli.show import duration, many
from mergesec.files import plain

if TYPE_CHECKING:
    from mergesec.execution.engines.worker import Answer
    from mergesec.execution.scheduler import Reached
    from mergesec.planning.plan import Step

SLOW = 5.0
"""Seconds from which on a step is worth a line of its own where there is no terminal."""
SILENCE = 60.0
"""Seconds after which a line says what runs."""


class Progress:
    """A live bar on a terminal; elsewhere one plain line per step that took a while, or failed."""

    def __init__(self) -> None:
        self._total = self._done = 0
        self._reached: Reached | None = None
        self._heard = self._started = self._spoken = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def start(self, total: int, cached: int, reached: Reached) -> None:
        self._total, self._reached = total, reached
        self._started = self._heard = time.monotonic()
        print(f"{many(total, 'step')} to run, {cached} in the store", file=sys.stderr)
        if sys.stderr.isatty() and total:
            self._bar = _bar()
            self._task = self._bar.add_task("", total=total, told="", steps="")
            self._bar.start()

    def running(self, labels: Iterable[str]) -> None:
        if self._bar is not None:
            self._bar.update(self._task, told=self._told(), steps=" | ".join(map(plain, labels)))
        elif time.monotonic() - self._spoken > SILENCE:
            self._say(" | ".join(labels))

    def finished(self, step: Step, answer: Answer, reached: Reached) -> None:
        self._done += 1
        self._reached, self._heard = reached, time.monotonic()
        bad = answer.status != "ok"
        if self._bar is not None:
            self._bar.update(
                self._task, completed=self._done, total=max(self._total, self._done), told=self._told()
            )
            if bad:
                told = f"failed {step.label}: {answer.message}"
                self._bar.console.print(told, markup=False, highlight=False, style="red")
        elif bad or answer.seconds > SLOW or time.monotonic() - self._spoken > 15:
            self._say(f"{step.label}: {f'failed: {answer.message}' if bad else duration(answer.seconds)}")

    def _told(self) -> str:
        """``12/90 steps, 3/40 cells, 1m20s, about 5m00s left``: no time left before there is anything to tell it from."""
        parts = [f"{self._done}/{max(self._total, self._done)} steps"]
        now = time.monotonic()
        if self._reached is not None:
            if self._reached.of:
                parts.append(f"{self._reached.cells}/{self._reached.of} cells")
            parts.append(duration(now - self._started))
            if (left := self._reached.remaining) is not None and left - (now - self._heard) > 1:
                parts.append(f"about {duration(left - (now - self._heard))} left")
        return ", ".join(parts)

    def _say(self, what: str) -> None:
        self._spoken = time.monotonic()
        print(f"[{self._told()}] {plain(what)}", file=sys.stderr, flush=True)

    def stopping(self, done: int, running: Sequence[str]) -> None:
        waits = (
            f"waiting for {', '.join(running)}; Ctrl-C again ends that" if running else "nothing is running"
        )
        told = f"stopping: {many(done, 'step')} done and kept, {waits}"
        if self._bar is not None:
            self._bar.console.print(told, markup=False, highlight=False)
        else:
            print(told, file=sys.stderr, flush=True)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _bar() -> Any:
    """A line for the grid and one for the steps that run, each as wide as the terminal."""
    from rich.console import Console, RenderableType
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar
    from rich.text import Text

    class Lines(Bar):
        def get_renderables(self) -> Iterable[RenderableType]:
            yield self.make_tasks_table(self.tasks)
            for task in self.tasks:
                yield Text(f"  {task.fields['steps']}", overflow="ellipsis", no_wrap=True)

    return Lines(
        BarColumn(18), TextColumn("{task.fields[told]}", markup=False),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip
