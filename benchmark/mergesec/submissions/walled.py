"""The battery on a stranger's method, behind walls: ``bench plugin check`` imports what it checks, this process not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergesec.errors import UsageError
from mergesec.execution.guests.containment import Walls, enter, survey
from mergesec.submissions.findings import Finding

PATIENCE = 600.0
"""Seconds that the battery may take."""
KEPT = ("PATH", "PYTHONPATH", "LANG", "LC_ALL", "OMP_NUM_THREADS", "LD_LIBRARY_PATH")
"""What of the environment it may see."""


def battery(
    plugins: Sequence[Path], kind: str, name: str, contained: bool, data_root: Path | None = None
) -> list[Finding]:
    """The battery's checks of one component, and whether its card is true of its class; run in a process of its
    own, behind walls unless ``contained`` is False. UsageError where this machine has none."""
    walls = _walls(plugins, data_root) if contained else None
    order = {
        "walls": walls and walls._asdict(), "plugins": [str(p.resolve()) for p in plugins], "kind": kind,
        "name": name, "data_root": str(data_root.resolve()) if data_root else None,
    }  # fmt: skip
    with (
        tempfile.TemporaryFile() as answer,
        tempfile.TemporaryFile() as words,
        tempfile.TemporaryDirectory() as home,
    ):
        told = {k: v for k, v in os.environ.items() if k in KEPT}
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(answer.fileno()), json.dumps(order)],
            pass_fds=(answer.fileno(),), stdin=subprocess.DEVNULL, stdout=words, stderr=words,
            env={**told, "HOME": home, "MERGESEC_CACHE": f"{home}/cache"}, cwd=home, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            return [Finding("battery", "REFUSED", f"did not come to its end in {PATIENCE:.0f} s")]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        answer.seek(0)
        return _read(answer.read(1 << 20), code, words)


def _walls(plugins: Sequence[Path], data_root: Path | None) -> Walls:
    ground = survey()
    if ground.obstacle:
        raise UsageError(
            "--contained", f"a stranger's code cannot be contained on this machine: {ground.obstacle}"
        )
    files = [str(p.resolve()) for p in plugins]
    return Walls((*ground.code, *files, *([str(data_root.resolve())] if data_root else ())))


def _read(answer: bytes, code: int, words: Any) -> list[Finding]:
    """What the process found; what it wrote is a stranger's text."""
    try:
        rows = json.loads(answer)
        return [Finding(str(row[0])[:200], _verdict(row[1]), str(row[2])[:500]) for row in rows]
    except (ValueError, TypeError, LookupError, RecursionError):
        words.seek(max(0, words.seek(0, os.SEEK_END) - 2000))
        last = words.read().decode(errors="replace").strip().splitlines()[-1:]
        return [Finding("battery", "REFUSED", f"ended with code {code}: {' '.join(last)[:300]}")]


def _verdict(passed: Any) -> Any:
    return {True: "pass", None: "skip"}.get(passed, "REFUSED")


def _inside(order: dict[str, Any]) -> list[tuple[str, bool | None, str]]:
    """The checks, in a process that may be the stranger's."""
    from mergesec.conformance.battery import check_component
    from mergesec.planning.catalog import load_catalog
    from mergesec.submissions.classes import card_against_class

    catalog = load_catalog(order["plugins"])
    entry = catalog.get(order["kind"], order["name"])
    root = Path(order["data_root"]) if order["data_root"] else None
    checks = check_component(entry, catalog, root)
    found = [(c.name, c.passed, c.message) for c in checks]
    if checks[0].passed:
        wrong = card_against_class(entry)
        found.insert(1, ("the card is true of its class", not wrong, "; ".join(wrong)))
    return found


def main() -> None:
    """``python -m mergesec.submissions.walled FILE-DESCRIPTOR ORDER``."""
    answer, order = int(sys.argv[1]), json.loads(sys.argv[2])
    if order["walls"]:
        enter(Walls(tuple(order["walls"]["seen"]), tuple(order["walls"]["hidden"])))
        os.environ["HOME"], os.environ["MERGESEC_CACHE"] = "/tmp", "/tmp/cache"
    data = json.dumps(_inside(order)).encode()
    os.pwrite(answer, data, 0)


if __name__ == "__main__":
    main()
