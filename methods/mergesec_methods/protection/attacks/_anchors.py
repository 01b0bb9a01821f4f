"""What attacks that match the published expert to known weights share: the anchor, and heads as rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergesec.anatomy import Attention, Side
from mergesec.contracts import ContractError, Expert, Weights
from mergesec.surgery import head_columns, head_rows
from mergesec.weights import mergeable

MAPS = ("query", "key", "value", "output")


def anchor_weights(anchor: str, base: Weights, own: Sequence[Expert]) -> Weights:
    """The weights to match against: ``base``, ``own`` (the free-rider's first expert) or ``merge`` (the mean
    of all his experts). ContractError if the free-rider has no expert to anchor to."""
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


def heads_as_rows(weights: Weights, attention: Attention) -> dict[str, Tensor]:
    """Each map of ``MAPS`` by head, float64 ``[heads, head_dim, n]``: one row per head dimension.

    The bias is one more column of query, key and value; of the output map a row is a column of its weight. What
    belongs to the other stream of a joint attention stands beside it, since heads change in both alike.
    """
    sides = [side_as_rows(weights, attention, side) for side in attention.sides]
    if len(sides) == 1:
        return sides[0]
    return {name: torch.cat([rows[name] for rows in sides if name in rows], dim=-1) for name in MAPS}


def side_as_rows(weights: Weights, attention: Attention, side: Attention | Side) -> dict[str, Tensor]:
    """The same of one stream; without ``output`` where it has none."""
    rows = {}
    for name in MAPS[:3]:
        weight, bias = head_rows(weights, getattr(side, name), attention)
        rows[name] = weight if bias is None else torch.cat([weight, bias[..., None]], dim=-1)
    if side.output is not None:
        rows["output"] = head_columns(weights, attention, side.output).mT
    return rows
