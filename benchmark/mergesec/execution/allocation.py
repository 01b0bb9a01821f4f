"""What the C library keeps of memory that was let go of. Changes where blocks lie, never what is computed."""

from __future__ import annotations

import ctypes

HEAVY = 256 << 20
"""Bytes of an artifact from which on memory counts for more than the time that fresh pages take."""
BLOCK = 1 << 20
"""Bytes from which on a block gets pages of its own."""
_MMAP_THRESHOLD = -3
"""``M_MMAP_THRESHOLD`` of glibc's malloc.h."""


def give_back_blocks() -> bool:
    """From now on blocks of ``BLOCK`` bytes and more return to the system when this process lets go of them, and what
    the heap holds unused returns at once. Whether the C library can: glibc does, others are left as they are.

    glibc raises its own threshold to 32 MiB as it meets blocks of that size. A network's matrices, its gradients and
    the activations of a batch then share one heap, whose holes stay resident: 0.5 GiB at 135 million parameters.
    """
    try:
        library = ctypes.CDLL(None)
        done = bool(library.mallopt(_MMAP_THRESHOLD, BLOCK))
        library.malloc_trim(0)
    except (
        AttributeError,
        OSError,
        TypeError,
    ):  # Windows has no library of that name, others not these functions
        return False
    return done
