"""Merging safetensors files tensor by tensor, so that memory follows the largest tensor, not the network.

``open_weights`` maps one tensor of a file at a time and lets go of it with the tensor; ``Writer`` knows
every name, type and shape beforehand, so it writes the header first and each tensor where it belongs;
``merge_files`` puts a merge method between the two. Nothing appears under the final name before it is
whole, and nothing is ever unpickled.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mergesec.contracts import Backbone, ContractError, Expert, MergeContext, TaskView
from mergesec.errors import UsageError
from mergesec.files import Full, check_writable
from mergesec.tensorwise import BLOCK, TensorwiseMerge
from mergesec.weights import check_same_layout, mergeable

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


# --------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Place:
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

    def __init__(self, places: Mapping[str, Place], metadata: Mapping[str, str]) -> None:
        self.places = dict(places)
        self.metadata = dict(metadata)
        self.watch: Callable[[str], None] | None = None
        """Told each name that is asked for (to show progress)."""

    def __getitem__(self, name: str) -> Tensor:
        place = self.places[name]
        if self.watch is not None:
            self.watch(name)
        return place.read()

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(place.size for place in self.places.values())


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


def _open_file(path: Path, field: str) -> tuple[dict[str, Place], dict[str, str]]:
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
    places = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise UsageError(
                field, f"{path}: tensor {name!r} has type {entry['dtype']}, which cannot be merged"
            )
        start = 8 + length + entry["data_offsets"][0]
        places[name] = Place(path, stamp, start, DTYPES[entry["dtype"]], tuple(entry["shape"]))
    ordered = sorted(places.items(), key=lambda item: (item[1].start, item[0]))
    return dict(ordered), metadata


def _open_index(path: Path, field: str) -> LazyWeights:
    try:
        listed = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, TypeError, KeyError):
        raise UsageError(field, f"{path} is not an index of safetensors files") from None
    places: dict[str, Place] = {}
    metadata: dict[str, str] = {}
    for shard in sorted(set(map(str, listed.values()))):
        file = path.parent / shard
        if Path(shard).name != shard or not file.is_file():
            raise UsageError(field, f"{path} names a file {shard!r} that is not beside it")
        found, more = _open_file(file, field)
        metadata.update(more)
        places.update((name, place) for name, place in found.items() if listed.get(name) == shard)
    lost = [name for name in listed if name not in places]
    if lost:
        raise UsageError(
            field, f"{path.parent / listed[lost[0]]}: tensor {lost[0]!r} of the index is missing"
        )
    return LazyWeights(places, metadata)


# --------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class _Shard:
    name: str
    """File name under which it is published."""
    starts: Mapping[str, int]
    header: bytes
    size: int


def _shard(file: str, tensors: Mapping[str, Place], metadata: Mapping[str, str]) -> _Shard:
    """Layout of one file: large element types first, so that every tensor is aligned."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    starts, position = {}, 0
    for name in sorted(tensors, key=lambda n: -tensors[n].dtype.itemsize):
        place = tensors[name]
        end = position + place.size
        header[name] = {
            "dtype": NAMES[place.dtype], "shape": list(place.shape), "data_offsets": [position, end],
        }  # fmt: skip
        starts[name], position = position, end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    return _Shard(
        file, {n: first + s for n, s in starts.items()}, len(text).to_bytes(8, "little") + text,
        first + position,
    )  # fmt: skip


def _shards(like: LazyWeights, single: str, limit: int | None, metadata: Mapping[str, str]) -> list[_Shard]:
    """Files of at most ``limit`` bytes of tensors (a larger tensor has a file of its own)."""
    groups: list[dict[str, Place]] = [{}]
    filled = 0
    for name, place in like.places.items():
        if limit is not None and groups[-1] and filled + place.size > limit:
            groups.append({})
            filled = 0
        groups[-1][name] = place
        filled += place.size
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
        place = self.like.places[name]
        if tensor.dtype != place.dtype or tuple(tensor.shape) != place.shape:
            raise ContractError(f"'{name}' came out as {tensor.dtype} {list(tensor.shape)}")
        if mergeable(tensor) and not _finite(tensor):
            raise ContractError(f"'{name}' came out with values that are not finite")
        self.waiting.discard(name)
        if place.size:
            index = self._home[name]
            flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
            try:
                _write(self._handles[index], flat.numpy().data, self.shards[index].starts[name])
            except OSError as error:
                raise _no_room(error) from None

    def commit(self) -> list[Path]:
        """Flush, read the headers back, and rename into place; the published files, index last."""
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
        for name in names:
            os.replace(self._temporary / name, self.folder / name)
        return [self.folder / name for name in names]

    def _index(self) -> str:
        owned = {name: shard.name for shard in self.shards for name in shard.starts}
        index = {
            "metadata": {"total_size": self.like.size},
            "weight_map": {name: owned[name] for name in self.like},
        }
        name = f"{self.shards[0].name.rsplit('-', 3)[0]}.safetensors.index.json"
        (self._temporary / name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
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


def _finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite, a block at a time; a sum tells, unless it overflows."""
    flat = tensor.reshape(-1)
    for start in range(0, len(flat), BLOCK):
        part = flat[start : start + BLOCK].float()
        if not math.isfinite(float(part.sum())) and not bool(torch.isfinite(part).all()):
            return False
    return True


# --------------------------------------------------------------------------- merging


class _Absent(Mapping[str, Any]):
    """Stands where a context has a network or data: any use says that there is none."""

    def __init__(self, method: str, what: str) -> None:
        self.__dict__.update(method=method, what=what)

    def _refuse(self, *_: object) -> Any:
        raise ContractError(f"{self.method} needs {self.what}, which a merge of files does not have")

    __getitem__ = __iter__ = __len__ = __call__ = _refuse

    def __getattr__(self, name: str) -> Any:
        self._refuse()


def context(method: str, seed: int) -> MergeContext:
    """A context without network and data: asking for either is a ContractError naming ``method``."""
    data = _Absent(method, "data")
    network = cast(Backbone, _Absent(method, "a network"))
    return MergeContext(torch.device("cpu"), seed, network, cast("Mapping[str, TaskView]", data), data)


def unfit(cls: type[Any], output: str = "static", wraps: str = "") -> str | None:
    """Why a merge method cannot go tensor by tensor through files, or None if it can."""
    if not issubclass(cls, TensorwiseMerge):
        return "needs the whole network at once"
    if output != "static":
        return "makes more than one set of weights"
    if wraps or cls.merge is not TensorwiseMerge.merge or cls.stream is not TensorwiseMerge.stream:
        return "does more than merge tensor by tensor"
    return None


def check_out(out: Path, inputs: Mapping[str, LazyWeights], force: bool) -> None:
    """UsageError unless ``out`` (a ``.safetensors`` file or a folder) may be written."""
    single = out.suffix == ".safetensors"
    if (single and out.is_dir()) or (not single and out.is_file()):
        raise UsageError(
            "--out", f"{out} is a {'folder' if single else 'file'}; name a .safetensors file or a folder"
        )
    taken = _published(out)
    read = {place.file.resolve() for weights in inputs.values() for place in weights.places.values()}
    if any(file.resolve() in read for file in taken):
        raise UsageError("--out", f"{out} is one of the inputs")
    if taken and not force:
        raise UsageError("--out", f"{taken[0]} exists; --force replaces it")
    check_writable(out.parent if single else out, "--out")


def _published(out: Path) -> list[Path]:
    """Files of an earlier merge (or download) under ``out``."""
    if out.suffix == ".safetensors":
        return [out] if out.exists() else []
    shards = sorted(out.glob("model-*-of-*.safetensors")) if out.is_dir() else []
    return [path for path in (out / SINGLE, out / INDEX) if path.exists()] + shards


@dataclass(frozen=True)
class Written:
    """What a merge of files left."""

    files: list[Path]
    tensors: int
    size: int
    """Bytes of tensors."""


def merge_files(
    method: TensorwiseMerge,
    base: LazyWeights,
    experts: Mapping[str, LazyWeights],
    out: Path,
    *,
    seed: int = 0,
    metadata: Mapping[str, str] | None = None,
    shard_size: int | None = None,
    force: bool = False,
    report: Callable[[str, int], None] = lambda name, done: None,
) -> Written:
    """Merge ``experts`` into ``base`` and write ``out``. ``report(name, bytes written so far)`` per tensor.

    Raises UsageError (inputs or ``out`` do not fit), ContractError (the method refuses) or Full.
    """
    for name, weights in experts.items():
        read = sorted({place.file for place in weights.places.values()})
        where = read[0] if len(read) == 1 else read[0].parent if read else "no tensors"
        who = f"expert {name!r} ({where})"
        try:
            check_same_layout(base, weights, who)
        except ContractError as error:
            raise UsageError("--expert", str(error)) from None
    check_out(out, {"": base, **experts}, force)
    stale = _published(out)
    kept = {"format": "pt", **base.metadata, **(metadata or {})}
    members = [Expert(name, weights) for name, weights in experts.items()]
    done = 0
    with Writer(out, base, kept, shard_size) as writer:
        for name, tensor in method.stream(base, members, context(method.name, seed)):
            writer.put(name, tensor)
            done += base.places[name].size
            del tensor  # before the next one is made
            report(name, done)
        files = writer.commit()
    for path in stale:
        if path not in files:
            path.unlink()
    return Written(files, len(base), done)
