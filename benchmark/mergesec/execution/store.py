"""Content-addressed artifacts: safetensors plus a JSON that commits them. Nothing is unpickled.

``<root>/artifacts/<kind>/<key>.safetensors`` holds tensors, ``<key>.json`` the metadata and the digest of
each tensor. The JSON is renamed into place last: an artifact exists exactly when its JSON does.
``<key>.checked`` remembers the file that was last found whole by ``open``; ``<root>/checkpoints`` holds what
trainings under way would go on from.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergesec.files import write_atomic


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


def parse_safetensors(blob: bytes | mmap.mmap) -> dict[str, Raw]:
    """Tensors of a safetensors file, as views of it; ValueError if it is malformed or truncated."""
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


def digests_of(blob: bytes | mmap.mmap) -> dict[str, str]:
    """The digest of each tensor of a safetensors file."""
    found = {}
    for name, raw in parse_safetensors(blob).items():
        found[name] = tensor_digest(name, raw.dtype, raw.shape, raw.data)
        raw.data.release()
    return found


class Store:
    """A folder of artifacts, safe for several processes at once."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def _paths(self, kind: str, key: str) -> tuple[Path, Path]:
        folder = self.root / "artifacts" / kind
        return folder / f"{key}.json", folder / f"{key}.safetensors"

    def has(self, kind: str, key: str) -> bool:
        return self._paths(kind, key)[0].is_file()

    def keys(self) -> set[str]:
        """Every committed key: one directory scan per kind."""
        found: set[str] = set()
        folder = self.root / "artifacts"
        for kind in folder.iterdir() if folder.is_dir() else ():
            if kind.is_dir():
                with os.scandir(kind) as entries:
                    found.update(e.name[:-5] for e in entries if e.name.endswith(".json"))
        return found

    def put(self, kind: str, key: str, blob: bytes, info: Mapping[str, Any]) -> None:
        """Commit. ``blob`` is a safetensors file, ``info`` JSON facts; Full if there is no room."""
        meta_path, tensor_path = self._paths(kind, key)
        digests = digests_of(blob)
        write_atomic(tensor_path, blob)
        # as JSON will give it back: the check must not depend on integer keys or tuples
        facts = json.loads(json.dumps(dict(info)))
        meta = {"key": key, "kind": kind, "digests": digests, "bytes": len(blob), "info": facts}
        meta["check"] = _check(meta)
        write_atomic(meta_path, json.dumps(meta, sort_keys=True).encode())
        for path in self._checkpoints(key):
            path.unlink(missing_ok=True)

    def read(self, kind: str, key: str) -> tuple[bytes | mmap.mmap, dict[str, Any]]:
        """(safetensors bytes, metadata), verified. CorruptArtifact (removed) on any mismatch."""
        meta_path, tensor_path = self._paths(kind, key)
        if not meta_path.is_file():  # absent, or just being committed by another worker: nothing to remove
            raise CorruptArtifact(key)
        try:
            meta = json.loads(meta_path.read_bytes())
            blob = tensor_path.read_bytes()
            sound = meta["check"] == _check(meta) and meta["key"] == key
            sound = sound and digests_of(blob) == meta["digests"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            sound = False
        if not sound:
            self.remove(kind, key)
            raise CorruptArtifact(key)
        return blob, meta

    def open(self, kind: str, key: str) -> tuple[Path, dict[str, Any]]:
        """(safetensors file to map, metadata) of a large artifact that never changes.

        Its bytes are verified the first time, without a copy of them, and again whenever the file's inode,
        size or times differ from those of the verified one. CorruptArtifact (removed) on any mismatch.
        """
        meta_path, tensor_path = self._paths(kind, key)
        if not meta_path.is_file():
            raise CorruptArtifact(key)
        mark = tensor_path.with_suffix(".checked")
        try:
            meta = json.loads(meta_path.read_bytes())
            sound = meta["check"] == _check(meta) and meta["key"] == key
            stamp = _stamp(tensor_path, str(meta["check"]))
            if sound and (not mark.is_file() or mark.read_text() != stamp):
                with (
                    tensor_path.open("rb") as file,
                    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view,
                ):
                    sound = digests_of(view) == meta["digests"]
                if sound:
                    write_atomic(mark, stamp.encode())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            sound = False
        if not sound:
            self.remove(kind, key)
            raise CorruptArtifact(key)
        return tensor_path, meta

    # ---- trainings under way

    def _checkpoints(self, key: str, number: str = "*") -> list[Path]:
        return sorted((self.root / "checkpoints").glob(f"{key}.{number}.*.safetensors"))

    def keep(self, key: str, number: int, blob: bytes) -> None:
        """A checkpoint of a step's training; its name tells its digest. Full if there is no room."""
        old = self._checkpoints(key, str(number))
        digest = hashlib.sha256(blob).hexdigest()[:32]
        path = self.root / "checkpoints" / f"{key}.{number}.{digest}.safetensors"
        write_atomic(path, blob)
        for other in old:
            if other != path:
                other.unlink(missing_ok=True)

    def kept(self, key: str, number: int) -> bytes | None:
        """The last whole checkpoint of a step's training; None if there is none."""
        for path in self._checkpoints(key, str(number)):
            try:
                blob = path.read_bytes()
            except OSError:
                continue
            if hashlib.sha256(blob).hexdigest()[:32] == path.name.split(".")[-2]:
                return blob
            path.unlink(missing_ok=True)
        return None

    def meta(self, kind: str, key: str) -> dict[str, Any]:
        """The metadata alone, verified, tensors unread. CorruptArtifact if it is absent, or (removed) damaged."""
        path, _ = self._paths(kind, key)
        if not path.is_file():
            raise CorruptArtifact(key)
        try:
            meta: dict[str, Any] = json.loads(path.read_bytes())
            sound = meta["check"] == _check(meta) and meta["key"] == key and isinstance(meta["info"], dict)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            sound = False
        if not sound:
            self.remove(kind, key)
            raise CorruptArtifact(key)
        return meta

    def remove(self, kind: str, key: str) -> None:
        meta_path, tensor_path = self._paths(kind, key)
        for path in (meta_path, tensor_path, tensor_path.with_suffix(".checked")):
            path.unlink(missing_ok=True)

    def _own(self, pattern: str) -> Iterator[Path]:
        """Plain files of the store's own kinds and names: what somebody else keeps in the folder, links and
        devices are nobody's business here."""
        folder = self.root / "artifacts"
        for kind in sorted(folder.iterdir()) if folder.is_dir() else ():
            if kind.is_dir() and not kind.is_symlink():
                for path in sorted(kind.glob(pattern)):
                    if stat.S_ISREG(path.lstat().st_mode) and _is_own(path):
                        yield path

    def artifacts(self) -> Iterator[tuple[str, str, int]]:
        """(kind, key, bytes) of everything committed."""
        for path in self._own("*.json"):
            tensors = path.with_suffix(".safetensors")
            size = path.stat().st_size + (tensors.stat().st_size if tensors.is_file() else 0)
            yield path.parent.name, path.stem, size

    def sweep(self) -> int:
        """Remove what a killed process left behind: temporary and uncommitted files older than an hour."""
        removed = 0
        checkpoints = self.root / "checkpoints"
        for path in (*self._own("*"), *checkpoints.glob(".tmp-*")):
            orphan = path.suffix == ".safetensors" and not path.with_suffix(".json").exists()
            orphan &= path.parent != checkpoints
            if (path.name.startswith(".tmp-") or orphan) and time.time() - path.lstat().st_mtime > 3600:
                path.unlink(missing_ok=True)
                removed += 1
        return removed


_KEY = re.compile(r"[0-9a-f]{40}|\.tmp-[0-9a-f]{16}")


def _is_own(path: Path) -> bool:
    """Whether a file has the name of a step's key, or metadata beside it that says it is the store's."""
    if _KEY.fullmatch(path.stem):
        return True
    try:
        meta = json.loads(path.with_suffix(".json").read_bytes())
        return bool(meta["key"] == path.stem and meta["kind"] == path.parent.name)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _stamp(path: Path, check: str) -> str:
    """What changes when a file's bytes do, short of a fault of the disk."""
    now = path.stat()
    return f"{check} {now.st_ino} {now.st_size} {now.st_mtime_ns} {now.st_ctime_ns}"


def _check(meta: Mapping[str, Any]) -> str:
    """Digest of the metadata itself, so that a flipped byte in the JSON is found too."""
    body = {k: v for k, v in meta.items() if k != "check"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]
