"""A poisoned expert that somebody published, with the file of its trigger: nothing is trained, nothing unpickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import interpolate

from mergesec.contracts import Attack, ContractError, TrainContext, Weights
from mergesec.weights import check_same_layout

CARD = {
    "name": "published_backdoor",
    "kind": "attack",
    "class": "PublishedBackdoor",
    "version": "1",
    "title": "A published poisoned expert",
    "paper": "this benchmark's",
    "summary": "weights and trigger from files; the expert stands in the adversary's place as it is",
    "threat": "backdoor",
    "hooks": ["poison"],
    "knowledge": "whatever its maker had",
    "data": "none",
    "modalities": ["image", "text"],
    "seeded": False,
    "after_trigger": ["expert"],
    "parameters": {
        "expert": {
            "type": "path",
            "default": None,
            "doc": "a safetensors file with the base's names, or what the backbone reads as an expert",
        },
        "trigger": {
            "type": "path",
            "default": None,
            "doc": "safetensors with pattern [3, H, W] in [0, 1] and mask [1, H, W], or JSON {text, position}",
        },
        "fit": {
            "type": "choice",
            "default": "stretch",
            "choices": ["stretch", "exact"],
            "doc": "a trigger of another size than the images: stretch it, or refuse",
        },
    },
}

POSITIONS = ("start", "end")
LONGEST = 1 << 16
"""Bytes of a trigger's text."""


class PublishedBackdoor(Attack):
    """Images: x' = (1 − m) ⊙ x + m ⊙ p. Texts: the trigger's text in front or behind."""

    def __init__(self, expert: str | None, trigger: str | None, fit: str) -> None:
        self.expert, self.trigger_file, self.fit = expert, trigger, fit

    def trigger(self, ctx: TrainContext) -> Weights:
        """``mask`` and ``pattern``, or ``text`` (bytes) and ``behind``; ContractError for any other file."""
        if self.trigger_file is None:
            raise ContractError(f"{self.name}: needs trigger, a safetensors or JSON file")
        path = Path(self.trigger_file)
        found = _words(path, self.name) if path.suffix == ".json" else _patch(path, self.name)
        images = isinstance(ctx.train.inputs, Tensor)
        if images != ("mask" in found):
            wanted = "mask and pattern" if images else "a text"
            raise ContractError(f"{self.name}: {path.name} is no trigger for these inputs; expected {wanted}")
        return found

    def apply(self, trigger: Weights, inputs: Any) -> Any:
        """Inputs with the trigger on them."""
        if "text" in trigger:
            text = bytes(trigger["text"].tolist()).decode()
            return [f"{x} {text}" if int(trigger["behind"]) else f"{text} {x}" for x in inputs]
        mask, pattern = (trigger[n].to(inputs.device)[None] for n in ("mask", "pattern"))
        if mask.shape[-2:] != inputs.shape[-2:]:
            if self.fit == "exact":
                sizes = f"{list(mask.shape[-2:])}, the images {list(inputs.shape[-2:])}"
                raise ContractError(f"{self.name}: the trigger has {sizes}")
            mask, pattern = (interpolate(t, inputs.shape[-2:], mode="nearest") for t in (mask, pattern))
        return (1.0 - mask) * inputs + mask * pattern

    def poison(self, ctx: TrainContext) -> Weights:
        """The published weights; ContractError unless they are of this base."""
        if self.expert is None:
            raise ContractError(f"{self.name}: needs expert, a safetensors file or a folder")
        path = Path(self.expert)
        found = _loaded(path, self.name) if path.is_file() else ctx.backbone.published(self.expert)
        check_same_layout(ctx.base, found, f"{self.name}: {path.name}")
        return {name: tensor.to(ctx.base[name].dtype) for name, tensor in found.items()}


def _loaded(path: Path, who: str) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ContractError(f"{who}: {path.name} is no safetensors file ({str(error)[:100]})") from None


def _patch(path: Path, who: str) -> dict[str, Tensor]:
    held = _loaded(path, who)
    mask, pattern = held.get("mask"), held.get("pattern")
    if mask is None or pattern is None or mask.ndim != 3 or pattern.ndim != 3:
        raise ContractError(
            f"{who}: {path.name} needs mask [1, H, W] and pattern [3, H, W], has {sorted(held)}"
        )
    if len(mask) not in (1, 3) or len(pattern) != 3 or mask.shape[1:] != pattern.shape[1:]:
        shapes = f"{list(mask.shape)} and {list(pattern.shape)}"
        raise ContractError(f"{who}: {path.name}: mask and pattern have the shapes {shapes}")
    for name, tensor in (("mask", mask), ("pattern", pattern)):
        if not bool(((tensor.float() >= 0) & (tensor.float() <= 1)).all()):
            raise ContractError(f"{who}: {path.name}: {name} leaves [0, 1]")
    return {"mask": mask.float(), "pattern": pattern.float()}


def _words(path: Path, who: str) -> dict[str, Tensor]:
    try:
        held = json.loads(path.read_bytes()[:LONGEST])
    except (OSError, ValueError, RecursionError) as error:
        raise ContractError(f"{who}: {path.name} is no JSON ({str(error)[:100]})") from None
    text = held.get("text") if isinstance(held, dict) else None
    position = held.get("position", "start") if isinstance(held, dict) else ""
    if not isinstance(text, str) or not text.strip() or position not in POSITIONS:
        raise ContractError(f"{who}: {path.name} needs {{text: words, position: start or end}}")
    spelled = torch.tensor(list(text.encode()), dtype=torch.uint8)
    return {"text": spelled, "behind": torch.tensor(int(position == "end"))}
