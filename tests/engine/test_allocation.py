"""Memory that a worker lets go of returns to the system: at once while it trains a heavy network, else at its next read."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mergesec.execution import allocation, steps
from mergesec.execution.store import Store
from mergesec.execution.work import Bench, Result, Work, packed
from mergesec.planning.plan import Step

PROBE = """
import json, sys
from pathlib import Path
import torch
from mergesec.execution.allocation import returned_blocks, trim

ENTRIES, BLOCKS = 3 << 17, 100  # 1.5 MiB each

def resident():
    return 1024 * int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])

def holes(after=lambda: None):
    "What stays resident of every other block, in shares of them, when it is let go."
    blocks = [torch.ones(ENTRIES) for _ in range(BLOCKS)]
    before = resident()
    blocks = blocks[::2]
    after()
    return 1 - (before - resident()) / (2 * ENTRIES * BLOCKS)

torch.ones(20 << 18)  # let go: glibc's own threshold is 20 MiB now
if sys.argv[1] == "trimmed":
    left = holes(trim)
else:
    with returned_blocks(sys.argv[1] != "unwanted"):
        left = 0.0 if sys.argv[1] == "afterwards" else holes()
    left = holes() if sys.argv[1] == "afterwards" else left
print(json.dumps(left))
"""


def has_glibc() -> bool:
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


@pytest.mark.skipif(not has_glibc(), reason="glibc's allocator alone is asked")
@pytest.mark.parametrize(
    ("when", "stay"), [("wanted", False), ("unwanted", True), ("afterwards", True), ("trimmed", False)]
)
def test_large_blocks_return_at_once_where_that_is_wanted_and_else_when_trimmed(
    when: str, stay: bool
) -> None:
    ran = subprocess.run([sys.executable, "-c", PROBE, when], capture_output=True, text=True, check=True)
    left = json.loads(ran.stdout)
    assert left > 0.9 if stay else left < 0.1


def test_other_libraries_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation.ctypes, "CDLL", lambda name: object())
    allocation.trim()
    with allocation.returned_blocks():
        pass


class Asked:
    """A C library that remembers what it was asked."""

    def __init__(self) -> None:
        self.thresholds: list[int] = []
        self.trims = 0

    def mallopt(self, what: int, value: int) -> int:
        self.thresholds.append(value)
        return 1

    def malloc_trim(self, pad: int) -> int:
        self.trims += 1
        return 1


@pytest.mark.parametrize(
    ("kind", "heavy", "thresholds", "trims"),
    [
        ("expert", 4000, [allocation.BLOCK, allocation.USUAL], 3),
        ("expert", 4001, [], 0),
        ("evaluate", 4000, [], 1),
    ],
)
def test_steps_that_train_a_heavy_network_ask_for_it_and_any_heavy_read_trims(
    kind: str, heavy: int, thresholds: list[int], trims: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, store = Asked(), Store(tmp_path)
    monkeypatch.setattr(allocation, "_library", lambda: library)
    monkeypatch.setattr(allocation, "HEAVY", heavy)
    store.put("base", "b" * 40, packed({"w": torch.ones(1000)}), {})
    seen: list[list[int]] = []

    def work_on(work: Work) -> Result:
        work.tensors("base")
        seen.append(list(library.thresholds))
        return Result({})

    monkeypatch.setitem(steps.KINDS, kind, work_on)
    step = Step(kind=kind, key="a" * 40, inputs=(("base", "b" * 40),), components=(), args="{}")
    catalog: Any = None
    steps.run(step, Bench(store, catalog, torch.device("cpu")), {"b" * 40: "base"})
    assert seen == [thresholds[:1]]
    assert (library.thresholds, library.trims) == (thresholds, trims)
