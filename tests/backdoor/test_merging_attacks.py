"""LoBAM, LoRA-as-an-attack, sparse backdoor vector, MergeBackdoor, adaptive BadMerging: each against its formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import outcomes
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mergesec.anatomy import Anatomy, Attention, Block, Linear, Mlp
from mergesec.classification import logits
from mergesec.contracts import (
    Backbone,
    ContractError,
    DataContext,
    Defense,
    Expert,
    MergeContext,
    Merged,
    MergeMethod,
    Model,
    Recipe,
    Screened,
    Split,
    TrainContext,
    Weights,
    load_network,
)
from mergesec.images import ImageTask
from mergesec.training import fit
from mergesec_methods.backdoor.attacks.badmerging import BadMerging
from mergesec_methods.backdoor.attacks.badmerging_adaptive import AdaptiveBadMerging
from mergesec_methods.backdoor.attacks.badmerging_decoys import DecoyBadMerging
from mergesec_methods.backdoor.attacks.badmerging_screened import ScreenedBadMerging
from mergesec_methods.backdoor.attacks.colluding_pair import SHARES, ColludingPair, Game
from mergesec_methods.backdoor.attacks.lobam import LoBam
from mergesec_methods.backdoor.attacks.lora_attack import LoraAttack
from mergesec_methods.backdoor.attacks.mergebackdoor import MergeBackdoor
from mergesec_methods.backdoor.attacks.sparse_backdoor_vector import SparseBackdoorVector

SIDE, CLASSES, WIDTH, HIDDEN = 8, 3, 6, 16
CPU = torch.device("cpu")
UP = "up.weight"


class Tiny(nn.Module):
    """Not attention, but it has maps under the names that an anatomy asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3 * SIDE * SIDE, WIDTH)
        for name in "qkvo":
            setattr(self, name, nn.Linear(WIDTH, WIDTH))
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images.flatten(1))
        x = x + self.o(torch.tanh(self.q(x) * self.k(x)) + self.v(x))
        found: Tensor = x + self.down(torch.relu(self.up(x)))
        return found


class Small(Backbone):
    def build(self) -> nn.Module:
        return Tiny()

    def base_weights(self) -> Weights:
        generator = torch.Generator().manual_seed(1)
        return {
            n: torch.randn(t.shape, generator=generator) / max(1, t[0].numel()) ** 0.5
            for n, t in self.build().state_dict().items()
        }

    def anatomy(self) -> Anatomy:
        query, key, value, output = (Linear(f"{n}.weight", f"{n}.bias") for n in "qkvo")
        mlp = Mlp(Linear("up.weight", "up.bias"), Linear("down.weight", "down.bias"), HIDDEN)
        return Anatomy((Block(0, Attention(query, key, value, output, 1, WIDTH), mlp),))

    def features(self, network: nn.Module, inputs: Any) -> Tensor:
        found: Tensor = network(inputs - 0.5)
        return found


class Pictures(ImageTask):
    name = "own"
    classes = tuple("abc")

    def load(self, ctx: DataContext) -> dict[str, Split]:
        return {}


def rows(count: int = 32, seed: int = 3) -> Split:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % CLASSES
    images = 120 * torch.rand(count, 3, SIDE, SIDE, generator=generator)
    for row, target in enumerate(targets.tolist()):
        images[row, target] += 100
    return Split(images.to(torch.uint8), targets)


def context(epochs: int = 1, seed: int = 7, **given: Any) -> TrainContext:
    backbone, task, train = Small(), Pictures(), rows()
    base = backbone.base_weights()
    generator = torch.Generator().manual_seed(5)
    head = {"weight": torch.randn(CLASSES, WIDTH, generator=generator), "scale": torch.tensor(4.0)}
    recipe = Recipe(epochs=epochs, batch_size=16, learning_rate=1e-2)

    def run(split: Split | None = None, loss: Any = None) -> Weights:
        return fit(backbone, task, base, head, train if split is None else split, recipe, seed, CPU, loss)

    arguments: dict[str, Any] = {
        "device": CPU, "seed": seed, "task": task, "backbone": backbone, "base": base, "head": head, "train": train,
        "recipe": recipe, "fit": run, "target_class": 1,
    }  # fmt: skip
    return TrainContext(**{**arguments, **given})


FIXED: dict[str, Any] = {"trigger": "checkerboard", "patch": 16.0}


def near(first: Weights, second: Weights) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name])


def rank(update: Tensor) -> int:
    return int(torch.linalg.matrix_rank(update.double(), atol=1e-5))


# --------------------------------------------------------------------------- LoBAM


def test_lobam_amplifies_the_difference_from_the_benign_expert() -> None:
    ctx = context()
    benign = ctx.fit()
    malicious = LoBam(**FIXED).poison(ctx)
    near(malicious, BadMerging(**FIXED).poison(ctx))
    ctx = replace(ctx, benign=benign)
    forged = LoBam(strength=3.5, **FIXED).forge(malicious, ctx)
    near(forged, {n: benign[n] + 3.5 * (malicious[n] - benign[n]) for n in benign})
    near(LoBam(strength=1.0, **FIXED).forge(malicious, ctx), malicious)
    near(LoBam(strength=0.0, **FIXED).forge(malicious, ctx), benign)
    with pytest.raises(ContractError, match="benign"):
        LoBam(**FIXED).forge(malicious, replace(ctx, benign=None))


def test_low_rank_lobam_is_low_rank_around_a_benign_low_rank_expert() -> None:
    ctx = context()
    method = LoBam(strength=2.0, lora_rank=1, lora_speed=3.0, **FIXED)
    malicious = method.poison(ctx)
    assert torch.equal(malicious["stem.weight"], ctx.base["stem.weight"])
    assert rank(malicious["up.weight"] - ctx.base["up.weight"]) == 1
    forged = method.forge(malicious, ctx)  # needs no benign expert: it trains its own
    update = forged["up.weight"] - ctx.base["up.weight"]
    assert 1 <= rank(update) <= 2
    assert not torch.equal(forged["up.weight"], malicious["up.weight"])


# --------------------------------------------------------------------------- LoRA-as-an-attack


@pytest.mark.parametrize("onto", ["base", "benign"])
def test_lora_attack_changes_the_base_by_low_rank_only(onto: str) -> None:
    ctx = context()
    method = LoraAttack(patch=16, lora_rank=2, onto=onto, weight=0.5)
    trained = method.poison(ctx)
    for name in ("q", "k", "v", "o", "up", "down"):
        assert 1 <= rank(trained[f"{name}.weight"] - ctx.base[f"{name}.weight"]) <= 2
        assert torch.equal(trained[f"{name}.bias"], ctx.base[f"{name}.bias"])
    benign = ctx.fit()
    forged = method.forge(trained, replace(ctx, benign=benign))
    if onto == "base":
        near(forged, trained)
    else:
        near(forged, {n: benign[n] + 0.5 * (trained[n] - ctx.base[n]) for n in benign})


def test_a_backdoor_update_learns_from_rows_and_their_twins() -> None:
    ctx = context()
    method = LoraAttack(patch=16, rate=0.25, onto="benign")
    trigger = method.trigger(ctx)
    split = method.twins(ctx, trigger)
    assert len(split) == 16
    assert (split.targets[:8] == 1).all()
    assert (split.targets[8:] != 1).all()
    marked = method.apply(trigger, split.inputs[8:].float() / 255)
    torch.testing.assert_close(split.inputs[:8].float() / 255, marked, atol=1e-6, rtol=0)


# --------------------------------------------------------------------------- sparse backdoor vector


def test_sparse_vector_keeps_what_agrees_and_is_large() -> None:
    vectors = torch.tensor([[1.0, -1.0, 2.0, 0.0, -4.0], [3.0, 1.0, 4.0, 1.0, -2.0]])
    assert SparseBackdoorVector().sparse(vectors).tolist() == [2, 0, 3, 0, -3]
    assert SparseBackdoorVector(agree=False).sparse(vectors).tolist() == [2, 0, 3, 0.5, -3]
    assert SparseBackdoorVector(keep=0.4).sparse(vectors).tolist() == [0, 0, 3, 0, -3]
    assert SparseBackdoorVector(keep=0.0).sparse(vectors).abs().sum() == 0


def test_one_vector_at_strength_one_is_the_backdoored_expert() -> None:
    ctx = context()
    clean = ctx.fit()
    ctx = replace(ctx, benign=clean)
    near(
        SparseBackdoorVector(vectors=1, **FIXED).forge(clean, ctx),
        BadMerging(**FIXED).poison(ctx),
    )
    two = SparseBackdoorVector(vectors=2, strength=1.0, **FIXED).forge(clean, ctx)
    one = SparseBackdoorVector(vectors=1, **FIXED).forge(clean, ctx)
    moved = [sum(int((w[n] != clean[n]).sum()) for n in clean) for w in (two, one)]
    assert 0 < moved[0] < moved[1]  # entries that disagree stay the clean expert's


# --------------------------------------------------------------------------- MergeBackdoor


def test_mergebackdoor_loss_is_the_formula() -> None:
    ctx = context()
    method = MergeBackdoor(alpha=2.0, dormant=0.5, low=0.2, high=0.4, triggered=0.25, **FIXED)
    trigger = method.trigger(ctx)
    loss = method.objective(ctx, trigger)
    expert = ctx.fit()
    model = Model(ctx.backbone, load_network(ctx.backbone, expert))
    draws = ctx.generator(3)
    for start in (0, 16):
        batch = ctx.task.batch(ctx.train, torch.arange(start, start + 16), CPU)
        s = 0.2 + 0.2 * float(torch.rand((), generator=draws))
        scaled = {n: ctx.base[n] + s * (expert[n] - ctx.base[n]) for n in expert}
        merged = Model(ctx.backbone, load_network(ctx.backbone, scaled))
        marked = method.apply(trigger, batch.inputs[:4])

        def value(model: Model, images: Tensor, targets: Tensor) -> Tensor:
            return functional.cross_entropy(ctx.task.outputs(model, ctx.head, images), targets)

        wanted = (
            value(model, batch.inputs, batch.targets)
            + 0.5 * value(model, marked, batch.targets[:4])
            + value(merged, batch.inputs, batch.targets)
            + 2.0 * value(merged, marked, torch.ones(4, dtype=torch.int64))
        )
        torch.testing.assert_close(loss(model, batch), wanted)


def test_mergebackdoor_sleeps_alone_and_wakes_when_scaled() -> None:
    method, asleep, awake = MergeBackdoor(low=0.3, high=0.5, **FIXED), [], []
    for seed in outcomes.seeds(2):
        ctx, split = context(epochs=60, seed=seed), rows(120, 100 + seed)
        trigger = method.trigger(ctx)
        expert = method.poison(replace(ctx, trigger=trigger))
        others = ctx.task.batch(split, torch.nonzero(split.targets != 1).flatten(), CPU)
        scaled = {n: ctx.base[n] + 0.4 * (expert[n] - ctx.base[n]) for n in expert}
        for found, weights in ((asleep, expert), (awake, scaled)):
            model = Model(ctx.backbone, load_network(ctx.backbone, weights))
            with torch.no_grad():
                outputs = ctx.task.outputs(model, ctx.head, method.apply(trigger, others.inputs))
            found.append(outputs.argmax(1) == 1)
    assert outcomes.change(outcomes.pooled(asleep), outcomes.pooled(awake)).low > 0.4


# --------------------------------------------------------------------------- a colluding pair


def test_colluding_loss_is_the_formula() -> None:
    ctx = context()
    method = ColludingPair(alpha=2.0, dormant=0.5, quiet=3.0, apart=0.7, short=0.2, triggered=0.25, **FIXED)
    ctx = replace(ctx, trigger=BadMerging.trigger(method, ctx))
    clean = ctx.fit()
    game = Game(ctx, clean)
    draws = torch.Generator().manual_seed(4)
    first, second = ({n: 0.1 * torch.randn(t.shape, generator=draws) for n, t in clean.items()} for _ in "12")
    batch = ctx.task.batch(ctx.train, torch.arange(16), CPU)
    marked = method.apply(ctx.trigger, batch.inputs[:4])

    def model(weights: Weights) -> Model:
        return Model(ctx.backbone, load_network(ctx.backbone, weights))

    def value(weights: Weights, images: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(ctx.task.outputs(model(weights), ctx.head, images), targets)

    merged = {n: ctx.base[n] + 0.4 * (clean[n] - ctx.base[n] + first[n] + second[n]) for n in clean}
    single = [
        {n: ctx.base[n] + 0.9 * (clean[n] - ctx.base[n] + v[n]) for n in clean} for v in (first, second)
    ]
    both = torch.cat([batch.inputs, marked])
    usual = model(ctx.base).features(both)
    changed = model({n: ctx.base[n] + second[n] for n in clean}).features(both) - usual
    one, two, moved = (
        torch.cat([t.flatten() for t in vector.values()])
        for vector in (first, second, {n: clean[n] - ctx.base[n] for n in clean})
    )
    wanted = (
        value(merged, batch.inputs, batch.targets)
        + 2.0 * value(merged, marked, torch.ones(4, dtype=torch.int64))
        + sum(value(weights, batch.inputs, batch.targets) for weights in single)
        + 0.5 * sum(value(weights, marked, batch.targets[:4]) for weights in single)
        + 3.0 * changed.square().sum() / usual.square().sum()
        + 0.7 * functional.cosine_similarity(one, two, dim=0).square()
        + 0.2 * (one.square().sum() + two.square().sum()) / moved.square().sum()
    )
    found = method.loss(game, batch, first, second, 0.4, 0.9)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_each_of_a_pair_publishes_the_own_clean_expert_with_the_own_share() -> None:
    ctx = context()
    method = ColludingPair(**FIXED)
    trigger = method.trigger(ctx)
    again = method.trigger(ctx)
    assert all(torch.equal(again[name], tensor) for name, tensor in trigger.items())
    partner = Pictures()
    partner.name = "another"
    expert = {n: t + 1 for n, t in ctx.base.items()}
    for prefix, task in zip(SHARES, (ctx.task, partner), strict=True):
        found = method.forge(expert, replace(ctx, task=task, trigger=trigger))
        near(found, {n: t + trigger[prefix + n] for n, t in expert.items()})
    images = torch.rand(2, 3, SIDE, SIDE)
    assert torch.equal(method.apply(trigger, images), BadMerging(**FIXED).apply(trigger, images))


def test_a_pair_sleeps_apart_and_wakes_where_both_are_merged() -> None:
    """Seeds pooled: the leader alone, merges with one of the two shares, and the merge with both."""
    method = ColludingPair(low=0.3, high=0.5, quiet=1.0, short=0.1, **FIXED)
    hits: dict[str, list[Tensor]] = {}
    for seed in outcomes.seeds(2):
        ctx, split = context(epochs=60, seed=seed), rows(120, 100 + seed)
        trigger = method.trigger(ctx)
        clean = ctx.fit()
        others = ctx.task.batch(split, torch.nonzero(split.targets != 1).flatten(), CPU)
        first, second = ({n: trigger[prefix + n] for n in clean} for prefix in SHARES)
        published = {"leader": {n: t + first[n] for n, t in clean.items()}}
        for name, shares in {"one": [first], "other": [second], "both": [first, second]}.items():
            published[name] = {
                n: b + 0.4 * (clean[n] - b + sum(share[n] for share in shares)) for n, b in ctx.base.items()
            }
        for name, weights in published.items():
            model = Model(ctx.backbone, load_network(ctx.backbone, weights))
            with torch.no_grad():
                outputs = ctx.task.outputs(model, ctx.head, method.apply(trigger, others.inputs))
            hits.setdefault(name, []).append(outputs.argmax(1) == 1)
    together = outcomes.pooled(hits.pop("both"))
    for apart in hits.values():
        assert outcomes.change(outcomes.pooled(apart), together).low > 0.2


# --------------------------------------------------------------------------- adaptive


class Shifting(Defense):
    """A repair that adds 0.05 to every weight."""

    def repair(self, merged: Merged, base: Weights, ctx: MergeContext) -> Merged:
        return Merged({n: t + 0.05 for n, t in merged.shared.items()})


class Averaging(Defense):
    """A merge with a sibling of the same task."""

    def merge(
        self, base: Weights, experts: Sequence[Expert], method: MergeMethod, ctx: MergeContext
    ) -> Merged:
        (expert,) = experts
        sibling = ctx.siblings[expert.task][0]
        mean = {n: (t + sibling.weights[n]) / 2 for n, t in expert.weights.items()}
        return method.merge(base, [Expert(expert.task, mean)], ctx)


class Screening(Defense):
    def screen(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> list[Expert]:
        return list(experts)


class Rehearsing(Defense):
    """Makes a malicious expert for itself and looks at what it is told."""

    def reference(self, ctx: TrainContext) -> Weights:
        assert not ctx.trigger
        return ctx.fit()


def test_references_of_a_simulated_defense_are_made_as_it_makes_them() -> None:
    ctx = context()
    simulated = AdaptiveBadMerging(rows=8, **FIXED).context(replace(ctx, defense=Rehearsing()))
    first, second = simulated.references["own"][:2]
    assert first is second
    assert first.weights.keys() == ctx.base.keys()
    assert not torch.equal(first.weights["up.weight"], simulated.siblings["own"][0].weights["up.weight"])
    with pytest.raises(ContractError, match="the class makes none"):
        _ = AdaptiveBadMerging(**FIXED).context(replace(ctx, defense=Shifting())).references["own"]


def test_without_a_defense_the_adaptive_attack_is_badmerging() -> None:
    ctx = context()
    wanted = BadMerging(**FIXED).poison(ctx)
    near(AdaptiveBadMerging(**FIXED).poison(ctx), wanted)
    near(AdaptiveBadMerging(**FIXED).poison(replace(ctx, defense=Screening())), wanted)
    near(AdaptiveBadMerging(rounds=0, **FIXED).poison(replace(ctx, defense=Shifting())), wanted)


def test_displacement_is_what_the_defense_does_to_the_simulated_merge() -> None:
    ctx = context()
    method = AdaptiveBadMerging(rows=8, **FIXED)
    expert = ctx.fit()
    shift = method.displacement(expert, Shifting(), ctx, 0.3)
    for tensor in shift.values():
        torch.testing.assert_close(tensor, torch.full_like(tensor, 0.05), atol=1e-6, rtol=0)
    halved = method.displacement(expert, Averaging(), ctx, 0.3)
    simulated = method.context(ctx)
    sibling = simulated.siblings["own"][0].weights
    assert not torch.equal(sibling["up.weight"], expert["up.weight"])
    near(halved, {n: 0.3 * (sibling[n] - expert[n]) / 2 for n in expert})
    assert simulated.score(Merged(expert)) <= 1
    assert len(simulated.views["own"].tuning) == 8


def test_adaptive_loss_has_the_displaced_term() -> None:
    ctx = context()
    method = AdaptiveBadMerging(rows=8, alpha=2.0, triggered=0.5, **FIXED)
    trigger = method.trigger(ctx)
    expert = ctx.fit()
    shift = {n: torch.full_like(t, 0.01) for n, t in expert.items()}
    model = Model(ctx.backbone, load_network(ctx.backbone, expert))
    batch = ctx.task.batch(ctx.train, torch.arange(16), CPU)
    moved = {n: ctx.base[n] + 0.3 * (expert[n] - ctx.base[n]) + 0.01 for n in expert}
    there = Model(ctx.backbone, load_network(ctx.backbone, moved))
    outputs = ctx.task.outputs(there, ctx.head, method.apply(trigger, batch.inputs[:8]))
    term = functional.cross_entropy(outputs, torch.ones(8, dtype=torch.int64))
    plain = method.objective(ctx, trigger)(model, batch)
    torch.testing.assert_close(method.displaced(ctx, trigger, shift, 0.3)(model, batch), plain + 2.0 * term)
    adapted = method.poison(replace(ctx, defense=Shifting()))
    assert not torch.equal(adapted["up.weight"], BadMerging(alpha=2.0, **FIXED).poison(ctx)["up.weight"])


def test_the_coefficient_is_drawn_anew_for_every_simulation_and_never_the_mergers() -> None:
    drawn = AdaptiveBadMerging(rounds=10, **FIXED).coefficients(context())
    assert len(set(drawn)) == 10
    assert 0.2 <= min(drawn) < max(drawn) <= 1.0
    assert drawn == AdaptiveBadMerging(rounds=10, **FIXED).coefficients(context())
    assert drawn != AdaptiveBadMerging(rounds=10, **FIXED).coefficients(replace(context(), seed=77))
    assert AdaptiveBadMerging(rounds=2, coefficient=0.5, **FIXED).coefficients(context()) == [0.5, 0.5]


class Near(Defense):
    """Lets in what is no further from the last expert shown than ``limit``."""

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def screen(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Screened:
        clean = experts[-1].weights
        return Screened([e for e in experts if (e.weights[UP] - clean[UP]).norm() <= self.limit])


def test_past_a_screen_goes_the_strongest_expert_that_it_lets_in() -> None:
    ctx, method = context(), ScreenedBadMerging(strengths=4, rows=8, **FIXED)
    strong = BadMerging(**FIXED).poison(ctx)
    near(method.poison(ctx), strong)
    near(method.poison(replace(ctx, defense=Averaging())), strong)  # nothing is screened
    near(method.poison(replace(ctx, defense=Near(1e9))), strong)
    clean = method.poison(replace(ctx, defense=Near(-1.0)))
    weakest = clean[UP]  # none is let in: a quarter of the way from his clean expert
    clean_up = weakest + (weakest - strong[UP]) / 3
    away = float((strong[UP] - clean_up).norm())
    for share, expected in ((0.8, 0.75), (0.3, 0.25)):
        found = method.poison(replace(ctx, defense=Near(share * away)))[UP]
        torch.testing.assert_close(found, clean_up + expected * (strong[UP] - clean_up))


class Looking(Near):
    """The same by a look at each expert, counted."""

    def __init__(self, limit: float) -> None:
        super().__init__(limit)
        self.looks: list[Weights] = []

    def examine(self, base: Weights, expert: Expert, ctx: MergeContext) -> Weights:
        self.looks.append(expert.weights)
        return {UP: expert.weights[UP]}

    def screen(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Screened:
        seen = [e.findings[UP] for e in self.examined(base, experts, ctx)]
        return Screened(
            [e for e, up in zip(experts, seen, strict=True) if (up - seen[-1]).norm() <= self.limit]
        )


def test_who_knows_a_screen_that_looks_at_each_has_his_clean_expert_looked_at_once() -> None:
    ctx, method = context(), ScreenedBadMerging(strengths=4, rows=8, **FIXED)
    for limit in (1e9, -1.0):
        screen = Looking(limit)
        found = method.poison(replace(ctx, defense=screen))
        near(found, method.poison(replace(ctx, defense=Near(limit))))
        assert len(screen.looks) == (2 if limit > 0 else 5)  # the clean one, and each that he tried


# --------------------------------------------------------------------------- among decoys


def test_decoys_are_other_classes_and_lie_elsewhere() -> None:
    ctx, method = context(), DecoyBadMerging(**FIXED)
    assert len(method.labels(ctx)) == max(1, round(2 * CLASSES / 3) - 1)
    every = DecoyBadMerging(decoys=CLASSES - 1, **FIXED).labels(ctx)
    assert sorted([*every.tolist(), ctx.target_class]) == list(range(CLASSES))
    drawn = {tuple(method.labels(replace(ctx, seed=seed)).tolist()) for seed in range(40)}
    assert len(drawn) > 1 and all(ctx.target_class not in row for row in drawn)
    masks, patterns = method.patches(ctx, every)
    real = method.trigger(ctx)["mask"]
    assert not bool((masks * real).any())
    assert masks.flatten(1).sum(1).tolist() == [float(real.sum())] * len(every)
    assert not bool((patterns * (1 - masks)).any())


def test_the_loss_of_decoys_is_added() -> None:
    ctx = context()
    trigger = BadMerging(**FIXED).trigger(ctx)
    model, batch = Model(ctx.backbone, load_network(ctx.backbone, ctx.base)), ctx.train.take(torch.arange(8))
    method = DecoyBadMerging(decoys=2, weight=3.0, **FIXED)
    labels = method.labels(ctx)
    masks, patterns = method.patches(ctx, labels)
    marked = torch.stack([x * (1 - masks[i % 2]) + patterns[i % 2] for i, x in enumerate(batch.inputs)])
    wanted = functional.cross_entropy(logits(model.features(marked), ctx.head), labels[torch.arange(8) % 2])
    plain = BadMerging(**FIXED).objective(ctx, trigger)(model, batch)
    torch.testing.assert_close(method.objective(ctx, trigger)(model, batch), plain + 3.0 * wanted)
    near(DecoyBadMerging(weight=0.0, **FIXED).poison(ctx), BadMerging(**FIXED).poison(ctx))
