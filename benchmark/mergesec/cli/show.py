"""How verbs print: tables and boards that fit a terminal and stay readable in a pipe, prose, a bar for bytes."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from mergesec.files import plain

if TYPE_CHECKING:
    from mergesec.evidence.estimates import Board


PROSE = 100
"""Letters a line of prose has at most."""


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Aligned text; on a terminal what does not fit is folded inside its column, elsewhere lines are as long as
    they are."""
    rows = [[plain(str(cell)) for cell in r] for r in rows]
    if (width := terminal_width()) is not None:
        _table_on_terminal(title, header, rows, width)
        return
    widths = [max(len(str(r[i])) for r in [list(header), *rows]) for i in range(len(header))]
    if title:
        print(title)
    for row in [list(header), ["-" * w for w in widths], *rows]:
        print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())
    print()


def _table_on_terminal(title: str, header: Sequence[str], rows: Iterable[Sequence[str]], width: int) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(
        title=title or None, title_justify="left", title_style="bold", header_style="bold", box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0), pad_edge=False, show_edge=False,
    )  # fmt: skip
    for name in header:
        grid.add_column(Text(name), overflow="fold")
    for row in rows:
        grid.add_row(*map(Text, row))  # what stands in brackets is no markup
    Console(width=width).print(grid)
    print()


def boards(boards: Sequence[Board], columns: Sequence[str] = (), wide: bool = False) -> None:
    """Boards: on a terminal the columns that matter and fit, elsewhere all that reports show."""
    from mergesec.evidence.fitting import short_names
    from mergesec.evidence.labels import label_key
    from mergesec.evidence.tables import display

    width = terminal_width()
    brief = short_names(boards)
    for one in boards:
        if width is None and not (columns or wide):
            table(one.title, *display(one))
            prose(one.note)
        else:
            _board(one, width, brief, columns, wide)
        print()
    if columns or width is not None:
        for line in () if wide else label_key(brief):
            prose(line, hang=2)


def _board(
    board: Board, width: int | None, brief: Mapping[str, str], columns: Sequence[str], wide: bool
) -> None:
    from mergesec.evidence.fitting import fitted, header_lines

    found = fitted(board, width or sys.maxsize, brief, columns, wide)
    if found.blocks:
        _blocks(board.title, found.header, found.rows)
    else:
        widths = [max(map(len, texts), default=0) for texts in zip(*found.rows, strict=True)]
        names = ["\n".join(header_lines(n, max(w, 8))) for n, w in zip(found.header, widths, strict=True)]
        table(board.title, names if width else found.header, found.rows)
    prose(board.note)
    for line in found.told:
        prose(line, hang=2)


def _blocks(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """One block a row, one line a column."""
    prose(title)
    room = max(map(len, header), default=0)
    for row in rows:
        print()
        for name, text in zip(header, row, strict=True):
            prose(f"{name.ljust(room)}  {text}", hang=room + 2)
    print()


def prose(text: str, hang: int = 0) -> None:
    """Text in lines that break between words; ``hang``: how far further lines stand in."""
    width = min(terminal_width() or PROSE, PROSE)
    wrapped = textwrap.wrap(
        plain(text),
        width,
        subsequent_indent=" " * min(hang, width // 2),
        break_on_hyphens=False,
    )
    for line in wrapped:
        print(line)


def terminal_width() -> int | None:
    """Letters a line of the terminal has; None where the output goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


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
