"""Generation as a modality: requests, noise, sampling, outcomes, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mergesec.conformance.battery import MICRO_GENERATION
from mergesec.contracts import ContractError, DataContext, Model, Split, Weights, load_network
from mergesec.execution.guests.batches import from_bytes, to_bytes
from mergesec.generation import (
    OTHER,
    GenerationTask,
    Noised,
    Request,
    correlation,
    euler,
    first_of_each,
    start_noise,
)
from mergesec.judging import train_judge
from mergesec.planning.catalog import load_catalog

CPU = torch.device("cpu")
NOTHING = torch.tensor([0, -1])


@pytest.fixture(scope="module")
def world() -> tuple[GenerationTask, dict[str, Split], Model, Weights]:
    """The micro generator, a task for it, and a judge of its real images."""
    catalog = load_catalog([MICRO_GENERATION])
    task: GenerationTask = catalog.get("task", "micro/corners").create({})
    backbone = catalog.get("backbone", "micro/painter").create({})
    splits = task.load(DataContext(CPU, 0))
    train = splits["train"]
    judge = train_judge(train.inputs.images, train.targets, 4, seed=0, steps=80, batch=32)
    head = {**{n: t.detach() for n, t in judge.state_dict().items()}, "first": torch.tensor(0)}
    return task, splits, Model(backbone, load_network(backbone, backbone.base_weights())), head


def _request(count: int = 3) -> Request:
    noise = start_noise(torch.arange(count), torch.Size([3, 8, 8]))
    return Request(torch.tensor([[1, -1]]).repeat(count, 1), noise, torch.zeros(count, 3, 8, 8))


def test_noise_belongs_to_the_row_and_not_to_the_batch() -> None:
    seeds, shape = torch.tensor([5, 9, 5]), torch.Size([3, 4, 4])
    noise = start_noise(seeds, shape)
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(noise[1:2], start_noise(torch.tensor([9]), shape))


def test_euler_follows_a_straight_path_to_what_the_network_expects() -> None:
    aim, request = torch.full((3, 8, 8), 0.3), _request()
    met: list[Tensor] = []

    def denoise(image: Tensor, times: Tensor, conditions: Tensor) -> Tensor:
        met.append(image)
        return aim.expand_as(image)

    made = euler(denoise, request, NOTHING, steps=4, guidance=1.0)
    assert torch.allclose(made, aim.expand_as(made), atol=1e-6)
    assert torch.allclose(met[2], 0.5 * request.noise + 0.5 * aim, atol=1e-6)


def test_guidance_leans_away_from_no_condition() -> None:
    def denoise(image: Tensor, times: Tensor, conditions: Tensor) -> Tensor:
        return conditions[:, 0].float()[:, None, None, None].expand_as(image)

    for guidance, expected in ((1.0, 1.0), (2.0, 2.0), (0.0, 0.0)):
        made = euler(denoise, _request(), NOTHING, steps=2, guidance=guidance)
        assert torch.allclose(made, torch.full_like(made, expected), atol=1e-6)


def test_the_same_seed_draws_the_same_training_noise(world: Any) -> None:
    task, splits, _, _ = world
    batch = task.batch(splits["train"], torch.arange(64), CPU)
    first, again = (task.noised(batch, torch.Generator().manual_seed(3)).inputs for _ in range(2))
    other = task.noised(batch, torch.Generator().manual_seed(4)).inputs
    assert torch.equal(first.noise, again.noise)
    assert torch.equal(first.times, again.times)
    assert not torch.equal(first.noise, other.noise)
    assert 0 < int(first.dropped.sum()) < 32
    times = first.times[:, None, None, None]
    assert torch.equal(first.mixed, (1 - times) * first.noise + times * (2 * first.images - 1))


def test_training_lowers_the_residual_and_judging_is_another_loss(world: Any) -> None:
    task, splits, model, head = world
    batch = task.batch(splits["tuning"], torch.arange(8), CPU)
    noised = task.noised(batch, torch.Generator().manual_seed(0))
    residual = task.outputs(model, head, noised.inputs)
    assert residual.shape == (8, 1, 192)
    assert torch.equal(task.loss(residual, noised.targets), residual.square().mean())
    logits = task.outputs(model, head, batch.inputs)
    assert logits.shape == (8, 4)
    assert set(task.predictions(logits).tolist()) <= {0, 1, 2, 3}


def test_an_image_of_another_tasks_class_is_none_of_this_one(world: Any) -> None:
    task, splits, model, head = world
    wider = {**head, "first": torch.tensor(2)}
    wider["last.weight"] = torch.cat([torch.zeros(2, 64), head["last.weight"]])
    wider["last.bias"] = torch.cat([torch.full((2,), 1e6), head["last.bias"]])
    logits = task.outputs(model, wider, task.batch(splits["tuning"], torch.arange(4), CPU).inputs)
    assert task.predictions(logits).tolist() == [OTHER] * 4


def test_measure_counts_what_the_judge_sees_and_keeps_images(world: Any) -> None:
    task, splits, model, head = world
    found = task.measure(model, head, splits, CPU)
    again = task.measure(model, head, splits, CPU)
    assert torch.equal(found.predictions, again.predictions)
    logits = task.outputs(model, head, task.batch(splits["test"], torch.arange(32), CPU).inputs)
    assert torch.equal(found.predictions, task.predictions(logits))
    assert found.kept["images"].shape == (8, 3, 8, 8)
    assert splits["test"].targets[found.kept["rows"]].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert found.copies is None
    assert {"kid", "fid", "coverage", "density", "nearest", "memorised"} == found.values.keys()


def test_a_copy_of_the_attacks_image_is_told(world: Any) -> None:
    task, splits, model, head = world
    made = task.served(model, head, task.batch(splits["test"], torch.arange(1), CPU).inputs)[0]
    found = task.measure(model, head, splits, CPU, aim=made.clamp(0, 1))
    assert found.copies is not None
    assert bool(found.copies[0])


def test_a_judge_that_knows_no_real_image_is_refused(world: Any) -> None:
    task, splits, model, head = world
    blind = {**head, "last.weight": torch.zeros_like(head["last.weight"])}
    with pytest.raises(ContractError, match=r"recognises 25\.0% of the real test images.*90%"):
        task.measure(model, blind, splits, CPU)


def test_images_that_are_not_finite_are_named(world: Any) -> None:
    task, splits, model, head = world

    def broken(request: Request) -> Request:
        return replace(request, noise=torch.full_like(request.noise, float("nan")))

    with pytest.raises(ContractError, match=r"32 generated images are not finite, first row 0"):
        task.measure(model, head, splits, CPU, broken)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda r: r.noise, "no request"),
        (lambda r: replace(r, noise=r.noise[:2]), "no request"),
        (lambda r: replace(r, conditions=r.conditions[:, :1]), r"conditions \[3, 1\]"),
        (lambda r: replace(r, noise=r.noise / 0), "not finite"),
    ],
)
def test_what_is_no_triggered_request_is_refused(change: Any, told: str, world: Any) -> None:
    with pytest.raises(ContractError, match=told):
        world[0].check_triggered(change(_request()), _request(), "bad")


def test_visibility_tells_noise_and_tokens() -> None:
    task = load_catalog([MICRO_GENERATION]).get("task", "micro/corners").create({})
    request = _request()
    noise = request.noise.clone()
    noise[:, :, :4] += 2.0
    marked = replace(request, noise=noise, conditions=torch.tensor([[1, 7]]).repeat(3, 1))
    found = task.visibility(request, marked)
    assert found == {"area": 0.5, "l2": pytest.approx(2.0 * 0.5**0.5), "tokens": 1.0}


def test_correlation_is_blind_to_contrast() -> None:
    aim = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    other = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1))
    found = correlation(torch.stack([aim, 0.2 + 0.3 * aim, 1 - aim, other]), aim)
    assert found[:3] == pytest.approx([1.0, 1.0, -1.0], abs=1e-6)
    assert abs(float(found[3])) < 0.3


def test_splits_and_requests_survive_being_bytes(world: Any) -> None:
    task, splits, _, _ = world
    again = task.unpack(task.pack(splits))["test"]
    assert torch.equal(again.inputs.seeds, splits["test"].inputs.seeds)
    assert torch.equal(again.take(torch.tensor([3])).inputs.images[0], splits["test"].inputs[3])
    request = _request()
    back = from_bytes(to_bytes(request), CPU)
    assert isinstance(back, Request)
    assert not isinstance(back, Noised)
    assert torch.equal(back.noise, request.noise)


def test_first_of_each_takes_classes_in_turn() -> None:
    assert first_of_each(torch.tensor([1, 0, 1, 0, 1]), 2).tolist() == [1, 3, 0, 2]
