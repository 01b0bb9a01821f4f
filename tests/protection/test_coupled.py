"""Coupled re-alignment keeps the function, brings the expert back, and solves what it says it solves.

Where a test looks at the distance to the expert ``gauges`` is off: with it the expert comes back with the anchor's
norms and biases instead of its own (``test_gauge``).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mergesec.contracts import ContractError, Expert
from mergesec.surgery import change_heads, hidden_units
from mergesec_methods.protection.attacks._anchors import anchor_weights, heads_as_rows
from mergesec_methods.protection.attacks.aga import Aga
from mergesec_methods.protection.attacks.coupled import Coupled, coupled_map, head_likeness
from mergesec_methods.protection.defenses.params import Params
from mergesec_methods.protection.defenses.random_permutation import RandomPermutation

SCALINGS = ["v1", "nonsymmetric"]


def recover(attack, weights: dict, context) -> dict:
    """``recover`` with the contract checked: same tensors by name, inputs untouched."""
    seen = [weights, context.base, *(e.weights for e in context.own)]
    before = [{n: t.clone() for n, t in w.items()} for w in seen]
    recovered = attack.recover(weights, context)
    assert list(recovered) == list(weights)
    for name, tensor in recovered.items():
        assert (tensor.shape, tensor.dtype) == (weights[name].shape, weights[name].dtype)
    assert all(torch.equal(w[n], t) for w, old in zip(seen, before, strict=True) for n, t in old.items())
    return recovered


def distance(one: dict, other: dict) -> float:
    """‖one − other‖₂ over all floating tensors."""
    squares = (
        (one[n].double() - other[n].double()).square().sum() for n in one if one[n].is_floating_point()
    )
    return float(sum(squares)) ** 0.5


def protected(architecture, weights: dict, scaling: str, seed: int = 0) -> tuple[dict, float]:
    """Protected weights and how far their logits may be from those of ``weights``."""
    result = Params(scaling=scaling).protect(weights, architecture.protect_context(seed))
    return dict(result.weights), result.report["logit_bound"]


def mixed(architecture, weights: dict, seed: int) -> dict:
    """Independent invertible matrices on query/key and value/output of every head (as in MergeLock)."""
    generator = torch.Generator().manual_seed(seed)
    for block in architecture.anatomy().blocks:
        shape = (block.attention.heads, block.attention.head_dim, block.attention.head_dim)
        t, s = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        weights = change_heads(
            weights,
            block.attention,
            query=t,
            key=torch.linalg.inv(t).mT,
            value=s,
            output=torch.linalg.inv(s),
        )
    return dict(weights)


# ------------------------------------------------------------------ the function stays


@pytest.mark.parametrize("scaling", SCALINGS)
def test_function_is_kept_and_the_expert_nearer_than_by_aga(architecture, scaling: str) -> None:
    published, bound = protected(architecture, architecture.expert, scaling)
    context = architecture.recover_context()
    coupled, aga = (recover(attack, published, context) for attack in (Coupled(gauges=False), Aga()))
    reference = architecture.logits(architecture.expert)
    gaps = [float((architecture.logits(w) - reference).abs().max()) for w in (coupled, aga)]
    assert gaps[0] <= 2 * bound
    assert gaps[1] > 10 * gaps[0]
    apart = [distance(w, architecture.expert) for w in (coupled, aga, published)]
    assert apart[0] < 0.7 * apart[1]
    assert apart[0] < 0.02 * apart[2]
    for block in architecture.anatomy().blocks:
        ours, theirs = (hidden_units(w, block.mlp) for w in (coupled, architecture.expert))
        assert torch.equal(ours, theirs)


def test_whatever_the_anchor_the_function_is_kept(architecture) -> None:
    """Even matched to weights that have nothing to do with it."""
    generator = torch.Generator().manual_seed(2)
    noise = {
        n: torch.randn(t.shape, generator=generator) if t.is_floating_point() else t
        for n, t in architecture.base.items()
    }
    context = replace(architecture.recover_context(), base=noise)
    recovered = recover(Coupled(), architecture.expert, context)
    assert distance(recovered, architecture.expert) > 1.0
    reference = architecture.logits(architecture.expert, torch.float64)
    doubled = {n: t.double() if t.is_floating_point() else t for n, t in architecture.expert.items()}
    exact = Coupled().recover(doubled, context)
    assert float((architecture.logits(exact, torch.float64) - reference).abs().max()) < 1e-9


def test_unprotected_expert_stays_the_same_function_near_itself(architecture) -> None:
    recovered = recover(Coupled(gauges=False), architecture.expert, architecture.recover_context())
    gap = (architecture.logits(recovered) - architecture.logits(architecture.expert)).abs().max()
    assert gap < 1e-4
    moved = distance(recovered, architecture.expert)
    assert moved < 0.5 * distance(architecture.base, architecture.expert)


# ------------------------------------------------------------------ exact recovery


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_transformed_base_comes_back_exactly(architecture, scaling: str) -> None:
    """Without a task vector the anchor is the answer, whatever the transform."""
    published, _ = protected(architecture, architecture.base, scaling)
    recovered = recover(Coupled(), published, architecture.recover_context())
    assert distance(published, architecture.base) > 1.0
    assert distance(recovered, architecture.base) < 1e-6 * distance(published, architecture.base)


def test_a_transformed_own_expert_comes_back_exactly(mini) -> None:
    """The same with another anchor; the base is then not used."""
    published = mixed(mini, protected(mini, mini.expert, "none")[0], 1)
    nothing = {n: torch.full_like(t, float("nan")) for n, t in mini.base.items()}
    context = replace(mini.recover_context(), base=nothing, own=[Expert("mine", mini.expert)])
    recovered = Coupled(anchor="own").recover(published, context)
    assert distance(recovered, mini.expert) < 1e-5 * distance(published, mini.expert)


def test_the_matrices_are_forgotten_after_the_first_pass(mini) -> None:
    """The first solution depends on how ill-conditioned the protection is; where it leads, the next do not."""
    context = mini.recover_context()
    published = [mixed(mini, mini.expert, s) for s in (3, 4)]
    once, often = ([recover(Coupled(p, gauges=False), w, context) for w in published] for p in (1, 4))
    rest = distance(often[0], mini.expert)
    assert distance(often[0], often[1]) < 0.01 * rest < 0.1 * distance(once[0], once[1])
    assert rest < 0.8 * min(distance(w, mini.expert) for w in once)
    again = Coupled(1, gauges=False).recover(often[0], context)
    assert distance(again, often[0]) < 0.01 * rest


# ------------------------------------------------------------------ what is solved


def quadratic(t: Tensor, first: Tensor, first0: Tensor, second: Tensor, second0: Tensor) -> Tensor:
    """The objective of the docstring."""
    one = (t @ first - first0).square().sum() / first0.square().sum()
    return one + (t.mT @ second0 - second).square().sum() / second.square().sum()


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_map_is_the_least_squares_solution(size: int, width: int, seed: int) -> None:
    """Against one dense least-squares problem in the entries of T, and against the gradient."""
    generator = torch.Generator().manual_seed(seed)
    first, first0, second, second0 = (
        torch.randn(size, width + size, generator=generator, dtype=torch.float64) for _ in range(4)
    )
    found = coupled_map(first, first0, second, second0).requires_grad_(True)
    value = quadratic(found, first, first0, second, second0)
    value.backward()
    assert found.grad is not None
    assert found.grad.abs().max() < 1e-9
    # vec is row by row: vec(T A) = (I ⊗ Aᵀ) vec T, and Tᵀ B0 has the entries of B0ᵀ T
    eye = torch.eye(size, dtype=torch.float64)
    left = torch.kron(eye, first.mT.contiguous()) / first0.norm()
    right = torch.kron(second0.mT.contiguous(), eye) / second.norm()
    goal = torch.cat([first0.flatten() / first0.norm(), second.mT.flatten() / second.norm()])
    brute = torch.linalg.lstsq(torch.cat([left, right]), goal[:, None]).solution.reshape(size, size)
    assert torch.allclose(found.detach(), brute, rtol=1e-7, atol=1e-8)


def test_matching_uses_up_and_down_together(mini) -> None:
    """Up rows that say nothing: the down columns decide."""
    block = mini.anatomy().blocks[0]
    name, bias = block.mlp.up.weight, block.mlp.up.bias
    same = {name: torch.ones_like(mini.base[name]), bias: torch.ones_like(mini.base[bias])}
    base, expert = {**mini.base, **same}, {**mini.expert, **same}
    order = torch.randperm(block.mlp.hidden, generator=torch.Generator().manual_seed(0))
    down = block.mlp.down.weight
    published = {**expert, down: expert[down][:, order]}
    recovered = recover(Coupled(gauges=False), published, replace(mini.recover_context(), base=base))
    assert torch.equal(recovered[down], expert[down])


# ------------------------------------------------------------------ other anchors


def test_anchors(mini) -> None:
    generator = torch.Generator().manual_seed(1)
    base = {**mini.base, "steps": torch.tensor(7)}
    own = [
        Expert(t, {n: b + torch.randn(b.shape, generator=generator) if n in mini.base else b + 1
                   for n, b in base.items()})
        for t in ("one", "two")
    ]  # fmt: skip
    assert anchor_weights("base", base, own) is base
    assert anchor_weights("own", base, own) is own[0].weights
    mean = anchor_weights("merge", base, own)
    assert list(mean) == list(base)
    assert mean["steps"] == 7
    for name in mini.base:
        assert torch.allclose(mean[name], (own[0].weights[name] + own[1].weights[name]) / 2, atol=1e-6)
    for attack in (Coupled(anchor="merge"), Aga(anchor="own")):
        with pytest.raises(ContractError, match="needs an expert"):
            attack.recover(mini.expert, mini.recover_context())


@pytest.mark.parametrize("attack", [Coupled, Aga])
@pytest.mark.parametrize("anchor", ["own", "merge"])
def test_own_experts_serve_as_anchor(mini, attack, anchor: str) -> None:
    """Experts of other tasks are as near to the victim's as the base is, up to their own task vectors."""
    generator = torch.Generator().manual_seed(9)
    own = [
        Expert(t, {n: b + 0.02 * torch.randn(b.shape, generator=generator) for n, b in mini.base.items()})
        for t in ("one", "two")
    ]
    published, _ = protected(mini, mini.expert, "nonsymmetric")
    context = replace(mini.recover_context(), own=own)
    anchored = recover(attack(anchor=anchor), published, context)
    plain = recover(attack(), published, context)
    assert distance(anchored, plain) > 1e-3
    assert distance(anchored, mini.expert) < 0.02 * distance(published, mini.expert)
    # the anchor is all that differs: put in the base's place it gives the same
    swapped = replace(context, base=anchor_weights(anchor, mini.base, own))
    assert distance(anchored, attack().recover(published, swapped)) < 1e-5


# ------------------------------------------------------------------ moved heads


def test_moved_heads_are_found_again(architecture) -> None:
    """A random order of heads and units: the expert comes back as without it; without matching it does not."""
    hidden = RandomPermutation().protect(architecture.expert, architecture.protect_context(5)).weights
    published, bound = protected(architecture, dict(hidden), "nonsymmetric", seed=5)
    context = architecture.recover_context()
    plain = recover(Coupled(), protected(architecture, architecture.expert, "nonsymmetric")[0], context)
    found = recover(Coupled(), published, context)
    kept = recover(Coupled(match_heads=False), published, context)
    rest = distance(plain, architecture.expert)
    assert distance(found, architecture.expert) < 1.1 * rest + 1e-3
    assert distance(kept, architecture.expert) > 2 * rest
    gap = (architecture.logits(found) - architecture.logits(architecture.expert)).abs().max()
    assert float(gap) <= 2 * bound


def test_likeness_of_heads_is_that_of_their_products(mini) -> None:
    """Against the products written out, for other weights than the anchor's; no T or S changes it."""
    attention = mini.anatomy().blocks[0].attention
    found = head_likeness(mini.expert, mini.base, attention)
    one, other = (heads_as_rows(w, attention) for w in (mini.expert, mini.base))
    for h in range(attention.heads):
        for g in range(attention.heads):
            expected = sum(
                cosine_similarity((one[a][h].T @ one[b][h]).flatten(), (other[a][g].T @ other[b][g]).flatten(), dim=0)
                for a, b in (("query", "key"), ("value", "output"))
            )  # fmt: skip
            assert torch.allclose(found[h, g], torch.as_tensor(expected), atol=1e-9)
    assert torch.allclose(found, head_likeness(mixed(mini, mini.expert, 1), mini.base, attention), atol=1e-5)
