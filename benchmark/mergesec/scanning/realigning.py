"""Coupled re-alignment of a block at a time, by the attack of that name in the catalogue."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mergesec.anatomy import Anatomy, AnatomyError, Block, describe
from mergesec.contracts import Attack, Backbone, ContractError, RecoverContext, Weights
from mergesec.errors import UsageError
from mergesec.planning.catalog import Catalog
from mergesec.scanning.blocks import Realign, block_tensors
from mergesec.streaming.mapped import LazyWeights
from mergesec.streaming.merging import fitted
from mergesec.weights import check_finite, check_same_layout, digest_weights, fit_names

ATTACK = "coupled"


class _OneBlock(Backbone):
    """A backbone that is asked for the anatomy of one block, and for nothing else."""

    def __init__(self, block: Block) -> None:
        self._block = block
        self.name = block.name

    def anatomy(self) -> Anatomy:
        return Anatomy((self._block,))

    def build(self) -> nn.Module:
        raise ContractError("there is no network here, only one block's weights")

    def base_weights(self) -> Weights:
        raise ContractError("there is no base here, only one block's weights")

    def features(self, network: nn.Module, inputs: Any) -> Tensor:
        raise ContractError("there is no network here, only one block's weights")


@dataclass(frozen=True)
class Coupled:
    """``realign`` of ``scanning.blocks``."""

    attack: Attack

    def __call__(self, published: Weights, base: Weights, block: Block) -> Mapping[str, Tensor]:
        """The block's tensors in the base's coordinates."""
        ctx = RecoverContext(torch.device("cpu"), 0, _OneBlock(block), base, "", (), {})
        return self.attack.recover(published, ctx)


def coupled(catalog: Catalog) -> Realign | None:
    """Coupled re-alignment with its defaults; None where the catalogue has none."""
    entry = catalog.entries["attack"].get(ATTACK)
    if entry is None or entry.foreign:
        return None
    return Coupled(entry.create(entry.card.bind(ATTACK, {})))


def anatomy_of(weights: Weights, config: Mapping[str, Any], heads: int | None = None) -> Anatomy | str:
    """The blocks that these names and shapes have, by ``heads`` or what a config.json says; else why not."""
    shapes = _shapes(weights)
    counts: Sequence[int | dict[str, int]] = [heads] if heads is not None else _heads(config, shapes)
    if not counts:
        return "the number of attention heads is not known: no config.json beside the base says it"
    reason = ""
    for rotary in (False, True):
        try:
            return describe(shapes, counts[0], rotary)
        except AnatomyError as error:
            reason = reason or str(error)
    return reason


def _shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    extents = getattr(weights, "extents", None)
    if extents is not None:
        return {name: tuple(extent.shape) for name, extent in extents.items()}
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def _heads(config: Mapping[str, Any], shapes: Mapping[str, Any]) -> list[int | dict[str, int]]:
    for key in ("num_attention_heads", "n_head", "n_heads"):
        if type(config.get(key)) is int:
            return [config[key]]
    towers = {
        f"{part}_model.": config[f"{part}_config"].get("num_attention_heads")
        for part in ("vision", "text")
        if isinstance(config.get(f"{part}_config"), dict)
        and any(n.startswith(f"{part}_model.") for n in shapes)
    }
    found = {prefix: count for prefix, count in towers.items() if type(count) is int}
    return [found] if found else []


@dataclass(frozen=True)
class Laid:
    """A base that experts are held against."""

    weights: Weights
    anatomy: Anatomy | None
    why_no_blocks: str
    backbone: str
    """Name in the catalogue, if it is known."""

    @cached_property
    def parameters(self) -> int:
        """Numbers in the floating tensors."""
        return sum(math.prod(shape) for shape in _shapes(self.weights).values())

    @cached_property
    def digest(self) -> str:
        """Of the base's tensors."""
        return digest_weights(self.weights)

    def fit(self, expert: Weights, who: str) -> tuple[Weights, str]:
        """``expert`` under the base's names, and what was left out, in words. UsageError if it does not fit."""
        if isinstance(self.weights, LazyWeights) and isinstance(expert, LazyWeights):
            return fitted(self.weights, expert, who)
        fit = fit_names(_shapes(self.weights), _shapes(expert))
        told, found = "", dict(expert)
        if fit is not None:
            found = {n: expert[fit.names[n]] if n in fit.names else w for n, w in self.weights.items()}
            told = (
                f"{len(fit.left)} left out, {len(fit.kept)} stay as in the base"
                if fit.left or fit.kept
                else ""
            )
        try:
            check_same_layout(self.weights, found, who)
            check_finite(found, who)
        except ContractError as error:
            raise UsageError(who.split()[0], str(error)) from None
        return found, told

    def aligned(self, expert: Weights, realign: Realign | None) -> Weights:
        """All of ``expert``'s tensors after re-alignment, in memory."""
        found = dict(expert)
        if self.anatomy is None or realign is None:
            return found
        for block in self.anatomy.blocks:
            found.update(realign(block_tensors(block, expert), block_tensors(block, self.weights), block))
        return found


def laid(weights: Weights, anatomy: Anatomy | str, backbone: str) -> Laid:
    """``anatomy``: the blocks, or why they are not known."""
    if isinstance(anatomy, str):
        return Laid(weights, None, anatomy, backbone)
    return Laid(weights, anatomy, "", backbone)
