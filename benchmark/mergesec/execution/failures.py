"""What went wrong with a step: told in a line and in full, and kept beside the store until the step succeeds.

``<root>/failures/<key>.json`` holds what a step failed with. Nothing here names a place of this machine.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from traceback import TracebackException
from typing import NamedTuple

from mergesec.execution.store import UNREADABLE, is_plain, read_plain
from mergesec.files import write_atomic

LONGEST = 500
"""Letters of a message that a reason keeps; the traceback has them all."""


@dataclass(frozen=True)
class Failure:
    """A step that failed. ``trace`` is empty where there was nobody left to tell it, as after ``kill -9``."""

    key: str
    kind: str
    label: str
    reason: str
    trace: str = ""
    attempt: str = ""
    """Of which run it is, where several workers share one: none of them tries it again."""

    @property
    def blocks(self) -> str:
        """The reason of all that needs the step."""
        return f"needs {self.label}, which failed: {self.reason}"


class Failures:
    """The last failure of each step that did not succeed since."""

    def __init__(self, root: Path) -> None:
        self._folder = root / "failures"

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.json"

    def note(self, failure: Failure) -> None:
        """Keep it, in the place of an older one. Full if there is no room."""
        write_atomic(self._path(failure.key), json.dumps(asdict(failure)).encode())

    def clear(self, kind: str | None = None, older_than: float = 0.0) -> int:
        """Forget all, or those of one kind of step, that are older than some seconds; how many there were."""
        number = 0
        for failure in self:
            if kind in (None, failure.kind) and self.age(failure.key) >= older_than:
                self.forget(failure.key)
                number += 1
        return number

    def age(self, key: str) -> float:
        """Seconds since a step failed."""
        try:
            return time.time() - self._path(key).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def forget(self, key: str) -> None:
        """The step succeeded, or its failure is of no interest any more."""
        if is_plain(self._path(key)):
            self._path(key).unlink(missing_ok=True)

    def read(self, key: str) -> Failure | None:
        """What a step failed with last; None if it did not, or the file is unreadable."""
        try:
            failure = Failure(**json.loads(read_plain(self._path(key))))
        except UNREADABLE:
            return None
        return failure if all(isinstance(v, str) for v in vars(failure).values()) else None

    def of(self, keys: Collection[str]) -> Iterator[Failure]:
        """Those of some steps."""
        for path in sorted(self._folder.glob("*.json")):
            if path.stem in keys and (found := self.read(path.stem)):
                yield found

    def __iter__(self) -> Iterator[Failure]:
        for path in sorted(self._folder.glob("*.json")):
            if found := self.read(path.stem):
                yield found


# --------------------------------------------------------------------------- telling


class Explained(NamedTuple):
    """An error in words."""

    reason: str
    """``Type: message (file:line)``, on one line."""
    trace: str


def explain(error: BaseException, within: str = "", otherwise: str = "") -> Explained:
    """A reason of one line and the whole traceback, of whatever a component raised.

    The line is the innermost frame's; with ``within`` that of the innermost frame of this file, or
    ``otherwise`` if it has none. Even an error that cannot be told is told by its type: its own code runs here.
    """
    try:
        told = TracebackException.from_exception(error)
        _shorten(told)
        frames = [f for f in told.stack if not within or f.filename == within]
        spot = f"({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else otherwise
        message = portable(" ".join(str(told).split()))[:LONGEST]
        reason = f"{type(error).__name__}: {message} {spot}".rstrip()
        return Explained(reason, portable("".join(told.format())))
    except BaseException as second:
        return Explained(f"{type(error).__name__}: cannot be told ({type(second).__name__} while trying)", "")


def _shorten(told: TracebackException) -> None:
    """Files of frames, of causes and members too, relative to where Python finds modules."""
    for frame in told.stack:
        frame.filename = shown_file(frame.filename)
    if issubclass(told.exc_type, SyntaxError) and isinstance(told.filename, str):
        told.filename = shown_file(told.filename)
    for other in (told.__cause__, told.__context__, *(told.exceptions or ())):
        if other is not None:
            _shorten(other)


def shown_file(name: str) -> str:
    """A source file as its module is found: relative to the nearest entry of ``sys.path``, else its name."""
    path = Path(name)
    if not path.is_absolute():
        return name
    homes = [Path(entry) for entry in sys.path if entry and path.is_relative_to(entry)]
    nearest = max(homes, key=lambda home: len(home.parts), default=path.parent)
    return path.relative_to(nearest).as_posix()


def portable(text: str) -> str:
    """``text`` without this machine's folders, and without what no file or terminal takes."""
    known = dict.fromkeys(sys.path, "") | {str(Path.cwd()): "", str(Path.home()): "~/"}
    for place in sorted(known, key=len, reverse=True):
        if len(Path(place).parts) > 1:
            text = text.replace(place.rstrip("/") + "/", known[place])
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
