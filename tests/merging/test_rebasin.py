"""Git Re-Basin and the matching it shares with re-alignment and PaRaMS."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergesec.anatomy import Anatomy, Attention, Block, Linear, Mlp
from mergesec.conformance.micro import MicroViT
from mergesec.contracts import ContractError, Expert, MergeContext, MergeMethod, Model
from mergesec.surgery import assign
from mergesec.weights import digest_weights
from mergesec_methods._matching import FEW, Anchors, best_order, matched_order
from mergesec_methods.merging.git_rebasin import GitRebasin, Heads, HiddenUnits, groups, match_group, to_mean
from mergesec_methods.merging.simple_average import SimpleAverage
from mergesec_methods.merging.task_arithmetic import TaskArithmetic
from mergesec_methods.merging.ties import Ties

BACKBONE = MicroViT()
ANATOMY = BACKBONE.anatomy()
Named = dict[str, torch.Tensor]


def context(inner: MergeMethod | None) -> MergeContext:
    return MergeContext(torch.device("cpu"), 0, BACKBONE, {}, lambda merged: 0.0, inner=inner)


def rebasin(reference: str = "base", attention: str = "inner") -> GitRebasin:
    return GitRebasin("task_arithmetic", reference, attention)


def random_base(dtype: torch.dtype = torch.float32) -> Named:
    """The micro base with every tensor away from its initial zeros and ones."""
    generator = torch.Generator().manual_seed(3)
    base = BACKBONE.base_weights()
    noise = {n: torch.randn(t.shape, generator=generator) for n, t in base.items()}
    return {n: (t + 0.3 * noise[n]).to(dtype) if t.is_floating_point() else t for n, t in base.items()}


def expert(base: Named, seed: int, size: float = 0.02) -> Named:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: (t + size * torch.randn(t.shape, generator=generator)).to(t.dtype) if t.is_floating_point() else t
        for n, t in base.items()
    }


def shuffled(weights: Named, seed: int, attention: str = "inner") -> Named:
    """The same function with hidden units, heads and coordinates within heads in random order."""
    generator = torch.Generator().manual_seed(seed)
    changed: Any = weights
    for group in groups(ANATOMY, attention):
        if isinstance(group, HiddenUnits):
            orders: tuple[torch.Tensor, ...] = (torch.randperm(group.mlp.hidden, generator=generator),)
        else:
            assert isinstance(group, Heads)
            count, size = group.attention.heads, group.attention.head_dim
            heads = torch.arange(count).flip(0)
            within = [torch.stack([torch.randperm(size, generator=generator) for _ in range(count)])] * 2
            if group.inner:
                within[1] = within[1].flip(1)
            else:
                within = [torch.arange(size).expand(count, size)] * 2
            orders = tuple((heads[:, None] * size + w).flatten() for w in within)
        changed = group.write(changed, orders)
    return dict(changed)


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return digest_weights(one) == digest_weights(other)


def features(weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    network = BACKBONE.build()
    network.load_state_dict(dict(weights), strict=True)
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return Model(BACKBONE, network.eval()).features(images)


# --------------------------------------------------------------------------- what alignment does


@pytest.mark.parametrize("attention", ["none", "heads", "inner"])
def test_permuted_experts_come_back_exactly(attention: str) -> None:
    base = random_base()
    for seed in range(3):
        own = expert(base, seed)
        moved = shuffled(own, 50 + seed, attention)
        assert not same(moved, own)
        aligned, counts = rebasin(attention=attention).align(base, [Expert("a", moved)], ANATOMY)
        assert same(aligned[0].weights, own)
        assert counts["a"] > 0


def test_permuting_and_aligning_keep_the_function() -> None:
    base = random_base()
    own = expert(base, 1, 0.2)
    reference = features(own)
    moved = shuffled(own, 7)
    assert float((features(moved) - reference).abs().max()) < 1e-5
    for reference_name in ("base", "first", "mean"):
        # A far-away network: what it is matched to does not resemble it, so the orders are arbitrary.
        far = {n: t.roll(1, 0) if t.ndim else t for n, t in expert(base, 9, 1.0).items()}
        aligned, counts = rebasin(reference_name).align(
            base, [Expert("far", far), Expert("own", moved)], ANATOMY
        )
        assert counts["far"] > 0
        assert float((features(aligned[0].weights) - features(far)).abs().max()) < 1e-5
        assert float((features(aligned[1].weights) - reference).abs().max()) < 1e-5


@pytest.mark.parametrize("reference", ["base", "first", "mean"])
def test_experts_fine_tuned_from_the_base_are_left_as_they_are(reference: str) -> None:
    base = random_base()
    members = [Expert(f"t{i}", expert(base, i)) for i in range(3)]
    aligned, counts = rebasin(reference).align(base, members, ANATOMY)
    assert all(a.weights is m.weights for a, m in zip(aligned, members, strict=True))
    assert counts == {"t0": 0, "t1": 0, "t2": 0}


@pytest.mark.parametrize("reference", ["base", "first", "mean"])
@pytest.mark.parametrize("inner", [TaskArithmetic(0.3, [0.3]), Ties(0.2, "sum", 0.3, [0.3]), SimpleAverage()])
def test_merging_permuted_experts_is_merging_unpermuted_ones(reference: str, inner: MergeMethod) -> None:
    """Whatever the reference, the group comes home to the base."""
    base = random_base()
    own = [Expert(f"t{i}", expert(base, i)) for i in range(3)]
    moved = [Expert(e.task, shuffled(dict(e.weights), 70 + i)) for i, e in enumerate(own)]
    before = [digest_weights(e.weights) for e in moved]
    wanted = inner.merge(base, own, context(None))
    merged = rebasin(reference).merge(base, moved, context(inner))
    assert same(merged.shared, wanted.shared)
    assert not same(inner.merge(base, moved, context(None)).shared, wanted.shared)
    assert [digest_weights(e.weights) for e in moved] == before
    assert set(merged.info["moved"]) == {"t0", "t1", "t2"}
    assert all(count > 0 for count in merged.info["moved"].values())
    assert {k: v for k, v in merged.info.items() if k != "moved"} == dict(wanted.info)


def test_the_order_of_experts_does_not_matter() -> None:
    base = random_base()
    moved = [Expert(f"t{i}", shuffled(expert(base, i, 0.2), 70 + i)) for i in range(3)]
    for reference in ("base", "mean"):
        digests = set()
        for order in ((0, 1, 2), (2, 0, 1), (1, 0, 2)):
            aligned, _ = rebasin(reference).align(base, [moved[i] for i in order], ANATOMY)
            digests.add(tuple(sorted(e.task + digest_weights(e.weights) for e in aligned)))
            assert [e.task for e in aligned] == [f"t{i}" for i in order]
        assert len(digests) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_permuted_exactly(dtype: torch.dtype) -> None:
    base = random_base(dtype)
    own = expert(base, 1)
    aligned, _ = rebasin().align(base, [Expert("a", shuffled(own, 5))], ANATOMY)
    assert same(aligned[0].weights, own)
    assert aligned[0].weights["seen"] is own["seen"]


def test_attention_none_leaves_the_heads_and_heads_leaves_their_insides() -> None:
    base = random_base()
    own = expert(base, 1)
    moved = shuffled(own, 5)
    for attention in ("none", "heads"):
        aligned, _ = rebasin(attention=attention).align(base, [Expert("a", moved)], ANATOMY)
        for name, tensor in aligned[0].weights.items():
            if ".mlp." in name:
                assert torch.equal(tensor, own[name]), name
            elif attention == "none":
                assert tensor is moved[name]
    with_heads = aligned[0].weights["blocks.0.attn.q.weight"]
    assert not torch.equal(with_heads, own["blocks.0.attn.q.weight"])


def test_refuses_what_it_cannot_merge() -> None:
    base = random_base()
    with pytest.raises(ContractError, match="wraps another"):
        rebasin().merge(base, [Expert("a", base)], context(None))
    with pytest.raises(ContractError, match="no expert"):
        rebasin().merge(base, [], context(SimpleAverage()))
    broken = {n: t for n, t in base.items() if n != "stem.bias"}
    with pytest.raises(ContractError, match=r"'cars'.*'stem.bias'"):
        rebasin().merge(base, [Expert("cars", broken)], context(SimpleAverage()))


# --------------------------------------------------------------------------- optimality


def tiny() -> tuple[Anatomy, Mapping[str, tuple[int, ...]]]:
    """One block of width 4 with 3 hidden units, 2 heads of size 2, packed query/key/value, a gate, no key bias."""
    maps = [Linear("qkv", b, (4 * i, 4 * i + 4)) for i, b in enumerate(("qkv_bias", None, "qkv_bias"))]
    attention = Attention(*maps, Linear("o", "o_bias"), heads=2, head_dim=2)
    mlp = Mlp(Linear("up", "up_bias"), Linear("down", "down_bias"), 3, Linear("gate", None))
    shapes = {"qkv": (12, 4), "qkv_bias": (12,), "o": (4, 4), "o_bias": (4,), "up": (3, 4), "up_bias": (3,)}
    shapes |= {"gate": (3, 4), "down": (4, 3), "down_bias": (4,)}
    return Anatomy((Block(0, attention, mlp),)), shapes


def drawn(shapes: Mapping[str, tuple[int, ...]], seed: int) -> Named:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


def inner_product(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    return float(sum((one[n].double() * other[n].double()).sum() for n in one))


@given(st.integers(0, 2**31))
@settings(max_examples=8, deadline=None)
def test_one_round_is_the_optimum_over_all_permutations(seed: int) -> None:
    """Brute force over every order of hidden units, heads and coordinates within heads, together."""
    anatomy, shapes = tiny()
    base, own = drawn(shapes, seed), drawn(shapes, seed + 1)
    hidden, heads = groups(anatomy, "inner")
    swaps = [torch.tensor(p) for p in itertools.permutations(range(2))]
    attention_orders = []
    for head, *inner in itertools.product(swaps, repeat=5):
        rows = [torch.stack([inner[2 * k], inner[2 * k + 1]]) for k in range(2)]
        attention_orders.append(tuple((head[:, None] * 2 + r).flatten() for r in rows))
    best = max(
        inner_product(base, heads.write(hidden.write(own, (torch.tensor(p),)), orders))
        for p in itertools.permutations(range(3))
        for orders in attention_orders
    )
    aligned, _ = rebasin().align(base, [Expert("a", own)], anatomy)
    assert inner_product(base, aligned[0].weights) == pytest.approx(best, abs=1e-9)
    again, counts = rebasin().align(base, aligned, anatomy)
    assert counts["a"] == 0
    assert again[0].weights is aligned[0].weights


def test_groups_do_not_interact() -> None:
    """Why one round is enough: what a group's best orders are does not depend on the other groups' orders."""
    base, own = random_base(), expert(random_base(), 1, 1.0)
    for group in groups(ANATOMY, "inner"):
        before = match_group(group, base, [own], "base")[0]
        others: Any = own
        for other in groups(ANATOMY, "inner"):
            if other != group:
                others = other.write(others, match_group(other, base, [others], "base")[0])
        after = match_group(group, base, [others], "base")[0]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_merge_many_raises_every_pairs_product_and_stops() -> None:
    base = random_base()
    group = groups(ANATOMY, "none")[0]
    members = [group.read(shuffled(expert(base, i, 0.3), 20 + i, "none")) for i in range(3)]

    def spread(placed: Any) -> float:
        return sum(float((a[0] - b[0]).square().sum()) for a, b in itertools.combinations(placed, 2))

    orders, centre = to_mean(group, members)
    placed = [(m[0][o[0]],) for m, o in zip(members, orders, strict=True)]
    assert spread(placed) < 0.5 * spread(members)
    torch.testing.assert_close(centre[0], torch.stack([p[0] for p in placed]).mean(0))
    again, _ = to_mean(group, placed)
    assert all(torch.equal(o[0], torch.arange(len(o[0]))) for o in again)


# --------------------------------------------------------------------------- the shared matching


@given(st.integers(1, 6), st.integers(0, 2**31), st.booleans())
@settings(max_examples=40, deadline=None)
def test_eased_assignment_beats_every_permutation(size: int, seed: int, maximize: bool) -> None:
    scores = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scores += 5 * torch.arange(size)  # something for the potentials to take off
    order = best_order(scores, maximize=maximize)
    places = torch.arange(size)
    totals = [float(scores[list(p), places].sum()) for p in itertools.permutations(range(size))]
    wanted = max(totals) if maximize else min(totals)
    assert float(scores[order, places].sum()) == pytest.approx(wanted, abs=1e-12)


def units(count: int, seed: int, features: int = 150) -> torch.Tensor:
    """Units of very different sizes with a common part, as networks have them."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, features, generator=generator, dtype=torch.float64)
    return (rows + 0.5) * torch.linspace(0.1, 3.0, count, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("drift", [0.01, 1.0, 30.0])
def test_eased_assignment_of_many_units_is_scipys(drift: float, maximize: bool) -> None:
    anchor = units(FEW + 50, 0)
    noise = torch.randn(anchor.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scores = (anchor + drift * noise) @ anchor.T
    wanted = assign(scores, maximize=maximize)
    assert torch.equal(best_order(scores, maximize=maximize), wanted)


def test_eased_assignment_copes_with_ties_and_refuses_nan() -> None:
    size = FEW + 10
    for scores in (torch.zeros(size, size), torch.eye(size), (torch.arange(size) % 7).expand(size, size)):
        order = best_order(scores.double(), maximize=False)
        assert sorted(order.tolist()) == list(range(size))
        assert float(scores[order, torch.arange(size)].sum()) == float(
            scores[assign(scores.double(), maximize=False), torch.arange(size)].sum()
        )
    broken = torch.randn(size, size, dtype=torch.float64)
    broken[3, 4] = torch.nan
    with pytest.raises(ValueError, match="invalid"):
        best_order(broken, maximize=True)


@pytest.mark.parametrize("drift", [0.0, 0.01, 0.1, 1.0, 3.0])
@pytest.mark.parametrize("permuted", [False, True])
def test_the_shortcut_gives_what_the_assignment_gives(drift: float, permuted: bool) -> None:
    anchor = units(FEW + 50, 0)
    noise = torch.randn(anchor.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    own = anchor + drift * noise * anchor.norm(dim=1, keepdim=True) / anchor.shape[1] ** 0.5
    if permuted:
        own = own[torch.randperm(len(own), generator=torch.Generator().manual_seed(2))]
    wanted = assign(own @ anchor.T, maximize=True)
    anchors = Anchors(anchor)
    assert torch.equal(anchors.order(own), wanted)
    guess = anchors._nearest(own)
    settled = guess is not None and anchors._settles(own, guess)
    assert settled == (drift < 1.0)


def test_reach_is_never_above_half_the_distance() -> None:
    for seed, scale in ((0, 1e-6), (1, 1.0), (2, 1e6)):
        anchor = scale * units(300, seed)
        anchor[7] = anchor[8] * (1 + 1e-6)
        anchor[9] = anchor[10]
        anchor[11:13] = 0.0
        distances = torch.cdist(anchor, anchor, compute_mode="donot_use_mm_for_euclid_dist")
        half = distances.fill_diagonal_(torch.inf).amin(dim=1) / 2
        reach = Anchors(anchor).reach
        assert (reach <= half).all()
        assert (reach[20:] > 0.9 * half[20:]).all()


def test_equal_units_stay_where_they_are() -> None:
    """Dead units are all alike: no placement of theirs is better, so none is changed."""
    anchor = units(FEW + 20, 0)
    anchor[30:60] = 0.0
    assert torch.equal(Anchors(anchor).order(anchor), torch.arange(len(anchor)))
    ties = torch.zeros(5, 5, dtype=torch.float64)
    assert torch.equal(matched_order(ties), torch.arange(5))
