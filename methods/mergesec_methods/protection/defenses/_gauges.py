"""Random elements of the group of a network's symmetries: what protections by change of coordinates draw from.

``mergesec.anatomy.symmetries`` lists the generators; here is one way of drawing an element of each. Sizes are
relative to the published weights themselves, so that they mean the same in every network: a shift of size 1
is as large as what it is added to, on inputs of a norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergesec.anatomy import (
    NEEDS,
    Anatomy,
    Attention,
    Coordinates,
    Kind,
    Linear,
    Mlp,
    Part,
    Symmetry,
    Terms,
    symmetries,
)
from mergesec.contracts import ContractError, Weights
from mergesec.surgery import (
    change_gains,
    change_layer_scale,
    change_norm,
    head_rows,
    lean_reader,
    lean_writer,
    read,
    read_modulation,
    read_vector,
    reorder_coordinates,
    reorder_dimensions,
    reorder_heads,
    reorder_hidden,
    rescale_units,
    scale_groups,
    scale_queries_and_keys,
    shift_keys,
    shift_terms,
    shift_values,
)
from mergesec_methods.protection.defenses._heads import (
    HeadMatrices,
    order_of_heads,
    random_rotations,
    require_precision,
    scale_heads,
)

Moved = dict[str, Tensor]
Move = Callable[[Weights, Any, "Draw"], Moved]
"""(weights, the part that the symmetry names, draw) -> weights."""
Shared = Callable[[Weights, Symmetry, "Draw"], Moved]
"""The same for kinds that may change several parts at once."""


@dataclass(frozen=True)
class Draw:
    """How elements are drawn: ``size`` of shifts, factors log-uniform in [1/span, span], with random signs or not."""

    generator: torch.Generator
    size: float = 3.0
    span: float = 20.0
    signs: bool = False

    def normal(self, *shape: int) -> Tensor:
        """N(0, size²), float64."""
        return self.size * torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def factors(self, *shape: int) -> Tensor:
        """Factors, float64."""
        uniform = torch.rand(*shape, generator=self.generator, dtype=torch.float64)
        scales: Tensor = torch.exp((2 * uniform - 1) * math.log(self.span))
        if not self.signs:
            return scales
        return scales * self.coins(*shape)

    def above_one(self, *shape: int) -> Tensor:
        """Factors log-uniform in [1, span], without signs: what a norm's ε counts less after."""
        uniform = torch.rand(*shape, generator=self.generator, dtype=torch.float64)
        return torch.exp(uniform * math.log(self.span))

    def coins(self, *shape: int) -> Tensor:
        """Signs, float64."""
        heads = torch.full(shape, 0.5, dtype=torch.float64)
        return 1 - 2 * torch.bernoulli(heads, generator=self.generator)

    def matrices(self, count: int, size: int) -> Tensor:
        """Invertible matrices ``[count, size, size]``, singular values as factors."""
        left, right = (random_rotations(count, size, self.generator) for _ in range(2))
        matrices: Tensor = (left * self.factors(count, size)[:, None, :].abs()) @ right
        return matrices


def move(weights: Weights, anatomy: Anatomy, kinds: Collection[Kind], draw: Draw, who: str) -> Moved:
    """The same function after a random element of every generator of these kinds that the network has.

    ContractError if it has none of them: what it would need is said. The same for tensors below float32.
    """
    found = [symmetry for symmetry in symmetries(anatomy) if symmetry.kind in kinds]
    if not found:
        needs = "; or ".join(NEEDS[kind] for kind in Kind if kind in kinds)
        raise ContractError(
            f"{who}: a network of the layout {anatomy.layout!r} has no such symmetry: it needs {needs}"
        )
    # rounded once, at the end
    moved = {n: t.double() if t.is_floating_point() else t for n, t in weights.items()}
    for symmetry in found:
        if symmetry.block is not None:
            require_precision(weights, symmetry.block.attention)
        if symmetry.kind in SHARED:
            moved = SHARED[symmetry.kind](moved, symmetry, draw)
        else:
            moved = MOVES[symmetry.kind](moved, symmetry.part, draw)
    return {n: moved[n].to(t.dtype) for n, t in weights.items()}


def spread(weights: Weights, part: Part, linear: Linear) -> Tensor:
    """How far a map's outputs vary on what its norm hands it (x̂ of variance 1), float64 ``[out]``."""
    rows = read(weights, linear)[0]
    if part.norm is not None or part.adaptive is not None:
        rows = rows * gain_of(weights, part)
    size: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return size


def gain_of(weights: Weights, part: Part) -> Tensor:
    """γ of a part's norm; of an adaptive one 1 + what is constant of its scale. Float64 ``[d]``."""
    if part.adaptive is not None:
        return 1.0 + read_modulation(weights, part.adaptive.scale)[1]
    assert part.norm is not None  # what is asked for has one of both
    return read_vector(weights, part.norm.weight)


def _shift(weights: Weights, attention: Attention, linear: Linear, draw: Draw) -> Tensor:
    shape = head_rows(weights, linear, attention)[0].shape[:2]
    return draw.normal(*shape) * spread(weights, attention, linear).reshape(shape)


def _head_order(weights: Weights, attention: Attention, draw: Draw) -> Moved:
    return reorder_heads(weights, attention, *order_of_heads(attention, draw.generator))


def _query_key(weights: Weights, attention: Attention, draw: Draw) -> Moved:
    matrix, eye = _matrices(attention, draw)
    return scale_heads(weights, attention, HeadMatrices(matrix, torch.linalg.inv(matrix).mT, eye, eye))


def _value_output(weights: Weights, attention: Attention, draw: Draw) -> Moved:
    matrix, eye = _matrices(attention, draw)
    return scale_heads(weights, attention, HeadMatrices(eye, eye, matrix, torch.linalg.inv(matrix)))


def _matrices(attention: Attention, draw: Draw) -> tuple[Tensor, Tensor]:
    matrix = draw.matrices(attention.kv_heads, attention.head_dim)
    return matrix, torch.eye(attention.head_dim, dtype=torch.float64).expand_as(matrix)


def _value_shift(weights: Weights, attention: Attention, draw: Draw) -> Moved:
    return shift_values(weights, attention, _shift(weights, attention, attention.value, draw))


def _key_shift(weights: Weights, attention: Attention, draw: Draw) -> Moved:
    return shift_keys(weights, attention, _shift(weights, attention, attention.key, draw))


def _hidden_order(weights: Weights, mlp: Mlp, draw: Draw) -> Moved:
    return reorder_hidden(weights, mlp, torch.randperm(mlp.hidden, generator=draw.generator))


def _unit_scale(weights: Weights, mlp: Mlp, draw: Draw) -> Moved:
    return rescale_units(weights, mlp, draw.factors(mlp.hidden))


def _norm_scale(weights: Weights, symmetry: Symmetry, draw: Draw) -> Moved:
    part, kin = symmetry.borders[0], symmetry.kin
    return change_norm(weights, part, draw.factors(len(gain_of(weights, part))), kin=kin)


def _norm_shift(weights: Weights, part: Any, draw: Draw) -> Moved:
    gain = gain_of(weights, part)
    return change_norm(weights, part, torch.ones_like(gain), draw.normal(len(gain)) * gain.abs())


def _reader_mean(weights: Weights, part: Any, draw: Draw) -> Moved:
    changed, unit = dict(weights), (1.0 / read_vector(weights, part.norm.weight)).norm()
    for linear in part.readers:
        rows = read(weights, linear)[0].norm(dim=1)
        changed = lean_reader(changed, part.norm, linear, draw.normal(len(rows)) * rows / unit)
    return changed


def _writer_mean(weights: Weights, part: Part, draw: Draw) -> Moved:
    assert part.writer is not None  # the symmetry exists only where there is one
    columns, bias = read(weights, part.writer)
    size = columns.norm(dim=0) / len(columns) ** 0.5
    constant = 0.0 if bias is None else float(draw.normal(1) * bias.norm()) / len(bias) ** 0.5
    scale = 1.0 if part.scale is None else float(read_vector(weights, part.scale).abs().mean())
    return lean_writer(weights, part, scale * size * draw.normal(len(size)), scale * constant)


def _layer_scale(weights: Weights, symmetry: Symmetry, draw: Draw) -> Moved:
    part, kin = symmetry.borders[0], symmetry.kin
    assert part.writer is not None  # the symmetry exists only where there is one
    return change_layer_scale(weights, part, draw.factors(len(read(weights, part.writer)[0])), kin)


def _qk_sign(weights: Weights, attention: Attention, draw: Draw) -> Moved:
    keys = draw.coins(attention.kv_heads, attention.head_dim)
    queries, moved = keys.repeat_interleave(attention.group, 0), dict(weights)
    for side in attention.sides:
        moved = scale_queries_and_keys(moved, side, attention, queries, keys)
    return moved


def _qk_order(weights: Weights, attention: Attention, draw: Draw) -> Moved:
    return reorder_dimensions(
        weights, attention, torch.randperm(attention.head_dim, generator=draw.generator)
    )


def _qk_gain(weights: Weights, attention: Attention, draw: Draw) -> Moved:
    return change_gains(weights, attention, draw.factors(attention.head_dim))


def _qk_scale(weights: Weights, attention: Attention, draw: Draw) -> Moved:
    moved = dict(weights)
    for side in attention.sides:
        query, key = (draw.above_one(heads, 1) for heads in (attention.heads, attention.kv_heads))
        moved = scale_queries_and_keys(moved, side, attention, query, key)
    return moved


def _channel_order(weights: Weights, coordinates: Coordinates, draw: Draw) -> Moved:
    length = coordinates.size // coordinates.groups
    groups = torch.randperm(coordinates.groups, generator=draw.generator)
    inner = torch.rand(coordinates.groups, length, generator=draw.generator).argsort(dim=1)
    return reorder_coordinates(weights, coordinates, (groups[:, None] * length + inner).flatten())


def _group_sign(weights: Weights, coordinates: Coordinates, draw: Draw) -> Moved:
    return scale_groups(weights, coordinates, draw.coins(coordinates.groups))


def _group_scale(weights: Weights, coordinates: Coordinates, draw: Draw) -> Moved:
    return scale_groups(weights, coordinates, draw.above_one(coordinates.groups))


def _term_shift(weights: Weights, terms: Terms, draw: Draw) -> Moved:
    first = read_vector(weights, terms.first)
    other = read_vector(weights, terms.others[0]).view(-1, len(first))
    return shift_terms(weights, terms, draw.normal(len(first)) * other.square().mean(0).sqrt())


MOVES: dict[Kind, Move] = {
    Kind.HIDDEN_ORDER: _hidden_order,
    Kind.UNIT_SCALE: _unit_scale,
    Kind.HEAD_ORDER: _head_order,
    Kind.QUERY_KEY: _query_key,
    Kind.VALUE_OUTPUT: _value_output,
    Kind.VALUE_SHIFT: _value_shift,
    Kind.KEY_SHIFT: _key_shift,
    Kind.NORM_SHIFT: _norm_shift,
    Kind.READER_MEAN: _reader_mean,
    Kind.WRITER_MEAN: _writer_mean,
    Kind.QK_SIGN: _qk_sign,
    Kind.QK_ORDER: _qk_order,
    Kind.QK_GAIN: _qk_gain,
    Kind.QK_SCALE: _qk_scale,
    Kind.CHANNEL_ORDER: _channel_order,
    Kind.GROUP_SIGN: _group_sign,
    Kind.GROUP_SCALE: _group_scale,
    Kind.TERM_SHIFT: _term_shift,
}
SHARED: dict[Kind, Shared] = {Kind.NORM_SCALE: _norm_scale, Kind.LAYER_SCALE: _layer_scale}
