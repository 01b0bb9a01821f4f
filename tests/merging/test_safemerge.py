"""SafeMERGE against plain loops, its two ends, what it refuses, and what its gate tells apart."""

from __future__ import annotations

import math
import os
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from mergesec.contracts import Backbone, ContractError, Expert, MergeContext, Weights
from mergesec_methods.merging.safemerge import Alignment, SafeMerge
from mergesec_methods.merging.simple_average import SimpleAverage

CONTEXT = MergeContext(torch.device("cpu"), 0, cast(Backbone, None), {}, lambda merged: 0.0)
SEED = int(os.environ.get("MERGESEC_TEST_SEED", "0"))
SHAPES = {
    "a.weight": (7, 11),
    "b.weight": (12, 5),
    "c.weight": (6, 6),
    "a.bias": (7,),
    "embed.weight": (9, 4),
}
MATRICES = ("a.weight", "b.weight", "c.weight")
"""Wide, tall, square: what is looked at."""

Rows = list[list[float]]


def safemerge(**given: Any) -> SafeMerge:
    defaults: dict[str, Any] = {
        "safe": "safe", "threshold": 0.35, "own_weight": 0.8, "safe_weight": 0.2, "exclude": ["embed"],
        "scaling": 1.0, "grid": [],
    }  # fmt: skip
    return SafeMerge(**{**defaults, **given})


def drawn(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * SEED + seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def moved(base: Weights, task: str, update: Weights) -> Expert:
    return Expert(task, {name: tensor + update[name] for name, tensor in base.items()})


def world(others: int = 2) -> tuple[dict[str, Tensor], list[Expert]]:
    """A base, an aligned expert whose matrices have rank 2, and experts with shares of its update of 0 to 1."""
    base, safe = drawn(0), drawn(1, 0.1)
    for name in MATRICES:
        left, sigma, right = torch.linalg.svd(safe[name], full_matrices=False)
        safe[name] = left[:, :2] * sigma[:2] @ right[:2]
    experts = []
    for index in range(others):
        own = drawn(2 + index, 0.1)
        shares = {name: (index + place) % 3 / 2 for place, name in enumerate(SHAPES)}
        update = {n: shares[n] * safe[n] + (1.0 - shares[n]) * own[n] for n in SHAPES}
        experts.append(moved(base, f"task{index}", update))
    return base, [experts[0], moved(base, "safe", safe), *experts[1:]]


def product(left: Rows, right: Rows) -> Rows:
    return [[sum(a * right[k][j] for k, a in enumerate(row)) for j in range(len(right[0]))] for row in left]


def inner(left: Rows, right: Rows) -> float:
    return sum(a * b for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True))


def plain_cosine(aligned: Rows, delta: Rows) -> float:
    """As it is written: P = D Dᵀ / ‖D‖_F, cos(P τ, τ)."""
    length = math.sqrt(inner(aligned, aligned))
    outer = product(aligned, [list(column) for column in zip(*aligned, strict=True)])
    projected = product([[value / length for value in row] for row in outer], delta)
    return inner(projected, delta) / math.sqrt(inner(projected, projected) * inner(delta, delta))


def rows(tensor: Tensor) -> Rows:
    return cast(Rows, tensor.double().tolist())


@pytest.mark.parametrize("threshold", [0.7, 0.8, 0.9])
def test_safemerge_equals_plain_loops(threshold: float) -> None:
    base, experts = world()
    merged = safemerge(threshold=threshold, own_weight=0.7, safe_weight=0.4, scaling=0.6).merge(
        base, experts, CONTEXT
    )
    taus = {e.task: {n: e.weights[n].double() - base[n].double() for n in base} for e in experts}
    mixed = {"task0": 0, "task1": 0}
    for name, tensor in base.items():
        total = torch.zeros(SHAPES[name], dtype=torch.float64)
        for task in ("task0", "task1"):
            tau = taus[task][name]
            if name in MATRICES and plain_cosine(rows(taus["safe"][name]), rows(tau)) < threshold:
                tau = 0.7 * tau + 0.4 * taus["safe"][name]
                mixed[task] += 1
            total += tau
        wanted = tensor.double() + 0.6 * total / 2
        torch.testing.assert_close(merged.shared[name].double(), wanted, rtol=0, atol=1e-6)
    assert 0 < sum(mixed.values()) < 2 * len(MATRICES), "the gate has to tell some apart"
    assert {task: seen["mixed"] for task, seen in merged.info["gate"].items()} == mixed
    assert all(seen["matrices"] == len(MATRICES) for seen in merged.info["gate"].values())


@pytest.mark.parametrize("shape", [(7, 11), (12, 5), (6, 6), (1, 4), (4, 1)])
@pytest.mark.parametrize("size", [1.0, 1e-9])
def test_the_cosine_is_that_of_the_projection(shape: tuple[int, int], size: float) -> None:
    """Whichever product is formed, and however short the updates are."""
    generator = torch.Generator().manual_seed(SEED)
    aligned, delta = (torch.randn(shape, generator=generator) for _ in range(2))
    wanted = plain_cosine(rows(aligned), rows(delta))
    assert Alignment(size * aligned).cosine(size * delta) == pytest.approx(wanted, abs=1e-5)


def test_a_threshold_that_nothing_is_below_averages_the_others() -> None:
    base, experts = world()
    others = [expert for expert in experts if expert.task != "safe"]
    wanted = SimpleAverage().merge(base, others, CONTEXT).shared
    for threshold in (-1.0, 0.0):
        merged = safemerge(threshold=threshold).merge(base, experts, CONTEXT).shared
        torch.testing.assert_close(dict(merged), dict(wanted), rtol=0, atol=1e-6)


def test_a_threshold_that_all_are_below_mixes_every_matrix_and_nothing_else() -> None:
    base, experts = world()
    others = [expert for expert in experts if expert.task != "safe"]
    safe = next(expert for expert in experts if expert.task == "safe").weights
    mean = SimpleAverage().merge(base, others, CONTEXT).shared
    merged = safemerge(threshold=1.01).merge(base, experts, CONTEXT).shared
    for name in base:
        wanted = 0.8 * mean[name] + 0.2 * safe[name] if name in MATRICES else mean[name]
        torch.testing.assert_close(merged[name], wanted, rtol=0, atol=1e-6)


def test_an_update_in_the_aligned_subspace_is_kept_and_one_outside_it_is_mixed() -> None:
    """Columns in the span of D's against columns at right angles to it: cosines 1 and 0, whatever the lengths."""
    generator = torch.Generator().manual_seed(SEED)
    frame, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator))
    right = torch.linalg.qr(torch.randn(8, 3, generator=generator))[0].T
    aligned = frame[:, :3] @ right
    inside = 5.0 * frame[:, :3] @ torch.linalg.qr(torch.randn(8, 3, generator=generator))[0].T
    outside = 0.01 * frame[:, 3:] @ torch.randn(9, 8, generator=generator)
    base = {"w": torch.zeros(12, 8)}
    members = [Expert(n, {"w": t}) for n, t in (("safe", aligned), ("in", inside), ("out", outside))]
    method = safemerge()
    for task, wanted in (("in", inside), ("out", 0.8 * outside + 0.2 * aligned)):
        pair = [members[0], next(member for member in members if member.task == task)]
        torch.testing.assert_close(method.merge(base, pair, CONTEXT).shared["w"], wanted, rtol=0, atol=1e-5)
    gate = method.merge(base, members, CONTEXT).info["gate"]
    assert gate["in"]["lowest"] == pytest.approx(1.0, abs=1e-5) and gate["in"]["mixed"] == 0
    assert gate["out"]["highest"] == pytest.approx(0.0, abs=1e-5) and gate["out"]["mixed"] == 1


@pytest.mark.parametrize(("rows_", "columns"), [(256, 256), (256, 64), (64, 256)])
def test_an_unrelated_update_has_the_cosine_of_the_shape(rows_: int, columns: int) -> None:
    """1/√(1 + out/in) for a D of independent entries, √(r/out) for one of r equal directions: what a threshold meets
    before it meets safety. Both are ratios of sums over some thousand entries."""
    generator = torch.Generator().manual_seed(SEED)
    delta = torch.randn(rows_, columns, generator=generator)
    full = torch.randn(rows_, columns, generator=generator)
    assert Alignment(full).cosine(delta) == pytest.approx(1.0 / math.sqrt(1.0 + rows_ / columns), abs=0.03)
    frame, _ = torch.linalg.qr(torch.randn(rows_, 16, generator=generator))
    across, _ = torch.linalg.qr(torch.randn(columns, 16, generator=generator))
    assert Alignment(frame @ across.T).cosine(delta) == pytest.approx(math.sqrt(16 / rows_), abs=0.03)


def test_what_did_not_move_counts_as_outside() -> None:
    base = {"w": torch.ones(4, 3)}
    still, away = Expert("still", base), Expert("away", {"w": torch.full((4, 3), 2.0)})
    for safe, wanted in (("still", 1.0 + 0.8), ("away", 1.0 + 0.2)):
        merged = safemerge(safe=safe).merge(base, [still, away], CONTEXT)
        torch.testing.assert_close(merged.shared["w"], torch.full((4, 3), wanted))


def test_order_types_ties_and_inputs() -> None:
    base, experts = world()
    base["tied"] = base["a.weight"]
    for expert in experts:
        cast(dict[str, Tensor], expert.weights)["tied"] = expert.weights["a.weight"]
    before = [{name: tensor.clone() for name, tensor in e.weights.items()} for e in experts]
    merged = safemerge().merge(base, experts, CONTEXT).shared
    again = safemerge().merge(base, experts[::-1], CONTEXT).shared
    torch.testing.assert_close(dict(merged), dict(again), rtol=0, atol=1e-6)
    assert torch.equal(merged["tied"], merged["a.weight"])
    assert all(
        torch.equal(e.weights[n], t) for e, own in zip(experts, before, strict=True) for n, t in own.items()
    )
    halves = [Expert(e.task, {n: t.bfloat16() for n, t in e.weights.items()}) for e in experts]
    half = safemerge().merge({n: t.bfloat16() for n, t in base.items()}, halves, CONTEXT).shared
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}


def test_the_aligned_expert_has_to_be_one_of_the_experts() -> None:
    base, experts = world()
    with pytest.raises(ContractError, match=r"safe is empty; name .*: task0, safe, task1$"):
        safemerge(safe="").merge(base, experts, CONTEXT)
    with pytest.raises(ContractError, match=r"no expert is called 'sofe'; did you mean 'safe'\?"):
        safemerge(safe="sofe").merge(base, experts, CONTEXT)
    with pytest.raises(ContractError, match=r"several experts are called 'safe'"):
        safemerge().merge(base, [*experts, experts[1]], CONTEXT)
    with pytest.raises(ContractError, match=r"no expert is merged beside the aligned one, 'safe'"):
        safemerge().merge(base, [experts[1]], CONTEXT)


@pytest.mark.parametrize("task", ["safe", "task0"])
def test_weights_that_are_not_finite_are_named(task: str) -> None:
    base, experts = world()
    found = next(expert for expert in experts if expert.task == task)
    found.weights["b.weight"][0, 0] = math.inf
    with pytest.raises(ContractError, match=rf"expert '{task}': 'b\.weight' is not finite"):
        safemerge().merge(base, experts, CONTEXT)
