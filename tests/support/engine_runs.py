"""Runs on any engine: a merge that waits for a sign, and what is asked of a run while it goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAPS = """
import os
import time

from mergesec.contracts import Merged, MergeMethod

CARD = {
    "name": "naps", "class": "Naps", "kind": "merging", "version": "1", "title": "n", "summary": "n",
    "parameters": {
        "number": {"type": "int", "default": 0, "min": 0, "max": 100, "doc": "n"},
        "until": {"type": "str", "default": "", "doc": "n"},
    },
}


class Naps(MergeMethod):
    def __init__(self, number=0, until=""):
        self.until = until

    def merge(self, base, experts, ctx):
        while not os.path.exists(self.until):
            time.sleep(0.05)
        return Merged(base)
"""


def napping(bench: Any, name: str, naps: int) -> list[str]:
    """Arguments of ``bench run`` for a grid of so many merges, which wait until ``bench.home / "go"`` is there."""
    plugin = bench.home / "naps.py"
    plugin.write_text(NAPS)
    merging = [{"name": "naps", "number": list(range(naps)), "until": str(bench.home / "go")}]
    grid = bench.grid(
        name, axes={"merging": merging}, threats=["clean"], recipe={"epochs": 1, "max_train": 16}
    )
    own = ("--not-contained", "--results", str(bench.results))
    arguments: list[str] = bench.arguments(grid, *own, plugins=(plugin,))
    return arguments


def at_naps(store: Path) -> list[dict[str, Any]]:
    """The leases of a store once everything before the merges is done."""
    found = [lease for lease in leases(store).values() if not lease["who"].startswith("driver")]
    return found if len(list(store.glob("artifacts/evaluate/*.json"))) >= 2 else []


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


def comparable(folder: Path) -> dict[str, bytes]:
    """The records of a grid, byte for byte but for what they cost."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        record.pop("cost", None)
        found[path.name] = json.dumps(record, sort_keys=True).encode()
    return found
