"""How a folder's images become pixels of the network: preprocessor_config.json, read and compared. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mergesec.errors import UsageError, nearest
from mergesec.files import brief
from mergesec.modelfiles import read_json, shown

FILES = ("preprocessor_config.json", "processor_config.json")
Three = tuple[float, float, float]
IMAGENET: tuple[Three, Three] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP: tuple[Three, Three] = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF: tuple[Three, Three] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NORMALISATION = {"vit": HALF, "deit": IMAGENET, "dinov2": IMAGENET, "clip_vision_model": CLIP}
"""Pixel mean and deviation by model type, used where the folder has no preprocessor_config.json."""
_COMPARED = ("do_resize", "do_center_crop", "resample", "size", "crop_size")
_IDLE = frozenset({
    "_processor_class", "_valid_processor_keys", "auto_map", "crop_pct", "data_format", "default_to_square",
    "device", "disable_grouping", "do_convert_rgb", "do_pad", "feature_extractor_type", "image_processor_type",
    "input_data_format", "pad_size", "processor_class", "return_tensors", "tokenizer_class",
})  # fmt: skip


class Pixels(NamedTuple):
    """What is done to images."""

    mean: Three
    deviation: Three
    told: dict[str, Any]
    """Resizing and cropping, as far as the folder says."""
    path: Path


def read_pixels(folder: Path, kind: str, who: str) -> Pixels:
    """What a folder says of its images; by model type where it says nothing. UsageError, naming file, field and value,
    for what is not known."""
    mean, deviation = NORMALISATION[kind]
    path, raw = _raw(folder, who)
    for name, wanted in _wrong(raw):
        raise UsageError(who, f"{brief(str(path))!r}: {brief(name)} is {shown(raw[name])}; expected {wanted}")
    if raw.get("do_normalize") is False:
        mean, deviation = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    else:
        mean, deviation = _three(raw.get("image_mean"), mean), _three(raw.get("image_std"), deviation)
    return Pixels(mean, deviation, {n: raw[n] for n in _COMPARED if raw.get(n) is not None}, path)


def _raw(folder: Path, who: str) -> tuple[Path, dict[str, Any]]:
    """The file that says something of images, and what; empty if none does."""
    first, second = (folder / name for name in FILES)
    if first.exists() or first.is_symlink():
        return first, read_json(first, who)
    if second.exists() or second.is_symlink():
        found = read_json(second, who).get("image_processor")
        if found is not None and not isinstance(found, dict):
            raise UsageError(
                who, f"{brief(str(second))!r}: image_processor {shown(found)} is not a mapping of fields"
            )
        return second, found or {}
    return first, {}


def _wrong(raw: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Fields whose value is not known to be good, and what it should be."""
    for name in ("do_normalize", "do_resize", "do_center_crop"):
        if raw.get(name) is not None and type(raw[name]) is not bool:
            yield name, "true or false"
    if raw.get("do_rescale", True) is not True:
        yield "do_rescale", "true: pixels from 0 to 1"
    factor = raw.get("rescale_factor")
    if factor is not None and not (_number(factor) and abs(factor * 255 - 1) < 1e-4):
        yield "rescale_factor", "1/255: pixels from 0 to 1"
    for name in ("image_mean", "image_std"):
        value = raw.get(name)
        if value is not None and not _three_numbers(value, 0.0 if name == "image_mean" else 1e-6):
            yield name, "three numbers, those of a deviation above 0"
    known = {*_COMPARED, *_IDLE, "do_normalize", "do_rescale", "rescale_factor", "image_mean", "image_std"}
    for name, value in raw.items():
        if name not in known and value is not None and value is not False and value not in ("", [], {}):
            yield name, f"no such field, or null{nearest(brief(name), known)}"


def check_three(raw: Mapping[str, Any], names: tuple[str, str], where: str, who: str) -> None:
    """UsageError unless mean and deviation, where they are given, are three numbers each."""
    for name, least in zip(names, (0.0, 1e-6), strict=True):
        value = raw.get(name)
        if value is not None and not _three_numbers(value, least):
            raise UsageError(
                who,
                f"{where}: {name} is {shown(value)}; expected three numbers, those of a deviation above 0",
            )


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e6


def _three_numbers(value: Any, least: float) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(_number(v) and v >= least for v in value)


def _three(value: Any, default: Three) -> Three:
    return default if value is None else (float(value[0]), float(value[1]), float(value[2]))


def check_same_pixels(base: Path, folder: Path, kind: str, who: str) -> None:
    """UsageError if an expert's folder says something else of its images than the base's."""
    theirs = read_pixels(folder, kind, who)
    if not _raw(folder, who)[1]:
        return
    ours = read_pixels(base, kind, who)
    pairs: list[tuple[str, Any, Any]] = [
        ("image_mean", list(ours.mean), list(theirs.mean)),
        ("image_std", list(ours.deviation), list(theirs.deviation)),
    ]
    pairs += [(n, ours.told[n], theirs.told[n]) for n in _COMPARED if n in ours.told and n in theirs.told]
    for name, own, other in pairs:
        if _sides(own) != _sides(other):
            raise UsageError(
                who,
                f"{brief(str(theirs.path))!r}: {name} is {shown(other)}, for the base it is {shown(own)}: the expert was "
                "made for other pixels",
            )


def _sides(value: Any) -> Any:
    """A size is written as a number, as one of the shorter edge, or as height and width: its numbers count."""
    if isinstance(value, dict):
        return sorted({repr(float(v)) if _number(v) else repr(v) for v in value.values()})
    if isinstance(value, list):
        return [round(v, 6) if _number(v) else v for v in value]
    return [repr(float(value))] if _number(value) else value
