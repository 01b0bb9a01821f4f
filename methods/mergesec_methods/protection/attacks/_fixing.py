"""Fixing the gauge: of all weights with one function, those whose free numbers are the anchor's.

Shifts of biases, scales of norms, layer scales and gated units, and what layer norms take away say nothing about
the function, but distances between weights are full of them. They are put to agreed values before anything is
matched by distance, and to the anchor's afterwards:

* ``outer``: what is outside of the blocks, see there;
* ``rescaled``: a norm gets the anchor's γ and β, the ratio goes into the maps that read it; a layer scale the same.
  Where they follow from a condition, what makes them gets the anchor's component along the anchor's;
* ``bare``, on both sides: value biases are folded into the output bias, key biases dropped, and what maps read
  or write of the mean, which layer norms take away, is left out;
* ``dressed``: all of that as the anchor has it, once heads are in its coordinates;
* ``unit_factors``: up rows and down columns of a gated MLP as long, relative to each other, as the anchor's.

Every step is one of ``mergesec.surgery`` and keeps the function. What comes out depends on the function's orbit
and on the anchor alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mergesec.anatomy import (
    Adaptive,
    Attention,
    Coordinates,
    Kind,
    Linear,
    Mlp,
    Modulation,
    Norm,
    Part,
    Symmetry,
    Terms,
)
from mergesec.contracts import Weights
from mergesec.surgery import (
    assign,
    change_layer_scale,
    change_norm,
    coordinate_rows,
    lean_of_reader,
    lean_of_writer,
    lean_reader,
    lean_writer,
    read,
    read_modulation,
    read_vector,
    reorder_coordinates,
    scale_groups,
    shift_keys,
    shift_terms,
    shift_values,
)

SMALLEST = 1e-6
"""Entries of norms and layer scales below this share of the largest stay as they were published."""
TINY = 1e-300
ORDER = (Kind.READER_MEAN, Kind.VALUE_SHIFT, Kind.KEY_SHIFT, Kind.WRITER_MEAN)
"""Means of readers change their biases, and value biases the output's, so they come in this order."""

Moved = dict[str, Tensor]


def outer(weights: Weights, anchor: Weights, found: Sequence[Symmetry]) -> Moved:
    """``weights`` with the anchor's coordinates, norms and sums outside of the blocks, and with the anchor's scales
    of what blocks share. ``found`` are those symmetries, in the anatomy's order: each is told by what the ones before
    it have put right."""
    moved, has = dict(weights), {(s.kind, s.part) for s in found}
    for symmetry in found:
        part = symmetry.part
        if symmetry.kind is Kind.CHANNEL_ORDER and isinstance(part, Coordinates):
            order, signs = coordinate_order(moved, anchor, part)
            moved = scale_groups(reorder_coordinates(moved, part, order), part, signs)
        elif symmetry.kind is Kind.GROUP_SCALE and isinstance(part, Coordinates):
            moved = scale_groups(moved, part, _group_ratio(moved, anchor, part))
        else:
            moved = _with_border(moved, anchor, symmetry, has)
    for part in (s.part for s in found if s.kind is Kind.TERM_SHIFT):
        if isinstance(part, Terms):
            moved = shift_terms(moved, part, read_vector(anchor, part.first) - read_vector(moved, part.first))
    return moved


def rescaled(weights: Weights, anchor: Weights, found: Sequence[Symmetry]) -> Moved:
    """``weights`` with the anchor's norms (β as well where biases allow it) and layer scales."""
    moved, has = dict(weights), {(s.kind, s.part) for s in found}
    for symmetry in found:
        moved = _with_border(moved, anchor, symmetry, has)
    return moved


def _with_border(weights: Weights, anchor: Weights, symmetry: Symmetry, has: Collection[Any]) -> Moved:
    """One norm or layer scale as the anchor's; a norm's shift comes with its scale if it has both."""
    kind, part = symmetry.kind, symmetry.part
    if isinstance(part, Coordinates | Terms):
        return dict(weights)
    shifts = (Kind.NORM_SHIFT, part) in has
    if kind is Kind.NORM_SCALE or (kind is Kind.NORM_SHIFT and (Kind.NORM_SCALE, part) not in has):
        if part.adaptive is not None:
            return _with_adaptive(weights, anchor, symmetry, part.adaptive, shifts)
        if part.norm is not None:
            return _with_norm(weights, anchor, part, part.norm, shifts)
    if kind is Kind.LAYER_SCALE and part.scale is not None:
        own, goal = read_vector(weights, part.scale), read_vector(anchor, part.scale)
        return change_layer_scale(weights, part, ratio(own, goal))
    if kind is Kind.LAYER_SCALE:
        gates = [one.adaptive.gate for one in symmetry.borders if one.adaptive and one.adaptive.gate]
        factors = _modulation_ratio(weights, anchor, gates)
        return change_layer_scale(weights, part, 1.0 / factors, symmetry.kin)
    return dict(weights)


def _with_adaptive(
    weights: Weights, anchor: Weights, symmetry: Symmetry, norm: Adaptive, shifts: bool
) -> Moved:
    """The scale's part along the anchor's is the anchor's, and what is constant of the shift."""
    part, factors = symmetry.borders[0], None
    if symmetry.kind is Kind.NORM_SCALE:
        scales = [one.adaptive.scale for one in symmetry.borders if one.adaptive is not None]
        factors = _modulation_ratio(weights, anchor, scales, around=1.0)
    own, goal = (read_modulation(w, norm.shift)[1] for w in (weights, anchor))
    factors = torch.ones_like(own) if factors is None else factors
    if not shifts:
        return change_norm(weights, part, factors, kin=symmetry.kin)
    return change_norm(weights, part, factors, goal - factors * own, kin=symmetry.kin)


def _modulation_ratio(
    weights: Weights, anchor: Weights, modulations: Sequence[Modulation], around: float = 0.0
) -> Tensor:
    """Per entry D with ⟨D m, m₀⟩ = ‖m₀‖², m being all numbers that the entry follows from: ``[d]``.

    Whatever factor m had before, D m is the same. 1 where one of both is next to nothing.
    """
    own, goal = (
        torch.cat([maps, *(constant[:, None] + around for constant in constants)], dim=1)
        for maps, constants in (_rows_of(w, modulations) for w in (weights, anchor))
    )
    size, along = goal.square().sum(1), (own * goal).sum(1)
    clear = (along.abs() > SMALLEST * own.norm(dim=1) * goal.norm(dim=1)) & (size > 0)
    return torch.where(clear, size / torch.where(clear, along, 1.0), 1.0)


def _rows_of(weights: Weights, modulations: Sequence[Modulation]) -> tuple[Tensor, list[Tensor]]:
    read_all = [read_modulation(weights, modulation) for modulation in modulations]
    return read_all[0][0], [constant for _, constant in read_all]


def _with_norm(weights: Weights, anchor: Weights, part: Part, norm: Norm, shifts: bool) -> Moved:
    own, goal = read_vector(weights, norm.weight), read_vector(anchor, norm.weight)
    factors = ratio(goal, own)
    if not shifts or norm.bias is None:
        return change_norm(weights, part, factors)
    own, goal = read_vector(weights, norm.bias), read_vector(anchor, norm.bias)
    return change_norm(weights, part, factors, goal - factors * own)


# ----------------------------------------------------------------------------- coordinates


def coordinate_order(weights: Weights, anchor: Weights, coordinates: Coordinates) -> tuple[Tensor, Tensor]:
    """Which coordinate goes to each place of the anchor's order, ``[size]``, and the sign of every group there,
    ``[groups]``.

    By cosines of what tells them, those that change sign with their group and those that do not apart. Coordinates
    of a group stay together: they are matched inside every pair of groups, under both signs, then the groups.
    """
    signed, plain = (
        normalize(coordinate_rows(weights, coordinates, which), dim=1)
        @ normalize(coordinate_rows(anchor, coordinates, which), dim=1).T
        for which in (True, False)
    )
    if coordinates.groups == 1 and not coordinates.signed:
        return assign(signed + plain, maximize=True), torch.ones(1, dtype=torch.float64)
    count, length = coordinates.groups, coordinates.size // coordinates.groups
    scores = torch.stack([plain + signed, plain - signed] if coordinates.signed else [plain + signed])
    blocks = scores.view(len(scores), count, length, count, length).transpose(2, 3)
    total = torch.zeros(len(scores), count, count, dtype=torch.float64)
    inner = torch.zeros(len(scores), count, count, length, dtype=torch.int64)
    for sign, one, other in product(range(len(scores)), range(count), range(count)):
        inner[sign, one, other] = assign(blocks[sign, one, other], maximize=True)
        matched = blocks[sign, one, other][inner[sign, one, other], torch.arange(length)]
        total[sign, one, other] = matched.sum()
    best = total.max(dim=0)
    groups = assign(best.values, maximize=True)
    places = torch.arange(count)
    signs = best.indices[groups, places]
    order = groups[:, None] * length + inner[signs, groups, places]
    return order.flatten(), 1.0 - 2.0 * signs.double()


def _group_ratio(weights: Weights, anchor: Weights, coordinates: Coordinates) -> Tensor:
    own, goal = (
        coordinate_rows(w, coordinates, True).view(coordinates.groups, -1).norm(dim=1)
        for w in (weights, anchor)
    )
    return torch.where((own > 0) & (goal > 0), goal / own.clamp_min(TINY), 1.0)


def ratio(one: Tensor, other: Tensor) -> Tensor:
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
            assert not isinstance(part, Coordinates | Terms)  # these kinds have parts that read a norm
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
