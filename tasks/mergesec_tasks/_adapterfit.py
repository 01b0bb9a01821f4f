"""Whether an adapter's factors have the sides of a base's maps, from the headers of both. No torch.

Names differ between releases of transformers, so factors whose map is not found are left to whoever loads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mergesec.adapterconfig import FACTORS
from mergesec.errors import UsageError
from mergesec.files import brief
from mergesec.modelfiles import Stored, header

FIRST, SECOND, PREFIX = ".lora_A.weight", ".lora_B.weight", "base_model.model."


def check_factors(folder: Path, base: Mapping[str, Stored], who: str) -> None:
    """UsageError if a map of the base has other sides than the factors for it: they were made for another base."""
    factors = header(folder / FACTORS, who)
    for name, first in factors.items():
        module = name.removesuffix(FIRST)
        second = factors.get(module + SECOND)
        if module == name or second is None or len(first.shape) != 2 or len(second.shape) != 2:
            continue
        target = _held(f"{module.removeprefix(PREFIX)}.weight", base)
        sides = (second.shape[0], first.shape[1])
        if target and base[target].shape not in (sides, sides[::-1]):  # GPT-2 keeps its maps transposed
            raise UsageError(
                who, f"{brief(str(folder / FACTORS))!r}: the factors of '{brief(module)}' make a map {list(sides)}, the "
                f"base's '{brief(target)}' is {list(base[target].shape)}: an adapter for another base",
            )  # fmt: skip


def _held(name: str, base: Mapping[str, Stored]) -> str:
    """The base's name for an adapter's, which may have been wrapped in a larger model; empty without one."""
    fits = [n for n in base if n == name or name.endswith("." + n) or n.endswith("." + name)]
    return max(fits, key=len, default="")
