"""MergeLock, the baselines, ARF, Trap² and MergeGuard, against algebra, plain autograd and brute force."""

from __future__ import annotations

import outcomes
import pytest
import torch
from torch import Tensor
from training_worlds import World, plain

from mergesec.anatomy import Attention, Linear
from mergesec.contracts import (
    ContractError,
    Model,
    load_network,
)
from mergesec.surgery import head_columns, head_rows, hidden_units, read, reorder_heads
from mergesec_methods._training import squared_norm, trained_names
from mergesec_methods.protection.defenses import arf, mergeguard
from mergesec_methods.protection.defenses.arf import Arf
from mergesec_methods.protection.defenses.mergeguard import MergeGuard, Score
from mergesec_methods.protection.defenses.mergelock import MergeLock
from mergesec_methods.protection.defenses.params import Params
from mergesec_methods.protection.defenses.random_permutation import RandomPermutation
from mergesec_methods.protection.defenses.sign_flips import SignFlips
from mergesec_methods.protection.defenses.trap2 import FULL, LOW_RANK, Trap2

CPU = torch.device("cpu")
UNIT_ROUNDOFF = torch.finfo(torch.float32).eps / 2
ATTENTION = Attention(*(Linear(n, None) for n in "qkvo"), heads=3, head_dim=8)
EXACT = {
    "gaussian": MergeLock(),
    "orthogonal": MergeLock("orthogonal"),
    "log_uniform": MergeLock("log_uniform"),
    "P&L": MergeLock(permute=True),
    "locked in any order": MergeLock(heads=True),
    "signs": SignFlips(),
    "permutation": RandomPermutation(),
    "everything permuted": RandomPermutation(dimensions=True),
    "scaling only": Params(permute=False),
    "permutation only": Params(scaling="none"),
}


@pytest.mark.parametrize("kind", EXACT)
def test_function_is_kept(architecture, kind: str) -> None:
    weights, defense = dict(architecture.expert), EXACT[kind]
    before = {n: t.clone() for n, t in weights.items()}
    protected = defense.protect(weights, architecture.protect_context(3))
    moved = (architecture.logits(weights) - architecture.logits(dict(protected.weights))).abs().max()
    assert moved <= protected.report.get("logit_bound", 1e-5)
    assert list(protected.weights) == list(weights)
    for name, tensor in protected.weights.items():
        assert (tensor.shape, tensor.dtype) == (weights[name].shape, weights[name].dtype)
        assert torch.equal(before[name], weights[name])
    attention = architecture.anatomy().blocks[0].attention
    changed = not torch.equal(protected.weights[attention.value.weight], weights[attention.value.weight])
    assert changed == (kind != "permutation only")


@pytest.mark.parametrize("kind", ["P&L", "locked in any order", "everything permuted"])
def test_grouped_heads_and_rotary_positions_allow_less(rotary, kind: str) -> None:
    protected = EXACT[kind].protect(rotary.expert, rotary.protect_context(3))
    moved = (rotary.logits(rotary.expert) - rotary.logits(dict(protected.weights))).abs().max()
    assert moved <= protected.report.get("logit_bound", 1e-5)
    attention = rotary.anatomy().blocks[0].attention
    for linear in (attention.query, attention.value):
        assert not torch.equal(protected.weights[linear.weight], rotary.expert[linear.weight])


def test_same_seed_same_weights_other_seed_others(mini) -> None:
    for kind in ("gaussian", "signs", "permutation"):
        one, same, other = (
            EXACT[kind].protect(mini.expert, mini.protect_context(s)).weights for s in (1, 1, 2)
        )
        assert all(torch.equal(one[n], same[n]) for n in one)
        assert not torch.equal(one["blocks.0.attn.q.weight"], other["blocks.0.attn.q.weight"])


# ------------------------------------------------------------------ MergeLock


@pytest.mark.parametrize(("law", "bound"), [("gaussian", 25.0), ("orthogonal", 25.0), ("log_uniform", 25.0)])
def test_matrices_cancel_and_obey_their_condition_number(law: str, bound: float) -> None:
    m = MergeLock(law, condition=bound).draw(ATTENTION, torch.Generator().manual_seed(4))
    eye = torch.eye(8, dtype=torch.float64).expand(3, 8, 8)
    assert torch.allclose(m.query.mT @ m.key, eye, atol=1e-12)
    assert torch.allclose(m.output @ m.value, eye, atol=1e-12)
    assert m.condition() <= bound * (1 + 1e-9)
    assert m.condition() == pytest.approx(1.0) if law == "orthogonal" else m.condition() > 3
    assert (m.query - m.value).abs().min() > 0  # two independent matrices, and another pair for every head
    assert (m.query[0] - m.query[1]).abs().min() > 0


def test_the_floor_raises_only_the_smallest_singular_values() -> None:
    free, held = (
        MergeLock(condition=c).draw(ATTENTION, torch.Generator().manual_seed(4)).query for c in (0.0, 10.0)
    )
    spectrum = torch.linalg.svdvals(free)
    floor = spectrum[:, :1] / 10
    assert (spectrum < floor).any()
    assert torch.allclose(torch.linalg.svdvals(held), torch.maximum(spectrum, floor))
    wide = Attention(*(Linear(n, None) for n in "qkvo"), heads=4, head_dim=64)
    lengths = MergeLock(condition=0.0).draw(wide, torch.Generator().manual_seed(0)).query.square().sum((1, 2))
    assert torch.allclose(lengths, torch.tensor(64.0).double(), rtol=0.1)  # E‖A x‖² = ‖x‖²


def test_rotations_are_haar() -> None:
    """Entries of a Haar matrix have mean 0 and variance 1/n; without the signs of R the diagonal is biased."""
    m = MergeLock("orthogonal").draw(
        Attention(*(Linear(n, None) for n in "qkvo"), heads=3000, head_dim=3),
        torch.Generator().manual_seed(1),
    )
    assert m.query.mean(0).abs().max() < 0.05
    assert (m.query.square().mean(0) - 1 / 3).abs().max() < 0.03


def test_report_bounds_what_float32_loses(architecture) -> None:
    report = MergeLock().protect(architecture.expert, architecture.protect_context()).report
    assert len(report["blocks"]) == len(architecture.anatomy().blocks)
    assert 1 < report["condition"] <= 400 * (1 + 1e-9)
    assert 0 < report["effective_error"] <= UNIT_ROUNDOFF * report["condition"]


def test_locking_leaves_the_mlp_and_permuting_does_not(mini) -> None:
    for permute in (False, True):
        weights = MergeLock(permute=permute).protect(mini.expert, mini.protect_context()).weights
        for name, tensor in mini.expert.items():
            same = torch.equal(weights[name], tensor)
            assert same == (
                not (".attn." in name or (permute and ".mlp." in name))
                or name.endswith(("o.bias", "down.bias"))
            )


def test_mergelock_refuses_half_precision_and_bad_conditions(mini) -> None:
    half = {n: t.half() for n, t in mini.expert.items()}
    with pytest.raises(ContractError, match="float16"):
        MergeLock().protect(half, mini.protect_context())
    for law, condition in (("log_uniform", 0.0), ("gaussian", 0.5)):
        with pytest.raises(ValueError, match="condition"):
            MergeLock(law, condition)


# ------------------------------------------------------------------ baselines


def test_signs_are_exact_in_half_precision(packed) -> None:
    half = {n: t.half() for n, t in packed.expert.items()}
    flipped = SignFlips().protect(half, packed.protect_context())
    assert 0.35 < flipped.report["flipped"] < 0.65
    assert all(torch.equal(t.abs(), half[n].abs()) for n, t in flipped.weights.items())
    for block in packed.anatomy().blocks:
        a = block.attention
        (q, k, v), o = (
            (head_rows(flipped.weights, m, a)[0] for m in (a.query, a.key, a.value)),
            head_columns(flipped.weights, a),
        )
        (q0, k0, v0), o0 = (
            (head_rows(half, m, a)[0] for m in (a.query, a.key, a.value)),
            head_columns(half, a),
        )
        assert torch.equal(q.mT @ k, q0.mT @ k0)
        assert torch.equal(o @ v, o0 @ v0)
        assert not torch.equal(q, q0)
        assert not torch.equal(v, v0)


def test_switching_one_pair_off_leaves_the_other_alone(mini) -> None:
    context, name = mini.protect_context(), "blocks.1.attn.{}.weight".format
    both, values = (SignFlips(query_key=q).protect(mini.expert, context).weights for q in (True, False))
    assert torch.equal(both[name("v")], values[name("v")])
    assert torch.equal(values[name("q")], mini.expert[name("q")])
    assert not torch.equal(both[name("q")], values[name("q")])


def test_permutations_move_whole_units_and_whole_heads(architecture) -> None:
    half = {n: t.half() for n, t in architecture.expert.items()}
    protected = RandomPermutation().protect(half, architecture.protect_context(1))
    for block in architecture.anatomy().blocks:
        now, then = (hidden_units(w, block.mlp) for w in (protected.weights, half))
        assert torch.equal(now.sort(0).values, then.sort(0).values)
        a = block.attention
        heads = [
            torch.cat([head_rows(w, m, a)[0] for m in (a.query, a.key, a.value)] + [head_columns(w, a).mT], 1)
            for w in (protected.weights, half)
        ]
        same = (heads[0][:, None] == heads[1]).flatten(2).all(2)
        assert torch.equal(same.sum(0), torch.ones(a.heads).long())
    assert protected.report["hidden_moved"] > 0.8
    alone = RandomPermutation(heads=False).protect(half, architecture.protect_context(1))
    assert "heads_moved" not in alone.report
    attention = architecture.anatomy().blocks[0].attention
    assert torch.equal(alone.weights[attention.query.weight], half[attention.query.weight])


def test_heads_go_where_they_are_sent(packed) -> None:
    attention = packed.anatomy().blocks[0].attention
    order = torch.tensor([2, 0, 1])
    moved = reorder_heads(packed.expert, attention, order, order)
    for linear in (attention.query, attention.key, attention.value):
        now, then = head_rows(moved, linear, attention), head_rows(packed.expert, linear, attention)
        assert torch.equal(now[0], then[0][order])
        assert torch.equal(now[1], then[1][order])
    assert torch.equal(head_columns(moved, attention), head_columns(packed.expert, attention)[order])
    assert torch.equal(read(moved, attention.output)[1], read(packed.expert, attention.output)[1])


def test_trained_tensors_are_found_with_and_without_low_rank() -> None:
    world = World()
    network = load_network(world.backbone, world.away)
    assert trained_names(network) == {n: n for n, _ in network.named_parameters()}
    assert squared_norm(network).item() == pytest.approx(
        sum(float(p.detach().square().sum()) for p in network.parameters()), rel=1e-5
    )
    low_rank = world.low_rank()
    names = trained_names(low_rank)
    assert len(names) == 2 * 6
    assert names["blocks.0.mlp.up.parametrizations.weight.original"] == "blocks.0.mlp.up.weight"
    weights = plain(world, low_rank)
    assert squared_norm(low_rank).item() == pytest.approx(
        sum(float(weights[n].square().sum()) for n in names.values()), rel=1e-5
    )


# ------------------------------------------------------------------ ARF


def test_hinge_and_its_gradient_by_hand(packed) -> None:
    """One matrix inside the margin and the rest outside; packed rows count as three matrices."""
    anatomy, margin = packed.anatomy(), 0.05
    network, base = packed.network.float(), packed.base
    moved = {n: t.clone() for n, t in base.items()}
    generator, gaps, wanted = torch.Generator().manual_seed(0), [], {}
    for index, linear in enumerate(arf.attention_linears(anatomy)):
        rows = slice(*linear.rows) if linear.rows else slice(None)
        push = torch.randn(moved[linear.weight][rows].shape, generator=generator)
        length = (0.02 if index % 3 == 0 else 0.07) * base[linear.weight][rows].norm()
        moved[linear.weight][rows] += push * (length / push.norm())
        gap = margin * base[linear.weight][rows].norm() - length
        gaps.append(max(0.0, float(gap)))
        share = wanted.setdefault(linear.weight, torch.zeros_like(base[linear.weight]))
        share[rows] = -push / push.norm() if gap > 0 else 0.0
    network.load_state_dict(moved)
    network.zero_grad()
    value = arf.hinge(network, base, anatomy, margin)
    value.backward()
    assert min(gaps) == 0.0 < sum(gaps)
    assert value.item() == pytest.approx(sum(gaps), rel=1e-4)
    for name, gradient in wanted.items():
        assert torch.allclose(network.get_parameter(name).grad, gradient, atol=1e-4), name


def test_hinge_at_the_base_is_full_and_finite() -> None:
    world = World()
    model, anatomy = world.model(world.base), world.backbone.anatomy()
    value = arf.hinge(model.network, world.base, anatomy, 0.05)
    norms = [world.base[m.weight].norm() for m in arf.attention_linears(anatomy)]
    assert value.item() == pytest.approx(0.05 * float(sum(norms)), rel=1e-5)
    value.backward()
    assert model.network.get_parameter("blocks.0.attn.q.weight").grad.abs().max() == 0


def test_arf_loss_is_task_plus_hinge() -> None:
    world = World()
    Arf(strength=0.7, margin=0.3).train(world.context())
    model, anatomy = world.model(world.away), world.backbone.anatomy()
    expected = world.task_loss(model) + 0.7 * arf.hinge(model.network, world.base, anatomy, 0.3)
    assert world.losses[0](model, world.batch).item() == pytest.approx(expected.item(), rel=1e-6)
    assert expected.item() > world.task_loss(model).item() + 0.1


def test_arf_reaches_its_margin_and_reports_it() -> None:
    world = World(epochs=6, seed=outcomes.seeds(1)[0])
    distances = {}
    for strength in (0.0, 10.0):
        defense = Arf(strength=strength, margin=0.2, transform="none")
        weights = defense.train(world.context(train=True))
        report = defense.protect(weights, world.protect_context()).report
        distances[strength] = report["distance_least"]
        assert report["reached"] == (1.0 if strength else 0.0)
        assert report["distance_least"] <= report["distance_mean"]
    assert distances[0.0] < 0.15
    assert distances[10.0] >= 0.198  # Adam overshoots


@pytest.mark.parametrize("transform", ["mergelock", "nonsymmetric"])
def test_arf_transforms_as_the_method_it_names(mini, transform: str) -> None:
    other = MergeLock() if transform == "mergelock" else Params(permute=False, scaling=transform)
    protected, plain = (
        d.protect(mini.expert, mini.protect_context()) for d in (Arf(transform=transform), other)
    )
    assert all(torch.equal(t, plain.weights[n]) for n, t in protected.weights.items())
    assert protected.report["condition"] == plain.report["condition"]
    name = "blocks.0.attn.q.weight"
    ratio = float((mini.expert[name] - mini.base[name]).norm() / mini.base[name].norm())
    assert protected.report["distance_least"] <= ratio * (1 + 1e-6)


# ------------------------------------------------------------------ Trap²


@pytest.mark.parametrize("weighting", ["inv", "inv_sqrt", "none"])
def test_trap2_loss_and_gradient_equal_plain_autograd(weighting: str) -> None:
    world = World()
    defense = Trap2(weighting=weighting, strength=0.3)
    defense.train(world.context())
    scale = defense.draw(world.context().generator())
    weight = {"inv": 1 / scale, "inv_sqrt": scale**-0.5, "none": 1.0}[weighting]
    at = {n: b + scale * (world.away[n] - b) if b.is_floating_point() else b for n, b in world.base.items()}
    nominal, first = world.gradients(world.away)
    scaled, second = world.gradients(at)
    model = world.model(world.away)
    value = world.losses[0](model, world.batch)
    value.backward()
    assert value.item() == pytest.approx(float(nominal - 0.3 * weight * scaled), rel=1e-5)
    for name, parameter in model.network.named_parameters():
        expected = first[name] - 0.3 * weight * scale * second[name]
        assert torch.allclose(parameter.grad, expected, atol=1e-6, rtol=1e-4), name
        assert torch.equal(parameter, world.away[name])


def test_trap2_scales_a_low_rank_update_as_a_whole() -> None:
    world = World(rank=2)
    network = world.low_rank()
    defense = Trap2(strength=0.3)
    defense.train(world.context())
    scale = defense.draw(world.context().generator())
    weights = plain(world, network)
    at = {n: b + scale * (weights[n] - b) if b.is_floating_point() else b for n, b in world.base.items()}
    (nominal, first), (scaled, second) = world.gradients(weights), world.gradients(at)
    value = world.losses[0](Model(world.backbone, network), world.batch)
    value.backward()
    assert value.item() == pytest.approx(float(nominal - 0.3 / scale * scaled), rel=1e-5)
    name = "blocks.1.attn.v"
    update = network.get_submodule(f"{name}.parametrizations.weight.0")
    total = first[f"{name}.weight"] - 0.3 * second[f"{name}.weight"]  # the weight 1/s and the factor s cancel
    assert torch.allclose(update.b.grad, update.scale * total @ update.a.T, atol=1e-6, rtol=1e-4)
    assert torch.allclose(update.a.grad, update.scale * update.b.T @ total, atol=1e-6, rtol=1e-4)
    assert network.blocks[1].attn.v.parametrizations.weight.original.grad is None


def test_scales_are_uniform_outside_of_the_gap() -> None:
    defense, generator = Trap2(), torch.Generator().manual_seed(0)
    drawn = torch.tensor([defense.draw(generator) for _ in range(4000)])
    assert 0.05 <= drawn.min() < 0.06
    assert 1.99 < drawn.max() <= 2.0
    assert not ((drawn > 0.95) & (drawn < 1.05)).any()
    assert abs(float((drawn < 0.95).float().mean()) - 0.9 / 1.85) < 0.03
    assert abs(float(drawn[drawn < 0.95].mean()) - 0.5) < 0.02
    assert all(Trap2(low=0.99).draw(generator) >= 1.05 for _ in range(20))
    with pytest.raises(ValueError, match="no scale"):
        Trap2(low=0.97, high=1.02)


def test_trap2_takes_the_published_strengths() -> None:
    losses = {}
    for rank, expected in ((0, FULL), (2, LOW_RANK)):
        world = World(rank=rank)
        Trap2().train(world.context())
        Trap2(strength=expected).train(world.context())
        losses[rank] = [loss(world.model(world.away), world.batch).item() for loss in world.losses]
        assert losses[rank][0] == losses[rank][1]
    assert losses[0] != losses[2]


@pytest.mark.slow
def test_trap2_makes_half_the_task_vector_worse_than_plain_training() -> None:
    """The effect itself, with a large λ: good at scale 1, worse at 1/2 than an expert trained as usual."""
    world, losses = World(epochs=8, max_train=128, seed=outcomes.seeds(1)[0]), {}
    for kind, weights in (
        ("plain", world.context(train=True).fit()),
        ("trap", Trap2(strength=0.3).train(world.context(train=True))),
    ):
        half = {n: (b + weights[n]) / 2 if b.is_floating_point() else b for n, b in world.base.items()}
        losses[kind] = [float(world.gradients(w)[0]) for w in (weights, half)]
    assert losses["trap"][0] < 0.3
    assert losses["trap"][1] > losses["plain"][1] + 0.5


# ------------------------------------------------------------------ MergeGuard


def test_stage_one_adds_the_penalty() -> None:
    world = World()
    MergeGuard(penalty=0.02).train(world.context())
    model = world.model(world.away)
    squares = sum(float(p.detach().square().sum()) for p in model.network.parameters())
    expected = world.task_loss(model).item() + 0.02 * squares
    assert world.losses[0](model, world.batch).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.37, 1.0])
def test_mask_is_the_largest_entries_by_brute_force(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {n: torch.zeros(s) for n, s in (("a", (3, 5)), ("b", (7,)), ("c", (2, 2)))}
    weights = {n: torch.randn(t.shape, generator=generator) for n, t in base.items()}
    mask = mergeguard.largest(weights, base, ["c", "a"], share)
    entries = sorted((abs(float(v)), n, i) for n in ("a", "c") for i, v in enumerate(weights[n].flatten()))
    kept = {(n, i) for _, n, i in entries[len(entries) - int(share * 19) :]} if int(share * 19) else set()
    assert kept == {(n, i) for n, m in mask.items() for i, on in enumerate(m.flatten().tolist()) if on}
    assert set(mask) == {"a", "c"}


def test_critical_layers_are_those_it_cannot_do_without() -> None:
    masked = {"a": Score(0.9, 0.1), "b": Score(0.5, 0.2), "c": Score(0.5, 0.4), "d": Score(0.8, 9.0)}
    assert mergeguard.most_critical(masked, 0.0) == []
    assert mergeguard.most_critical(masked, 10.0) == ["c"]
    assert mergeguard.most_critical(masked, 50.0) == ["c", "b"]
    assert mergeguard.most_critical(masked, 51.0) == ["c", "b", "d"]
    assert len(mergeguard.most_critical(masked, 100.0)) == 4


def test_layers_are_blocks_or_tensors(mini) -> None:
    groups = mergeguard.layer_groups(mini.base, {}, mini.anatomy(), "block", True)
    assert set(groups) == {"blocks.0", "blocks.1", mergeguard.OUTSIDE}
    assert sorted(n for names in groups.values() for n in names) == sorted(mini.base)
    assert all(n.startswith("blocks.1.") for n in groups["blocks.1"])
    assert set(mergeguard.layer_groups(mini.base, {}, mini.anatomy(), "block", False)) == {
        "blocks.0",
        "blocks.1",
    }
    single = mergeguard.layer_groups(mini.base, {"norm.weight": "norm.bias"}, mini.anatomy(), "tensor", True)
    assert single["norm.bias"] == ["norm.weight", "norm.bias"]
    assert len(single) == len(mini.base) - 1


@pytest.mark.parametrize("negation", [0.0, 0.5, 1.0, 2.0])
def test_stage_two_moves_exactly_what_the_mask_says(negation: float) -> None:
    world = World()
    defense = MergeGuard(critical=40.0, share=0.1, negation=negation, rows=16)
    given = {n: t.clone() for n, t in world.away.items()}
    protected = defense.protect(world.away, world.protect_context())
    report = protected.report
    assert len(report["critical"]) == 2  # 40 % of two blocks and the rest, rounded up
    open_names = [
        n for n, t in world.base.items()
        if t.is_floating_point() and not any(n.startswith(f"{layer}.") for layer in report["critical"])
        and not (mergeguard.OUTSIDE in report["critical"] and not n.startswith("blocks."))
    ]  # fmt: skip
    count = sum(world.base[n].numel() for n in open_names)
    total = sum(t.numel() for t in world.base.values() if t.is_floating_point())
    assert report["changed"] == pytest.approx(int(0.1 * count) / total)
    flat = torch.cat([(world.away[n] - world.base[n]).abs().flatten() for n in open_names])
    floor = flat.sort(descending=True).values[int(0.1 * count) - 1]
    for name, tensor in protected.weights.items():
        base, own = world.base[name], world.away[name]
        assert torch.equal(own, given[name])
        if not own.is_floating_point():
            assert torch.equal(tensor, own)
            continue
        on = ((own - base).abs() >= floor) if name in open_names else torch.zeros_like(own, dtype=torch.bool)
        assert torch.equal(tensor[~on], own[~on])
        if negation in (0.0, 1.0):
            assert torch.equal(tensor[on], own[on] if negation == 0 else base[on])
        assert torch.allclose(tensor[on], own[on] - negation * (own[on] - base[on]), atol=1e-6)
    expected = {0.0: 1.0, 2.0: 1.0}
    assert report["task_vector_left"] == pytest.approx(expected.get(negation, report["task_vector_left"]))
    assert report["task_vector_left"] < 1 or negation in expected


def test_layers_are_measured_on_the_owners_tuning_rows() -> None:
    world = World()
    report = MergeGuard(rows=0, share=0.0).protect(world.away, world.protect_context()).report

    def accuracy(weights: dict[str, Tensor]) -> float:
        rows = world.task.batch(world.splits["tuning"], torch.arange(64), CPU)
        outputs = world.task.outputs(world.model(weights), world.head, rows.inputs)
        return float((outputs.argmax(1) == rows.targets).float().mean())

    assert report["accuracy_before"] == report["accuracy_after"] == accuracy(world.away)
    for layer, lost in report["accuracy_lost"].items():
        masked = {
            n: world.base[n]
            if n.startswith(layer) or (layer == mergeguard.OUTSIDE and "blocks" not in n)
            else t
            for n, t in world.away.items()
        }
        assert lost == pytest.approx(accuracy(world.away) - accuracy(masked))
