"""PaRaMS keeps the function on every architecture, and would not if any one tensor were forgotten."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergesec.anatomy import Attention, Linear
from mergesec.contracts import ContractError
from mergesec.surgery import assign, head_columns, head_rows, hidden_units, read, write
from mergesec_methods.protection.defenses._heads import LOGIT_TOLERANCE
from mergesec_methods.protection.defenses.params import Params, rearrange

VARIANTS = ("v1", "diagonal", "symmetric", "nonsymmetric")
UNIT_ROUNDOFF = torch.finfo(torch.float32).eps / 2


def difference(architecture: Any, one: dict, other: dict) -> float:
    return float((architecture.logits(one) - architecture.logits(other)).abs().max())


def assert_same_tensors(one: dict, other: dict) -> None:
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert tensor.shape == other[name].shape, name
        assert tensor.dtype == other[name].dtype, name


@pytest.mark.parametrize("permute", [True, False])
@pytest.mark.parametrize("scaling", ["none", *VARIANTS])
def test_function_is_kept(architecture, scaling: str, permute: bool) -> None:
    inputs = {**architecture.expert}
    versions = {n: t._version for n, t in (*architecture.base.items(), *inputs.items())}
    before = {n: t.clone() for n, t in inputs.items()}
    protected = Params(permute=permute, scaling=scaling).protect(inputs, architecture.protect_context(3))
    bound = protected.report["logit_bound"]
    assert scaling == "nonsymmetric" or bound == pytest.approx(LOGIT_TOLERANCE)
    assert difference(architecture, architecture.expert, protected.weights) <= bound
    assert_same_tensors(protected.weights, architecture.expert)
    assert versions == {n: t._version for n, t in (*architecture.base.items(), *inputs.items())}
    assert all(torch.equal(before[n], t) for n, t in inputs.items())


def test_nonsymmetric_error_is_within_kappa_times_float32_noise(architecture) -> None:
    exact = architecture.logits(architecture.expert, torch.float64)
    noise = float((architecture.logits(architecture.expert) - exact).abs().max())
    protected = Params(scaling="nonsymmetric").protect(architecture.expert, architecture.protect_context())
    shift = (architecture.logits(protected.weights) - exact).abs().max()
    assert shift <= protected.report["condition"] * noise
    assert protected.report["effective_error"] <= UNIT_ROUNDOFF * protected.report["condition"]


@pytest.mark.parametrize("scaling", ["v1", "diagonal"])
def test_diagonal_scaling_amplifies_nothing(mini, scaling: str) -> None:
    report = Params(scaling=scaling).protect(mini.expert, mini.protect_context()).report
    assert report["condition"] > 10
    assert report["effective_error"] <= UNIT_ROUNDOFF


# ------------------------------------------------------------------ leaving one tensor out shows


def revert(weights: dict, original: dict, linear: Linear, part: str) -> dict:
    """``weights`` with one map's weight or bias as it was before protection."""
    now, then = read(weights, linear), read(original, linear)
    weight, bias = (then[0], now[1]) if part == "weight" else (now[0], then[1])
    return write(weights, linear, weight, bias)


def transformed(block: Any, permute: bool) -> list[tuple[str, Linear, str]]:
    """Every (label, map, part) that the module in question changes, but for the key bias."""
    attention, mlp = block.attention, block.mlp
    if permute:
        parts = [("up", mlp.up, "weight"), ("up bias", mlp.up, "bias"), ("down", mlp.down, "weight")]
        gate = [("gate", mlp.gate, "weight"), ("gate bias", mlp.gate, "bias")] if mlp.gate else []
        return parts + gate
    return [
        ("query", attention.query, "weight"),
        ("query bias", attention.query, "bias"),
        ("key", attention.key, "weight"),
        ("value", attention.value, "weight"),
        ("value bias", attention.value, "bias"),
        ("output", attention.output, "weight"),
    ]


@pytest.mark.parametrize("scaling", ["none", *VARIANTS])
def test_any_forgotten_tensor_changes_the_logits(architecture, scaling: str) -> None:
    permute = scaling == "none"
    protected = Params(permute=permute, scaling=scaling).protect(
        architecture.expert, architecture.protect_context(3)
    )
    floor = 10 * protected.report["logit_bound"]
    for block in architecture.anatomy().blocks:
        for label, linear, part in transformed(block, permute):
            wrong = revert(protected.weights, architecture.expert, linear, part)
            shift = difference(architecture, architecture.expert, wrong)
            assert shift > floor, f"{block.name} {label}: only {shift:.1e}"


def products(weights: dict, attention: Attention) -> dict[str, torch.Tensor]:
    """What attention can see of a head: bilinear forms of Q and K, and the joined O·V, with biases."""
    (q, bq), (k, bk), (v, bv) = (
        head_rows(weights, m, attention) for m in (attention.query, attention.key, attention.value)
    )
    o = head_columns(weights, attention)
    assert bq is not None
    assert bk is not None
    assert bv is not None
    qb, kb, vb = (torch.cat([w, b[..., None]], dim=2) for w, b in ((q, bq), (k, bk), (v, bv)))
    return {"scores": qb.mT @ kb, "values": o @ vb}


@pytest.mark.parametrize("scaling", VARIANTS)
def test_head_products_are_kept_key_bias_included(architecture, scaling: str) -> None:
    """The key bias adds the same score for every key, so softmax hides it: only the algebra tells."""
    protected = Params(permute=False, scaling=scaling).protect(
        architecture.expert, architecture.protect_context(3)
    )
    tolerance = 40 * UNIT_ROUNDOFF * max(1.0, protected.report["condition"])
    for block in architecture.anatomy().blocks:
        before = products(architecture.expert, block.attention)
        after = products(protected.weights, block.attention)
        for name, product in before.items():
            assert (after[name] - product).abs().max() <= tolerance * product.abs().max(), name
        wrong = revert(protected.weights, architecture.expert, block.attention.key, "bias")
        shift = (products(wrong, block.attention)["scores"] - before["scores"]).abs().max()
        assert shift > 0.1
        assert difference(architecture, protected.weights, wrong) <= protected.report["logit_bound"]


def test_layers_scales_norms_and_last_biases_stay(architecture) -> None:
    weights = Params(scaling="symmetric").protect(architecture.expert, architecture.protect_context()).weights
    touched = set()
    for block in architecture.anatomy().blocks:
        a, m = block.attention, block.mlp
        maps = (a.query, a.key, a.value, a.output, m.up, m.down, *([m.gate] if m.gate else []))
        touched |= {n for x in maps for n in (x.weight, x.bias) if n} - {a.output.bias, m.down.bias}
    for name, tensor in architecture.expert.items():
        assert torch.equal(weights[name], tensor) == (name not in touched), name


# ------------------------------------------------------------------ rearrangement


def test_rearrangement_reaches_the_optimum_in_the_right_direction(architecture) -> None:
    from scipy.optimize import linear_sum_assignment

    for block in architecture.anatomy().blocks:
        expert, base = architecture.expert, architecture.base
        up, up_bias = read(expert, block.mlp.up)
        up0, up_bias0 = read(base, block.mlp.up)
        scores = up @ up0.T + torch.outer(up_bias, up_bias0)
        scores += read(expert, block.mlp.down)[0].T @ read(base, block.mlp.down)[0]
        if block.mlp.gate:
            gate, gate0 = read(expert, block.mlp.gate), read(base, block.mlp.gate)
            scores += gate[0] @ gate0[0].T + torch.outer(gate[1], gate0[1])
        best = scores[linear_sum_assignment(scores, maximize=False)].sum()
        moved, facts = rearrange(expert, base, block.mlp)
        achieved = (hidden_units(moved, block.mlp) * hidden_units(base, block.mlp)).sum()
        assert achieved == pytest.approx(float(best), rel=1e-9)
        assert facts["similarity_after"] == pytest.approx(float(best), rel=1e-9)
        assert achieved < facts["similarity_before"]


@given(st.integers(1, 6), st.integers(0, 2**31), st.booleans())
@settings(max_examples=40, deadline=None)
def test_assignment_beats_every_permutation(size: int, seed: int, maximize: bool) -> None:
    scores = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    order = assign(scores, maximize=maximize)
    assert sorted(order.tolist()) == list(range(size))
    places = torch.arange(size)
    totals = [float(scores[list(p), places].sum()) for p in permutations(range(size))]
    best = max(totals) if maximize else min(totals)
    assert float(scores[order, places].sum()) == pytest.approx(best, abs=1e-12)


# ------------------------------------------------------------------ parameters


@given(
    st.sampled_from(VARIANTS),
    st.sampled_from(["uniform", "log_uniform", "beta"]),
    st.floats(0.02, 1.0),
    st.floats(1.0, 30.0),
    st.integers(0, 2**40),
)
@settings(max_examples=30, deadline=None)
def test_matrices_follow_range_and_cancel(scaling: str, law: str, low: float, high: float, seed: int) -> None:
    attention = Attention(*(Linear(n, None) for n in "qkvo"), heads=3, head_dim=5)
    defense = Params(scaling=scaling, range_low=low, range_high=high, distribution=law)
    m = defense.draw(attention, torch.Generator().manual_seed(seed))
    eye = torch.eye(5, dtype=torch.float64).expand(3, 5, 5)
    slack = 1e-13 * m.condition()
    assert torch.allclose(m.query.mT @ m.key, eye, atol=slack)
    assert torch.allclose(m.output @ m.value, eye, atol=slack)
    assert torch.equal(m.query, m.value) == (scaling != "v1" or low == high)
    if scaling != "nonsymmetric":
        spectrum = torch.linalg.eigvalsh(torch.cat([m.query, m.value]))
        assert spectrum.min() >= low * (1 - 1e-9)
        assert spectrum.max() <= high * (1 + 1e-9)
        assert torch.equal(m.query, m.query.mT) or scaling == "symmetric"
        assert m.condition() <= high / low * (1 + 1e-9)


def test_laws_have_their_medians() -> None:
    attention = Attention(*(Linear(n, None) for n in "qkvo"), heads=50, head_dim=80)
    for law, median in (("uniform", 10.025), ("beta", 10.025), ("log_uniform", 1.0)):
        m = Params(distribution=law).draw(attention, torch.Generator().manual_seed(0))
        scales = m.query.diagonal(dim1=1, dim2=2).flatten()
        below = float((scales < median).double().mean())
        assert abs(below - 0.5) < 0.03, law
        edge = float((scales < 0.05 + 0.05 * 19.95).double().mean())
        expected = {"uniform": 0.05, "beta": 0.1436, "log_uniform": 0.508}[law]
        assert abs(edge - expected) < 0.03, law


def test_published_ranges() -> None:
    for scaling in VARIANTS:
        low, high = (0.1, 15.0) if scaling == "nonsymmetric" else (0.05, 20.0)
        law = "uniform" if scaling in ("v1", "diagonal") else "log_uniform"
        defense = Params(scaling=scaling)
        assert (defense.low, defense.high, defense.distribution) == (low, high, law)
    with pytest.raises(ValueError, match="range_low"):
        Params(range_low=3.0, range_high=2.0)


def test_half_precision_is_refused_for_scaling_and_exact_for_rearrangement(mini) -> None:
    half = {n: t.half() for n, t in mini.expert.items()}
    with pytest.raises(ContractError, match="float16"):
        Params(scaling="diagonal").protect(half, mini.protect_context())
    moved = Params(scaling="none").protect(half, mini.protect_context()).weights
    for block in mini.anatomy().blocks:
        for linear, dim in ((block.mlp.up, 0), (block.mlp.down, 1)):
            one, other = half[linear.weight].sort(dim=dim).values, moved[linear.weight].sort(dim=dim).values
            assert torch.equal(one, other)


def test_same_seed_same_weights_other_seed_others(mini) -> None:
    runs = [Params().protect(mini.expert, mini.protect_context(s)).weights for s in (1, 1, 2)]
    assert all(torch.equal(runs[0][n], runs[1][n]) for n in runs[0])
    assert not torch.equal(runs[0]["blocks.0.attn.q.weight"], runs[2]["blocks.0.attn.q.weight"])


def test_dropout_drops_its_share_and_leaves_the_matrices_alone(mini) -> None:
    dropped = Params(permute=False, scaling="none", dropout=0.3).protect(mini.expert, mini.protect_context())
    name = "blocks.0.mlp.up.weight"
    vector, original = dropped.weights[name] - mini.base[name], mini.expert[name] - mini.base[name]
    kept = vector != 0
    assert abs(float(kept.double().mean()) - 0.7) < 0.06
    assert torch.allclose(vector[kept], original[kept] / 0.7, atol=1e-6)
    with_, without = (
        Params(permute=False, dropout=d).protect(mini.expert, mini.protect_context()) for d in (0.3, 0.0)
    )
    assert with_.report["condition"] == without.report["condition"]
    scaled = Params(permute=False).protect(dropped.weights, mini.protect_context()).weights
    assert all(torch.equal(scaled[n], with_.weights[n]) for n in scaled)
