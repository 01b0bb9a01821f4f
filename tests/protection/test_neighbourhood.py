"""Protections that change the function's neighbourhood: the merge trap and orbit repulsion."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import outcomes
import pytest
import torch
from training_worlds import World, plain

from mergesec_methods._training import effective
from mergesec_methods.protection.defenses.merge_trap import Merge, MergeTrap, Treatment, treated
from mergesec_methods.protection.defenses.orbit_repulsion import (
    OrbitRepulsion,
    invariants,
    matched_distance,
)
from mergesec_methods.protection.defenses.orbit_repulsion import hinge as orbit_hinge
from mergesec_methods.protection.defenses.params import Params
from mergesec_methods.protection.defenses.random_permutation import RandomPermutation

# ------------------------------------------------------------------ merge trap


def solved() -> World:
    """A world whose labels are what the network away from the base answers: its loss is below that of guessing."""
    world = World()
    with torch.no_grad():
        model = world.model(world.away)
        answers = world.task.outputs(model, world.head, world.batch.inputs).argmax(1)
    world.batch = replace(world.batch, targets=answers)
    return world


def simulated(world: World, weights: dict[str, Any], defense: MergeTrap) -> tuple[Merge, dict[str, Any]]:
    """The first merge that training draws, as plain weights, by the formula."""
    generator = world.context().generator()
    merge, found = defense.draw(generator), dict(weights)
    for name in [n for n, _ in world.model(weights).network.named_parameters()]:
        delta = weights[name] - world.base[name]
        peer = delta.flatten()[torch.randperm(delta.numel(), generator=generator)].view_as(delta)
        kept = treated(delta, merge.treatment, generator)
        found[name] = world.base[name] + merge.coefficient * (merge.scale * kept + defense.peers * peer)
    return merge, found


@pytest.mark.parametrize("peers", [0.0, 0.5])
def test_merge_trap_loss_is_the_formula(peers: float) -> None:
    world = solved()
    defense = MergeTrap(strength=0.7, peers=peers)
    defense.train(world.context())
    _, merged = simulated(world, world.away, defense)
    nominal, left = (float(world.gradients(w)[0]) for w in (world.away, merged))
    enough = math.log(len(world.task.classes))
    assert left < enough - 0.1  # the trap is open
    model = world.model(world.away)
    value = world.losses[0](model, world.batch)
    assert value.item() == pytest.approx(nominal + 0.7 * max(0.0, enough - left), rel=1e-4)
    value.backward()
    assert all(p.grad is not None for p in model.network.parameters())
    assert all(torch.equal(p, world.away[n]) for n, p in model.network.named_parameters())


def test_merge_trap_gradient_is_that_of_both_terms() -> None:
    """The peers' part is a constant; through the rest of the merge the gradient comes c s times."""
    world, defense = solved(), MergeTrap(strength=50.0, low=0.5, high=0.5, peers=0.0)
    defense.draw = lambda generator: Merge(0.5, 1.0, Treatment.NONE)  # type: ignore[method-assign]
    defense.train(world.context())
    away = world.away
    half = {n: (b + away[n]) / 2 if b.is_floating_point() else b for n, b in world.base.items()}
    (_, first), (left, second) = world.gradients(away), world.gradients(half)
    assert float(left) < math.log(len(world.task.classes))  # the trap is open
    model = world.model(away)
    world.losses[0](model, world.batch).backward()
    for name, parameter in model.network.named_parameters():
        expected = first[name] - 50.0 * 0.5 * second[name]
        assert torch.allclose(parameter.grad, expected, atol=1e-4, rtol=1e-3), name


def test_merge_trap_moves_a_low_rank_update_as_a_whole() -> None:
    world, defense = World(rank=2), MergeTrap(peers=0.0)
    network = world.low_rank()
    weights = plain(world, network)
    merge = Merge(0.5, 1.0, Treatment.NONE)
    replaced = defense.merged(network, world.base, merge, torch.Generator().manual_seed(0))
    name = "blocks.1.attn.v"
    original = network.get_parameter(f"{name}.parametrizations.weight.original")
    update = effective(network, f"{name}.weight") - original
    found = replaced[f"network.{name}.parametrizations.weight.original"] + update
    assert torch.allclose(
        found, (weights[f"{name}.weight"] + world.base[f"{name}.weight"]) / 2, rtol=1e-5, atol=1e-6
    )


def test_merges_are_drawn_as_said() -> None:
    defense, generator = MergeTrap(low=0.2, high=0.6), torch.Generator().manual_seed(0)
    drawn = [defense.draw(generator) for _ in range(3000)]
    coefficients = torch.tensor([m.coefficient for m in drawn])
    assert 0.2 <= coefficients.min() < 0.21 and 0.59 < coefficients.max() <= 0.6
    undone = [abs(m.coefficient * m.scale - 1) < 1e-9 for m in drawn]
    assert all(u or m.scale == 1.0 for u, m in zip(undone, drawn, strict=True))
    assert abs(sum(undone) / 3000 - 0.5) < 0.04
    for treatment in Treatment:
        assert abs(sum(m.treatment is treatment for m in drawn) / 3000 - 1 / 3) < 0.04
    with pytest.raises(ValueError, match=r"low: 0\.9 is above high, 0\.3"):
        MergeTrap(low=0.9, high=0.3)


def test_treatments_by_hand() -> None:
    delta, generator = torch.tensor([[4.0, -1.0], [2.0, -3.0]]), torch.Generator().manual_seed(0)
    assert treated(delta, Treatment.NONE, generator) is delta
    assert treated(delta, Treatment.LARGER_HALF, generator).tolist() == [[4.0, -0.0], [2.0, -3.0]]
    many = treated(torch.ones(4000), Treatment.RANDOM_HALF, generator)
    assert set(many.tolist()) == {0.0, 2.0} and abs(float(many.mean()) - 1) < 0.07


@pytest.mark.slow
def test_merge_trap_makes_merges_worse_than_plain_training() -> None:
    """The effect itself: merged at a half with noise as long as the update, next to an expert trained as usual."""
    world, losses = World(epochs=8, max_train=128, seed=outcomes.seeds(1)[0]), {}
    for kind, weights in (
        ("plain", world.context(train=True).fit()),
        ("trap", MergeTrap(strength=1.0).train(world.context(train=True))),
    ):
        half = {n: (b + weights[n]) / 2 if b.is_floating_point() else b for n, b in world.base.items()}
        losses[kind] = float(world.gradients(half)[0])
    assert losses["trap"] > losses["plain"] + 0.3


# ------------------------------------------------------------------ orbit repulsion


def test_invariants_do_not_see_coordinates(any_architecture: Any) -> None:
    """Heads in other coordinates, heads and hidden units in another order: matched, nothing but rounding is left."""
    anatomy = any_architecture.anatomy()
    scaled = Params(scaling="symmetric").protect(any_architecture.expert, any_architecture.protect_context())
    moved = RandomPermutation().protect(scaled.weights, any_architecture.protect_context(1)).weights
    was, now = (invariants(w.__getitem__, anatomy) for w in (any_architecture.expert, moved))
    assert len(was) == sum(2 * len(b.attentions) + len(b.mlps) for b in anatomy.blocks)
    assert max(float((a - b).norm() / b.norm()) for a, b in zip(now, was, strict=True)) > 0.1
    assert max(float(matched_distance(a, b)) for a, b in zip(now, was, strict=True)) < 1e-3


def test_distances_to_the_base_are_those_of_the_matrices_products(mini: Any) -> None:
    """Against a plain loop over heads; units are compared with what they read and write."""
    anatomy = mini.anatomy()
    found = invariants(mini.expert.__getitem__, anatomy)
    for index, block in enumerate(anatomy.blocks):
        (attention,), width = block.attentions, block.attentions[0].head_dim
        q, k, v, o = (mini.expert[m.weight] for m in attention.maps)
        for head in range(attention.heads):
            rows = slice(head * width, (head + 1) * width)
            assert torch.allclose(found[3 * index][head], q[rows].T @ k[rows], atol=1e-6)
            assert torch.allclose(found[3 * index + 1][head], o[:, rows] @ v[rows], atol=1e-6)
        unit = torch.cat([mini.expert[block.mlp.up.weight][7], mini.expert[block.mlp.down.weight][:, 7]])
        assert torch.equal(found[3 * index + 2][7], unit)


def test_orbit_hinge_by_hand() -> None:
    anchors = [torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[1.0, 0.0], [0.0, 0.0]]]), torch.tensor([[6.0, 8.0]])]
    found = [
        anchors[0] + torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 9.0], [0.0, 0.0]]]),
        anchors[1] + 3.0,
    ]
    # margins 2.5, 0.5 and 5; distances 1, 9 and √18
    assert orbit_hinge(found, anchors, 0.5).item() == pytest.approx(1.5 + 0.0 + 5 - math.sqrt(18))


def test_orbit_repulsion_loss_is_task_plus_hinge() -> None:
    world = World()
    OrbitRepulsion(strength=0.7, margin=2.0).train(world.context())
    model, anatomy = world.model(world.away), world.backbone.anatomy()
    pairs = [invariants(w.__getitem__, anatomy) for w in (world.away, world.base)]
    expected = world.task_loss(model) + 0.7 * orbit_hinge(*pairs, 2.0)
    value = world.losses[0](model, world.batch)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert expected.item() > world.task_loss(model).item() + 0.1
    value.backward()
    assert model.network.get_parameter("blocks.0.attn.q.weight").grad.abs().max() > 0


def test_orbit_repulsion_takes_heads_away_and_reports_how_far() -> None:
    """In each of three trainings: the nearest head or MLP, matched, more than twice as far as without the hinge. Over
    six seeds the ratio was 2.6 to 2.8 and what is left of the hinge a sixth."""
    for seed in outcomes.seeds(3):
        world = World(epochs=6, seed=seed)
        anatomy = world.backbone.anatomy()
        base, far, left = invariants(world.base.__getitem__, anatomy), {}, {}
        for strength in (0.0, 10.0):
            defense = OrbitRepulsion(strength=strength, margin=0.5)
            weights = defense.train(world.context(train=True))
            protected = defense.protect(weights, world.protect_context())
            assert all(torch.equal(protected.weights[n], t) for n, t in weights.items())
            own = invariants(weights.__getitem__, anatomy)
            matched = [float(matched_distance(a, b)) for a, b in zip(own, base, strict=True)]
            far[strength], left[strength] = protected.report, float(orbit_hinge(own, base, 0.5))
            assert protected.report["distance_least"] == min(matched)
            assert protected.report["distance_mean"] == pytest.approx(sum(matched) / len(matched))
        assert far[10.0]["distance_least"] > 2 * far[0.0]["distance_least"]
        assert left[10.0] < left[0.0] / 2
