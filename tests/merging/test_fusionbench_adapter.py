"""FusionBench's merges: that they run, what they compute, and that nothing of them leaks into the process."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import sys
import types
import typing
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from extras import needs
from torch import Tensor, nn

from mergesec.anatomy import Anatomy, describe
from mergesec.conformance.battery import MICRO
from mergesec.contracts import (
    Backbone,
    ContractError,
    DataContext,
    Expert,
    MergeContext,
    Merged,
    MergeMethod,
    Model,
    TaskView,
    Weights,
    load_network,
)
from mergesec.errors import UsageError
from mergesec.planning.catalog import load_catalog
from mergesec.weights import mergeable
from mergesec_methods.fusionbench._adapter import (
    FusionBenchMerge,
    execute,
    find,
    fresh_network,
    pool,
    sandbox,
)
from mergesec_methods.fusionbench.routers import RoutedLinear
from mergesec_methods.merging.task_arithmetic import TaskArithmetic

CATALOG = load_catalog([MICRO])
LISTED = [e for e in CATALOG if e.card.name.startswith("fusionbench/")]
NAMES = [e.card.name.removeprefix("fusionbench/") for e in LISTED]
TASKS = ("micro/bars", "micro/blobs", "micro/rings")
WIDTH = 8
LONG = ("doge_ta", "gossip")
"""400 fixed steps per matrix; garbage collections between steps."""


# --------------------------------------------------------------------------- a world


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        mixed = nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        return self.o(mixed)  # type: ignore[no-any-return]


class _Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = _Attention(), _Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)  # type: ignore[no-any-return]


class _Network(nn.Module):
    """One block; a counter, a tied pair, a parameter of no leaf module, one with a leading 1, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 8, 8)
        self.position = nn.Parameter(torch.zeros(1, 4, WIDTH))
        self.temperature = nn.Parameter(torch.ones(()))
        self.blocks = nn.ModuleList([_Block()])
        self.norm, self.twin = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.twin.weight = self.norm.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, images: Tensor) -> Tensor:
        x = (self.stem(images).flatten(2).transpose(1, 2) + self.position).contiguous()
        for block in self.blocks:
            x = block(x)
        return self.temperature * self.twin(self.norm(x)).mean(1)  # type: ignore[no-any-return]


class Tiny(Backbone):
    """The smallest network with everything that has broken an algorithm of FusionBench."""

    name = "tiny"

    def build(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):  # construction draws initial weights
            return _Network()

    def base_weights(self) -> Weights:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            network = _Network()
            nn.init.normal_(network.position, std=0.5)
        return network.state_dict()

    def anatomy(self) -> Anatomy:
        """Blocks without a name: it is optional."""
        found = describe({k: tuple(v.shape) for k, v in self.base_weights().items()}, 1)
        return Anatomy(tuple(replace(block, name="") for block in found.blocks))

    def features(self, network: nn.Module, inputs: Any) -> Tensor:
        features: Tensor = network((inputs - 0.5) / 0.5)
        return features


class TinyClip(Tiny):
    """transformers' CLIP vision tower, one layer."""

    name = "clip"

    def build(self) -> nn.Module:
        hf = needs("transformers")
        sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 1}
        return hf.CLIPVisionModel(hf.CLIPVisionConfig(**sizes, image_size=16, patch_size=8))

    def base_weights(self) -> Weights:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return self.build().state_dict()

    def features(self, network: nn.Module, inputs: Any) -> Tensor:
        features: Tensor = network(pixel_values=(inputs - 0.5) / 0.5).pooler_output
        return features


def noisy(base: Weights, seed: int, scale: float = 0.1) -> dict[str, Tensor]:
    """``base`` with noise on floating tensors; what was tied stays tied."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[int, Tensor] = {}
    for tensor in base.values():
        if mergeable(tensor) and tensor.data_ptr() not in made:
            made[tensor.data_ptr()] = tensor + scale * torch.randn(tensor.shape, generator=generator)
    return {n: made.get(t.data_ptr(), t) for n, t in base.items()}


def experts(base: Weights, count: int = 3) -> list[Expert]:
    return [Expert(TASKS[i], noisy(base, i + 1)) for i in range(count)]


_VIEWS: dict[str, dict[str, TaskView]] = {}


def context(backbone: Backbone, seed: int = 0, inner: MergeMethod | None = None) -> MergeContext:
    """Real tasks with real heads, fitted on the base."""
    device = torch.device("cpu")
    if backbone.name not in _VIEWS:
        model = Model(backbone, load_network(backbone, backbone.base_weights()))
        views = {}
        for name in TASKS:
            task = CATALOG.get("task", name).create({})
            splits = task.load(DataContext(device, 0))
            head = task.fit_head(model, splits["train"], DataContext(device, 0))
            views[name] = TaskView(task, head, splits["tuning"], splits["tuning"].inputs)
        _VIEWS[backbone.name] = views
    inner = inner or TaskArithmetic(0.3, [0.3])
    return MergeContext(device, seed, backbone, _VIEWS[backbone.name], lambda merged: 0.0, {}, inner)


def method(name: str, **given: Any) -> FusionBenchMerge:
    """As the catalogue makes it, with the card's trial values unless told otherwise."""
    entry = CATALOG.get("merging", f"fusionbench/{name}")
    trial = {k: v for k, v in entry.card.trial.items() if k not in given}
    made: FusionBenchMerge = entry.create(entry.card.bind("test", {**trial, **given}))
    return made


def everything(merged: Merged) -> dict[str, Tensor]:
    rooms = {"shared": merged.shared, "extra": merged.extra, **merged.per_task}
    return {f"{room}|{n}": t for room, weights in rooms.items() for n, t in weights.items()}


def images(count: int = 4) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


# --------------------------------------------------------------------------- the process around it


def surroundings() -> dict[str, Any]:
    """What an algorithm could change behind the caller's back, as comparable values."""
    root = logging.getLogger()
    return {
        "folder": os.getcwd(), "environment": dict(os.environ), "hook": sys.excepthook,
        "filters": list(warnings.filters), "torch": torch.get_rng_state().tolist(), "random": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(), "handlers": root.handlers[:], "level": root.level,
        "disabled": root.manager.disable, "threads": torch.get_num_threads(), "grad": torch.is_grad_enabled(),
        "cuda": torch.cuda.is_available, "override": getattr(typing, "override", None),
        "streams": (sys.stdout, sys.stderr),
    }  # fmt: skip


@contextlib.contextmanager
def unchanged(capture: pytest.CaptureFixture[str]) -> Iterator[None]:
    """The process is the same afterwards as before, and nothing was printed."""
    before = surroundings()
    capture.readouterr()
    try:
        yield
    finally:
        printed = capture.readouterr()
        after = surroundings()
    assert [k for k in before if before[k] != after[k]] == []
    assert printed.out + printed.err == ""


@pytest.mark.fusionbench
@pytest.mark.usefixtures("no_forced_collections")
@pytest.mark.parametrize("name", NAMES)
def test_every_listed_name_runs_twice_alike_and_leaves_no_trace(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    needs("fusion_bench")
    backbone = Tiny()
    ctx = context(backbone)
    base, members = backbone.base_weights(), experts(backbone.base_weights())
    handed = [dict(base), *(dict(e.weights) for e in members)]
    copies = [{n: t.clone() for n, t in weights.items()} for weights in handed]
    with unchanged(capfd):
        first, second = (method(name).merge(base, members, ctx) for _ in range(2))
        networks = [method(name).network(backbone, first, task) for task in TASKS]

    for weights, copy in zip(handed, copies, strict=True):
        assert all(torch.equal(weights[n], t) for n, t in copy.items())
    one, other = everything(first), everything(second)
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert {n: (t.shape, t.dtype) for n, t in first.shared.items()} == {
        n: (t.shape, t.dtype) for n, t in base.items()
    }
    assert torch.equal(first.shared["seen"], base["seen"])
    assert torch.equal(first.shared["norm.weight"], first.shared["twin.weight"])
    assert not any(t.requires_grad for t in one.values())
    places = {t.data_ptr() for t in handed[0].values()}
    assert not {t.data_ptr() for w in handed[1:] for n, t in w.items() if n != "seen"} & (
        {t.data_ptr() for t in one.values()} - places
    )
    for network in networks:
        with torch.inference_mode():
            features = backbone.features(network, images())
        assert features.shape == (4, WIDTH) and bool(torch.isfinite(features).all())


@pytest.mark.fusionbench
@pytest.mark.parametrize("name", [n for n in NAMES if n not in LONG])
def test_every_listed_name_runs_on_clip(name: str) -> None:
    needs("fusion_bench")
    backbone = TinyClip()
    base = backbone.base_weights()
    merged = method(name).merge(base, experts(base, 2), context(backbone))
    plain = backbone.features(load_network(backbone, base), images()).detach()
    served = backbone.features(method(name).network(backbone, merged, TASKS[0]), images()).detach()
    assert bool(torch.isfinite(served).all())
    assert not torch.allclose(served, plain)


@pytest.mark.fusionbench
@pytest.mark.parametrize("name", [n for n in NAMES if n not in LONG])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_experts_come_back_as_such(name: str, dtype: torch.dtype) -> None:
    needs("fusion_bench")
    backbone = Tiny()
    base = {n: t.to(dtype) if mergeable(t) else t for n, t in backbone.base_weights().items()}
    members = [Expert(e.task, {n: t.to(dtype) if mergeable(t) else t for n, t in e.weights.items()}) for e in experts(backbone.base_weights(), 2)]  # fmt: skip
    merged = method(name).merge(base, members, context(backbone))
    assert {n: t.dtype for n, t in merged.shared.items()} == {n: t.dtype for n, t in base.items()}


# --------------------------------------------------------------------------- a vandal


class _Vandal:
    """Does to its surroundings all that algorithms of FusionBench do, and returns the network it overwrote."""

    fails = False

    def run(self, models: Any) -> Any:
        for name in models.all_model_names:
            for parameter in models.load_model(name).parameters():
                parameter.data.zero_()
        os.chdir("/")
        os.environ["VANDAL"] = "1"
        del os.environ["PATH"]
        sys.excepthook = lambda *args: None
        warnings.simplefilter("ignore")
        random.random(), np.random.rand(), torch.rand(1)
        torch.set_grad_enabled(False)
        torch.set_num_threads(2)
        logging.getLogger().addHandler(logging.StreamHandler(sys.stderr))
        logging.getLogger().setLevel(1)
        logging.getLogger("vandal").critical("shouts")
        print("scribbles")
        print("mutters", file=sys.stderr)
        if self.fails:
            raise ValueError("gives up")
        return models.load_model("_pretrained_")


class _Vandalised(FusionBenchMerge):
    target = "vandal:Vandal"
    name = "vandalised"


@pytest.fixture
def vandal(monkeypatch: pytest.MonkeyPatch) -> type[_Vandal]:
    needs("fusion_bench")
    module = types.ModuleType("fusion_bench.vandal")
    kind = type("Vandal", (_Vandal,), {})
    module.Vandal = kind  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fusion_bench.vandal", module)
    return kind


@pytest.mark.fusionbench
def test_a_vandal_reaches_neither_the_inputs_nor_the_process(
    vandal: type[_Vandal], capfd: pytest.CaptureFixture[str]
) -> None:
    backbone = Tiny()
    base, members = backbone.base_weights(), experts(backbone.base_weights())
    copies = [{n: t.clone() for n, t in w.items()} for w in (base, *(e.weights for e in members))]
    ctx = context(backbone)
    with unchanged(capfd):
        merged = _Vandalised().merge(base, members, ctx)
    assert all(not t.any() for n, t in merged.shared.items())
    for weights, copy in zip((base, *(e.weights for e in members)), copies, strict=True):
        assert all(torch.equal(weights[n], t) for n, t in copy.items())


@pytest.mark.fusionbench
def test_a_failing_vandal_is_cleaned_up_after_and_quoted(
    vandal: type[_Vandal], capfd: pytest.CaptureFixture[str]
) -> None:
    vandal.fails = True
    backbone = Tiny()
    base, ctx = backbone.base_weights(), context(backbone)
    with unchanged(capfd), pytest.raises(ValueError, match="gives up") as caught:
        _Vandalised().merge(base, experts(base), ctx)
    (note,) = caught.value.__notes__
    assert "scribbles" in note and "mutters" in note


@pytest.mark.fusionbench
def test_networks_handed_in_have_neither_integers_nor_ties() -> None:
    backbone = Tiny()
    base = backbone.base_weights()
    network = fresh_network(backbone, base)
    state = network.state_dict()
    assert "seen" not in state and int(network.get_buffer("seen")) == 0
    assert state["norm.weight"].data_ptr() != state["twin.weight"].data_ptr()
    assert all(p.requires_grad and p.data_ptr() != base[n].data_ptr() for n, p in network.named_parameters())


@pytest.mark.fusionbench
@pytest.mark.parametrize("name", ["opcm", "recombination", "randes", "continual_ties", "regmean_plusplus"])
def test_another_seed_gives_another_merge(name: str) -> None:
    needs("fusion_bench")
    backbone = Tiny()
    base = backbone.base_weights()
    given = {"num_regmean_examples": 8} if name == "regmean_plusplus" else {}
    found = [
        everything(method(name, **given).merge(base, experts(base), context(backbone, s))) for s in range(4)
    ]
    assert any(not torch.equal(found[0][k], other[k]) for other in found[1:] for k in other)


# --------------------------------------------------------------------------- what they compute


@pytest.fixture
def world() -> tuple[Backbone, Weights, list[Expert]]:
    needs("fusion_bench")
    backbone = Tiny()
    return backbone, backbone.base_weights(), experts(backbone.base_weights())


World = tuple[Backbone, Weights, list[Expert]]


def vectors(base: Weights, members: Sequence[Expert], name: str) -> Tensor:
    return torch.stack([e.weights[name] - base[name] for e in members])


def same(found: Weights, wanted: dict[str, Tensor], atol: float = 1e-6) -> None:
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.fusionbench
def test_expo_is_task_arithmetic_beyond_the_average(world: World) -> None:
    backbone, base, members = world
    found = method("expo", extrapolation_factor=0.4).merge(base, members, context(backbone)).shared
    same(found, dict(TaskArithmetic(1.4 / 3, [0.3]).merge(base, members, context(backbone)).shared))


@pytest.mark.fusionbench
def test_trust_region_drops_the_entries_of_most_conflict(world: World) -> None:
    backbone, base, members = world
    found = method("trust_region", threshold_quantile=0.7).merge(base, members, context(backbone)).shared
    names = [n for n in sorted(base) if mergeable(base[n])]  # ties come apart and count twice
    taus = torch.cat([vectors(base, members, n).reshape(3, -1) for n in names], dim=1)
    conflict = taus.abs().sum(0) ** 2 - taus.square().sum(0)
    kept = conflict < conflict.sort().values[int(conflict.numel() * 0.7)]
    wanted, at = {}, 0
    for name in names:
        size = base[name].numel()
        part = (taus * kept)[:, at : at + size].sum(0).view(base[name].shape)
        wanted[name], at = base[name] + 0.3 * part, at + size
    near = (conflict - conflict.sort().values[int(conflict.numel() * 0.7)]).abs().min()
    assert float(near) == 0.0 and 0.6 < float(kept.float().mean()) < 0.75
    same(found, wanted)


@pytest.mark.fusionbench
def test_svc_calibrates_what_it_wraps(world: World) -> None:
    backbone, base, members = world
    inner = TaskArithmetic(0.8, [0.3])
    merged = inner.merge(base, members, context(backbone)).shared
    found = method("svc", alpha=0.5).merge(base, members, context(backbone, inner=inner)).shared
    wanted = {n: t for n, t in merged.items() if t.ndim != 2}
    for name in (n for n, t in base.items() if t.ndim == 2):
        taus = vectors(base, members, name).double()
        u, s, vh = torch.linalg.svd((merged[name] - base[name]).double(), full_matrices=False)
        gammas = []
        for r in range(len(s)):
            whole, own = u[:, r] @ (merged[name] - base[name]).double(), u[:, r] @ taus
            gammas.append(3 / float(((own @ whole) / own.square().sum(-1)).clamp(min=0.5).sum()))
        wanted[name] = (base[name].double() + (u * s * torch.tensor(gammas).double()) @ vh).float()
    same(found, wanted, 1e-5)


@pytest.mark.fusionbench
def test_svc_without_a_merge_to_wrap_says_so(world: World) -> None:
    backbone, base, members = world
    ctx = context(backbone)
    bare = MergeContext(ctx.device, 0, backbone, ctx.views, ctx.score)
    with pytest.raises(ContractError, match="names no merge"):
        method("svc").merge(base, members, bare)


@pytest.mark.fusionbench
def test_recombination_takes_every_tensor_from_one_expert(world: World) -> None:
    backbone, base, members = world
    found = method("recombination").merge(base, members, context(backbone)).shared
    who = {
        n: [torch.equal(t, e.weights[n]) for e in members].index(True)
        for n, t in found.items()
        if n != "seen"
    }
    assert len(set(who.values())) == 3


@pytest.mark.fusionbench
@pytest.mark.parametrize("different", [True, False])
def test_randes_superposes_under_signs_that_every_process_draws_alike(world: World, different: bool) -> None:
    backbone, base, members = world
    ctx = context(backbone, seed=3)
    merged = method("randes", different_across_layers=different).merge(base, members, ctx)
    seed = int(torch.randint(2**31, (), generator=ctx.generator())) % 10**6
    roles = {"q": "attn", "k": "attn", "v": "attn", "o": "attn", "up": "mlp", "down": "mlp"}
    for place, (short, role) in enumerate(roles.items()):
        name = f"blocks.0.{role}.{short}.weight"
        crc = zlib.crc32(f"{role}_{place}_weight".encode()) % 1e6 if different else 0
        draws = [
            np.random.RandomState(int(seed + i + crc)).binomial(1, 0.5, base[name].shape[1]) for i in range(3)
        ]
        signs = torch.tensor(np.array(draws) * 2.0 - 1).float()[:, None]
        pile = (vectors(base, members, name) * signs).sum(0)
        for sign, expert in zip(signs, members, strict=True):
            same(merged.per_task[expert.task], {name: base[name] + 0.5 * pile * sign})
        assert torch.equal(merged.shared[name], base[name])
    added = TaskArithmetic(0.5, [0.3]).merge(base, members, ctx).shared
    same(
        merged.shared,
        {n: t for n, t in added.items() if n.split(".")[-2:][0] not in roles or n.endswith("bias")},
    )


@pytest.mark.fusionbench
@pytest.mark.parametrize("name", ["opcm", "dop", "regmean_plusplus", "recombination"])
def test_one_expert_alone_is_what_comes_out(world: World, name: str) -> None:
    backbone, base, members = world
    found = method(name).merge(base, members[:1], context(backbone)).shared
    same(found, dict(members[0].weights), 1e-5 if name == "regmean_plusplus" else 0.0)


@pytest.mark.fusionbench
def test_opcm_projects_the_second_expert_off_the_first(world: World) -> None:
    backbone, base, members = world
    found = method("opcm", alpha=0.3, shuffle_order=False).merge(base, members[:2], context(backbone)).shared
    raw = {}
    for name, own in base.items():
        if not mergeable(own):
            continue
        one, two = vectors(base, members[:2], name)
        if own.ndim == 2:
            u, s, vh = torch.linalg.svd(one, full_matrices=True)
            turned = u.T @ two @ vh.T
            turned.diagonal().zero_()
            rank = int(((s.cumsum(0) / s.sum()) > 0.3).float().argmax())
            turned[:rank, :rank] = 0
            raw[name] = one + u @ turned @ vh
        else:
            raw[name] = one if name in ("position", "temperature") else one + two
    lengths = [torch.cat([vectors(base, members[:2], n)[i].flatten() for n in raw]).norm() for i in range(2)]
    scale = sum(lengths) / 2 / torch.cat([t.flatten() for t in raw.values()]).norm()
    same(found, {n: base[n] + scale * t for n, t in raw.items()}, 1e-5)


@pytest.mark.fusionbench
def test_dop_without_steps_is_a_chain_of_averages(world: World) -> None:
    backbone, base, members = world
    found = method("dop", num_steps=0, shuffle_order=False).merge(base, members, context(backbone)).shared
    wanted = {
        n: ((members[0].weights[n] + members[1].weights[n]) / 2 + members[2].weights[n]) / 2
        for n, t in base.items()
        if mergeable(t) and n not in ("position", "temperature")
    }
    same(found, {**wanted, "position": base["position"], "temperature": base["temperature"]})


@pytest.mark.fusionbench
def test_continual_ties_is_ties_of_what_is_there_and_the_next(world: World) -> None:
    """Two steps by hand: λ τ_1, then + λ TIES(λ τ_1, τ_2)."""
    backbone, base, members = world
    given = {"threshold": 40.0, "scaling_factor": 0.5, "shuffle_order": False, "merge_func": "sum"}
    found = method("continual_ties", **given).merge(base, members[:2], context(backbone)).shared
    names = [n for n in sorted(base) if mergeable(base[n])]  # ties come apart and count twice
    taus = torch.cat([vectors(base, members[:2], n).reshape(2, -1) for n in names], dim=1)
    pile = torch.stack([0.5 * taus[0], taus[1]])
    size = pile.shape[1]
    least = pile.abs().sort(dim=1).values[:, [size - int(size * 0.4) - 1]]
    trimmed = pile * (pile.abs() >= least)
    elected = trimmed.sum(0).sign()
    moved = 0.5 * taus[0] + 0.5 * (trimmed * (trimmed.sign() == elected)).sum(0)
    parts = torch.split(moved, [base[n].numel() for n in names])
    same(found, {n: base[n] + p.view(base[n].shape) for n, p in zip(names, parts, strict=True)})


@pytest.mark.fusionbench
def test_doge_moves_the_blocks_matrices_where_entries_are_large(world: World) -> None:
    backbone, base, members = world
    found = method("doge_ta", K=10.0).merge(base, members, context(backbone)).shared
    inside = [n for n in base if n.startswith("blocks") and n.endswith("weight")]
    assert all(torch.equal(found[n], base[n]) for n in base if n not in inside)
    taus = torch.cat([vectors(base, members, n).flatten(1) for n in inside], dim=1).abs()
    kept = taus >= taus.sort(dim=1).values[:, [int(taus.shape[1] * 0.9)]]
    moved = torch.cat([(found[n] - base[n]).flatten() for n in inside]) != 0
    assert torch.equal(moved & ~kept.any(0), torch.zeros_like(moved))
    assert float(moved.float().mean()) > 0.1
    for name in inside:  # Σ_i λ_i (τ_i + Δ) with λ_i = 0.07 / ‖τ_i‖ is about 0.07 √T long, if all is kept
        assert 0.02 < float((found[name] - base[name]).norm()) < 0.5


@pytest.mark.fusionbench
def test_regmean_plusplus_solves_the_regression_of_each_linear_map(world: World) -> None:
    """By hand for the block's first maps, whose inputs are the averaged embeddings' outputs."""
    backbone, base, members = world
    ctx = context(backbone)
    found = method("regmean_plusplus", num_regmean_examples=64).merge(base, members, ctx).shared
    mean = {n: torch.stack([e.weights[n] for e in members]).mean(0) for n in base if mergeable(base[n])}
    network: Any = load_network(backbone, {**base, **mean})
    top = bottom = 0.0
    for expert in members:
        view = ctx.views[expert.task]
        inputs = view.task.batch(view.tuning, torch.arange(64), ctx.device).inputs
        with torch.no_grad():
            x = network.stem((inputs - 0.5) / 0.5).flatten(2).transpose(1, 2) + network.position
        gram = x.flatten(0, 1).T @ x.flatten(0, 1) / x[..., 0].numel()
        gram = 0.95 * gram + 0.05 * gram.diagonal().diag()
        top = top + gram @ expert.weights["blocks.0.attn.q.weight"].T
        bottom = bottom + gram
    assert isinstance(top, Tensor) and isinstance(bottom, Tensor)
    same(found, {"blocks.0.attn.q.weight": torch.linalg.solve(bottom, top).T}, 1e-4)
    same(found, {n: t for n, t in mean.items() if not n.startswith("blocks") or n.endswith("bias")})


@pytest.mark.fusionbench
def test_regmean_plusplus_is_what_the_catalogue_s_own_computes(world: World) -> None:
    """On the same rows: all there are."""
    backbone, base, members = world
    entry = CATALOG.get("merging", "regmean_plusplus")
    own = entry.create(entry.card.bind("test", {"num_examples": 64, "alpha": 0.95}))
    wanted = own.merge(base, members, context(backbone)).shared
    found = method("regmean_plusplus", num_regmean_examples=64).merge(base, members, context(backbone)).shared
    same(found, dict(wanted), 1e-4)


# --------------------------------------------------------------------------- networks with routers


def served_and_original(name: str, world: World, **given: Any) -> tuple[Tensor, Tensor, Merged]:
    """Features of our network and of the one that FusionBench returned."""
    backbone, base, members = world
    made, ctx = method(name, **given), context(backbone)
    with sandbox(ctx):
        original = made.run(base, members, ctx).eval()
        for module in original.modules():
            if hasattr(module, "batch_reduce"):
                module.batch_reduce = False
        with torch.no_grad():
            theirs = backbone.features(original, images(8))
    merged = made.merge(base, members, ctx)
    with torch.no_grad():
        ours = backbone.features(made.network(backbone, merged, TASKS[0]), images(8))
    return ours, theirs, merged


@pytest.mark.fusionbench
@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("smile", {"gate_k": 4}),
        ("smile", {"gate_k": 2, "k": 3, "top_k": 2}),
        ("smile", {"gate_k": 1, "k": 4, "top_k": 9, "average_experts": True}),
        ("we_moe", {"max_steps": 4, "lr": 0.01}),
        ("e_we_moe", {"max_steps": 4, "lr": 0.01, "router_hidden_layers": 1}),
    ],
)
def test_the_served_network_computes_what_fusion_bench_made(
    world: World, name: str, given: dict[str, Any]
) -> None:
    ours, theirs, _ = served_and_original(name, world, **given)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


@pytest.mark.fusionbench
def test_smile_with_one_expert_of_full_rank_is_that_expert(world: World) -> None:
    backbone, base, members = world
    made = method("smile", k=64, average_experts=True)
    network = made.network(backbone, made.merge(base, members[:1], context(backbone)), TASKS[0])
    assert sum(isinstance(m, RoutedLinear) for m in network.modules()) == 6
    assert not any(n in {"position", "temperature"} for n, _ in network.named_buffers())
    alone = dict(members[0].weights) | {n: base[n] for n in ("position", "temperature")}
    found, wanted = (backbone.features(n, images()) for n in (network, load_network(backbone, alone)))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.fusionbench
@pytest.mark.parametrize("name", ["we_moe", "e_we_moe"])
def test_routers_start_from_task_arithmetic_and_learn(world: World, name: str) -> None:
    """With routers of one layer whose weights are small, an untrained merge is task arithmetic, nearly."""
    backbone, base, members = world
    given = {"router_hidden_layers": 1} | ({"tv_prune_ratio": 0.0} if name == "e_we_moe" else {})
    untrained, _, merged = served_and_original(name, world, max_steps=0, **given)
    added = TaskArithmetic(0.3, [0.3]).merge(base, members, context(backbone)).shared
    wanted, plain = (backbone.features(load_network(backbone, w), images(8)).detach() for w in (added, base))
    torch.testing.assert_close(untrained, wanted, rtol=0, atol=0.02)
    assert float((plain - wanted).abs().max()) > 0.1
    outside = {n: t for n, t in added.items() if ".mlp." not in n}
    same(merged.shared, outside)
    assert torch.equal(merged.shared["blocks.0.mlp.up.weight"], base["blocks.0.mlp.up.weight"])
    trained, _, _ = served_and_original(name, world, max_steps=30, lr=0.01, **given)
    heads = [context(backbone).views[t] for t in TASKS]
    before, after = (sum(_entropy(v, f) for v in heads) for f in (untrained, trained))
    assert after < before


def _entropy(view: TaskView, features: Tensor) -> float:
    class Fixed(Tiny):
        def features(self, network: nn.Module, inputs: Any) -> Tensor:
            return features

    logs = view.task.outputs(Model(Fixed(), nn.Identity()), view.head, images(8)).log_softmax(-1)
    return -float((logs.exp() * logs).sum(-1).mean())


@pytest.mark.fusionbench
def test_an_mlp_that_is_no_module_is_refused() -> None:
    from mergesec_methods.fusionbench.routers import mlps

    shapes = {
        "encoder.layer.0.attention.self.query.weight": (4, 4), "encoder.layer.0.attention.self.key.weight": (4, 4),
        "encoder.layer.0.attention.self.value.weight": (4, 4),
        "encoder.layer.0.attention.output.dense.weight": (4, 4),
        "encoder.layer.0.intermediate.dense.weight": (6, 4), "encoder.layer.0.output.dense.weight": (4, 6),
    }  # fmt: skip

    class Bert(Tiny):
        def anatomy(self) -> Anatomy:
            return describe(shapes, 1)

    with pytest.raises(ContractError, match="not a module of its own"):
        mlps(Bert(), {n: torch.zeros(s) for n, s in shapes.items()})


# --------------------------------------------------------------------------- why some names are not there


@pytest.mark.fusionbench
@pytest.mark.parametrize(
    ("target", "given", "error"),
    [
        ("method.tall_mask.task_arithmetic:TallMaskTaskArithmeticAlgorithm", {"tall_mask_lambda": 0.6}, TypeError),
        ("method.linear.linear_interpolation:LinearInterpolationAlgorithm", {"t": 0.5}, AssertionError),
        ("method.task_singular_vector.TSVC:TaskSingularVectorCompression", {}, NotImplementedError),
        ("method.opcm.opcm:OPCMForCLIP", {"alpha": 0.5, "save_on_every_step": False}, AttributeError),
        ("method.pruning.magnitude_diff_pruning:MagnitudeDiffPruningAlgorithm", {"prune_ratio": 0.5}, AssertionError),
    ],
)  # fmt: skip
def test_what_is_said_not_to_run_does_not(
    world: World, target: str, given: dict[str, Any], error: type
) -> None:
    backbone, base, members = world
    ctx = context(backbone)
    with pytest.raises(error), sandbox(ctx):
        execute(find(target)(**given), pool(FusionBenchMerge().networks(base, members, ctx)), ctx)


# --------------------------------------------------------------------------- without FusionBench


def test_without_fusion_bench_the_names_are_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergesec.planning.catalog.importable", lambda module: module != "fusion_bench")
    catalog = load_catalog()
    assert not [e for e in catalog if e.card.name.startswith("fusionbench/")]
    with pytest.raises(UsageError, match=r"pip install 'mergesec\[fusionbench\]'"):
        catalog.get("merging", "fusionbench/smile")


def test_a_grid_that_asks_for_what_is_not_installed_exits_with_2(bench: Any) -> None:
    block = bench.home / "block"
    block.mkdir()
    (block / "sitecustomize.py").write_text("import sys\nsys.modules['fusion_bench'] = None\n")
    bench.environment["PYTHONPATH"] = str(block)
    grid = bench.grid(axes={"merging": ["fusionbench/opcm"]})
    ran = bench("plan", *bench.arguments(grid))
    assert ran.code == 2
    assert "pip install 'mergesec[fusionbench]'" in ran.err
    assert "fusionbench/" not in bench("list", "merging").out
