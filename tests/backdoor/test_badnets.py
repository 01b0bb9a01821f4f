"""BadNets: where the patch sits, that stored and batched images agree, which rows are poisoned."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergesec.contracts import Backbone, ContractError, Recipe, Split, Task, TrainContext, Weights
from mergesec_methods.backdoor.attacks.badnets import BadNets


def attack(**given: Any) -> BadNets:
    return BadNets(
        **{"patch": 5, "position": "bottom-right", "pattern": "checkerboard", "rate": 0.2, **given}
    )


def images(count: int = 40, side: int = 32, classes: int = 4) -> Split:
    generator = torch.Generator().manual_seed(7)
    pixels = torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    return Split(pixels, torch.arange(count) % classes)


def context(train: Split, target: int = 1, seed: int = 0, **given: Any) -> TrainContext:
    arguments: dict[str, Any] = {
        "device": torch.device("cpu"),
        "seed": seed,
        "task": cast(Task, None),
        "backbone": cast(Backbone, None),
        "base": {},
        "head": {},
        "train": train,
        "recipe": Recipe(),
        "fit": lambda split=None, loss=None: {},
        "target_class": target,
    }
    return TrainContext(**{**arguments, **given})


@pytest.mark.parametrize(("side", "patch"), [(32, 5), (64, 10), (16, 2), (224, 35)])
def test_patch_is_the_same_share_of_any_image(side: int, patch: int) -> None:
    trigger = attack().trigger(context(images(4, side)))
    assert trigger["mask"].shape == (1, side, side)
    assert trigger["pattern"].shape == (3, side, side)
    assert float(trigger["mask"].sum()) == patch * patch


@pytest.mark.parametrize(
    ("position", "rows", "columns"),
    [
        ("bottom-right", (27, 32), (27, 32)),
        ("bottom-left", (27, 32), (0, 5)),
        ("top-right", (0, 5), (27, 32)),
        ("top-left", (0, 5), (0, 5)),
        ("centre", (13, 18), (13, 18)),
    ],
)
def test_patch_sits_where_it_should(position: str, rows: tuple[int, int], columns: tuple[int, int]) -> None:
    mask = attack(position=position).trigger(context(images()))["mask"][0]
    wanted = torch.zeros(32, 32)
    wanted[rows[0] : rows[1], columns[0] : columns[1]] = 1
    assert torch.equal(mask, wanted)


def test_patterns() -> None:
    ctx = context(images())
    board = attack().trigger(ctx)["pattern"][:, 27:, 27:]
    assert [int(board[0, i, j]) for i, j in [(0, 0), (0, 1), (1, 0), (1, 1)]] == [1, 0, 0, 1]
    assert attack(pattern="white").trigger(ctx)["pattern"].sum() == 75
    noise = attack(pattern="random")
    first = noise.trigger(ctx)["pattern"]
    assert torch.equal(first, noise.trigger(ctx)["pattern"])
    assert not torch.equal(first, noise.trigger(context(images(), seed=1))["pattern"])


def test_apply_changes_the_patch_only_and_lets_gradients_through() -> None:
    trigger = attack().trigger(context(images()))
    pixels = torch.rand(2, 3, 32, 32, requires_grad=True)
    stamped = attack().apply(trigger, pixels)
    inside = trigger["mask"].bool().expand(2, 3, 32, 32)
    assert torch.equal(stamped[~inside], pixels[~inside])
    assert torch.equal(stamped[inside], trigger["pattern"].expand(2, 3, 32, 32)[inside])
    stamped.sum().backward()
    assert pixels.grad is not None
    assert torch.equal(pixels.grad, 1.0 - trigger["mask"].expand(2, 3, 32, 32))


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["checkerboard", "white", "random"]),
    st.sampled_from([16, 32, 50]),
    st.integers(1, 32),
    st.integers(0, 5),
)
def test_stored_and_batched_images_agree(pattern: str, side: int, patch: int, seed: int) -> None:
    """uint8 rows of the poisoned split, read as floats, equal ``apply`` on the floats, bit by bit."""
    method = attack(pattern=pattern, patch=patch, rate=1.0)
    train = images(8, side)
    trigger = method.trigger(context(train, seed=seed))
    poisoned = method.poisoned(train, trigger, 1, torch.Generator().manual_seed(seed))
    changed = poisoned.targets != train.targets
    wanted = method.apply(trigger, train.inputs[changed].float() / 255.0)
    assert poisoned.inputs.dtype == torch.uint8
    assert torch.equal(poisoned.inputs[changed].float() / 255.0, wanted)


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1), st.integers(0, 3), st.integers(5, 60))
def test_poisoned_rows(rate: float, target: int, count: int) -> None:
    method, train = attack(rate=rate), images(count, 8)
    before = train.inputs.clone(), train.targets.clone()
    trigger = method.trigger(context(train))
    poisoned = method.poisoned(train, trigger, target, torch.Generator().manual_seed(0))
    assert torch.equal(train.inputs, before[0])
    assert torch.equal(train.targets, before[1])
    relabelled = poisoned.targets != train.targets
    assert int(relabelled.sum()) == min(round(rate * count), int((train.targets != target).sum()))
    assert (poisoned.targets[relabelled] == target).all()
    assert torch.equal(poisoned.inputs[~relabelled], train.inputs[~relabelled])
    stamped = trigger["mask"].bool()[0]
    assert torch.equal(poisoned.inputs[:, :, ~stamped], train.inputs[:, :, ~stamped])


def test_poison_trains_on_the_poisoned_split_with_the_stored_trigger() -> None:
    train, seen = images(), []
    stored = attack(pattern="white", patch=8).trigger(context(train))

    def fit(split: Split | None = None, loss: Any = None) -> Weights:
        seen.append(split)
        return {"w": torch.ones(1)}

    weights = attack().poison(context(train, fit=fit, trigger=stored))
    assert torch.equal(weights["w"], torch.ones(1))
    changed = seen[0].targets != train.targets
    assert int(changed.sum()) == 8
    assert (seen[0].inputs[changed][:, :, 24:, 24:] == 255).all()
    attack().poison(context(train, fit=fit, trigger=stored, seed=1))
    attack().poison(context(train, fit=fit, trigger=stored))
    assert torch.equal(seen[0].targets, seen[2].targets)
    assert not torch.equal(seen[0].targets, seen[1].targets)


def test_text_is_refused() -> None:
    with pytest.raises(ContractError, match="images"):
        attack().trigger(context(Split(["a", "b"], torch.tensor([0, 1]))))
