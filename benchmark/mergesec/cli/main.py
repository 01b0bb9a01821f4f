"""``bench``: what surrounds every verb: how text leaves, how errors are told, what Ctrl-C means."""

from __future__ import annotations

import atexit
import contextlib
import errno
import io
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

from mergesec.execution.interrupts import EAR, impatient


def main() -> None:
    """Entry point. Exit code 0 = all done, 1 = some cells failed, 2 = bad input, 130 = interrupted."""
    told = "interrupted"
    if sys.argv[1:2] == ["run"]:
        told += "; the same command goes on from here"
    try:
        with EAR.listening(), impatient(told), _no_word_of_finalizers():
            # then there is nothing left to interrupt
            atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
            _answer(told)
    except KeyboardInterrupt:  # once more, while it was being answered
        sys.exit(130)


def _answer(told: str) -> None:
    """The verb, and how it ended."""
    try:
        _call()
    except BaseException as error:
        # after Ctrl-C an error is whatever a library made of it; what came to its end is done all the same
        if EAR.heard and not (isinstance(error, SystemExit) and error.code in (None, 0)):
            print(told, file=sys.stderr)
            sys.exit(130)
        _end(error)


@contextlib.contextmanager
def _no_word_of_finalizers() -> Iterator[None]:
    """Ctrl-C that falls into a finalizer is heard all the same; nobody wants to read where it fell."""
    before = sys.unraisablehook
    sys.unraisablehook = lambda what: None if what.exc_type is KeyboardInterrupt else before(what)
    try:
        yield
    finally:
        sys.unraisablehook = before


def _call() -> None:
    """The verb, imported when Ctrl-C is heard already."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # a terminal that knows fewer letters is no error
    verb, *words = sys.argv[1:] or [""]
    if verb == "list" and len(words) < 2 and not any(word.startswith("-") for word in words):
        from mergesec.cli.listing import print_list

        print_list(*words)  # no options: their parser would take longer than the list
    else:
        from mergesec.cli.app import app

        app(prog_name="bench")


def _end(error: BaseException) -> NoReturn:
    """Errors that a user can mend are a message and code 2; others are raised."""
    if isinstance(error, SystemExit):
        raise error
    from mergesec.errors import UsageError
    from mergesec.files import Full, brief, plain

    if isinstance(error, BrokenPipeError):
        sys.exit(0)
    unwritable = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
    nowhere = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)  # names that no place can have
    if isinstance(error, UsageError | Full):
        told = str(error)
    elif isinstance(error, OSError) and error.errno in unwritable:
        told = f"{error.filename or 'disk'}: {error.strerror}"
    elif isinstance(error, OSError) and error.errno in nowhere and error.filename is not None:
        told = f"{_given(str(error.filename))}: {brief(str(error.filename))!r}: {error.strerror}"
    else:
        raise error
    for line in told.splitlines():
        print(f"error: {plain(line)}", file=sys.stderr)
    sys.exit(2)


def _given(path: str) -> str:
    """The option or argument that a path was given by, as far as the words tell."""
    words = sys.argv[2:]
    options = [word.partition("=") if word.startswith("--") else (before, "", word)
               for before, word in zip(["", *words], words, strict=False)]  # fmt: skip
    given = [(name if name.startswith("--") else "argument", value) for name, _, value in options if value]
    begins = [name for name, value in given if path.startswith(value)]
    holds = [name for name, value in given if value in path.split("/")]
    return [*begins, *holds, "path"][0]
