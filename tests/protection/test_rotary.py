"""Grouped heads, rotary positions, gated MLPs (Llama, Qwen2): what is allowed there keeps the function."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mergesec.contracts import Expert
from mergesec.surgery import (
    change_heads,
    head_columns,
    head_rows,
    hidden_units,
    per_group,
    per_query_head,
    rotary_factors,
    rotary_matrix,
)
from mergesec_methods.merging.git_rebasin import GitRebasin, Heads, HiddenUnits
from mergesec_methods.protection.attacks.aga import Aga
from mergesec_methods.protection.attacks.coupled import Coupled
from mergesec_methods.protection.attacks.realign import Realign
from mergesec_methods.protection.defenses.mergebarrier import MergeBarrier
from mergesec_methods.protection.defenses.mergelock import MergeLock
from mergesec_methods.protection.defenses.params import Params
from mergesec_methods.protection.defenses.random_permutation import RandomPermutation
from mergesec_methods.protection.defenses.sign_flips import SignFlips

SCALINGS = ["v1", "diagonal", "symmetric", "nonsymmetric"]
DEFENSES = {
    **{name: Params(scaling=name) for name in SCALINGS},
    "mergelock": MergeLock(),
    "mergelock orthogonal": MergeLock(distribution="orthogonal", permute=True),
    "permutation": RandomPermutation(),
    "signs": SignFlips(),
    "mergebarrier": MergeBarrier(ffn="none"),
}


def difference(architecture: Any, one: dict, other: dict) -> float:
    return float((architecture.logits(one) - architecture.logits(other)).abs().max())


def distance(one: dict, other: dict) -> float:
    return float(sum((one[n].double() - t.double()).square().sum() for n, t in other.items())) ** 0.5


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(angles: torch.Tensor) -> torch.Tensor:
    """Rotary positions as Hugging Face applies them: x cos + rotate_half(x) sin, as a matrix."""
    half = len(angles)
    eye = torch.eye(2 * half, dtype=torch.float64)
    turned = torch.cat([-eye[half:], eye[:half]])  # rotate_half of every unit vector, as columns
    twice = torch.cat([angles, angles])
    return torch.cos(twice)[:, None] * eye + torch.sin(twice)[:, None] * turned


# ------------------------------------------------------------------ the anatomy and its algebra


def test_the_anatomy_sees_groups_and_gates(rotary) -> None:
    for block in rotary.anatomy().blocks:
        a = block.attention
        assert (a.heads, a.kv_heads, a.group, a.head_dim, a.rotary) == (6, 2, 3, 8, True)
        assert block.mlp.gate is not None
        assert head_rows(rotary.base, a.query, a)[0].shape == (6, 8, 24)
        assert head_rows(rotary.base, a.key, a)[0].shape == (2, 8, 24)
        assert head_columns(rotary.base, a).shape == (6, 24, 8)


def test_groups_are_joined_and_repeated_in_the_order_of_the_heads(rotary) -> None:
    a = rotary.anatomy().blocks[0].attention
    heads = torch.arange(6.0)[:, None, None] * torch.ones(6, 8, 5)
    joined = per_group(heads, a)
    assert joined.shape == (2, 8, 15)
    assert joined[1, 0].tolist() == [3.0] * 5 + [4.0] * 5 + [5.0] * 5
    matrices = torch.stack([torch.eye(8), 2 * torch.eye(8)])
    assert per_query_head(matrices, a)[:, 0, 0].tolist() == [1, 1, 1, 2, 2, 2]
    assert per_query_head(heads, a) is heads


def test_rotary_factors_are_the_mean_over_all_rotations() -> None:
    matrix = drawn(3, 6, 6)
    count = 8
    turns = torch.arange(count, dtype=torch.float64) * (2 * torch.pi / count)
    mean = torch.zeros(3, 6, 6, dtype=torch.float64)
    for a in turns:
        for b in turns:
            for c in turns:
                r = rotation(torch.stack([a, b, c]))
                mean += r @ matrix @ r.mT / count**3
    kept = rotary_matrix(rotary_factors(matrix))
    assert torch.allclose(kept, mean, atol=1e-12)
    angles = torch.tensor([0.3, 1.0, -2.0], dtype=torch.float64)
    assert torch.allclose(kept @ rotation(angles), rotation(angles) @ kept, atol=1e-12)
    assert torch.allclose(rotary_factors(rotation(angles)), torch.polar(torch.ones(3).double(), angles))
    # nearest: what is left over is orthogonal to everything that commutes
    other = rotary_matrix(rotary_factors(drawn(3, 6, 6, seed=1)))
    assert abs(float(((matrix - kept) * other).sum())) < 1e-10


def test_a_general_matrix_on_query_and_key_breaks_the_function(rotary) -> None:
    """What the restriction is for. Value and output stay general."""
    eye = torch.eye(8, dtype=torch.float64).expand(2, 8, 8)
    general = torch.linalg.qr(drawn(2, 8, 8)).Q
    allowed = rotary_matrix(torch.polar(torch.full((2, 4), 1.5).double(), drawn(2, 4)))
    interleaved = allowed[:, [0, 4, 1, 5, 2, 6, 3, 7]][:, :, [0, 4, 1, 5, 2, 6, 3, 7]]
    for matrix, kept in ((allowed, True), (general, False), (interleaved, False)):
        changed = rotary.expert
        for block in rotary.anatomy().blocks:
            inverse = torch.linalg.inv(matrix).mT
            changed = change_heads(changed, block.attention, query=matrix, key=inverse, value=eye, output=eye)
        error = difference(rotary, rotary.expert, changed)
        assert error < 1e-4 if kept else error > 0.05
    changed = rotary.expert
    for block in rotary.anatomy().blocks:
        changed = change_heads(
            changed, block.attention, query=eye, key=eye, value=2 * general, output=general.mT / 2
        )
    assert difference(rotary, rotary.expert, changed) < 1e-4


# ------------------------------------------------------------------ protection and recovery


@pytest.mark.parametrize("name", DEFENSES)
def test_protections_keep_the_function_and_move_the_weights(rotary, name: str) -> None:
    protected = DEFENSES[name].protect(rotary.expert, rotary.protect_context(3))
    bound = max(protected.report.get("logit_bound", 0.0), 1e-4)
    assert difference(rotary, rotary.expert, protected.weights) <= bound
    assert list(protected.weights) == list(rotary.expert)
    for block in rotary.anatomy().blocks:
        a, before, after = block.attention, rotary.expert, protected.weights
        for linear in (a.query, a.key) if name == "mergebarrier" else (a.query, a.key, a.value, a.output):
            moved = (after[linear.weight] - before[linear.weight]).norm() / before[linear.weight].norm()
            assert moved > 0.1 or name == "permutation", linear.weight
    if name in (*SCALINGS, "mergelock"):
        said = " ".join(protected.report["blocks"][0]["left_out"])
        assert "rotary" in said
        assert "3 query heads share" in said


def test_orthogonal_matrices_stay_orthogonal(rotary) -> None:
    protected = MergeLock(distribution="orthogonal").protect(rotary.expert, rotary.protect_context())
    assert protected.report["condition"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("ffn", ["expand", "split"])
def test_mergebarrier_widens_the_gated_mlp(rotary, ffn: str) -> None:
    import copy
    from types import SimpleNamespace

    defense = MergeBarrier(ffn=ffn)
    published = defense.protect(rotary.expert, rotary.protect_context()).weights
    served: Any = SimpleNamespace(build=lambda: copy.deepcopy(rotary.network).float())
    with torch.no_grad():
        before, after = (
            rotary.call(defense.network(served, w), rotary.inputs) for w in (rotary.expert, published)
        )
    assert (before - after).abs().max() < 1e-4


def test_realign_undoes_the_rearrangement(rotary) -> None:
    protected = Params(scaling="none").protect(rotary.expert, rotary.protect_context()).weights
    recovered = Realign().recover(protected, rotary.recover_context())
    assert distance(protected, rotary.expert) > 1
    assert all(torch.equal(recovered[n], t) for n, t in rotary.expert.items())


@pytest.mark.parametrize("scaling", SCALINGS)
def test_coupled_keeps_the_function_and_comes_back_to_the_expert(rotary, scaling: str) -> None:
    protected = Params(scaling=scaling).protect(rotary.expert, rotary.protect_context(3))
    recovered = Coupled(gauges=False).recover(protected.weights, rotary.recover_context())
    bound = 2 * protected.report["logit_bound"]
    assert difference(rotary, protected.weights, recovered) <= bound
    assert distance(recovered, rotary.expert) < 0.3 * distance(rotary.expert, rotary.base)
    assert distance(protected.weights, rotary.expert) > 3 * distance(rotary.expert, rotary.base)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_aga_forgets_the_protection_and_restores_the_order(rotary, scaling: str) -> None:
    protected = Params(scaling=scaling).protect(rotary.expert, rotary.protect_context(3))
    recovered = Aga().recover(protected.weights, rotary.recover_context())
    plain = Aga().recover(rotary.expert, rotary.recover_context())
    assert distance(recovered, plain) <= max(1e-4, 2e-6 * protected.report["condition"]) * 10
    assert distance(recovered, rotary.expert) < 2 * distance(rotary.expert, rotary.base)
    for block in rotary.anatomy().blocks:
        assert torch.equal(hidden_units(recovered, block.mlp), hidden_units(rotary.expert, block.mlp))


def test_coupled_factor_is_the_least_squares_optimum() -> None:
    """Against a numerical gradient of both wishes, for every complex factor."""
    from mergesec_methods.protection.attacks.coupled import rotary_map

    first, first_anchor = drawn(6, 10, seed=1), drawn(6, 10, seed=2)
    second, second_anchor = drawn(6, 7, seed=3), drawn(6, 7, seed=4)
    found = rotary_map(first, first_anchor, second, second_anchor)
    factors = rotary_factors(found)
    assert torch.allclose(rotary_matrix(factors), found)

    def objective(parts: torch.Tensor) -> torch.Tensor:
        t = rotary_matrix(torch.complex(parts[0], parts[1]))
        return (t @ first - first_anchor).square().sum() / first_anchor.square().sum() + (
            t.mT @ second_anchor - second
        ).square().sum() / second.square().sum()

    at = torch.stack([factors.real, factors.imag]).requires_grad_()
    (gradient,) = torch.autograd.grad(objective(at), [at])
    assert gradient.abs().max() < 1e-10


@pytest.mark.parametrize("inner", [False, True])
def test_rebasin_brings_groups_and_units_home(rotary, inner: bool) -> None:
    """Groups of heads move whole; inside a head value and output coordinates do, rotated ones do not."""
    generator = torch.Generator().manual_seed(0)
    method = GitRebasin("task_arithmetic", "base", "inner" if inner else "heads")
    moved: Any = rotary.expert
    for block in rotary.anatomy().blocks:
        group, still = Heads(block.attention, inner), torch.arange(8).expand(2, 8)
        within = torch.rand(2, 8, generator=generator).argsort(dim=1) if inner else still
        orders = group._rows(torch.tensor([1, 0]), [still, within])
        moved = group.write(moved, orders)
        units = torch.randperm(block.mlp.hidden, generator=generator)
        moved = HiddenUnits(block.mlp).write(moved, (units,))
    assert difference(rotary, rotary.expert, moved) < 1e-5
    assert distance(moved, rotary.expert) > 10 * distance(rotary.expert, rotary.base)
    (found,), count = method.align(rotary.base, [Expert("t", moved)], rotary.anatomy())
    assert all(torch.equal(found.weights[n], t) for n, t in rotary.expert.items())
    assert count["t"] > 0
