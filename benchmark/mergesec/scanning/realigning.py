"""Coupled re-alignment of a block at a time, by the attack of that name in the catalogue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergesec.anatomy import Anatomy, AnatomyError, Block, describe
from mergesec.contracts import Attack, Backbone, ContractError, RecoverContext, Weights
from mergesec.planning.catalog import Catalog
from mergesec.scanning.blocks import Realign

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
