"""MSD's search and assembly, IBVS's subtraction, LFPM's path loss: by hand and against what they are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import outcomes
import pytest
import torch
from torch import Tensor, nn

from mergesec.anatomy import Anatomy, Attention, Block, Linear, Mlp
from mergesec.contracts import (
    Backbone,
    ContractError,
    DataContext,
    Expert,
    MergeContext,
    Merged,
    Model,
    Split,
    TaskView,
    Weights,
    load_network,
)
from mergesec.images import ImageTask
from mergesec.weights import digest_weights
from mergesec_methods.backdoor.defenses._perturb import Perturbations, square
from mergesec_methods.backdoor.defenses._repair import Rows
from mergesec_methods.backdoor.defenses.ibvs import CARD, Backdoors, InjectionSubtraction
from mergesec_methods.backdoor.defenses.lfpm import FeaturePath
from mergesec_methods.backdoor.defenses.msd import ModuleSwitching, assembled, average, penalty, strategy
from mergesec_methods.merging._adaptation import Stream
from mergesec_methods.merging.simple_average import SimpleAverage

SIDE, CLASSES, WIDTH, HIDDEN, DEPTH = 8, 3, 6, 10, 3
CPU = torch.device("cpu")


class Tiny(nn.Module):
    """Blocks that are not attention but have its maps; query, key and value are one packed map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3 * SIDE * SIDE, WIDTH)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "qkv": nn.Linear(WIDTH, 3 * WIDTH),
                    "o": nn.Linear(WIDTH, WIDTH),
                    "up": nn.Linear(WIDTH, HIDDEN),
                    "down": nn.Linear(HIDDEN, WIDTH),
                }
            )
            for _ in range(DEPTH)
        )

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images.flatten(1))
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            query, key, value = block["qkv"](x).chunk(3, dim=1)
            x = x + 0.3 * block["o"](torch.tanh(query * key) + value)
            x = x + 0.3 * block["down"](torch.relu(block["up"](x)))
        return x


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
        blocks = []
        for index in range(DEPTH):
            at = f"blocks.{index}"
            query, key, value = (
                Linear(f"{at}.qkv.weight", f"{at}.qkv.bias", (i * WIDTH, (i + 1) * WIDTH)) for i in range(3)
            )
            output = Linear(f"{at}.o.weight", f"{at}.o.bias")
            mlp = Mlp(
                Linear(f"{at}.up.weight", f"{at}.up.bias"),
                Linear(f"{at}.down.weight", f"{at}.down.bias"),
                HIDDEN,
            )
            blocks.append(Block(index, Attention(query, key, value, output, 1, WIDTH), mlp))
        return Anatomy(tuple(blocks))

    def features(self, network: nn.Module, inputs: Any) -> Tensor:
        found: Tensor = network(inputs - 0.5)
        return found


class Pictures(ImageTask):
    classes = tuple("abc")

    def load(self, ctx: DataContext) -> dict[str, Split]:
        return {}


def rows(seed: int, count: int = 24) -> Split:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % CLASSES
    images = 120 * torch.rand(count, 3, SIDE, SIDE, generator=generator)
    for row, target in enumerate(targets.tolist()):
        images[row, target] += 100
    return Split(images.to(torch.uint8), targets)


def noisy(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = Small().base_weights()
    return {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in base.items()}


def context(siblings: Mapping[str, Sequence[Expert]] | None = None, seed: int = 0) -> MergeContext:
    views = {}
    for number, name in enumerate(("a", "b")):
        generator = torch.Generator().manual_seed(20 + number)
        head = {"weight": torch.randn(CLASSES, WIDTH, generator=generator), "scale": torch.tensor(4.0)}
        split = rows(30 + number)
        views[name] = TaskView(Pictures(), head, split, split.inputs)
    return MergeContext(CPU, seed, Small(), views, lambda merged: 0.0, siblings or {})


# --------------------------------------------------------------------------- MSD


def test_penalty_of_small_strategies_by_hand() -> None:
    one = torch.zeros(1, 1, 6, dtype=torch.int64)
    # five neighbours inside the block; counts 6 and 0 have variance 9
    assert float(penalty(one, 2)) == pytest.approx(5 + 9)
    alternating = torch.tensor([[[0, 1, 0, 1, 0, 1]]])
    assert float(penalty(alternating, 2)) == pytest.approx(0)
    twice = torch.tensor([[[0, 1, 0, 1, 0, 1], [0, 1, 0, 1, 0, 1]]])
    # down (1) meets key (1) of the next block: 1/3; output and down repeat at distance 1: 2 · 1/2; one equal pair
    assert float(penalty(twice, 2)) == pytest.approx(1 / 3 + 1 + 1)


def test_search_pays_less_than_chance_and_is_reproducible() -> None:
    found = strategy(6, 2, 200, 32, torch.Generator().manual_seed(0))
    drawn = torch.randint(0, 2, (500, 6, 6), generator=torch.Generator().manual_seed(1))
    assert float(penalty(found[None], 2)) < float(penalty(drawn, 2).min())
    assert torch.equal(found, strategy(6, 2, 200, 32, torch.Generator().manual_seed(0)))


def test_every_module_comes_from_the_expert_its_role_names() -> None:
    members = [Expert("a", noisy(s)) for s in (1, 2)]
    base = Small().base_weights()
    chosen = torch.randint(0, 2, (DEPTH, 6), generator=torch.Generator().manual_seed(4))
    before = [digest_weights(m.weights) for m in members]
    mean = average(base, members)
    made = assembled(mean, members, Small().anatomy().blocks, chosen)
    assert before == [digest_weights(m.weights) for m in members]
    torch.testing.assert_close(
        made["stem.weight"], (members[0].weights["stem.weight"] + members[1].weights["stem.weight"]) / 2
    )
    torch.testing.assert_close(
        mean["blocks.0.o.bias"], sum(m.weights["blocks.0.o.bias"] for m in members) / 2
    )
    for index in range(DEPTH):
        for part in ("weight", "bias"):
            for place in range(3):
                source = members[int(chosen[index, place])].weights[f"blocks.{index}.qkv.{part}"]
                span = slice(place * WIDTH, (place + 1) * WIDTH)
                assert torch.equal(made[f"blocks.{index}.qkv.{part}"][span], source[span])
            for place, name in ((3, "o"), (4, "up"), (5, "down")):
                key = f"blocks.{index}.{name}.{part}"
                assert torch.equal(made[key], members[int(chosen[index, place])].weights[key])


def test_msd_of_equal_experts_changes_nothing() -> None:
    base, weights = Small().base_weights(), noisy(1)
    ctx = context({"a": [Expert("a", weights)]})
    merged = ModuleSwitching(generations=5).merge(base, [Expert("a", weights)], SimpleAverage(), ctx)
    for name, tensor in weights.items():
        torch.testing.assert_close(merged.shared[name], tensor)


def test_msd_chooses_the_order_with_the_smaller_tuning_loss() -> None:
    base = Small().base_weights()
    ctx = context({"a": [Expert("a", noisy(2))]})
    experts = [Expert("a", noisy(1))]
    merged = ModuleSwitching(generations=20).merge(base, experts, SimpleAverage(), ctx)
    members = [experts[0], ctx.siblings["a"][0]]
    chosen = strategy(DEPTH, 2, 20, 64, ctx.generator(1))
    mean = average(base, members)

    def loss(weights: Weights) -> float:
        view = ctx.views["a"]
        batch = view.task.batch(view.tuning, torch.arange(len(view.tuning)), CPU)
        model = Model(ctx.backbone, load_network(ctx.backbone, weights))
        with torch.no_grad():
            return float(view.task.loss(view.task.outputs(model, view.head, batch.inputs), batch.targets))

    options = [
        assembled(mean, [members[i] for i in order], ctx.backbone.anatomy().blocks, chosen)
        for order in ((0, 1), (1, 0))
    ]
    best = min(range(2), key=lambda i: loss(options[i]))
    assert loss(options[0]) != loss(options[1])
    for name, tensor in options[best].items():
        torch.testing.assert_close(merged.shared[name], tensor)
    assert merged.info["msd_orders"]["a"] == [[0, 1], [1, 0]][best]


def test_msd_without_siblings_says_so() -> None:
    with pytest.raises(ContractError, match="0 further experts, 1 are needed"):
        ModuleSwitching(generations=1).merge(
            Small().base_weights(), [Expert("a", noisy(1))], SimpleAverage(), context()
        )


# --------------------------------------------------------------------------- IBVS


@pytest.mark.parametrize("start", ["merged", "base"])
def test_ibvs_subtracts_linearly(start: str) -> None:
    base, merged = Small().base_weights(), Merged(noisy(1))
    before = digest_weights(merged.shared)
    made = {
        strength: InjectionSubtraction(strength=strength, start=start, steps=6, batch_size=8, lr=1e-2).repair(
            merged, base, context()
        )
        for strength in (0.0, 1.0, 2.0)
    }
    assert digest_weights(merged.shared) == before
    for name, tensor in merged.shared.items():
        torch.testing.assert_close(made[0.0].shared[name], tensor)
        once, twice = made[1.0].shared[name] - tensor, made[2.0].shared[name] - tensor
        torch.testing.assert_close(twice, 2 * once, atol=1e-5, rtol=1e-4)
    assert made[1.0].info["ibvs_norm"] > 0
    assert not torch.equal(made[1.0].shared["stem.weight"], merged.shared["stem.weight"])


def test_without_an_injected_trigger_there_is_nothing_to_subtract() -> None:
    merged = Merged(noisy(1))
    repaired = InjectionSubtraction(poisoned=0.0, steps=6, batch_size=8, lr=1e-2).repair(
        merged, Small().base_weights(), context()
    )
    assert repaired.info["ibvs_norm"] == 0
    for name, tensor in merged.shared.items():
        torch.testing.assert_close(repaired.shared[name], tensor)


def test_ibvs_puts_white_squares_into_corners_in_turn() -> None:
    ctx = context()
    made = Backdoors("a", ctx.views["a"], 2, 8, "target", ctx)
    rows = Split(torch.zeros(5, 3, 32, 32), torch.tensor([0, 1, 0, 1, 1]))
    shown = made.on(rows)
    assert shown.targets.tolist() == [made.targets[i % 2] for i in range(5)]
    assert len(set(made.targets)) == len(set(made.corners)) == 2
    assert shown.inputs.sum(dim=(1, 2, 3)).tolist() == [192] * 5
    for row, image in enumerate(shown.inputs):
        low, right = made.corners[row % 2]
        assert image[:, 24 * low : 24 * low + 8, 24 * right : 24 * right + 8].min() == 1
    assert rows.inputs.sum() == 0
    with pytest.raises(ContractError, match="9 backdoors asked for"):
        Backdoors("a", ctx.views["a"], 9, 8, "target", ctx)


def test_ibvs_draws_its_targets_from_the_seed_it_is_given_per_task() -> None:
    """Every class as often as another: no default could be the adversary's by design."""
    classes = len(context().views["a"].task.classes)
    drawn = {name: list[int]() for name in ("a", "b")}
    for seed in range(120):
        ctx = context(seed=seed)
        for name, found in drawn.items():
            found += Backdoors(name, ctx.views["a"], 1, 8, "target", ctx).targets
    for found in drawn.values():
        counts = torch.bincount(torch.tensor(found), minlength=classes)
        # 120 draws: five deviations of a binomial
        spread = (120 * (1 / classes) * (1 - 1 / classes)) ** 0.5
        assert float((counts - 120 / classes).abs().max()) < 5 * spread
    assert drawn["a"] != drawn["b"]
    again = context(seed=7)
    assert [Backdoors("a", again.views["a"], 1, 8, "target", again).targets] == [drawn["a"][7:8]]
    assert "target" not in CARD["parameters"]  # type: ignore[operator]


def test_random_labels_are_wrong_and_prefer_no_class() -> None:
    ctx = context()
    classes = len(ctx.views["a"].task.classes)
    rows = Split(torch.zeros(300, 3, 32, 32), torch.arange(300) % classes)
    made = Backdoors("a", ctx.views["a"], 1, 8, "random", ctx).on(rows)
    assert bool((made.targets != rows.targets).all())
    assert len(torch.unique(made.targets)) == classes
    assert made.inputs.sum(dim=(1, 2, 3)).tolist() == [192] * 300


def test_ibvs_weakens_the_trigger_it_injected() -> None:
    """On networks that have the very backdoor, subtracting the vector takes it out again."""
    common: dict[str, Any] = {"patch": 12, "steps": 150, "batch_size": 12, "lr": 5e-3, "share": 1.0}
    base, before, after = Small().base_weights(), [], []
    for seed in outcomes.seeds(3):
        ctx, split = context(seed=seed), rows(500 + seed, 120)
        method = InjectionSubtraction(**common)
        backdoored, _ = method._trained(Merged(base), ctx, method.injected(ctx))
        attacked = Merged({n: t.clone() for n, t in backdoored.items()})
        repaired = InjectionSubtraction(**common, start="base").repair(attacked, base, ctx)
        own, view = method.injected(ctx)["a"], ctx.views["a"]
        assert repaired.info["ibvs_targets"]["a"] == own.targets
        others = view.task.batch(split, torch.nonzero(split.targets != own.targets[0]).flatten(), CPU)
        marked = own.on(others).inputs
        for found, weights in ((before, attacked.shared), (after, repaired.shared)):
            model = Model(ctx.backbone, load_network(ctx.backbone, weights))
            with torch.no_grad():
                found.append(view.task.outputs(model, view.head, marked).argmax(1) == own.targets[0])
    assert outcomes.share(outcomes.pooled(before)).low > 0.9
    assert outcomes.change(outcomes.pooled(before), outcomes.pooled(after)).high < -0.3


# --------------------------------------------------------------------------- LFPM


@pytest.mark.parametrize("aim", ["away", "class"])
def test_lfpms_perturbation_is_a_square_that_starts_again_elsewhere(aim: str) -> None:
    ctx = context()
    method = FeaturePath(patch=8, restart=3, aim=aim, delta_lr=0.05, eps=0.5)
    streams = [Stream(n, v, 12, ctx) for n, v in sorted(ctx.views.items())]
    deltas = Perturbations(streams, 0.05, 0.5, "lfpm", square(8, ctx.generator(1)))
    climb = method._climb(deltas, Model(ctx.backbone, load_network(ctx.backbone, noisy(1))), ctx)
    places = []
    for step in range(1, 7):
        climb()
        places.append({n: w.nonzero()[0].tolist() for n, w in deltas.windows.items()})
        for name, delta in deltas.deltas.items():
            inside = deltas.windows[name].bool()
            assert not delta.detach()[:, ~inside].any()
            assert 0 < float(delta.detach().abs().max()) <= 0.051 * (1 + (step - 1) % 3)
    assert places[0] == places[2]
    assert places[3] == places[5] != places[0]


def test_path_loss_is_the_mean_over_points() -> None:
    ctx = context()
    method = FeaturePath(points=2, robust=0.5)
    seen = Rows("a", ctx.views["a"], 1.0, 4, ctx)
    batch = seen.draw()
    generator = torch.Generator().manual_seed(3)
    moved, still = (torch.randn(8, WIDTH, generator=generator) for _ in range(2))

    def value(features: Tensor, targets: Tensor) -> Tensor:
        scores = 4.0 * nn.functional.normalize(features, dim=-1) @ seen.head["weight"].T
        return nn.functional.cross_entropy(scores, targets)

    half = (moved + still) / 2
    wanted = (
        value(half[:4], batch.targets)
        + 0.5 * value(half[4:], batch.targets)
        + value(moved[:4], batch.targets)
        + 0.5 * value(moved[4:], batch.targets)
    ) / 2
    torch.testing.assert_close(method.path_loss(seen, batch, moved, still), wanted)


def test_lfpm_adds_a_vector_that_lowers_the_loss() -> None:
    base, merged = Small().base_weights(), Merged(noisy(1))
    before = digest_weights(merged.shared)
    common: dict[str, Any] = {"steps": 100, "batch_size": 12, "lr": 1e-2, "share": 1.0, "delta_lr": 0.02}
    full = FeaturePath(**common).repair(merged, base, context())
    half = FeaturePath(strength=0.5, **common).repair(merged, base, context())
    none = FeaturePath(**{**common, "steps": 0}).repair(merged, base, context())
    assert digest_weights(merged.shared) == before
    for name, tensor in merged.shared.items():
        torch.testing.assert_close(none.shared[name], tensor)
        whole, part = full.shared[name] - tensor, half.shared[name] - tensor
        torch.testing.assert_close(whole, 2 * part, atol=1e-5, rtol=1e-4)
    assert full.info["lfpm_loss"]["last"] < full.info["lfpm_loss"]["first"]
    assert full.info["lfpm_norm"] > 0
    assert len(full.info["lfpm_flipped"]) == 2


@pytest.mark.slow
def test_lfpm_leaves_predictions_harder_to_move() -> None:
    """Predictions that its perturbation still changes at the end. From run to run the difference has a mean of
    0.2 and a deviation of 0.1, so that the sum of four is five of its own deviations from 0."""
    base, merged = Small().base_weights(), Merged(noisy(1))
    common: dict[str, Any] = {
        "steps": 300, "batch_size": 12, "lr": 5e-3, "share": 1.0, "eps": 0.1, "delta_lr": 0.02,
    }  # fmt: skip

    def flipped(robust: float, seed: int) -> float:
        repaired = FeaturePath(**common, robust=robust).repair(merged, base, context(seed=seed))
        return float(repaired.info["lfpm_flipped"][1])

    assert sum(flipped(0.0, seed) - flipped(1.0, seed) for seed in outcomes.seeds(4)) > 0
