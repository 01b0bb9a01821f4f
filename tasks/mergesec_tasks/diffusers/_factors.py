"""LoRA of a denoiser as diffusers saves it (``pytorch_lora_weights.safetensors``), added to the base's weights.

W + (α / r) B A for every map, convolutions too (B is one over single pixels). α is the file's: a tensor ``.alpha``
beside the factors, or ``lora_alpha`` in its metadata; without either it is r. Names are those of peft
(``lora_A``, ``lora_B``) or the older ones (``lora.down``, ``lora.up``), under ``unet.`` or ``transformer.``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from mergesec.contracts import Weights
from mergesec.errors import UsageError
from mergesec.files import brief
from mergesec.modelfiles import header, shown

_NAME = re.compile(
    r"^(?P<part>unet|transformer|text_encoder(?:_\d)?)\.(?P<module>.+?)"
    r"(?:\.lora_(?P<side>[AB])(?:\.\w+)?\.weight|[._]lora\.(?P<old>down|up)\.weight|\.(?P<alpha>alpha))$"
)
_PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)_?$")


class _Factors(NamedTuple):
    """One adapted map: A ``[r, in, …]``, B ``[out, r, …]``, and α if the file has it."""

    first: Tensor
    second: Tensor
    alpha: float | None


def with_factors(base: Weights, file: Path, part: str, who: str) -> Weights:
    """``base`` with the factors of ``file`` added, float32. UsageError, naming file and tensor, for what does not
    belong to it."""
    alphas = _metadata(file, part, who)
    weights = dict(base)
    for module, found in _read(file, part, who).items():
        name = f"{module}.weight"
        rank, out = found.first.shape[0], found.second.shape[0]
        if name not in base:
            raise _refused(file, who, f"'{brief(module)}' is no map of the base: factors for another network")
        wanted = tuple(base[name].shape)
        if (out, *found.first.shape[1:]) != wanted or found.second.shape[1] != rank:
            sides = f"{list(found.second.shape)} × {list(found.first.shape)}"
            raise _refused(
                file, who, f"factors {sides} for '{brief(module)}', which is {list(wanted)} in the base: "
                "factors for another base",
            )  # fmt: skip
        alpha = found.alpha if found.alpha is not None else alphas.get(module, alphas.get("", float(rank)))
        update = (found.second.flatten(1) @ found.first.flatten(1)).view(wanted)
        weights[name] = base[name] + (alpha / rank) * update
    return weights


def _refused(file: Path, who: str, message: str) -> UsageError:
    return UsageError(who, f"{brief(str(file))!r}: {message}")


def _read(file: Path, part: str, who: str) -> dict[str, _Factors]:
    """Every adapted map of the network with its factors."""
    from safetensors import safe_open

    sides: dict[str, dict[str, Tensor]] = {}
    names = header(file, who)
    with safe_open(file, framework="pt") as opened:
        for name in names:
            match = _NAME.match(name)
            if match is None or match["part"] != part:
                told = "changes the text encoder, which is frozen here"
                other = match is not None and match["part"].startswith("text")
                raise _refused(
                    file, who, f"'{brief(name)}' {told if other else f'is no factor of a map of the {part}'}"
                )
            side = "alpha" if match["alpha"] else match["side"] or {"down": "A", "up": "B"}[match["old"]]
            module = _PROCESSOR.sub(lambda m: f".{m[1]}" + ".0" * (m[1] == "to_out"), match["module"])
            sides.setdefault(module, {})[side] = opened.get_tensor(name).float()
    found = {}
    for module, tensors in sides.items():
        if not {"A", "B"} <= tensors.keys() or min(tensors["A"].ndim, tensors["B"].ndim) < 2:
            raise _refused(file, who, f"'{brief(module)}' has not both factors")
        alpha = tensors.get("alpha")
        found[module] = _Factors(tensors["A"], tensors["B"], None if alpha is None else float(alpha))
    return found


def _metadata(file: Path, part: str, who: str) -> dict[str, float]:
    """α by module from the file's metadata, under "" the one of all others; nothing if it tells none."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        text = (opened.metadata() or {}).get("lora_adapter_metadata", "{}")
    try:
        told: Any = json.loads(text)
    except ValueError:
        told = None
    if not isinstance(told, dict):
        raise _refused(file, who, f"its metadata {shown(text)} is no JSON mapping")
    alpha, pattern = told.get(f"{part}.lora_alpha"), told.get(f"{part}.alpha_pattern") or {}
    for option in ("use_dora", "use_rslora"):
        if told.get(f"{part}.{option}"):
            raise _refused(file, who, f"{option} is set: only W + (α / r) B A is read")
    if not isinstance(pattern, dict) or not all(_number(v) for v in pattern.values()):
        raise _refused(file, who, f"alpha_pattern is {shown(pattern)}, expected numbers by module")
    if alpha is not None and not _number(alpha):
        raise _refused(file, who, f"lora_alpha is {shown(alpha)}, expected a number above 0")
    return {**{str(k): float(v) for k, v in pattern.items()}, **({} if alpha is None else {"": float(alpha)})}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e6
