"""Safetensors files read one tensor at a time, mapped: names, shapes and types are known without the data.

``open_weights`` maps one tensor of a file at a time and lets go of it with the tensor. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mergesec.contracts import ContractError
from mergesec.errors import UsageError
from mergesec.weights import DTYPES

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


# --------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Extent:
    """Where a tensor lies: file, position of its first byte there, type and shape."""

    file: Path
    stamp: tuple[int, int, int]
    """Inode, size and time of the file when it was opened."""
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor, mapped: pages come in as they are looked at and go when the tensor does."""
        if not self.size:
            return torch.empty(self.shape, dtype=self.dtype)
        skip = self.start % mmap.ALLOCATIONGRANULARITY
        with self.file.open("rb") as handle:
            if _stamp(handle.fileno()) != self.stamp:
                raise ContractError(f"{self.file} changed while it was being read")
            # a private mapping: the file stays as it is whatever is done to the tensor
            view = mmap.mmap(
                handle.fileno(), skip + self.size, access=mmap.ACCESS_COPY, offset=self.start - skip
            )
        if hasattr(mmap, "MADV_SEQUENTIAL"):  # read ahead further where it comes from a disk
            view.madvise(mmap.MADV_SEQUENTIAL)
        count = math.prod(self.shape)
        return torch.frombuffer(view, dtype=self.dtype, count=count, offset=skip).view(self.shape)


def _stamp(file: Path | int) -> tuple[int, int, int]:
    found = os.stat(file)
    return found.st_ino, found.st_size, found.st_mtime_ns


class LazyWeights(Mapping[str, Tensor]):
    """Weights in safetensors files. Every access maps the tensor anew; names, shapes and types are
    known without reading data. The order is the one in which the tensors lie in the files."""

    lazy = True
    """No two names share memory (see ``weights.owners``)."""

    def __init__(self, extents: Mapping[str, Extent], metadata: Mapping[str, str]) -> None:
        self.extents = dict(extents)
        self.metadata = dict(metadata)
        self.watch: Callable[[str], None] | None = None
        """Told each name that is asked for (to show progress)."""

    def __getitem__(self, name: str) -> Tensor:
        extent = self.extents[name]
        if self.watch is not None:
            self.watch(name)
        return extent.read()

    def __contains__(self, name: object) -> bool:
        return name in self.extents

    def __iter__(self) -> Iterator[str]:
        return iter(self.extents)

    def __len__(self) -> int:
        return len(self.extents)

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(extent.size for extent in self.extents.values())


def open_weights(path: Path, field: str) -> LazyWeights:
    """A safetensors file, or a folder with ``model.safetensors`` or its index and shards.

    UsageError naming ``field`` if there is none, it is damaged, or it is a pickle.
    """
    if path.suffix.lower() in PICKLES:
        raise UsageError(
            field, f"{path} is a pickle, which can run code when read; convert it to safetensors"
        )
    if path.is_file():
        if path.name.endswith(".index.json"):
            return _open_index(path, field)
        return LazyWeights(*_open_file(path, field))
    if not path.is_dir():
        raise UsageError(field, f"no file or folder {str(path)!r}")
    if (path / INDEX).is_file():
        return _open_index(path / INDEX, field)
    if (path / SINGLE).is_file():
        return LazyWeights(*_open_file(path / SINGLE, field))
    alone = sorted(path.glob("*.safetensors"))
    if len(alone) == 1:
        return LazyWeights(*_open_file(alone[0], field))
    if any(file.suffix in PICKLES for file in path.iterdir()):
        raise UsageError(field, f"{path} holds only pickles, which can run code; convert them to safetensors")
    raise UsageError(field, f"{path} has neither {SINGLE} nor {INDEX}")


def _open_file(path: Path, field: str) -> tuple[dict[str, Extent], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as checked:  # names, types, offsets and length fit
            metadata = dict(checked.metadata() or {})
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(length))
    except (SafetensorError, ValueError, OSError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ") or "unreadable"
        raise UsageError(field, f"{path} is not a whole safetensors file ({reason})") from None
    stamp = _stamp(path)
    extents = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise UsageError(
                field, f"{path}: tensor {name!r} has type {entry['dtype']}, which cannot be merged"
            )
        start = 8 + length + entry["data_offsets"][0]
        extents[name] = Extent(path, stamp, start, DTYPES[entry["dtype"]], tuple(entry["shape"]))
    ordered = sorted(extents.items(), key=lambda item: (item[1].start, item[0]))
    return dict(ordered), metadata


def _open_index(path: Path, field: str) -> LazyWeights:
    try:
        listed = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, TypeError, KeyError):
        raise UsageError(field, f"{path} is not an index of safetensors files") from None
    extents: dict[str, Extent] = {}
    metadata: dict[str, str] = {}
    for shard in sorted(set(map(str, listed.values()))):
        file = path.parent / shard
        if Path(shard).name != shard or not file.is_file():
            raise UsageError(field, f"{path} names a file {shard!r} that is not beside it")
        found, more = _open_file(file, field)
        metadata.update(more)
        extents.update((name, extent) for name, extent in found.items() if listed.get(name) == shard)
    lost = [name for name in listed if name not in extents]
    if lost:
        raise UsageError(
            field, f"{path.parent / listed[lost[0]]}: tensor {lost[0]!r} of the index is missing"
        )
    return LazyWeights(extents, metadata)
