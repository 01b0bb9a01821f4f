"""Where steps compute: slots, what goes to a device and how often, how it computes; on a GPU where there is one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import GPU, StandIn

from mergesec.conformance.battery import MICRO
from mergesec.contracts import Expert, load_network
from mergesec.errors import UsageError
from mergesec.execution import numerics
from mergesec.execution.engines import local
from mergesec.execution.engines.local import make_slots
from mergesec.execution.steps import run
from mergesec.execution.store import Store
from mergesec.execution.work import Bench
from mergesec.planning.catalog import Catalog, load_catalog
from mergesec.planning.gridspec import parse_grid
from mergesec.planning.plan import Plan, make_plan
from mergesec.planning.resolve import resolve
from mergesec.streaming.merging import context

TUNED = {"name": "task_arithmetic", "scaling": "tuned", "grid": [0.2, 0.4, 0.6]}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: torch sees no CUDA device")


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return load_catalog([str(MICRO)])


def _plan(catalog: Catalog) -> Plan:
    raw = {
        "name": "g",
        "suite": {"backbone": "micro/vit", "tasks": ["micro/bars", "micro/blobs"]},
        "axes": {"merging": [TUNED, "emr"]},
        "threats": ["backdoor"],
        "recipe": {"epochs": 1, "max_train": 64},
    }
    return make_plan(resolve(parse_grid(raw, "grid g"), catalog), lambda task: "")


def _digests(plan: Plan, bench: Bench, around: Any = contextlib.nullcontext) -> dict[str, Any]:
    """Run a plan here; tensor digests by step, and ``around`` entered for each step."""
    kinds = {key: step.kind for key, step in plan.steps.items()}
    for key, step in plan.steps.items():
        with around(step):
            blob, info = run(step, bench, kinds)
        bench.store.put(step.kind, key, blob, dict(info))
    return {key: bench.store.read(step.kind, key)[1]["digests"] for key, step in plan.steps.items()}


def test_weights_go_to_the_device_once_a_step(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps of a grid on a stand-in for a GPU: the CPU's results, each tensor of an input sent at most once."""
    fork = torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: fork(devices=[]))
    plan = _plan(catalog)
    plain = _digests(plan, Bench(Store(tmp_path / "cpu"), catalog, torch.device("cpu")))
    bench = Bench(Store(tmp_path / "gpu"), catalog, GPU)
    seen: set[str] = set()

    @contextlib.contextmanager
    def counted(step: Any) -> Iterator[None]:
        with StandIn() as device:
            yield
        held = {
            t.untyped_storage().data_ptr(): f"{step.kind} {key} {name}"
            for key, kept in bench._held.items()
            for name, t in kept.tensors.items()
            if t.numel()
        }
        sent = {held[place]: times for place, times in device.sent.items() if place in held}
        assert set(sent.values()) <= {1}, sent
        seen.update({step.kind} if sent else ())

    assert _digests(plan, bench, counted) == plain
    assert {"expert", "merge", "evaluate"} <= seen


def test_the_stand_in_sees_what_is_sent_twice() -> None:
    rows = torch.arange(6.0)
    with StandIn() as device:
        first, second = rows.to(GPU), rows.to(GPU)
        on_it = torch.zeros(2, device=GPU)
    assert device.sent == {rows.data_ptr(): 2}
    assert first.data_ptr() != rows.data_ptr() and torch.equal(first, second)
    assert on_it.device.type == "cpu"


def test_several_workers_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "visible_gpus", lambda: ["0", "3"])
    assert [(s.device, s.gpu) for s in make_slots("auto*2", 8)] == [
        ("cuda", "0"),
        ("cuda", "0"),
        ("cuda", "3"),
        ("cuda", "3"),
    ]
    assert [s.gpu for s in make_slots("cuda:3*3", None)] == ["3", "3", "3"]
    assert [s.device for s in make_slots("mps*2", None)] == ["mps", "mps"]
    monkeypatch.setattr(local, "visible_gpus", lambda: [])
    assert [s.device for s in make_slots("auto*4", 2)] == ["cpu", "cpu"]
    for wrong in ("auto*0", "auto*-1", "auto*x", "auto*"):
        with pytest.raises(UsageError, match=r"--per-gpu: must be a number from 1 to 999"):
            make_slots(wrong, None)


def test_a_record_tells_how_a_device_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    deterministic = torch.are_deterministic_algorithms_enabled()
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    try:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.use_deterministic_algorithms(False)
        assert numerics.told(GPU) == "Some GPU (TF32)"
        numerics.settle(GPU)
        assert numerics.told(GPU) == "Some GPU (float32, deterministic)"
        assert numerics.told(torch.device("cpu")) == "cpu"
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


# --------------------------------------------------------------------------- a GPU


@pytest.mark.gpu
@needs_gpu
def test_steps_of_a_grid_on_a_gpu(catalog: Catalog, tmp_path: Path) -> None:
    """Every kind of step runs; predictions are those of the CPU but for rows that rounding decides."""
    plan = _plan(catalog)
    found = []
    for place in ("cpu", "cuda"):
        bench = Bench(Store(tmp_path / place), catalog, torch.device(place))
        _digests(plan, bench)
        found.append(bench)
    for step in (s for s in plan.steps.values() if s.kind == "evaluate"):
        cpu, gpu = (bench.read("evaluate", step.key)[0] for bench in found)
        for name, predicted in cpu.items():
            assert (predicted != gpu[name]).float().mean() < 0.05, name


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    "name", ["simple_average", "task_arithmetic", "magmax", "ties", "dare", "breadcrumbs", "iso_c", "tsv_m"]
)
def test_merges_on_a_gpu(name: str) -> None:
    entry = load_catalog().get("merging", name)
    generator = torch.Generator().manual_seed(0)
    shapes = {"w": (96, 64), "b": (64,), "v": (64, 200)}
    drawn = [{n: torch.randn(s, generator=generator) for n, s in shapes.items()} for _ in range(4)]
    merged = []
    for place in ("cpu", "cuda"):
        there = [{n: t.to(place) for n, t in weights.items()} for weights in drawn]
        method = entry.create(entry.card.bind(name, {}))
        experts = [Expert(str(i), weights) for i, weights in enumerate(there[1:])]
        merged.append(method.merge(there[0], experts, context(name, 0)).shared)
    for tensor in shapes:
        torch.testing.assert_close(merged[0][tensor], merged[1][tensor].cpu(), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@needs_gpu
def test_a_network_is_made_where_its_weights_lie(catalog: Catalog) -> None:
    backbone = catalog.get("backbone", "micro/vit").create({})
    weights = {n: t.to("cuda") for n, t in backbone.base_weights().items()}
    assert {p.device.type for p in load_network(backbone, weights).parameters()} == {"cuda"}
