"""Batches of raw inputs as bytes: what goes to a guest's network or trigger, and what comes back."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from mergesec.contracts import ContractError
from mergesec.generation import Request
from mergesec.text import pack_strings, unpack_strings


def to_bytes(inputs: Any) -> bytes:
    """A tensor, a list of strings, or a request to generate. ContractError for anything else."""
    if isinstance(inputs, Tensor):
        return save_tensors({"inputs": _plain(inputs)})
    if type(inputs) is Request:  # training happens inside a guest: no noised batch travels
        parts = {"conditions": inputs.conditions, "noise": inputs.noise, "images": inputs.images}
        return save_tensors({name: _plain(tensor) for name, tensor in parts.items()})
    if isinstance(inputs, list) and all(isinstance(text, str) for text in inputs):
        letters, offsets = pack_strings(inputs)
        return save_tensors({"letters": letters, "offsets": offsets})
    raise ContractError(f"{type(inputs).__name__} is no batch: a tensor, a list of strings or a request")


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()


def from_bytes(blob: bytes, device: torch.device) -> Any:
    """The batch that ``to_bytes`` wrote, on ``device``. ContractError if it is none."""
    try:
        found = load_tensors(blob)
        if found.keys() == {"inputs"}:
            return found["inputs"].clone().to(device)
        if "noise" in found:
            return Request(*(found[name].clone().to(device) for name in ("conditions", "noise", "images")))
        return unpack_strings(found["letters"], found["offsets"])
    except (SafetensorError, KeyError, ValueError, RuntimeError, IndexError) as error:
        raise ContractError(f"what came back is no batch ({error})") from None
