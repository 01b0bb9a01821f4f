"""What a step printed, kept beside the store: ``<root>/logs/<key>.txt``, no longer than it is worth."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from mergesec.files import write_atomic

KEPT = 1 << 16
"""Bytes of the beginning, and of the end, that are kept."""


class Log:
    """Takes what a step prints; at the end it is a file, if anything was printed."""

    def __init__(self, root: Path, key: str) -> None:
        self._path = log_path(root, key)
        self._first, self._last, self._size = bytearray(), bytearray(), 0

    def write(self, text: bytes) -> None:
        self._size += len(text)
        room = KEPT - len(self._first)
        self._first += text[:room]
        self._last += text[max(room, 0) :]
        del self._last[:-KEPT]

    def close(self) -> None:
        """Write the file, in the place of an older one of the step. Full if there is no room."""
        left_out = self._size - len(self._first) - len(self._last)
        middle = f"\n... {left_out} bytes left out ...\n".encode() if left_out else b""
        if self._size:
            write_atomic(self._path, bytes(self._first) + middle + bytes(self._last))
        else:
            self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def log_path(root: Path, key: str) -> Path:
    """Where the log of a step lies, if it printed anything."""
    return root / "logs" / f"{key}.txt"


def read_log(root: Path, key: str) -> str:
    """What a step printed; empty if it printed nothing."""
    try:
        return log_path(root, key).read_bytes().decode(errors="replace")
    except OSError:
        return ""
