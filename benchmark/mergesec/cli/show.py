"""How verbs print: tables that stay readable in a pipe, and progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from mergesec.files import plain

if TYPE_CHECKING:
    from mergesec.execution.engines.worker import Answer
    from mergesec.planning.plan import Step


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A rich table on a terminal, aligned plain text elsewhere."""
    rows = [[plain(str(cell)) for cell in r] for r in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        grid = Table(title=title or None, title_justify="left", header_style="bold")
        for name in header:
            grid.add_column(name)
        for row in rows:
            grid.add_row(*map(Text, row))  # what stands in brackets is no markup
        Console().print(grid)
        return
    widths = [max(len(str(r[i])) for r in [list(header), *rows]) for i in range(len(header))]
    if title:
        print(title)
    for row in [list(header), ["-" * w for w in widths], *rows]:
        print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())
    print()


def duration(seconds: float) -> str:
    """``1h02m``, ``3m20s`` or ``4.2s``."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def many(count: int, thing: str) -> str:
    """``1 cell``, ``2 cells``."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


class Progress:
    """A live bar on a terminal; elsewhere one plain line per step that took a while, or failed."""

    def __init__(self) -> None:
        self._total = self._done = 0
        self._started = self._spoken = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                BarColumn(30), MofNCompleteColumn(), TextColumn("{task.description}", markup=False),
                console=Console(stderr=True), transient=True,
            )  # fmt: skip

    def start(self, total: int, cached: int) -> None:
        self._total = total
        print(f"{many(total, 'step')} to run, {cached} in the store", file=sys.stderr)
        if self._bar is not None:
            self._task = self._bar.add_task("", total=total)
            self._bar.start()

    def running(self, labels: Iterable[str]) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=" | ".join(labels)[:90])
        elif time.monotonic() - self._spoken > 60:
            self._spoken = time.monotonic()
            elapsed = duration(self._spoken - self._started)
            print(f"[{self._done}/{self._total} {elapsed}] {' | '.join(labels)}", file=sys.stderr, flush=True)

    def finished(self, step: Step, answer: Answer, remaining_seconds: float) -> None:
        self._done += 1
        bad = answer.status != "ok"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, total=max(self._total, self._done))
            if bad:
                told = f"failed {step.label}: {answer.message}"
                self._bar.console.print(told, markup=False, highlight=False, style="red")
        elif bad or answer.seconds > 5 or time.monotonic() - self._spoken > 15:
            self._spoken = time.monotonic()
            what = f"failed: {answer.message}" if bad else duration(answer.seconds)
            elapsed = duration(time.monotonic() - self._started)
            left = f", about {duration(remaining_seconds)} left" if remaining_seconds > 1 else ""
            print(
                f"[{self._done}/{self._total} {elapsed}{left}] {step.label}: {what}",
                file=sys.stderr,
                flush=True,
            )

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


class ByteBar:
    """How far a merge of files is: a bar with the time left on a terminal, a line now and then elsewhere.

    Before anything is written, a method may look at all tensors (several times); then the bar shows
    how far the present look is.
    """

    def __init__(self, total: int) -> None:
        self._total = max(total, 1)
        self._started = self._spoken = time.monotonic()
        self._writing = False
        self._bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"), BarColumn(30), TaskProgressColumn(),
                TimeRemainingColumn(compact=True), console=Console(stderr=True), transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task("looking", total=self._total)
            self._bar.start()

    def look(self, position: int) -> None:
        """A tensor that ends at byte ``position`` of the base is looked at."""
        if self._bar is not None and not self._writing:
            self._bar.update(self._task, completed=position)

    def wrote(self, done: int) -> None:
        """``done`` bytes are written."""
        now = time.monotonic()
        if not self._writing:
            self._writing = True
            self._began = now
            if self._bar is not None:
                self._bar.reset(self._task, description="merging", total=self._total)
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
        elif now - self._spoken > 15:
            self._spoken = now
            left = (now - self._began) * (self._total - done) / max(done, 1)
            share = f"{100 * done / self._total:.0f} % merged"
            print(
                f"[{duration(now - self._started)}] {share}, about {duration(left)} left",
                file=sys.stderr,
                flush=True,
            )

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
