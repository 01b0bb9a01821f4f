"""Generators protected by the symmetries that nobody uses: the function stays, published attacks stay behind, and
coupled re-alignment undoes every element of the whole group."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from denoising import NAMES, Denoiser, make

from mergesec.anatomy import UP_TO_EPSILON, Kind, symmetries
from mergesec.contracts import Expert
from mergesec_methods.merging.git_rebasin import GitRebasin
from mergesec_methods.protection.attacks.aga import Aga
from mergesec_methods.protection.attacks.coupled import Coupled
from mergesec_methods.protection.attacks.realign import Realign
from mergesec_methods.protection.attacks.realign_gauged import RealignGauged
from mergesec_methods.protection.attacks.unscale import Unscale
from mergesec_methods.protection.defenses._gauges import Draw, move
from mergesec_methods.protection.defenses.gauge import DenoiserGauge, FullGauge
from mergesec_methods.protection.defenses.mergelock import MergeLock
from mergesec_methods.protection.defenses.params import Params
from mergesec_methods.protection.defenses.random_permutation import RandomPermutation
from mergesec_methods.protection.defenses.sign_flips import SignFlips

USED = {
    "unet": {Kind.NORM_SCALE, Kind.UNIT_SCALE, Kind.CHANNEL_ORDER, Kind.GROUP_SIGN},
    "dit": {Kind.NORM_SCALE, Kind.LAYER_SCALE, Kind.CHANNEL_ORDER},
    "mmdit": {Kind.NORM_SCALE, Kind.LAYER_SCALE, Kind.CHANNEL_ORDER},
    "single": {Kind.NORM_SCALE, Kind.LAYER_SCALE, Kind.CHANNEL_ORDER},
}
USED["unet_linear"] = USED["unet"]
USED["mmdit_normed"] = USED["mmdit"] | {Kind.QK_SIGN, Kind.QK_ORDER, Kind.QK_GAIN, Kind.QK_SCALE}
DEFENSES = {
    "params": Params(),
    "nonsymmetric": Params(scaling="nonsymmetric"),
    "mergelock": MergeLock(permute=True, heads=True, distribution="log_uniform", condition=20.0),
    "random_permutation": RandomPermutation(dimensions=True),
    "sign_flips": SignFlips(),
    "denoiser_gauge": DenoiserGauge(),
    "denoiser_gauge beside PaRaMS": DenoiserGauge(params="v1"),
    "full_gauge": FullGauge(params="v1"),
}


def gap(network: Denoiser, one: dict, other: dict) -> float:
    first, second = network.logits(one), network.logits(other)
    return float((first - second).abs().max() / second.abs().max())


def distance(one: dict, other: dict) -> float:
    return sum(float((one[n] - t).double().square().sum()) for n, t in other.items()) ** 0.5


@cache
def unprotected(name: str) -> dict:
    """Where coupled re-alignment leads from the expert itself."""
    return Coupled().recover(make(name).expert, make(name).recover_context())


def merged(network: Denoiser, weights: dict) -> dict:
    """The mean of these weights and another expert's."""
    generator = torch.Generator().manual_seed(77)
    return {
        n: (weights[n] + b + 0.02 * b.std() * torch.randn(b.shape, generator=generator)) / 2
        for n, b in network.base.items()
    }


def off(network: Denoiser, weights: dict) -> float:
    """How far the merge with ``weights`` is from the merge with the unprotected expert, in units of how far that is
    from the merge with the base."""
    target = network.logits(merged(network, network.expert))
    changed = (network.logits(merged(network, network.base)) - target).norm()
    return float((network.logits(merged(network, weights)) - target).norm() / changed)


# ------------------------------------------------------------------ the function stays


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("defense", DEFENSES)
def test_protections_keep_the_function_of_generators(name: str, defense: str) -> None:
    """In float64: in float32 full matrices multiply rounding by their condition, up to 10⁵, which the grids report."""
    network = make(name)
    expert = {n: t.double() for n, t in network.expert.items()}
    result = DEFENSES[defense].protect(expert, network.protect_context())
    before, after = (network.logits(dict(w), torch.float64) for w in (expert, result.weights))
    assert float((after - before).abs().max() / before.abs().max()) < 1e-6  # RMS norms there are float32
    assert distance(result.weights, network.expert) > 1.0
    assert [n for n, t in result.weights.items() if t.shape != network.expert[n].shape] == []
    if defense == "denoiser_gauge":
        assert set(result.report["symmetries"]) == USED[name]


def test_without_epsilon_every_factor_is_exact() -> None:
    network = make("mmdit_normed")
    result = DenoiserGauge(epsilon=False).protect(network.expert, network.protect_context())
    assert set(result.report["symmetries"]) == USED["mmdit_normed"] - UP_TO_EPSILON


def test_matrices_on_normed_queries_are_left_out_and_that_is_said() -> None:
    network = make("mmdit_normed")
    result = Params(scaling="nonsymmetric").protect(network.expert, network.protect_context())
    for facts in result.report["blocks"]:
        assert facts["left_out"] == ["queries and keys are normed: no matrix but signs commutes with that"]
    attention = network.anatomy().blocks[0].attention
    assert torch.equal(result.weights[attention.query.weight], network.expert[attention.query.weight])
    assert not torch.equal(result.weights[attention.value.weight], network.expert[attention.value.weight])
    flipped = SignFlips().protect(network.expert, network.protect_context()).weights
    ratio = flipped[attention.query.weight] / network.expert[attention.query.weight]
    assert set(ratio.flatten().tolist()) == {1.0, -1.0}


# ------------------------------------------------------------------ attacks


@pytest.mark.parametrize("name", ["unet", "dit", "mmdit_normed"])
@pytest.mark.parametrize("seed", range(3))
def test_the_gauge_stops_published_attacks_and_not_those_that_know_it(name: str, seed: int) -> None:
    network = make(name)
    context = network.recover_context()
    published = dict(
        DenoiserGauge(params="v1").protect(network.expert, network.protect_context(seed)).weights
    )
    assert off(network, published) > 1.0
    for attack in (Aga(), Realign(), Unscale(mode="row"), Coupled(gauges=False)):
        assert off(network, attack.recover(published, context)) > 1.0, attack
    assert off(network, Coupled().recover(published, context)) < 0.05
    # AGA loses what its fits lose of an unprotected expert, and no more
    alone, behind = (RealignGauged().recover(w, context) for w in (network.expert, published))
    assert off(network, behind) < 1.05 * off(network, alone) + 0.01


def test_without_heads_changed_units_alone_are_brought_back_behind_the_gauge() -> None:
    network = make("unet")
    published = dict(DenoiserGauge(params="none").protect(network.expert, network.protect_context()).weights)
    context = network.recover_context()
    assert off(network, Realign().recover(published, context)) > 1.0
    recovered = RealignGauged(maps="none").recover(published, context)
    assert gap(network, recovered, network.expert) < 3e-4
    assert off(network, recovered) < 0.05


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(2))
def test_every_element_of_the_whole_group_is_undone(name: str, seed: int) -> None:
    """The weights are those that the unprotected expert itself leads to, and so is the merge."""
    network, generator = make(name), torch.Generator().manual_seed(seed)
    has = {s.kind for s in symmetries(network.anatomy())}
    kinds = [kind for kind in Kind if kind in has]
    published = network.expert
    for i in torch.randperm(len(kinds), generator=generator).tolist():
        drawn = Draw(generator, 1.0, 4.0, signs=True)
        published = move(published, network.anatomy(), [kinds[i]], drawn, "test")
    tau = distance(network.expert, network.base)
    assert distance(published, network.expert) > 20 * tau
    recovered = Coupled().recover(published, network.recover_context())
    assert gap(network, recovered, network.expert) < 3e-4
    assert distance(recovered, unprotected(name)) < 2e-3 * tau
    assert off(network, recovered) < 0.05


@pytest.mark.parametrize("name", NAMES)
def test_git_rebasin_moves_only_what_may_be_moved(name: str) -> None:
    """Hidden units and heads of every attention, but of two streams with one softmax, and of norms that heads share."""
    network = make(name)
    published = RandomPermutation().protect(network.expert, network.protect_context()).weights
    (aligned,), moved = GitRebasin("ties", "base", "inner").align(
        network.base, [Expert("victim", published)], network.anatomy()
    )
    assert moved["victim"] > 0
    assert gap(network, dict(aligned.weights), network.expert) < 3e-4
