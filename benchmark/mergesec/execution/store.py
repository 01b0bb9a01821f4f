"""Content-addressed artifacts: safetensors plus a JSON that commits them. Nothing is unpickled.

``<root>/artifacts/<kind>/<key>.safetensors`` holds tensors, ``<key>.json`` the metadata and the digest of
each tensor. The JSON is renamed into place last: an artifact exists exactly when its JSON does.
``<key>.checked`` remembers the file that was last found whole by ``open``; ``<root>/checkpoints`` holds what
trainings under way would go on from. Only plain files are the store's: in the place of an artifact a link, a
pipe or a device is nothing, and nothing is read through it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from mergesec.files import write_atomic
from mergesec.modelfiles import placed

CHECKPOINTS = "checkpoints"
SPENT = ".spent"
"""End of the name of an artifact's facts once its tensors were let go of."""
CHEAP = 1.0
"""Seconds: what took less to make is made again rather than flushed."""
CHECKPOINT_DAYS = 30
"""After these nobody is going on with a training."""
FRESH = 1.0
"""Seconds in which a file may change once more without another time: what is so young is hashed at every read."""
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading a damaged file may raise."""


class CorruptArtifact(RuntimeError):
    """Stored bytes do not match their digest. The artifact has been removed; compute it again."""

    def __init__(self, key: str) -> None:
        super().__init__(f"artifact {key} is corrupt")
        self.key = key


def tensor_digest(name: str, dtype: str, shape: tuple[int, ...], data: bytes | memoryview) -> str:
    """SHA-256 of a tensor's name, type (as safetensors writes it), shape and bytes."""
    digest = hashlib.sha256(f"{name}|{dtype}|{tuple(shape)}|".encode())
    digest.update(data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Raw:
    """A tensor's bytes, as safetensors lays them out."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview


@dataclass(frozen=True)
class Laid:
    """A safetensors file in parts: its beginning, and tensors where they lie in memory. Nothing is copied to
    write it; whoever has it must not change them."""

    head: bytes
    tensors: Mapping[str, Raw]

    def parts(self) -> Iterator[bytes | memoryview]:
        """What the file's bytes are, one behind the other."""
        yield self.head
        for raw in self.tensors.values():
            yield raw.data

    def __len__(self) -> int:
        return len(self.head) + sum(raw.data.nbytes for raw in self.tensors.values())

    def __bytes__(self) -> bytes:
        return b"".join(self.parts())


Blob = bytes | Laid
"""A safetensors file in memory."""
ORDER = (
    "U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL",
)  # fmt: skip
"""Types as the safetensors library sorts them in a file: wide ones first, so that every tensor is aligned."""


def laid(tensors: Mapping[str, Raw]) -> Laid:
    """Tensors as the file that the safetensors library makes of them, byte for byte."""
    order = dict(sorted(tensors.items(), key=lambda entry: (ORDER.index(entry[1].dtype), entry[0])))
    head = placed((name, raw.dtype, raw.shape, raw.data.nbytes) for name, raw in order.items()).head
    return Laid(head, order)


def parts_of(blob: Blob | memoryview | mmap.mmap) -> Iterable[bytes | memoryview]:
    """The bytes of a file, in parts."""
    return blob.parts() if isinstance(blob, Laid) else [memoryview(blob)]


def parse_safetensors(blob: Blob | mmap.mmap) -> dict[str, Raw]:
    """Tensors of a safetensors file, as views of it; ValueError if it is malformed or truncated."""
    if isinstance(blob, Laid):
        return dict(blob.tensors)
    size = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + size])
    body = memoryview(blob)[8 + size :]
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            if end > len(body):
                raise ValueError("truncated")
            found[name] = Raw(entry["dtype"], tuple(entry["shape"]), body[start:end])
    return found


def digests_of(blob: Blob | mmap.mmap) -> dict[str, str]:
    """The digest of each tensor of a safetensors file."""
    found = {}
    for name, raw in parse_safetensors(blob).items():
        found[name] = tensor_digest(name, raw.dtype, raw.shape, raw.data)
        if not isinstance(blob, Laid):  # a mapped file is not closed while parts of it are held
            raw.data.release()
    return found


def open_plain(path: Path) -> BinaryIO:
    """A plain file, open for reading; OSError for anything else, without waiting for a pipe's other end."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    file = os.fdopen(handle, "rb")
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        file.close()
        raise OSError(f"{path.name} is no plain file")
    return file


def read_plain(path: Path) -> bytes:
    """The bytes of a plain file; OSError if it is anything else."""
    with open_plain(path) as file:
        return file.read()


def is_plain(path: Path) -> bool:
    """Whether a plain file has this name, not a link to one."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


class Stored(NamedTuple):
    """One thing that the store holds."""

    kind: str
    """A kind of step, or ``checkpoints``."""
    key: str
    bytes: int
    used: float
    """When it was made or last read by a run, in seconds since 1970."""


class Store:
    """A folder of artifacts, safe for several processes at once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._artifacts_at = f"{root}/artifacts"
        self._sound: dict[Path, str] = {}
        """Files that this process found whole, and what would change if their bytes did."""

    def _paths(self, kind: str, key: str) -> tuple[Path, Path]:
        folder = self.root / "artifacts" / kind
        return folder / f"{key}.json", folder / f"{key}.safetensors"

    def has(self, kind: str, key: str) -> bool:
        try:  # asked several times of each step: texts are put together faster than paths
            return stat.S_ISREG(os.lstat(f"{self._artifacts_at}/{kind}/{key}.json").st_mode)
        except OSError:
            return False

    def keys(self, spent: bool = False) -> set[str]:
        """Every committed key, with ``spent`` also those whose facts alone are left: one directory scan per kind."""
        found: set[str] = set()
        folder = self.root / "artifacts"
        for kind in folder.iterdir() if folder.is_dir() else ():
            if kind.is_dir():
                with os.scandir(kind) as entries:
                    plain = (e for e in entries if e.is_file(follow_symlinks=False))
                    ends = (".json", SPENT) if spent else (".json",)
                    found.update(e.name.rpartition(".")[0] for e in plain if e.name.endswith(ends))
        return found

    def made_since(self, steps: Iterable[tuple[str, str]], seconds: float) -> int:
        """How many of these (kind, key) were committed within the last ``seconds``."""
        found = 0
        for kind, key in steps:
            with contextlib.suppress(OSError):
                found += time.time() - self._paths(kind, key)[0].lstat().st_mtime < seconds
        return found

    def put(self, kind: str, key: str, blob: Blob, info: Mapping[str, Any]) -> None:
        """Commit. ``blob`` is a safetensors file, ``info`` JSON facts; Full if there is no room.

        What took less than ``CHEAP`` seconds to make is not flushed to disk, which takes longer: a power loss may
        tear it, as reading it then finds. A killed process never does.
        """
        meta_path, tensor_path = self._paths(kind, key)
        lasting = float(info.get("seconds", CHEAP)) >= CHEAP
        digests = digests_of(blob)
        write_atomic(tensor_path, parts_of(blob), lasting)
        # as JSON will give it back: the check must not depend on integer keys or tuples
        facts = json.loads(json.dumps(dict(info)))
        meta = {"key": key, "kind": kind, "digests": digests, "bytes": len(blob), "info": facts}
        meta["check"] = _check(meta)
        write_atomic(meta_path, json.dumps(meta, sort_keys=True).encode(), lasting)
        _unlink(meta_path.with_suffix(SPENT))
        for path in self._checkpoints(key):
            path.unlink(missing_ok=True)

    def read(self, kind: str, key: str) -> tuple[bytes | mmap.mmap, dict[str, Any]]:
        """(safetensors bytes, metadata), verified. CorruptArtifact (removed) on any mismatch.

        A file is hashed once by a process, and again whenever its inode, size or times are others.
        """
        meta = self.meta(kind, key)
        path = self._paths(kind, key)[1]
        try:
            with open_plain(path) as file:
                blob, stamp = file.read(), _stamp(file, str(meta["check"]))
                fresh = time.time() - os.fstat(file.fileno()).st_mtime < FRESH
            sound = self._sound.get(path) == stamp or digests_of(blob) == meta["digests"]
            if sound and not fresh:
                self._sound[path] = stamp
        except UNREADABLE:
            sound = False
        if not sound:
            self._corrupt(kind, key)
        return blob, meta

    def open(self, kind: str, key: str) -> tuple[Path, dict[str, Any]]:
        """(safetensors file to map, metadata) of a large artifact that never changes.

        Its bytes are verified the first time, without a copy of them, and again whenever the file's inode,
        size or times differ from those of the verified one. CorruptArtifact (removed) on any mismatch.
        """
        meta = self.meta(kind, key)
        tensor_path = self._paths(kind, key)[1]
        mark = tensor_path.with_suffix(".checked")
        try:
            with open_plain(tensor_path) as file:
                stamp = _stamp(file, str(meta["check"]))
                sound = is_plain(mark) and read_plain(mark).decode() == stamp
                if not sound:
                    # not closed by hand: an error in the middle still holds parts of it
                    view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                    sound = digests_of(view) == meta["digests"]
                    if sound:
                        os.fsync(file.fileno())  # where the mark outlives a power loss, so does the file
                        write_atomic(mark, stamp.encode())
        except UNREADABLE:
            sound = False
        if not sound:
            self._corrupt(kind, key)
        return tensor_path, meta

    def meta(self, kind: str, key: str) -> dict[str, Any]:
        """The metadata alone, verified, tensors unread. CorruptArtifact if it is absent, or (removed) damaged."""
        meta = self._meta(kind, key)
        self._mark_used(self._paths(kind, key)[0])
        return meta

    def facts(self, kind: str, key: str) -> dict[str, Any]:
        """What a step told of itself, verified, also if its tensors were let go of. CorruptArtifact as of ``meta``."""
        place = self._told_at(kind, key)
        facts: dict[str, Any] = self._meta(kind, key, place)["info"]
        self._mark_used(place)
        return facts

    def spend(self, kind: str, key: str) -> None:
        """Let go of an artifact's tensors. Its facts stay; else it is missing, and made again when needed."""
        meta_path, tensor_path = self._paths(kind, key)
        if is_plain(meta_path):
            os.replace(meta_path, meta_path.with_suffix(SPENT))
        for path in (tensor_path, tensor_path.with_suffix(".checked")):
            _unlink(path)

    def _meta(self, kind: str, key: str, place: Path | None = None) -> dict[str, Any]:
        path = place or self._paths(kind, key)[0]
        if not is_plain(path):  # absent, or just being committed by another worker: nothing to remove
            raise CorruptArtifact(key)
        try:
            meta: dict[str, Any] = json.loads(read_plain(path))
            sound = meta["check"] == _check(meta) and meta["key"] == key and isinstance(meta["info"], dict)
        except UNREADABLE:
            sound = False
        if not sound:
            self._corrupt(kind, key)
        return meta

    @staticmethod
    def _mark_used(path: Path) -> None:
        """The time of last access, set by hand: most file systems are mounted so that reading does not."""
        with contextlib.suppress(OSError):  # somebody else's store may be read too
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))

    def _corrupt(self, kind: str, key: str) -> NoReturn:
        self.remove(kind, key)
        raise CorruptArtifact(key)

    # ---- trainings under way

    def _checkpoints(self, key: str = "", number: str = "") -> list[Path]:
        """Of all trainings, or those of a step, or one of them."""
        folder = self.root / CHECKPOINTS
        try:
            names = os.listdir(folder)
        except OSError:  # none was ever kept
            return []
        begin = f"{key}.{number}." if number else f"{key}." if key else ""
        found = sorted(name for name in names if name.startswith(begin) and _CHECKPOINT.fullmatch(name))
        return [path for name in found if is_plain(path := folder / name)]

    def keep(self, key: str, number: int, blob: Blob) -> None:
        """A checkpoint of a step's training; its name tells its digest. Full if there is no room."""
        old = self._checkpoints(key, str(number))
        path = self.root / CHECKPOINTS / f"{key}.{number}.{_short_digest(blob)}.safetensors"
        write_atomic(path, parts_of(blob))
        for other in old:
            if other != path:
                other.unlink(missing_ok=True)

    def kept(self, key: str, number: int) -> mmap.mmap | None:
        """The last whole checkpoint of a step's training, mapped; None if there is none."""
        for path in self._checkpoints(key, str(number)):
            if (blob := _whole(path)) is not None:
                return blob
            path.unlink(missing_ok=True)
        return None

    # ---- looking after all of it

    def verify(self, stored: Stored) -> bool:
        """Whether something is what was written, or gone; removed if it is not. Looking at it is no use of it."""
        path = self._place(stored)
        if not is_plain(path):
            return True
        sound = _whole(path) is not None if stored.kind == CHECKPOINTS else self._is_sound(*stored[:2])
        if not sound:
            self.drop(stored)
        with contextlib.suppress(OSError):
            os.utime(path, ns=(int(stored.used * 1e9), path.stat().st_mtime_ns))
        return sound

    def _is_sound(self, kind: str, key: str) -> bool:
        place = self._told_at(kind, key)
        try:
            meta = self._meta(kind, key, place)
            return place.suffix == SPENT or bool(
                digests_of(read_plain(self._paths(kind, key)[1])) == meta["digests"]
            )
        except (CorruptArtifact, *UNREADABLE):
            return False

    def _place(self, stored: Stored) -> Path:
        if stored.kind == CHECKPOINTS:
            return self.root / CHECKPOINTS / stored.key
        return self._told_at(stored.kind, stored.key)

    def _told_at(self, kind: str, key: str) -> Path:
        """Where an artifact's facts are, whether its tensors are there or not."""
        path = self._paths(kind, key)[0]
        spent = path.with_suffix(SPENT)
        return spent if is_plain(spent) and not is_plain(path) else path

    def drop(self, stored: Stored) -> None:
        """Remove an artifact or a checkpoint."""
        if stored.kind == CHECKPOINTS:
            _unlink(self._place(stored))
        else:
            self.remove(stored.kind, stored.key)

    def remove(self, kind: str, key: str) -> None:
        meta_path, tensor_path = self._paths(kind, key)
        for path in (
            meta_path,
            meta_path.with_suffix(SPENT),
            tensor_path,
            tensor_path.with_suffix(".checked"),
        ):
            _unlink(path)

    def _own(self, pattern: str) -> Iterator[Path]:
        """Plain files of the store's own kinds and names: what somebody else keeps in the folder, links and
        devices are nobody's business here."""
        folder = self.root / "artifacts"
        for kind in sorted(folder.iterdir()) if folder.is_dir() else ():
            if kind.is_dir() and not kind.is_symlink():
                for path in sorted(kind.glob(pattern)):
                    if is_plain(path) and _is_own(path):
                        yield path

    def _left_behind(self) -> Iterator[Path]:
        """Files of the store's own that were never committed, or belong to an artifact that is no more. Told from
        names: with many artifacts a look at each would be what a run begins with."""
        folder = self.root / "artifacts"
        for kind in folder.iterdir() if folder.is_dir() else ():
            if kind.is_dir() and not kind.is_symlink():
                names = set(os.listdir(kind))
                for name in names:
                    stem, _, suffix = name.rpartition(".")
                    lost = suffix in ("safetensors", "checked") and f"{stem}.json" not in names
                    if (lost or name.startswith(".tmp-")) and is_plain(path := kind / name) and _is_own(path):
                        yield path

    def artifacts(self) -> Iterator[tuple[str, str, int]]:
        """(kind, key, bytes) of everything committed."""
        for stored in self._artifacts():
            yield stored[:3]

    def contents(self) -> list[Stored]:
        """Everything committed, and the checkpoints."""
        found = list(self._artifacts())
        for path in self._checkpoints():
            with contextlib.suppress(FileNotFoundError):  # its training went on
                now = path.stat()
                found.append(Stored(CHECKPOINTS, path.name, now.st_size, now.st_mtime))
        return found

    def _artifacts(self) -> Iterator[Stored]:
        for path in (*self._own("*.json"), *self._own(f"*{SPENT}")):
            with contextlib.suppress(FileNotFoundError):  # another process removed it
                now, tensors = path.stat(), path.with_suffix(".safetensors")
                size = now.st_size + (tensors.stat().st_size if is_plain(tensors) else 0)
                yield Stored(path.parent.name, path.stem, size, max(now.st_atime, now.st_mtime))

    def sweep(self) -> int:
        """Remove what a killed process left behind: temporary and uncommitted files older than an hour, and
        checkpoints that are a month old, or of steps that are committed."""
        old = [path for path in self._left_behind() if _age(path) > 3600]
        beside = (self.root / CHECKPOINTS).glob(".tmp-*")
        old += [path for path in beside if _KEY.fullmatch(path.name) and _age(path) > 3600]
        checkpoints = self._checkpoints()
        done = self.keys() if checkpoints else set()
        for path in checkpoints:
            if path.name.partition(".")[0] in done or _age(path) > CHECKPOINT_DAYS * 86400:
                old.append(path)
        return sum(map(_unlink, old))


_KEY = re.compile(r"[0-9a-f]{40}|\.tmp-[0-9a-f]{16}")
_CHECKPOINT = re.compile(r"[^.]+\.\d+\.[0-9a-f]{32}\.safetensors")


def _is_own(path: Path) -> bool:
    """Whether a file has the name of a step's key, or metadata beside it that says it is the store's."""
    if _KEY.fullmatch(path.stem):
        return True
    try:
        meta = json.loads(read_plain(path if path.suffix == SPENT else path.with_suffix(".json")))
        return bool(meta["key"] == path.stem and meta["kind"] == path.parent.name)
    except UNREADABLE:
        return False


def _age(path: Path) -> float:
    """Seconds since a file was written; none if it is gone."""
    try:
        return time.time() - path.lstat().st_mtime
    except FileNotFoundError:
        return 0.0


def _unlink(path: Path) -> bool:
    """Remove a plain file; what else has its name stays. Whether it was removed."""
    if not is_plain(path):
        return False
    path.unlink(missing_ok=True)
    return True


def _short_digest(blob: Blob | mmap.mmap) -> str:
    digest = hashlib.sha256()
    for part in parts_of(blob):
        digest.update(part)
    return digest.hexdigest()[:32]


def _whole(path: Path) -> mmap.mmap | None:
    """A checkpoint's bytes, mapped, if they are what its name says."""
    try:
        with open_plain(path) as file:
            blob = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # nothing is mapped of an empty file
        return None
    return blob if _short_digest(blob) == path.name.split(".")[-2] else None


def _stamp(file: BinaryIO, check: str) -> str:
    """What changes when a file's bytes do, short of a fault of the disk."""
    now = os.fstat(file.fileno())
    return f"{check} {now.st_ino} {now.st_size} {now.st_mtime_ns} {now.st_ctime_ns}"


def _check(meta: Mapping[str, Any]) -> str:
    """Digest of the metadata itself, so that a flipped byte in the JSON is found too."""
    body = {k: v for k, v in meta.items() if k != "check"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]
