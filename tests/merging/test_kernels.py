"""Compiled loops against the torch code they stand for: the same bits, whatever the shape, type and rule."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extras import needs
from torch import Tensor

from mergesec import tensorwise
from mergesec.contracts import Expert
from mergesec.planning.catalog import load_catalog
from mergesec.streaming.merging import context
from mergesec_methods.merging._ranks import magnitude_ranks, tensor_pieces

needs("numba")
CATALOG = load_catalog()
SHAPES: dict[str, tuple[int, ...]] = {
    "even": (96, 128),
    "odd": (5, 1021),
    "short": (77,),
    "scalar": (),
    "steps": (1 << 14,),
}


@pytest.fixture(scope="module")
def loops() -> Any:
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("compiled loops are for processors on which torch's roundings are known")
    return pytest.importorskip("mergesec.kernels")


def weights(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Some entries no expert moves, many share a magnitude, and a few moves are equal and opposite."""
    rng = np.random.default_rng(0)
    base = {n: torch.from_numpy(np.asarray(rng.standard_normal(s, np.float32))) for n, s in SHAPES.items()}
    if seed:
        rng = np.random.default_rng(seed)
        for name, tensor in base.items():
            move = torch.from_numpy(np.asarray(0.05 * rng.standard_normal(tensor.shape, np.float32)))
            if name == "steps":
                base[name] = (tensor * 8).round() + (move * 40).round() / 4
            else:
                tensor += move * (torch.from_numpy(np.asarray(rng.random(tensor.shape))) > 0.1)
    elif "steps" in base:
        base["steps"] = (base["steps"] * 8).round()
    return {name: tensor.to(dtype) for name, tensor in base.items()}


METHODS: list[tuple[str, dict[str, Any]]] = [
    ("simple_average", {}),
    ("task_arithmetic", {}),
    ("task_arithmetic", {"scaling": 0.05}),
    ("magmax", {}),
    ("magmax", {"scaling": 0.3}),
    ("ties", {}),
    ("ties", {"merge_func": "mean", "scaling": 1.0}),
    ("ties", {"keep": 1.0}),
    ("breadcrumbs", {}),
    ("breadcrumbs", {"keep": 1.0, "outliers": 0.0}),
    ("breadcrumbs", {"keep": 0.0}),
    ("dare", {}),
    ("dare", {"base_method": "average", "drop": 0.3}),
    ("dare", {"base_method": "ties"}),
    ("consensus", {"mask_lambda": 0.4}),
    ("consensus", {"mask_lambda": 0.4, "base_method": "ties", "agree": 3}),
    ("tall_masks", {"mask_lambda": 0.5}),
    ("tall_masks", {"mask_lambda": 0.5, "base_method": "ties"}),
    ("emr", {}),
    ("emr", {"rescale": "entries"}),
]


def merged(name: str, given: dict[str, Any], count: int, dtype: torch.dtype) -> dict[str, Any]:
    entry = CATALOG.get("merging", name)
    method = entry.create(entry.card.bind(name, given))
    experts = [Expert(f"t{i}", weights(i + 1, dtype)) for i in range(count)]
    found = method.merge(weights(0, dtype), experts, context(name, 3))
    return {**found.shared, **{f"extra|{n}": t for n, t in found.extra.items()}}


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("name", "given"), METHODS, ids=lambda v: str(v) if isinstance(v, str) else "-".join(map(str, v.values()))
)
@pytest.mark.parametrize(
    ("count", "dtype"),
    [(1, torch.float32), (8, torch.float32), (17, torch.float32), (3, torch.bfloat16)],
    ids=str,
)
def test_compiled_loops_give_torch_s_bits(
    loops: Any,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    given: dict[str, Any],
    count: int,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(tensorwise, "_found", [None])
    plain = merged(name, given, count, dtype)
    calls: list[str] = []
    monkeypatch.setattr(tensorwise, "_found", [Spy(loops, calls)])
    monkeypatch.setattr(tensorwise, "SHORTEST", 64)
    fast = merged(name, given, count, dtype)
    sums = name in ("consensus", "tall_masks", "emr") and given.get("base_method") != "ties"
    left_to_torch = sums and (count == 17 or (dtype == torch.bfloat16 and name != "consensus"))
    left_to_torch |= (name, given.get("base_method")) == ("dare", "ties")
    assert bool(calls) != left_to_torch
    assert list(plain) == list(fast)
    different = [n for n in plain if plain[n].dtype != fast[n].dtype or bits(plain[n]) != bits(fast[n])]
    assert not different


def test_sums_over_large_blocks_are_the_same(loops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """EMR's factors are sums of float32 over blocks, made in one order with and without compiled loops."""
    monkeypatch.setitem(SHAPES, "large", (300_032,))
    for name in list(SHAPES):
        if name != "large":
            monkeypatch.delitem(SHAPES, name)
    found = []
    for module in (None, loops):
        monkeypatch.setattr(tensorwise, "_found", [module])
        found.append(merged("emr", {}, 8, torch.float32))
    plain, fast = found
    assert all(bits(plain[name]) == bits(fast[name]) for name in plain)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["emr", "tall_masks"])
def test_masks_by_several_threads(
    loops: Any, monkeypatch: pytest.MonkeyPatch, name: str, compiled: bool
) -> None:
    """Many blocks in threads that take turns in any order: the same bits as in one."""
    for index in range(6):
        monkeypatch.setitem(SHAPES, f"large{index}", (300 + index, 1_000))
    monkeypatch.setattr(tensorwise, "_found", [loops if compiled else None])
    given: dict[str, Any] = {} if name == "emr" else {"mask_lambda": 0.5}
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 3):
            torch.set_num_threads(threads)
            found.append(merged(name, given, 4, torch.float32))
    finally:
        torch.set_num_threads(before)
    alone, *others = found
    assert all(bits(alone[name]) == bits(other[name]) for other in others for name in alone)


def test_no_loop_computes_in_memory_that_was_let_go(loops: Any) -> None:
    """Of an array made in a loop only the address is kept: nothing keeps the array, and threads that allocate from
    one arena write over each other. A process of its own, as the arena is chosen when it starts."""
    code = """
import torch
import test_kernels as t
from mergesec import kernels, tensorwise
t.SHAPES.update({f"large{i}": (300 + i, 1_000) for i in range(6)})
tensorwise._found = [kernels]
found = []
for threads in [1] + [3] * 24:
    torch.set_num_threads(threads)
    found.append(t.merged("emr", {}, 4, torch.float32))
assert all(t.bits(found[0][n]) == t.bits(other[n]) for other in found[1:] for n in found[0])
"""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "PYTHONPATH": paths}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]


class Spy:
    """The module, and which of its loops were called."""

    def __init__(self, module: Any, calls: list[str]) -> None:
        self._module, self._calls = module, calls

    def __getattr__(self, name: str) -> Any:
        if name.islower():
            self._calls.append(name)
        return getattr(self._module, name)


@pytest.mark.parametrize("sample", [16, 1 << 10])
def test_ranks_by_compiled_looks(loops: Any, monkeypatch: pytest.MonkeyPatch, sample: int) -> None:
    """Against a sort, however badly the sample brackets; zeros and steps are shared by many entries."""
    monkeypatch.setattr(tensorwise, "_found", [loops])
    rng = np.random.default_rng(5)
    base = torch.zeros(20_011)
    experts = [torch.from_numpy(rng.standard_normal(20_011, np.float32)) for _ in range(3)]
    experts[1] = (experts[1] * 2).round() / 2
    experts[2][:15_000] = 0.0
    ranks = [1, 2_000, 10_000, 19_900, 20_011]
    found = magnitude_ranks(tensor_pieces("w", base, experts), 3, 20_011, ranks, sample=sample)
    for own, values in zip(experts, found, strict=True):
        ordered = own.abs().sort().values
        assert values == [float(ordered[rank - 1]) for rank in ranks]


def test_small_merges_do_not_ask_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorwise, "_found", [])
    merged("ties", {}, 2, torch.float32)
    assert tensorwise._found == []
    monkeypatch.setattr(tensorwise, "WORTH", 1)
    monkeypatch.setattr(tensorwise, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    merged("ties", {}, 2, torch.float32)
    assert tensorwise._found == [None]
    assert tensorwise.kernels() is None
