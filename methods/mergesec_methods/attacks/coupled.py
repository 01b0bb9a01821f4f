"""Coupled re-alignment: undo a protection by transforms that keep the function exactly.

A transform of a head that keeps its function takes T to the query and T⁻ᵀ to the key, S to the value and
S⁻¹ to the output. AGA solves the four maps apart and so keeps the function only nearly; here each pair
is solved at once. Anchoring to public weights (subscript 0), both wishes of a pair are linear in T:

    T Q' ≈ Q0   and   Tᵀ K0 ≈ K'          (rows are head dimensions, the bias is one more column)

so least squares, each term divided by its own scale (w = 1 / ‖target‖²), gives a Sylvester equation per head,

    (w_k K0 K0ᵀ) T + T (w_q Q' Q'ᵀ) = w_q Q0 Q'ᵀ + w_k K0 K'ᵀ,

solved in float64; likewise S from V' and the columns of O'. The MLP is matched to the anchor by up row,
up bias (gate row) and down column together (Hungarian). Whatever T, S and the order come out, the
recovered network computes what the published one does, up to rounding.

This attack was first described in this benchmark; docs/coupled-realignment.md has derivation, experiment and limits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mergesec.anatomy import Attention
from mergesec.contracts import Attack, ContractError, Expert, RecoverContext, Weights
from mergesec.surgery import assign, change_heads, head_columns, head_rows, hidden_units, reorder_hidden
from mergesec.weights import mergeable

CARDS = [
    {
        "name": "coupled",
        "kind": "attack",
        "class": "Coupled",
        "version": "1",
        "title": "Coupled re-alignment",
        "summary": "one Sylvester equation per head pair and joint Hungarian matching; keeps the function exactly",
        "threat": "protection",
        "hooks": ["recover"],
        "knowledge": "the published expert and the public base",
        "data": "none",
        "modalities": ["image", "text"],
        "seeded": False,
    },
    {
        "name": "coupled_anchored",
        "kind": "attack",
        "class": "Coupled",
        "version": "1",
        "title": "Coupled re-alignment to other experts",
        "summary": "coupled re-alignment against the free-rider's own experts instead of the base",
        "threat": "protection",
        "hooks": ["recover"],
        "knowledge": "the published expert and the free-rider's own experts; the base is not used",
        "data": "tuning",
        "modalities": ["image", "text"],
        "seeded": False,
        "parameters": {
            "anchor": {
                "type": "choice",
                "default": "merge",
                "choices": ["own", "merge"],
                "doc": "the free-rider's first expert, or the mean of all his experts",
            },
        },
    },
]


def anchor_weights(anchor: str, base: Weights, own: Sequence[Expert]) -> Weights:
    """The weights to match against. ContractError if the free-rider has no expert to anchor to."""
    if anchor == "base":
        return base
    if not own:
        raise ContractError(f"anchor {anchor!r} needs an expert of the free-rider's own")
    if anchor == "own":
        return own[0].weights
    share = 1.0 / len(own)
    return {
        n: t + sum(share * (e.weights[n].float() - t.float()) for e in own) if mergeable(t) else t
        for n, t in base.items()
    }


class Coupled(Attack):
    """The attack of the card above."""

    def __init__(self, anchor: str = "base") -> None:
        self.anchor = anchor

    def recover(self, published: Weights, ctx: RecoverContext) -> dict[str, Tensor]:
        """``published`` in the anchor's coordinates; the same function."""
        reference = anchor_weights(self.anchor, ctx.base, ctx.own)
        recovered = dict(published)
        for block in ctx.backbone.anatomy().blocks:
            recovered = align_heads(recovered, reference, block.attention)
            units = normalize(hidden_units(recovered, block.mlp), dim=1)
            anchors = normalize(hidden_units(reference, block.mlp), dim=1)
            recovered = reorder_hidden(recovered, block.mlp, assign(units @ anchors.T, maximize=True))
        return recovered


def align_heads(weights: Weights, reference: Weights, attention: Attention) -> dict[str, Tensor]:
    """Every head of ``weights`` in the coordinates of ``reference``, by one T and one S per head."""
    query, key, value = (
        [_with_bias(*head_rows(w, linear, attention)) for w in (weights, reference)]
        for linear in (attention.query, attention.key, attention.value)
    )
    output = [head_columns(w, attention).mT for w in (weights, reference)]
    mix_qk = torch.stack([coupled_map(*heads) for heads in zip(*query, *key, strict=True)])
    mix_vo = torch.stack([coupled_map(*heads) for heads in zip(*value, *output, strict=True)])
    return change_heads(
        weights,
        attention,
        query=mix_qk,
        key=torch.linalg.inv(mix_qk).mT,
        value=mix_vo,
        output=torch.linalg.inv(mix_vo),
    )


def coupled_map(first: Tensor, first_anchor: Tensor, second: Tensor, second_anchor: Tensor) -> Tensor:
    """T minimising ``‖T A − A0‖² / ‖A0‖² + ‖Tᵀ B0 − B‖² / ‖B‖²``; all ``[head_dim, n]`` float64."""
    from scipy.linalg import solve_sylvester

    w_first = 1.0 / first_anchor.square().sum()
    w_second = 1.0 / second.square().sum()
    left = w_second * second_anchor @ second_anchor.T
    right = w_first * first @ first.T
    target = w_first * first_anchor @ first.T + w_second * second_anchor @ second.T
    return torch.from_numpy(solve_sylvester(left.numpy(), right.numpy(), target.numpy()))


def _with_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight if bias is None else torch.cat([weight, bias[..., None]], dim=-1)
