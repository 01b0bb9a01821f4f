"""Arithmetic on named tensors: read-only mappings, task vectors, flat views, digests, checks.

Everything here is a pure function: what comes in is never written to. Sums run in float32 whatever
the storage type, and results come back in the base's type. Only floating tensors are merged;
integer buffers (position ids, counters) keep the base's value.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mergesec.contracts import ContractError, Weights

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Element types by the name that safetensors files have for them."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_only(weights: Mapping[str, Tensor]) -> Weights:
    """A mapping that refuses assignment. The names are copied, so later edits of the source do not show."""
    return MappingProxyType(dict(weights))


class Outline(Protocol):
    """What is known of a tensor without its entries."""

    @property
    def shape(self) -> Sequence[int]:
        """Length of each side."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the entries."""


def outlines(weights: Weights) -> Mapping[str, Outline]:
    """Shapes and types by name; of weights that are read lazily from files without reading any."""
    found: Mapping[str, Outline] = getattr(weights, "extents", weights)
    return found


def mergeable(tensor: Outline) -> bool:
    """Whether a tensor takes part in merging: floating types do, integer and boolean buffers do not."""
    return tensor.dtype.is_floating_point


# --------------------------------------------------------------------------- checks


def check_same_layout(base: Weights, expert: Weights, who: str = "expert") -> None:
    """Raise ContractError, naming the tensor, unless ``expert`` has the names and shapes of ``base``."""
    ours, theirs = outlines(base), outlines(expert)
    for name in ours:
        if name not in theirs:
            raise ContractError(f"{who}: tensor '{name}' of the base is missing")
    for name, tensor in theirs.items():
        own = ours.get(name)
        if own is None:
            raise ContractError(f"{who}: tensor '{name}' is not in the base")
        if tensor.shape != own.shape:
            raise ContractError(
                f"{who}: tensor '{name}' has shape {list(tensor.shape)}, the base has {list(own.shape)}"
            )
        if mergeable(tensor) != mergeable(own):
            raise ContractError(f"{who}: tensor '{name}' is {tensor.dtype}, the base has {own.dtype}")


def check_finite(weights: Weights, who: str = "weights") -> None:
    """Raise ContractError, naming the tensor, if any floating tensor holds NaN or infinity."""
    for name, tensor in weights.items():
        if mergeable(tensor) and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise ContractError(f"{who}: tensor '{name}' holds {bad} non-finite values of {tensor.numel()}")


# --------------------------------------------------------------------------- names of published weights

OUTPUTS = frozenset(
    {
        "pooler", "classifier", "pre_classifier", "cls_classifier", "distillation_classifier", "score", "cls",
        "qa_outputs", "lm_head", "vocab_projector", "vocab_transform", "vocab_layer_norm",
        "text_model", "text_projection", "visual_projection", "logit_scale",
    }
)  # fmt: skip
"""Parts of published networks that belong to a task, not to the body, or to the other side of a CLIP: two of one
body may differ in them."""
COMPUTED = ("position_ids", "rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Ends of names of tensors that follow from a config: some releases of transformers store them, others do not."""
LEGACY = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
"""Names that transformers still reads, and what it calls them."""


class Fit(NamedTuple):
    """How the names of one network are found in another that has the same body."""

    names: Mapping[str, str]
    """A name of the base, and what the other calls it."""
    kept: list[str]
    """Of the base only: parts of its task, or computed."""
    left: list[str]
    """Of the other only."""


def fit_names(base: Mapping[str, tuple[int, ...]], other: Mapping[str, tuple[int, ...]]) -> Fit | None:
    """``other`` seen with the names of ``base`` (names to shapes), by the rules by which transformers loads a body.

    A body may stand alone in one of them and under a prefix (``vit.``, ``bert.``, ``model.``) in the other, which
    then has parts beside it; else only ``OUTPUTS`` may differ, and ``COMPUTED`` anywhere. None if they do not fit.
    """
    if base == other:
        return Fit({name: name for name in base}, [], [])
    ours, theirs = {_modern(n): n for n in base}, {_modern(n): n for n in other}
    if len(ours) < len(base) or len(theirs) < len(other):
        return None
    body = [n for n in ours if not _beside_body(n)]
    if all(n in theirs for n in body):
        return _fit(ours, theirs, base, other, "", "")
    inner = [n for n in theirs if not _beside_body(n)]
    deeper, higher = _prefixes(body, theirs), _prefixes(inner, ours)
    if len(deeper) + len(higher) != 1:
        return None
    return _fit(ours, theirs, base, other, "".join(deeper), "".join(higher))


def _modern(name: str) -> str:
    old = next((end for end in LEGACY if name.endswith(end)), "")
    return name.removesuffix(old) + LEGACY[old] if old else name


def _beside_body(name: str) -> bool:
    """Whether a part belongs to a task or is computed. The last map of a language model is neither: where it is
    missing, the embeddings stand in for it."""
    if name.endswith("lm_head.weight"):
        return False
    return name.endswith(COMPUTED) or not OUTPUTS.isdisjoint(name.split("."))


def _prefixes(body: Sequence[str], names: Iterable[str]) -> list[str]:
    """Every ``prefix.`` under which all of ``body`` stands in ``names``."""
    held = set(names)
    if not body:
        return []
    found = [n.removesuffix(body[0]) for n in held if n.endswith("." + body[0])]
    return [prefix for prefix in found if all(prefix + n in held for n in body)]


def _fit(
    ours: Mapping[str, str], theirs: Mapping[str, str],
    base: Mapping[str, tuple[int, ...]], other: Mapping[str, tuple[int, ...]], deeper: str, higher: str,
) -> Fit | None:  # fmt: skip
    """The fit where a name of the base is the other's without ``higher`` in front and with ``deeper`` there."""
    names: dict[str, str] = {}
    for name, own in ours.items():
        found = theirs.get(deeper + name.removeprefix(higher)) if name.startswith(higher) else None
        if found is not None and (base[own] == other[found] or not _beside_body(name)):
            names[own] = found
    taken = set(names.values())
    kept, left = [n for n in base if n not in names], [n for n in other if n not in taken]
    missed = [n for n in kept if not _may_lack(n, higher)] + [n for n in left if not _may_lack(n, deeper)]
    return None if missed else Fit(names, kept, left)


def _may_lack(name: str, prefix: str) -> bool:
    """Whether the other side need not have a part: it stands beside the body, which the other side has alone."""
    return bool(prefix and not name.startswith(prefix)) or _beside_body(_modern(name))


# --------------------------------------------------------------------------- task vectors, flat views


def task_vector(base: Weights, weights: Weights) -> dict[str, Tensor]:
    """τ = θ − θ0 per floating tensor, float32. Integer buffers are left out."""
    check_same_layout(base, weights)
    return {n: weights[n].float() - base[n].float() for n in sorted(base) if mergeable(base[n])}


@dataclass(frozen=True)
class FlatLayout:
    """Where each floating tensor lies in one float32 vector: name order is the sorted one.

    ``spans[name] = (start, stop)``. Names that share one tensor (tied weights) have one span, owned
    by the first of them; ``tied[other] = owner``.
    """

    spans: Mapping[str, tuple[int, int]]
    tied: Mapping[str, str]
    size: int


def owners(base: Weights) -> dict[str, str]:
    """``{name: owner}`` of tied floating tensors: the first name, sorted, that views the same memory.

    Weights read lazily from files have no ties: each read makes its own memory.
    """
    if getattr(base, "lazy", False):
        return {}
    tied: dict[str, str] = {}
    seen: dict[int, list[str]] = {}
    for name in sorted(base):
        tensor = base[name]
        if mergeable(tensor) and tensor.numel():
            begin = seen.setdefault(tensor.data_ptr(), [])
            owner = next((other for other in begin if _view(base[other]) == _view(tensor)), None)
            if owner is None:
                begin.append(name)
            else:
                tied[name] = owner
    return tied


def _view(tensor: Tensor) -> tuple[object, ...]:
    """How a tensor sees the memory at its first entry."""
    return tensor.device, tuple(tensor.shape), tensor.stride(), tensor.dtype


def flat_layout(base: Weights) -> FlatLayout:
    """The layout of ``base``. Two names are tied if they view the same memory in the same way."""
    tied = owners(base)
    spans: dict[str, tuple[int, int]] = {}
    position = 0
    for name, tensor in sorted(outlines(base).items()):
        if mergeable(tensor) and name not in tied:
            spans[name] = (position, position + math.prod(tensor.shape))
            position = spans[name][1]
    return FlatLayout(MappingProxyType(spans), MappingProxyType(tied), position)


def _check_ties(layout: FlatLayout, weights: Weights, who: str) -> None:
    for name, owner in layout.tied.items():
        if not torch.equal(weights[name], weights[owner]):
            raise ContractError(f"{who}: '{name}' and '{owner}' are tied in the base but differ here")


def zeros_flat(layout: FlatLayout, base: Weights) -> Tensor:
    """A zero vector ``[layout.size]``, float32, on the base's device."""
    device = next((t.device for t in base.values()), torch.device("cpu"))
    return torch.zeros(layout.size, dtype=torch.float32, device=device)


def flatten(layout: FlatLayout, weights: Weights) -> Tensor:
    """``weights`` as one float32 vector ``[layout.size]`` (a copy)."""
    _check_ties(layout, weights, "weights")
    flat = zeros_flat(layout, weights)
    for name, (start, stop) in layout.spans.items():
        flat[start:stop] = weights[name].reshape(-1)
    return flat


def add_task_vector(
    flat: Tensor, layout: FlatLayout, base: Weights, weights: Weights, coefficient: float = 1.0
) -> Tensor:
    """``flat += coefficient · (weights − base)``, tensor by tensor, so that no second vector is needed.

    ``flat`` is the caller's own accumulator; it is changed and returned.
    """
    check_same_layout(base, weights)
    _check_ties(layout, weights, "expert")
    for name, (start, stop) in layout.spans.items():
        delta = torch.sub(weights[name].to(flat.device).float(), base[name].to(flat.device).float())
        flat[start:stop].add_(delta.reshape(-1), alpha=coefficient)
    return flat


def apply_flat(
    layout: FlatLayout, base: Weights, delta: Tensor, coefficient: float = 1.0
) -> dict[str, Tensor]:
    """``base + coefficient · delta`` in the base's names, shapes and types; ``delta`` is ``[layout.size]``.

    Computed in float32 and rounded once. Integer tensors are the base's; tied names get one tensor.
    """
    if delta.shape != (layout.size,):
        raise ContractError(f"flat vector has shape {list(delta.shape)}, the layout needs [{layout.size}]")
    moved: dict[str, Tensor] = {}
    for name, (start, stop) in layout.spans.items():
        tensor = base[name]
        change = delta[start:stop].view(tensor.shape).to(tensor.device)
        moved[name] = torch.add(tensor.float(), change, alpha=coefficient).to(tensor.dtype)
    return {name: moved.get(layout.tied.get(name, name), tensor) for name, tensor in base.items()}


# --------------------------------------------------------------------------- digests


def _raw(tensor: Tensor) -> bytes:
    """The bytes of a tensor in row-major order, whatever its type (bfloat16 included)."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy().data) if flat.numel() else b""


def digest_tensor(name: str, tensor: Tensor) -> str:
    """sha256 over name, type, shape and bytes; strides and device do not enter."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    shape = ",".join(str(size) for size in tensor.shape)
    digest = hashlib.sha256(f"{len(name)}:{name};{dtype};[{shape}];".encode())
    digest.update(_raw(tensor))
    return digest.hexdigest()


def digest_weights(weights: Weights) -> str:
    """One sha256 for a set of named tensors; the order of the names does not enter."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{len(name)}:{name}={digest_tensor(name, weights[name])};".encode())
    return digest.hexdigest()
