"""What enters the scale of every norm: mean squares per feature, gathered by forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mergesec_methods.merging._gram_regression import join


class NormSquares:
    """Mean of x̂² ``[d]`` over the rows that norms scale by γ, y = γ ∘ x̂ + β, while the context is open.

    Keys are names of weights: of every ``nn.LayerNorm`` and ``nn.RMSNorm`` over the last dimension, and of
    modules whose class is called so (``LlamaRMSNorm``). x̂ is what the module itself gives for γ = 1, β = 0.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}
        self._handles: list[Any] = []
        self._busy = False

    def __enter__(self) -> NormSquares:
        for name, module in norms(self.network):
            hook = self._hook(name)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def means(self) -> dict[str, Tensor]:
        """Mean of x̂² ``[d]`` float32 per weight, divided by the number of rows so that tasks count alike."""
        return {name: total / self.rows[name] for name, total in self.sums.items()}

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._busy:  # the module is called once more below
                return
            self._busy = True
            try:
                plain = {n: torch.full_like(p, n == "weight") for n, p in module.named_parameters()}
                scaled = functional_call(module, plain, args, kwargs)
            finally:
                self._busy = False
            flat = scaled.detach().reshape(-1, scaled.shape[-1]).float()
            squares = flat.square().sum(0)
            self.sums[name] = self.sums[name] + squares if name in self.sums else squares
            self.rows[name] = self.rows.get(name, 0) + len(flat)

        return hook


def norms(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name of γ, module) of the norms over the last dimension that have one."""
    for path, module in network.named_modules():
        weight = getattr(module, "weight", None)
        named = isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")
        if named and isinstance(weight, Tensor) and weight.dim() == 1:
            yield join(path, "weight"), module
