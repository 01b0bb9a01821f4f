"""Runs on any engine: a merge that takes its time, and what is asked of a run while it goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAPS = """
import time

from mergesec.contracts import Merged, MergeMethod

CARD = {
    "name": "naps", "class": "Naps", "kind": "merging", "version": "1", "title": "n", "summary": "n",
    "parameters": {
        "number": {"type": "int", "default": 0, "min": 0, "max": 100, "doc": "n"},
        "seconds": {"type": "float", "default": 1.0, "min": 0.0, "max": 600.0, "doc": "n"},
    },
}


class Naps(MergeMethod):
    def __init__(self, number=0, seconds=1.0):
        self.seconds = seconds

    def merge(self, base, experts, ctx):
        print("napping")
        time.sleep(self.seconds)
        return Merged(base)
"""


def napping(bench: Any, name: str, naps: int, seconds: float) -> list[str]:
    """Arguments of ``bench run`` for a grid of so many merges that take so long each."""
    plugin = bench.home / "naps.py"
    plugin.write_text(NAPS)
    merging = [{"name": "naps", "number": list(range(naps)), "seconds": seconds}]
    grid = bench.grid(
        name, axes={"merging": merging}, threats=["clean"], recipe={"epochs": 1, "max_train": 16}
    )
    own = ("--not-contained", "--results", str(bench.results))
    arguments: list[str] = bench.arguments(grid, *own, plugins=(plugin,))
    return arguments


def wait_for(what: Callable[[], Any], seconds: float = 120.0) -> Any:
    """What ``what`` returns as soon as that is something."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)
    return found


def leases(store: Path) -> dict[str, dict[str, Any]]:
    """The leases of a store by key; one that is being written is left out."""
    found = {}
    for path in (store / "claims").glob("*.lease"):
        try:
            found[path.stem] = json.loads(path.read_bytes())
        except (OSError, ValueError):
            continue
    return found


def merged(store: Path) -> int:
    """How many merges are done."""
    return len(list(store.glob("artifacts/merge/*.json")))


def comparable(folder: Path) -> dict[str, bytes]:
    """The records of a grid, byte for byte but for what they cost."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        record.pop("cost", None)
        found[path.name] = json.dumps(record, sort_keys=True).encode()
    return found
