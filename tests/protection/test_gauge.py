"""The whole group of a network's symmetries: every generator keeps the function, and what draws from it is undone."""

from __future__ import annotations

import pytest
import torch

from mergesec.anatomy import NEEDS, Kind, symmetries
from mergesec.contracts import ContractError
from mergesec_methods.protection.attacks.coupled import Coupled
from mergesec_methods.protection.defenses._gauges import MOVES, SHARED, Draw, move
from mergesec_methods.protection.defenses.gauge import (
    FullGauge,
    KeyShift,
    MeanShift,
    NormRescale,
    ValueShift,
)

INSIDE = {Kind.HIDDEN_ORDER, Kind.HEAD_ORDER, Kind.QUERY_KEY, Kind.VALUE_OUTPUT}
NORMS = {Kind.NORM_SCALE, Kind.NORM_SHIFT}
LAYER_NORM = {Kind.VALUE_SHIFT, Kind.KEY_SHIFT, Kind.READER_MEAN, Kind.WRITER_MEAN}
GROUPS = {
    "mini": INSIDE | LAYER_NORM | NORMS,
    "hf_clip": INSIDE | LAYER_NORM | NORMS,
    "hf_vit": INSIDE | LAYER_NORM | NORMS,
    "open_clip": INSIDE | LAYER_NORM | NORMS,
    "hf_dinov2": INSIDE | LAYER_NORM | NORMS | {Kind.LAYER_SCALE},
    "hf_dinov2_swiglu": INSIDE | LAYER_NORM | NORMS | {Kind.LAYER_SCALE, Kind.UNIT_SCALE},
    "timm": INSIDE | LAYER_NORM | NORMS | {Kind.LAYER_SCALE},
    "hf_bert": INSIDE | LAYER_NORM,
    "hf_distilbert": INSIDE | LAYER_NORM,
    "hf_gpt2": INSIDE | LAYER_NORM | NORMS,
    "hf_llama": INSIDE | {Kind.NORM_SCALE, Kind.UNIT_SCALE},
    "hf_qwen2": INSIDE | {Kind.NORM_SCALE, Kind.UNIT_SCALE},
}
DEFENSES = {
    "value_shift": ValueShift(),
    "key_shift": KeyShift(),
    "mean_shift": MeanShift(),
    "norm_rescale": NormRescale(),
    "full_gauge": FullGauge(params="v1"),
}


def draw(seed: int = 0, size: float = 3.0) -> Draw:
    return Draw(torch.Generator().manual_seed(seed), size, 20.0, signs=True)


def gap(architecture, one: dict, other: dict, dtype: torch.dtype = torch.float32) -> float:
    return float((architecture.logits(one, dtype) - architecture.logits(other, dtype)).abs().max())


def doubled(weights: dict) -> dict:
    return {n: t.double() if t.is_floating_point() else t for n, t in weights.items()}


# ------------------------------------------------------------------ the group


def test_the_group_of_every_architecture(any_architecture) -> None:
    """What is listed, per block; a kind that is missing has its reason in NEEDS."""
    anatomy = any_architecture.anatomy()
    listed = symmetries(anatomy)
    expected = GROUPS[any_architecture.name]
    for block in anatomy.blocks:
        assert {s.kind for s in listed if s.block is block} == expected
    assert set(Kind) - expected <= set(NEEDS)
    assert MOVES.keys() | SHARED.keys() == set(Kind)


@pytest.mark.parametrize("kind", list(Kind))
def test_every_generator_keeps_the_function_and_moves_the_weights(any_architecture, kind: Kind) -> None:
    """In float64, to its rounding; and in float32, to what float32 can tell."""
    anatomy, expert = any_architecture.anatomy(), any_architecture.expert
    if kind not in GROUPS[any_architecture.name]:
        with pytest.raises(ContractError, match="has no such symmetry: it needs"):
            move(expert, anatomy, [kind], draw(), "test")
        return
    exact = move(doubled(expert), anatomy, [kind], draw(), "test")
    assert gap(any_architecture, exact, doubled(expert), torch.float64) < 1e-9
    published = move(expert, anatomy, [kind], draw(), "test")
    assert list(published) == list(expert)
    assert gap(any_architecture, published, expert) < 2e-4
    moved = sum(float((published[n] - t).double().square().sum()) for n, t in expert.items()) ** 0.5
    assert moved > 0.5
    assert all(published[n].dtype == t.dtype for n, t in expert.items())


# ------------------------------------------------------------------ the protections


@pytest.mark.parametrize("name", DEFENSES)
def test_protections_keep_the_function(architecture, name: str) -> None:
    if name == "norm_rescale" and architecture.name == "hf_bert":
        with pytest.raises(ContractError, match="norms that nothing but the maps behind them reads"):
            DEFENSES[name].protect(architecture.expert, architecture.protect_context())
        return
    result = DEFENSES[name].protect(architecture.expert, architecture.protect_context())
    assert gap(architecture, dict(result.weights), architecture.expert) < 2e-4
    assert set(result.report["symmetries"]) <= GROUPS[architecture.name]
    assert result.report["symmetries"]


@pytest.mark.parametrize("name", ["value_shift", "key_shift", "mean_shift"])
def test_shifts_are_refused_where_they_would_change_the_function(rotary, name: str) -> None:
    with pytest.raises(ContractError, match="has no such symmetry: it needs"):
        DEFENSES[name].protect(rotary.expert, rotary.protect_context())


def test_grouped_gated_rotary_networks_have_their_kin(rotary) -> None:
    for name in ("norm_rescale", "full_gauge"):
        result = DEFENSES[name].protect(rotary.expert, rotary.protect_context())
        assert gap(rotary, dict(result.weights), rotary.expert) < 2e-4
        assert {"norm_scale", "unit_scale"} <= set(result.report["symmetries"])
    again = DEFENSES["norm_rescale"].protect(rotary.expert, rotary.protect_context())
    other = DEFENSES["norm_rescale"].protect(rotary.expert, rotary.protect_context(1))
    first = DEFENSES["norm_rescale"].protect(rotary.expert, rotary.protect_context())
    assert all(torch.equal(first.weights[n], t) for n, t in again.weights.items())
    assert any(not torch.equal(first.weights[n], t) for n, t in other.weights.items())


# ------------------------------------------------------------------ the attack


def everything(architecture, seed: int) -> dict:
    """The expert after a random element of the whole group: every generator of every block, in a random order."""
    generator = torch.Generator().manual_seed(seed)
    kinds = list(Kind)
    order = [kinds[i] for i in torch.randperm(len(kinds), generator=generator).tolist()]
    moved, anatomy = architecture.expert, architecture.anatomy()
    for kind in order:
        if kind in GROUPS[architecture.name]:
            moved = move(moved, anatomy, [kind], Draw(generator, 2.0, 4.0, signs=True), "test")
    return moved


def merged(architecture, weights: dict, scaling: float = 0.5) -> dict:
    """Task arithmetic of these weights and another expert."""
    generator = torch.Generator().manual_seed(77)
    return {
        n: b + scaling * (weights[n] - b) + scaling * 0.02 * torch.randn(b.shape, generator=generator)
        if b.is_floating_point()
        else b
        for n, b in architecture.base.items()
    }


def distance(one: dict, other: dict) -> float:
    return sum(float((one[n] - t).double().square().sum()) for n, t in other.items()) ** 0.5


@pytest.mark.parametrize("seed", range(3))
def test_every_element_of_the_whole_group_is_undone(any_architecture, seed: int) -> None:
    """The function stays; the weights are those that the unprotected expert itself leads to, and so is the merge."""
    a, context = any_architecture, any_architecture.recover_context()
    published = everything(a, seed)
    recovered = Coupled().recover(published, context)
    assert gap(a, recovered, a.expert) < 1e-3
    plain = Coupled().recover(a.expert, context)
    tau = distance(a.expert, a.base)
    assert distance(published, a.expert) > 5 * tau
    assert distance(recovered, plain) < 2e-3 * tau
    # merged: as the unprotected expert is, up to a twentieth of what the merge changes of the base at all
    target = a.logits(merged(a, a.expert))
    changed = (a.logits(merged(a, a.base)) - target).norm()
    assert (a.logits(merged(a, recovered)) - target).norm() < 0.05 * changed
    assert (a.logits(merged(a, published)) - target).norm() > changed


def test_without_fixing_the_gauge_the_fits_are_misled(any_architecture) -> None:
    """What the option is for: the same attack without it leaves the expert farther away than its own base is."""
    a, context = any_architecture, any_architecture.recover_context()
    plain = [Coupled(gauges=g).recover(a.expert, context) for g in (True, False)]
    tau = distance(a.expert, a.base)
    tried = {Kind.VALUE_SHIFT, Kind.KEY_SHIFT, Kind.READER_MEAN, Kind.UNIT_SCALE} & GROUPS[a.name]
    assert tried
    for kind in tried:
        published = move(a.expert, a.anatomy(), [kind], draw(), "test")
        found = [Coupled(gauges=g).recover(published, context) for g in (True, False)]
        assert distance(found[0], plain[0]) < 2e-3 * tau
        assert distance(found[1], plain[1]) > tau


def test_entries_of_norms_near_zero_are_left_alone(mini) -> None:
    """A coordinate that a norm shuts cannot be given the anchor's value; all others are."""
    name = mini.anatomy().blocks[0].attention.norm.weight
    shut = torch.ones_like(mini.expert[name]).index_fill(0, torch.tensor([2]), 0.0)
    expert = {**mini.expert, name: mini.expert[name] * shut}
    recovered = Coupled().recover(expert, mini.recover_context())
    assert torch.allclose(recovered[name], mini.base[name] * shut)
    assert all(bool(t.isfinite().all()) for t in recovered.values())
    assert gap(mini, recovered, expert) < 1e-4
