"""A GPU that is none: computes on the CPU, copies what would go to a device, and counts it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

GPU = torch.device("cuda:0")


class StandIn(TorchFunctionMode):  # type: ignore[misc]
    """While it is entered, ``cuda:0`` is the CPU. A tensor sent there is copied, and the memory it lay in counted."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[int] = Counter()
        """By where a tensor's memory begins, how often it was sent."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        own = [_here(a) for a in args]
        named = {n: _here(a) for n, a in (kwargs or {}).items()}
        made = func(*own, **named)
        leaves = any(a is not b for a, b in zip(args, own, strict=True)) or named != dict(kwargs or {})
        if func is Tensor.to and leaves:
            self.sent[args[0].untyped_storage().data_ptr()] += 1
            return made.clone() if made is args[0] else made
        return made


def _here(given: Any) -> Any:
    return torch.device("cpu") if isinstance(given, torch.device) and given.type == "cuda" else given
