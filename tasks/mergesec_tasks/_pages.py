"""What the pages of a parquet file say that they unpack to.

The file's summary says it too, but what is allocated is what each page's own header names. Headers are Thrift in
its compact protocol: https://github.com/apache/parquet-format, https://github.com/apache/thrift.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import NamedTuple

STOP, TRUE, FALSE, BYTE, DOUBLE, BINARY, LIST, SET, STRUCT = 0, 1, 2, 3, 7, 8, 9, 10, 12
INTEGERS = (4, 5, 6)
UNCOMPRESSED, COMPRESSED = 2, 3
"""Numbers of the two fields of a page's header."""
DEEPEST = 8


class Chunk(NamedTuple):
    """Where the pages of a column begin and end."""

    start: int
    end: int


def unpacked(path: Path, chunks: list[Chunk]) -> int:
    """Bytes that the pages of ``chunks`` unpack to; pages after one that cannot be understood do not count.

    Columns lie beside each other, so no more bytes are walked over than the file has.
    """
    if not chunks or path.stat().st_size == 0:
        return 0
    total, left = 0, path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for chunk in chunks:
            place = chunk.start
            while 0 <= place < min(chunk.end, len(data)) and left > 0:
                begin = place
                try:
                    place, sizes = _integers(data, place)
                    total += max(sizes[UNCOMPRESSED], 0)
                    place += max(sizes[COMPRESSED], 0)
                except (LookupError, ValueError):
                    return total
                left -= place - begin
    return total


def _integers(data: mmap.mmap, place: int, depth: int = 0) -> tuple[int, dict[int, int]]:
    """Whole numbers of a struct by number of their field, and where it ends."""
    found: dict[int, int] = {}
    number = 0
    while (head := data[place]) != STOP:
        place, kind, step = place + 1, head & 15, head >> 4
        if step:
            number += step
        else:
            place, number = _varint(data, place)
        if kind in INTEGERS:
            place, found[number] = _varint(data, place)
        else:
            place = _after(data, place, kind, depth)
    return place + 1, found


def _varint(data: mmap.mmap, place: int) -> tuple[int, int]:
    """A zigzag number, and where it ends."""
    place, value = _unsigned(data, place)
    return place, (value >> 1) ^ -(value & 1)


def _unsigned(data: mmap.mmap, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return place, value
    raise ValueError("a number of more than 64 bits")


def _after(data: mmap.mmap, place: int, kind: int, depth: int, item: bool = False) -> int:
    """Where a value that is not looked at ends. ValueError for kinds that no page's header has."""
    if depth > DEEPEST:
        raise ValueError("nested too deep")
    if kind in (TRUE, FALSE):
        return place + item  # in a struct the value is its own kind
    if kind in INTEGERS:
        return _unsigned(data, place)[0]
    if kind in (BYTE, DOUBLE):
        return place + (1 if kind == BYTE else 8)
    if kind == BINARY:
        place, length = _unsigned(data, place)
        return place + length
    if kind == STRUCT:
        return _integers(data, place, depth + 1)[0]
    if kind in (LIST, SET):
        head = data[place]
        place, count = (place + 1, head >> 4) if head >> 4 < 15 else _unsigned(data, place + 1)
        for _ in range(min(count, len(data))):
            place = _after(data, place, head & 15, depth + 1, item=True)
        return place
    raise ValueError(f"a value of kind {kind}")
