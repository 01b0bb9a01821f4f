"""MergeBarrier keeps the function in another topology, so that merges by name and shape miss the MLP."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from mergesec.contracts import ContractError
from mergesec.execution.contexts import fitting
from mergesec.surgery import head_rows, hidden_units, read
from mergesec_methods.protection.defenses.mergebarrier import MergeBarrier, flips


class Served:
    """An architecture as a backbone: its empty network."""

    def __init__(self, architecture: Any) -> None:
        self.architecture = architecture

    def build(self) -> nn.Module:
        network: nn.Module = copy.deepcopy(self.architecture.network).float()
        return network


def features(architecture: Any, defense: MergeBarrier, weights: dict) -> torch.Tensor:
    with torch.no_grad():
        return architecture.call(defense.network(Served(architecture), weights), architecture.inputs).double()


@pytest.mark.parametrize("ffn", ["expand", "split", "none"])
def test_function_is_kept_in_another_topology(architecture, ffn: str) -> None:
    versions = {n: t._version for n, t in architecture.expert.items()}
    defense = MergeBarrier(ffn=ffn)
    published = defense.protect(architecture.expert, architecture.protect_context()).weights
    assert versions == {n: t._version for n, t in architecture.expert.items()}
    before = features(architecture, defense, architecture.expert)
    after = features(architecture, defense, published)
    assert (after - before).abs().max() <= 1e-4
    assert {n: t.dtype for n, t in published.items()} == {n: t.dtype for n, t in architecture.expert.items()}
    for block in architecture.anatomy().blocks:
        wider = published[block.mlp.down.weight].shape[1] > block.mlp.hidden
        assert wider == (ffn != "none")


@pytest.mark.parametrize("ffn", ["expand", "split"])
def test_every_new_tensor_matters(architecture, ffn: str) -> None:
    defense = MergeBarrier(ffn=ffn)
    published = defense.protect(architecture.expert, architecture.protect_context()).weights
    before = features(architecture, defense, architecture.expert)
    for block in architecture.anatomy().blocks:
        for linear in filter(None, (block.mlp.up, block.mlp.gate, block.mlp.down)):
            wrong = {**published, linear.weight: published[linear.weight].flip(0)}
            assert (features(architecture, defense, wrong) - before).abs().max() > 1e-2, linear.weight


def test_merges_skip_the_mlp(architecture) -> None:
    """What fits the base by name and shape enters a merge: all but the MLP's maps."""
    published = MergeBarrier().protect(architecture.expert, architecture.protect_context()).weights
    taken = fitting(published, architecture.base)
    skipped = set()
    for block in architecture.anatomy().blocks:
        maps = [m for m in (block.mlp.up, block.mlp.gate, block.mlp.down) if m is not None]
        skipped |= {m.weight for m in maps} | {m.bias for m in maps if m.bias} - {block.mlp.down.bias}
    for name, tensor in taken.items():
        assert tensor is (architecture.base if name in skipped else published)[name], name
        assert tensor.shape == architecture.base[name].shape


# ------------------------------------------------------------------ attention


def test_the_strongest_directions_are_flipped(architecture) -> None:
    for block in architecture.anatomy().blocks:
        a = block.attention
        for share, count in ((0.0, 0), (0.5, round(0.5 * a.head_dim)), (1.0, a.head_dim)):
            matrix = flips(architecture.expert, a, share)
            eye = torch.eye(a.head_dim, dtype=torch.float64)
            assert torch.allclose(matrix @ matrix.mT, eye.expand_as(matrix), atol=1e-12)
            spectrum = torch.linalg.eigvalsh(matrix)
            expected = torch.ones(a.head_dim, dtype=torch.float64)
            expected[:count] = -1
            assert torch.allclose(spectrum, expected.expand_as(spectrum), atol=1e-12)
        # no orthogonal matrix with as many flips moves queries and keys further
        rows = torch.cat([_stacked(architecture.expert, m, a) for m in (a.query, a.key)], dim=-1)
        matrix = flips(architecture.expert, a, 0.5)
        best = (matrix @ rows - rows).square().sum()
        values = torch.linalg.svdvals(rows)[:, : round(0.5 * a.head_dim)].square().sum()
        assert best == pytest.approx(float(4 * values), rel=1e-9)


def _stacked(weights: dict, linear: Any, attention: Any) -> torch.Tensor:
    weight, bias = head_rows(weights, linear, attention)
    assert bias is not None
    return torch.cat([weight, bias[..., None]], dim=-1)


def test_a_merge_scales_the_flipped_scores_by_one_minus_twice_lambda_squared(mini) -> None:
    """The docstring's closed form, for an expert equal to its base and every direction flipped."""
    published = MergeBarrier(flip=1.0, ffn="none").protect(mini.base, mini.protect_context()).weights
    for scaling in (0.2, 0.5, 0.8):
        merged = {n: t + scaling * (published[n] - t) for n, t in mini.base.items()}
        for block in mini.anatomy().blocks:
            a = block.attention
            old, new = (_stacked(w, a.query, a).mT @ _stacked(w, a.key, a) for w in (mini.base, merged))
            assert torch.allclose(new, (1 - 2 * scaling) ** 2 * old, atol=1e-5)
            assert torch.equal(published[a.value.weight], mini.base[a.value.weight])


# ------------------------------------------------------------------ what it rests on


@pytest.mark.parametrize(
    "activation",
    [
        functional.gelu,
        lambda z: functional.gelu(z, approximate="tanh"),
        functional.silu,
        lambda z: z * torch.sigmoid(1.702 * z),
        functional.relu,
    ],
)
def test_the_odd_part_of_the_activations_is_half_of_z(activation: Any) -> None:
    z = torch.linspace(-12, 12, 1001, dtype=torch.float64)
    assert torch.allclose(activation(z) - activation(-z), z, atol=1e-12)


def test_a_wrong_activation_is_noticed(mini, monkeypatch) -> None:
    from dataclasses import replace
    from types import SimpleNamespace

    from mergesec.contracts import Split

    view = SimpleNamespace(
        tuning=Split(mini.inputs, torch.zeros(len(mini.inputs))),
        head={},
        task=SimpleNamespace(
            batch=lambda split, rows, device: split.take(rows),
            outputs=lambda model, head, inputs: mini.call(model.network, inputs),
        ),
    )
    served = Served(mini)
    served.anatomy = mini.anatomy  # type: ignore[attr-defined]
    ctx = replace(mini.protect_context(), backbone=served, view=view)
    report = MergeBarrier().protect(mini.expert, ctx).report
    assert 0 < report["output_error"] < 1e-5
    monkeypatch.setattr(functional, "gelu", torch.tanh)
    with pytest.raises(ContractError, match="ffn: split"):
        MergeBarrier().protect(mini.expert, ctx)
    MergeBarrier(ffn="split").protect(mini.expert, ctx)


def test_whoever_knows_the_construction_folds_it_back(mini) -> None:
    """A limit of this reconstruction: published units match the base's up to sign; the rest is dropped."""
    defense = MergeBarrier(flip=0.0)
    published = defense.protect(mini.expert, mini.protect_context()).weights
    for block in mini.anatomy().blocks:
        mlp = block.mlp
        rows, bias = read(published, mlp.up)
        assert bias is not None
        anchors = read(mini.base, mlp.up)[0]
        alike = functional.normalize(anchors, dim=1) @ functional.normalize(rows, dim=1).T
        place = alike.abs().argmax(dim=1)
        sign = alike.gather(1, place[:, None]).sign()
        columns = read(published, mlp.down)[0].T[place]
        folded = torch.cat([sign * rows[place], sign * bias[place, None], columns], dim=1)
        assert torch.allclose(folded, hidden_units(mini.expert, mlp))


def test_seeds_draw_other_topologies_of_the_same_function(mini) -> None:
    defense = MergeBarrier()
    one, same, other = (defense.protect(mini.expert, mini.protect_context(s)).weights for s in (1, 1, 2))
    name = "blocks.0.mlp.up.weight"
    assert torch.equal(one[name], same[name])
    assert one[name].shape == other[name].shape
    assert not torch.equal(one[name], other[name])
