"""Which maps a LoRA of diffusers adapts, by names and shapes alone; no torch, since a grid's plan looks at it, too."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergesec.errors import UsageError
from mergesec.files import brief
from mergesec.modelfiles import header, shown

_NAME = re.compile(
    r"^(?P<part>unet|transformer|text_encoder(?:_\d)?)\.(?P<module>.+?)"
    r"(?:\.lora_(?P<side>[AB])(?:\.\w+)?\.weight|[._]lora\.(?P<old>down|up)\.weight|\.(?P<alpha>alpha))$"
)
_PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)_?$")


def refused(file: Path, who: str, message: str) -> UsageError:
    """A complaint that names the file."""
    return UsageError(who, f"{brief(str(file))!r}: {message}")


def places(file: Path, base: Mapping[str, tuple[int, ...]], part: str, who: str) -> dict[str, dict[str, str]]:
    """The stored names of A, B and ``alpha`` of every adapted map. UsageError, naming file and tensor, unless the map
    is one of the base (name to shape) and its factors fit it."""
    stored = header(file, who)
    found: dict[str, dict[str, str]] = {}
    for name in stored:
        match = _NAME.match(name)
        if match is None or match["part"] != part:
            texts = match is not None and match["part"].startswith("text")
            told = "changes the text encoder, which is frozen here"
            raise refused(
                file, who, f"'{brief(name)}' {told if texts else f'is no factor of a map of the {part}'}"
            )
        side = "alpha" if match["alpha"] else match["side"] or {"down": "A", "up": "B"}[match["old"]]
        module = _PROCESSOR.sub(lambda m: f".{m[1]}" + ".0" * (m[1] == "to_out"), match["module"])
        found.setdefault(module, {})[side] = name
    for module, sides in found.items():
        if not {"A", "B"} <= sides.keys():
            raise refused(file, who, f"'{brief(module)}' has not both factors")
        first, second = (stored[sides[side]].shape for side in "AB")
        wanted = base.get(f"{module}.weight")
        if wanted is None:
            raise refused(file, who, f"'{brief(module)}' is no map of the base: factors for another network")
        fits = len(first) > 1 and len(second) > 1 and second[1] == first[0]
        if not fits or (second[0], *first[1:]) != wanted:
            raise refused(
                file, who, f"factors {list(second)} × {list(first)} for '{brief(module)}', which is {list(wanted)} in "
                "the base: factors for another base",
            )  # fmt: skip
    return found


def alphas(file: Path, part: str, who: str) -> dict[str, float]:
    """α by module from the file's metadata, under "" the one of all others; nothing if it tells none."""
    from safetensors import safe_open

    with safe_open(file, framework="np") as opened:
        text = (opened.metadata() or {}).get("lora_adapter_metadata", "{}")
    try:
        told: Any = json.loads(text)
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise refused(file, who, f"its metadata {shown(text)} is no JSON mapping")
    alpha, pattern = told.get(f"{part}.lora_alpha"), told.get(f"{part}.alpha_pattern") or {}
    for option in ("use_dora", "use_rslora"):
        if told.get(f"{part}.{option}"):
            raise refused(file, who, f"{option} is set: only W + (α / r) B A is read")
    if not isinstance(pattern, dict) or not all(_number(v) for v in pattern.values()):
        raise refused(file, who, f"alpha_pattern is {shown(pattern)}, expected numbers by module")
    if alpha is not None and not _number(alpha):
        raise refused(file, who, f"lora_alpha is {shown(alpha)}, expected a number above 0")
    return {**{str(k): float(v) for k, v in pattern.items()}, **({} if alpha is None else {"": float(alpha)})}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e6
