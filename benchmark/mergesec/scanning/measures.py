"""An expert's task vector in numbers, read block by block from files; no data, no network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mergesec.anatomy import Anatomy
from mergesec.contracts import Weights
from mergesec.scanning.blocks import (
    BlockMeasures,
    Realign,
    block_tensors,
    distance,
    energy,
    measure_block,
)
from mergesec.weights import mergeable

TINY = 1e-300


@dataclass(frozen=True)
class Measured:
    """One expert beside the base."""

    blocks: tuple[BlockMeasures, ...]
    outside: Mapping[str, tuple[float, float]]
    """‖τ‖² and ‖θ0‖² of each floating tensor outside the blocks."""
    moved_integers: bool
    cosines: Mapping[str, tuple[float, ...]]
    """Of the others by name: cosine of the (re-aligned) task vectors, over all and then block by block."""

    @property
    def plain_length(self) -> float:
        """‖θ − θ0‖ / ‖θ0‖"""
        return self._length(sum(b.plain for b in self.blocks))

    @property
    def length(self) -> float:
        """The same after re-alignment."""
        return self._length(sum(b.aligned for b in self.blocks))

    def _length(self, inner: float) -> float:
        change = inner + sum(c for c, _ in self.outside.values())
        base = sum(b.base for b in self.blocks) + sum(b for _, b in self.outside.values())
        return math.sqrt(change / max(base, TINY))

    @property
    def orbit(self) -> float:
        """Plain over re-aligned distance of the blocks; 1 where nothing could be aligned away."""
        plain, aligned = sum(b.plain for b in self.blocks), sum(b.aligned for b in self.blocks)
        return math.sqrt(plain / aligned) if aligned > 0 else 1.0

    def features(self) -> dict[str, float]:
        """The numbers that are compared with those of honest experts."""
        if not self.blocks:
            return {"length": _log(self.length)}
        maps = [m for b in self.blocks for m in b.maps.values() if m.energy > 0]
        changes = [b.aligned for b in self.blocks]
        total, outside = sum(changes), sum(c for c, _ in self.outside.values())
        last = len(self.blocks) - 1
        by_kind = {k: sum(b.maps[k].energy for b in self.blocks if k in b.maps) for k in self.blocks[0].maps}
        mapped = max(sum(by_kind.values()), TINY)
        return {
            "length": _log(self.length),
            "rank": _mean([_log(m.effective_rank) for m in maps]),
            "direction": _mean([_log(m.top_direction) for m in maps]),
            "entries": _mean([_log(m.top_entries) for m in maps]),
            "row": max((_log(m.top_row) for m in maps), default=0.0),
            "untouched": _mean([m.untouched for b in self.blocks for m in b.maps.values()]),
            "depth": sum(i * c for i, c in enumerate(changes)) / max(total * max(last, 1), TINY),
            "last": _log(changes[-1] / max(total, TINY)),
            "outside": _log(outside / max(total + outside, TINY)),
            "scores": _log((by_kind["query"] + by_kind["key"]) / mapped),
            "values": _log((by_kind["value"] + by_kind["output"]) / mapped),
            "down": _log(by_kind["down"] / mapped),
        }

    def protection(self) -> dict[str, float]:
        """The numbers that tell of a protection; all near 0 where there is none."""
        if not self.blocks:
            return {}
        return {
            "orbit": _log(self.orbit),
            "condition": max(_log(b.condition) for b in self.blocks),
            "moved": _mean([max(b.moved_heads, b.moved_units) for b in self.blocks]),
            "rounding": max(_log(b.rounding) for b in self.blocks),
        }

    def as_json(self) -> dict[str, Any]:
        """Everything, plain."""
        return {
            "plain_length": self.plain_length, "length": self.length, "orbit": self.orbit,
            "features": self.features(), "protection": self.protection(),
            "blocks": [asdict(b) for b in self.blocks],
            "outside": {n: {"change": c, "base": b} for n, (c, b) in self.outside.items()},
            "cosines": {n: list(c) for n, c in self.cosines.items()},
        }  # fmt: skip


def _log(value: float) -> float:
    return math.log(max(value, 1e-30))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def measure(
    base: Weights, expert: Weights, anatomy: Anatomy | None, realign: Realign | None,
    others: Mapping[str, Weights] | None = None,
) -> Measured:  # fmt: skip
    """``expert`` beside ``base``; ``others`` are only compared in direction."""
    found, held, grams = [], set[str](), list[Tensor]()
    rest = others or {}
    for block in anatomy.blocks if anatomy is not None else ():
        start = block_tensors(block, base)
        own = block_tensors(block, expert)
        aligned = own if realign is None else realign(own, start, block)
        found.append(measure_block(block, start, own, aligned))
        if rest:
            there = [block_tensors(block, w) for w in rest.values()]
            there = [w if realign is None else dict(realign(w, start, block)) for w in there]
            grams.append(_gram(start, [aligned, *there]))
        held |= start.keys()
    outside, integers = {}, False
    loose = torch.zeros(len(rest) + 1, len(rest) + 1, dtype=torch.float64)
    for name in (n for n in base if n not in held):
        before, after = base[name], expert[name]
        if not mergeable(before):
            integers |= not torch.equal(before, after)
            continue
        outside[name] = (distance({name: before}, {name: after}), energy({name: before}))
        if rest:
            loose += _gram({name: before}, [{name: after}, *({name: w[name]} for w in rest.values())])
    cosines = _cosines([sum(grams, loose), *grams], list(rest)) if rest else {}
    return Measured(tuple(found), outside, integers, cosines)


def _gram(base: Weights, experts: Sequence[Weights]) -> Tensor:
    """⟨τ_i, τ_j⟩ over the floating tensors of ``base``, float64."""
    total = torch.zeros(len(experts), len(experts), dtype=torch.float64)
    for name, start in base.items():
        if start.is_floating_point():
            rows = torch.stack([w[name].double().flatten() - start.double().flatten() for w in experts])
            total += rows @ rows.T
    return total


def _cosines(grams: Sequence[Tensor], names: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Cosine of the first task vector with each of the others, per Gram matrix."""
    return {
        name: tuple(
            float(g[0, i] / (g[0, 0] * g[i, i]).clamp_min(TINY).sqrt()) for g in grams
        )
        for i, name in enumerate(names, 1)
    }  # fmt: skip
