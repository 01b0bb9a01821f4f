"""Speed as ratios against a peer in the same run; nothing here asserts seconds."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mergesec.contracts import Expert, MergeContext
from mergesec.execution.store import Store
from mergesec.planning.catalog import load_catalog

PARAMETERS, EXPERTS = 2_000_000, 4


def _weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layer{i}": torch.randn(PARAMETERS // 16, generator=generator) for i in range(16)}


def _best(run: Callable[[], Any], times: int = 3) -> float:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@pytest.mark.parametrize("method", ["simple_average", "task_arithmetic", "ties"])
def test_merging_against_plain_torch(benchmark: Any, method: str) -> None:
    """Peers a script would use: ``torch.stack(...).mean(0)`` per tensor; for TIES a sort of each vector."""
    base, experts = _weights(0), [Expert(str(i), _weights(i + 1)) for i in range(EXPERTS)]
    entry = load_catalog().get("merging", method)
    merging = entry.create(entry.card.bind(method, {}))
    ctx = MergeContext(torch.device("cpu"), 0, None, {}, lambda merged: 0.0)  # type: ignore[arg-type]

    def plain() -> dict[str, torch.Tensor]:
        return {k: torch.stack([e.weights[k] for e in experts]).mean(0) for k in base}

    def sorts() -> None:
        for e in experts:
            torch.sort(torch.cat([(e.weights[k] - base[k]).abs() for k in base]))

    benchmark(merging.merge, base, experts, ctx)
    ours, peer = _best(lambda: merging.merge(base, experts, ctx)), _best(sorts if method == "ties" else plain)
    benchmark.extra_info["ratio_to_peer"] = ours / peer
    assert ours / peer < {"simple_average": 10, "task_arithmetic": 10, "ties": 3}[method], ours / peer


def test_store_against_hashing(benchmark: Any, tmp_path: Any) -> None:
    """Peer: SHA-256 of the same bytes, which verifying cannot do without."""
    from safetensors.torch import save

    blob = save(_weights(0))
    store = Store(tmp_path)
    store.put("merge", "k", blob, {})
    benchmark(store.read, "merge", "k")
    ratio = _best(lambda: store.read("merge", "k")) / _best(lambda: hashlib.sha256(blob).digest())
    benchmark.extra_info["ratio_to_sha256"] = ratio
    assert ratio < 4
