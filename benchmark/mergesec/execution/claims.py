"""Who does a step: runs that share a store, on one machine or on many, never do the same one at once.

``<root>/claims/<key>.lease`` is made by whoever does the step, touched every ``BEAT`` seconds while he does it and
removed at the end. One that nobody touched for ``STALE`` seconds, or whose process is known to be gone, is taken
over. Only what network file systems keep is relied on: a file is created by one of many who try, replaced at once,
and all times are the file server's, so clocks need not agree. Where no lease can be written every claim is
granted: then work may be done twice, and is right all the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import threading
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

from mergesec.execution.store import UNREADABLE, read_plain
from mergesec.files import Full, write_atomic

BEAT = 10.0
"""Seconds between two touches of a lease."""
STALE = 120.0
"""Seconds without a touch after which a lease is nobody's: longer than what a network file system remembers."""
_KEY = re.compile(r"[0-9a-f]{40}")
_TOKEN = re.compile(r"[0-9a-f]{16}")
_LEFT_OVER = re.compile(r"\.(dead|clock|tmp)-[0-9a-f]{16}")


@dataclass(frozen=True)
class Lease:
    """Who does a step, since when, and what is known of those who had it before."""

    token: str
    machine: str
    process: int
    born: str
    """When the process began, as its machine counts: its number may be another's later."""
    since: float
    who: str = ""
    """A name that others know it by: a job."""
    deaths: int = 0
    """How often whoever had the step ended in the middle of it, in a row."""
    ended: str = ""
    """How its holder ended, if somebody could tell; it is free then."""


class _Seen(NamedTuple):
    """A lease's file as it was looked at. ``lease`` is None while it is being written, or if it was torn."""

    lease: Lease | None
    touched: float

    @property
    def token(self) -> str:
        return self.lease.token if self.lease else ""


class Claims:
    """The steps that this process has claimed, as ``who``."""

    def __init__(self, root: Path, who: str = "") -> None:
        self._folder = root / "claims"
        self._who = who
        self._held: dict[str, Lease] = {}
        self._guard = threading.Lock()
        self._heart: threading.Thread | None = None
        self._ahead: float | None = None
        """The file server's clock less this process's own."""

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.lease"

    # ---- one's own

    def take(self, key: str) -> bool:
        """Claim a step; False while another run has it."""
        try:
            return self._make(key) or self._take_over(key)
        except (OSError, Full):  # no files here, no room, or not for this user
            return True

    def take_or_hold(self, key: str) -> bool:
        """Claim a step unless it is claimed here already; False while another run has it."""
        return key in self._held or self.take(key)

    def deaths(self, key: str) -> tuple[int, str]:
        """How often others ended in the middle of a step that is claimed here, and what is known of the last."""
        lease = self._held.get(key)
        return (lease.deaths, lease.ended) if lease else (0, "")

    def release(self, key: str) -> None:
        """Let go of a step, unless it was taken over meanwhile."""
        lease = self._held.pop(key, None)
        if lease is not None:
            path = self._path(key)
            with contextlib.suppress(OSError):
                if lease.token.encode() in read_plain(path):
                    path.unlink()

    def release_all(self) -> None:
        for key in list(self._held):
            self.release(key)

    def _make(self, key: str) -> bool:
        """Make the lease of a step unless there is one."""
        lease = self._fresh()
        try:
            made = _create(self._path(key), _text(lease))
        except FileNotFoundError:
            self._folder.mkdir(parents=True, exist_ok=True)
            made = _create(self._path(key), _text(lease))
        if not made:
            return False
        self._hold(key, lease)
        return True

    def _fresh(self, deaths: int = 0) -> Lease:
        """A lease of one's own."""
        me = os.getpid()
        return Lease(secrets.token_hex(8), _machine(), me, _born(me), time.time(), self._who, deaths)

    def _hold(self, key: str, lease: Lease) -> None:
        """Know a step as one's own, and keep touching its lease."""
        self._held[key] = lease
        with self._guard:
            if self._heart is None:
                self._heart = threading.Thread(target=self._beats, name="leases", daemon=True)
                self._heart.start()

    def _take_over(self, key: str) -> bool:
        """Put one's own lease in the place of one whose holder is gone. Of many who try one makes the mark that
        lets him; the lease's file is never away meanwhile, so that nobody makes another."""
        path = self._path(key)
        seen = _look(path)
        if seen is None:
            return self._make(key)
        if not self._is_dead(seen):
            return False
        mark = self._folder / f".dead-{seen.token if _TOKEN.fullmatch(seen.token) else '0' * 16}"
        if not _create(mark, b""):
            with contextlib.suppress(OSError):  # whoever made it ended in the middle
                if self._now() - mark.lstat().st_mtime > STALE:
                    mark.unlink()
            return False
        try:
            if _look(path) != seen:  # somebody was faster
                return False
            deaths, ended = (
                (seen.lease.deaths + (not seen.lease.ended), seen.lease.ended) if seen.lease else (0, "")
            )
            lease = self._fresh(deaths)
            write_atomic(path, _text(lease))
            self._hold(key, replace(lease, ended=ended))
            return True
        finally:
            mark.unlink(missing_ok=True)

    def _beats(self) -> None:
        """Touches what is held, until nothing is."""
        while True:
            time.sleep(BEAT)
            with self._guard:
                if not self._held:
                    self._heart = None
                    return
            for key, lease in list(self._held.items()):
                seen = _look(self._path(key))
                if seen is not None and seen.token == lease.token:
                    with contextlib.suppress(OSError):
                        os.utime(self._path(key))  # without a time: the file server's own

    # ---- the others'

    def sweep(self) -> None:
        """Remove the leases of runs that are gone, and what was left in the middle of taking over."""
        for path in self._folder.glob("*"):
            if path.suffix == ".lease" and _KEY.fullmatch(path.stem):
                if path.stem not in self._held and (seen := _look(path)) and self._is_dead(seen):
                    self.take(path.stem)
                    self.release(path.stem)
            elif _LEFT_OVER.fullmatch(path.name):
                with contextlib.suppress(OSError):
                    if time.time() - path.lstat().st_mtime > 3600:
                        path.unlink()

    def taken(self) -> set[str]:
        """Steps with a lease, in one look at the folder; dead ones are among them."""
        try:
            return {
                name[:40] for name in os.listdir(self._folder) if _KEY.fullmatch(name.removesuffix(".lease"))
            }
        except OSError:
            return set()

    def elsewhere(self) -> dict[str, float]:
        """Steps that other runs are at, and for how many seconds."""
        now, found = time.time(), {}
        for key in self.taken() - self._held.keys():
            seen = _look(self._path(key))
            if seen is not None and seen.lease is not None and not self._is_dead(seen):
                found[key] = max(0.0, now - seen.lease.since)
        return found

    def bury(self, who: str, ended: str, blame: bool) -> list[str]:
        """Free all steps of somebody who is known to be gone, saying how he ended; ``blame``: a step that he was at
        may have been the reason. Which steps."""
        found = []
        for key in self.taken() - self._held.keys():
            seen = _look(self._path(key))
            if seen is None or seen.lease is None or seen.lease.who != who or seen.lease.ended:
                continue
            told = replace(seen.lease, ended=ended, deaths=seen.lease.deaths + blame)
            with contextlib.suppress(OSError, Full):
                write_atomic(self._path(key), _text(told))
                found.append(key)
        return found

    def _is_dead(self, seen: _Seen) -> bool:
        lease = seen.lease
        if lease is not None and (lease.ended or (lease.machine == _machine() and _is_gone(lease))):
            return True
        if self._now() - seen.touched <= STALE:
            return False
        self._ahead = None  # before somebody's work is taken for dead, look whether a clock was set
        return self._now() - seen.touched > STALE

    def _now(self) -> float:
        """The file server's time."""
        if self._ahead is None:
            probe = self._folder / f".clock-{secrets.token_hex(8)}"
            _create(probe, b"")
            os.utime(probe)
            self._ahead = probe.stat().st_mtime - time.monotonic()
            probe.unlink(missing_ok=True)
        return time.monotonic() + self._ahead


def _text(lease: Lease) -> bytes:
    return json.dumps(vars(lease)).encode()


def _create(path: Path, data: bytes) -> bool:
    """Make a file unless there is one; OSError if it cannot be written."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        return False
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def _look(path: Path) -> _Seen | None:
    """A lease's file; None if there is none. It is opened, since that is when a network file system looks anew."""
    try:
        data = read_plain(path)
        touched = path.lstat().st_mtime
    except OSError:
        return None
    try:
        lease = Lease(**json.loads(data))
        sound = (
            isinstance(lease.ended, str) and isinstance(lease.deaths, int) and isinstance(lease.since, float)
        )
    except UNREADABLE:
        return _Seen(None, touched)
    return _Seen(lease if sound else None, touched)


@cache
def _machine() -> str:
    """This machine since it was started, and whose processes are seen from here: a container has its own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


@cache
def _born(process: int) -> str:
    """When this process began, by its number: a fork has another."""
    return birth(process) or ""


def _is_gone(lease: Lease) -> bool:
    """Whether the process of a lease of this machine is no more, or its number another's by now."""
    try:
        os.kill(lease.process, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError, TypeError):
        pass  # another user's
    born = birth(lease.process)
    return born is not None and born != lease.born


def birth(process: int) -> str | None:
    """When a process of this machine began, empty if it is dead and only not yet told of; None if nothing tells."""
    try:
        told = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *rest = told.rpartition(")")[2].split()
    return "" if state in "ZX" else rest[18]
