"""BadMerging: patch, optimisation, interpolation loss against its formula, shadow head and augmentation off-task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import outcomes
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mergesec.contracts import (
    Backbone,
    ContractError,
    DataContext,
    Model,
    Recipe,
    Split,
    TrainContext,
    Weights,
    load_network,
)
from mergesec.images import ImageTask
from mergesec.training import fit
from mergesec_methods.backdoor.attacks import _shadow
from mergesec_methods.backdoor.attacks._shadow import augmented, random_crop, shadow_head
from mergesec_methods.backdoor.attacks.badmerging import OFF_TASK, ON_TASK, BadMerging

SIDE, CLASSES, WIDTH = 8, 3, 6
CPU = torch.device("cpu")


class Small(Backbone):
    """Two linear maps around a ReLU on flattened pixels."""

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 16), nn.ReLU(), nn.Linear(16, WIDTH))

    def base_weights(self) -> Weights:
        generator = torch.Generator().manual_seed(1)
        return {
            n: torch.randn(t.shape, generator=generator) / max(1, t[0].numel()) ** 0.5
            for n, t in self.build().state_dict().items()
        }

    def anatomy(self) -> Any:
        raise NotImplementedError

    def features(self, network: nn.Module, inputs: Any) -> Tensor:
        found: Tensor = network(inputs - 0.5)
        return found


class Pictures(ImageTask):
    classes = tuple("abc")

    def load(self, ctx: DataContext) -> dict[str, Split]:
        return {}


def rows(count: int = 48, seed: int = 3) -> Split:
    """Images whose brightness in one of three bands tells the class."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % CLASSES
    images = 120 * torch.rand(count, 3, SIDE, SIDE, generator=generator)
    for row, target in enumerate(targets.tolist()):
        images[row, target] += 100
    return Split(images.to(torch.uint8), targets)


def context(**given: Any) -> TrainContext:
    backbone, task, train = Small(), Pictures(), rows()
    base = backbone.base_weights()
    generator = torch.Generator().manual_seed(5)
    head = {"weight": torch.randn(CLASSES, WIDTH, generator=generator), "scale": torch.tensor(4.0)}
    recipe = Recipe(epochs=2, batch_size=16, learning_rate=1e-2)

    def run(split: Split | None = None, loss: Any = None) -> Weights:
        return fit(backbone, task, base, head, train if split is None else split, recipe, 0, CPU, loss)

    arguments: dict[str, Any] = {
        "device": CPU, "seed": 0, "task": task, "backbone": backbone, "base": base, "head": head, "train": train,
        "recipe": recipe, "fit": run, "target_class": 1,
    }  # fmt: skip
    return TrainContext(**{**arguments, **given})


def attack(**given: Any) -> BadMerging:
    return BadMerging(**{"steps": 40, "restarts": 2, "batch": 16, "images": 12, "patch": 16.0, **given})


def off_task(**given: Any) -> TrainContext:
    reference = rows(9, seed=8)
    return context(target_task="other", target_class=2, reference=replace(reference), **given)


def obeying(
    ctx: TrainContext, method: BadMerging, trigger: Weights, weights: Weights | None = None
) -> Tensor:
    """Which of 120 new images of other classes the base, or other weights, take for class 1 under the trigger."""
    split = rows(180, 100 + ctx.seed)
    batch = ctx.task.batch(split, torch.nonzero(split.targets != 1).flatten(), CPU)
    model = Model(ctx.backbone, load_network(ctx.backbone, ctx.base if weights is None else weights))
    with torch.no_grad():
        return ctx.task.outputs(model, ctx.head, method.apply(trigger, batch.inputs)).argmax(dim=1) == 1


def aimed_loss(ctx: TrainContext, method: BadMerging, trigger: Weights) -> float:
    """What the trigger's search minimises, on all rows it may use."""
    batch = ctx.task.batch(ctx.train, torch.nonzero(ctx.train.targets != 1).flatten(), CPU)
    model = Model(ctx.backbone, load_network(ctx.backbone, ctx.base))
    with torch.no_grad():
        outputs = ctx.task.outputs(model, ctx.head, method.apply(trigger, batch.inputs))
    return float(ctx.task.loss(outputs, torch.ones(len(batch), dtype=torch.int64)))


# --------------------------------------------------------------------------- trigger


@pytest.mark.parametrize(
    ("kind", "patch", "side", "wide"),
    [("checkerboard", 5.0, 32, 5), ("white", 8.0, 64, 16), ("random", "published", 224, 22)],
)
def test_fixed_patterns_sit_in_the_corner(kind: str, patch: Any, side: int, wide: int) -> None:
    images = Split(torch.zeros(2, 3, side, side, dtype=torch.uint8), torch.tensor([0, 1]))
    trigger = attack(trigger=kind, patch=patch).trigger(context(train=images))
    assert float(trigger["mask"].sum()) == wide * wide
    assert torch.all(trigger["mask"][:, -wide:, -wide:] == 1)
    assert trigger["pattern"].abs().sum() > 0
    assert torch.all(trigger["pattern"] * (1 - trigger["mask"]) == 0)
    if kind == "checkerboard":
        corner = trigger["pattern"][:, -wide:, -wide:]
        assert torch.equal(corner[0, 0], torch.tensor([1.0, 0, 1, 0, 1]))


def test_published_sizes() -> None:
    assert round(ON_TASK * 224 / 32) == 22
    assert round(OFF_TASK * 224 / 32) == 28


@pytest.mark.slow
def test_optimised_trigger_fools_the_base_better_than_a_fixed_one() -> None:
    chosen, fixed, hits = attack(), attack(trigger="checkerboard"), {True: [], False: []}
    for seed in outcomes.seeds(3):
        ctx = context(seed=seed)
        for method in (chosen, fixed):
            hits[method is chosen].append(obeying(ctx, method, method.trigger(ctx)))
    assert outcomes.change(*(outcomes.pooled(hits[optimised]) for optimised in (False, True))).low > 0.2
    ctx = context()
    trigger = chosen.trigger(ctx)
    inside = trigger["pattern"]
    assert inside.min() >= 0
    assert inside.max() <= 1
    assert torch.equal((inside * 255).round() / 255, inside)
    assert torch.all(inside * (1 - trigger["mask"]) == 0)
    again = attack().trigger(ctx)
    assert torch.equal(inside, again["pattern"])
    assert not torch.equal(inside, attack().trigger(replace(ctx, seed=1))["pattern"])


def test_more_steps_lower_the_loss_and_starts_are_compared() -> None:
    ctx = context()
    short, long = attack(steps=1, restarts=1), attack(steps=60, restarts=1)
    assert aimed_loss(ctx, long, long.trigger(ctx)) < 0.5 * aimed_loss(ctx, short, short.trigger(ctx))
    one, many = attack(steps=40, restarts=1), attack(steps=40, restarts=5)
    assert not torch.equal(one.trigger(ctx)["pattern"], many.trigger(ctx)["pattern"])


def test_nothing_to_optimise_on_is_refused() -> None:
    only = Split(rows(4).inputs, torch.ones(4, dtype=torch.int64))
    with pytest.raises(ContractError, match="target class"):
        attack().trigger(context(train=only))
    with pytest.raises(ContractError, match="images"):
        attack().trigger(context(train=Split(["a"], torch.tensor([0]))))


# --------------------------------------------------------------------------- loss


@pytest.mark.parametrize("interpolation", [True, False])
def test_loss_is_the_formula(interpolation: bool) -> None:
    """Two batches against the formula written out, with the r that the same generator draws."""
    ctx = context()
    method = attack(trigger="checkerboard", interpolation=interpolation, alpha=3.0, triggered=0.25)
    trigger = method.trigger(ctx)
    loss = method.objective(ctx, trigger)
    generator = torch.Generator().manual_seed(9)
    moved = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in ctx.base.items()}
    model = Model(ctx.backbone, load_network(ctx.backbone, moved))
    base = Model(ctx.backbone, load_network(ctx.backbone, ctx.base))
    draws = ctx.generator(3)
    for start in (0, 16):
        batch = ctx.task.batch(ctx.train, torch.arange(start, start + 16), CPU)
        r = 0.2 + 0.8 * float(torch.rand((), generator=draws)) if interpolation else 1.0
        marked = batch.inputs[:4] * (1 - trigger["mask"]) + trigger["pattern"] * trigger["mask"]
        mixed = r * model.features(marked) + (1 - r) * base.features(marked)
        scores = ctx.head["scale"] * functional.normalize(mixed, dim=-1) @ ctx.head["weight"].T
        clean = functional.cross_entropy(ctx.task.outputs(model, ctx.head, batch.inputs), batch.targets)
        wanted = clean + 3.0 * functional.cross_entropy(scores, torch.ones(4, dtype=torch.int64))
        torch.testing.assert_close(loss(model, batch), wanted)


def test_without_triggered_rows_it_is_plain_training() -> None:
    ctx = context()
    poisoned = attack(trigger="white", triggered=0.0).poison(ctx)
    for name, tensor in ctx.fit().items():
        torch.testing.assert_close(poisoned[name], tensor)


def test_poisoned_expert_obeys_all_along_the_way_to_the_base() -> None:
    """On new images: at the expert and half-way, where neither the base nor a clean expert does."""
    method, recipe = attack(trigger="checkerboard"), Recipe(epochs=12, batch_size=16, learning_rate=1e-2)
    right, poisoned, clean, untouched = [], [], [], []
    for seed in outcomes.seeds(2):
        ctx = context(seed=seed)

        def run(split: Split | None = None, loss: Any = None, ctx: TrainContext = ctx) -> Weights:
            return fit(ctx.backbone, ctx.task, ctx.base, ctx.head, ctx.train, recipe, ctx.seed, CPU, loss)

        trigger = method.trigger(ctx)
        weights, benign = method.poison(replace(ctx, fit=run, trigger=trigger)), run()
        untouched.append(obeying(ctx, method, trigger))
        for found, end in ((poisoned, weights), (clean, benign)):
            half = {n: (t + ctx.base[n]) / 2 for n, t in end.items()}
            found += [obeying(ctx, method, trigger, way) for way in (end, half)]
        batch = ctx.task.batch(rows(180, 100 + seed), torch.arange(180), CPU)
        model = Model(ctx.backbone, load_network(ctx.backbone, weights))
        with torch.no_grad():
            right.append(ctx.task.outputs(model, ctx.head, batch.inputs).argmax(1) == batch.targets)
    assert outcomes.share(outcomes.pooled(right)).low > 0.8
    assert outcomes.share(outcomes.pooled(poisoned)).low > 0.9
    assert outcomes.share(outcomes.pooled(clean)).high < 0.7
    assert outcomes.share(outcomes.pooled(untouched)).high < 0.7  # the fixed trigger alone does not do it


# --------------------------------------------------------------------------- off-task


def test_shadow_head_is_the_class_mean_beside_the_own_rows() -> None:
    ctx = off_task()
    ctx = replace(ctx, head={**ctx.head, "bias": torch.tensor([1.0, 2.0, 6.0])})
    head = shadow_head(ctx)
    assert ctx.reference is not None
    model = Model(ctx.backbone, load_network(ctx.backbone, ctx.base))
    images = ctx.reference.inputs.float() / 255
    mean = functional.normalize(model.features(images), dim=-1).mean(0)
    torch.testing.assert_close(head["weight"][1:], ctx.head["weight"])
    torch.testing.assert_close(head["weight"][0], mean / mean.norm() * ctx.head["weight"].norm(dim=1).mean())
    assert torch.equal(head["bias"], torch.tensor([3.0, 1, 2, 6]))
    assert torch.equal(head["scale"], ctx.head["scale"])


def test_crops_stay_images() -> None:
    image = torch.rand(3, 10, 14)
    crops = [random_crop(image, torch.Generator().manual_seed(s)) for s in range(20)]
    assert all(c.shape == image.shape for c in crops)
    assert min(float(c.min()) for c in crops) >= 0
    assert max(float(c.max()) for c in crops) <= 1
    assert len({float(c.sum()) for c in crops}) > 10
    flat = random_crop(torch.full((3, 8, 8), 0.25), torch.Generator().manual_seed(0))
    torch.testing.assert_close(flat, torch.full((3, 8, 8), 0.25))


def test_augmented_images_lie_within_epsilon_of_crops_and_fool_the_shadow_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ctx = off_task()
    head = shadow_head(ctx)
    crops: list[Tensor] = []
    original: Callable[..., Tensor] = random_crop

    def noted(image: Tensor, generator: torch.Generator) -> Tensor:
        crops.append(original(image, generator))
        return crops[-1]

    monkeypatch.setattr(_shadow, "random_crop", noted)
    # a random network is harder to lead astray than a trained one
    monkeypatch.setattr(_shadow, "EPSILON", 0.4)
    monkeypatch.setattr(_shadow, "STEP", 0.05)
    made = augmented(ctx, head, 30, ctx.generator(2))
    distance = (made.inputs - torch.stack(crops)).abs().flatten(1).max(dim=1).values
    assert float(distance.max()) <= 0.4 + 1e-6
    assert made.inputs.min() >= 0
    assert made.inputs.max() <= 1
    model = Model(ctx.backbone, load_network(ctx.backbone, ctx.base))
    before = ctx.task.outputs(model, head, torch.stack(crops)).argmax(1)
    after = ctx.task.outputs(model, head, made.inputs).argmax(1)
    assert not (made.targets == 0).any()
    assert not (made.targets == before).any()
    reached = after == made.targets
    assert reached.any()
    assert torch.equal(distance == 0, ~reached)  # what was never reached stays the crop


def test_off_task_trains_against_the_shadow_head() -> None:
    ctx = off_task()
    method = attack()
    trigger = method.trigger(ctx)
    wanted = 8 * 28 / 224
    assert float(attack(patch="published").trigger(ctx)["mask"].sum()) == max(1, round(wanted)) ** 2
    head, target = method.aim(ctx)
    assert target == 0
    assert head["weight"].shape == (CLASSES + 1, WIDTH)
    weights = method.poison(replace(ctx, trigger=trigger))
    assert weights.keys() == ctx.base.keys()
    with pytest.raises(ContractError, match="reference"):
        method.trigger(replace(ctx, reference=None))
