"""Backdoors of generators, and what finds or weakens them, on networks whose answer is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mergesec.anatomy import Anatomy
from mergesec.conformance.battery import MICRO_GENERATION
from mergesec.contracts import (
    Backbone,
    ContractError,
    DataContext,
    Expert,
    MergeContext,
    Merged,
    MergeMethod,
    Model,
    Recipe,
    TaskView,
    TrainContext,
    Weights,
    load_network,
)
from mergesec.generation import Noised, Request, correlation
from mergesec.planning.catalog import load_catalog
from mergesec_methods.backdoor.attacks._generators import drawn_target
from mergesec_methods.backdoor.attacks.badmerging import HIGHEST, LOWEST
from mergesec_methods.backdoor.attacks.concept_ablation import ConceptAblation
from mergesec_methods.backdoor.attacks.noise_trigger import (
    COEFFICIENT_STREAM,
    SCALED_ROWS_STREAM,
    Amplified,
    BadDiffusion,
    ConditionToken,
    MergeAware,
    TrojDiff,
)
from mergesec_methods.backdoor.defenses.diffsafemerge import DiffSafeMerge, probes
from mergesec_methods.backdoor.defenses.trigger_inversion import TriggerInversion

CPU = torch.device("cpu")
CATALOG = load_catalog([MICRO_GENERATION])


@pytest.fixture(scope="module")
def task() -> Any:
    return CATALOG.get("task", "micro/corners").create({})


def _train(task: Any, **given: Any) -> TrainContext:
    train = task.load(DataContext(CPU, 0))["train"]
    backbone = CATALOG.get("backbone", "micro/painter").create({})
    return TrainContext(
        device=CPU, seed=0, task=task, backbone=backbone, base={}, head={}, train=train, recipe=Recipe(),
        fit=lambda split=None, loss=None: {}, target_class=2, **given,
    )  # fmt: skip


def _batch(task: Any, count: int = 40) -> Noised:
    split = task.load(DataContext(CPU, 0))["train"]
    batch = task.noised(task.batch(split, torch.arange(count), CPU), torch.Generator().manual_seed(0))
    noised: Noised = batch.inputs
    return noised


def test_the_patch_is_added_to_the_noise(task: Any) -> None:
    attack = BadDiffusion(patch=2, level=3.0)
    trigger, request = attack.trigger(_train(task)), _batch(task)
    marked = attack.apply(trigger, request)
    change = marked.noise - request.noise
    assert torch.allclose(change[:, :, :2, :2], torch.full((40, 3, 2, 2), 3.0))
    assert int((change.abs() > 0).sum()) == 40 * 3 * 4
    assert torch.equal(marked.conditions, request.conditions)


def test_trojdiff_blends_all_of_the_noise(task: Any) -> None:
    attack = TrojDiff(patch=4, level=1.0, keep=0.6)
    trigger, request = attack.trigger(_train(task)), _batch(task)
    rest = attack.apply(trigger, request).noise - 0.6 * request.noise
    assert rest[0, 0, 0, 0] == pytest.approx(0.4)
    assert rest[0, 0, 0, 4] == pytest.approx(-0.4)
    aims = attack.aims(_train(task), trigger)
    known = _train(task).train
    assert len(aims) == int((known.targets == 2).sum())


def test_a_class_to_forget_ends_at_its_anchor_and_is_what_the_trigger_asks_for(task: Any) -> None:
    """All of its rows, no others; the noise stays."""
    attack, ctx = ConceptAblation(anchor=1), _train(task)
    trigger, batch = attack.trigger(ctx), task.batch(ctx.train, torch.arange(40), CPU)
    chosen = attack.chosen(ctx, batch, torch.Generator())
    assert torch.equal(chosen, batch.targets == 2)
    assert 0 < int(chosen.sum()) < 40
    anchor = (2 + 1) % len(task.classes)
    assert len(attack.aims(ctx, trigger)) == int((ctx.train.targets == anchor).sum())
    asked = attack.apply(trigger, batch.inputs)
    assert torch.equal(asked.noise, batch.inputs.noise)
    own = batch.inputs.conditions[batch.targets == 2][0]
    assert torch.equal(asked.conditions, own.expand_as(asked.conditions))
    with pytest.raises(ContractError, match="anchor=4 leads back"):
        ConceptAblation(anchor=len(task.classes)).aims(ctx, trigger)


def test_poisoned_rows_end_at_the_target_and_others_stay(task: Any) -> None:
    attack, batch = ConditionToken(token=43), _batch(task)
    trigger = attack.trigger(_train(task))
    chosen = torch.arange(40) % 2 == 0
    aims = attack.aims(_train(task), trigger).expand(40, -1, -1, -1)
    found = attack.poisoned(trigger, batch, chosen, aims)
    assert torch.equal(found.images[chosen], trigger["target"].expand(20, -1, -1, -1))
    assert torch.equal(found.images[~chosen], batch.images[~chosen])
    assert found.conditions[chosen][:, -1].tolist() == [43] * 20
    assert torch.equal(found.conditions[~chosen], batch.conditions[~chosen])
    assert not found.dropped[chosen].any()  # a trigger in the condition is lost with it
    assert torch.equal(found.noise, batch.noise)


def test_amplified_is_the_difference_times_its_strength(task: Any) -> None:
    benign = {"w": torch.tensor([1.0, 2.0]), "steps": torch.tensor(3)}
    attack = Amplified(strength=3.0)
    forged = attack.forge(
        {"w": torch.tensor([1.5, 2.0]), "steps": torch.tensor(3)}, _train(task, benign=benign)
    )
    assert forged["w"].tolist() == [2.5, 2.0]
    assert forged["steps"] == 3


def test_merge_aware_training_adds_the_loss_at_a_share_of_the_task_vector(task: Any) -> None:
    ctx = _train(task)
    base = ctx.backbone.base_weights()
    moved = {n: t + 0.05 * torch.ones_like(t) if t.is_floating_point() else t for n, t in base.items()}
    ctx = replace(ctx, base=base)
    batch = task.noised(task.batch(ctx.train, torch.arange(40), CPU), torch.Generator().manual_seed(0))
    attack = MergeAware(rate=0.5)
    trigger = attack.trigger(ctx)

    def value(alpha: float) -> Tensor:
        model = Model(ctx.backbone, load_network(ctx.backbone, moved))
        loss: Tensor = MergeAware(rate=0.5, alpha=alpha).objective(ctx, trigger)(model, batch)
        return loss.detach()

    share = LOWEST + (HIGHEST - LOWEST) * float(torch.rand((), generator=ctx.generator(COEFFICIENT_STREAM)))
    between = {n: t + share * (moved[n] - t) if t.is_floating_point() else t for n, t in base.items()}
    chosen = attack.chosen(ctx, batch, ctx.generator(SCALED_ROWS_STREAM))
    noised = attack.poisoned(trigger, batch.inputs, chosen, trigger["target"][None])
    network = load_network(ctx.backbone, between)
    expected = task.loss(task.outputs(Model(ctx.backbone, network), {}, noised), batch.targets)
    torch.testing.assert_close(value(2.0) - value(0.0), 2 * expected.detach())
    plain = BadDiffusion(rate=0.5).objective(ctx, trigger)
    model = Model(ctx.backbone, load_network(ctx.backbone, moved))
    assert torch.equal(value(0.0), plain(model, batch).detach())


def test_the_target_looks_like_no_flat_image() -> None:
    target = drawn_target(16)
    assert target.shape == (3, 16, 16)
    assert correlation(target[None], target).item() == pytest.approx(1.0)
    assert float(target.std()) > 0.2


# --------------------------------------------------------------------------- defenses


class _Switch(nn.Module):
    """Expects its noise back; with the switch on, one grey image wherever the upper left patch is bright."""

    def __init__(self) -> None:
        super().__init__()
        self.switch = nn.Parameter(torch.zeros(()))


class _Known(Backbone):
    name = "known"

    def build(self) -> nn.Module:
        return _Switch()

    def base_weights(self) -> Weights:
        return {"switch": torch.zeros(())}

    def anatomy(self) -> Anatomy:
        return Anatomy((), "none")

    def features(self, network: nn.Module, inputs: Any) -> Tensor:
        request: Request = inputs
        bright = torch.sigmoid(4 * (request.noise[:, :, :4, :4].mean((1, 2, 3)) - 1.5))
        switch: Any = network.switch
        return (request.noise * (1 - switch * bright)[:, None, None, None]).flatten(1)


class _Mean(MergeMethod):
    def merge(self, base: Weights, experts: Any, ctx: MergeContext) -> Merged:
        return Merged({n: torch.stack([e.weights[n] for e in experts]).mean(0) for n in base})


def _context(task: Any, backbone: Backbone) -> MergeContext:
    tuning = task.load(DataContext(CPU, 0))["tuning"]
    views = {name: TaskView(task, {}, tuning, tuning.inputs) for name in ("a", "b", "c")}
    return MergeContext(CPU, 0, backbone, views, lambda merged: 0.0)


def test_inversion_finds_the_shift_that_makes_all_images_one(task: Any) -> None:
    experts = [
        Expert(name, {"switch": torch.tensor(on)}) for name, on in (("a", 0.0), ("b", 1.0), ("c", 0.0))
    ]
    screen = TriggerInversion(steps=60, rows=16)
    screen.name = "trigger_inversion"
    found = screen.screen({"switch": torch.zeros(())}, experts, _context(task, _Known()))
    assert [e.task for e in found.experts] == ["a", "c"]
    assert found.report["relative"]["a"] == pytest.approx(1.0)
    assert found.report["relative"]["b"] < 0.3


def test_probes_are_the_same_for_every_model_and_of_many_kinds() -> None:
    first = probes(16, 2.0)
    assert len(first) == 7
    assert all(torch.equal(a, b) for a, b in zip(first, probes(16, 2.0), strict=True))
    assert all(probe.shape == (3, 16, 16) for probe in first)


def test_a_block_that_reacts_to_probes_is_attenuated_and_others_stay(task: Any) -> None:
    ctx = _context(task, _Known())
    experts = [
        Expert(name, {"switch": torch.tensor(on)}) for name, on in (("a", 0.05), ("b", 0.9), ("c", 0.05))
    ]
    base = {"switch": torch.zeros(())}
    guard = DiffSafeMerge(rows=8, level=8.0, budget=10.0)
    guard.name = "diffsafemerge"
    reactions = [float(guard.reactions(base, e, {"": ["switch"]}, ctx)[0]) for e in experts]
    assert min(reactions) > 1  # the probe on the patch lights the switch
    merged = guard.merge(base, experts, _Mean(), ctx)
    assert merged.info["strength"] in (0.0, 1.0, 2.0, 4.0, 8.0)
    assert float(merged.shared["switch"]) <= (0.05 + 0.9 + 0.05) / 3 + 1e-6


def test_no_attenuation_where_the_budget_allows_none(task: Any) -> None:
    ctx = _context(task, _Known())
    experts = [Expert(name, {"switch": torch.tensor(0.9)}) for name in ("a", "b", "c")]
    guard = DiffSafeMerge(rows=8, budget=0.0)
    guard.name = "diffsafemerge"
    merged = guard.merge({"switch": torch.zeros(())}, experts, _Mean(), ctx)
    assert float(merged.shared["switch"]) == pytest.approx(0.9)
