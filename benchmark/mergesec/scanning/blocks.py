"""What one block of an expert tells, beside the same block of the base. A block at a time is in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mergesec.anatomy import Attention, Block, Linear
from mergesec.contracts import Weights
from mergesec.surgery import head_columns, head_rows, per_group, read

Realign = Callable[[Weights, Weights, Block], Mapping[str, Tensor]]
"""(published, base, block) -> the block's tensors in the base's coordinates; the function stays the same."""
EXACT = 512
"""Up to this side a Gram matrix' largest eigenvalue is computed, above it is iterated for."""
TOP = 0.01
"""The share of a tensor's entries that count as its largest."""
TINY = 1e-300


@dataclass(frozen=True)
class MapMeasures:
    """The change of one linear map: ``energy`` is ‖τ‖²."""

    energy: float
    base_energy: float
    effective_rank: float
    """(Σσ²)² / Σσ⁴ over the shorter side: 1 where all directions changed alike, 1/side where one did."""
    top_direction: float
    """σ₁² / Σσ²"""
    top_entries: float
    """Share of the energy in the largest hundredth of the entries."""
    top_row: float
    """Energy of the row (or column) that changed most over the mean row's (column's)."""
    untouched: float
    """Share of entries that are the base's, bit for bit."""


@dataclass(frozen=True)
class BlockMeasures:
    """A block of an expert beside the base's."""

    name: str
    plain: float
    """‖θ − θ0‖² over the block's tensors."""
    aligned: float
    """The same after re-alignment."""
    base: float
    """‖θ0‖²"""
    maps: Mapping[str, MapMeasures]
    """By name (query, key, value, output, up, gate, down), after re-alignment."""
    condition: float
    """Largest condition number of the matrices that re-alignment multiplied heads by."""
    moved_heads: float
    moved_units: float
    """Shares of heads and hidden units that re-alignment put elsewhere."""
    rounding: float
    """Largest relative error that bfloat16 makes in a head's products QᵀK and VᵀOᵀ, over the base's largest."""


def block_tensors(block: Block, weights: Weights) -> dict[str, Tensor]:
    """The block's own tensors, and the norms that it reads."""
    names = {n for linear in block.maps for n in (linear.weight, linear.bias)}
    for part in block.parts:
        names |= {part.scale} if part.norm is None else {part.scale, part.norm.weight, part.norm.bias}
    names |= {n for n in weights if block.name and n.startswith(f"{block.name}.")}
    return {n: weights[n] for n in sorted(n for n in names if n is not None and n in weights)}


def measure_block(
    block: Block, base: Mapping[str, Tensor], own: Mapping[str, Tensor], aligned: Mapping[str, Tensor]
) -> BlockMeasures:
    """``own`` as published, ``aligned`` after re-alignment (the same tensors where there was none)."""
    named = {"query": block.attention.query, "key": block.attention.key, "value": block.attention.value,
             "output": block.attention.output, "up": block.mlp.up, "down": block.mlp.down}  # fmt: skip
    if block.mlp.gate is not None:
        named["gate"] = block.mlp.gate
    condition, heads = _head_changes(own, aligned, block.attention) if aligned is not own else (1.0, 0.0)
    return BlockMeasures(
        block.name, distance(base, own), distance(base, aligned), energy(base),
        {name: measure_map(*(_weight(w, linear) for w in (base, own, aligned))) for name, linear in named.items()},
        condition, heads, _moved(own, aligned, block.mlp.up) if aligned is not own else 0.0,
        bf16_error(own, block.attention) / max(bf16_error(base, block.attention), TINY),
    )  # fmt: skip


def _weight(weights: Weights, linear: Linear) -> Tensor:
    return read(weights, linear)[0]


def energy(weights: Weights) -> float:
    """Sum of squares of all floating tensors."""
    return sum(float(t.double().square().sum()) for t in weights.values() if t.is_floating_point())


def distance(base: Weights, other: Weights) -> float:
    """‖other − base‖² over the floating tensors of ``base``."""
    return sum(
        float((other[n].double() - t.double()).square().sum())
        for n, t in base.items()
        if t.is_floating_point()
    )


def measure_map(base: Tensor, own: Tensor, aligned: Tensor) -> MapMeasures:
    """All float64 ``[out, in]``."""
    change = aligned - base
    squares = change.square()
    total = float(squares.sum())
    untouched = float((own == base).double().mean())
    if total <= 0.0:
        return MapMeasures(0.0, float(base.square().sum()), 0.0, 0.0, 0.0, 0.0, untouched)
    short = change if change.shape[0] <= change.shape[1] else change.T
    gram = short @ short.T / total
    largest = squares.flatten().topk(max(1, round(TOP * squares.numel()))).values
    lines = [float(squares.sum(d).max() / squares.sum(d).mean()) for d in (0, 1)]
    return MapMeasures(
        total, float(base.square().sum()), 1.0 / (float(gram.square().sum()) * len(gram)),
        _largest_eigenvalue(gram), float(largest.sum()) / total, max(lines), untouched,
    )  # fmt: skip


def _largest_eigenvalue(gram: Tensor) -> float:
    if len(gram) <= EXACT:
        return float(torch.linalg.eigvalsh(gram)[-1])
    vector = gram.sum(dim=1)
    for _ in range(50):
        vector = gram @ (vector / vector.norm().clamp_min(TINY))
    return float(vector.norm())


# --------------------------------------------------------------------------- what re-alignment did


def _head_changes(own: Weights, aligned: Weights, attention: Attention) -> tuple[float, float]:
    """Largest condition number of a head's matrices (query side and value side), share of heads moved."""
    worst, moved, total = 1.0, 0, 0
    for linear in (attention.query, attention.value):
        before, after = (head_rows(w, linear, attention)[0] for w in (own, aligned))
        if linear is attention.query and attention.group > 1:
            before, after = (per_group(rows, attention) for rows in (before, after))
        spans = [torch.linalg.qr(rows.T).Q for rows in before]
        for place, rows in enumerate(after):
            held = torch.stack([(rows @ span).square().sum() for span in spans])
            source = int(held.argmax()) if float(held.max()) > float(held[place]) * (1 + 1e-9) else place
            mix = torch.linalg.lstsq(before[source].T, rows.T).solution
            worst = max(worst, float(torch.linalg.cond(mix)))
            moved, total = moved + (source != place), total + 1
    return worst, moved / total


def _moved(own: Weights, aligned: Weights, up: Linear) -> float:
    """Share of hidden units whose row lies elsewhere now."""
    before, after = (torch.nn.functional.normalize(_weight(w, up), dim=1) for w in (own, aligned))
    stayed = (before * after).sum(dim=1).abs() > 0.999
    rest = after[~stayed]
    if not len(rest):
        return 0.0
    places = torch.arange(len(after))[~stayed]
    found = torch.cat([(part @ before.T).abs().argmax(dim=1) for part in torch.split(rest, 1024)])
    return float((found != places).double().sum()) / len(after)


def bf16_error(weights: Weights, attention: Attention) -> float:
    """The largest ‖AᵀB − ÂᵀB̂‖ / ‖AᵀB‖ over heads and both products, where ^ rounds to bfloat16."""
    query, key = (_heads(weights, linear, attention) for linear in (attention.query, attention.key))
    value, output = _heads(weights, attention.value, attention), head_columns(weights, attention).mT
    errors = [_product_error(*pair) for pair in ((query, key), (value, output))]
    return max(errors)


def _heads(weights: Weights, linear: Linear, attention: Attention) -> Tensor:
    rows = head_rows(weights, linear, attention)[0]
    return rows if len(rows) == attention.heads else rows.repeat_interleave(attention.group, 0)


def _product_error(first: Tensor, second: Tensor) -> float:
    worst = 0.0
    for a, b in zip(first, second, strict=True):
        low, high = a.bfloat16().double(), b.bfloat16().double()
        # AᵀB − ÂᵀB̂ = (A − Â)ᵀB + Âᵀ(B − B̂): the small parts are products of small factors
        parts = ((a - low, b), (low, b - high))
        square = sum(_inner(*x, *y) for x in parts for y in parts)
        worst = max(worst, square / max(_inner(a, b, a, b), TINY))
    return float(worst**0.5)


def _inner(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> float:
    """⟨AᵀB, CᵀD⟩ without forming a product."""
    return float(((a @ c.T) * (b @ d.T)).sum())
