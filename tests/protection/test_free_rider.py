"""The free-rider's other attacks: un-scaling, pruning, rounding, sweeping, distilling, trying them all."""

from __future__ import annotations

from dataclasses import replace

import outcomes
import pytest
import torch
from torch import Tensor

from mergesec.conformance.micro import Bars, Blobs, MicroViT
from mergesec.contracts import (
    Attack,
    ContractError,
    DataContext,
    Expert,
    Model,
    RecoverContext,
    TaskView,
    load_network,
)
from mergesec.surgery import change_heads, hidden_units, read, reorder_hidden
from mergesec_methods.protection.attacks._anchors import MAPS, heads_as_rows
from mergesec_methods.protection.attacks.adaptive import Adaptive
from mergesec_methods.protection.attacks.coupled import Coupled
from mergesec_methods.protection.attacks.distill import Distill
from mergesec_methods.protection.attacks.magnitude_pruning import MagnitudePruning
from mergesec_methods.protection.attacks.quantise import Quantise, rounded_rows
from mergesec_methods.protection.attacks.realign import Realign
from mergesec_methods.protection.attacks.scale_sweep import ScaleSweep, scaled
from mergesec_methods.protection.attacks.unscale import Unscale, singular_values
from mergesec_methods.protection.defenses.params import Params

CPU = torch.device("cpu")


def recover(attack: Attack, weights: dict, context: RecoverContext) -> dict:
    """``recover``, twice, with the contract checked: same tensors by name, inputs untouched, same result."""
    seen = [weights, context.base, *(e.weights for e in context.own)]
    before = [{n: t.clone() for n, t in w.items()} for w in seen]
    recovered = attack.recover(weights, context)
    assert list(recovered) == list(weights)
    for name, tensor in recovered.items():
        assert (tensor.shape, tensor.dtype) == (weights[name].shape, weights[name].dtype)
        assert not tensor.requires_grad
    assert all(torch.equal(w[n], t) for w, old in zip(seen, before, strict=True) for n, t in old.items())
    again = attack.recover(weights, context)
    assert all(torch.equal(again[n], t) for n, t in recovered.items())
    return dict(recovered)


def maximum(one: dict, other: dict) -> float:
    return max(float((one[n].double() - other[n].double()).abs().max()) for n in one)


def distance(one: dict, other: dict) -> float:
    squares = (
        (one[n].double() - other[n].double()).square().sum() for n in one if one[n].is_floating_point()
    )
    return float(sum(squares)) ** 0.5


# ------------------------------------------------------------------ un-scaling


def scaled_heads(architecture, weights: dict, kind: str, seed: int = 0) -> dict:
    """Heads multiplied by matrices of this kind: ``row`` (±diagonal), ``block`` (±scalar), ``svd`` (any)."""
    generator = torch.Generator().manual_seed(seed)
    for block in architecture.anatomy().blocks:
        heads, size = block.attention.heads, block.attention.head_dim

        def draw(heads: int = heads, size: int = size) -> Tensor:
            if kind == "svd":
                return torch.randn(heads, size, size, generator=generator, dtype=torch.float64)
            width = 1 if kind == "block" else size
            scales = 0.2 + 4 * torch.rand(heads, width, generator=generator, dtype=torch.float64)
            signs = 1 - 2 * torch.randint(0, 2, scales.shape, generator=generator)
            return torch.diag_embed((scales * signs).expand(heads, size))

        t, s = draw(), draw()
        weights = change_heads(
            weights, block.attention, query=t, key=torch.linalg.inv(t).mT, value=s, output=torch.linalg.inv(s)
        )
    return dict(weights)


@pytest.mark.parametrize("mode", ["row", "block", "svd"])
def test_unscale_forgets_its_kind_of_scaling(architecture, mode: str) -> None:
    context = architecture.recover_context()
    published = scaled_heads(architecture, architecture.expert, mode)
    recovered = recover(Unscale(mode), published, context)
    plain = Unscale(mode).recover(architecture.expert, context)
    assert maximum(recovered, plain) < 1e-3 < maximum(published, plain)
    # what it costs an expert that was never protected: less than its own task vector
    assert distance(plain, architecture.expert) < distance(architecture.base, architecture.expert)
    # and nothing where there is no task vector: the base comes back
    disguised = scaled_heads(architecture, architecture.base, mode, seed=1)
    assert maximum(Unscale(mode).recover(disguised, context), architecture.base) < 1e-3


def test_rows_and_blocks_get_the_norms_of_the_base(packed) -> None:
    context = packed.recover_context()
    for mode, dims in (("row", (2,)), ("block", (1, 2))):
        recovered = Unscale(mode).recover(scaled_heads(packed, packed.expert, "row"), context)
        for block in packed.anatomy().blocks:
            found, base, expert = (
                heads_as_rows(w, block.attention) for w in (recovered, packed.base, packed.expert)
            )
            for name in MAPS:
                norms = [x[name].square().sum(dims, keepdim=True).sqrt() for x in (found, base, expert)]
                assert torch.allclose(norms[0], norms[1], rtol=1e-5)
                if mode == "row":  # only the length is not the expert's
                    assert torch.allclose(found[name], expert[name] * norms[1] / norms[2], atol=1e-5)


def test_svd_mode_has_the_singular_values_of_the_base_and_is_nearest(mini) -> None:
    generator = torch.Generator().manual_seed(3)
    own, anchor = (torch.randn(2, 4, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    found = singular_values(own, anchor) @ own
    assert torch.allclose(torch.linalg.svdvals(found), torch.linalg.svdvals(anchor))
    # same row space
    inside = torch.linalg.qr(own.mT).Q
    assert torch.allclose(found @ inside @ inside.mT, found)
    # no other rotation within it, far or near, comes closer
    left, s, _ = torch.linalg.svd(anchor, full_matrices=False)
    vh = torch.linalg.solve(s[..., None] * torch.eye(4, dtype=s.dtype), left.mT @ found)
    best = (found - anchor).square().sum((1, 2))
    for step in (0.01, 0.1, 1.0, 10.0):
        for _ in range(25):
            turn = step * torch.randn(2, 4, 4, generator=generator, dtype=torch.float64)
            other = (left * s[:, None]) @ torch.linalg.matrix_exp(turn - turn.mT) @ vh
            assert ((other - anchor).square().sum((1, 2)) >= best - 1e-9).all()


def test_unscale_realigns_only_if_asked(mini) -> None:
    context = mini.recover_context()
    published = dict(Params().protect(mini.expert, mini.protect_context()).weights)
    for realign, units in ((True, mini.expert), (False, published)):
        recovered = recover(Unscale("row", realign), published, context)
        for block in mini.anatomy().blocks:
            assert torch.equal(hidden_units(recovered, block.mlp), hidden_units(units, block.mlp))
    reference = mini.logits(mini.expert)
    gap = (mini.logits(Unscale("row").recover(published, context)) - reference).abs().max()
    assert 1e-3 < gap < 0.3 * reference.abs().max()  # the four maps are treated apart: not quite the function


@pytest.mark.parametrize("mode", ["row", "block", "svd"])
def test_unscale_survives_a_dead_head(mini, mode: str) -> None:
    dead = dict(mini.expert)
    for part in "qkv":
        for kind in ("weight", "bias"):
            name = f"blocks.0.attn.{part}.{kind}"
            dead[name] = dead[name].clone()
            dead[name][:8] = 0
    recovered = recover(Unscale(mode), dead, mini.recover_context())
    assert all(torch.isfinite(t).all() for t in recovered.values())
    assert torch.equal(recovered["blocks.0.attn.q.weight"][:8], torch.zeros(8, 24))


# ------------------------------------------------------------------ magnitude pruning


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("keep", [0.1, 0.5])
def test_pruning_keeps_the_largest(mini, scope: str, keep: float) -> None:
    weights = {**mini.expert, "steps": torch.tensor(3), "foreign": torch.ones(2)}
    recovered = recover(MagnitudePruning(keep, scope), weights, mini.recover_context())
    sizes = {n: (weights[n] - b).abs() for n, b in mini.base.items()}
    everything = torch.cat([s.flatten() for s in sizes.values()])
    for name, base in mini.base.items():
        pool = sizes[name].flatten() if scope == "tensor" else everything
        smallest_kept = pool.sort(descending=True).values[round(keep * len(pool)) - 1]
        expected = torch.where(sizes[name] >= smallest_kept, weights[name], base)
        assert torch.equal(recovered[name], expected), name
    assert recovered["steps"] == 3
    assert torch.equal(recovered["foreign"], weights["foreign"])


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_pruning_at_its_ends_and_in_half_precision(mini, scope: str) -> None:
    half = {n: t.bfloat16() for n, t in mini.expert.items()}
    base = {n: t.bfloat16() for n, t in mini.base.items()}
    context = replace(mini.recover_context(), base=base)
    assert maximum(recover(MagnitudePruning(1.0, scope), half, context), half) == 0
    assert maximum(recover(MagnitudePruning(0.0, scope), half, context), base) == 0
    some = recover(MagnitudePruning(0.3, scope), half, context)
    assert all(
        torch.equal((t == half[n]) | (t == base[n]), torch.ones_like(t).bool()) for n, t in some.items()
    )


# ------------------------------------------------------------------ rounding


def test_int8_rounds_row_by_row(mini) -> None:
    weights = {**mini.expert, "steps": torch.tensor(3)}
    recovered = recover(Quantise("int8"), weights, mini.recover_context())
    for name, tensor in weights.items():
        if tensor.ndim < 2:
            assert torch.equal(recovered[name], tensor)
            continue
        for row, rounded in zip(tensor.flatten(1), recovered[name].flatten(1), strict=True):
            step = row.abs().max() / 127
            by_hand = torch.tensor([round(float(x) / float(step)) * float(step) for x in row])
            assert torch.allclose(rounded, by_hand, atol=1e-6)
            assert (rounded - row).abs().max() <= 0.5 * step * 1.001
    assert maximum(Quantise("int8").recover(recovered, mini.recover_context()), recovered) < 1e-6


def test_rounding_of_zeros_halves_and_halves_of_a_step() -> None:
    assert torch.equal(rounded_rows(torch.zeros(2, 3)), torch.zeros(2, 3))
    assert torch.equal(
        rounded_rows(torch.tensor([[127.0, 0.5, 1.5, -2.5]])), torch.tensor([[127.0, 0, 2, -2]])
    )
    assert rounded_rows(torch.ones(2, 3, 4).half()).dtype == torch.float16


def test_bf16_is_the_cast(mini) -> None:
    weights = {**mini.expert, "steps": torch.tensor(3)}
    recovered = recover(Quantise("bf16"), weights, mini.recover_context())
    for name, tensor in weights.items():
        cast = tensor.bfloat16().float() if tensor.is_floating_point() else tensor
        assert torch.equal(recovered[name], cast)


# ------------------------------------------------------------------ scale sweep


def test_sweep_returns_the_scale_that_merges_best(mini) -> None:
    weights = {**mini.expert, "steps": torch.tensor(3), "foreign": torch.ones(2)}
    goal = {n: b + 0.3 * (weights[n] - b) for n, b in mini.base.items()}
    tried = []

    def score(candidate: dict) -> float:
        tried.append(candidate)
        return -distance({n: candidate[n] for n in goal}, goal)

    context = replace(mini.recover_context(), score=score)
    recovered = recover(ScaleSweep([0.1, 0.3, 1.0, 3]), weights, context)
    assert len(tried) == 8  # four scales, twice
    assert distance({n: recovered[n] for n in goal}, goal) < 1e-5
    assert recovered["steps"] == 3
    assert torch.equal(recovered["foreign"], weights["foreign"])


def test_sweep_prefers_the_published_weights_among_equals(mini) -> None:
    context = replace(mini.recover_context(), score=lambda candidate: 0.5)
    recovered = recover(ScaleSweep([10.0, 0.5, 1.0, 1.5]), mini.expert, context)
    assert maximum(recovered, mini.expert) == 0
    assert maximum(scaled(mini.expert, mini.base, 0.0), mini.base) == 0


def test_sweep_refuses_what_it_cannot_use(mini) -> None:
    with pytest.raises(ContractError, match="merges to try"):
        ScaleSweep([1.0]).recover(mini.expert, mini.recover_context())
    for wrong in ([], [-0.1], ["1"], [True], [float("nan")]):
        with pytest.raises(ValueError, match="scales must be"):
            ScaleSweep(wrong)


# ------------------------------------------------------------------ distillation


class Sealed:
    """Stands for data that must not be touched."""

    def __getattr__(self, name: str) -> Tensor:
        raise AssertionError(f"{name} was asked for")


@pytest.fixture(scope="module")
def micro() -> tuple[dict, RecoverContext, Tensor]:
    """Protected weights, the free-rider's view of two tasks of his own, and inputs that he does not hold."""
    backbone = MicroViT()
    base = dict(backbone.base_weights())
    generator = torch.Generator().manual_seed(6)
    expert = {
        n: t + 0.05 * torch.randn(t.shape, generator=generator) if t.is_floating_point() else t
        for n, t in base.items()
    }
    for block in backbone.anatomy().blocks:
        order = torch.randperm(block.mlp.hidden, generator=generator)
        expert = reorder_hidden(expert, block.mlp, order)
    views = {}
    for name, task in (("blobs", Blobs()), ("bars", Bars())):
        tuning = task.load(DataContext(CPU, 0))["tuning"]
        views[name] = TaskView(task, {}, Sealed(), tuning.inputs)  # type: ignore[arg-type]
    fresh = Bars().load(DataContext(CPU, 0))["test"].inputs[:64].float() / 255
    own = [Expert(t, base) for t in views]
    (seed,) = outcomes.seeds(1)
    context = RecoverContext(CPU, seed, backbone, base, "victim", own, {**views, "victim": Sealed()})  # type: ignore[dict-item]
    return expert, context, fresh


def features(context: RecoverContext, weights: dict, inputs: Tensor) -> Tensor:
    network = load_network(context.backbone, weights)
    with torch.no_grad():
        return Model(context.backbone, network).features(inputs)


def test_distillation_learns_the_function_in_the_coordinates_of_the_base(micro) -> None:
    published, context, fresh = micro
    recovered = recover(Distill(60, 0, 32, 1e-3), published, context)
    goal = features(context, published, fresh)
    before, after = ((features(context, w, fresh) - goal).square().mean() for w in (context.base, recovered))
    assert after < 0.3 * before
    assert distance(recovered, context.base) < 0.2 * distance(published, context.base)
    assert maximum(Distill(0, 0, 32, 1e-3).recover(published, context), context.base) == 0


def test_distillation_keeps_to_its_budget(micro, monkeypatch) -> None:
    """``rows`` inputs per task and ``steps`` batches, one task after the other; the seed draws them."""
    published, context, _ = micro
    taken: list[int] = []
    for task in (Bars, Blobs):
        batch = task.batch

        def spy(self, split, index, device, batch=batch):
            taken.append(len(split))
            return batch(self, split, index, device)

        monkeypatch.setattr(task, "batch", spy)
    one = Distill(4, 10, 8, 1e-3).recover(published, context)
    assert taken == [10] * 6  # the published network on both tasks once, then four steps
    other = Distill(4, 10, 8, 1e-3).recover(published, replace(context, seed=context.seed + 1))
    assert maximum(one, other) > 0
    with pytest.raises(ContractError, match="no task"):
        Distill().recover(published, replace(context, own=()))


# ------------------------------------------------------------------ adaptive


class Constant(Attack):
    """Hands back one value everywhere, or the draw of its context."""

    def __init__(self, name: str, value: float | None = None) -> None:
        self.name, self.value = name, value

    def recover(self, published: dict, ctx: RecoverContext) -> dict:
        assert ctx.inner == ()
        value = torch.rand((), generator=ctx.generator()) if self.value is None else self.value
        return {n: torch.full_like(t, float(value)) for n, t in published.items()}


class Refusing(Attack):
    def __init__(self, error: Exception) -> None:
        self.name, self.error = "refusing", error

    def recover(self, published: dict, ctx: RecoverContext) -> dict:
        raise self.error


def test_adaptive_keeps_the_best_merge(mini) -> None:
    published = dict(Params().protect(mini.expert, mini.protect_context()).weights)
    context = replace(
        mini.recover_context(),
        score=lambda w: -distance(w, mini.expert),
        inner=[Realign(), Coupled(), Quantise(), Refusing(ContractError("not here"))],
    )
    recovered = recover(Adaptive(), published, context)
    assert maximum(recovered, Coupled().recover(published, context)) == 0
    # an unprotected expert is best as it is
    assert maximum(recover(Adaptive(), mini.expert, context), mini.expert) == 0


def test_adaptive_takes_the_earliest_of_equals_and_the_published_first(mini) -> None:
    published = {"w": torch.zeros(3)}
    inner = [Constant("a", 1.0), Constant("b", 2.0), Constant("c", 2.0)]
    for score, expected in ((lambda w: 0.0, 0.0), (lambda w: float(w["w"].max() > 0), 1.0)):
        context = replace(mini.recover_context(), score=score, inner=inner)
        assert float(Adaptive().recover(published, context)["w"][0]) == expected


def test_adaptive_gives_each_attack_a_stream_of_its_own(mini) -> None:
    published = {"w": torch.zeros(3)}
    seen: list[float] = []

    def score(weights: dict) -> float:
        seen.append(float(weights["w"][0]))
        return 0.0

    context = replace(mini.recover_context(3), score=score, inner=[Constant("a"), Constant("b")])
    Adaptive().recover(published, context)
    Adaptive().recover(published, replace(context, inner=[Constant("b")]))
    Adaptive().recover(published, replace(context, seed=4))
    _, a, b, _, alone, _, other, _ = seen
    assert a != b == alone  # whatever else is tried
    assert a != other


def test_adaptive_hides_no_fault(mini) -> None:
    context = replace(mini.recover_context(), score=lambda w: 0.0, inner=[Refusing(RuntimeError("broken"))])
    with pytest.raises(RuntimeError, match="broken"):
        Adaptive().recover(mini.expert, context)
    with pytest.raises(ContractError, match="merges to try"):
        Adaptive().recover(mini.expert, mini.recover_context())


def test_defaults_are_every_attack_without_training() -> None:
    from mergesec.planning.catalog import load_catalog

    cards = [e.card for e in load_catalog([]).entries["attack"].values() if e.card.threat == "protection"]
    adaptive = next(c for c in cards if c.name == "adaptive")
    # came after adaptive 1 was measured: its default is what the shipped records tried
    later = {"realign_gauged"}
    known = {c.name for c in cards} - {"adaptive", "distill"}
    assert set(adaptive.parameters["attacks"].default) == known - later and later < known


def test_a_grid_names_what_adaptive_tries() -> None:
    """A list is what one adaptive attacker tries; a list of lists is an axis."""
    from mergesec.conformance.battery import MICRO
    from mergesec.planning.catalog import load_catalog
    from mergesec.planning.gridspec import parse_grid
    from mergesec.planning.resolve import resolve

    def attacks(tried: list) -> list:
        axes = {
            "merging": ["task_arithmetic"],
            "attacks": [{"name": "adaptive", "attacks": tried}],
            "defenses": ["params"],
        }
        suite = {"name": "micro", "backbone": "micro/vit", "tasks": ["micro/bars", "micro/blobs"]}
        grid = parse_grid({"name": "g", "suite": suite, "axes": axes, "threats": ["protection"]}, "g")
        return [[ref.label for ref in a.inner] for a in resolve(grid, load_catalog([MICRO])).attacks]

    several = ["aga", {"name": "dropout_pruning", "drop": [0.1, 0.9]}]
    labels = ["aga", "dropout_pruning(drop=0.1)", "dropout_pruning(drop=0.9)"]
    assert attacks(several) == [labels]
    assert attacks([several, ["coupled"]]) == [labels, ["coupled"]]


def test_output_biases_stay(mini) -> None:
    """The output bias is added after the heads are joined: no attack on heads may change it."""
    published = scaled_heads(mini, mini.expert, "svd")
    for attack in (Unscale("row"), Unscale("block"), Unscale("svd"), Coupled(gauges=False)):
        recovered = attack.recover(published, mini.recover_context())
        for block in mini.anatomy().blocks:
            bias = read(recovered, block.attention.output)[1]
            assert bias is not None
            assert torch.equal(bias, read(mini.expert, block.attention.output)[1])
