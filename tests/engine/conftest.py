"""A finished run of a small grid with every threat model, shared by tests that only read or copy it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WHOLE: dict[str, Any] = {
    "axes": {
        "attacks": ["none", "realign", "badnets"],
        "defenses": ["none", {"name": "params", "scaling": "diagonal"}, "clp"],
        "victim": ["micro/bars"],
        "adversary": ["micro/bars"],
    }
}
"""18 cells, 61 steps: clean, protection and backdoor."""


@pytest.fixture(scope="session")
def whole() -> dict[str, Any]:
    """Fields of the grid that ``finished`` ran."""
    return WHOLE


@pytest.fixture(scope="session")
def finished(bench_class: Any, once: Callable[..., Path]) -> Any:
    """An uninterrupted run of the grid ``whole``: read its store and results, do not change them."""

    def make(folder: Path) -> None:
        bench = bench_class(folder)
        ran = bench.run(bench.grid("whole", **WHOLE))
        assert ran.code == 0, ran.err
        (folder / "out.txt").write_text(ran.out)

    return bench_class(once("finished", make))


@pytest.fixture
def copied(finished: Any, bench: Any) -> Any:
    """A ``bench`` of one's own that starts from what ``finished`` left."""
    shutil.copytree(finished.store, bench.store)
    shutil.copytree(finished.results, bench.results)
    return bench


@pytest.fixture(scope="session")
def commits() -> Callable[[Path], dict[str, int]]:
    """When each artifact of a store was committed, by ``kind/key``."""

    def read(store: Path) -> dict[str, int]:
        found = (store / "artifacts").glob("*/*.json")
        return {f"{p.parent.name}/{p.stem}": p.stat().st_mtime_ns for p in found}

    return read
