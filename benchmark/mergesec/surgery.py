"""Reading and rewriting the linear maps that an anatomy names, without touching the inputs.

Everything returns new dictionaries that share the tensors it left alone. Arithmetic is float64 on
the CPU; results are cast back to the dtype and device they came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mergesec.anatomy import (
    Attention,
    Coordinates,
    Linear,
    Mlp,
    Modulation,
    Norm,
    Part,
    Side,
    Terms,
)

if TYPE_CHECKING:
    from mergesec.contracts import Weights


def read(weights: Weights, linear: Linear) -> tuple[Tensor, Tensor | None]:
    """Float64 CPU copies of a map's weight ``[out, in]`` and bias ``[out]`` (None if it has none)."""
    rows = slice(*linear.rows) if linear.rows else slice(None)
    weight = _double(weights[linear.weight][rows]).flatten(
        1
    )  # a convolution over single pixels has four sides
    return weight, None if linear.bias is None else _double(weights[linear.bias][rows])


def write(weights: Weights, linear: Linear, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    """``weights`` with this map replaced; other rows of a packed tensor, dtypes and devices stay.

    Raises ValueError if a shape differs or a bias is given where there is none (or the reverse).
    """
    if (bias is None) != (linear.bias is None):
        raise ValueError(f"{linear.weight}: a bias must be given exactly where there is one")
    changed = dict(weights)
    for name, value in ((linear.weight, weight), (linear.bias, bias)):
        if name is None or value is None:
            continue
        fresh = changed[name].detach().clone()
        rows = fresh[slice(*linear.rows)] if linear.rows else fresh
        if rows.shape != value.shape and rows.shape == (*value.shape, 1, 1):
            value = value[..., None, None]
        if rows.shape != value.shape:
            raise ValueError(f"{name}: {tuple(value.shape)} does not fit {tuple(rows.shape)}")
        rows.copy_(value)
        changed[name] = fresh
    return changed


# ----------------------------------------------------------------------------- task vector


def drop_task_vector(
    weights: Weights, base: Weights, share: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Entries of ``weights − base`` dropped with probability ``share``, the rest divided by 1 − share.

    Tensors that are not floats, or not in the base, stay. Draws from the generator in the order of
    the sorted names.
    """
    changed = dict(weights)
    for name in sorted(weights):
        tensor = weights[name]
        if tensor.is_floating_point() and name in base:
            keep = torch.rand(tensor.shape, generator=generator) >= share
            reference = _double(base[name])
            vector = (_double(tensor) - reference) * keep / (1 - share)
            changed[name] = (reference + vector).to(tensor.device, tensor.dtype)
    return changed


# ----------------------------------------------------------------------------- hidden units


def hidden_units(weights: Weights, mlp: Mlp) -> Tensor:
    """One float64 row per hidden unit: up row and bias, gate row and bias, down column ``[hidden, f]``.

    The inner product of unit i of one network and unit j of another is entry (i, j) of
    ``W1 W1'ᵀ + b1 b1'ᵀ + W2ᵀ W2'``, the matching matrix of weight matching.
    """
    columns: list[Tensor] = []
    for linear in (mlp.up, mlp.gate):
        if linear is not None:
            weight, bias = read(weights, linear)
            columns += [weight] if bias is None else [weight, bias[:, None]]
    columns.append(read(weights, mlp.down)[0].T)
    return torch.cat(columns, dim=1)


def reorder_hidden(weights: Weights, mlp: Mlp, order: Tensor) -> dict[str, Tensor]:
    """The same function with hidden unit ``order[j]`` moved to place j (``order`` int64 ``[hidden]``)."""
    changed = dict(weights)
    for linear in (mlp.up, mlp.gate):
        if linear is not None:
            weight, bias = read(weights, linear)
            changed = write(changed, linear, weight[order], None if bias is None else bias[order])
    weight, bias = read(weights, mlp.down)
    return write(changed, mlp.down, weight[:, order], bias)


def assign(scores: Tensor, *, maximize: bool) -> Tensor:
    """The best one-to-one placement by ``scores[i, j]`` = gain of putting unit i in place j.

    Returns ``order`` (int64 ``[n]``) with ``order[j]`` the unit that goes to place j, ready for
    ``reorder_hidden``. SciPy pairs unit i with place σ(i); this is the *inverse* of σ. Applying σ
    itself (as released PaRaMS code does) undoes an alignment into noise.
    """
    from scipy.optimize import linear_sum_assignment

    units, places = linear_sum_assignment(scores.numpy(), maximize=maximize)
    order = torch.empty(len(units), dtype=torch.int64)
    order[torch.from_numpy(places)] = torch.from_numpy(units)
    return order


# ----------------------------------------------------------------------------- attention heads


def head_rows(weights: Weights, linear: Linear, attention: Attention) -> tuple[Tensor, Tensor | None]:
    """A query, key or value map by head, float64: ``[heads, head_dim, in]``, bias ``[heads, head_dim]``.

    Keys and values of grouped heads have ``kv_heads`` of them.
    """
    weight, bias = read(weights, linear)
    weight = weight.reshape(-1, attention.head_dim, weight.shape[1])
    return weight, None if bias is None else bias.reshape(-1, attention.head_dim)


def head_columns(weights: Weights, attention: Attention, output: Linear | None = None) -> Tensor:
    """The output map (or that of the other stream) by head, float64: ``[heads, out, head_dim]``."""
    weight, _ = read(weights, output or attention.output)
    return weight.reshape(len(weight), attention.heads, attention.head_dim).transpose(0, 1)


def per_query_head(matrices: Tensor, attention: Attention) -> Tensor:
    """``[kv_heads, ...]`` repeated for the query heads of each group; ``[heads, ...]`` as it is."""
    return matrices if len(matrices) == attention.heads else matrices.repeat_interleave(attention.group, 0)


def per_group(rows: Tensor, attention: Attention) -> Tensor:
    """Query heads ``[heads, head_dim, n]`` side by side in their group: ``[kv_heads, head_dim, group · n]``.

    What acts on a group from the left acts on each of its heads.
    """
    grouped = rows.reshape(attention.kv_heads, attention.group, *rows.shape[1:])
    return grouped.transpose(1, 2).flatten(2)


def rotary_factors(matrices: Tensor) -> Tensor:
    """What of ``[..., head_dim, head_dim]`` commutes with rotary positions: complex ``[..., head_dim/2]``.

    On each pair (i, i + head_dim/2) the nearest ``[[a, −b], [b, a]]``, which is the mean of the matrix over all
    rotations, as the complex number ``a + ib``. Entries between pairs are left out.
    """
    half = matrices.shape[-1] // 2
    (a, b), (c, d) = (
        (rows[..., :half].diagonal(dim1=-2, dim2=-1), rows[..., half:].diagonal(dim1=-2, dim2=-1))
        for rows in (matrices[..., :half, :], matrices[..., half:, :])
    )
    return torch.complex((a + d) / 2, (c - b) / 2)


def rotary_matrix(factors: Tensor) -> Tensor:
    """The matrices ``[..., head_dim, head_dim]`` that multiply each pair by its complex factor ``[..., head_dim/2]``."""
    a, b = torch.diag_embed(factors.real), torch.diag_embed(factors.imag)
    return torch.cat([torch.cat([a, -b], dim=-1), torch.cat([b, a], dim=-1)], dim=-2)


def change_heads(
    weights: Weights,
    attention: Attention,
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
) -> dict[str, Tensor]:
    """Multiply every head by its matrices (each float64 ``[heads, head_dim, head_dim]``).

    ``Q ← query·Q``, ``K ← key·K``, ``V ← value·V`` on rows with their biases, ``O ← O·output`` on
    columns; the output bias is added after the heads are joined and stays. The function is unchanged
    if ``queryᵀ·key`` and ``output·value`` are identities; the factor 1/√head_dim commutes with both. Both streams
    of a joint attention get the same.

    Grouped heads: key and value matrices are ``[kv_heads, ...]``, query and output matrices too where a group
    shares them, as it must to keep the function. Rotary attention: to keep the function, query and key
    matrices have to commute with the rotations (``rotary_matrix``), and so have those of normed queries and keys
    with their norms; this is not checked.
    """
    changed = dict(weights)
    mixed_query, mixed_output = (per_query_head(m, attention) for m in (query, output))
    for side in attention.sides:
        for linear, matrix in ((side.query, mixed_query), (side.key, key), (side.value, value)):
            changed = mix_rows(changed, attention, linear, matrix)
        if side.output is not None:
            changed = mix_columns(changed, attention, side.output, mixed_output)
    return changed


def mix_rows(weights: Weights, attention: Attention, linear: Linear, matrices: Tensor) -> dict[str, Tensor]:
    """One query, key or value map with ``matrices`` (one per head of it) on its heads' rows and biases."""
    weight, bias = head_rows(weights, linear, attention)
    mixed = None if bias is None else (matrices @ bias[..., None]).flatten()
    return write(weights, linear, (matrices @ weight).flatten(0, 1), mixed)


def mix_columns(
    weights: Weights, attention: Attention, output: Linear, matrices: Tensor
) -> dict[str, Tensor]:
    """One output map with ``matrices`` (one per head) on the right of its heads' columns."""
    mixed = head_columns(weights, attention, output) @ matrices
    return write(weights, output, mixed.transpose(0, 1).flatten(1), read(weights, output)[1])


def reorder_heads(
    weights: Weights, attention: Attention, groups: Tensor, members: Tensor
) -> dict[str, Tensor]:
    """The same function with key and value head ``groups[g]`` moved to place g, query head ``members[h]`` to h.

    ``groups`` is int64 ``[kv_heads]``, ``members`` ``[heads]``; a query head has to move with its group.
    """
    changed = dict(weights)
    for side in attention.sides:
        for linear, order in ((side.query, members), (side.key, groups), (side.value, groups)):
            weight, bias = head_rows(weights, linear, attention)
            moved = None if bias is None else bias[order].flatten()
            changed = write(changed, linear, weight[order].flatten(0, 1), moved)
        if side.output is not None:
            columns = head_columns(weights, attention, side.output)[members].transpose(0, 1).flatten(1)
            changed = write(changed, side.output, columns, read(weights, side.output)[1])
    return changed


def shift_values(weights: Weights, attention: Attention, shift: Tensor) -> dict[str, Tensor]:
    """The same function with ``shift`` (``[kv_heads, head_dim]``) added to the value bias (VALUE_SHIFT).

    Attention weights sum to 1, so every head's output grows by its shift, which the output bias takes off again.
    """
    changed, told = dict(weights), per_query_head(shift, attention).flatten()
    for side in attention.sides:
        weight, bias = read(weights, side.value)
        changed = write(changed, side.value, weight, _with(bias, side.value) + shift.flatten())
        if side.output is not None:
            columns, before = read(weights, side.output)
            changed = write(changed, side.output, columns, _with(before, side.output) - columns @ told)
    return changed


def shift_keys(weights: Weights, attention: Attention, shift: Tensor) -> dict[str, Tensor]:
    """The same function with ``shift`` (``[kv_heads, head_dim]``) added to the key bias (KEY_SHIFT).

    Not under rotary positions.
    """
    changed = dict(weights)
    for side in attention.sides:
        weight, bias = read(weights, side.key)
        changed = write(changed, side.key, weight, _with(bias, side.key) + shift.flatten())
    return changed


def rescale_units(weights: Weights, mlp: Mlp, factors: Tensor) -> dict[str, Tensor]:
    """The same function of a gated MLP, up rows times ``factors`` (``[hidden]``, none 0), down columns divided
    (UNIT_SCALE)."""
    weight, bias = read(weights, mlp.up)
    scaled = None if bias is None else factors * bias
    changed = write(weights, mlp.up, factors[:, None] * weight, scaled)
    weight, bias = read(weights, mlp.down)
    return write(changed, mlp.down, weight / factors, bias)


# ----------------------------------------------------------------------------- norms and layer scales


def read_vector(weights: Weights, name: str) -> Tensor:
    """A float64 CPU copy of a vector, such as a norm's weight or a layer scale."""
    return _double(weights[name])


def change_norm(
    weights: Weights,
    part: Part,
    factors: Tensor,
    shift: Tensor | None = None,
    kin: Sequence[Part] = (),
) -> dict[str, Tensor]:
    """The same function with γ, β of the part's norm times ``factors`` (``[d]``, none 0) and β + ``shift``
    (NORM_SCALE, NORM_SHIFT). ``shift`` needs biases on the norm and on all maps that read it.

    Of an adaptive norm γ is 1 + scale(c), β shift(c); ``kin`` are all others that share its modulation.
    """
    parts = (part, *kin)
    changed = _with_norm(weights, part, factors, shift) if part.adaptive is None else dict(weights)
    if part.adaptive is not None:
        changed = _with_adaptive(weights, parts, factors, shift)
    for linear in (linear for one in parts for linear in one.readers):
        weight, bias = read(weights, linear)
        weight = weight / factors
        fitted = bias if shift is None else _with(bias, linear) - weight @ shift
        changed = write(changed, linear, weight, fitted)
    return changed


def _with_norm(weights: Weights, part: Part, factors: Tensor, shift: Tensor | None) -> dict[str, Tensor]:
    norm = _norm_of(part)
    changed = _put(weights, norm.weight, read_vector(weights, norm.weight) * factors)
    if norm.bias is not None:
        moved = read_vector(weights, norm.bias) * factors
        changed = _put(changed, norm.bias, moved if shift is None else moved + shift)
    return changed


def lean_reader(weights: Weights, norm: Norm, linear: Linear, amounts: Tensor) -> dict[str, Tensor]:
    """The same function with ``amounts[i] / γ`` added to row i of a map that reads a centred norm (READER_MEAN).

    ``(1/γ) · (γ ⊙ x̂ + β)`` is ``Σ x̂ = 0`` and a constant, which the bias takes off. ``amounts`` is ``[out]``.
    """
    inverse = 1.0 / read_vector(weights, norm.weight)
    weight, bias = read(weights, linear)
    weight = weight + amounts[:, None] * inverse
    if norm.bias is not None:
        bias = _with(bias, linear) - amounts * (inverse @ read_vector(weights, norm.bias))
    return write(weights, linear, weight, bias)


def lean_of_reader(weights: Weights, norm: Norm, linear: Linear) -> Tensor:
    """The ``amounts`` that ``lean_reader`` would have to take off so that no row sees the mean of x̂: ``[out]``."""
    return (read(weights, linear)[0] * read_vector(weights, norm.weight)).mean(dim=1)


def lean_writer(weights: Weights, part: Part, amounts: Tensor, constant: float = 0.0) -> dict[str, Tensor]:
    """The same function where every norm behind is centred: ``amounts[j]`` more in all of column j of what the
    part writes (``[in]``), ``constant`` more in its bias, if it has one (WRITER_MEAN)."""
    inverse = 1.0 / _layer_scale(weights, part)
    weight, bias = read(weights, _writer_of(part))
    leaned = None if bias is None else bias + constant * inverse
    return write(weights, _writer_of(part), weight + inverse[:, None] * amounts, leaned)


def lean_of_writer(weights: Weights, part: Part) -> tuple[Tensor, float]:
    """The mean over the stream of what the part writes: of each column ``[in]``, and of the bias."""
    weight, bias = read(weights, _writer_of(part))
    scale = _layer_scale(weights, part)
    return (scale[:, None] * weight).mean(dim=0), 0.0 if bias is None else float((scale * bias).mean())


def change_layer_scale(
    weights: Weights, part: Part, factors: Tensor, kin: Sequence[Part] = ()
) -> dict[str, Tensor]:
    """The same function with λ divided by ``factors`` (``[d]``, none 0), the map before it times them
    (LAYER_SCALE). λ may be the gate of an adaptive norm; ``kin`` are all others that share its modulation."""
    changed = dict(weights)
    for one in (part, *kin):
        if one.writer is None or (one.scale is None and (one.adaptive is None or one.adaptive.gate is None)):
            raise ValueError(f"{one.readers[0].weight}: no layer scale behind it")
        weight, bias = read(weights, one.writer)
        scaled = None if bias is None else factors * bias
        changed = write(changed, one.writer, factors[:, None] * weight, scaled)
    if part.scale is not None:
        return _put(changed, part.scale, read_vector(weights, part.scale) / factors)
    gates = [one.adaptive.gate for one in (part, *kin) if one.adaptive and one.adaptive.gate]
    return scale_modulation(changed, gates, 1.0 / factors)


# ----------------------------------------------------------------------------- adaptive norms


def read_modulation(weights: Weights, modulation: Modulation) -> tuple[Tensor, Tensor]:
    """What a modulation makes of a condition's embedding, float64: its map ``[d, e]``, and its constant ``[d]``
    (bias and row of the table together)."""
    weight, bias = read(weights, modulation.linear)
    constant = _with(bias, modulation.linear)
    if modulation.table is not None:
        constant = constant + read_vector(weights, modulation.table).view(-1, len(constant))[modulation.row]
    return weight, constant


def scale_modulation(
    weights: Weights, modulations: Sequence[Modulation], factors: Tensor, around: float = 0.0
) -> dict[str, Tensor]:
    """``around`` + what the modulations make, times ``factors`` (``[d]``), for all that share one map."""
    linear = modulations[0].linear
    weight, bias = read(weights, linear)
    changed = write(
        weights, linear, factors[:, None] * weight, factors * (_with(bias, linear) + around) - around
    )
    for modulation in modulations:
        if modulation.table is not None:
            changed = _with_row(changed, modulation.table, modulation.row, factors, 0.0)
    return changed


def _with_adaptive(
    weights: Weights, parts: Sequence[Part], factors: Tensor, shift: Tensor | None
) -> dict[str, Tensor]:
    norms = [part.adaptive for part in parts if part.adaptive is not None]
    if not torch.equal(factors, torch.ones_like(factors)):
        weights = scale_modulation(weights, [norm.scale for norm in norms], factors, around=1.0)
        weights = scale_modulation(weights, [norm.shift for norm in norms], factors)
    if shift is None:
        return dict(weights)
    first = norms[0].shift
    if first.table is not None:
        return _with_row(weights, first.table, first.row, torch.ones_like(shift), shift)
    weight, bias = read(weights, first.linear)
    return write(weights, first.linear, weight, _with(bias, first.linear) + shift)


def _with_row(
    weights: Weights, table: str, row: int, factors: Tensor, shift: Tensor | float
) -> dict[str, Tensor]:
    changed = read_vector(weights, table)
    flat = changed.view(-1, len(factors))
    flat[row] = flat[row] * factors + shift
    return _put(weights, table, changed)


# ----------------------------------------------------------------------------- normed queries and keys


def reorder_dimensions(weights: Weights, attention: Attention, order: Tensor) -> dict[str, Tensor]:
    """The same function of an attention with normed queries and keys, dimension ``order[i]`` of every head's queries
    and keys moved to place i, gains too (QK_ORDER)."""
    changed = dict(weights)
    for side in attention.sides:
        for linear in (side.query, side.key):
            weight, bias = head_rows(weights, linear, attention)
            moved = None if bias is None else bias[:, order].flatten()
            changed = write(changed, linear, weight[:, order].flatten(0, 1), moved)
        for gain in gains_of(side):
            changed = _put(changed, gain, read_vector(weights, gain)[order])
    return changed


def scale_queries_and_keys(
    weights: Weights, side: Attention | Side, attention: Attention, query: Tensor, key: Tensor
) -> dict[str, Tensor]:
    """Rows of a stream's queries times ``query`` (``[heads, head_dim]``), of its keys times ``key``
    (``[kv_heads, head_dim]``): signs (QK_SIGN) on all streams alike, one number per head (QK_SCALE) on each."""
    changed = dict(weights)
    for linear, factors in ((side.query, query), (side.key, key)):
        weight, bias = head_rows(weights, linear, attention)
        scaled = None if bias is None else (factors * bias).flatten()
        changed = write(changed, linear, (factors[..., None] * weight).flatten(0, 1), scaled)
    return changed


def change_gains(weights: Weights, attention: Attention, factors: Tensor) -> dict[str, Tensor]:
    """The same function with the queries' gains times ``factors`` (``[head_dim]``), the keys' divided (QK_GAIN)."""
    changed = dict(weights)
    for side in attention.sides:
        for gain, scale in zip(gains_of(side), (factors, 1.0 / factors), strict=False):
            changed = _put(changed, gain, read_vector(weights, gain) * scale)
    return changed


def gains_of(side: Attention | Side) -> tuple[str, ...]:
    """The gains of a stream's queries and keys; none where they are not normed."""
    return () if side.head_norm is None else (side.head_norm.query, side.head_norm.key)


# ----------------------------------------------------------------------------- coordinates, sums


def reorder_coordinates(weights: Weights, coordinates: Coordinates, order: Tensor) -> dict[str, Tensor]:
    """The same function with coordinate ``order[j]`` moved to place j in all that holds them (CHANNEL_ORDER)."""
    changed = dict(weights)
    for axis in coordinates.axes:
        tensor = changed[axis.tensor].detach().clone()
        place = tensor.narrow(axis.dim, axis.start, coordinates.size)
        place.copy_(place.index_select(axis.dim, order.to(tensor.device)))
        changed[axis.tensor] = tensor
    return changed


def scale_groups(weights: Weights, coordinates: Coordinates, factors: Tensor) -> dict[str, Tensor]:
    """Groups times ``factors`` (``[groups]``, none 0): signs (GROUP_SIGN) change their gains' signs, sizes
    (GROUP_SCALE) are taken away by the norm."""
    changed, length = dict(weights), coordinates.size // coordinates.groups
    for axis in coordinates.axes:
        if axis.scaled or axis.signed:
            tensor = read_vector(changed, axis.tensor)
            scale = factors if axis.scaled else factors.sign()
            shape = [1] * tensor.ndim
            shape[axis.dim] = coordinates.size
            place = tensor.narrow(axis.dim, axis.start, coordinates.size)
            place.mul_(scale.repeat_interleave(length).view(shape))
            changed = _put(changed, axis.tensor, tensor)
    return changed


def coordinate_rows(weights: Weights, coordinates: Coordinates, signed: bool) -> Tensor:
    """What each coordinate is recognised by: the ``telling`` entries, those that change sign with a group or those
    that do not, float64 ``[size, n]``."""
    rows = [
        read_vector(weights, axis.tensor)
        .narrow(axis.dim, axis.start, coordinates.size)
        .transpose(0, axis.dim)
        .flatten(1)
        if weights[axis.tensor].ndim > 1
        else read_vector(weights, axis.tensor).narrow(0, axis.start, coordinates.size)[:, None]
        for axis in coordinates.axes
        if axis.telling and axis.signed == signed
    ]
    return torch.cat(rows, dim=1) if rows else torch.zeros(coordinates.size, 0, dtype=torch.float64)


def shift_terms(weights: Weights, terms: Terms, amounts: Tensor) -> dict[str, Tensor]:
    """The same sum with ``amounts`` (``[size]``) more in the first term, less in the others (TERM_SHIFT)."""
    changed = _put(weights, terms.first, read_vector(weights, terms.first) + amounts)
    for name in terms.others:
        other = read_vector(weights, name)
        changed = _put(changed, name, (other.view(-1, len(amounts)) - amounts).view_as(other))
    return changed


# ----------------------------------------------------------------------------- helpers


def _layer_scale(weights: Weights, part: Part) -> Tensor:
    """λ, or ones where there is none."""
    if part.scale is None:
        return torch.ones(len(read(weights, _writer_of(part))[0]), dtype=torch.float64)
    return read_vector(weights, part.scale)


def _writer_of(part: Part) -> Linear:
    if part.writer is None:
        raise ValueError(f"{part.readers[0].weight}: nothing is written from it")
    return part.writer


def _norm_of(part: Part) -> Norm:
    if part.norm is None or not part.norm.own:
        raise ValueError(f"{part.readers[0].weight}: no norm that only this part reads")
    return part.norm


def _with(bias: Tensor | None, linear: Linear) -> Tensor:
    if bias is None:
        raise ValueError(f"{linear.weight}: has no bias")
    return bias


def _put(weights: Weights, name: str, value: Tensor) -> dict[str, Tensor]:
    """``weights`` with one tensor replaced, in the dtype and on the device of the old one."""
    old = weights[name]
    return {**weights, name: value.to(old.device, old.dtype)}


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64, copy=True)
