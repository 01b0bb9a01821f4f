"""How a worker computes: the same numbers at every run, and float32 that is float32. Told on the record."""

from __future__ import annotations

import os

import torch


def settle(device: torch.device) -> None:
    """Deterministic algorithms where there are any (others warn), no TF32, no choice of algorithms by timing.

    Lower precision is a recipe's to ask for (``recipe.precision``), never a device's to choose.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    if device.type == "mps":
        os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what it lacks is done on the CPU


def told(device: torch.device) -> str:
    """The device, and where it has a choice, how it computes float32."""
    if device.type == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "Apple GPU"
    exact = torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
    parts = [
        "float32" if exact else "TF32",
        *(["deterministic"] if torch.are_deterministic_algorithms_enabled() else []),
    ]
    return f"{name} ({', '.join(parts)})"
