"""Files of a model folder, looked at before any of them is trusted: JSON, headers of safetensors, pickles refused.

No torch: a grid's plan looks at folders, too. Every complaint is a UsageError of ``who``, a grid's field or a backbone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mergesec.errors import UsageError
from mergesec.files import brief, is_file, is_folder, plain

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
LONGEST = 64 << 20
"""Bytes of a JSON file: a tokenizer of a million words has as many."""
FLOATS = ("F64", "F32", "F16", "BF16")
COMPUTED = re.compile(r"(^|\.)(position_ids|inv_freq|masked_bias|attn\.bias)$")
"""Names of tensors that follow from a config: some releases of transformers store them, others do not."""
LETTERS, SIDES = 500, 16
"""What a tensor's name and shape have at most."""


class Stored(NamedTuple):
    """A tensor of a file, known by its header."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class Placed(NamedTuple):
    """The beginning of a safetensors file, and where each tensor begins after it."""

    head: bytes
    starts: Mapping[str, int]
    size: int
    """Bytes of all tensors."""


def placed(
    tensors: Iterable[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str] | None = None
) -> Placed:
    """A safetensors file of tensors (name, type, shape, bytes) that lie one behind the other, in this order."""
    listed: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    starts, position = {}, 0
    for name, dtype, shape, size in tensors:
        starts[name], end = position, position + size
        listed[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(listed, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return Placed(len(text).to_bytes(8, "little") + text, starts, position)


def read_json(path: Path, who: str) -> dict[str, Any]:
    """The mapping in a JSON file. UsageError for anything else, names given twice, NaN, and endless files."""
    if not is_file(path):
        raise UsageError(who, f"no {path.name} in {brief(str(path.parent))!r}")
    try:
        if path.stat().st_size > LONGEST:
            raise ValueError(f"longer than {LONGEST >> 20} MiB")
        text = path.read_text(encoding="utf-8")
        found = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError, MemoryError, OSError) as error:
        reason = brief(str(error)) or type(error).__name__
        raise UsageError(who, f"{brief(str(path))!r} is no JSON that can be read ({reason})") from None
    if not isinstance(found, dict):
        raise UsageError(
            who, f"{brief(str(path))!r} is not a mapping of fields, but a {type(found).__name__}"
        )
    return found


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is given twice")
        found[name] = value
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def shown(value: Any) -> str:
    """A value of somebody's file, for a message."""
    return brief(repr(value), 80)


def header(path: Path, who: str) -> dict[str, Stored]:
    """The tensors of a safetensors file by name. UsageError unless it is whole and holds weights that can be read."""
    from safetensors import SafetensorError, safe_open

    if not is_file(path):
        raise UsageError(who, f"no file {brief(str(path))!r}")
    try:
        with safe_open(path, framework="np") as stored:
            slices = [(name, stored.get_slice(name)) for name in stored.keys()]  # noqa: SIM118  (not a mapping)
            found = {n: Stored(path, str(s.get_dtype()), tuple(s.get_shape())) for n, s in slices}
    except (SafetensorError, ValueError, OSError, MemoryError, OverflowError) as error:
        reason = brief(str(error).removeprefix("Error while deserializing header: ")) or "unreadable"
        raise UsageError(who, f"{brief(str(path))!r} is not a whole safetensors file ({reason})") from None
    if not found:
        raise UsageError(who, f"{brief(str(path))!r} holds no tensors")
    for name, tensor in found.items():
        if reason := _strange(name, tensor):
            raise UsageError(who, f"{brief(str(path))!r}: tensor {brief(name)!r} {reason}")
    return found


def _strange(name: str, tensor: Stored) -> str:
    """Why a tensor is not weights; empty if it is."""
    if plain(name) != name or not 0 < len(name) <= LETTERS:
        return f"has a name that is empty, cannot be printed or is longer than {LETTERS} characters"
    if len(tensor.shape) > SIDES or 0 in tensor.shape:
        return f"has the shape {brief(str(list(tensor.shape)))}"
    if tensor.dtype not in FLOATS and not COMPUTED.search(name):
        return (
            f"has type {tensor.dtype}: codes of quantised weights are not read; expected {', '.join(FLOATS)} "
            "(transformers: from_pretrained, dequantize, save_pretrained)"
        )
    return ""


def weight_files(folder: Path, who: str) -> list[Path]:
    """The files that transformers loads from a folder: the single one, or the shards of the index. UsageError if
    both are there (one of them is stale), or none."""
    single, index = folder / SINGLE, folder / INDEX
    if is_file(single) and is_file(index):
        raise UsageError(
            who,
            f"{brief(str(folder))!r} holds {SINGLE}, which transformers loads, and {INDEX}; remove the one "
            "that is not meant",
        )
    if is_file(single):
        return [single]
    if is_file(index):
        return sorted({index.parent / shard for shard in _shards(index, who).values()})
    pickles = is_folder(folder) and any(p.suffix.lower() in PICKLES for p in folder.iterdir())
    told = "; only pickles, which can run code when read: convert them" if pickles else ""
    raise UsageError(who, f"no safetensors file {SINGLE} or {INDEX} in {brief(str(folder))!r}{told}")


def _shards(index: Path, who: str) -> Mapping[str, str]:
    """Names of tensors to files beside the index."""
    listed = read_json(index, who).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise UsageError(
            who, f"{brief(str(index))!r}: weight_map {shown(listed)} does not map names of tensors to files"
        )
    for name, shard in listed.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]{1,200}\.safetensors", shard):
            raise UsageError(
                who,
                f"{brief(str(index))!r}: weight_map names {shown(shard)} for {brief(name)!r}; expected the name of a "
                ".safetensors file beside it",
            )
    return listed


def stored_tensors(folder: Path, who: str) -> dict[str, Stored]:
    """All tensors that transformers loads from a folder, by name; UsageError where an index and its shards differ."""
    found: dict[str, Stored] = {}
    files = weight_files(folder, who)
    for file in files:
        found |= header(file, who)
    if files[0].name == SINGLE:
        return found
    listed = _shards(folder / INDEX, who)
    wrong = next(
        (n for n in {**listed, **found} if n not in found or listed.get(n) != found[n].file.name), ""
    )
    if wrong:
        raise UsageError(
            who, f"{brief(str(folder / INDEX))!r}: tensor {brief(wrong)!r} does not lie where weight_map says"
        )
    return found


def file_of(folder: Path, name: str, who: str) -> Path | None:
    """The file of a folder that holds the tensor ``name``."""
    return next((file for file in weight_files(folder, who) if name in header(file, who)), None)
