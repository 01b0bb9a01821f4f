"""Safetensors files read one tensor at a time, mapped: names, shapes and types are known without the data.

What a file holds is asked of safetensors itself, so that both read the same or nothing. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mergesec.contracts import ContractError
from mergesec.errors import UsageError
from mergesec.files import brief, uncollected
from mergesec.weights import DTYPES

NEAR = 1 << 20
"""Bytes read at once where small tensors lie."""
SMALL = 1 << 16
"""Tensors of at most so many bytes are read with those behind them: a mapping of its own costs more."""


@dataclass(frozen=True)
class Extent:
    """Where a tensor lies: file, position of its first byte there, type and shape."""

    file: Path
    stamp: tuple[int, int, int]
    """Inode, size and time of the file when it was opened."""
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    size: int = field(init=False, repr=False, compare=False)
    """Bytes."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", math.prod(self.shape) * self.dtype.itemsize)

    @property
    def small(self) -> bool:
        """Whether it is read together with what lies behind it."""
        return 0 < self.size <= SMALL

    def read(self) -> Tensor:
        """The tensor, mapped: pages come in as they are looked at and go when the tensor does."""
        if not self.size:
            return torch.empty(0, dtype=self.dtype).reshape(self.shape)
        skip = self.start % mmap.ALLOCATIONGRANULARITY
        with self.opened() as handle:
            # a private mapping: the file stays as it is whatever is done to the tensor
            view = mmap.mmap(
                handle.fileno(), skip + self.size, access=mmap.ACCESS_COPY, offset=self.start - skip
            )
        if hasattr(mmap, "MADV_SEQUENTIAL"):  # read ahead further where it comes from a disk
            view.madvise(mmap.MADV_SEQUENTIAL)
        return self.view(view, skip)

    def view(self, memory: mmap.mmap | bytearray, offset: int) -> Tensor:
        """The tensor in memory that holds it."""
        flat = torch.frombuffer(
            memory, dtype=self.dtype, count=self.size // self.dtype.itemsize, offset=offset
        )
        return flat if len(self.shape) == 1 else flat.view(self.shape)

    def stretch(self) -> bytearray:
        """The file from the tensor's first byte on, as far as one read goes."""
        with self.opened() as handle:
            return bytearray(os.pread(handle.fileno(), max(NEAR, self.size), self.start))

    @contextlib.contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """ContractError unless the file is the one that was opened first."""
        try:
            with self.file.open("rb") as handle:
                if _stamp(handle.fileno()) != self.stamp:
                    raise ContractError(f"{self.file} changed while it was being read")
                yield handle
        except OSError as error:
            raise ContractError(f"{self.file} changed while it was being read ({error.strerror})") from None


@dataclass(frozen=True)
class Changed(Extent):
    """A tensor of a file as somebody's factors change it, made anew at every look; float32."""

    change: Callable[[Tensor], Tensor] = field(kw_only=True)

    @classmethod
    def of(cls, extent: Extent, change: Callable[[Tensor], Tensor]) -> Changed:
        return cls(extent.file, extent.stamp, extent.start, extent.dtype, extent.shape, change=change)

    def read(self) -> Tensor:
        """The changed tensor."""
        return self.change(super().read())


def _stamp(file: Path | int) -> tuple[int, int, int]:
    found = os.stat(file)
    return found.st_ino, found.st_size, found.st_mtime_ns


class LazyWeights(Mapping[str, Tensor]):
    """Weights in safetensors files. Every access maps the tensor anew, or copies it out of a stretch of the file if
    it is small; names, shapes and types are known without reading data. The order is the one in which the tensors
    lie in the files."""

    lazy = True
    """No two names share memory (see ``weights.owners``)."""

    def __init__(
        self,
        extents: Mapping[str, Extent],
        metadata: Mapping[str, str],
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.extents = dict(extents)
        self.metadata = dict(metadata)
        self.config = dict(config or {})
        """What the config.json beside the files says."""
        self.watch: Callable[[str], None] | None = None
        """Told each name that is asked for (to show progress)."""
        self._near: dict[Path, tuple[int, bytearray]] = {}
        """Of each file the stretch that was read last, and where it begins."""

    def __getitem__(self, name: str) -> Tensor:
        extent = self.extents[name]
        if self.watch is not None:
            self.watch(name)
        return self._small(extent) if type(extent) is Extent and extent.small else extent.read()

    def _small(self, extent: Extent) -> Tensor:
        begin, stretch = self._near.get(extent.file, (extent.start, bytearray()))
        if not begin <= extent.start <= begin + len(stretch) - extent.size:
            begin, stretch = self._near[extent.file] = extent.start, extent.stretch()
        return extent.view(stretch, extent.start - begin).clone()

    def run(self, names: Sequence[str]) -> Tensor | None:
        """Small tensors of one type that lie one behind the other in a file, as one flat tensor that is read at
        once; None if they are something else."""
        first = self.extents[names[0]]
        end = first.start
        for name in names:
            extent = self.extents[name]
            if extent.start != end or extent.dtype is not first.dtype or extent.file is not first.file:
                return None
            if type(extent) is not Extent or not extent.small:
                return None
            end += extent.size
        if self.watch is not None:
            for name in names:
                self.watch(name)
        with first.opened() as handle:
            held = bytearray(os.pread(handle.fileno(), end - first.start, first.start))
        return torch.frombuffer(held, dtype=first.dtype)

    def __contains__(self, name: object) -> bool:
        return name in self.extents

    def __iter__(self) -> Iterator[str]:
        return iter(self.extents)

    def __len__(self) -> int:
        return len(self.extents)

    def check_unchanged(self) -> None:
        """ContractError if a file is no longer the one that was opened."""
        for extent in {extent.file: extent for extent in self.extents.values()}.values():
            with extent.opened():
                pass

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(extent.size for extent in self.extents.values())


@uncollected()
def read_file(path: Path, field: str) -> LazyWeights:
    """The tensors of one file. UsageError naming ``field`` where safetensors reads it no more than we can."""
    try:
        stamp = _stamp(path)
        with safe_open(path, framework="pt") as stored:  # names, types, offsets and length fit
            metadata = dict(stored.metadata() or {})
            found = [(name, stored.get_slice(name)) for name in stored.offset_keys()]
            layout = [(name, part.get_dtype(), tuple(part.get_shape())) for name, part in found]
        with path.open("rb") as handle:
            start = 8 + int.from_bytes(handle.read(8), "little")
    except (SafetensorError, ValueError, OSError) as error:
        reason = brief(str(error).removeprefix("Error while deserializing header: "))
        raise UsageError(
            field, f"{path} is not a whole safetensors file ({reason or 'unreadable'})"
        ) from None
    extents: dict[str, Extent] = {}
    for name, dtype, shape in layout:
        if dtype not in DTYPES:
            raise UsageError(
                field, f"{path}: tensor {brief(name)!r} has type {dtype}, which cannot be merged"
            )
        if not _fits(shape):
            raise UsageError(field, f"{path}: tensor {brief(name)!r} has the shape {brief(str(list(shape)))}")
        extents[name] = Extent(path, stamp, start, DTYPES[dtype], shape)
        start += extents[name].size  # safetensors holds them in this order and without gaps
    ordered = sorted(extents.items(), key=lambda item: (item[1].start, item[0]))
    return LazyWeights(dict(ordered), metadata)


def _fits(shape: tuple[int, ...]) -> bool:
    """Whether torch can hold a tensor of this shape: one without entries may still have a side that is too long."""
    try:
        return bool(math.prod(shape)) or torch.empty(0).reshape(shape).numel() == 0
    except (RuntimeError, TypeError, OverflowError):
        return False
