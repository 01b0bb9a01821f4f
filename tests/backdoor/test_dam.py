"""DAM: its ablation is Concrete AdaMerging, its steps are a plain autograd loop, its perturbations live in pixels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import outcomes
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from mergesec.anatomy import Anatomy
from mergesec.classification import logits
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
from mergesec.planning.catalog import load_catalog
from mergesec.planning.gridspec import load_grid
from mergesec.planning.resolve import resolve
from mergesec.weights import digest_weights
from mergesec_methods.backdoor.defenses._perturb import SAFETIES, Perturbations, Safety
from mergesec_methods.backdoor.defenses.dam import CARD, DefenseAwareMerging, sparsities
from mergesec_methods.merging._adaptation import Blend, Stream, entropy, streams_of
from mergesec_methods.merging._concrete import ConcreteMask, learn_mask
from mergesec_methods.merging.concrete import ConcreteAdaMerging
from mergesec_methods.merging.emr import Emr
from mergesec_methods.merging.simple_average import SimpleAverage

CPU = torch.device("cpu")
WIDTH, SIDE, COUNT = 6, 4, 3
MEAN, SPREAD = 0.5, 0.25


class TinyNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix = nn.Linear(3 * SIDE * SIDE, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("count", torch.arange(3))

    def forward(self, images: Tensor) -> Tensor:
        x = torch.tanh(self.stem(images.flatten(1)))
        return x + torch.tanh(self.mix(x))


class TinyBackbone(Backbone):
    """Normalises inside, as backbones do; remembers the range of what it was shown."""

    low, high = 1.0, 0.0

    def build(self) -> nn.Module:
        return TinyNet()

    def base_weights(self) -> Weights:
        return weights(0)

    def anatomy(self) -> Anatomy:
        return Anatomy(())

    def features(self, network: nn.Module, inputs: Any) -> Tensor:
        self.low, self.high = (
            min(self.low, float(inputs.detach().min())),
            max(self.high, float(inputs.detach().max())),
        )
        return cast(Tensor, network((inputs - MEAN) / SPREAD))


class TinyTask(ImageTask):
    classes = ("a", "b", "c")

    def load(self, ctx: DataContext) -> dict[str, Split]:
        raise NotImplementedError


def weights(seed: int, scale: float = 0.5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: scale * torch.randn(t.shape, generator=generator) if t.is_floating_point() else t.clone()
        for n, t in TinyNet().state_dict().items()
    }


def experts() -> list[Expert]:
    base = weights(0)
    found = []
    for index in range(COUNT):
        noise = weights(10 + index, 0.3)
        found.append(
            Expert(f"task{index}", {n: t + noise[n] if t.is_floating_point() else t for n, t in base.items()})
        )
    return found


def context(seed: int = 0, rows: int = 24) -> MergeContext:
    views = {}
    for index in range(COUNT):
        generator = torch.Generator().manual_seed(50 + index)
        images = torch.randint(0, 256, (rows, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
        head = {"weight": torch.randn(3, WIDTH, generator=generator), "scale": torch.tensor(4.0)}
        split = Split(images, torch.randint(0, 3, (rows,), generator=generator))
        views[f"task{index}"] = TaskView(TinyTask(), head, split, images)
    return MergeContext(CPU, seed, TinyBackbone(), views, lambda merged: 0.0)


def dam(**given: Any) -> DefenseAwareMerging:
    defaults: dict[str, Any] = {
        "masks": "single", "granularity": "task", "init": 0.3, "steps": 3, "adamerging_steps": 3, "batch_size": 8,
        "mask_lr": 1e-2, "inner_lr": 1.0, "lr": 1e-3, "adv_lr": 1e-2, "adv_weight": 0.1, "eps": 0.1,
        "temperature": 0.5, "initial": 0.0, "final": "continuous",
    }  # fmt: skip
    return DefenseAwareMerging(**{**defaults, **given})


def merge(method: DefenseAwareMerging, ctx: MergeContext | None = None, order: Any = None) -> Merged:
    given = experts() if order is None else [experts()[i] for i in order]
    return method.merge(weights(0), given, SimpleAverage(), ctx or context())


# --------------------------------------------------------------------------- the ablation


@pytest.mark.parametrize("final", ["continuous", "discrete"])
@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_without_the_safety_term_it_is_concrete_adamerging(granularity: str, final: str) -> None:
    ctx = context()
    concrete = ConcreteAdaMerging(granularity, 0.3, 1e-2, 1.0, 4, 1e-3, 3, 8, 0.5, final)
    wanted = concrete.merge(weights(0), experts(), ctx)
    found = merge(dam(granularity=granularity, final=final, steps=4, adv_weight=0.0), ctx)
    assert digest_weights(found.shared) == digest_weights(wanted.shared)
    assert found.info["coefficients"] == wanted.info["coefficients"]
    assert not any(found.info["perturbation"].values())
    other = merge(dam(granularity=granularity, final=final, steps=4, adv_weight=3.0), ctx)
    assert digest_weights(other.shared) != digest_weights(wanted.shared)


def test_a_vanishing_safety_term_changes_nothing_although_perturbations_are_trained() -> None:
    """They draw batches of their own, so the other steps see the ablation's."""
    plain, found = merge(dam(adv_weight=0.0)), merge(dam(adv_weight=1e-12))
    assert max(found.info["perturbation"].values()) > 0.01
    for name, tensor in plain.shared.items():
        torch.testing.assert_close(found.shared[name], tensor, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------- a plain autograd loop


class Replayed(ConcreteMask):
    """A mask with noise from a list."""

    noises: list[Tensor]

    def sample(self, noise: Tensor | None = None) -> Tensor:
        return super().sample(self.noises.pop(0) if noise is None else noise)


def noises(count: int, size: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(size, generator=generator) * 0.98 + 0.01 for _ in range(count)]


class Plain:
    """The released loop in its own words: everything a graph, nothing flat, pixels as they are."""

    def __init__(self, ctx: MergeContext, granularity: str) -> None:
        self.ctx, self.network, self.base = ctx, load_network(TinyBackbone(), weights(0)), weights(0)
        self.names = sorted(n for n, t in self.base.items() if t.is_floating_point())
        self.vectors = [{n: e.weights[n] - self.base[n] for n in self.names} for e in experts()]
        columns = 1 if granularity == "task" else len(self.names)
        self.inner = nn.Parameter(torch.full((COUNT, columns), 0.3))
        self.inner_adam = torch.optim.Adam([self.inner], lr=1.0)
        self.deltas = {t: torch.zeros(3, SIDE, SIDE, requires_grad=True) for t in sorted(ctx.views)}
        self.delta_adam = torch.optim.Adam(list(self.deltas.values()), lr=1e-2)
        self.streams = {t: Stream(t, v, 8, ctx) for t, v in sorted(ctx.views.items())}
        self.probes = {t: Stream(t, v, 8, ctx, "perturb") for t, v in sorted(ctx.views.items())}

    def mask(self, noise: Tensor, logit: Tensor) -> dict[str, Tensor]:
        found, position = {}, 0
        for name in self.names:
            span = slice(position, position + self.base[name].numel())
            position = span.stop
            soft = torch.sigmoid((torch.log(noise[span]) - torch.log1p(-noise[span]) + logit[span]) / 0.5)
            found[name] = (soft / soft.mean()).view(self.base[name].shape)
        return found

    def state(self, mask: dict[str, Tensor], coefficients: Tensor) -> dict[str, Tensor]:
        wide = coefficients.expand(-1, len(self.names))
        return {
            n: self.base[n] + mask[n] * sum(wide[i, k] * v[n] for i, v in enumerate(self.vectors))
            for k, n in enumerate(self.names)
        }

    def images(self, streams: dict[str, Stream]) -> dict[str, Tensor]:
        return {t: self.ctx.views[t].tuning.inputs[s.draw()].float() / 255 for t, s in streams.items()}

    def scores(self, state: dict[str, Tensor], task: str, images: Tensor) -> Tensor:
        features = functional_call(self.network, state, ((images - MEAN) / SPREAD,))
        return logits(features, self.ctx.views[task].head)

    def entropies(self, state: dict[str, Tensor], images: dict[str, Tensor]) -> Tensor:
        return torch.stack([entropy(self.scores(state, t, x)) for t, x in images.items()]).sum()

    def adapt(self, mask: dict[str, Tensor]) -> None:
        detached = {n: m.detach() for n, m in mask.items()}
        loss = self.entropies(self.state(detached, self.inner), self.images(self.streams))
        self.inner_adam.zero_grad()
        loss.backward()
        self.inner.data = torch.full_like(self.inner.data, 0.3)
        self.inner_adam.step()

    def perturb(self, state: dict[str, Tensor], eps: float) -> None:
        fixed = {n: t.detach() for n, t in state.items()}
        self.delta_adam.zero_grad()
        for task, images in self.images(self.probes).items():
            labels = self.scores(fixed, task, images).argmax(-1)
            moved = self.scores(fixed, task, (images + self.deltas[task]).clamp(0, 1))
            (-functional.cross_entropy(moved, labels)).backward()
        self.delta_adam.step()
        for delta in self.deltas.values():
            delta.data.clamp_(-eps, eps)

    def safety(self, state: dict[str, Tensor], weight: float, kind: str) -> Tensor:
        images = self.images(self.streams)
        moved = {t: (x + self.deltas[t].detach()).clamp(0, 1) for t, x in images.items()}
        if kind == "published":
            return self.entropies(state, images) + weight * self.entropies(state, moved)
        agreed = [
            functional.cross_entropy(self.scores(state, t, moved[t]), self.scores(state, t, x).argmax(-1))
            for t, x in images.items()
        ]
        return self.entropies(state, images) + weight * torch.stack(agreed).sum()


@pytest.mark.parametrize("kind", ["published", "agreement"])
@pytest.mark.parametrize("granularity", ["task", "layer"])
@pytest.mark.parametrize("masks", ["single", "two"])
def test_steps_equal_a_plain_autograd_loop(masks: str, granularity: str, kind: str) -> None:
    ctx, steps, eps, weight, rate = context(), 3, 0.025, 0.7, 1e-2
    blend = Blend(weights(0), experts(), TinyBackbone(), CPU)
    size, pair = blend.layout.size, masks == "two"
    first, second = noises(2 * steps if pair else steps, size, 1), noises(steps, size, 2)
    method = dam(masks=masks, granularity=granularity, steps=steps, mask_lr=rate, adv_weight=weight)
    streams = streams_of(experts(), 8, ctx)
    moves = Perturbations(streams_of(experts(), 8, ctx, "perturb"), 1e-2, eps, "dam")
    safety = Safety(blend, streams, moves, weight, robust=SAFETIES[kind])
    start = blend.coefficients(granularity, 0.3)
    learnt = [Replayed(blend, 0.5, ctx, stream) for stream in range(2 if pair else 1)]
    for mask, held in zip(learnt, (first, second), strict=False):
        mask.noises = list(held)
    if pair:
        method._alternate(blend, learnt, streams, start, safety)
    else:
        learn_mask(blend, learnt[0], streams, start, rate, steps, 1.0, safety)

    plain = Plain(ctx, granularity)
    wanted = [torch.zeros(size, requires_grad=True) for _ in learnt]
    adams = [torch.optim.Adam([logit], lr=rate) for logit in wanted]

    def descend(which: int, loss: Tensor) -> None:
        adams[which].zero_grad()
        loss.backward()
        adams[which].step()

    def product(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: a[n] * b[n] for n in a}

    def frozen(a: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: t.detach() for n, t in a.items()}

    for step in range(steps):
        if pair:
            one, two = plain.mask(first[2 * step], wanted[0]), plain.mask(second[step], wanted[1])
            plain.adapt(product(one, two))
            state = plain.state(product(one, frozen(two)), plain.inner.detach())
            descend(0, plain.entropies(state, plain.images(plain.streams)))
            one = frozen(plain.mask(first[2 * step + 1], wanted[0]))
            state = plain.state(product(one, two), plain.inner.detach())
        else:
            one = plain.mask(first[step], wanted[0])
            plain.adapt(one)
            state = plain.state(one, plain.inner.detach())
        plain.perturb(state, eps)
        descend(-1, plain.safety(state, weight, kind))
    for found, logit in zip(learnt, wanted, strict=True):
        assert float(logit.detach().abs().max()) > 0.02
        torch.testing.assert_close(found.logits, logit.detach(), rtol=1e-3, atol=2e-4)
    for task, delta in plain.deltas.items():
        assert float(delta.detach().abs().max()) == pytest.approx(eps)
        # Adam divides by the gradient's size: where that is next to 0, rounding shows
        torch.testing.assert_close(moves.deltas[task].detach(), delta.detach(), rtol=0, atol=2e-3)


# --------------------------------------------------------------------------- variants


def test_the_mean_mask_is_no_draw_and_an_untrained_one_is_no_mask() -> None:
    """One relaxed sample halves every other entry at random; the mean of the untrained distribution is 1 throughout."""
    plain = {
        n: t + 0.3 * sum(e.weights[n] - t for e in experts()) if t.is_floating_point() else t
        for n, t in weights(0).items()
    }
    untrained = {"steps": 0, "adamerging_steps": 0}
    for masks in ("single", "two"):
        found = merge(dam(final="mean", masks=masks, **untrained)).shared
        for name, tensor in plain.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
    drawn = merge(dam(final="continuous", **untrained)).shared
    assert float((drawn["stem.weight"] - plain["stem.weight"]).abs().max()) > 0.1
    trained = merge(dam(final="mean", mask_lr=0.1, steps=5)).info["mask_sparsity"]
    assert {round(share, 6) for share in trained.values()} != {0.0}


def test_agreement_leads_perturbed_answers_back_where_entropy_only_wants_them_sure() -> None:
    found = {kind: merge(dam(safety=kind, adv_weight=2.0, steps=5)) for kind in ("published", "agreement")}
    assert digest_weights(found["published"].shared) == digest_weights(
        merge(dam(adv_weight=2.0, steps=5)).shared
    )
    assert digest_weights(found["published"].shared) != digest_weights(found["agreement"].shared)


def test_defaults_are_the_published_budget_and_no_preset_has_less() -> None:
    """How far the masks' logits and the coefficients may travel: step size times steps, 1.0 and 1.0 as released."""
    card = cast(dict[str, Any], CARD["parameters"])
    default = {n: p["default"] for n, p in card.items()}
    assert default["mask_lr"] * default["steps"] == default["lr"] * default["adamerging_steps"] == 1.0
    catalog, seen = load_catalog(), 0
    for name in ("mini-backdoor-masks", "mini-backdoor-dam", "mini-backdoor-adaptive"):
        for ref in resolve(load_grid(name, []), catalog).defenses:
            if ref.name == "dam":
                given, seen = dict(ref.parameters), seen + 1
                assert given["mask_lr"] * given["steps"] >= 1.0
                assert given["lr"] * given["adamerging_steps"] >= 1.0
                assert given["adv_lr"] * given["steps"] <= default["eps"] * 3
                assert "granularity=" in ref.label  # never the default of whoever is beside it
    assert seen >= 10


# --------------------------------------------------------------------------- perturbations


def test_perturbations_stay_in_pixels_and_leave_the_networks_gradient_alone() -> None:
    ctx, blend = context(), Blend(weights(0), experts(), TinyBackbone(), CPU)
    blend.assemble(blend.coefficients("task", 0.3))
    streams = streams_of(experts(), 8, ctx)
    moves = Perturbations(streams, 0.5, 0.3, "dam")
    spy = TinyBackbone()
    before = blend.weights.clone()
    for _ in range(5):
        moves.ascend(Model(spy, blend.model.network))
    assert spy.low >= 0.0
    assert spy.high <= 1.0
    assert list(moves.largest().values()) == pytest.approx([0.3] * COUNT)
    assert not blend.gradient.any()
    assert torch.equal(blend.weights, before)
    black = torch.zeros(2, 3, SIDE, SIDE)
    for stream in streams:  # a change for the darker is lost on black pixels only
        assert torch.equal(moves.fixed(stream, black)[0], moves.deltas[stream.name].detach().clamp(min=0))
        grey = moves.fixed(stream, black + 0.5) - 0.5
        torch.testing.assert_close(grey[0], moves.deltas[stream.name].detach())


def test_perturbations_find_what_changes_predictions() -> None:
    """They climb the cross-entropy to what the model says of clean images, past any random change of their size."""
    ctx, blend = context(), Blend(weights(0), experts(), TinyBackbone(), CPU)
    blend.assemble(blend.coefficients("task", 0.3))
    moves = Perturbations(streams_of(experts(), 24, ctx), 0.02, 0.1, "dam")
    for _ in range(40):
        moves.ascend(blend.model)
    noise = torch.Generator().manual_seed(0)
    for stream in moves.streams:
        images = ctx.views[stream.name].tuning.inputs.float() / 255
        with torch.no_grad():
            labels = stream.outputs(blend.model, images).argmax(-1)

            def climbed(moved: Tensor, stream: Stream = stream, labels: Tensor = labels) -> float:
                return float(functional.cross_entropy(stream.outputs(blend.model, moved), labels))

            signs = [
                0.1 * torch.randint(0, 2, images.shape[1:], generator=noise).mul(2).sub(1) for _ in range(50)
            ]
            shaken = max(climbed((images + change).clamp(0, 1)) for change in signs)
            assert climbed(moves.fixed(stream, images)) > shaken
    assert moves.flipped[0] == 0.0
    assert moves.flipped[-1] > 0.2


def test_inputs_that_are_no_images_are_refused() -> None:
    ctx = context()
    views = {n: replace(v, unlabelled=["some", "text"]) for n, v in ctx.views.items()}
    with pytest.raises(ContractError, match="dam: task 'task0' has no images"):
        merge(dam(), replace(ctx, views=views))


# --------------------------------------------------------------------------- the merge


@pytest.mark.parametrize("masks", ["single", "two"])
def test_runs_repeat_and_leave_their_inputs_alone(masks: str) -> None:
    given, ctx = experts(), context()
    before = [digest_weights(e.weights) for e in given]
    first = merge(dam(masks=masks), ctx)
    assert before == [digest_weights(e.weights) for e in given]
    assert digest_weights(first.shared) == digest_weights(merge(dam(masks=masks)).shared)
    assert digest_weights(first.shared) != digest_weights(merge(dam(masks=masks), context(1)).shared)
    for name, tensor in merge(dam(masks=masks), order=(2, 0, 1)).shared.items():
        torch.testing.assert_close(first.shared[name], tensor, rtol=0, atol=1e-4)
    assert torch.equal(first.shared["count"], weights(0)["count"])
    same = [Expert(f"task{i}", weights(0)) for i in range(COUNT)]
    unmoved = dam(masks=masks).merge(weights(0), same, SimpleAverage(), ctx)
    assert digest_weights(unmoved.shared) == digest_weights(weights(0))


@pytest.mark.parametrize("masks", ["single", "two"])
@pytest.mark.parametrize(("initial", "share"), [(30.0, 0.0), (-30.0, 1.0), (0.0, 0.5)])
def test_sparsity_per_tensor(masks: str, initial: float, share: float) -> None:
    info = merge(dam(masks=masks, initial=initial, steps=0, adamerging_steps=0)).info
    assert set(info["mask_sparsity"]) == {"stem.weight", "stem.bias", "mix.weight", "mix.bias"}
    wanted = 1 - (1 - share) ** 2 if masks == "two" else share
    assert info["mask_sparsity"]["stem.weight"] == pytest.approx(wanted, abs=0.12)  # 288 entries
    assert ("mask_sparsity_detection" in info) == (masks == "two")


def test_sparsity_of_a_discrete_mask_is_its_share_of_zeros() -> None:
    blend = Blend(weights(0), experts(), TinyBackbone(), CPU)
    mask = ConcreteMask(blend, 0.5, context())
    mask.logits += 0.8
    drawn = mask.discrete()
    start, stop = blend.layout.spans["stem.weight"]
    wanted = float((drawn[start:stop] == 0).float().mean())
    assert sparsities(blend, [mask])["mask_sparsity"]["stem.weight"] == pytest.approx(wanted)
    assert 0.1 < wanted < 0.6


@pytest.mark.slow
def learnt_on_one_draw(masks: str, weight: float, seed: int) -> tuple[float, float]:
    """Entropy on perturbed images before and after 60 steps of the masks. Noise and perturbations are held and
    every batch has all rows, so that the steps descend one function of the masks' logits."""
    ctx, blend = context(seed), Blend(weights(0), experts(), TinyBackbone(), CPU)
    method = dam(masks=masks, steps=60, mask_lr=0.1, inner_lr=0.0, adv_weight=weight)
    streams, moves = (
        streams_of(experts(), 24, ctx),
        Perturbations(streams_of(experts(), 24, ctx, "perturb"), 0.02, 0.1, "dam"),
    )
    start = blend.coefficients("task", 0.3)
    blend.assemble(start)
    for _ in range(30):
        moves.ascend(blend.model)
    moves._optimizer.param_groups[0]["lr"] = 0.0
    learnt = [Replayed(blend, 0.5, ctx, stream) for stream in range(1 if masks == "single" else 2)]
    held = noises(len(learnt), blend.layout.size, seed)

    def perturbed() -> float:
        drawn = torch.stack([mask.sample(noise) for mask, noise in zip(learnt, held, strict=True)])
        blend.assemble(start, drawn.prod(0))
        with torch.no_grad():
            images = [(s, moves.fixed(s, s.rows.inputs.float() / 255)) for s in streams]
            return sum(float(entropy(s.outputs(blend.model, x))) for s, x in images)

    before, safety = perturbed(), Safety(blend, streams, moves, weight)
    for mask, noise in zip(learnt, held, strict=True):
        mask.noises = [noise] * 120
    if masks == "two":
        method._alternate(blend, learnt, streams, start, safety)
    else:
        learn_mask(blend, learnt[0], streams, start, 0.1, 60, 0.0, safety)
    return before, perturbed()


@pytest.mark.slow
@pytest.mark.parametrize("masks", ["single", "two"])
def test_the_safety_term_makes_predictions_surer_under_the_perturbation(masks: str) -> None:
    """What the term adds to the objective falls, and by far more than where it has no weight."""
    for seed in outcomes.seeds(2):
        before, after = learnt_on_one_draw(masks, 5.0, seed)
        _, without = learnt_on_one_draw(masks, 0.0, seed)
        assert after < 0.7 * before
        assert after < 0.8 * without


def test_methods_with_networks_of_their_own_are_refused() -> None:
    with pytest.raises(ContractError, match="takes the place of the merge"):
        dam().merge(weights(0), experts(), Emr("tensor_means"), context())
