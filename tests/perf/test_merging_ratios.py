"""Merging against peers that run in the same process at the same moment: ratios, never seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergesec.contracts import Expert
from mergesec.planning.catalog import load_catalog
from mergesec.streaming.merging import context, merge_files
from mergesec.streaming.reading import open_weights
from mergesec_methods.merging._ranks import magnitude_ranks, tensor_pieces
from mergesec_methods.merging.dare import Coins

PARAMETERS, EXPERTS = 4_000_000, 4
Weights = dict[str, torch.Tensor]


def drawn(seed: int) -> Weights:
    rng = np.random.default_rng(seed)
    return {
        f"layer{i}": torch.from_numpy(rng.standard_normal(PARAMETERS // 8, dtype=np.float32))
        for i in range(8)
    }


@pytest.fixture(scope="module")
def inputs() -> tuple[Weights, list[Expert]]:
    base = drawn(0)
    moved = [{n: t.mul_(0.05).add_(base[n]) for n, t in drawn(i + 1).items()} for i in range(EXPERTS)]
    return base, [Expert(str(i), weights) for i, weights in enumerate(moved)]


def create(name: str, **parameters: Any) -> Any:
    entry = load_catalog().get("merging", name)
    return entry.create(entry.card.bind(name, parameters))


def ratio(ours: Callable[[], Any], peer: Callable[[], Any], times: int = 5) -> float:
    """Best time over best time, taken in turns so that both see the same machine."""
    best = [float("inf"), float("inf")]
    for _ in range(times):
        for index, run in enumerate((ours, peer)):
            start = time.perf_counter()
            run()
            best[index] = min(best[index], time.perf_counter() - start)
    return best[0] / best[1]


@pytest.mark.parametrize(
    ("name", "bound"),
    [("simple_average", 8), ("task_arithmetic", 8), ("magmax", 10), ("dare", 25), ("ties", 40)],
)
def test_merging_against_copying(
    benchmark: Any, inputs: tuple[Weights, list[Expert]], name: str, bound: float
) -> None:
    """Peer: one read of all inputs and one write of the result, as plain copies. Bounds are several times
    what a quiet machine shows, so that they catch a lost order of magnitude and not a busy neighbour."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("the bounds are the compiled loops', which are not used without AVX2 (see tensorwise)")
    base, experts = inputs
    method, ctx = create(name), context(name, 0)
    target = torch.empty(PARAMETERS)
    source = torch.cat(list(base.values()))

    def copies() -> None:
        for _ in range((EXPERTS + 2) // 2):
            target.copy_(source)

    benchmark(method.merge, base, experts, ctx)
    found = ratio(lambda: method.merge(base, experts, ctx), copies)
    benchmark.extra_info["ratio_to_copying"] = found
    assert found < bound, found


def test_thresholds_against_selection(benchmark: Any, inputs: tuple[Weights, list[Expert]]) -> None:
    """Peer: the magnitudes in memory and torch's own selection."""
    base = torch.cat(list(inputs[0].values()))
    expert = torch.cat(list(inputs[1][0].weights.values()))
    rank = int(0.8 * PARAMETERS)

    def ours() -> float:
        return magnitude_ranks(tensor_pieces("w", base, [expert]), 1, PARAMETERS, [rank])[0][0]

    def peer() -> float:
        return float(torch.kthvalue((expert - base).abs_(), rank).values)

    assert ours() == peer()
    benchmark(ours)
    found = ratio(ours, peer)
    benchmark.extra_info["ratio_to_kthvalue"] = found
    assert found < 1, found


@pytest.mark.parametrize(("probability", "bound"), [(0.5, 0.5), (0.1, 1.0)])
def test_coins_against_torch(benchmark: Any, probability: float, bound: float) -> None:
    """Peer: uniform numbers compared with the probability."""
    size, generator = 1 << 20, torch.Generator()
    coins = Coins(probability)
    benchmark(coins.heads, size, generator)
    found = ratio(
        lambda: coins.heads(size, generator), lambda: torch.rand(size, generator=generator) < probability
    )
    benchmark.extra_info["ratio_to_rand"] = found
    assert found < bound, found


def test_files_against_loading_and_saving(
    benchmark: Any, inputs: tuple[Weights, list[Expert]], tmp_path: Path
) -> None:
    """Peer: load all files whole, merge in memory, save. Reading tensor by tensor must not cost more."""
    base, experts = inputs
    names = ["base", *(e.task for e in experts)]
    for name, weights in zip(names, [base, *(e.weights for e in experts)], strict=True):
        save_file(dict(weights), tmp_path / f"{name}.safetensors")
    method = create("task_arithmetic")

    def ours() -> None:
        opened = [open_weights(tmp_path / f"{name}.safetensors", name) for name in names]
        lazy = dict(zip(names[1:], opened[1:], strict=True))
        merge_files(method, opened[0], lazy, tmp_path / "ours.safetensors", force=True)

    def peer() -> None:
        loaded = [load_file(tmp_path / f"{name}.safetensors") for name in names]
        members = [Expert(name, weights) for name, weights in zip(names[1:], loaded[1:], strict=True)]
        merged = method.merge(loaded[0], members, context("task_arithmetic", 0))
        save_file({n: t.clone() for n, t in merged.shared.items()}, tmp_path / "peer.safetensors")

    benchmark(ours)
    found = ratio(ours, peer)
    benchmark.extra_info["ratio_to_whole_files"] = found
    assert found < 4, found  # ours also flushes to disk


def test_tiny_tensors_against_loading_and_saving(benchmark: Any, tmp_path: Path) -> None:
    """Peer: safetensors loads whole files, a comprehension merges, safetensors saves; no name, type, shape or value is
    looked at there. 20,000 tensors of 16 entries: Python's work per name is what there is."""
    names = ["base", "a", "b"]
    for seed, name in enumerate(names):
        numbers = torch.from_numpy(
            np.random.default_rng(seed).standard_normal((20_000, 4, 4), dtype=np.float32)
        )
        save_file({f"w{i:05}": numbers[i].clone() for i in range(20_000)}, tmp_path / f"{name}.safetensors")
    method = create("task_arithmetic", scaling=0.3)

    def ours() -> None:
        base, *experts = [open_weights(tmp_path / f"{name}.safetensors", name) for name in names]
        merge_files(
            method, base, dict(zip("ab", experts, strict=True)), tmp_path / "ours.safetensors", force=True
        )

    def peer() -> None:
        base, *experts = [load_file(tmp_path / f"{name}.safetensors") for name in names]
        merged = {n: w + 0.3 * sum(e[n] - w for e in experts) for n, w in base.items()}
        save_file(merged, tmp_path / "peer.safetensors")

    benchmark.pedantic(ours, rounds=1)
    found = ratio(ours, peer)
    benchmark.extra_info["ratio_to_whole_files"] = found
    assert found < 1, found
