"""Reading and rewriting the linear maps that an anatomy names, without touching the inputs.

Everything returns new dictionaries that share the tensors it left alone. Arithmetic is float64 on
the CPU; results are cast back to the dtype and device they came from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mergesec.anatomy import Attention, Linear, Mlp, Norm, Part

if TYPE_CHECKING:
    from mergesec.contracts import Weights


def read(weights: Weights, linear: Linear) -> tuple[Tensor, Tensor | None]:
    """Float64 CPU copies of a map's weight ``[out, in]`` and bias ``[out]`` (None if it has none)."""
    rows = slice(*linear.rows) if linear.rows else slice(None)
    weight = _double(weights[linear.weight][rows])
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


def head_columns(weights: Weights, attention: Attention) -> Tensor:
    """The output map by head, float64: ``[heads, out, head_dim]``."""
    weight, _ = read(weights, attention.output)
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
    if ``queryᵀ·key`` and ``output·value`` are identities; the factor 1/√head_dim commutes with both.

    Grouped heads: key and value matrices are ``[kv_heads, ...]``, query and output matrices too where a group
    shares them, as it must to keep the function. Rotary attention: to keep the function, query and key
    matrices have to commute with the rotations (``rotary_matrix``); this is not checked.
    """
    changed = dict(weights)
    rows = (
        (attention.query, per_query_head(query, attention)),
        (attention.key, key),
        (attention.value, value),
    )
    for linear, matrix in rows:
        weight, bias = head_rows(weights, linear, attention)
        mixed = None if bias is None else (matrix @ bias[..., None]).flatten()
        changed = write(changed, linear, (matrix @ weight).flatten(0, 1), mixed)
    mixed_columns = head_columns(weights, attention) @ per_query_head(output, attention)
    columns = mixed_columns.transpose(0, 1).flatten(1)
    return write(changed, attention.output, columns, read(weights, attention.output)[1])


def reorder_heads(
    weights: Weights, attention: Attention, groups: Tensor, members: Tensor
) -> dict[str, Tensor]:
    """The same function with key and value head ``groups[g]`` moved to place g, query head ``members[h]`` to h.

    ``groups`` is int64 ``[kv_heads]``, ``members`` ``[heads]``; a query head has to move with its group.
    """
    changed = dict(weights)
    maps = ((attention.query, members), (attention.key, groups), (attention.value, groups))
    for linear, order in maps:
        weight, bias = head_rows(weights, linear, attention)
        moved = None if bias is None else bias[order].flatten()
        changed = write(changed, linear, weight[order].flatten(0, 1), moved)
    columns = head_columns(weights, attention)[members].transpose(0, 1).flatten(1)
    return write(changed, attention.output, columns, read(weights, attention.output)[1])


def shift_values(weights: Weights, attention: Attention, shift: Tensor) -> dict[str, Tensor]:
    """The same function with ``shift`` (``[kv_heads, head_dim]``) added to the value bias (VALUE_SHIFT).

    Attention weights sum to 1, so every head's output grows by its shift, which the output bias takes off again.
    """
    weight, bias = read(weights, attention.value)
    changed = write(weights, attention.value, weight, _with(bias, attention.value) + shift.flatten())
    columns, before = read(weights, attention.output)
    told = per_query_head(shift, attention).flatten()
    return write(changed, attention.output, columns, _with(before, attention.output) - columns @ told)


def shift_keys(weights: Weights, attention: Attention, shift: Tensor) -> dict[str, Tensor]:
    """The same function with ``shift`` (``[kv_heads, head_dim]``) added to the key bias (KEY_SHIFT).

    Not under rotary positions.
    """
    weight, bias = read(weights, attention.key)
    return write(weights, attention.key, weight, _with(bias, attention.key) + shift.flatten())


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
    weights: Weights, part: Part, factors: Tensor, shift: Tensor | None = None
) -> dict[str, Tensor]:
    """The same function with γ, β of the part's norm times ``factors`` (``[d]``, none 0) and β + ``shift``
    (NORM_SCALE, NORM_SHIFT). ``shift`` needs biases on the norm and on all maps that read it."""
    norm = _norm_of(part)
    changed = _put(weights, norm.weight, read_vector(weights, norm.weight) * factors)
    if norm.bias is not None:
        moved = read_vector(weights, norm.bias) * factors
        changed = _put(changed, norm.bias, moved if shift is None else moved + shift)
    for linear in part.readers:
        weight, bias = read(weights, linear)
        weight = weight / factors
        fitted = bias if shift is None else _with(bias, linear) - weight @ shift
        changed = write(changed, linear, weight, fitted)
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
    weight, bias = read(weights, part.writer)
    leaned = None if bias is None else bias + constant * inverse
    return write(weights, part.writer, weight + inverse[:, None] * amounts, leaned)


def lean_of_writer(weights: Weights, part: Part) -> tuple[Tensor, float]:
    """The mean over the stream of what the part writes: of each column ``[in]``, and of the bias."""
    weight, bias = read(weights, part.writer)
    scale = _layer_scale(weights, part)
    return (scale[:, None] * weight).mean(dim=0), 0.0 if bias is None else float((scale * bias).mean())


def change_layer_scale(weights: Weights, part: Part, factors: Tensor) -> dict[str, Tensor]:
    """The same function with λ divided by ``factors`` (``[d]``, none 0), the map before it times them
    (LAYER_SCALE)."""
    if part.scale is None:
        raise ValueError(f"{part.writer.weight}: no layer scale behind it")
    weight, bias = read(weights, part.writer)
    scaled = None if bias is None else factors * bias
    changed = write(weights, part.writer, factors[:, None] * weight, scaled)
    return _put(changed, part.scale, read_vector(weights, part.scale) / factors)


def _layer_scale(weights: Weights, part: Part) -> Tensor:
    """λ, or ones where there is none."""
    if part.scale is None:
        return torch.ones(len(read(weights, part.writer)[0]), dtype=torch.float64)
    return read_vector(weights, part.scale)


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
