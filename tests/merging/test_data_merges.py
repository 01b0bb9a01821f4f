"""Fisher merging, RegMean and RegMean++: closed forms, FusionBench's formulas, and real networks of a micro world."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_worlds import Plain, World, draw, linear, plain_context, trained_world
from torch import Tensor, nn
from torch.nn import functional

from mergesec.contracts import (
    ContractError,
    Expert,
    MergeContext,
    MergeMethod,
    Model,
    Split,
    TaskView,
    Weights,
    load_network,
)
from mergesec.weights import digest_weights
from mergesec_methods.merging import regmean_plusplus
from mergesec_methods.merging._fishers import FisherMean, diagonal_fisher, important
from mergesec_methods.merging._gram_regression import InputGrams, Regression, scale_off_diagonal
from mergesec_methods.merging._samples import Sample, spread
from mergesec_methods.merging.fisher import Fisher
from mergesec_methods.merging.regmean import RegMean
from mergesec_methods.merging.regmean_plusplus import RegMeanPlusPlus
from mergesec_methods.merging.simple_average import SimpleAverage

CPU = torch.device("cpu")


def fisher(expectation: str = "predictive", **given: Any) -> Fisher:
    defaults = {"num_examples": 256, "coverage": 1.0, "normalise": True, "minimal": 1e-6}
    return Fisher(**{**defaults, "expectation": expectation, **given})


METHODS: Mapping[str, Callable[[], MergeMethod]] = {
    "fisher": fisher,
    "fisher_argmax": lambda: fisher("argmax"),
    "fisher_label": lambda: fisher("label"),
    "fisher_batch": lambda: fisher("batch"),
    "regmean": lambda: RegMean(256, 0.95),
    "regmean_plusplus": lambda: RegMeanPlusPlus(256, 0.95),
}


# --------------------------------------------------------------------------- regression


def least_squares(inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """argmin_W Σ_i ‖X_i Wᵀ − X_i W_iᵀ‖² / n_i by QR on the stacked rows, float64."""
    scaled = [(x.double() / len(x) ** 0.5, w.double()) for x, w in zip(inputs, weights, strict=True)]
    left = torch.cat([x for x, _ in scaled])
    right = torch.cat([x @ w.T for x, w in scaled])
    return torch.linalg.lstsq(left, right).solution.T


def solved(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], alpha: float = 1.0, origin: Tensor | None = None
) -> tuple[Tensor, float]:
    start = torch.zeros_like(weights[0]) if origin is None else origin
    sums = Regression(inputs[0].shape[1], len(weights[0]), alpha, CPU)
    for rows, weight in zip(inputs, weights, strict=True):
        sums.add(rows.T @ rows / len(rows), weight - start)
    delta, ridge = sums.solve(torch.stack([w - start for w in weights]).mean(0))
    return start + delta, ridge


def assert_solves(
    found: Tensor, wanted: Tensor, inputs: Sequence[Tensor], alpha: float = 1.0, factor: float = 10.0
) -> None:
    """‖found − wanted‖ ≤ factor · ε · κ · ‖wanted‖.

    ε is float32's: Gram matrices and moments are sums in it, each right to a few ε, and the system that is
    solved, κ its condition number after scaling to a unit diagonal, magnifies that by up to κ.
    """
    gram = sum(scale_off_diagonal((x.double().T @ x.double()) / len(x), alpha) for x in inputs)
    assert isinstance(gram, Tensor)
    root = gram.diagonal().rsqrt()
    condition = float(torch.linalg.cond(gram * root * root[:, None]))
    error = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    bound = factor * torch.finfo(torch.float32).eps * condition
    assert bound < 0.05, "nothing would be told by so wide a bound"
    assert error <= bound, f"off by {error:.1e}, allowed {bound:.1e}"


def squared_error(inputs: Sequence[Tensor], weights: Sequence[Tensor], merged: Tensor) -> float:
    terms = ((x @ (merged - w).T).square().sum() / len(x) for x, w in zip(inputs, weights, strict=True))
    return float(sum(terms))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 10**6))
def test_regression_is_least_squares_on_the_stacked_rows(count: int, width: int, seed: int) -> None:
    inputs = [draw(seed + i, 20 + 7 * i, width) for i in range(count)]
    weights = [draw(seed + 50 + i, 3, width) for i in range(count)]
    found, ridge = solved(inputs, weights, origin=draw(seed + 99, 3, width))
    assert ridge == 0.0
    assert_solves(found, least_squares(inputs, weights), inputs)


def test_regression_is_blind_to_the_scale_of_its_inputs() -> None:
    """Twelve orders of magnitude between features: the unit diagonal keeps the system regular."""
    scales = 10.0 ** torch.linspace(-6, 6, 9)
    inputs = [draw(i, 60, 9) for i in range(3)]
    weights = [draw(10 + i, 4, 9) for i in range(3)]
    plainly, _ = solved(inputs, weights)
    scaled, ridge = solved([x * scales for x in inputs], [w / scales for w in weights])
    assert ridge == 0.0
    torch.testing.assert_close(scaled * scales, plainly, rtol=1e-4, atol=1e-5)


def test_without_off_diagonals_each_column_is_a_weighted_mean() -> None:
    inputs = [draw(i, 30, 5) * (i + 1) for i in range(3)]
    weights = [draw(10 + i, 4, 5) for i in range(3)]
    powers = torch.stack([x.square().mean(0) for x in inputs])
    wanted = (powers[:, None] * torch.stack(weights)).sum(0) / powers.sum(0)
    torch.testing.assert_close(solved(inputs, weights, alpha=0.0)[0], wanted, rtol=1e-5, atol=1e-6)


def test_equal_inputs_give_the_average() -> None:
    rows, weights = draw(0, 40, 5), [draw(10 + i, 4, 5) for i in range(3)]
    for alpha in (0.0, 0.5, 1.0):
        found, _ = solved([rows] * 3, weights, alpha)
        torch.testing.assert_close(found, torch.stack(weights).mean(0), rtol=1e-4, atol=1e-5)


def test_singular_systems_stay_near_the_average_where_nothing_is_known() -> None:
    """Two equal features, one that is always 0, fewer rows than features: regularised, and still a fit."""
    inputs = []
    for index in range(2):
        rows = draw(index, 4, 8)
        rows[:, 1], rows[:, 5] = rows[:, 0], 0.0
        inputs.append(rows)
    weights = [draw(20 + i, 3, 8) for i in range(2)]
    found, ridge = solved(inputs, weights, alpha=1.0)
    mean = torch.stack(weights).mean(0)
    assert ridge > 0
    torch.testing.assert_close(found[:, 5], mean[:, 5])
    # nothing tells the two equal features apart, so their difference is the average's
    torch.testing.assert_close(found[:, 0] - found[:, 1], mean[:, 0] - mean[:, 1], rtol=0, atol=0.05)
    assert float(found.abs().max()) < 3 * float(torch.stack(weights).abs().max())
    best = squared_error(inputs, weights, least_squares(inputs, weights).float())
    assert squared_error(inputs, weights, found) < best + 0.01 * (squared_error(inputs, weights, mean) - best)
    _, gentle = solved(inputs, weights, alpha=0.95)
    assert gentle == 0.0  # the published α makes duplicates and short data regular by itself


def test_scaling_off_diagonals() -> None:
    gram = draw(0, 4, 4)
    before = gram.clone()
    scaled = scale_off_diagonal(gram, 0.25)
    eye = torch.eye(4, dtype=torch.bool)
    assert torch.equal(scaled[eye], gram[eye])
    assert torch.equal(scaled[~eye], 0.25 * gram[~eye])
    assert torch.equal(gram, before)


# --------------------------------------------------------------------------- RegMean on small networks


def test_regmean_of_one_linear_layer_is_least_squares_on_its_inputs() -> None:
    backbone = Plain(linear)
    base = backbone.base_weights()
    inputs = {"a": draw(1, 300, 6) @ draw(2, 6, 6), "b": draw(3, 40, 6) + 1}
    members = [Expert(t, {n: w + draw(i, *w.shape) for n, w in base.items()}) for i, t in enumerate(inputs)]
    merged = RegMean(256, 1.0).merge(base, members, plain_context(backbone, inputs))
    seen = [inputs["a"][spread(256, 300)], inputs["b"]]
    wanted = least_squares(seen, [e.weights["0.weight"] for e in members])
    assert_solves(merged.shared["0.weight"], wanted, seen)
    mean = torch.stack([e.weights["0.bias"] for e in members]).mean(0)
    torch.testing.assert_close(merged.shared["0.bias"], mean)
    assert merged.info == {"examples": {"a": 256, "b": 40}, "linear_layers": 1, "linear_layers_averaged": []}


class Attending(nn.Module):
    """Packed self-attention, then packed attention that takes its values from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 4)
        self.never = nn.Linear(8, 8)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, tokens: Tensor) -> Tensor:
        own, _ = self.own(tokens, tokens, tokens, need_weights=False)
        cross, _ = self.cross(own, key=own, value=tokens)
        out: Tensor = self.last(cross).mean(1) * self.scale
        return out


def test_packed_projections_are_merged_and_what_is_not_reached_is_named() -> None:
    backbone = Plain(Attending)
    base = backbone.base_weights()
    inputs = {"a": draw(1, 12, 5, 8), "b": 2 * draw(2, 12, 5, 8)}
    members = [
        Expert(t, {n: w + 0.3 * draw(i, *w.shape) for n, w in base.items()}) for i, t in enumerate(inputs)
    ]
    merged = RegMean(256, 1.0).merge(base, members, plain_context(backbone, inputs))
    rows = [x.reshape(-1, 8) for x in inputs.values()]
    wanted = least_squares(rows, [e.weights["own.in_proj_weight"] for e in members])
    assert_solves(merged.shared["own.in_proj_weight"], wanted, rows)
    missed = ["own.out_proj.weight", "cross.in_proj_weight", "cross.out_proj.weight", "never.weight"]
    assert merged.info["linear_layers_averaged"] == missed
    assert merged.info["linear_layers"] == 2
    for name in missed:
        mean = torch.stack([e.weights[name] for e in members]).mean(0)
        torch.testing.assert_close(merged.shared[name], mean)


class Tied(nn.Module):
    """One matrix used twice, on different inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(inputs)))
        return out


def test_tied_layers_are_one_regression_over_both_uses() -> None:
    backbone = Plain(Tied)
    base = backbone.base_weights()
    inputs = {"a": draw(1, 30, 4), "b": draw(2, 30, 4) + 0.5}
    members = []
    for index, task in enumerate(inputs):
        weight = base["first.weight"] + draw(index, 4, 4)
        members.append(Expert(task, {"first.weight": weight, "second.weight": weight}))
    merged = RegMean(256, 1.0).merge(base, members, plain_context(backbone, inputs)).shared
    assert merged["first.weight"] is merged["second.weight"]
    rows, weights = [], []
    for expert in members:
        weight, x = expert.weights["first.weight"], inputs[expert.task]
        rows += [x, torch.tanh(x @ weight.T)]
        weights += [weight, weight]
    wanted = least_squares(rows, weights)
    assert_solves(merged["first.weight"], wanted, rows)


def test_inputs_that_are_not_finite_are_refused_by_name() -> None:
    backbone = Plain(linear)
    base = backbone.base_weights()
    rows = draw(1, 10, 6)
    rows[3, 2] = float("nan")
    with pytest.raises(ContractError, match=r"inputs of '0\.weight' are not finite"):
        RegMean(256, 0.95).merge(base, [Expert("a", base)], plain_context(backbone, {"a": rows}))


# --------------------------------------------------------------------------- Fisher information in closed form


def logistic(expectation: str, coverage: float = 1.0) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """(Fisher of softmax(x Wᵀ + b), inputs, probabilities, targets)."""
    backbone = Plain(linear)
    inputs = draw(1, 70, 6)
    targets = (torch.arange(70) * 7) % 4
    ctx = plain_context(backbone, {"a": inputs}, targets)
    model = Model(backbone, load_network(backbone, backbone.base_weights()))
    sample = Sample(ctx, "a", 256, labelled=expectation == "label")
    found = diagonal_fisher(model, sample, expectation, coverage)
    with torch.no_grad():
        probabilities = model.features(inputs).softmax(-1)
    return found, inputs, probabilities, targets


def test_predictive_fisher_of_logistic_regression() -> None:
    found, x, p, _ = logistic("predictive")
    variance = p * (1 - p)  # E_y (δ_yk − p_k)²
    torch.testing.assert_close(found["0.weight"], variance.T @ x.square() / len(x), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found["0.bias"], variance.mean(0), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("expectation", ["argmax", "label"])
def test_fisher_at_one_label_of_logistic_regression(expectation: str) -> None:
    found, x, p, targets = logistic(expectation)
    chosen = targets if expectation == "label" else p.argmax(1)
    errors = (functional.one_hot(chosen, 4) - p).square()
    torch.testing.assert_close(found["0.weight"], errors.T @ x.square() / len(x), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found["0.bias"], errors.mean(0), rtol=1e-4, atol=1e-7)


def test_batch_fisher_squares_after_summing_over_classes_and_rows() -> None:
    found, x, p, _ = logistic("batch")
    scores = p.sqrt() - p * p.sqrt().sum(1, keepdim=True)  # Σ_y √p_y (δ_yk − p_k)
    parts = zip(torch.split(scores, 32), torch.split(x, 32), strict=True)
    wanted = sum((s.T @ rows).square() for s, rows in parts)
    torch.testing.assert_close(found["0.weight"], torch.as_tensor(wanted) / len(x), rtol=1e-4, atol=1e-7)


def test_coverage_keeps_the_fewest_pairs_that_hold_the_share() -> None:
    p = (3 * draw(0, 40, 7)).softmax(-1).double()
    shares = torch.stack([
        p[:, y] * (functional.one_hot(torch.tensor(y), 7) - p).square().sum(1) for y in range(7)
    ], dim=1)  # fmt: skip
    for coverage in (0.3, 0.9, 0.99):
        kept = important(p, coverage)
        assert float(shares[kept].sum()) >= coverage * float(shares.sum())
        assert float(shares[kept].sum() - shares[kept].min()) < coverage * float(shares.sum())
        assert float(shares[kept].min()) >= float(shares[~kept].max())
    assert bool(important(p, 1.0).all())
    exact, _, _, _ = logistic("predictive")
    covered, _, _, _ = logistic("predictive", 0.9)
    lost = 1 - float(covered["0.bias"].sum() / exact["0.bias"].sum())  # the logits' own information
    assert 0 < lost < 0.1


def test_certain_experts_have_no_fisher_information_and_are_averaged() -> None:
    backbone = Plain(linear)
    base = {n: 0 * t for n, t in backbone.base_weights().items()}
    sure = [{**base, "0.bias": base["0.bias"].index_fill(0, torch.tensor(k), 1e4)} for k in (0, 1)]
    rows = draw(1, 20, 6)
    members = [Expert(t, w) for t, w in zip("ab", sure, strict=True)]
    merged = fisher().merge(base, members, plain_context(backbone, {"a": rows, "b": rows})).shared
    torch.testing.assert_close(merged["0.bias"], torch.tensor([5e3, 5e3, 0, 0]))


def test_buffers_and_unused_parameters_are_averaged_and_named() -> None:
    """Beside tensors that are not: the norms of the two Fisher informations differ, so a floor would show."""
    backbone = Plain(Attending)
    base = backbone.base_weights()
    inputs = {"a": draw(1, 12, 5, 8), "b": 3 * draw(2, 12, 5, 8)}
    members = [
        Expert(t, {n: w + 0.3 * draw(i, *w.shape) for n, w in base.items()}) for i, t in enumerate(inputs)
    ]
    merged = fisher().merge(base, members, plain_context(backbone, inputs))
    assert merged.info["averaged"] == ["scale", "never.weight", "never.bias"]
    for name, value in merged.shared.items():
        mean = torch.stack([e.weights[name] for e in members]).mean(0)
        assert torch.allclose(value, mean, atol=1e-6) == (name in merged.info["averaged"])


@pytest.mark.parametrize("normalise", [False, True])
def test_a_certain_expert_keeps_its_floor_beside_an_uncertain_one(normalise: bool) -> None:
    backbone = Plain(linear)
    base = {n: 0 * t for n, t in backbone.base_weights().items()}
    sure = {**base, "0.bias": torch.tensor([1e4, 0, 0, 0])}
    rows = draw(1, 20, 6)
    ctx = plain_context(backbone, {"a": rows, "b": rows})
    method = fisher(normalise=normalise, minimal=0.01)
    merged = method.merge(base, [Expert("a", sure), Expert("b", base)], ctx)
    known = 0.25 * 0.75  # p (1 − p) of the expert that finds all four classes equally likely
    norm = 2 * known * float(1 + rows.square().mean(0).square().sum()) ** 0.5  # over four biases, four rows
    floor, other = (1.0, (known + 0.01) / (norm + 0.01)) if normalise else (0.01, known + 0.01)
    wanted = torch.tensor([1e4 * floor / (floor + other), 0, 0, 0])
    torch.testing.assert_close(merged.shared["0.bias"], wanted)


def test_fisher_merge_is_the_minimum_of_the_quadratic_model() -> None:
    backbone = Plain(linear)
    base = backbone.base_weights()
    inputs = {"a": draw(1, 50, 6), "b": draw(2, 50, 6) * torch.linspace(0.1, 3, 6)}
    members = [Expert(t, {n: w + draw(i, *w.shape) for n, w in base.items()}) for i, t in enumerate(inputs)]
    ctx = plain_context(backbone, inputs)
    merged = fisher(normalise=False, minimal=1e-12).merge(base, members, ctx).shared
    informations = []
    for expert in members:
        model = Model(backbone, load_network(backbone, expert.weights))
        informations.append(diagonal_fisher(model, Sample(ctx, expert.task, 256), "predictive", 1.0))
    for name in base:
        total = sum(f[name] for f in informations)
        weighted = sum(f[name] * e.weights[name] for f, e in zip(informations, members, strict=True))
        torch.testing.assert_close(merged[name], torch.as_tensor(weighted / total), rtol=1e-4, atol=1e-5)


def test_gradients_in_portions_are_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _, _, _ = logistic("predictive")
    monkeypatch.setattr("mergesec_methods.merging._fishers.ENTRIES", 1)
    portions, _, _, _ = logistic("predictive")
    for name, value in whole.items():
        torch.testing.assert_close(portions[name], value, rtol=1e-5, atol=1e-9)


# --------------------------------------------------------------------------- a micro world with trained experts


@pytest.fixture(scope="module")
def world() -> World:
    return trained_world()


def layer_inputs(ctx: MergeContext, expert: Expert) -> dict[str, Tensor]:
    """The rows that enter every linear layer of an expert, on all of its task's tuning inputs."""
    network = load_network(ctx.backbone, expert.weights)
    found: dict[str, Tensor] = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):

            def keep(_: nn.Module, args: Any, out: Any, key: str = f"{name}.weight") -> None:
                found[key] = args[0].reshape(-1, args[0].shape[-1])

            module.register_forward_hook(keep)
    view = ctx.views[expert.task]
    batch = view.task.batch(view.tuning, torch.arange(len(view.tuning)), CPU)
    with torch.no_grad():
        ctx.backbone.features(network, batch.inputs)
    return found


def test_regmean_regresses_better_than_averaging_in_every_layer(world: World) -> None:
    base, members, ctx = world
    inputs = [layer_inputs(ctx, expert) for expert in members]
    average = SimpleAverage().merge(base, members, ctx).shared
    exact = RegMean(256, 1.0).merge(base, members, ctx).shared
    published = RegMean(256, 0.95).merge(base, members, ctx).shared
    assert len(inputs[0]) == 12
    for name in inputs[0]:
        rows, weights = [i[name] for i in inputs], [e.weights[name] for e in members]
        best = squared_error(rows, weights, least_squares(rows, weights).float())
        mean = squared_error(rows, weights, average[name])
        assert squared_error(rows, weights, exact[name]) <= best * 1.001 + 1e-6
        assert squared_error(rows, weights, published[name]) < mean
        assert best < 0.9 * mean
    for name in set(base) - set(inputs[0]):
        assert torch.equal(exact[name], average[name])


def test_regmean_plusplus_equals_a_plain_loop_over_blocks(world: World) -> None:
    """Written out for this architecture: features of merged blocks enter each expert's next block."""
    base, members, ctx = world
    average = SimpleAverage().merge(base, members, ctx).shared
    network: Any = load_network(ctx.backbone, average)
    tokens = []
    with torch.no_grad():
        for expert in members:
            view = ctx.views[expert.task]
            images = view.task.batch(view.tuning, torch.arange(len(view.tuning)), CPU).inputs
            tokens.append(network.stem((images - 0.5) / 0.5).flatten(2).transpose(1, 2) + network.pos)
        wanted: dict[str, Tensor] = {}
        for index, block in enumerate(network.blocks):
            sums: dict[str, list[Tensor]] = {}
            for x, expert in zip(tokens, members, strict=True):
                own: Any = load_network(ctx.backbone, expert.weights)
                own = own.blocks[index]
                y = own.norm1(x)
                q, k, v = (
                    f(y).unflatten(-1, (2, -1)).transpose(1, 2) for f in (own.attn.q, own.attn.k, own.attn.v)
                )
                mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
                z = x + own.attn.o(mixed)
                up = own.norm2(z)
                entering = {"attn.q": y, "attn.k": y, "attn.v": y, "attn.o": mixed, "mlp.up": up}
                entering["mlp.down"] = functional.gelu(own.mlp.up(up))
                for name, rows in entering.items():
                    sums.setdefault(name, []).append(rows.reshape(-1, rows.shape[-1]))
            for name, rows in sums.items():
                key = f"blocks.{index}.{name}.weight"
                wanted[key] = solved(rows, [e.weights[key] for e in members], 0.95, base[key])[0]
                block.get_submodule(name).weight.copy_(wanted[key])
            tokens = [block(x) for x in tokens]
    merged = RegMeanPlusPlus(256, 0.95).merge(base, members, ctx)
    for name, value in merged.shared.items():
        torch.testing.assert_close(value, wanted.get(name, average[name]), rtol=1e-3, atol=1e-4)
    plainly = RegMean(256, 0.95).merge(base, members, ctx).shared
    assert float((merged.shared["blocks.1.mlp.up.weight"] - plainly["blocks.1.mlp.up.weight"]).norm()) > 1e-2
    assert merged.info["linear_layers"] == 12


def test_regmean_plusplus_without_a_chain_of_blocks_starts_from_the_inputs(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, members, ctx = world
    quick = RegMeanPlusPlus(16, 0.95).merge(base, members, ctx).shared
    monkeypatch.setattr(regmean_plusplus, "chained", lambda *given: False)
    slow = RegMeanPlusPlus(16, 0.95).merge(base, members, ctx).shared
    for name in base:
        torch.testing.assert_close(quick[name], slow[name], rtol=0, atol=1e-6)


def test_a_chain_of_blocks_is_told_from_other_wirings(world: World) -> None:
    _, members, ctx = world
    model = Model(ctx.backbone, load_network(ctx.backbone, members[0].weights))
    blocks = list(model.network.get_submodule("blocks").children())
    sample = Sample(ctx, "bars", 16)
    chained = regmean_plusplus.chained
    assert chained(model, sample, blocks)
    assert not chained(model, sample, blocks[::-1])
    blocks[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    assert not chained(model, sample, blocks)


@pytest.mark.parametrize("expectation", ["predictive", "argmax", "label", "batch"])
def test_fisher_merge_lies_between_the_experts(world: World, expectation: str) -> None:
    base, members, ctx = world
    merged = fisher(expectation, num_examples=8).merge(base, members, ctx)
    for name in base:
        if not base[name].is_floating_point():
            continue
        stacked = torch.stack([e.weights[name] for e in members])
        slack = 1e-5 * (1 + stacked.abs().max())
        assert bool((merged.shared[name] >= stacked.min(0).values - slack).all())
        assert bool((merged.shared[name] <= stacked.max(0).values + slack).all())
    assert merged.info == {"examples": {"bars": 8, "blobs": 8, "rings": 8}, "averaged": []}
    flat = fisher(expectation, num_examples=4, normalise=False, minimal=1e12).merge(base, members, ctx).shared
    average = SimpleAverage().merge(base, members, ctx).shared
    for name in base:
        torch.testing.assert_close(flat[name], average[name], rtol=1e-4, atol=1e-5)


def quick(name: str) -> MergeMethod:
    method: Any = METHODS[name]()
    method.num_examples = 4
    return method


@pytest.mark.parametrize("name", METHODS)
def test_properties_on_a_real_network(world: World, name: str) -> None:
    """Order, identical experts, experts equal to the base, integers, untouched inputs, repeatability."""
    base, members, ctx = world
    before = [digest_weights(w) for w in (base, *(e.weights for e in members))]
    merged = quick(name).merge(base, members, ctx).shared
    assert digest_weights(merged) == digest_weights(quick(name).merge(base, members, ctx).shared)
    turned = quick(name).merge(base, members[::-1], ctx).shared
    for key in base:
        torch.testing.assert_close(turned[key], merged[key], rtol=0, atol=1e-4)
    same = [replace(members[0], task=task) for task in ctx.views]
    for key, value in quick(name).merge(base, same, ctx).shared.items():
        torch.testing.assert_close(value, members[0].weights[key], rtol=0, atol=1e-5)
    still = quick(name).merge(base, [Expert(task, base) for task in ctx.views], ctx).shared
    assert digest_weights(still) == digest_weights(base)
    assert merged["seen"] is base["seen"]
    assert before == [digest_weights(w) for w in (base, *(e.weights for e in members))]
    assert all(not t.requires_grad for t in merged.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_types_are_the_bases(world: World, name: str, dtype: torch.dtype) -> None:
    base, members, ctx = world

    def cast(weights: Weights) -> dict[str, Tensor]:
        return {n: t.to(dtype) if t.is_floating_point() else t for n, t in weights.items()}

    low = [Expert(e.task, cast(e.weights)) for e in members]
    high = [Expert(e.task, {n: t.float() for n, t in e.weights.items()}) for e in low]
    merged = quick(name).merge(cast(base), low, ctx).shared
    exact = quick(name).merge({n: t.float() for n, t in cast(base).items()}, high, ctx).shared
    for key, value in merged.items():
        assert value.dtype == cast(base)[key].dtype
        tolerance = 0.02 if name == "regmean_plusplus" else 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(value.float(), exact[key].float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", METHODS)
def test_which_data_a_merge_looks_at(world: World, name: str) -> None:
    """Labels are read by one variant only; inputs come from what the protocol allows adaptation on."""
    base, members, ctx = world
    result = digest_weights(quick(name).merge(base, members, ctx).shared)

    def with_views(change: Callable[[TaskView], TaskView]) -> str:
        views = {task: change(view) for task, view in ctx.views.items()}
        return digest_weights(quick(name).merge(base, members, replace(ctx, views=views)).shared)

    relabelled = with_views(lambda v: replace(v, tuning=Split(v.tuning.inputs, (v.tuning.targets + 1) % 4)))
    elsewhere = with_views(lambda v: replace(v, unlabelled=255 - v.unlabelled))
    reads_labels = name == "fisher_label"
    assert (relabelled != result) == reads_labels
    assert (elsewhere != result) == (not reads_labels)
    assert with_views(lambda v: replace(v, unlabelled=None)) == result
    with pytest.raises(ContractError, match="no tuning rows of task 'bars'"):
        quick(name).merge(base, members, replace(ctx, views={}))


def test_one_gram_matrix_serves_query_key_and_value(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    _, members, ctx = world
    network = load_network(ctx.backbone, members[0].weights)
    sample = Sample(ctx, "bars", 16)
    with torch.no_grad(), InputGrams(network) as grams:
        for batch in sample.batches(4):
            sample.outputs(Model(ctx.backbone, network), batch)
    means = grams.means()
    assert torch.equal(means["blocks.0.attn.q.weight"], means["blocks.0.attn.v.weight"])
    assert not torch.equal(means["blocks.0.attn.q.weight"], means["blocks.0.attn.o.weight"])
    assert not any(module._forward_pre_hooks for module in network.modules())


@given(st.integers(1, 300), st.integers(1, 400))
def test_rows_are_spread_without_repeats(count: int, size: int) -> None:
    rows = spread(count, size).tolist()
    assert len(set(rows)) == len(rows) == min(count, size)
    assert rows == sorted(rows)
    assert rows[0] >= 0
    assert rows[-1] < size


@pytest.mark.parametrize("classes", [2, 4, 10])
def test_rows_are_balanced_in_sorted_and_in_alternating_splits(classes: int) -> None:
    rows = spread(100, 400)
    for labels in (torch.arange(400) * classes // 400, torch.arange(400) % classes):
        counts = torch.bincount(labels[rows], minlength=classes)
        assert int(counts.max() - counts.min()) <= 4


# --------------------------------------------------------------------------- FusionBench 0.2.33


@pytest.fixture(scope="module")
def regmean_reference(installed: Any) -> Any:
    return installed("fusion_bench.method.regmean.regmean")


@pytest.fixture(scope="module")
def fisher_reference(installed: Any) -> Any:
    return installed("fusion_bench.method.fisher_merging.fisher_merging")


@pytest.mark.fusionbench
@pytest.mark.parametrize("alpha", [0.1, 0.95, 1.0])
def test_regression_equals_fusion_bench(regmean_reference: Any, alpha: float) -> None:
    inputs = [draw(i, 200, 24) @ draw(9, 24, 24) for i in range(4)]
    weights = [draw(20 + i, 13, 24) for i in range(4)]
    grams = [x.T @ x / len(x) for x in inputs]
    reduced = regmean_reference.reduce_non_diagonal_elements(grams[0], alpha)
    torch.testing.assert_close(scale_off_diagonal(grams[0], alpha), reduced, rtol=1e-6, atol=1e-6)
    wanted = regmean_reference.merging_with_regmean_weights(
        {"m.weight": [w.double() for w in weights]}, [{"m": g.double()} for g in grams], alpha
    )["m.weight"]
    found, ridge = solved(inputs, weights, alpha, draw(50, 13, 24))
    assert ridge == 0.0
    assert_solves(found, wanted, inputs, alpha)


@pytest.mark.fusionbench
@pytest.mark.parametrize("normalise", [False, True])
def test_fisher_mean_equals_fusion_bench(fisher_reference: Any, normalise: bool) -> None:
    base = {"a": draw(0, 9, 5), "b": draw(1, 9)}
    members = [{n: t + draw(10 + i, *t.shape) for n, t in base.items()} for i in range(3)]
    infos = [
        {n: 10.0 ** (i - 6) * draw(20 + i, *t.shape).square() for n, t in base.items()} for i in range(3)
    ]
    wanted = fisher_reference.merging_with_fisher_weights(
        {n: [m[n] for m in members] for n in base}, infos, torch.ones(3) / 3, normalise, 1e-6
    )
    method, means = fisher(normalise=normalise), dict[str, FisherMean]()
    for index, (member, info) in enumerate(zip(members, infos, strict=True)):
        method._gather(means, info, base, Expert(str(index), member))
    for name, mean in means.items():
        torch.testing.assert_close(
            base[name] + mean.weighted / mean.weights, wanted[name], rtol=1e-4, atol=1e-5
        )
