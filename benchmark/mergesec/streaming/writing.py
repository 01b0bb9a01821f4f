"""Safetensors files written tensor by tensor, whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mergesec.contracts import ContractError
from mergesec.files import Full, sync_folder
from mergesec.modelfiles import placed
from mergesec.streaming.mapped import Extent, LazyWeights
from mergesec.streaming.reading import SINGLE
from mergesec.tensorwise import BLOCK
from mergesec.weights import DTYPE_NAMES, mergeable

SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")
"""Names of the files that an index in a folder lists."""
HEADER = 100_000_000
"""Bytes of the longest header that safetensors reads."""


@dataclass(frozen=True)
class _Shard:
    name: str
    """File name under which it is published."""
    starts: Mapping[str, int]
    header: bytes
    size: int


def _shard(file: str, tensors: Mapping[str, Extent], metadata: Mapping[str, str]) -> _Shard:
    """Layout of one file: large element types first, so that every tensor is aligned."""
    order = sorted(tensors.items(), key=lambda entry: -entry[1].dtype.itemsize)
    head, starts, size = placed(
        [(name, DTYPE_NAMES[extent.dtype], extent.shape, extent.size) for name, extent in order], metadata
    )
    first = len(head)
    if first - 8 > HEADER:
        raise ContractError(
            f"the names of {len(tensors)} tensors and the metadata fill {first - 8} bytes; use shards"
        )
    return _Shard(file, {n: first + s for n, s in starts.items()}, head, first + size)


def _shards(like: LazyWeights, single: str, limit: int | None, metadata: Mapping[str, str]) -> list[_Shard]:
    """Files of at most ``limit`` bytes of tensors (a larger tensor has a file of its own)."""
    groups: list[dict[str, Extent]] = [{}]
    filled = 0
    for name, extent in like.extents.items():
        if limit is not None and groups[-1] and filled + extent.size > limit:
            groups.append({})
            filled = 0
        groups[-1][name] = extent
        filled += extent.size
    if len(groups) == 1:
        return [_shard(single, groups[0], metadata)]
    stem = single.removesuffix(".safetensors")
    total = len(groups)
    return [_shard(f"{stem}-{i:05}-of-{total:05}.safetensors", g, metadata) for i, g in enumerate(groups, 1)]


class Writer:
    """Files that hold the names, types and shapes of ``like``; they get their names in ``commit``.

    Use it as a context: leaving without ``commit`` removes what was written. Full if there is no room.
    """

    def __init__(
        self, out: Path, like: LazyWeights, metadata: Mapping[str, str], shard_size: int | None = None
    ) -> None:
        self.folder, single = (out.parent, out.name) if out.suffix == ".safetensors" else (out, SINGLE)
        self.like = like
        self.shards = _shards(like, single, shard_size, metadata)
        self.waiting = set(like)
        self._home = {name: i for i, shard in enumerate(self.shards) for name in shard.starts}
        self._handles: list[int] = []

    def __enter__(self) -> Writer:
        self._temporary = Path(tempfile.mkdtemp(dir=self.folder, prefix=".tmp-merge-"))
        try:
            for shard in self.shards:
                path = self._temporary / shard.name
                self._handles.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
                _reserve(self._handles[-1], shard.size)
                _write(self._handles[-1], shard.header, 0)
        except BaseException as error:
            self.__exit__()
            raise _no_room(error) from None
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            os.close(handle)
        self._handles.clear()
        for path in [*self._temporary.iterdir(), self._temporary]:
            path.rmdir() if path.is_dir() else path.unlink()

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor. ContractError if it is not the one that was announced, or not finite."""
        extent = self.like.extents[name]
        if tensor.dtype != extent.dtype or tuple(tensor.shape) != extent.shape:
            raise ContractError(f"'{name}' came out as {tensor.dtype} {list(tensor.shape)}")
        if mergeable(tensor) and not finite(tensor):
            raise ContractError(f"'{name}' came out with values that are not finite")
        self.waiting.discard(name)
        if extent.size:
            index = self._home[name]
            flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
            try:
                _write(self._handles[index], flat.numpy().data, self.shards[index].starts[name])
            except OSError as error:
                raise _no_room(error) from None

    def commit(self, stale: Sequence[Path] = ()) -> list[Path]:
        """Flush, read the headers back, rename into place, and remove what is ``stale``; the published files.

        The index comes last. Where shards of an earlier result would be replaced under its index, that one goes
        first: stopped at any moment this leaves the old model, the new one, or none, and never parts of both.
        """
        if self.waiting:
            raise ContractError(f"'{min(self.waiting)}' was never written")
        for handle, shard in zip(self._handles, self.shards, strict=True):
            os.fsync(handle)
            with safe_open(self._temporary / shard.name, framework="pt") as written:
                if set(written.keys()) != set(shard.starts):
                    raise ContractError(f"{shard.name} did not read back as written")
        names = [shard.name for shard in self.shards]
        if len(names) > 1:
            names.append(self._index())
        files = [self.folder / name for name in names]
        for path in stale if len(names) > 1 else ():
            if path.suffix == ".json":
                path.unlink()
                sync_folder(self.folder)
        for path in files:
            os.replace(self._temporary / path.name, path)
            sync_folder(self.folder)
        for path in sorted(set(stale) - set(files)):
            path.unlink(missing_ok=True)
        sync_folder(self.folder)
        return files

    def _index(self) -> str:
        owned = {name: shard.name for shard in self.shards for name in shard.starts}
        index = {
            "metadata": {"total_size": self.like.size},
            "weight_map": {name: owned[name] for name in self.like},
        }
        name = f"{self.shards[0].name.rsplit('-', 3)[0]}.safetensors.index.json"
        with (self._temporary / name).open("w", encoding="utf-8") as file:
            file.write(json.dumps(index, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return name


def _reserve(handle: int, size: int) -> None:
    """Claim the room now rather than run out of it after an hour, where the system can."""
    try:
        os.posix_fallocate(handle, 0, size)
    except (AttributeError, OSError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        os.truncate(handle, size)


def _write(handle: int, data: bytes | memoryview, position: int) -> None:
    rest = memoryview(data).cast("B")
    while rest:
        written = os.pwrite(handle, rest[: 1 << 30], position)
        rest, position = rest[written:], position + written


def _no_room(error: BaseException) -> BaseException:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return Full(f"no room for the merged weights ({error.strerror})")
    return error


def finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite, a block at a time; a sum tells, unless it overflows."""
    if tensor.numel() <= BLOCK and math.isfinite(tensor.sum().item()):
        return True
    flat = tensor.reshape(-1)
    for start in range(0, len(flat), BLOCK):
        part = flat[start : start + BLOCK].float()
        if not math.isfinite(float(part.sum())) and not bool(torch.isfinite(part).all()):
            return False
    return True
