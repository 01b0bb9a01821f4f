"""Who does a step: runs that share a store on one machine never do the same one at once.

``<root>/claims/<key>.lock`` is locked by the process that does the step. The system lets go of it when that
process ends, however it ends. Where files cannot be locked every claim is granted: then work may be done
twice, and is right all the same.
"""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filelock import FileLock


_KEY = re.compile(r"[0-9a-f]{40}")


class Claims:
    """The steps that this process has claimed."""

    def __init__(self, root: Path) -> None:
        self._folder = root / "claims"
        self._held: dict[str, FileLock] = {}

    def take(self, key: str) -> bool:
        """Claim a step; False while another run has it."""
        from filelock import FileLock, Timeout

        lock = FileLock(self._folder / f"{key}.lock", thread_local=False, fallback_to_soft=False)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return False
        except OSError:  # no locks on this file system, or not for this user
            return True
        self._held[key] = lock
        return True

    def release(self, key: str) -> None:
        """Let go of a step. Its file goes while it is still locked, so that nobody else's is removed."""
        lock = self._held.pop(key, None)
        if lock is not None:
            with contextlib.suppress(OSError):
                Path(lock.lock_file).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                lock.release()

    def release_all(self) -> None:
        for key in list(self._held):
            self.release(key)

    def sweep(self) -> None:
        """Remove the files of claims whose run was killed."""
        for path in self._folder.glob("*.lock"):
            if _KEY.fullmatch(path.stem) and self.take(path.stem):
                self.release(path.stem)

    def elsewhere(self) -> dict[str, float]:
        """Steps that other runs are at, and for how many seconds; claims of runs that were killed are removed."""
        now, found = time.time(), {}
        for path in self._folder.glob("*.lock"):
            if not _KEY.fullmatch(path.stem) or path.stem in self._held:
                continue
            if self.take(path.stem):
                self.release(path.stem)
                continue
            with contextlib.suppress(OSError):
                found[path.stem] = max(0.0, now - path.stat().st_mtime)
        return found
