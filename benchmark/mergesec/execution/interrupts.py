"""Ctrl-C: counted the moment it comes, whatever the code that it falls into makes of it.

A KeyboardInterrupt may be raised anywhere, in a library's import or in a finalizer too, and come out as another
error or not at all. So whoever has to know asks for ``EAR.heard``; and where work must not be torn apart,
nothing is raised but in the places made for it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

PATIENCE = 1.5
"""Seconds between a second Ctrl-C and the end of the process, whatever it is at."""
_T = TypeVar("_T")


class Ear:
    """The handler of Ctrl-C."""

    def __init__(self) -> None:
        self.heard = 0
        """How often Ctrl-C was pressed since somebody began to listen."""
        self._held = False
        self._open = False

    def __call__(self, signum: int, frame: Any) -> None:
        self.heard += 1
        if not self._held or self._open:
            self._open = False
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Hear Ctrl-C, in the main thread of a process that does not ignore it; inside another one, go on."""
        handler = signal.getsignal(signal.SIGINT)
        if not _in_main_thread() or handler is self:
            yield
            return
        self.heard = (
            0  # what an earlier listener heard is nothing to this one, though it may hear nothing itself
        )
        if handler in (None, signal.SIG_IGN):
            yield
            return
        before = signal.signal(signal.SIGINT, self)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside nothing is raised, except in ``rest``."""
        before, self._held = self._held, self._held or _in_main_thread()
        try:
            yield
        finally:
            self._held = before

    def rest(self, waits: Callable[[], _T], noticed: int) -> _T | None:
        """What ``waits`` returns; None at once if Ctrl-C comes meanwhile, or came after ``noticed`` of them."""
        try:
            self._open = True
            found = None if self.heard > noticed else waits()
            self._open = False
        except KeyboardInterrupt:
            return None
        return found


EAR = Ear()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def impatient(last_words: str) -> Iterator[None]:
    """A second Ctrl-C ends the process with code 130 within ``PATIENCE`` seconds, whatever it is at.

    The system writes each signal into a pipe the moment it comes, where a thread waits for it: the main one
    may be busy for long.
    """
    if not _in_main_thread():
        yield
        return
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    watching = threading.Thread(target=_watch, args=(ours, last_words), daemon=True)
    watching.start()
    before = signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(theirs)  # ends the thread
        watching.join()
        os.close(ours)


def _watch(pipe: int, last_words: str) -> None:
    """Reads signals until the pipe ends; from the second Ctrl-C on, not for long."""
    pressed, end = 0, None
    while True:
        left = None if end is None else max(0.0, end - time.monotonic())
        if not select.select([pipe], [], [], left)[0]:
            with contextlib.suppress(OSError):
                os.write(2, f"{last_words}\n".encode())
            os._exit(130)
        said = os.read(pipe, 64)
        if not said:
            return
        pressed += said.count(signal.SIGINT)
        if pressed >= 2 and end is None:
            end = time.monotonic() + PATIENCE
