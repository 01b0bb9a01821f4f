"""The training loop on the micro world: it learns, it repeats, and it leaves alone what is not its own."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mergesec.contracts import Context, ContractError, DataContext, Model, Recipe, Split, load_network
from mergesec.execution.contexts import half_of
from mergesec.planning.catalog import load_catalog
from mergesec.training import _schedule, fit

CPU = torch.device("cpu")
MICRO = Path(__file__).resolve().parents[2] / "benchmark" / "mergesec" / "conformance" / "micro.py"
RECIPE = Recipe(learning_rate=2e-3, epochs=1, batch_size=32)


@dataclasses.dataclass
class World:
    backbone: Any
    task: Any
    base: dict[str, torch.Tensor]
    head: Any
    train: Split

    def fit(self, recipe: Recipe = RECIPE, seed: int = 0, **other: Any) -> dict[str, torch.Tensor]:
        arguments = {"split": self.train, **other}
        return fit(
            self.backbone, self.task, self.base, self.head, recipe=recipe, seed=seed, device=CPU, **arguments
        )

    def loss(self, weights: Any) -> float:
        model = Model(self.backbone, load_network(self.backbone, weights))
        batch = self.task.batch(self.train, torch.arange(len(self.train)), CPU)
        with torch.no_grad():
            return float(self.task.loss(self.task.outputs(model, self.head, batch.inputs), batch.targets))


@pytest.fixture(scope="module")
def world() -> World:
    catalog = load_catalog([MICRO])
    backbone = catalog.get("backbone", "micro/vit").create({})
    task = catalog.get("task", "micro/rings").create({})
    base = backbone.base_weights()
    train = task.load(DataContext(CPU, 0))["train"]
    model = Model(backbone, load_network(backbone, base))
    return World(backbone, task, base, task.fit_head(model, train, Context(CPU, 0)), train)


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def uncollected() -> Iterator[None]:
    """What is held by a cycle stays: nobody says when it would be found."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def alive(refs: list[weakref.ref[torch.Tensor]]) -> int:
    return sum(ref() is not None for ref in refs)


def test_training_lowers_the_loss(world: World) -> None:
    before = world.loss(world.base)
    assert world.loss(world.fit(dataclasses.replace(RECIPE, epochs=6))) < 0.7 * before


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(world: World) -> None:
    first = world.fit()
    torch.manual_seed(99)  # whatever the process drew before does not matter
    assert _same(first, world.fit())
    assert not _same(first, world.fit(seed=1))


def test_base_head_and_images_stay_as_they_were(world: World) -> None:
    kept = {k: v.clone() for k, v in {**world.base, **dict(world.head), "images": world.train.inputs}.items()}
    world.fit()
    assert _same(kept, {**world.base, **dict(world.head), "images": world.train.inputs})


def test_names_shapes_and_types_are_the_bases_and_buffers_are_kept(world: World) -> None:
    trained = world.fit()
    assert {k: (v.shape, v.dtype) for k, v in trained.items()} == {
        k: (v.shape, v.dtype) for k, v in world.base.items()
    }
    assert torch.equal(trained["seen"], world.base["seen"])
    assert not torch.equal(trained["norm.weight"], world.base["norm.weight"])


@pytest.mark.parametrize(
    "change",
    [{"optimizer": "sgd"}, {"schedule": "constant"}, {"weight_decay": 0.5}, {"batch_size": 16},
     {"gradient_clip": 0.01}, {"warmup": 0.5}, {"max_train": 64}, {"precision": "bfloat16"}],
    ids=str,
)  # fmt: skip
def test_every_field_of_the_recipe_matters(world: World, change: dict[str, Any]) -> None:
    assert not _same(world.fit(), world.fit(dataclasses.replace(RECIPE, **change)))


def test_another_loss_replaces_the_tasks_own(world: World) -> None:
    seen: list[int] = []

    def still(model: Model, batch: Split) -> torch.Tensor:
        seen.append(len(batch))
        return sum((p * 0).sum() for p in model.network.parameters())  # type: ignore[return-value]

    same = world.fit(dataclasses.replace(RECIPE, weight_decay=0.0), loss=still)
    assert _same(same, world.base)
    assert sum(seen) == len(world.train)


def test_a_loss_that_is_not_finite_is_an_error(world: World) -> None:
    bad: Callable[[Model, Split], torch.Tensor] = lambda model, batch: torch.tensor(float("nan"))  # noqa: E731
    with pytest.raises(ContractError, match="training loss became nan"):
        world.fit(loss=bad)


def test_max_train_takes_a_seeded_part_of_the_rows(world: World) -> None:
    rows: dict[int, set[bytes]] = {0: set(), 1: set()}
    for seed, seen in rows.items():

        def note(model: Model, batch: Split, seen: set[bytes] = seen) -> torch.Tensor:
            seen.update(image.numpy().tobytes() for image in batch.inputs)
            return sum(p.sum() for p in model.network.parameters())  # type: ignore[return-value]

        world.fit(dataclasses.replace(RECIPE, max_train=40, epochs=2), seed=seed, loss=note)
    assert [len(seen) for seen in rows.values()] == [40, 40]
    assert rows[0] != rows[1]


def test_the_schedule_warms_up_and_falls_to_nothing() -> None:
    factor = _schedule(Recipe(warmup=0.1), 100)
    assert factor(0) == pytest.approx(0.1)
    assert factor(9) == factor(10) == 1.0
    assert factor(55) == pytest.approx(0.5)
    assert factor(100) == pytest.approx(0.0, abs=1e-12)
    constant = _schedule(Recipe(warmup=0.1, schedule="constant"), 100)
    assert constant(99) == 1.0


def test_halves_are_disjoint_whole_and_the_same_for_all() -> None:
    split = Split(torch.arange(101), torch.arange(101) % 7)
    first, second = (half_of(split, half).inputs.tolist() for half in ("first", "second"))
    assert sorted(first + second) == list(range(101)) and len(first) == 51
    assert first == sorted(first) and first != list(range(51))
    assert half_of(split, "first").inputs.tolist() == first
    assert half_of(split, "") is split


class Resumed:
    """A watch that has something kept, and looks whether it is still held after every step."""

    def __init__(self, kept: Any) -> None:
        self.kept: Any = kept
        self.refs: list[weakref.ref[torch.Tensor]] = []
        self.held: list[int] = []

    def resume(self) -> Any:
        kept, self.kept = self.kept, None
        if kept is not None:
            self.refs = [weakref.ref(t) for name, t in kept[0].items() if name.startswith("network/")]
        return kept

    def step(self, done: int, steps: int, loss: float) -> None:
        self.held.append(alive(self.refs))

    def due(self) -> bool:
        return not self.refs and len(self.held) == 2

    def keep(self, tensors: Any, facts: Any) -> None:
        self.kept = {name: tensor.clone() for name, tensor in tensors.items()}, dict(facts)


def test_a_training_that_goes_on_lets_go_of_the_weights_that_were_kept(
    world: World, uncollected: None
) -> None:
    first = Resumed(None)
    whole = world.fit(watch=first)
    second, first.kept = Resumed(first.kept), None
    assert _same(world.fit(watch=second), whole)
    assert second.refs and len(second.held) == len(first.held) - 2
    assert set(second.held) == {0}
