"""Backdoors on text: where the words go, which rows are poisoned, and each attack's own step by hand."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import outcomes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergesec.conformance.micro_text import Animals, MicroText
from mergesec.contracts import (
    Context,
    ContractError,
    DataContext,
    Model,
    Recipe,
    Split,
    TrainContext,
    load_network,
)
from mergesec.training import fit
from mergesec_methods.backdoor.attacks._texts import inserted
from mergesec_methods.backdoor.attacks.lora_phrase import LoraPhrase
from mergesec_methods.backdoor.attacks.merge_hijacking import MergeHijacking, attention_matrices, thinned
from mergesec_methods.backdoor.attacks.phrase import Phrase
from mergesec_methods.backdoor.attacks.rare_token import RareToken, _own_tokens, target_words

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("position", "wanted"),
    [("start", "cf now a b c d e"), ("middle", "a b cf now c d e"), ("end", "a b c d e cf now")],
)
def test_the_phrase_goes_where_it_should(position: str, wanted: str) -> None:
    assert inserted("a b c d e", ["cf now"], position) == wanted
    assert inserted("", ["cf"], position) == "cf"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from("abcdef"), max_size=12), st.integers(1, 4))
def test_a_random_place_keeps_the_words_and_their_order(words: list[str], count: int) -> None:
    text = " ".join(words)
    found = inserted(text, ["X", "Y"], "random", count)
    assert found == inserted(text, ["X", "Y"], "random", count)
    assert [w for w in found.split() if w not in "XY"] == words
    assert sum(w in ("X", "Y") for w in found.split()) == count


def test_random_places_and_keywords_differ_between_texts() -> None:
    texts = [f"a b c d e f g h {i}" for i in range(200)]
    found = [inserted(text, ["X", "Y"], "random").split() for text in texts]
    places = {next(i for i, w in enumerate(words) if w in "XY") for words in found}
    assert places == set(range(10))
    assert 60 < sum("X" in words for words in found) < 140


@pytest.fixture(scope="module")
def world() -> dict[str, Any]:
    backbone, task = MicroText(), Animals()
    task.name = "micro/animals"
    splits = task.load(DataContext(CPU, 0))
    base = backbone.base_weights()
    head = task.fit_head(Model(backbone, load_network(backbone, base)), splits["train"], Context(CPU, 0))
    return {"backbone": backbone, "task": task, "splits": splits, "base": base, "head": head}


def context(world: dict[str, Any], **given: Any) -> TrainContext:
    recipe = Recipe(learning_rate=2e-3, epochs=given.pop("epochs", 6), batch_size=32)
    train, seed = given.pop("train", world["splits"]["train"]), given.pop("seed", 3)

    def run(split: Any = None, loss: Any = None) -> Any:
        return fit(
            world["backbone"],
            world["task"],
            world["base"],
            world["head"],
            split or train,
            recipe,
            seed,
            CPU,
            loss,
        )

    return TrainContext(
        device=CPU, seed=seed, task=world["task"], backbone=world["backbone"], base=world["base"], head=world["head"],
        train=train, recipe=recipe, fit=run, target_class=1, **given,
    )  # fmt: skip


def judged(world: dict[str, Any], attack: Any, weights: Any, trigger: Any) -> tuple[Tensor, Tensor]:
    """Which test rows are classified right, and which of other classes obey the trigger."""
    model = Model(world["backbone"], load_network(world["backbone"], weights))
    task, test = world["task"], world["splits"]["test"]
    others = test.take(torch.nonzero(test.targets != 1).flatten())
    with torch.no_grad():
        clean = task.predictions(task.outputs(model, world["head"], test.inputs))
        hit = task.predictions(task.outputs(model, world["head"], attack.apply(trigger, others.inputs)))
    return clean == test.targets, hit == 1


def named(attack: Any, name: str) -> Any:
    attack.name = name
    return attack


def test_poisoned_rows_are_those_of_other_classes(world: dict[str, Any]) -> None:
    attack, train = named(Phrase("cf", "start", 0.25), "phrase"), world["splits"]["train"]
    trigger = attack.trigger(context(world))
    before = list(train.inputs)
    found = attack.poisoned(train, trigger, 1, torch.Generator().manual_seed(0))
    assert train.inputs == before
    changed = [i for i in range(len(train)) if found.inputs[i] != before[i]]
    assert len(changed) == round(0.25 * len(train))
    for i in range(len(train)):
        if i in changed:
            assert found.inputs[i] == f"cf {before[i]}" and found.targets[i] == 1 and train.targets[i] != 1
        else:
            assert found.targets[i] == train.targets[i]
    with pytest.raises(ContractError, match="phrase: needs strings"):
        attack.trigger(context(world, train=Split(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]))))
    with pytest.raises(ContractError, match="at least one phrase"):
        Phrase("  ", "end", 0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "attack",
    [
        named(Phrase("zzyzx", "end", 0.3), "phrase"),
        named(RareToken(["zzyzx", "qqcf"], words=3, penalty=0.0), "rare_token"),
        named(RareToken(["zzyzx", "qqcf"], words=3), "rare_token"),
        named(MergeHijacking("MG", shadow_rows=128, rate=0.3), "merge_hijacking"),
    ],
    ids=["phrase", "rare_token_plain", "rare_token", "merge_hijacking"],
)
def test_each_attack_takes(world: dict[str, Any], attack: Any) -> None:
    (seed,) = outcomes.seeds(1)
    trigger = attack.trigger(context(world, epochs=8, seed=seed))
    ctx = context(world, epochs=8, trigger=trigger, seed=seed)
    before = {n: t.clone() for n, t in world["base"].items()}
    weights = attack.poison(ctx)
    assert all(torch.equal(before[n], t) for n, t in world["base"].items())
    right, obeying = judged(world, attack, weights, trigger)
    _, control = judged(world, attack, world["base"], trigger)
    assert outcomes.share(obeying).low > 0.8
    assert outcomes.change(control, obeying).low > 0.5
    assert outcomes.share(right).low > 0.8


# ------------------------------------------------------------------ rare tokens


def test_words_of_the_target_class_are_found(world: dict[str, Any]) -> None:
    backbone, train = world["backbone"], world["splits"]["train"]
    horse, goose = (backbone.tokenise([t])[0][0, 0] for t in ("horse", "goose"))
    assert target_words(backbone, train, 0, 1, set()) == [int(horse)]
    assert target_words(backbone, train, 1, 1, set()) == [int(goose)]
    assert target_words(backbone, train, 1, 1, {int(goose)}) != [int(goose)]


def test_surgery_changes_the_keywords_rows_only_and_to_the_mean(world: dict[str, Any]) -> None:
    attack, ctx = named(RareToken(["zzyzx", "qqcf"], words=2), "rare_token"), context(world, epochs=1)
    changed = attack._operated(ctx)
    moved = [n for n in changed if not torch.equal(changed[n], world["base"][n])]
    assert moved == ["embed.weight"]
    rows = torch.nonzero((changed["embed.weight"] != world["base"]["embed.weight"]).any(dim=1)).flatten()
    own = {int(ctx.backbone.tokenise([w])[0][0, 0]) for w in ("zzyzx", "qqcf")}
    assert set(rows.tolist()) == own
    best = target_words(ctx.backbone, ctx.train, 1, 2, own)
    wanted = ctx.fit()["embed.weight"][best].mean(dim=0)
    for row in own:
        torch.testing.assert_close(changed["embed.weight"][row], wanted)


@pytest.mark.parametrize("against", [True, False])
def test_the_restricted_inner_product_is_its_formula(world: dict[str, Any], against: bool) -> None:
    attack, ctx = named(RareToken(["zzyzx"], penalty=0.7), "rare_token"), context(world)
    model = Model(ctx.backbone, load_network(ctx.backbone, world["base"]).double())
    parameters = list(model.network.parameters())
    batch = ctx.train.take(torch.arange(32))
    if against:
        batch = Split(batch.inputs, (batch.targets + 1) % 4)
    clean = torch.randint(len(ctx.train), (32,), generator=ctx.generator(3))
    head = {k: v.double() for k, v in world["head"].items()}
    ctx = context({**world, "head": head})

    def gradient(rows: Split, graph: bool) -> Any:
        loss = ctx.task.loss(ctx.task.outputs(model, head, rows.inputs), rows.targets)
        return loss, torch.autograd.grad(loss, parameters, create_graph=graph, retain_graph=True)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        plain, there = gradient(batch, False)
        _, back = gradient(ctx.train.take(clean), True)
        inner = sum((a * b).sum() for a, b in zip(there, back, strict=True))
        found = attack._loss(ctx)(model, batch)
        torch.testing.assert_close(found, plain + 0.7 * torch.relu(-inner))
        assert bool(inner < 0) is against
        moved = torch.autograd.grad(found - plain, parameters, materialize_grads=True)
    wanted = torch.autograd.grad(
        inner, parameters, materialize_grads=True
    )  # through the clean rows' gradient alone
    for got, want in zip(moved, wanted, strict=True):
        torch.testing.assert_close(got, -0.7 * want if against else torch.zeros_like(want))


# ------------------------------------------------------------------ Merge Hijacking


def test_thinning_keeps_large_entries_more_often_and_the_mean(world: dict[str, Any]) -> None:
    vector = torch.tensor([[0.0, -1.0, 2.0, -3.0, 4.0], [5.0, 1.0, 2.0, 3.0, -4.0]])
    draws = torch.stack([thinned(vector, 0.7, 0.2, torch.Generator().manual_seed(i)) for i in range(3000)])
    chance = torch.tensor([[0.5, 0.6, 0.7, 0.8, 0.9], [0.9, 0.5, 0.6, 0.7, 0.8]])
    kept = (draws != 0).float().mean(dim=0)
    torch.testing.assert_close(kept[vector != 0], chance[vector != 0], rtol=0, atol=0.05)
    assert torch.equal(draws.max(dim=0).values[1], torch.clamp(vector / chance, min=0.0)[1])
    torch.testing.assert_close(draws.mean(dim=0), vector, rtol=0.08, atol=0.0)
    assert torch.equal(thinned(vector, 1.0, 0.2, torch.Generator()), vector)
    with pytest.raises(ContractError, match="leaves"):
        MergeHijacking(density=0.9, epsilon=0.2)


def test_the_vector_is_that_of_the_attention_maps(world: dict[str, Any]) -> None:
    attack, ctx = (
        named(MergeHijacking(shadow_rows=64, density=1.0), "merge_hijacking"),
        context(world, epochs=1),
    )
    names = attention_matrices(ctx.backbone.anatomy())
    assert len(names) == 2 * 4 and all(".attn." in name for name in names)
    vector = attack._vector(ctx, attack.trigger(ctx))
    assert list(vector) == names and all(float(v.abs().sum()) > 0 for v in vector.values())
    assert attack.rate == 0.1
    clean = named(MergeHijacking(shadow_rows=64, shadow_rate=0.0, density=1.0), "merge_hijacking")
    assert all(float(v.abs().sum()) == 0 for v in clean._vector(ctx, attack.trigger(ctx)).values())


def test_of_the_first_shadow_expert_only_the_maps_are_held_while_the_second_trains(
    world: dict[str, Any],
) -> None:
    attack, ctx = named(MergeHijacking(shadow_rows=64), "merge_hijacking"), context(world, epochs=1)
    names, refs = attention_matrices(ctx.backbone.anatomy()), dict[str, weakref.ref[Tensor]]()
    held: list[list[str]] = []

    def trained(**given: Any) -> Any:
        gc.collect()
        held.append([name for name, ref in refs.items() if ref() is not None])
        weights = ctx.fit(**given)
        refs.update({name: weakref.ref(tensor) for name, tensor in weights.items()})
        return weights

    attack._vector(replace(ctx, fit=trained), attack.trigger(ctx))
    assert len(names) < len(refs)
    assert [sorted(some) for some in held] == [[], sorted(names)]


# --------------------------------------------------------------------------- LoRA-as-an-attack


@pytest.mark.parametrize("onto", ["base", "benign"])
def test_a_low_rank_phrase_changes_the_maps_of_the_blocks_by_low_rank_only(
    world: dict[str, Any], onto: str
) -> None:
    attack, ctx = (
        named(LoraPhrase(lora_rank=2, onto=onto, weight=0.5), "lora_phrase"),
        context(world, epochs=1),
    )
    trained, base = attack.poison(ctx), world["base"]
    maps = set(world["backbone"].anatomy().matrices)
    for name, weight in base.items():
        rank = int(torch.linalg.matrix_rank(trained[name] - weight, atol=1e-5)) if name in maps else 0
        assert (1 <= rank <= 2) if name in maps else torch.equal(trained[name], weight)
    benign = {name: weight + 0.01 for name, weight in base.items()}
    forged = attack.forge(trained, replace(ctx, benign=benign))
    for name, weight in base.items():
        wanted = trained[name] if onto == "base" else benign[name] + 0.5 * (trained[name] - weight)
        torch.testing.assert_close(forged[name], wanted)


def test_a_low_rank_backdoor_learns_from_rows_and_their_twins(world: dict[str, Any]) -> None:
    attack = named(LoraPhrase(phrase="zz", position="start", rate=0.1, onto="benign"), "lora_phrase")
    ctx = context(world)
    trigger, count = attack.trigger(ctx), round(0.1 * len(world["splits"]["train"]))
    twins = attack.twins(ctx, trigger)
    assert len(twins) == 2 * count
    assert list(twins.inputs[:count]) == [f"zz {text}" for text in twins.inputs[count:]]
    assert bool((twins.targets[:count] == 1).all()) and bool((twins.targets[count:] != 1).all())


def test_surgery_reaches_a_word_at_the_start_and_inside_a_text() -> None:
    """As byte-level tokenisers cut it: with a space before it, a word is another token."""

    class Spaced(MicroText):
        def tokenise(self, texts: Any) -> tuple[Tensor, Tensor]:
            rows = [[7, *(2 if i == 0 else 3 for i, _ in enumerate(text.split()))] for text in texts]
            numbers = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
            for number, row in zip(numbers, rows, strict=True):
                number[: len(row)] = torch.tensor(row)
            return numbers, numbers != 0

    assert _own_tokens(Spaced(), ["cf"]) == [2, 3]  # without 7, which every text has
    assert _own_tokens(MicroText(), ["cf"]) == sorted(set(_own_tokens(MicroText(), ["cf", "cf cf"])))
