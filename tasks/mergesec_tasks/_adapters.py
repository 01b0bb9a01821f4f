"""LoRA adapters in the layout of the peft library, added to a base: experts that were published as factors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from torch import Tensor

from mergesec.contracts import ContractError, Weights
from mergesec_tasks._hub import MODEL_FILES, model_folder

CONFIG, FACTORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"
BEYOND = frozenset({"pooler", "classifier", "score", "lm_head", "visual_projection"})
"""Parts of a published network that features do not pass through here."""


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

    A ``[r, in]``, B ``[out, r]``. Whole tensors that the adapter holds (``modules_to_save``) replace the base's, if
    the base has them; classifiers and poolers are left out, as heads are frozen here. FileNotFoundError without
    factors in safetensors; ContractError for other kinds of adapters and for maps that the base does not have.
    """
    from safetensors.torch import load_file

    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    strange = [k for k in ("use_dora", "alpha_pattern") if config.get(k)]
    if config.get("peft_type") != "LORA" or strange:
        kind = f"LoRA with {strange[0]}" if strange else f"of type {config.get('peft_type')!r}"
        raise ContractError(f"{who}: the adapter in '{folder}' is {kind}; plain LoRA is read")
    if not (folder / FACTORS).is_file():
        raise FileNotFoundError(f"{who}: no {FACTORS} in '{folder}' (other formats are not read)")
    stored = {n.removeprefix(PREFIX): t for n, t in load_file(folder / FACTORS).items()}
    weights = dict(base)
    for name, factor in stored.items():
        if name.endswith(A):
            path = name.removesuffix(A)
            target = _found(f"{path}.weight", base)
            if target is None and BEYOND & set(path.split(".")):
                continue
            if target is None or path + B not in stored:
                raise ContractError(
                    f"{who}: the base has no map for '{name}' in '{folder}', or its other factor is missing"
                )
            rank = factor.shape[0]
            scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
            update: Tensor = scale * (stored[path + B].float() @ factor.float())
            if update.shape != base[target].shape:
                raise ContractError(
                    f"{who}: '{name}' in '{folder}' makes an update {list(update.shape)} of '{target}' "
                    f"{list(base[target].shape)}"
                )
            weights[target] = base[target] + update
        elif not name.endswith(B):
            if "lora_" in name:
                raise ContractError(f"{who}: '{name}' in '{folder}' is not a factor of a linear map")
            target = _found(name, base)
            if target is not None and stored[name].shape == base[target].shape:
                weights[target] = stored[name].float()
    return weights


def _found(name: str, names: Iterable[str]) -> str | None:
    """The base's name for an adapter's, which may have been wrapped in a larger model, or be a part of one."""
    fits = [n for n in names if n == name or name.endswith("." + n) or n.endswith("." + name)]
    return max(fits, key=len, default=None)
