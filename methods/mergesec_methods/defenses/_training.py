"""The weights of a network in training, under the names of its state dict: for losses that look at them.

Low-rank updates are parametrisations: the tensor that a forward pass uses is then not a parameter, but computed
from the frozen original and the factors. What is called *effective* here is the tensor that is used, with
the gradient flowing to whatever is trained.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def effective(network: nn.Module, name: str) -> Tensor:
    """The tensor called ``name`` in the state dict of the plain network, as a forward pass uses it now."""
    path, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(network.get_submodule(path), leaf)
    return tensor


def trained_names(network: nn.Module) -> dict[str, str]:
    """Every tensor that training moves: the name of its parameter (of a low-rank update: of the frozen
    original) → its name in the state dict of the plain network."""
    names: dict[str, str] = {}
    for name, parameter in network.named_parameters():
        path, inside, rest = name.rpartition("parametrizations.")
        leaf, _, part = rest.rpartition(".")
        if inside and part == "original":
            names[name] = path + leaf
        elif not inside and parameter.requires_grad:
            names[name] = name
    return names


def squared_norm(network: nn.Module) -> Tensor:
    """Σ ‖θ‖² over all tensors that training moves; a scalar."""
    squares = [effective(network, name).square().sum() for name in trained_names(network).values()]
    return torch.stack(squares).sum()
