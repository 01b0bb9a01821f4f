"""Memory that a worker lets go of returns to the system once it has met a heavy artifact."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import pytest

PROBE = """
import json, sys
from pathlib import Path
import torch
from mergesec.execution import allocation
from mergesec.execution.store import Store
from mergesec.execution.work import Bench, packed

ENTRIES, BLOCKS = 3 << 17, 200  # 1.5 MiB each

def resident():
    return 1024 * int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])

def holes():
    "What stays resident of every other block, in shares of them, when it is let go."
    blocks = [torch.ones(ENTRIES) for _ in range(BLOCKS)]
    before = resident()
    blocks = blocks[::2]
    return 1 - (before - resident()) / (2 * ENTRIES * BLOCKS)

def read(entries):
    store.put("base", "k", packed({"w": torch.ones(entries)}), {})
    bench.forget("k")
    bench.read("base", "k")

torch.ones(20 << 18)  # let go: glibc's own threshold is 20 MiB now
allocation.HEAVY = 8 << 20
store = Store(Path(sys.argv[1]))
bench = Bench(store, None, torch.device("cpu"))
read(1 << 10)
light = holes()
read(allocation.HEAVY >> 2)
print(json.dumps([light, holes()]))
"""


def has_glibc() -> bool:
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


@pytest.mark.skipif(not has_glibc(), reason="glibc's allocator alone is asked")
def test_large_blocks_return_once_an_artifact_is_heavy_and_not_before(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PROBE, str(tmp_path)], capture_output=True, text=True, check=True
    )
    light, heavy = json.loads(ran.stdout)
    assert light > 0.9
    assert heavy < 0.1


def test_other_libraries_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from mergesec.execution import allocation

    monkeypatch.setattr(allocation.ctypes, "CDLL", lambda name: object())
    assert not allocation.give_back_blocks()
