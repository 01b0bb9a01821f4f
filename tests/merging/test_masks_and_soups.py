"""TALL masks, Consensus, EMR, model soups and PAINT against brute force and FusionBench, and their properties."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn

from mergesec.contracts import (
    Backbone,
    ContractError,
    Expert,
    MergeContext,
    Merged,
    MergeMethod,
    Split,
    Task,
    TaskView,
    Weights,
)
from mergesec.execution.work import flatten as to_store
from mergesec.execution.work import unflatten as from_store
from mergesec.tensorwise import TensorwiseMerge
from mergesec.weights import digest_weights, flat_layout, flatten
from mergesec_methods.merging import _masks
from mergesec_methods.merging._masks import pack, pack_on_device, task_weights, unpack, unpack_on_device
from mergesec_methods.merging.consensus import Consensus
from mergesec_methods.merging.emr import Emr
from mergesec_methods.merging.model_soup import ModelSoup
from mergesec_methods.merging.paint import Paint
from mergesec_methods.merging.simple_average import SimpleAverage
from mergesec_methods.merging.tall_masks import TallMasks
from mergesec_methods.merging.task_arithmetic import TaskArithmetic
from mergesec_methods.merging.ties import Ties

GRID = [0.1, 0.3, 0.5]
MASK_GRID = [0.2, 0.4, 0.6]


def context(
    score: Callable[[Merged], float] = lambda merged: 0.0,
    views: Mapping[str, TaskView] | None = None,
    backbone: Backbone | None = None,
) -> MergeContext:
    return MergeContext(torch.device("cpu"), 0, cast(Backbone, backbone), views or {}, score)


def network(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
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
        weights = {n: t if n == "position_ids" else (t + 0.1 * noise[n]).to(dtype) for n, t in base.items()}
        made.append(Expert(f"task{index}", weights))
    return made


def flat(weights: Weights) -> Tensor:
    return flatten(flat_layout(network(0)), weights)


def vectors(base: Weights, members: Sequence[Expert]) -> Tensor:
    """Task vectors ``[T, n]``, float64."""
    return torch.stack([flat(e.weights).double() - flat(base).double() for e in members])


def consensus(
    agree: int = 2, mask_lambda: Any = 0.4, scaling: Any = 0.3, base_method: str = "task_arithmetic"
) -> Consensus:
    return Consensus(base_method, agree, mask_lambda, MASK_GRID, scaling, GRID, 0.2, "sum")


def tall(mask_lambda: Any = 0.4, scaling: float = 0.3, base_method: str = "task_arithmetic") -> TallMasks:
    return TallMasks(base_method, mask_lambda, MASK_GRID, scaling, 0.2, "sum")


METHODS: Mapping[str, Callable[[], MergeMethod]] = {
    "consensus": consensus,
    "consensus_ties": lambda: consensus(base_method="ties"),
    "soup_uniform": lambda: ModelSoup("uniform"),
    "soup_greedy": lambda: ModelSoup("greedy"),
    "paint_parallel": lambda: Paint("parallel", 0.7, GRID),
    "paint_sequential": lambda: Paint("sequential", 0.4, GRID),
    "tall_masks": tall,
    "tall_masks_ties": lambda: tall(base_method="ties"),
    "emr": lambda: Emr("tensor_means"),
    "emr_entries": lambda: Emr("entries"),
    "emr_unscaled": lambda: Emr("none"),
}
PER_TASK = [name for name in METHODS if name.startswith(("tall", "emr"))]
ORDERLESS = [name for name in METHODS if name != "paint_sequential"]


def served(merged: Merged, tasks: Sequence[str]) -> dict[str, Weights]:
    """What every task is served, and the shared weights under the empty name."""
    return {"": merged.shared, **{task: task_weights(merged, task) for task in tasks}}


# --------------------------------------------------------------------------- packing


@given(st.lists(st.booleans(), max_size=70))
def test_bits_survive_packing(bits: list[bool]) -> None:
    chosen = torch.tensor(bits, dtype=torch.bool)
    packed = pack(chosen)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-len(bits) // 8)
    assert torch.equal(packed, pack_on_device(chosen))
    for restored in (unpack(packed, len(bits)), unpack_on_device(packed, len(bits))):
        assert restored.dtype == torch.float32
        assert torch.equal(restored, chosen.float())


@pytest.mark.parametrize("name", PER_TASK)
def test_masks_are_stored_as_bits_and_no_task_stores_a_model(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(300, 500, generator=generator)}
    members = [
        Expert(f"t{i}", {"w": base["w"] + 0.1 * torch.randn(300, 500, generator=generator)}) for i in range(4)
    ]
    merged = METHODS[name]().merge(base, members, context())
    assert not merged.per_task
    bits = [t for n, t in merged.extra.items() if n.startswith("mask|")]
    assert {t.dtype for t in bits} == {torch.uint8}
    assert sum(t.nbytes for t in bits) == 4 * 300 * 500 // 8
    rest = sum(t.nbytes for n, t in merged.extra.items() if not n.startswith("mask|"))
    assert rest <= base["w"].nbytes + 100


def test_tensors_of_several_blocks_give_what_small_ones_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same entries in one tensor of many blocks and in many tensors of one block."""
    generator = torch.Generator().manual_seed(3)
    monkeypatch.setattr(_masks, "ENTRIES", 1 << 15)
    whole = [torch.randn(20_001, generator=generator) for _ in range(6)]
    cuts = [0, 7, 4_099, 8_000, 20_001]

    def cut(weights: Tensor) -> dict[str, Tensor]:
        return {f"w{i}": weights[a:b].clone() for i, (a, b) in enumerate(itertools.pairwise(cuts))}

    methods: list[MergeMethod] = [
        Emr("entries"),
        tall(0.4),
        tall(0.4, 0.3, "ties"),
        consensus(),
        consensus(2, 0.4, 0.3, "ties"),
    ]
    for method in methods:
        members = [Expert(f"t{i}", {"w": whole[0] + 0.1 * noise}) for i, noise in enumerate(whole[1:])]
        large = method.merge({"w": whole[0]}, members, context())
        parts = [Expert(e.task, cut(e.weights["w"])) for e in members]
        small = method.merge(cut(whole[0]), parts, context())
        for task, weights in served(large, ["t0", "t4"]).items():
            joined = torch.cat(list(served(small, ["t0", "t4"])[task].values()))
            torch.testing.assert_close(weights["w"], joined, rtol=0, atol=1e-6)
            assert not torch.equal(weights["w"], whole[0])


# --------------------------------------------------------------------------- EMR


def brute_force_emr(rows: list[list[float]]) -> tuple[list[float], list[list[bool]], list[float]]:
    """(τ, masks, rescalers over all entries) in plain Python."""
    unified, masks = [], [[] for _ in rows]
    for column in zip(*rows, strict=True):
        sign = 1 if sum(column) > 0 else -1
        agreeing = [abs(v) for v in column if v * sign > 0]
        unified.append(sign * max(agreeing, default=0.0))
        for mask, value in zip(masks, column, strict=True):
            mask.append(value * sign > 0)
    scales = []
    for row, mask in zip(rows, masks, strict=True):
        kept = sum(abs(u) for u, m in zip(unified, mask, strict=True) if m)
        scales.append(sum(abs(v) for v in row) / kept if kept else 1.0)
    return unified, masks, scales


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 19), st.data())
def test_emr_equals_brute_force_on_coarse_values(count: int, size: int, data: st.DataObject) -> None:
    """Small integers make zeros, ties and exact cancellation common."""
    row = st.lists(st.integers(-3, 3), min_size=size, max_size=size)
    rows = [[float(v) for v in r] for r in data.draw(st.lists(row, min_size=count, max_size=count))]
    base = {"w": torch.full((size,), 2.0)}
    members = [Expert(f"t{i}", {"w": torch.tensor(v) + 2.0}) for i, v in enumerate(rows)]
    merged = Emr("entries").merge(base, members, context())
    unified, masks, scales = brute_force_emr(rows)
    torch.testing.assert_close(merged.shared["w"], torch.tensor(unified) + 2.0)
    for index, (mask, scale) in enumerate(zip(masks, scales, strict=True)):
        wanted = 2.0 + scale * torch.tensor(unified) * torch.tensor(mask).float()
        torch.testing.assert_close(task_weights(merged, f"t{index}")["w"], wanted)
        assert merged.info["rescalers"][f"t{index}"] == pytest.approx(scale)


def test_emr_rescalers_compare_tensor_means_or_entries() -> None:
    """Two tensors of unlike size, one task: the rule must count a tensor once, or by its entries."""
    base = {"a": torch.zeros(2), "b": torch.zeros(8)}
    one = {"a": torch.full((2,), 1.0), "b": torch.full((8,), 1.0)}
    two = {"a": torch.full((2,), 3.0), "b": torch.full((8,), 1.0)}
    members = [Expert("one", one), Expert("two", two)]
    by_tensor = Emr("tensor_means").merge(base, members, context()).info["rescalers"]
    assert by_tensor == pytest.approx({"one": (1 + 1) / (3 + 1), "two": 1.0})
    by_entry = Emr("entries").merge(base, members, context()).info["rescalers"]
    assert by_entry == pytest.approx({"one": (2 + 8) / (6 + 8), "two": 1.0})
    assert set(Emr("none").merge(base, members, context()).info["rescalers"].values()) == {1.0}


@pytest.mark.parametrize("rescale", ["tensor_means", "entries", "none"])
def test_emr_gives_back_identical_experts(rescale: str) -> None:
    member = experts(1)[0]
    members = [Expert(f"t{i}", member.weights) for i in range(3)]
    merged = Emr(rescale).merge(network(0), members, context())
    for weights in served(merged, ["t0", "t2"]).values():
        torch.testing.assert_close(flat(weights), flat(member.weights), rtol=0, atol=1e-6)


def test_emr_stays_finite_where_a_task_has_nothing_to_rescale() -> None:
    """One expert did not move, another is outvoted everywhere: FusionBench divides by zero there."""
    base = {"w": torch.zeros(3)}
    moved = {"still": [0.0, 0.0, 0.0], "outvoted": [-1.0, -1.0, -1.0], "strong": [5.0, 5.0, 5.0]}
    members = [Expert(t, {"w": torch.tensor(v)}) for t, v in moved.items()]
    merged = Emr("tensor_means").merge(base, members, context())
    assert torch.equal(task_weights(merged, "still")["w"], base["w"])
    assert torch.equal(task_weights(merged, "outvoted")["w"], base["w"])
    assert torch.equal(task_weights(merged, "strong")["w"], torch.full((3,), 5.0))


# --------------------------------------------------------------------------- TALL masks, Consensus


def published_masks(tau: Tensor, multitask: Tensor, mask_lambda: float) -> Tensor:
    """[|τ_t| ≥ λ |τ_MTL − τ_t|], bool ``[T, n]``."""
    return tau.abs() >= mask_lambda * (multitask - tau).abs()


@pytest.mark.parametrize("base_method", ["task_arithmetic", "ties"])
@pytest.mark.parametrize("mask_lambda", [0.0, 0.2, 0.4, 1.0, 5.0])
def test_tall_masks_and_consensus_equal_the_closed_form(base_method: str, mask_lambda: float) -> None:
    base, members = network(0), experts(5)
    tau = vectors(base, members)
    multitask = tau.sum(0)
    if base_method == "ties":
        ties = Ties(0.2, "sum", 1.0, GRID).merge(base, members, context())
        multitask = flat(ties.shared).double() - flat(base).double()
        multitask[multitask.abs() < 1e-6] = 0.0
    masks = published_masks(tau, multitask, mask_lambda)
    merged = tall(mask_lambda, 0.3, base_method).merge(base, members, context())
    for expert, mask in zip(members, masks, strict=True):
        wanted = flat(base) + (mask * multitask).float()
        torch.testing.assert_close(flat(task_weights(merged, expert.task)), wanted, rtol=0, atol=1e-6)
    for agree in range(7):
        kept = masks.sum(0) >= agree
        found = consensus(agree, mask_lambda, 0.7, base_method).merge(base, members, context()).shared
        wanted = flat(base) + 0.7 * (kept * multitask).float()
        torch.testing.assert_close(flat(found), wanted, rtol=0, atol=1e-6)


def test_tall_masks_are_not_vacuous() -> None:
    """At the λ tested above some entries are masked and some are not, differently per task."""
    tau = vectors(network(0), experts(5))
    shares = published_masks(tau, tau.sum(0), 0.4).double().mean(1)
    assert float(shares.min()) > 0.2
    assert float(shares.max()) < 0.95
    assert len(set(shares.tolist())) > 1


@pytest.mark.parametrize("base_method", ["task_arithmetic", "ties"])
def test_consensus_of_no_votes_is_its_base_method_and_of_too_many_the_base(base_method: str) -> None:
    base, members = network(0), experts(4)
    plain: MergeMethod = (
        TaskArithmetic(0.3, GRID) if base_method == "task_arithmetic" else Ties(0.2, "sum", 0.3, GRID)
    )
    found = consensus(0, base_method=base_method).merge(base, members, context()).shared
    torch.testing.assert_close(
        flat(found), flat(plain.merge(base, members, context()).shared), rtol=0, atol=1e-6
    )
    none = consensus(5, base_method=base_method).merge(base, members, context()).shared
    assert digest_weights(none) == digest_weights(base)


def test_an_entry_on_the_threshold_is_kept() -> None:
    """Two equal experts: τ_MTL − τ_t = τ_t, so λ = 1 decides at equality; the paper's rule keeps it."""
    base, moved = {"w": torch.zeros(4)}, {"w": torch.tensor([1.0, -2.0, 0.5, 4.0])}
    members = [Expert("a", moved), Expert("b", moved)]
    kept = tall(1.0).merge(base, members, context())
    assert torch.equal(task_weights(kept, "a")["w"], 2 * moved["w"])
    dropped = tall(1.001).merge(base, members, context())
    assert torch.equal(task_weights(dropped, "a")["w"], base["w"])


def test_tall_masks_of_one_expert_give_it_back_whatever_the_shared_scaling() -> None:
    base, (member,) = network(0), experts(1)
    for scaling in (0.0, 0.3, 1.0):
        merged = tall(0.4, scaling).merge(base, [member], context())
        torch.testing.assert_close(
            flat(task_weights(merged, "task0")), flat(member.weights), rtol=0, atol=1e-6
        )
        plain = TaskArithmetic(scaling, GRID).merge(base, [member], context()).shared
        torch.testing.assert_close(flat(merged.shared), flat(plain), rtol=0, atol=1e-6)


# --------------------------------------------------------------------------- a toy world that scores


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(11, 7)
        self.head = nn.Module()
        self.head.scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("position_ids", torch.zeros(9, dtype=torch.int64))


class ToyBackbone(Backbone):
    def build(self) -> nn.Module:
        return Toy()

    def base_weights(self) -> Weights:
        return network(0)

    def anatomy(self) -> Any:
        raise NotImplementedError

    def features(self, network: nn.Module, inputs: Any) -> Tensor:
        """The entries of the network's weights that ``inputs`` name."""
        return flat(network.state_dict())[inputs]


class ToyTask(Task):
    """A row is right where the network's weight of that number is the head's."""

    classes = ("wrong", "right")

    def load(self, ctx: Any) -> dict[str, Split]:
        raise NotImplementedError

    def fit_head(self, model: Any, split: Split, ctx: Any) -> Weights:
        raise NotImplementedError

    def outputs(self, model: Any, head: Weights, inputs: Any) -> Tensor:
        return (model.features(inputs) - head["wanted"][inputs]).abs()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError

    def predictions(self, outputs: Tensor) -> Tensor:
        return (outputs < 1e-5).long()


def view(wanted: Tensor) -> TaskView:
    rows = torch.arange(wanted.numel())
    return TaskView(ToyTask(), {"wanted": wanted}, Split(rows, torch.ones_like(rows)))


def test_mask_lambda_is_tuned_for_each_task_by_itself() -> None:
    base, members = network(0), experts(3)
    best = {"task0": 0.6, "task1": 0.2, "task2": 0.4}
    tau = vectors(base, members)
    views = {}
    for index, (task, value) in enumerate(best.items()):
        mask = published_masks(tau, tau.sum(0), value)[index]
        views[task] = view(flat(base) + (mask * tau.sum(0)).float())
    ctx = context(views=views, backbone=ToyBackbone())
    merged = tall("tuned").merge(base, members, ctx)
    assert merged.info["mask_lambdas"] == best
    for task, value in best.items():
        assert merged.info["mask_scores"][task][str(value)] == 1.0
        assert min(merged.info["mask_scores"][task].values()) < 1.0
        torch.testing.assert_close(
            flat(task_weights(merged, task)), views[task].head["wanted"], rtol=0, atol=1e-6
        )
    masks = torch.stack([published_masks(tau, tau.sum(0), v)[i] for i, v in enumerate(best.values())])
    wanted = flat(base) + 0.3 * ((masks.sum(0) >= 2) * tau.sum(0)).float()
    method = consensus(2, "tuned")
    found = method.merge(base, members, ctx)
    torch.testing.assert_close(flat(found.shared), wanted, rtol=0, atol=1e-6)
    assert found.info["mask_lambdas"] == best
    assert method.mask_lambda == "tuned", "a merge must leave the method as it was"


def test_equal_scores_take_the_smaller_mask_lambda() -> None:
    views = {f"task{i}": view(torch.full((85,), 99.0)) for i in range(2)}
    merged = tall("tuned").merge(network(0), experts(2), context(views=views, backbone=ToyBackbone()))
    assert set(merged.info["mask_lambdas"].values()) == {0.2}


def test_consensus_tunes_its_scaling_on_the_mean_score() -> None:
    base, members = network(0), experts(3)
    target = flat(consensus(2, 0.4, 0.5).merge(base, members, context()).shared)
    ctx = context(lambda merged: -float((flat(merged.shared) - target).norm()))
    tuned = consensus(2, 0.4, "tuned").merge(base, members, ctx)
    assert tuned.info["scaling"] == 0.5
    assert torch.equal(flat(tuned.shared), target)


def test_what_is_to_be_tuned_needs_rows_and_cannot_be_streamed() -> None:
    base, members = network(0), experts(2)
    for method in (tall("tuned"), consensus(2, "tuned"), Paint("sequential", "tuned", GRID)):
        with pytest.raises(ContractError, match="no tuning rows of 'task0'"):
            method.merge(base, members, context())
    streamed: list[TensorwiseMerge] = [
        consensus(2, "tuned"),
        Paint("sequential", "tuned", GRID),
        ModelSoup("greedy"),
    ]
    for tensorwise in streamed:
        with pytest.raises(ContractError, match=r"to score"):
            dict(tensorwise.stream(base, members, context()))


# --------------------------------------------------------------------------- model soups


def test_uniform_soup_is_the_average() -> None:
    base, members = network(0), experts(4)
    average = SimpleAverage().merge(base, members, context()).shared
    assert digest_weights(ModelSoup("uniform").merge(base, members, context()).shared) == digest_weights(
        average
    )


def soup_of(scores: Mapping[frozenset[int], float], count: int) -> Callable[[Merged], float]:
    """A score per set of ingredients, told apart by the mean of one-hot weights."""

    def score(merged: Merged) -> float:
        present = frozenset(i for i in range(count) if float(merged.shared["w"][i]) > 0)
        torch.testing.assert_close(merged.shared["w"].sum(), torch.tensor(1.0))
        return scores[present]

    return score


def test_greedy_soup_follows_recipe_1() -> None:
    """Best first (2, 0, 3, 1); 0 keeps the score and enters, 3 lowers it, 1 raises it."""
    base = {"w": torch.zeros(4)}
    members = [Expert(f"t{i}", {"w": torch.eye(4)[i]}) for i in range(4)]
    scores = {
        frozenset({0}): 0.6, frozenset({1}): 0.1, frozenset({2}): 0.7, frozenset({3}): 0.5,
        frozenset({2, 0}): 0.7, frozenset({2, 0, 3}): 0.65, frozenset({2, 0, 1}): 0.8,
    }  # fmt: skip
    for order in itertools.permutations(range(4)):
        ctx = context(soup_of(scores, 4))
        merged = ModelSoup("greedy").merge(base, [members[i] for i in order], ctx)
        assert merged.info["ingredients"] == ["t2", "t0", "t1"]
        assert merged.info["scores_added"] == [["t0", 0.7], ["t3", 0.65], ["t1", 0.8]]
        torch.testing.assert_close(merged.shared["w"], torch.tensor([1.0, 1.0, 1.0, 0.0]) / 3)


def test_greedy_soup_of_experts_that_only_hurt_is_the_best_one() -> None:
    base, members = network(0), experts(3)
    best = members[1]
    ctx = context(lambda merged: -float((flat(merged.shared) - flat(best.weights)).norm()))
    merged = ModelSoup("greedy").merge(base, members, ctx)
    assert merged.info["ingredients"] == ["task1"]
    assert digest_weights(merged.shared) == digest_weights(best.weights)


# --------------------------------------------------------------------------- PAINT


def test_paint_closed_forms() -> None:
    base, members = network(0), experts(3)
    origin, stacked = flat(base).double(), torch.stack([flat(e.weights).double() for e in members])
    for alpha in (0.0, 0.35, 1.0):
        parallel = flat(Paint("parallel", alpha, GRID).merge(base, members, context()).shared)
        wanted = (1 - alpha) * origin + alpha * stacked.mean(0)
        torch.testing.assert_close(parallel.double(), wanted, rtol=0, atol=1e-6)
        wanted = origin
        for weights in stacked:
            wanted = (1 - alpha) * wanted + alpha * weights
        sequential = Paint("sequential", alpha, GRID).merge(base, members, context())
        torch.testing.assert_close(flat(sequential.shared).double(), wanted, rtol=0, atol=1e-6)
        assert sequential.info["alpha"] == alpha
        both = [
            Paint(mode, alpha, GRID).merge(base, members[:1], context()).shared
            for mode in ("parallel", "sequential")
        ]
        torch.testing.assert_close(flat(both[0]), flat(both[1]), rtol=0, atol=1e-6)


def test_parallel_paint_tunes_alpha_on_the_mean_score() -> None:
    base, members = network(0), experts(3)
    target = flat(Paint("parallel", 0.3, GRID).merge(base, members, context()).shared)
    ctx = context(lambda merged: -float((flat(merged.shared) - target).norm()))
    tuned = Paint("parallel", "tuned", GRID).merge(base, members, ctx)
    assert (tuned.info["scaling"], set(tuned.info["tuning_scores"])) == (0.3, {"0.1", "0.3", "0.5"})
    assert torch.equal(flat(tuned.shared), target)


def test_sequential_paint_tunes_each_step_on_the_tasks_patched_so_far() -> None:
    """Task 0 wants α = 0.5 in its first rows; task 1 wants 0.3 after that, at the cost of task 0's rows."""
    base, members = network(0), experts(2)
    first = torch.lerp(flat(base), flat(members[0].weights), 0.5)
    second = torch.lerp(first, flat(members[1].weights), 0.3)
    views = {"task0": view(first), "task1": view(second)}
    tuned = Paint("sequential", "tuned", GRID).merge(
        base, members, context(views=views, backbone=ToyBackbone())
    )
    assert [[task, alpha] for task, alpha, _ in tuned.info["steps"]] == [["task0", 0.5], ["task1", 0.3]]
    assert tuned.info["steps"][0][2] == {"0.1": 0.0, "0.3": 0.0, "0.5": 1.0}
    assert tuned.info["steps"][1][2] == {"0.1": 0.0, "0.3": 0.5, "0.5": 0.0}, "the mean of both tasks"
    torch.testing.assert_close(flat(tuned.shared), second, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_paint_with_an_empty_grid_is_refused(mode: str) -> None:
    with pytest.raises(ContractError, match="grid"):
        Paint(mode, "tuned", []).merge(network(0), experts(2), context())


# --------------------------------------------------------------------------- properties of all


@pytest.mark.parametrize("name", ORDERLESS)
def test_order_of_experts_changes_nothing(name: str) -> None:
    base, members = network(0), experts(3)
    tasks = [e.task for e in members]
    reference = served(METHODS[name]().merge(base, members, context()), tasks)
    for order in itertools.permutations(members):
        found = served(METHODS[name]().merge(base, list(order), context()), tasks)
        for task, weights in reference.items():
            torch.testing.assert_close(flat(found[task]), flat(weights), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_experts_equal_to_the_base_give_the_base(name: str) -> None:
    base = network(0)
    merged = METHODS[name]().merge(base, [Expert(f"t{i}", network(0)) for i in range(3)], context())
    for weights in served(merged, ["t0", "t1", "t2"]).values():
        assert digest_weights(weights) == digest_weights(base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_types_integers_and_inputs_are_kept(name: str, dtype: torch.dtype) -> None:
    base, members = network(0, dtype), experts(3, dtype)
    before = [digest_weights(w) for w in (base, *(e.weights for e in members))]
    merged = METHODS[name]().merge(base, members, context())
    exact = METHODS[name]().merge(
        {n: t.float() if t.is_floating_point() else t for n, t in base.items()},
        [
            Expert(e.task, {n: t.float() if t.is_floating_point() else t for n, t in e.weights.items()})
            for e in members
        ],
        context(),
    )
    wanted = served(exact, [e.task for e in members])
    for task, weights in served(merged, [e.task for e in members]).items():
        assert list(weights) == list(base)
        assert {n: (t.dtype, t.shape) for n, t in weights.items()} == {
            n: (t.dtype, t.shape) for n, t in base.items()
        }
        assert torch.equal(weights["position_ids"], base["position_ids"])
        assert not torch.equal(weights["block.weight"], base["block.weight"])
        # one rounding of the weights and one of the task vector, each at most half a unit in the last place
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(flat(weights), flat(wanted[task]), rtol=2 * unit, atol=2 * unit)
    assert before == [digest_weights(w) for w in (base, *(e.weights for e in members))]


@pytest.mark.parametrize("name", METHODS)
def test_tied_weights_are_one_tensor(name: str) -> None:
    def tie(weights: Weights) -> dict[str, Tensor]:
        return {"a.first": weights["block.weight"], **weights, "z.last": weights["block.weight"]}

    base, members = network(0), experts(3)
    plain = served(METHODS[name]().merge(base, members, context()), ["task0", "task1"])
    tied = METHODS[name]().merge(tie(base), [Expert(e.task, tie(e.weights)) for e in members], context())
    assert tied.shared["a.first"] is tied.shared["z.last"] is tied.shared["block.weight"]
    if name not in ("emr",):  # a sum over tensors' means counts the tied tensor once
        for task, weights in served(tied, ["task0", "task1"]).items():
            assert torch.equal(weights["z.last"], weights["a.first"])
            torch.testing.assert_close(weights["z.last"], plain[task]["block.weight"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_unfit_expert_is_refused_by_name(name: str) -> None:
    members = experts(2)
    broken = Expert("cars", {n: t for n, t in members[1].weights.items() if n != "block.bias"})
    with pytest.raises(ContractError, match=r"'cars'.*'block.bias'"):
        METHODS[name]().merge(network(0), [members[0], broken], context())
    with pytest.raises(ContractError, match="no expert"):
        METHODS[name]().merge(network(0), [], context())


@pytest.mark.parametrize("name", PER_TASK)
def test_two_experts_of_one_task_are_refused(name: str) -> None:
    (member,) = experts(1)
    with pytest.raises(ContractError, match="two experts of 'task0'"):
        METHODS[name]().merge(network(0), [member, member], context())


@pytest.mark.parametrize("name", PER_TASK)
def test_networks_are_built_from_what_the_store_gives_back(name: str) -> None:
    base, members = network(0), experts(3)
    method = METHODS[name]()
    merged = method.merge(base, members, context())
    kept = {n: t.clone() for n, t in to_store(merged).items()}
    back = from_store(load(save(kept)), merged.info)
    for task in ("task0", "task2"):
        built = method.network(ToyBackbone(), back, task)
        assert not built.training
        torch.testing.assert_close(flat(built.state_dict()), flat(task_weights(merged, task)), rtol=0, atol=0)
    stranger = method.network(ToyBackbone(), back, "no expert of this")
    assert torch.equal(flat(stranger.state_dict()), flat(merged.shared))
    assert not torch.equal(flat(task_weights(merged, "task0")), flat(task_weights(merged, "task1")))


@pytest.mark.parametrize("name", PER_TASK)
def test_repairs_of_the_shared_weights_and_of_a_task_reach_its_network(name: str) -> None:
    base, members = network(0), experts(3)
    method = METHODS[name]()
    merged = method.merge(base, members, context())
    change = torch.randn(7, generator=torch.Generator().manual_seed(1))
    shared = {**merged.shared, "block.bias": merged.shared["block.bias"] + change}
    repaired = Merged(shared, {"task1": {"head.scale": torch.tensor(5.0)}}, merged.extra, merged.info)
    before, after = (method.network(ToyBackbone(), m, "task1").state_dict() for m in (merged, repaired))
    torch.testing.assert_close(after["block.bias"], before["block.bias"] + change, rtol=0, atol=1e-6)
    assert float(after["head.scale"]) == 5.0
    assert torch.equal(after["block.weight"], before["block.weight"])


# --------------------------------------------------------------------------- FusionBench 0.2.33


def wide(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "m.weight": torch.randn(97, 51, generator=generator),
        "m.bias": torch.randn(97, generator=generator),
    }


def wide_experts(count: int) -> tuple[dict[str, Tensor], list[Expert], list[dict[str, Tensor]]]:
    """(base, experts, their task vectors)."""
    base = wide(0)
    members = [Expert(f"t{i}", {n: t + 0.01 * wide(i + 1)[n] for n, t in base.items()}) for i in range(count)]
    return base, members, [{n: e.weights[n] - base[n] for n in base} for e in members]


@pytest.mark.fusionbench
@pytest.mark.parametrize("count", [1, 2, 6])
def test_emr_equals_fusion_bench(installed: Any, count: int) -> None:
    reference = installed("fusion_bench.method.emr_merging.utils")
    base, members, tau = wide_experts(count)
    unified, masks, scales = reference.emr_merge(tau)
    merged = Emr("tensor_means").merge(base, members, context())
    for index, expert in enumerate(members):
        assert merged.info["rescalers"][expert.task] == pytest.approx(float(scales[index]), rel=1e-5)
        weights = task_weights(merged, expert.task)
        for name in base:
            bits = unpack(merged.extra[f"mask|{expert.task}|{name}"], base[name].numel())
            assert torch.equal(bits.view(base[name].shape).bool(), masks[name][index])
            assert torch.equal(merged.extra[f"vector|{name}"], unified[name])
            wanted = base[name] + unified[name] * masks[name][index] * scales[index]
            torch.testing.assert_close(weights[name], wanted, rtol=0, atol=1e-6)


def bits_of(merged: Merged, expert: Expert) -> Tensor:
    return torch.cat(
        [
            unpack(merged.extra[f"mask|{expert.task}|{n}"], t.numel())
            for n, t in sorted(expert.weights.items())
        ]
    ).bool()


@pytest.mark.fusionbench
@pytest.mark.parametrize("mask_lambda", [0.2, 0.6])
def test_tall_masks_equal_fusion_bench_s_helper_and_not_its_algorithm(
    installed: Any, mask_lambda: float, capsys: Any
) -> None:
    """``utils.generate_task_masks`` is the published rule; the algorithm hands its own copy τ_t for θ_t."""
    helper = installed("fusion_bench.method.tall_mask.utils")
    algorithm = installed("fusion_bench.method.tall_mask.task_arithmetic")
    base, members, tau = wide_experts(6)
    layout = flat_layout(base)
    origin, tuned = flatten(layout, base), torch.stack([flatten(layout, e.weights) for e in members])
    wanted = helper.generate_task_masks(tuned - origin, tuned, origin, tall_mask_lambda=mask_lambda)
    total = {n: sum(t[n] for t in tau) for n in base}
    merged = tall(mask_lambda).merge(base, members, context())
    for index, expert in enumerate(members):
        found = bits_of(merged, expert)
        margin = (tuned[index] - origin).abs() - mask_lambda * (
            tuned.sum(0) - 6 * origin + origin - tuned[index]
        ).abs()
        assert bool((margin.abs()[found != wanted[index]] < 1e-5).all())
        assert float((found != wanted[index]).double().mean()) < 1e-3
        theirs = algorithm.generate_task_masks(total, tau[index], base, mask_lambda)
        as_run = torch.cat([theirs[n].reshape(-1) for n in sorted(base)]).bool()
        assert float((found != as_run).double().mean()) > 0.1
