"""Fixing the gauge: of all weights with one function, those whose free numbers are the anchor's.

Shifts of biases, scales of norms, layer scales and gated units, and what layer norms take away say nothing about
the function, but distances between weights are full of them. They are put to agreed values before anything is
matched by distance, and to the anchor's afterwards:

* ``rescaled``: a norm gets the anchor's γ and β, the ratio goes into the maps that read it; a layer scale the same;
* ``bare``, on both sides: value biases are folded into the output bias, key biases dropped, and what maps read
  or write of the mean, which layer norms take away, is left out;
* ``dressed``: all of that as the anchor has it, once heads are in its coordinates;
* ``unit_factors``: up rows and down columns of a gated MLP as long, relative to each other, as the anchor's.

Every step is one of ``mergesec.surgery`` and keeps the function. What comes out depends on the function's orbit
and on the anchor alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mergesec.anatomy import Attention, Kind, Linear, Mlp, Norm, Part, Symmetry
from mergesec.contracts import Weights
from mergesec.surgery import (
    change_layer_scale,
    change_norm,
    lean_of_reader,
    lean_of_writer,
    lean_reader,
    lean_writer,
    read,
    read_vector,
    shift_keys,
    shift_values,
)

SMALLEST = 1e-6
"""Entries of norms and layer scales below this share of the largest stay as they were published."""
ORDER = (Kind.READER_MEAN, Kind.VALUE_SHIFT, Kind.KEY_SHIFT, Kind.WRITER_MEAN)
"""Means of readers change their biases, and value biases the output's, so they come in this order."""

Moved = dict[str, Tensor]


def rescaled(weights: Weights, anchor: Weights, found: Sequence[Symmetry]) -> Moved:
    """``weights`` with the anchor's norms (β as well where biases allow it) and layer scales."""
    moved, has = dict(weights), {(s.kind, s.part) for s in found}
    for kind, part in has:
        if kind is Kind.NORM_SCALE and part.norm is not None:
            moved = _with_norm(moved, anchor, part, part.norm, (Kind.NORM_SHIFT, part) in has)
        if kind is Kind.LAYER_SCALE and part.scale is not None:
            own, goal = read_vector(moved, part.scale), read_vector(anchor, part.scale)
            moved = change_layer_scale(moved, part, _ratio(own, goal))
    return moved


def _with_norm(weights: Weights, anchor: Weights, part: Part, norm: Norm, shifts: bool) -> Moved:
    own, goal = read_vector(weights, norm.weight), read_vector(anchor, norm.weight)
    factors = _ratio(goal, own)
    if not shifts or norm.bias is None:
        return change_norm(weights, part, factors)
    own, goal = read_vector(weights, norm.bias), read_vector(anchor, norm.bias)
    return change_norm(weights, part, factors, goal - factors * own)


def _ratio(one: Tensor, other: Tensor) -> Tensor:
    """``one / other``, 1 where either is next to nothing."""
    return torch.where(_regular(one) & _regular(other), one / other, 1.0)


def _regular(vector: Tensor) -> Tensor:
    return vector.abs() > SMALLEST * vector.abs().max()


def bare(weights: Weights, found: Sequence[Symmetry]) -> Moved:
    """``weights`` with all that can be shifted at 0."""
    return _shifted(weights, None, found)


def dressed(weights: Weights, anchor: Weights, found: Sequence[Symmetry]) -> Moved:
    """``weights``, in the anchor's coordinates, with all that can be shifted as the anchor has it."""
    return _shifted(weights, anchor, found)


def _shifted(weights: Weights, anchor: Weights | None, found: Sequence[Symmetry]) -> Moved:
    moved = dict(weights)
    for kind in ORDER:
        for part in (s.part for s in found if s.kind is kind):
            moved = _shift(moved, anchor, kind, part)
    return moved


def _shift(weights: Weights, anchor: Weights | None, kind: Kind, part: Part) -> Moved:
    if kind is Kind.READER_MEAN and part.norm is not None:
        return _reader_means(weights, anchor, part, part.norm)
    if kind is Kind.WRITER_MEAN:
        return _writer_mean(weights, anchor, part)
    if kind is Kind.VALUE_SHIFT and isinstance(part, Attention):
        return shift_values(weights, part, _bias_gap(weights, anchor, part, part.value))
    if kind is Kind.KEY_SHIFT and isinstance(part, Attention):
        return shift_keys(weights, part, _bias_gap(weights, anchor, part, part.key))
    return dict(weights)


def _bias_gap(weights: Weights, anchor: Weights | None, attention: Attention, linear: Linear) -> Tensor:
    """What the bias lacks of the anchor's, or of 0: ``[kv_heads, head_dim]``."""
    (_, own), goal = read(weights, linear), None if anchor is None else read(anchor, linear)[1]
    assert own is not None  # the symmetry exists only where there is one
    gap = -own if goal is None else goal - own
    return gap.reshape(attention.kv_heads, attention.head_dim)


def _reader_means(weights: Weights, anchor: Weights | None, part: Part, norm: Norm) -> Moved:
    moved = dict(weights)
    if not _regular(read_vector(weights, norm.weight)).all():
        return moved
    for linear in part.readers:
        gap = -lean_of_reader(moved, norm, linear)
        if anchor is not None:
            gap = gap + lean_of_reader(anchor, norm, linear)
        moved = lean_reader(moved, norm, linear, gap)
    return moved


def _writer_mean(weights: Weights, anchor: Weights | None, part: Part) -> Moved:
    if part.scale is not None and not _regular(read_vector(weights, part.scale)).all():
        return dict(weights)
    columns, constant = lean_of_writer(weights, part)
    if anchor is None:
        return lean_writer(weights, part, -columns, -constant)
    goal, goal_constant = lean_of_writer(anchor, part)
    return lean_writer(weights, part, goal - columns, goal_constant - constant)


# ----------------------------------------------------------------------------- units of a gated MLP


def unit_likeness(weights: Weights, anchor: Weights, mlp: Mlp) -> Tensor:
    """How alike gated units are, whatever factor went from an up row to its down column: ``[hidden, hidden]``.

    Cosine of the gate rows, plus that of the products of up row and down column.
    """
    (gate, up, down), (gate0, up0, down0) = (
        [normalize(rows, dim=1) for rows in unit_rows(w, mlp)] for w in (weights, anchor)
    )
    return gate @ gate0.T + (up @ up0.T) * (down @ down0.T)


def unit_factors(weights: Weights, anchor: Weights, mlp: Mlp) -> Tensor:
    """What to multiply up rows by, and divide down columns by, so that they compare as the anchor's: ``[hidden]``.

    The ratio of their lengths becomes the anchor's; the sign is the one that both together are nearer with.
    """
    (_, up, down), (_, up0, down0) = (unit_rows(w, mlp) for w in (weights, anchor))
    sizes = [
        rows.square().sum(1).sqrt().clamp_min(torch.finfo(rows.dtype).tiny) for rows in (up, down, up0, down0)
    ]
    nearer = (up * up0).sum(1) / (sizes[0] * sizes[2]) + (down * down0).sum(1) / (sizes[1] * sizes[3])
    size = ((sizes[2] / sizes[0]) * (sizes[1] / sizes[3])).sqrt()
    return torch.where(nearer < 0, -size, size)


def unit_rows(weights: Weights, mlp: Mlp) -> tuple[Tensor, Tensor, Tensor]:
    """Gate rows with biases, up rows with biases, down columns: each ``[hidden, n]``."""
    assert mlp.gate is not None  # only gated units have factors
    gate, up = (
        weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)
        for weight, bias in (read(weights, linear) for linear in (mlp.gate, mlp.up))
    )
    return gate, up, read(weights, mlp.down)[0].T
