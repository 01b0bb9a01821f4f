"""Folders, atomic writes, content fingerprints, and memory that need not be searched. No torch."""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import json
import os
import secrets
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mergesec.errors import UsageError

SHIPPED = ".shipped"
"""Marks a folder of results that belongs to the project, not to its user."""


class Full(RuntimeError):
    """The disk is full or the folder cannot be written."""


def default_root() -> Path:
    """``$MERGESEC_CACHE``, else ``$XDG_CACHE_HOME/mergesec``, else ``~/.cache/mergesec``."""
    explicit = os.environ.get("MERGESEC_CACHE")
    if explicit:
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mergesec"


def default_results(grid: str = "") -> Path:
    """Where records and boards go if nobody says: ``results``; in a checkout of this project, whose ``results``
    ship with it, ``outputs``. To read a ``grid`` that is not there, but among the shipped ones: ``results``."""
    shipped = Path("results")
    if not (shipped / SHIPPED).is_file():
        return shipped
    own = Path("outputs")
    if grid and not (own / "records" / grid).is_dir() and (shipped / "records" / grid).is_dir():
        return shipped
    return own


def check_writable(folder: Path, field: str) -> None:
    """UsageError naming ``field`` unless files can be created in ``folder`` (made if missing)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"0" * 4096)
    except (OSError, ValueError) as error:  # no folder has a name with NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(field, f"cannot write to {brief(str(folder))!r} ({reason})") from None


def write_atomic(path: Path, data: bytes | Iterable[bytes | memoryview], lasting: bool = True) -> None:
    """Write-temp, flush to disk, rename, flush the folder: after a power loss the old file or the new one is
    there, whole. What need not be ``lasting`` is not flushed: killed at any moment it is whole too, but a power
    loss may leave the new name on a torn file. ``data`` may come in parts. Readable by whom the umask allows.
    Full if there is no room."""
    try:
        name = path.parent / f".tmp-{secrets.token_hex(8)}"
        try:
            with os.fdopen(_created(name), "wb") as file:
                file.writelines([data] if isinstance(data, bytes) else data)
                if lasting:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(name, path)
            if lasting:
                sync_folder(path.parent)
        except BaseException:
            name.unlink(missing_ok=True)
            raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise Full(f"cannot write {path.name}: {error.strerror}") from None
        raise


def _created(path: Path) -> int:
    """A new file, and the folders above it that are not there yet."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        return os.open(path, flags, 0o666)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, flags, 0o666)


def write_changed(path: Path, data: bytes) -> None:
    """``write_atomic``, unless these bytes are there already: flushing a disk takes longer than reading it."""
    try:
        same = path.read_bytes() == data
    except OSError:
        same = False
    if not same:
        write_atomic(path, data)


def sync_folder(folder: Path) -> None:
    """Flush a folder: the names in it outlive a power loss."""
    with contextlib.suppress(OSError):  # some file systems have no such thing as flushing a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def fingerprint(path: Path) -> str:
    """Content digest of a file or folder (names and bytes); file digests are remembered by size and time."""
    cache = default_root() / "fingerprints.json"
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    known: dict[str, str] = {}
    if cache.is_file():
        try:
            known = dict(json.loads(cache.read_text()))
        except (ValueError, TypeError):
            known = {}
    digest, changed = hashlib.sha256(), False
    for file in files:
        stat = file.stat()
        stamp = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        if stamp not in known:
            try:
                with file.open("rb") as handle:
                    known[stamp] = hashlib.file_digest(handle, "sha256").hexdigest()
            except OSError as error:
                raise UsageError(str(file), f"cannot be read ({error.strerror})") from None
            changed = True
        name = file.name if path.is_file() else str(file.relative_to(path))
        digest.update(f"{name}|{known[stamp]}\n".encode(errors="surrogateescape"))
    if changed:
        write_atomic(cache, json.dumps(known).encode())
    return digest.hexdigest()[:32]


def remembered(name: str, stamp: str, make: Callable[[], dict[Any, Any]]) -> dict[Any, Any]:
    """What ``make`` returns, plain JSON, kept in a file of the cache until ``stamp`` is another. Where the file
    cannot be read or written it is made each time."""
    path = default_root() / name
    try:
        known = dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        known = {}
    key, _, version = stamp.rpartition(" ")
    kept = known.get(key)
    if isinstance(kept, list) and len(kept) == 2 and kept[0] == version and isinstance(kept[1], dict):
        return kept[1]
    made = make()
    with contextlib.suppress(OSError, Full, TypeError):
        write_atomic(path, json.dumps({**known, key: [version, made]}).encode())
    return made


def plain(text: str) -> str:
    """Somebody else's text, safe to print: control characters, escapes and reversed writing become ``\ufffd``."""
    if text.isascii() and text.isprintable():
        return text
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in text)


def brief(text: str, most: int = 120) -> str:
    """Somebody else's text for a message: ``plain``, its middle left out where it is long."""
    return plain(text if len(text) <= most else f"{text[: most * 2 // 3]} ... {text[-most // 4 :]}")


def is_file(path: Path) -> bool:
    """Whether a regular file is there; a name that no file can have is not."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_there(path: Path) -> bool:
    """Whether anything is there; a name that nothing can have is not."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Whether a folder is there; a name that no folder can have is not."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Without searches for cycles: among hundreds of thousands of names or steps, which have none, they take up to
    half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
