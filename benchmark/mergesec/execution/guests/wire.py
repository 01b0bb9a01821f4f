"""Messages between a worker and its guests: JSON over a socket, tensors beside it as an anonymous file.

Nothing that a guest sends is unpickled, and what it sends is copied before it is looked at.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
import struct
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

from mergesec.execution.store import Blob, parts_of

LONGEST = 1 << 26
"""Bytes of one JSON message."""
_HEAD = struct.Struct("<Q")


class Message(NamedTuple):
    """What was said, and the file that came with it (-1: none); whoever receives it closes it."""

    said: dict[str, Any]
    file: int = -1


class Ended(EOFError):
    """Nobody is at the other end any more."""


class Garbled(ValueError):
    """What came is no message."""


def sheet(data: Blob | memoryview | mmap.mmap) -> int:
    """A file without a name that holds ``data``; where the system can, nobody may change it any more."""
    if not hasattr(os, "memfd_create"):
        with tempfile.TemporaryFile() as file:
            file.writelines(parts_of(data))
            file.flush()
            return os.dup(file.fileno())
    import fcntl

    number = os.memfd_create("mergesec", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    for part in parts_of(data):
        view = memoryview(part)
        while view:
            view = view[os.write(number, view) :]
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(number, fcntl.F_ADD_SEALS, seals)
    return number


def copied(file: int) -> bytes:
    """All bytes of a file that somebody else may still be writing to; it is closed."""
    with os.fdopen(file, "rb") as source:
        source.seek(0)
        return source.read()


def mapped(file: int) -> mmap.mmap:
    """A file as private memory: what is written to it stays here; it is closed."""
    try:
        return mmap.mmap(file, 0, access=mmap.ACCESS_COPY)
    finally:
        os.close(file)


def send(line: socket.socket, said: Mapping[str, Any], file: int = -1) -> None:
    """Say something, with a file beside it. Ended if nobody listens."""
    text = json.dumps(said).encode()
    try:
        socket.send_fds(line, [_HEAD.pack(len(text))], [file] if file >= 0 else [])
        line.sendall(text)
    except OSError as error:
        raise Ended(str(error)) from None


def receive(line: socket.socket) -> Message:
    """The next message. Ended if there is none, Garbled if it is not JSON of an object."""
    file = -1
    try:
        head, files, _, _ = socket.recv_fds(line, _HEAD.size, 1, socket.MSG_WAITALL)
        file = files[0] if files else -1
        if len(head) < _HEAD.size:
            raise Ended("the other end is gone")
        size = _HEAD.unpack(head)[0]
        if size > LONGEST:
            raise Garbled(f"a message of {size} bytes")
        said = json.loads(_exactly(line, size))
        if not isinstance(said, dict):
            raise Garbled(f"a message that is a {type(said).__name__}")
        return Message(said, file)
    except BaseException as error:
        if file >= 0:
            with contextlib.suppress(OSError):
                os.close(file)
        if isinstance(error, Ended | Garbled):
            raise
        if isinstance(error, OSError):
            raise Ended(str(error)) from None
        if isinstance(error, ValueError | RecursionError):
            raise Garbled(str(error)) from None
        raise


def _exactly(line: socket.socket, size: int) -> bytes:
    """``size`` bytes. Ended if fewer come."""
    parts, left = [], size
    while left:
        part = line.recv(min(left, 1 << 20))
        if not part:
            raise Ended("the other end is gone")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
