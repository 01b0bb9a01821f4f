"""A guest's four walls on Linux: namespaces of its own, in which only code and system can be seen.

No network, no other process, no file but those that Python, the installed packages and the plugin consist of;
those are read-only. The store, the data, the user's home and other plugins' results are not there. Needs user
namespaces (kernel 5.12 or newer), no rights and no program. Elsewhere ``obstacle`` says what is missing.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import glob
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_NAMESPACES = 0x00020000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
"""Mounts, host name, System V IPC, users, processes, network."""
_BIND, _RECURSIVE, _PRIVATE = 0x1000, 0x4000, 0x40000
_MOUNT_SETATTR, _HERE, _ALL, _READ_ONLY = 442, -100, 0x8000, 1
_DEATH_SIGNAL, _NO_NEW_PRIVILEGES, _DROP_BOUND = 1, 38, 24
_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc", "/sys", "/nix/store", "/opt")
"""What belongs to no user."""


class Walls(NamedTuple):
    """What a contained guest may see beside the system: folders and files, read-only; and what it must not,
    where that lies inside them."""

    seen: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()


class Ground(NamedTuple):
    """What was found out about this machine: why nothing can be contained on it (empty if it can), and where
    Python and installed packages lie."""

    obstacle: str
    code: tuple[str, ...] = ()


def survey() -> Ground:
    """Try it out, in a process of its own that is started as guests are."""
    if sys.platform != "linux":
        return Ground(f"{sys.platform} has no user namespaces")
    command = [sys.executable, "-P", "-m", __name__]
    tried = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if tried.returncode == 0:
        return Ground("", tuple(json.loads(tried.stdout)))
    lines = tried.stderr.strip().splitlines()
    return Ground(lines[-1] if lines else f"exit code {tried.returncode}")


def _code() -> list[str]:
    """Where Python and installed packages lie."""
    places = [sys.prefix, sys.base_prefix, *(p for p in sys.path if p and Path(p).exists())]
    return list(dict.fromkeys(str(Path(p).resolve()) for p in places))


def enter(walls: Walls) -> None:
    """Go behind the walls: returns in a child process that cannot leave them; the caller's process waits for
    it and ends as it does. OSError if the system refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    _try(libc.unshare(_NAMESPACES), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    child = os.fork()
    if child:
        _follow(child)
    _try(libc.prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0), "prctl")
    _furnish(libc, walls)
    _lose_rights(libc)


def _follow(child: int) -> None:
    """Wait for the child, holding nothing that it uses, and end as it did; asked to end, end it."""
    faulthandler.disable()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
    os.closerange(3, 1 << 16)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code if code >= 0 else 128 - code)


def _furnish(libc: ctypes.CDLL, walls: Walls) -> None:
    """A root of one's own with what may be seen in it."""
    real = list(dict.fromkeys(os.path.realpath(p) for p in (*_SYSTEM, *walls.seen) if os.path.exists(p)))
    held = {p: os.open(p, os.O_PATH) for p in _outermost(real)}
    devices = {p: os.open(p, os.O_PATH) for p in _devices()}
    _try(libc.mount(b"none", b"/", None, _RECURSIVE | _PRIVATE, None), "mount")
    _mount(libc, "tmpfs", "/tmp")
    root = "/tmp/root"
    for place in ("/tmp", "/dev/shm"):  # what may be written, and forgotten with the guest
        os.makedirs(root + place)
        _mount(libc, "tmpfs", root + place)
    for place, handle in held.items():
        _bind(libc, handle, root + place)
        _read_only(libc, root + place, _ALL)
    for link in _SYSTEM:  # /lib is a link into /usr on most systems
        if os.path.islink(link) and not os.path.lexists(root + link):
            os.symlink(os.readlink(link), root + link)
    for place in map(os.path.realpath, walls.hidden):
        if os.path.isdir(root + place):
            _mount(libc, "tmpfs", root + place)
    for place, handle in devices.items():
        _bind(libc, handle, root + place)
    os.makedirs(f"{root}/proc", exist_ok=True)
    if libc.mount(b"proc", f"{root}/proc".encode(), b"proc", 0, None):
        # some containers forbid a fresh one; the old one tells nothing of other users' namespaces
        _try(libc.mount(b"/proc", f"{root}/proc".encode(), None, _BIND | _RECURSIVE, None), "mount /proc")
    for handle in (*devices.values(), *held.values()):
        os.close(handle)
    _read_only(libc, "/tmp", 0)  # the root itself
    os.chroot(root)
    os.chdir("/tmp")


def _devices() -> list[str]:
    """Those that hold nobody's data: no disks, no terminals; graphics cards are among them."""
    plain = [f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom")]
    return [p for p in (*plain, *sorted(glob.glob("/dev/nvidia*"))) if Path(p).is_char_device()]


def _outermost(places: Sequence[str]) -> list[str]:
    """The places that lie in none of the others."""
    return [p for p in places if not any(p != q and Path(p).is_relative_to(q) for q in places)]


def _bind(libc: ctypes.CDLL, source: int, target: str) -> None:
    """Show an open folder or file at ``target``."""
    if os.path.isdir(f"/proc/self/fd/{source}"):
        os.makedirs(target, exist_ok=True)
    elif not os.path.exists(target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        Path(target).touch()
    _try(
        libc.mount(f"/proc/self/fd/{source}".encode(), target.encode(), None, _BIND | _RECURSIVE, None),
        f"mount {target}",
    )


def _mount(libc: ctypes.CDLL, kind: str, target: str) -> None:
    _try(libc.mount(kind.encode(), target.encode(), kind.encode(), 0, None), f"mount {target}")


def _read_only(libc: ctypes.CDLL, target: str, depth: int) -> None:
    """The mount at ``target``, with ``_ALL`` those below it too; other limits stay."""
    wanted = (ctypes.c_uint64 * 4)(_READ_ONLY, 0, 0, 0)
    place, size = ctypes.c_char_p(target.encode()), ctypes.sizeof(wanted)
    _try(libc.syscall(_MOUNT_SETATTR, _HERE, place, depth, ctypes.byref(wanted), size), "mount_setattr")


def _lose_rights(libc: ctypes.CDLL) -> None:
    """No capability is left, and none can be had again."""
    _try(libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "prctl")
    for capability in range(64):
        libc.prctl(_DROP_BOUND, capability, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    nothing = (ctypes.c_uint32 * 6)()
    _try(libc.capset(ctypes.byref(header), ctypes.byref(nothing)), "capset")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _try(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _probe() -> None:
    """Go behind walls and see that they stand; where code lies is printed."""
    code = _code()
    print(json.dumps(code), flush=True)
    with tempfile.NamedTemporaryFile() as outside:
        enter(Walls(tuple(code)))
        if os.path.exists(outside.name):
            raise SystemExit("files of others can be seen from inside")
        with contextlib.suppress(OSError), open(os.path.join(sys.prefix, "mergesec-probe"), "wb"):
            raise SystemExit("installed packages can be written from inside")
        os._exit(0)  # the file is the other process's to remove


if __name__ == "__main__":
    try:
        _probe()
    except OSError as error:
        sys.exit(str(error.strerror))
