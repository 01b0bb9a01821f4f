"""Which safetensors files hold a model's weights, by the rules of the transformers library; what else is refused."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergesec.adapterconfig import FACTORS, is_adapter
from mergesec.adapters import changes
from mergesec.errors import UsageError
from mergesec.files import brief, is_file, is_folder, plain
from mergesec.streaming.mapped import Changed, Extent, LazyWeights, read_file
from mergesec.streaming.meaning import check_config, check_tensors

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
LONGEST = 64 << 20
"""Bytes of an index or a config: an index of a million tensors has as many."""

DEEPEST = 40
"""Levels of values within values there."""


def open_weights(path: Path, field: str) -> LazyWeights:
    """A safetensors file, an index of such files, or a folder as transformers reads it.

    UsageError naming ``field`` if there is none, it is damaged, it is a pickle, or what it holds is no network's
    weights: an adapter's factors, or codes of quantised weights.
    """
    if path.suffix.lower() in PICKLES:
        raise UsageError(
            field, f"{path} is a pickle, which can run code when read; convert it to safetensors"
        )
    if not is_file(path) and not is_folder(path):
        raise UsageError(field, f"no file or folder {brief(str(path))!r}")
    folder = path if is_folder(path) else path.parent
    config = _config(folder, field)
    check_config(folder, config, field)
    weights = _read_folder(folder, config, field) if folder is path else _read(path, field)
    if not weights:
        raise UsageError(field, f"{path} holds no tensors")
    check_tensors(weights, field)
    return LazyWeights(weights.extents, weights.metadata, config)


def open_expert(path: Path, base: LazyWeights, field: str) -> LazyWeights:
    """What ``open_weights`` opens, or ``base`` with the adapter in a folder, whose maps are made when they are read."""
    folder = path.parent if path.name == FACTORS else path
    if not is_adapter(folder, field):
        return open_weights(path, field)
    extents = dict(base.extents)
    for name, change in changes(base, folder, field).items():
        extents[name] = Changed.of(extents[name], change)
    return LazyWeights(extents, base.metadata, base.config)


def _read(path: Path, field: str) -> LazyWeights:
    return _read_index(path, field) if path.name.endswith(".index.json") else read_file(path, field)


def _read_folder(folder: Path, config: Mapping[str, Any], field: str) -> LazyWeights:
    """What ``from_pretrained`` of transformers loads: the file that config.json names, the single file, the index.

    A folder without any of these may hold one safetensors file of another name.
    """
    named = config.get("transformers_weights")
    if named is not None:
        return _read(_beside(folder / CONFIG, named, "transformers_weights", field), field)
    single, index = folder / SINGLE, folder / INDEX
    if is_file(single):
        weights = read_file(single, field)
        if is_file(index):
            _check_same(single, weights, index, field)
        return weights
    if is_file(index):
        return _read_index(index, field)
    files = sorted(folder.iterdir())
    alone = [file for file in files if file.suffix == ".safetensors" and is_file(file)]
    pickles = [file for file in files if file.suffix in PICKLES]
    if len(alone) == 1 and not pickles:
        return read_file(alone[0], field)
    if pickles and not alone:
        raise UsageError(
            field, f"{folder} holds only pickles, which can run code; convert them to safetensors"
        )
    choice = f"; name the file: {', '.join(brief(file.name) for file in alone[:5])}" if alone else ""
    raise UsageError(field, f"{folder} has neither {SINGLE} nor {INDEX}{choice}")


def _check_same(single: Path, weights: LazyWeights, index: Path, field: str) -> None:
    """UsageError unless the index and its shards hold what the single file holds, byte for byte."""
    try:
        other = _read_index(index, field)
        differs = _difference(weights, other)
    except UsageError as error:
        differs = error.message
    if differs:
        raise UsageError(
            field,
            f"{single.parent} holds {SINGLE}, which transformers loads, and {INDEX}, which does not agree with it "
            f"({differs}); name the one that is meant, or remove the other",
        )


def _difference(one: LazyWeights, other: LazyWeights) -> str:
    """The first tensor in which two sets of files differ, in words; empty if in none."""
    for name in sorted({*one, *other}):
        if name not in one or name not in other:
            return f"tensor {name!r} is in one of them only"
        a, b = one.extents[name], other.extents[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape) or not torch.equal(_raw(a), _raw(b)):
            return f"tensor {name!r} differs"
    return ""


def _raw(extent: Extent) -> Tensor:
    return extent.read().reshape(-1).view(torch.uint8)


# --------------------------------------------------------------------------- JSON beside the tensors


def _read_index(path: Path, field: str) -> LazyWeights:
    """The shards that an index names, which hold the tensors that it lists, and no others."""
    listed = _json(path, field).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(shard, str) for shard in listed.values()):
        raise UsageError(
            field,
            f"{path} is not an index of safetensors files: weight_map must map names of tensors to names of files",
        )
    extents: dict[str, Extent] = {}
    metadata: dict[str, str] = {}
    for shard in sorted(set(listed.values())):
        file = _beside(path, shard, "weight_map", field)
        part = read_file(file, field)
        metadata.update(part.metadata)
        strange = [name for name in part if listed.get(name) != shard]
        if strange:
            raise UsageError(field, f"{file}: tensor {brief(strange[0])!r} does not lie here by {path.name}")
        extents.update(part.extents)
    lost = [name for name in listed if name not in extents]
    if lost:
        raise UsageError(
            field, f"{path.parent / listed[lost[0]]}: tensor {brief(lost[0])!r} of the index is missing"
        )
    return LazyWeights(extents, metadata)


def _beside(source: Path, name: Any, key: str, field: str) -> Path:
    """The file that ``source`` names under ``key``: beside it, and not a place elsewhere or another index's index."""
    ends = (".safetensors",) if source.name != CONFIG else (".safetensors", ".safetensors.index.json")
    if not isinstance(name, str) or Path(name).name != name or plain(name) != name or not name.endswith(ends):
        raise UsageError(
            field,
            f"{source}: {key} names {brief(str(name))!r}; expected a .safetensors file's name, without folders",
        )
    if not is_file(source.parent / name):
        raise UsageError(field, f"{source} names a file {brief(name)!r} that is not beside it")
    return source.parent / name


def _config(folder: Path, field: str) -> Mapping[str, Any]:
    path = folder / CONFIG
    return _json(path, field) if path.exists() or path.is_symlink() else {}


def _json(path: Path, field: str) -> dict[str, Any]:
    """The mapping in a JSON file. UsageError for anything else, for names given twice, and for endless files."""
    try:
        if not is_file(path) or path.stat().st_size > LONGEST:
            raise ValueError(f"not a file of at most {LONGEST >> 20} MiB")
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
        if _deeper(found, DEEPEST):
            raise ValueError(f"nested more than {DEEPEST} levels deep")
    except (ValueError, RecursionError, OSError) as error:
        raise UsageError(field, f"{path} cannot be read as JSON ({brief(str(error))})") from None
    if not isinstance(found, dict):
        raise UsageError(field, f"{path} is not a mapping of fields")
    return found


def _deeper(value: Any, most: int) -> bool:
    """Whether a value is nested more than ``most`` levels deep."""
    level = [value]
    for _ in range(most):
        level = [
            inner
            for v in level
            if isinstance(v, (dict, list))
            for inner in (v.values() if isinstance(v, dict) else v)
        ]
    return any(isinstance(v, (dict, list)) for v in level)


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is given twice")
        found[name] = value
    return found
