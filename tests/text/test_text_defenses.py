"""Defenses on text: a shift of the words' embeddings where images have pixels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mergesec.conformance.micro_text import Animals, MicroText
from mergesec.contracts import (
    Context,
    ContractError,
    DataContext,
    Expert,
    MergeContext,
    Model,
    Recipe,
    TaskView,
    load_network,
)
from mergesec.planning.catalog import load_catalog
from mergesec.text import ShiftedTexts
from mergesec.training import fit
from mergesec_methods.backdoor.defenses._perturb import Perturbations, word_width
from mergesec_methods.backdoor.defenses.dam import DefenseAwareMerging
from mergesec_methods.merging._adaptation import streams_of
from mergesec_methods.merging.simple_average import SimpleAverage

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world() -> dict[str, Any]:
    backbone, task = MicroText(), Animals()
    task.name = "micro/animals"
    splits, base = task.load(DataContext(CPU, 0)), backbone.base_weights()
    head = task.fit_head(Model(backbone, load_network(backbone, base)), splits["train"], Context(CPU, 0))
    recipe = Recipe(learning_rate=2e-3, epochs=2, batch_size=32)
    expert = fit(backbone, task, base, head, splits["train"], recipe, 3, CPU)
    view = TaskView(task, head, splits["tuning"], splits["tuning"].inputs)
    ctx = MergeContext(CPU, 5, backbone, {task.name: view}, lambda merged: 0.0)
    return {
        "backbone": backbone, "task": task, "base": base, "head": head, "ctx": ctx, "splits": splits,
        "experts": [Expert(task.name, expert)],
    }  # fmt: skip


def test_shifted_texts_are_words_with_other_embeddings(world: dict[str, Any]) -> None:
    """The same as a network whose table of words is moved, and nothing stays behind."""
    backbone, task, texts = world["backbone"], world["task"], world["splits"]["test"].inputs[:6]
    weights = world["experts"][0].weights
    name = backbone.embedding()
    shift = torch.linspace(-1, 1, weights[name].shape[1], requires_grad=True)
    size = weights[name].square().mean().sqrt()
    moved = {**weights, name: weights[name] + shift.detach() * size}
    model = Model(backbone, load_network(backbone, weights))
    before = task.outputs(model, world["head"], texts)
    found = task.outputs(model, world["head"], ShiftedTexts(texts, shift))
    wanted = task.outputs(Model(backbone, load_network(backbone, moved)), world["head"], texts)
    torch.testing.assert_close(found, wanted)
    assert not torch.equal(found, before)
    assert torch.equal(task.outputs(model, world["head"], texts), before)
    (slope,) = torch.autograd.grad(found.sum(), shift)
    assert slope.abs().max() > 0


def test_perturbations_of_texts_climb_within_their_bound(world: dict[str, Any]) -> None:
    model = Model(world["backbone"], load_network(world["backbone"], world["experts"][0].weights))
    streams = streams_of(world["experts"], 32, world["ctx"])
    width = word_width(world["backbone"], world["base"])
    assert width == world["base"]["embed.weight"].shape[1]
    deltas = Perturbations(streams, 0.2, 1.5, "x", words=width)
    for _ in range(30):
        deltas.ascend(model)
    assert 0 < deltas.largest()["micro/animals"] <= 1.5
    assert sum(deltas.flipped[-5:]) > sum(deltas.flipped[:5])
    assert all(p.grad is None for p in model.network.parameters())
    with pytest.raises(ContractError, match="no images"):
        Perturbations(streams, 0.2, 1.5, "x")


def test_dam_runs_on_texts_and_its_safety_term_counts(world: dict[str, Any]) -> None:
    card = load_catalog().get("defense", "dam").card
    assert "text" in card.modalities

    def merged(weight: float) -> Any:
        given = {
            "steps": 6,
            "adamerging_steps": 3,
            "mask_lr": 0.1,
            "adv_lr": 0.1,
            "eps": 1.0,
            "adv_weight": weight,
        }
        defense = DefenseAwareMerging(**card.bind("dam", given))
        return defense.merge(world["base"], world["experts"], SimpleAverage(), world["ctx"])

    with_term, without = merged(5.0), merged(0.0)
    assert 0 < with_term.info["perturbation"]["micro/animals"] <= 1.0
    assert any(not torch.equal(with_term.shared[n], without.shared[n]) for n in with_term.shared)
    again = merged(5.0)
    assert all(torch.equal(with_term.shared[n], again.shared[n]) for n in again.shared)


@pytest.mark.parametrize("name", ["outlier_test", "spectral_signature", "wag", "msd", "clp", "ft", "dam"])
def test_the_defenses_of_the_grid_take_texts(name: str) -> None:
    assert load_catalog().get("defense", name).card.takes("text")
