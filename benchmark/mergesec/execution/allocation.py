"""What the C library keeps of memory that was let go of. Changes where blocks lie, never what is computed."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

HEAVY = 256 << 20
"""Bytes of weights from which on memory counts for more than the time that fresh pages take."""
BLOCK = 1 << 20
"""Bytes from which on a block gets pages of its own while a heavy network is trained."""
USUAL = 32 << 20
"""The same at other times: where glibc's own threshold ends, which it raises as it meets larger blocks."""
_MMAP_THRESHOLD = -3
"""``M_MMAP_THRESHOLD`` of glibc's malloc.h."""


def _library() -> Any:
    """The C library, if it is asked as glibc is; else None: Windows has none of that name, others not the functions."""
    try:
        library = ctypes.CDLL(None)
        return library if library.mallopt and library.malloc_trim else None
    except (AttributeError, OSError, TypeError):
        return None


def trim() -> None:
    """Give back what the heap holds and nobody uses, where the C library is glibc."""
    if (library := _library()) is not None:
        library.malloc_trim(0)


@contextlib.contextmanager
def returned_blocks(wanted: bool = True) -> Iterator[None]:
    """Within, blocks of ``BLOCK`` bytes and more return to the system as soon as they are let go of, where the C library
    is glibc. By itself it puts matrices, gradients, moments and the activations of a batch into one heap, whose holes
    stay: 0.5 GiB at 135 million parameters. Costs the time that fresh pages take, so only what is ``wanted``."""
    library = _library() if wanted else None
    if library is None:
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, BLOCK)
    library.malloc_trim(0)
    try:
        yield
    finally:
        library.mallopt(_MMAP_THRESHOLD, USUAL)
        library.malloc_trim(0)
