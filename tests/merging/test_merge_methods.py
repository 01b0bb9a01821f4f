"""Merge methods against closed forms, brute force and FusionBench, and their properties."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergesec.contracts import Backbone, ContractError, Expert, MergeContext, Merged, MergeMethod, Weights
from mergesec.tensorwise import Workspace, pieces
from mergesec.weights import digest_weights, flat_layout, flatten
from mergesec_methods.merging.dare import Dare, Dropped
from mergesec_methods.merging.simple_average import SimpleAverage
from mergesec_methods.merging.task_arithmetic import TaskArithmetic
from mergesec_methods.merging.ties import Ties
from mergesec_methods.merging.weighted_average import WeightedAverage
from mergesec_methods.merging.weighted_task_arithmetic import WeightedTaskArithmetic

GRID = [0.1, 0.3, 0.5]


def context(score: Callable[[Merged], float] = lambda merged: 0.0, seed: int = 0) -> MergeContext:
    return MergeContext(torch.device("cpu"), seed, cast(Backbone, None), {}, score)


def network(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "block.weight": torch.randn(7, 11, generator=generator).to(dtype),
        "block.bias": torch.randn(7, generator=generator).to(dtype),
        "head.scale": torch.randn((), generator=generator).to(dtype),
        "position_ids": torch.arange(9),
    }


def experts(count: int, dtype: torch.dtype = torch.float32) -> list[Expert]:
    base = network(0, dtype)
    made = []
    for index in range(count):
        noise = network(100 + index, dtype)
        made.append(
            Expert(
                f"task{index}",
                {n: t if n == "position_ids" else (t + 0.1 * noise[n]).to(dtype) for n, t in base.items()},
            )
        )
    return made


def dare(base_method: str = "task_arithmetic", drop: float = 0.5, **given: Any) -> Dare:
    defaults = {"rescale": True, "scaling": 0.3, "grid": GRID, "keep": 0.2, "merge_func": "sum"}
    return Dare(**{"base_method": base_method, "drop": drop, **defaults, **given})


METHODS: Mapping[str, Callable[[float], MergeMethod]] = {
    "average": lambda scaling: SimpleAverage(),
    "weighted": lambda scaling: WeightedAverage([], True),
    "task_arithmetic": lambda scaling: TaskArithmetic(scaling, GRID),
    "ties_sum": lambda scaling: Ties(0.2, "sum", scaling, GRID),
    "ties_mean": lambda scaling: Ties(0.2, "mean", scaling, GRID),
    "dare_average": lambda scaling: dare("average"),
    "dare_ta": lambda scaling: dare(scaling=scaling),
    "dare_ties": lambda scaling: dare("ties", scaling=scaling),
}
SCALED = [name for name in METHODS if name not in ("average", "weighted", "dare_average")]


def flat(weights: Weights) -> torch.Tensor:
    return flatten(flat_layout(network(0)), weights)


def brute_force_ties(vectors: list[list[float]], keep: float, merge_func: str) -> list[float]:
    """TIES entry by entry in plain Python, thresholds found by sorting."""
    kept = []
    for vector in vectors:
        ordered = sorted(abs(v) for v in vector)
        rank = len(vector) - int(len(vector) * keep)
        threshold = ordered[rank - 1] if rank >= 1 else 0.0
        kept.append([v if abs(v) >= threshold else 0.0 for v in vector])
    totals = [sum(column) for column in zip(*kept, strict=True)]
    merged = []
    for total, column in zip(totals, zip(*kept, strict=True), strict=True):
        positive = total >= 0
        agreeing = [v for v in column if v != 0 and (v > 0) == positive]
        value = float(sum(agreeing))
        merged.append(value / max(len(agreeing), 1) if merge_func == "mean" else value)
    return merged


@pytest.mark.parametrize("merge_func", ["sum", "mean"])
@pytest.mark.parametrize("keep", [0.0, 0.2, 0.5, 1.0])
def test_ties_equals_brute_force(merge_func: str, keep: float) -> None:
    base, members = network(0), experts(5)
    merged = Ties(keep, merge_func, 0.7, GRID).merge(base, members, context())
    vectors = [(flat(e.weights) - flat(base)).tolist() for e in members]
    wanted = flat(base) + 0.7 * torch.tensor(brute_force_ties(vectors, keep, merge_func))
    torch.testing.assert_close(flat(merged.shared), wanted, rtol=0, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(2, 9), st.sampled_from([0.2, 0.5, 1.0]), st.data())
def test_ties_equals_brute_force_on_coarse_values(
    count: int, size: int, keep: float, data: st.DataObject
) -> None:
    """Small integers make ties of magnitude and exact cancellation common."""
    row = st.lists(st.integers(-3, 3), min_size=size, max_size=size)
    vectors = data.draw(st.lists(row, min_size=count, max_size=count))
    base = {"w": torch.zeros(size)}
    members = [Expert(f"t{i}", {"w": torch.tensor(v, dtype=torch.float32)}) for i, v in enumerate(vectors)]
    for merge_func in ("sum", "mean"):
        merged = Ties(keep, merge_func, 1.0, GRID).merge(base, members, context())
        wanted = brute_force_ties([[float(v) for v in vector] for vector in vectors], keep, merge_func)
        torch.testing.assert_close(merged.shared["w"], torch.tensor(wanted))


def test_average_and_task_arithmetic_closed_forms() -> None:
    base, members = network(0), experts(3)
    stacked = torch.stack([flat(e.weights) for e in members]).double()
    origin = flat(base).double()
    average = SimpleAverage().merge(base, members, context())
    torch.testing.assert_close(flat(average.shared).double(), stacked.mean(0), rtol=0, atol=1e-6)
    added = TaskArithmetic(0.4, GRID).merge(base, members, context())
    wanted = origin + 0.4 * (stacked - origin).sum(0)
    torch.testing.assert_close(flat(added.shared).double(), wanted, rtol=0, atol=1e-6)
    assert added.info["scaling"] == 0.4


def test_weighted_average_closed_forms() -> None:
    base, members = network(0), experts(3)
    stacked = torch.stack([flat(e.weights) for e in members])
    shares = torch.tensor([1.0, 2.0, 5.0])
    merged = WeightedAverage([1, 2, 5], True).merge(base, members, context())
    torch.testing.assert_close(flat(merged.shared), (shares[:, None] / 8 * stacked).sum(0), rtol=0, atol=1e-6)
    raw = WeightedAverage([1, 2, 5], False).merge(base, members, context())
    torch.testing.assert_close(flat(raw.shared), (shares[:, None] * stacked).sum(0), rtol=1e-5, atol=1e-5)
    equal = WeightedAverage([], True).merge(base, members, context())
    torch.testing.assert_close(flat(equal.shared), stacked.mean(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("weights", "message"), [([1.0], "1 weights for 3"), ([1, -1, 0], "sum to 0")])
def test_weighted_average_refuses_bad_weights(weights: list[float], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        WeightedAverage(weights, True).merge(network(0), experts(3), context())


def test_weighted_task_arithmetic_closed_forms() -> None:
    base, members = network(0), experts(3)
    vectors = torch.stack([flat(e.weights) - flat(base) for e in members])
    given = torch.tensor([0.5, -0.25, 1.5])
    merged = WeightedTaskArithmetic(given.tolist()).merge(base, members, context())
    wanted = flat(base) + (given[:, None] * vectors).sum(0)
    torch.testing.assert_close(flat(merged.shared), wanted, rtol=0, atol=1e-6)
    equal = WeightedTaskArithmetic([]).merge(base, members, context())
    plain = TaskArithmetic(0.3, GRID).merge(base, members, context())
    torch.testing.assert_close(flat(equal.shared), flat(plain.shared), rtol=0, atol=1e-6)


def test_weighted_task_arithmetic_of_equal_lengths() -> None:
    """Closed form; an expert made ten times as long enters as before, and one that is the base as nothing."""
    base, members = network(0), experts(3)
    vectors = torch.stack([flat(e.weights) - flat(base) for e in members]).double()
    given = torch.tensor([0.5, -0.25, 1.5], dtype=torch.float64)
    lengths = vectors.norm(dim=1)
    wanted = flat(base) + (given[:, None] * vectors * (lengths.mean() / lengths)[:, None]).sum(0)
    merged = WeightedTaskArithmetic(given.tolist(), "equal").merge(base, members, context())
    torch.testing.assert_close(flat(merged.shared), wanted.float(), rtol=0, atol=1e-5)
    longer = replace(members[0], weights={n: base[n] + 10 * (w - base[n]) if w.is_floating_point() else w
                                          for n, w in members[0].weights.items()})  # fmt: skip
    found = WeightedTaskArithmetic([0.3] * 3, "equal").merge(base, [longer, *members[1:]], context())
    mean = (10 * lengths[0] + lengths[1] + lengths[2]) / 3
    told = flat(base) + (0.3 * vectors * (mean / lengths)[:, None]).sum(0)
    torch.testing.assert_close(flat(found.shared), told.float(), rtol=0, atol=1e-5)
    idle = WeightedTaskArithmetic([1.0, 1.0], "equal").merge(
        base, [members[0], Expert("idle", base)], context()
    )
    half = flat(base) + (vectors[0] / 2)  # the mean length is half of the other's
    torch.testing.assert_close(flat(idle.shared), half.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("coefficients", "message"), [([1.0], "1 coefficients for 3"), ([1, math.nan, 0], "must be finite")]
)
def test_weighted_task_arithmetic_refuses_bad_coefficients(coefficients: list[float], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        WeightedTaskArithmetic(coefficients).merge(network(0), experts(3), context())


@pytest.mark.parametrize("name", METHODS)
def test_order_of_experts_changes_nothing(name: str) -> None:
    base, members = network(0), experts(3)
    reference = flat(METHODS[name](0.3).merge(base, members, context()).shared)
    for order in itertools.permutations(members):
        permuted = flat(METHODS[name](0.3).merge(base, list(order), context()).shared)
        torch.testing.assert_close(permuted, reference, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SCALED)
def test_scaling_zero_gives_the_base(name: str) -> None:
    base = network(0)
    merged = METHODS[name](0.0).merge(base, experts(3), context())
    assert digest_weights(merged.shared) == digest_weights(base)


@pytest.mark.parametrize("name", METHODS)
def test_experts_equal_to_the_base_give_the_base(name: str) -> None:
    base = network(0)
    merged = METHODS[name](0.3).merge(base, [Expert(f"t{i}", network(0)) for i in range(3)], context())
    assert digest_weights(merged.shared) == digest_weights(base)


def test_average_of_identical_experts_is_that_expert() -> None:
    member = experts(1)[0]
    merged = SimpleAverage().merge(network(0), [member] * 5, context())
    torch.testing.assert_close(flat(merged.shared), flat(member.weights), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_types_integers_and_inputs_are_kept(name: str, dtype: torch.dtype) -> None:
    base, members = network(0, dtype), experts(3, dtype)
    before = [digest_weights(w) for w in (base, *(e.weights for e in members))]
    merged = METHODS[name](0.3).merge(base, members, context()).shared
    assert before == [digest_weights(w) for w in (base, *(e.weights for e in members))]
    assert {n: (t.dtype, t.shape) for n, t in merged.items()} == {
        n: (t.dtype, t.shape) for n, t in base.items()
    }
    assert torch.equal(merged["position_ids"], base["position_ids"])
    assert not torch.equal(merged["block.weight"], base["block.weight"])


@pytest.mark.parametrize("name", METHODS)
def test_unfit_expert_is_refused_by_name(name: str) -> None:
    members = experts(2)
    broken = Expert("cars", {n: t for n, t in members[1].weights.items() if n != "block.bias"})
    with pytest.raises(ContractError, match=r"'cars'.*'block.bias'"):
        METHODS[name](0.3).merge(network(0), [members[0], broken], context())
    with pytest.raises(ContractError, match="no expert"):
        METHODS[name](0.3).merge(network(0), [], context())


# --------------------------------------------------------------------------- scaling: tuned


@pytest.mark.parametrize("name", SCALED)
def test_tuned_scaling_takes_the_best_of_the_grid(name: str) -> None:
    base, members = network(0), experts(3)
    fixed = {value: METHODS[name](value).merge(base, members, context()) for value in GRID}
    target = flat(fixed[0.3].shared)
    make = cast(Callable[[Any], MergeMethod], METHODS[name])
    tuned = make("tuned").merge(base, members, context(lambda m: -float((flat(m.shared) - target).norm())))
    assert tuned.info["scaling"] == 0.3
    assert tuned.info["tuned"] is True
    assert set(tuned.info["tuning_scores"]) == {"0.1", "0.3", "0.5"}
    assert torch.equal(flat(tuned.shared), target)


def test_tuned_scaling_prefers_the_smaller_of_equals() -> None:
    for grid in ([0.5, 0.1, 0.3], [0.1, 0.3, 0.5]):
        tuned = TaskArithmetic("tuned", grid).merge(network(0), experts(2), context(lambda merged: 0.5))
        assert tuned.info["scaling"] == 0.1
    with pytest.raises(ContractError, match="grid"):
        TaskArithmetic("tuned", []).merge(network(0), experts(2), context())


# --------------------------------------------------------------------------- DARE


def test_dare_drops_the_declared_share_and_is_unbiased() -> None:
    ones = torch.ones(200_000)
    (piece,) = pieces("w", ones, [3 * ones], Workspace(ones.device))
    for drop in (0.1, 0.5, 0.9):
        kept = Dropped(["a/1"], drop, True, context(seed=3).generator)(piece, 0).clone()
        share = float((kept != 0).float().mean())
        assert abs(share - (1 - drop)) < 5 * (drop * (1 - drop) / 200_000) ** 0.5
        assert kept.unique().tolist() == pytest.approx([0.0, 2.0 / (1 - drop)], rel=1e-6)
        deviation = 2.0 * (drop / (1 - drop) / 200_000) ** 0.5
        assert abs(float(kept.mean()) - 2.0) < 5 * deviation
        plain = Dropped(["a/1"], drop, False, context(seed=3).generator)(piece, 0)
        assert set(plain.unique().tolist()) == {0.0, 2.0}


def test_dare_mean_over_seeds_is_the_undropped_merge() -> None:
    base, members = network(0), experts(3)
    plain = flat(TaskArithmetic(0.3, GRID).merge(base, members, context()).shared)
    runs = torch.stack([flat(dare().merge(base, members, context(seed=s)).shared) for s in range(400)])
    # Each entry has deviation 0.3·|τ|·sqrt(p/(1-p)) ≤ ~0.2 for one run.
    assert float((runs.mean(0) - plain).abs().max()) < 5 * float(runs.std(0).max()) / 400**0.5


@pytest.mark.parametrize("base_method", ["average", "task_arithmetic", "ties"])
def test_dare_repeats_per_seed_and_draws_afresh_per_task(base_method: str) -> None:
    base, members = network(0), experts(3)
    method = dare(base_method)
    one = digest_weights(method.merge(base, members, context(seed=5)).shared)
    assert one == digest_weights(method.merge(base, members, context(seed=5)).shared)
    assert one != digest_weights(method.merge(base, members, context(seed=6)).shared)


def test_dare_masks_differ_between_experts() -> None:
    """Four experts with one and the same task vector, also of one task: their masks must not coincide."""
    base = {"w": torch.zeros(4000)}
    members = [Expert(task, {"w": torch.ones(4000)}) for task in ("a", "b", "b", "c")]
    merged = dare(rescale=False, scaling=1.0).merge(base, members, context()).shared["w"]
    counts = torch.bincount(merged.long(), minlength=5) / 4000
    torch.testing.assert_close(counts, torch.tensor([1, 4, 6, 4, 1]) / 16.0, rtol=0, atol=0.04)


@pytest.mark.parametrize(
    ("base_method", "same"),
    [("average", "average"), ("task_arithmetic", "task_arithmetic"), ("ties", "ties_sum")],
)
def test_dare_without_dropping_is_its_base_method(base_method: str, same: str) -> None:
    base, members = network(0), experts(3)
    dropped = dare(base_method, drop=0.0).merge(base, members, context())
    plain = METHODS[same](0.3).merge(base, members, context())
    torch.testing.assert_close(flat(dropped.shared), flat(plain.shared), rtol=0, atol=1e-6)


# --------------------------------------------------------------------------- FusionBench 0.2.33


@pytest.fixture(scope="module")
def ties_reference(installed: Any) -> Any:
    return installed("fusion_bench.method.ties_merging.ties_merging_utils")


@pytest.fixture(scope="module")
def arithmetic_reference(installed: Any) -> Any:
    return installed("fusion_bench.utils.state_dict_arithmetic")


def wide(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "m.weight": torch.randn(97, 51, generator=generator),
        "m.bias": torch.randn(97, generator=generator),
    }


@pytest.mark.fusionbench
@pytest.mark.parametrize("merge_func", ["sum", "mean"])
@pytest.mark.parametrize("keep", [0.1, 0.2, 0.5])
def test_ties_equals_fusion_bench(ties_reference: Any, merge_func: str, keep: float) -> None:
    base = wide(0)
    members = [Expert(f"t{i}", {n: t + 0.01 * wide(i + 1)[n] for n, t in base.items()}) for i in range(6)]
    layout = flat_layout(base)
    vectors = torch.stack([flatten(layout, e.weights) - flatten(layout, base) for e in members])
    wanted = ties_reference.ties_merging(vectors, reset_thresh=keep, merge_func=merge_func)
    merged = Ties(keep, merge_func, 0.3, GRID).merge(base, members, context()).shared
    torch.testing.assert_close(
        flatten(layout, merged), flatten(layout, base) + 0.3 * wanted, rtol=0, atol=1e-6
    )


@pytest.mark.fusionbench
def test_average_and_task_arithmetic_equal_fusion_bench(arithmetic_reference: Any) -> None:
    base = wide(0)
    members = [Expert(f"t{i}", {n: t + 0.01 * wide(i + 1)[n] for n, t in base.items()}) for i in range(6)]
    mean = arithmetic_reference.state_dict_avg([dict(e.weights) for e in members])
    average = SimpleAverage().merge(base, members, context()).shared
    total = arithmetic_reference.state_dict_sum(
        [arithmetic_reference.state_dict_sub(dict(e.weights), base) for e in members]
    )
    wanted = arithmetic_reference.state_dict_add(base, arithmetic_reference.state_dict_mul(total, 0.3))
    added = TaskArithmetic(0.3, GRID).merge(base, members, context()).shared
    for name in base:
        torch.testing.assert_close(average[name], mean[name], rtol=0, atol=1e-6)
        torch.testing.assert_close(added[name], wanted[name], rtol=0, atol=1e-6)
