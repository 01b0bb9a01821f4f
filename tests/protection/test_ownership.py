"""Ownership marks: read in the marked network and its merges, in no network that was not marked."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import outcomes
import pytest
import torch
from scipy.stats import binom, binomtest
from torch import Tensor, nn

from mergesec.classification import ClassificationTask
from mergesec.contracts import (
    Adapted,
    Backbone,
    ContractError,
    DataContext,
    ProtectContext,
    Split,
    TaskView,
    load_network,
)
from mergesec.images import ImageTask
from mergesec_methods.protection.defenses._marks import decide
from mergesec_methods.protection.defenses.fingerprint import Fingerprint, decode, diluted, encode
from mergesec_methods.protection.defenses.fingerprint_mat import MergeAdversarialFingerprint
from mergesec_methods.protection.defenses.watermark import Watermark, added, bit_error, carriers, chosen

CPU = torch.device("cpu")


@pytest.mark.parametrize("hits", [0, 5, 20, 32])
def test_the_decision_is_the_exact_binomial_test(hits: int) -> None:
    found = decide(torch.arange(32) < hits, 0.25, 1e-3)
    exact = binomtest(hits, 32, 0.25, alternative="greater").pvalue
    assert found.statistic == pytest.approx(exact, abs=1e-15)
    assert found.detected == (exact < 1e-3)
    assert not decide(torch.ones(32, dtype=torch.bool), 1.0, 1e-3).detected


# ------------------------------------------------------------------ watermark


class Held(nn.Module):
    """A suspect that is nothing but its weights."""

    def __init__(self, weights: dict) -> None:
        super().__init__()
        self.weights = weights

    def state_dict(self) -> dict:  # type: ignore[override]
        return self.weights


def base_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"b.weight": (120, 200), "a.weight": (90, 100), "a.bias": (90,), "c.kernel": (8, 3, 5, 5)}
    weights = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    return {**weights, "steps": torch.tensor(3)}


def expert_weights(base: dict, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: t + 0.03 * torch.randn(t.shape, generator=generator) if t.is_floating_point() else t
        for n, t in base.items()
    }


def marked(defense: Watermark, seed: int = 0) -> tuple[dict, dict, Any, ProtectContext]:
    """Base, expert, protected expert, and the owner's context."""
    base = base_weights()
    expert = expert_weights(base, 1)
    ctx = ProtectContext(CPU, seed, None, base, None)  # type: ignore[arg-type]
    ctx = replace(ctx, secret=defense.secret(expert, ctx))
    return base, expert, defense.protect(expert, ctx), ctx


def summed(base: dict, scaling: float, *experts: dict) -> dict[str, Tensor]:
    return {
        n: t + scaling * sum(e[n] - t for e in experts) if t.is_floating_point() else t
        for n, t in base.items()
    }


def test_watermark_reads_with_its_margin_and_leaves_the_rest() -> None:
    defense = Watermark(bits=64, margin=3.0)
    base, expert, protected, ctx = marked(defense)
    before = {n: t.clone() for n, t in expert.items()}
    bits = 2 * ctx.secret["bits"].double() - 1
    readings = bits * (
        ctx.secret["signs"].double() @ chosen(protected.weights, base, ctx.secret["positions"])
    )
    scale = chosen(expert, base, ctx.secret["positions"]).norm()
    assert readings.min() == pytest.approx(3.0 * float(scale), rel=1e-4)
    found = defense.verify(Held(protected.weights), ctx)
    assert found.hits.all()
    assert found.statistic == pytest.approx(2.0**-64)
    assert all(torch.equal(before[n], t) for n, t in expert.items())
    assert torch.equal(protected.weights["a.bias"], expert["a.bias"])
    assert protected.weights["steps"] == 3
    changed = sum(int((protected.weights[n] != t).sum()) for n, t in expert.items())
    assert 0.95 * len(ctx.secret["positions"]) < changed <= len(ctx.secret["positions"])


def test_watermark_update_is_the_smallest_with_its_readings() -> None:
    """Any other update with the same readings differs by something the projections do not see."""
    base, expert, protected, ctx = marked(Watermark(bits=16, entries=500, margin=3.0))
    positions, signs = ctx.secret["positions"], ctx.secret["signs"].double()
    update = chosen(protected.weights, base, positions) - chosen(expert, base, positions)
    unseen = torch.randn(len(positions), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    unseen -= signs.T @ torch.linalg.solve(signs @ signs.T, signs @ unseen)
    assert abs(float(update @ unseen)) < 1e-5 * float(update.norm() * unseen.norm())
    scale = float(chosen(expert, base, positions).norm())
    assert protected.report["update"] == pytest.approx(float(update.norm()) / scale, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("others", [1, 3, 7])
def test_watermark_survives_merging_as_the_theory_says_at_any_coefficient(others: int) -> None:
    defense = Watermark(bits=512, margin=2.0)
    base, _, protected, ctx = marked(defense)
    bound = bit_error(2.0, others)
    crowd = [expert_weights(base, 100 + i) for i in range(others)]
    errors = []
    for scaling in (0.05, 0.3, 1.0, 1 / (others + 1)):
        found = defense.verify(Held(summed(base, scaling, protected.weights, *crowd)), ctx)
        assert found.detected
        errors.append(int((~found.hits).sum()))
    # readings are at least the margin, so the bound holds from above; one side of the exact test
    assert binom.sf(max(errors) - 1, 512, bound) > 1e-3
    assert max(errors) - min(errors) <= 2
    assert others == 1 or binom.cdf(min(errors), 512, 0.7 * bound) > 1e-3


def test_no_unmarked_network_bears_the_watermark() -> None:
    """64 owners ask four strangers: matches are fair coins, and at 1e-3 none of 256 tests should fire often."""
    base = base_weights()
    strangers = [expert_weights(base, s) for s in (1, 2, 3)]
    strangers.append(summed(base, 0.5, *strangers))
    defense = Watermark(bits=32, entries=400)
    matches, fired = 0, 0
    for seed in range(64):
        ctx = ProtectContext(CPU, seed, None, base, None)  # type: ignore[arg-type]
        ctx = replace(ctx, secret=defense.secret(strangers[0], ctx))
        for weights in strangers:
            found = defense.verify(Held(weights), ctx)
            matches, fired = matches + int(found.hits.sum()), fired + found.detected
        assert not defense.verify(Held(base), ctx).hits.any()
    assert binomtest(matches, 64 * 4 * 32, 0.5).pvalue > 1e-3
    assert fired <= 2


def test_watermark_of_another_owner_is_not_read() -> None:
    defense = Watermark()
    _, _, protected, _ = marked(defense, seed=0)
    _, _, _, other = marked(defense, seed=1)
    assert not defense.verify(Held(protected.weights), other).detected


def test_watermark_survives_rounding_and_dropping() -> None:
    defense = Watermark()
    base, expert, protected, ctx = marked(defense)
    rounded = {n: t.bfloat16().float() if t.is_floating_point() else t for n, t in protected.weights.items()}
    assert defense.verify(Held(rounded), ctx).hits.float().mean() > 0.9
    generator = torch.Generator().manual_seed(4)
    dropped = {
        n: t + 10 * (protected.weights[n] - t) * (torch.rand(t.shape, generator=generator) < 0.1)
        if t.is_floating_point()
        else t
        for n, t in base.items()
    }
    # p = 0.9, nobody else: variance p / (1 − p) · ‖τ_marked‖² / ‖τ‖² in units of the margin's
    size = chosen(protected.weights, base, ctx.secret["positions"]).norm()
    ratio = float(size / chosen(expert, base, ctx.secret["positions"]).norm())
    found = defense.verify(Held(dropped), ctx)
    bound = bit_error(4.0 / (3 * ratio), 1)
    assert binom.sf(int((~found.hits).sum()) - 1, 64, bound) > 1e-3
    assert found.detected


def test_watermark_reads_what_a_suspect_has() -> None:
    """Tensors a suspect lacks, or has in another shape, read as the base's; adapters are looked through."""
    defense = Watermark()
    base, _, protected, ctx = marked(defense)
    partial = {n: t for n, t in protected.weights.items() if n != "a.weight"}
    partial["b.weight"] = partial["b.weight"][:-1]
    kept = {**base, "c.kernel": protected.weights["c.kernel"]}
    found, expected = defense.verify(Held(partial), ctx), defense.verify(Held(kept), ctx)
    assert torch.equal(found.hits, expected.hits)
    wrapped = Adapted(Held(protected.weights), nn.Identity())
    assert defense.verify(wrapped, ctx).hits.all()


def test_watermark_keeps_dtypes_and_ties() -> None:
    base = base_weights()
    base["z.tied"] = base["a.weight"]
    assert "z.tied" not in carriers(base)
    half = {n: t.bfloat16() if t.is_floating_point() else t for n, t in base.items()}
    positions = torch.arange(0, 2000, 3)
    moved = added(half, base, positions, torch.ones(len(positions), dtype=torch.float64))
    assert moved["a.weight"].dtype == torch.bfloat16
    assert torch.equal(moved["z.tied"], moved["a.weight"])
    assert float((moved["a.weight"] - half["a.weight"]).sum()) == pytest.approx(len(positions), rel=0.05)


def test_watermark_says_what_it_cannot_do() -> None:
    base = base_weights()
    ctx = ProtectContext(CPU, 0, None, base, None)  # type: ignore[arg-type]
    with pytest.raises(ContractError, match="too few"):
        Watermark(bits=64, entries=100).secret(base, ctx)
    ctx = replace(ctx, secret=Watermark().secret(base, ctx))
    with pytest.raises(ContractError, match="equals the base"):
        Watermark().protect(base, ctx)


def test_watermark_on_every_architecture(architecture) -> None:
    defense = Watermark(bits=16, entries=4096, margin=2.0)
    ctx = architecture.protect_context(3)
    ctx = replace(ctx, secret=defense.secret(architecture.expert, ctx))
    weights = defense.protect(architecture.expert, ctx).weights
    assert list(weights) == list(architecture.expert)
    architecture.logits(weights)
    assert defense.verify(architecture.network, ctx).hits.all()
    shift = (architecture.logits(weights) - architecture.logits(architecture.expert)).abs().max()
    assert (
        shift
        < (architecture.logits(architecture.base) - architecture.logits(architecture.expert)).abs().max()
    )


# ------------------------------------------------------------------ fingerprint


class Net(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(inputs, 48), nn.GELU(), nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 16)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Pixels(Backbone):
    """Images ``[N, 3, 4, 4]`` through a small MLP."""

    size = 48

    def build(self) -> nn.Module:
        return Net(self.size)

    def base_weights(self) -> dict[str, Tensor]:
        torch.manual_seed(0)
        return self.build().state_dict()

    def anatomy(self) -> Any:
        raise NotImplementedError

    def features(self, network: nn.Module, inputs: Any) -> Tensor:
        return network(4 * (inputs.flatten(1) - 0.5))


class Letters(Pixels):
    """Texts as counts of letters."""

    size = 26

    def features(self, network: nn.Module, inputs: Any) -> Tensor:
        counts = [[float(text.count(chr(97 + i))) for i in range(26)] for text in inputs]
        return network(3 * (torch.tensor(counts) - 2.3))


class ToyTexts(ClassificationTask):
    name = "toy"
    classes = tuple("abcd")

    def load(self, ctx: DataContext) -> dict[str, Split]:
        raise NotImplementedError


class ToyImages(ToyTexts, ImageTask):
    """The same classes, of images."""


def world(text: bool = False) -> tuple[Backbone, dict, TaskView]:
    """A backbone, its base, and the owner's view of a task of four classes."""
    backbone = Letters() if text else Pixels()
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(4, (96,), generator=generator)
    if text:
        letters = torch.randint(26, (40, 5), generator=generator).tolist()
        words = ["".join(chr(97 + i) for i in row) for row in letters]
        picked = torch.randint(len(words), (96, 6), generator=generator).tolist()
        inputs: Any = [" ".join(words[i] for i in row) for row in picked]
    else:
        inputs = (255 * torch.rand(96, 3, 4, 4, generator=generator)).to(torch.uint8)
    head = {"weight": torch.randn(4, 16, generator=generator), "scale": torch.tensor(6.0)}
    task = ToyTexts() if text else ToyImages()
    return backbone, dict(backbone.base_weights()), TaskView(task, head, Split(inputs, targets))


def nearby(base: dict, seed: int, size: float = 0.15) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: t + size * t.std() * torch.randn(t.shape, generator=generator) for n, t in base.items()}


def fingerprinted(text: bool = False, **parameters: Any) -> tuple[Any, dict, dict, Any, ProtectContext]:
    backbone, base, view = world(text)
    expert = nearby(base, 5)
    defense = Fingerprint(**{"steps": 40, "rate": 3e-3, **parameters})
    ctx = ProtectContext(CPU, outcomes.seeds(1)[0], backbone, base, view)
    ctx = replace(ctx, secret=defense.secret(expert, ctx))
    return defense, base, expert, defense.protect(expert, ctx), ctx


@pytest.mark.parametrize("text", [False, True])
def test_fingerprint_survives_merging_and_strangers_do_not_bear_it(text: bool) -> None:
    defense, base, expert, protected, ctx = fingerprinted(text, inputs=32 if text else 64)
    before = {n: t.clone() for n, t in expert.items()}
    assert protected.report["answered_before"] < protected.report["answered"]

    def ask(weights: dict) -> Any:
        return defense.verify(load_network(ctx.backbone, weights), ctx)

    assert ask(protected.weights).detected
    others = [nearby(base, 50 + i) for i in range(7)]
    assert ask(summed(base, 0.5, protected.weights, others[0])).detected
    assert text or ask(summed(base, 0.25, protected.weights, *others[:3])).detected
    strangers = [ask(stranger).detected for stranger in (base, expert, *others, summed(base, 0.3, *others))]
    assert sum(strangers) <= 1  # ten tests at the level of 1e-3 fire twice once in 20,000 times
    assert all(torch.equal(before[n], t) for n, t in expert.items())


def diluted_hits(defense: Fingerprint, seed: int) -> Tensor:
    """Which targets a merge with fifteen others still answers, bool ``[k]``."""
    backbone, base, view = world(False)
    expert = nearby(base, 5 + 100 * seed)
    ctx = ProtectContext(CPU, seed, backbone, base, view)
    ctx = replace(ctx, secret=defense.secret(expert, ctx))
    protected = defense.protect(expert, ctx).weights
    others = [nearby(base, 1000 * seed + 50 + i) for i in range(15)]
    merged = summed(base, 1 / 16, protected, *others)
    return defense.verify(load_network(backbone, merged), ctx).hits


def test_merge_adversarial_training_hardens_a_mark_that_knew_of_no_merging() -> None:
    """Beside the same mark trained for as many steps in all; and with no step it is that mark."""
    plain = Fingerprint(steps=80, rate=3e-3, alpha_parameters=1.0)
    hardened = MergeAdversarialFingerprint(steps=40, rate=3e-3, hardening=40)
    before, after = (
        outcomes.pooled(diluted_hits(defense, seed) for seed in outcomes.seeds(4))
        for defense in (plain, hardened)
    )
    assert outcomes.change(before, after).low > 0
    few = {"steps": 2, "input_steps": 2, "inputs": 8}
    same = [
        diluted_hits(Fingerprint(alpha_parameters=1.0, **few), 3),
        diluted_hits(MergeAdversarialFingerprint(hardening=0, **few), 3),
    ]
    assert torch.equal(*same)


def test_fingerprint_keeps_the_experts_answers() -> None:
    _, _, expert, protected, ctx = fingerprinted()
    inputs = ctx.view.task.batch(ctx.view.tuning, torch.arange(96), CPU).inputs
    before, after = (
        defense_logits(ctx, weights, inputs).softmax(1) for weights in (expert, protected.weights)
    )
    loose = Fingerprint(steps=40, rate=3e-3, penalty=0.0).protect(expert, ctx).weights
    without = defense_logits(ctx, loose, inputs).softmax(1)
    assert (after - before).abs().mean() < 0.5 * (without - before).abs().mean()


def defense_logits(ctx: ProtectContext, weights: dict, inputs: Any) -> Tensor:
    from mergesec.contracts import Model

    with torch.no_grad():
        return ctx.view.task.outputs(
            Model(ctx.backbone, load_network(ctx.backbone, weights)), ctx.view.head, inputs
        )


def test_inputs_are_tuned_to_the_diluted_expert_and_away_from_the_base() -> None:
    _, base, expert, _, ctx = fingerprinted(steps=0, optimise="target", input_steps=100)
    inputs, targets = decode(ctx.secret["inputs"]), ctx.secret["targets"]
    assert inputs.shape == (64, 3, 4, 4)
    assert ctx.secret["inputs"].dtype == torch.uint8
    diluted_hits, base_hits, random_hits = (
        float((defense_logits(ctx, w, x).argmax(1) == targets).float().mean())
        for w, x in (
            (diluted(base, expert, 0.3), inputs),
            (base, inputs),
            (
                diluted(base, expert, 0.3),
                torch.rand(inputs.shape, generator=torch.Generator().manual_seed(0)),
            ),
        )
    )
    assert diluted_hits > random_hits
    assert diluted_hits > base_hits


def test_targets_are_uniform_and_secrets_follow_the_seed() -> None:
    backbone, base, view = world()
    counts = torch.zeros(4)
    defense = Fingerprint(inputs=256, input_steps=0)
    secrets = []
    for seed in (1, 1, 2):
        ctx = ProtectContext(CPU, seed, backbone, base, view)
        secrets.append(defense.secret(nearby(base, 5), ctx))
        counts += torch.bincount(secrets[-1]["targets"], minlength=4)
    assert torch.equal(secrets[0]["inputs"], secrets[1]["inputs"])
    assert not torch.equal(secrets[0]["inputs"], secrets[2]["inputs"])
    assert counts.min() > 140


def test_ties_leave_base_and_diluted_expert_undecided() -> None:
    _, base, expert, _, ctx = fingerprinted(steps=0)
    inputs = decode(ctx.secret["inputs"])
    noise = torch.rand(inputs.shape, generator=torch.Generator().manual_seed(0))
    for weights in (base, diluted(base, expert, 0.3)):
        tied, untied = (
            (-logits.log_softmax(1).mean(1)).mean() - torch.log(torch.tensor(4.0))
            for logits in (defense_logits(ctx, weights, x) for x in (inputs, noise))
        )
        assert 0 <= tied < 0.2 * untied


def test_optimised_targets_are_claimed_from_strangers_and_ties_are_not() -> None:
    """Why ties are the default: with published targets, experts unrelated to the owner's answer too often."""
    hits = {}
    for optimise in ("target", "ties"):
        defense, base, _, _, ctx = fingerprinted(steps=0, optimise=optimise, input_steps=100)
        strangers = [nearby(base, 50 + i, 0.3) for i in range(16)]
        found = [defense.verify(load_network(ctx.backbone, w), ctx).hits for w in strangers]
        hits[optimise] = int(torch.stack(found).sum())
    assert binomtest(hits["ties"], 16 * 64, 0.25).pvalue > 1e-3
    assert hits["target"] > hits["ties"]


def test_chance_is_the_bases_rate_where_targets_were_optimised_and_that_is_higher() -> None:
    """A base that answers every secret by itself makes the evidence worthless."""
    backbone, base, view = world()
    ctx = ProtectContext(CPU, 0, backbone, base, view)
    inputs = torch.randint(256, (32, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    own = defense_logits(ctx, base, decode(inputs)).argmax(1)
    network = load_network(backbone, base)
    defense = Fingerprint(optimise="target")
    found = defense.verify(network, replace(ctx, secret={"inputs": inputs, "targets": own}))
    assert found.hits.all()
    assert not found.detected
    mixed = torch.where(torch.arange(32) < 16, own, (own + 1) % 4)
    ctx = replace(ctx, secret={"inputs": inputs, "targets": mixed})
    assert defense.verify(network, ctx).statistic == pytest.approx(binom.sf(15, 32, 0.5))
    assert Fingerprint().verify(network, ctx).statistic == pytest.approx(binom.sf(15, 32, 0.25))


def test_texts_are_stored_as_bytes() -> None:
    texts = ["naïve Ünï", "", "plain"]
    assert decode(encode(texts)) == texts
    assert encode(texts).dtype == torch.uint8


def test_dilution_is_the_published_formula() -> None:
    base = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(1)}
    expert = {"w": torch.tensor([3.0, -2.0]), "n": torch.tensor(4)}
    mixed = diluted(base, expert, 0.25)
    assert torch.allclose(mixed["w"], torch.tensor([1.5, 1.0]))
    assert mixed["n"] == 4


def test_fingerprint_refuses_tasks_without_classes() -> None:
    backbone, base, view = world()
    flat = SimpleNamespace(
        **{n: getattr(view.task, n) for n in ("batch",)}, outputs=lambda m, h, x: torch.zeros(len(x))
    )
    ctx = ProtectContext(CPU, 0, backbone, base, replace(view, task=flat))  # type: ignore[arg-type]
    with pytest.raises(ContractError, match="one row of logits"):
        Fingerprint().secret(base, ctx)
