"""LoRA adapters in the layout of the peft library, added to a base tensor by tensor: experts published as factors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mergesec.adapterconfig import FACTORS, Lora, read_lora, without_factors
from mergesec.contracts import Weights
from mergesec.errors import UsageError
from mergesec.files import brief
from mergesec.modelfiles import header

PREFIX = "base_model.model."
PARTS = {
    ".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_B.bias": "b", ".lora_magnitude_vector": "m",
    ".lora_magnitude_vector.weight": "m",
}  # fmt: skip
"""Ends of names of an adapted map's tensors: A ``[r, in]``, B ``[out, r]``, a bias ``[out]``, DoRA's lengths ``[out]``."""
BEYOND = frozenset(
    {"pooler", "classifier", "score", "lm_head", "text_model", "text_projection", "visual_projection"}
)
"""Parts of a published network that features may not pass through here: left out where the base has no such part."""


class _Map(NamedTuple):
    """An adapted linear map: its name in the adapted network and in the base, and its tensors."""

    module: str
    target: str
    parts: Mapping[str, Tensor]


Change = Callable[[Tensor], Tensor]
"""A base's tensor -> the adapted one, float32."""


def with_adapter(base: Weights, folder: Path, who: str) -> Weights:
    """``base`` with what peft's ``merge_and_unload`` adds to it, float32 where it does; see ``changes``."""
    return {**base, **{name: change(base[name]) for name, change in changes(base, folder, who).items()}}


def changes(base: Weights, folder: Path, who: str) -> dict[str, Change]:
    """What peft's ``merge_and_unload`` does to tensors of ``base``, by name; Hu et al., 2022.

    W + (α / r) B A for every map (rank-stabilised: α / √r; both may differ by module); PiSSA and OLoRA: from W their
    first product is taken before; DoRA: then every row gets its stored length. Stored biases and ``modules_to_save``
    replace the base's. Parts that the base lacks for a reason (``BEYOND``: classifiers, the text tower of a CLIP) are
    left out. Of ``base`` only names and shapes matter here. UsageError, naming file, option or tensor, for all else.
    """
    lora = read_lora(folder, who)
    stored = _stored(folder, base, who)
    found: dict[str, Change] = {}

    def put(name: str, change: Change) -> None:
        if name in found:
            raise _refused(folder, who, f"two parts of the adapter change '{name}'")
        found[name] = change

    maps = list(_maps(stored, base, folder, who))
    for adapted in maps:
        _check_map(adapted, lora, folder, who)
        put(adapted.target, partial(_merged, found=adapted, lora=lora))
        if "b" in adapted.parts:
            added = lora.scale_of(adapted.module) * adapted.parts["b"]
            put(_bias_of(adapted, base, folder, who), partial(_plus, added=added))
    for name, tensor in stored.items():
        if not _part(name):
            put(_whole(name, tensor, base, lora, folder, who), partial(_instead, kept=tensor))
    _check_complete(maps, base, lora, folder, who)
    return found


def _plus(tensor: Tensor, added: Tensor) -> Tensor:
    return tensor.float() + added


def _instead(tensor: Tensor, kept: Tensor) -> Tensor:
    return kept


def _refused(folder: Path, who: str, message: str, file: str = FACTORS) -> UsageError:
    return UsageError(who, f"{brief(str(folder / file))!r}: {message}")


# --------------------------------------------------------------------------- what is stored


def _stored(folder: Path, base: Weights, who: str) -> dict[str, Tensor]:
    """The adapter's tensors, float32, by name in the adapted network, without parts that the base lacks for a reason."""
    from safetensors import safe_open

    inside = {part for name in base for part in name.split(".")}
    found: dict[str, Tensor] = {}
    names = {n: n.removeprefix(PREFIX) for n in header(folder / FACTORS, who)}
    with safe_open(folder / FACTORS, framework="pt") as opened:
        for name, plain in names.items():
            if not (BEYOND - inside) & set(plain.split(".")):
                found[plain] = opened.get_tensor(name).float()
    if not found:
        raise _refused(folder, who, "nothing in it belongs to the base")
    return found


def _part(name: str) -> str:
    """Which part of an adapted map a tensor is; empty if it is a tensor of the network itself."""
    return next((part for end, part in PARTS.items() if name.endswith(end)), "")


def _maps(stored: Mapping[str, Tensor], base: Weights, folder: Path, who: str) -> Iterator[_Map]:
    """Every adapted map with all its parts."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in stored.items():
        end = next((end for end in PARTS if name.endswith(end)), "")
        if end:
            modules.setdefault(name.removesuffix(end), {})[PARTS[end]] = tensor
        elif "lora_" in name:
            raise _refused(folder, who, f"'{brief(name)}' is not one of two factors of a linear map")
    for module, parts in modules.items():
        if not {"A", "B"} <= parts.keys():
            name = f"{module}.lora_{'A' if 'A' in parts else 'B'}.weight"
            raise _refused(folder, who, f"'{brief(name)}' is not one of two factors of a linear map")
        target = _found(f"{module}.weight", base)
        a, b = parts["A"], parts["B"]
        fits = a.ndim == b.ndim == 2 and len(a) == b.shape[1]
        if target is None or not fits or tuple(base[target].shape) != (b.shape[0], a.shape[1]):
            sides = f"{list(b.shape)} × {list(a.shape)}"
            raise _refused(
                folder, who, f"the base has no linear map for '{brief(module)}.lora_A.weight' ({sides})"
            )
        yield _Map(module, target, parts)


def _check_map(found: _Map, lora: Lora, folder: Path, who: str) -> None:
    """UsageError unless the options say what the factors are."""
    rank, module = len(found.parts["A"]), brief(found.module)
    if not lora.takes(found.module):
        raise _refused(
            folder, who, f"'{module}' has factors, but is none of target_modules: peft leaves it out"
        )
    if rank != lora.rank_of(found.module):
        wanted = lora.rank_of(found.module)
        raise _refused(
            folder, who, f"'{module}' has factors of rank {rank}, by r and rank_pattern it is {wanted}"
        )
    if lora.dora != ("m" in found.parts):
        told = "has no" if lora.dora else "has a"
        raise _refused(
            folder, who, f"'{module}' {told} lora_magnitude_vector, use_dora is {str(lora.dora).lower()}"
        )
    length = found.parts.get("m")
    if length is not None and length.numel() != len(found.parts["B"]):
        raise _refused(folder, who, f"'{module}.lora_magnitude_vector' has the shape {list(length.shape)}")


def _found(name: str, names: Weights) -> str | None:
    """The base's name for an adapter's, which may have been wrapped in a larger model, or be a part of one."""
    fits = [n for n in names if n == name or name.endswith("." + n) or n.endswith("." + name)]
    return max(fits, key=len, default=None)


def _bias_of(found: _Map, base: Weights, folder: Path, who: str) -> str:
    name = found.target.removesuffix("weight") + "bias"
    if name not in base or base[name].shape != found.parts["b"].shape:
        raise _refused(folder, who, f"the base has no bias for '{brief(found.module)}.lora_B.bias'")
    return name


def _whole(name: str, tensor: Tensor, base: Weights, lora: Lora, folder: Path, who: str) -> str:
    """The base's name of a tensor that is stored whole; UsageError unless the options say that it is."""
    inner = name.replace(".base_layer.", ".")
    module = inner.rpartition(".")[0]
    if not (lora.saves(module) or (inner.endswith(".bias") and _biased(module, lora))):
        raise _refused(
            folder,
            who,
            f"holds '{brief(name)}', which neither modules_to_save nor bias names: peft leaves it out",
        )
    target = _found(inner, base)
    if target is None or tensor.shape != base[target].shape:
        raise _refused(folder, who, f"the base has no tensor {list(tensor.shape)} for '{brief(name)}'")
    return target


def _biased(module: str, lora: Lora) -> bool:
    return lora.bias == "all" or (lora.bias == "lora_only" and lora.takes(module))


def _check_complete(maps: Sequence[_Map], base: Weights, lora: Lora, folder: Path, who: str) -> None:
    """UsageError if a map that ``target_modules`` names has no factors: the file is not all of the adapter."""
    held = {found.module: found.target for found in maps}
    module = without_factors(held, {name: tensor.shape for name, tensor in base.items()}, lora)
    if module:
        raise _refused(folder, who, f"no factors for '{brief(module)}', which target_modules names")


# --------------------------------------------------------------------------- what is computed


def _merged(weight: Tensor, found: _Map, lora: Lora) -> Tensor:
    """One map with its factors, as peft merges it."""
    a, b, weight = found.parts["A"], found.parts["B"], weight.float()
    update = lora.scale_of(found.module) * (b @ a)
    start = weight - _first_product(weight, found.module, lora) if lora.start else weight
    changed = start + update
    if lora.dora:  # rows are brought to their stored length
        changed = changed * (found.parts["m"].reshape(-1) / torch.linalg.norm(changed, dim=1))[:, None]
    return changed


def _first_product(weight: Tensor, module: str, lora: Lora) -> Tensor:
    """s · B A as the factors begin, which peft takes out of the base whenever it loads them.

    PiSSA (Meng et al., 2024): the best approximation of W of rank r. OLoRA (Büyükakyüz, 2024): s times the first r
    columns of Q times the first r rows of R, W = Q R.
    """
    rank = lora.rank_of(module)
    if lora.start == "pissa":
        left, values, right = torch.linalg.svd(weight.float(), full_matrices=False)
        product: Tensor = (left[:, :rank] * values[:rank]) @ right[:rank]
    else:
        q, r = torch.linalg.qr(weight.float())
        product = lora.scale_of(module) * (q[:, :rank] @ r[:rank])
    return product
