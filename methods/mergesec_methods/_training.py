"""The weights of a network in training, under the names of its state dict: for losses that look at them or move them.

Low-rank updates are parametrisations: the tensor that a forward pass uses is then not a parameter, but computed
from the frozen original and the factors. What is called *effective* here is the tensor that is used, with
the gradient flowing to whatever is trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mergesec.contracts import Backbone, Model, Task, Weights


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


class Served(nn.Module):
    """A network together with the task it serves: raw inputs to the task's outputs.

    ``functional_call`` on this module replaces the network's tensors, whatever way the backbone calls it.
    """

    def __init__(self, task: Task, backbone: Backbone, head: Weights, network: nn.Module) -> None:
        super().__init__()
        self.task, self.backbone, self.head, self.network = task, backbone, head, network

    def forward(self, inputs: Any) -> Any:
        return self.task.outputs(Model(self.backbone, self.network), self.head, inputs)


def at_scale(served: Served, base: Weights, scale: float, inputs: Any) -> Any:
    """The task's outputs of the network at ``base + scale · (θ − base)``; gradients flow to θ.

    A tensor θ is replaced by θ + (scale − 1)(θ − base). Where θ is an original plus a low-rank update, adding
    the same to the original does that, and the update itself stays in place.
    """
    network, replaced = served.network, {}
    for parameter, name in trained_names(network).items():
        shift = (scale - 1) * (effective(network, name) - base[name])
        replaced[f"network.{parameter}"] = network.get_parameter(parameter) + shift
    return functional_call(served, replaced, (inputs,))
