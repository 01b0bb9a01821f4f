"""LoRA adapters in the layout of the peft library, added to a base: experts that were published as factors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mergesec.contracts import ContractError, Weights
from mergesec_tasks._hub import MODEL_FILES, model_folder

CONFIG, FACTORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"
BEYOND = frozenset(
    {"pooler", "classifier", "score", "lm_head", "text_model", "text_projection", "visual_projection"}
)
"""Parts of a published network that features may not pass through here: left out where the base has no such part."""


def expert_weights(
    source: str, who: str, base: Callable[[], Weights], read: Callable[[Path], Weights],
    patterns: Sequence[str] = MODEL_FILES,
) -> Weights:  # fmt: skip
    """A published expert: what ``read`` finds in ``source`` (a local place, or the hub at a commit), or ``base`` with
    the adapter that lies there."""
    place = model_folder(source, "expert", patterns)
    return with_adapter(base(), place, who) if (place / CONFIG).is_file() else read(place)


def with_adapter(base: Weights, folder: Path, who: str) -> Weights:
    """``base`` with W + (α / r) B A for every map of the adapter (rank-stabilised: α / √r), float32; Hu et al., 2022.

    A ``[r, in]``, B ``[out, r]``. Whole tensors that the adapter holds (``modules_to_save``) replace the base's.
    Parts that the base lacks for a reason (``BEYOND``: classifiers, the text tower of a CLIP) are left out.
    FileNotFoundError without factors in safetensors; ContractError for other kinds of adapters and for what fits
    nothing in the base.
    """
    config = _config(folder, who)
    stored = _stored(folder, base, who)
    weights = dict(base)
    for name, tensor in stored.items():
        if name.endswith(B):
            continue
        target, update = _found(name.replace(A, ".weight"), base), tensor.float()
        if name.endswith(A):
            rank = len(tensor)
            scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
            update = scale * (stored[name.replace(A, B)].float() @ update)
        if target is None or update.shape != base[target].shape:
            raise ContractError(
                f"{who}: the base has no tensor {list(update.shape)} for '{name}' in '{folder}'"
            )
        if weights[target] is not base[target]:
            raise ContractError(f"{who}: two parts of the adapter in '{folder}' change '{target}'")
        weights[target] = base[target] + update if name.endswith(A) else update
    return weights


def _config(folder: Path, who: str) -> dict[str, Any]:
    """What the adapter says of itself; ContractError unless it is plain LoRA."""
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ContractError(f"{who}: {CONFIG} in '{folder}' is no JSON ({error})") from None
    strange = [f"LoRA with {k}" for k in ("use_dora", "alpha_pattern") if config.get(k)]
    if config.get("peft_type") != "LORA" or strange:
        kind = strange[0] if strange else f"of type {config.get('peft_type')!r}"
        raise ContractError(f"{who}: the adapter in '{folder}' is {kind}; plain LoRA is read")
    if not isinstance(config.get("lora_alpha"), (int, float)):
        raise ContractError(f"{who}: {CONFIG} in '{folder}' has no number lora_alpha")
    return config


def _stored(folder: Path, base: Weights, who: str) -> dict[str, Tensor]:
    """The adapter's tensors by name in the adapted network, without parts that the base lacks for a reason."""
    from safetensors.torch import load_file

    if not (folder / FACTORS).is_file():
        raise FileNotFoundError(f"{who}: no {FACTORS} in '{folder}' (other formats are not read)")
    inside = {part for name in base for part in name.split(".")}
    named = {n.removeprefix(PREFIX): t for n, t in load_file(folder / FACTORS).items()}
    stored = {n: t for n, t in named.items() if not (BEYOND - inside) & set(n.split("."))}
    for name in stored:
        pair = {A: name.replace(A, B), B: name.replace(B, A)}.get(name[-len(A) :])
        if "lora_" in name and pair not in stored:
            raise ContractError(f"{who}: '{name}' in '{folder}' is not one of two factors of a linear map")
    return stored


def _found(name: str, names: Iterable[str]) -> str | None:
    """The base's name for an adapter's, which may have been wrapped in a larger model, or be a part of one."""
    fits = [n for n in names if n == name or name.endswith("." + n) or n.endswith("." + name)]
    return max(fits, key=len, default=None)
