"""What the free-rider's attacks bring back."""

from __future__ import annotations

import pytest
import torch

from mergesec.surgery import assign, head_columns, head_rows, hidden_units, read
from mergesec_methods.protection.attacks.aga import Aga
from mergesec_methods.protection.attacks.dropout_pruning import DropoutPruning
from mergesec_methods.protection.attacks.realign import Realign
from mergesec_methods.protection.defenses.params import Params

SCALINGS = ["v1", "diagonal", "symmetric", "nonsymmetric"]


def recover(attack, architecture, weights: dict) -> dict:
    """``recover`` with the contract checked: same tensors by name, inputs untouched."""
    versions = {n: t._version for n, t in weights.items()}
    recovered = attack.recover(weights, architecture.recover_context())
    assert list(recovered) == list(weights)
    for name, tensor in recovered.items():
        assert tensor.shape == weights[name].shape
        assert tensor.dtype == weights[name].dtype
        assert weights[name]._version == versions[name]
    return recovered


def maximum(one: dict, other: dict) -> float:
    return max(float((one[n].double() - other[n].double()).abs().max()) for n in one)


@pytest.mark.parametrize("similarity", ["inner", "cosine"])
def test_realign_undoes_rearrangement_exactly(architecture, similarity: str) -> None:
    protected = Params(scaling="none").protect(architecture.expert, architecture.protect_context()).weights
    assert maximum(protected, architecture.expert) > 0.1
    recovered = recover(Realign(similarity), architecture, protected)
    assert all(torch.equal(recovered[n], t) for n, t in architecture.expert.items())


def test_realign_leaves_attention_as_published(mini) -> None:
    protected = Params().protect(mini.expert, mini.protect_context()).weights
    recovered = recover(Realign(), mini, protected)
    for name, tensor in recovered.items():
        same_as = mini.expert if ".mlp." in name else protected
        assert torch.equal(tensor, same_as[name]), name


def test_realign_has_the_direction_of_the_optimum(mini) -> None:
    """Units far from the base, so that σ and its inverse differ: only one attains the optimum."""
    generator = torch.Generator().manual_seed(1)
    noisy = {n: torch.randn(t.shape, generator=generator) for n, t in mini.base.items()}
    recovered = recover(Realign(), mini, noisy)
    for block in mini.anatomy().blocks:
        units, anchors = hidden_units(noisy, block.mlp), hidden_units(mini.base, block.mlp)
        scores = units @ anchors.T
        order = assign(scores, maximize=True)
        best = float(scores[order, torch.arange(len(order))].sum())
        wrong = float(scores[torch.argsort(order), torch.arange(len(order))].sum())
        achieved = float((hidden_units(recovered, block.mlp) * anchors).sum())
        assert achieved == pytest.approx(best, rel=1e-6)
        assert wrong < 0.9 * best


# ------------------------------------------------------------------ AGA


@pytest.mark.parametrize("scaling", SCALINGS)
def test_aga_forgets_the_protection(architecture, scaling: str) -> None:
    """X T depends on the column space of X only, so what comes back is the same with and without it."""
    protected = Params(scaling=scaling).protect(architecture.expert, architecture.protect_context())
    recovered = recover(Aga(), architecture, protected.weights)
    plain = recover(Aga(), architecture, architecture.expert)
    tolerance = max(1e-4, 2e-6 * protected.report["condition"])
    assert maximum(recovered, plain) <= tolerance
    assert maximum(protected.weights, plain) > 100 * tolerance


def test_aga_is_the_projection_of_the_base_on_the_experts_columns(architecture) -> None:
    recovered = recover(Aga(), architecture, architecture.expert)
    base, expert = architecture.base, architecture.expert
    for block in architecture.anatomy().blocks:
        a = block.attention
        slices = [
            tuple(head_rows(w, m, a)[0].mT for w in (expert, base, recovered))
            for m in (a.query, a.key, a.value)
        ]
        slices.append(tuple(head_columns(w, a) for w in (expert, base, recovered)))
        for own, anchor, back in slices:
            basis = torch.linalg.qr(own).Q
            assert torch.allclose(back, basis @ (basis.mT @ anchor), atol=1e-6)
            error = torch.linalg.matrix_norm(back - anchor)
            assert (error <= torch.linalg.matrix_norm(own - anchor) + 1e-6).all()
        assert torch.equal(read(recovered, a.output)[1], read(expert, a.output)[1])


def test_aga_restores_the_order_and_comes_near_the_expert(architecture) -> None:
    protected = Params().protect(architecture.expert, architecture.protect_context()).weights
    recovered = recover(Aga(), architecture, protected)
    for block in architecture.anatomy().blocks:
        own, back = (hidden_units(w, block.mlp) for w in (architecture.expert, recovered))
        assert torch.equal(own, back)
    reference = architecture.logits(architecture.expert)
    error = (architecture.logits(recovered) - reference).abs().mean()
    assert error < 0.5 * reference.std()
    # The point of the attack: half-way to the base, the protected expert is far off, the recovered near.
    merges = [
        architecture.logits(
            {n: (w[n] + t) / 2 if t.is_floating_point() else t for n, t in architecture.base.items()}
        )
        for w in (architecture.expert, protected, recovered)
    ]
    unprotected, disrupted, restored = merges
    assert (restored - unprotected).abs().mean() < 0.2 * (disrupted - unprotected).abs().mean()


def test_aga_on_the_base_itself_changes_nothing(packed) -> None:
    assert maximum(recover(Aga(), packed, packed.base), packed.base) < 1e-5


# ------------------------------------------------------------------ dropout pruning


def test_dropout_pruning_drops_and_rescales(mini) -> None:
    weights = {**mini.expert, "steps": torch.tensor(3), "foreign": torch.ones(2)}
    recovered = recover(DropoutPruning(0.75), mini, weights)
    kept = total = 0
    for name, base in mini.base.items():
        vector, original = recovered[name] - base, weights[name] - base
        mask = recovered[name] != base
        assert torch.allclose(vector[mask], 4 * original[mask], atol=2e-6)
        kept, total = kept + int(mask.sum()), total + mask.numel()
    assert abs(kept / total - 0.25) < 0.02
    assert recovered["steps"] == 3
    assert torch.equal(recovered["foreign"], weights["foreign"])


def test_dropout_pruning_is_seeded_and_off_at_zero(mini) -> None:
    attack = DropoutPruning()
    one, same = (attack.recover(mini.expert, mini.recover_context(4)) for _ in range(2))
    other = attack.recover(mini.expert, mini.recover_context(5))
    assert maximum(one, same) == 0 < maximum(one, other)
    assert maximum(recover(DropoutPruning(0.0), mini, mini.expert), mini.expert) == 0
