"""Folders of diffusers' pipelines, looked at before anything of them is trusted: which pipeline, which network, and
whether its tensors are those that its config tells.

No torch: ``bench plan`` looks at local folders with this before anything runs, the backbones again before they load
them. Every complaint is a UsageError of ``who``, a grid's field or a backbone's name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mergesec.errors import UsageError, nearest
from mergesec.files import brief, is_file, is_folder
from mergesec.modelfiles import CONFIG, PICKLES, Stored, header, read_json, shown
from mergesec_tasks.diffusers._factornames import alphas, places

INDEX = "model_index.json"
SINGLE = "diffusion_pytorch_model.safetensors"
SHARDS = f"{SINGLE}.index.json"
FACTORS = "pytorch_lora_weights.safetensors"
ADAPTER = "adapter_config.json"
FILES = (
    INDEX, "*/*.json", "*/*.txt", "*/tokenizer.model", f"*/{SINGLE}", "*/diffusion_pytorch_model-*.safetensors",
    "*/model.safetensors", "*/model-*.safetensors", "*.json", FACTORS, SINGLE, "adapter_model.safetensors",
)  # fmt: skip
"""What is fetched of a repository on the hub: not the same weights again in half precision or as pickles."""


class Kind(NamedTuple):
    """What a backbone reads: the pipeline, its network's folder and class, and what else has to be there."""

    pipelines: tuple[str, ...]
    part: str
    network: str
    others: tuple[str, ...]


KINDS = {
    "diffusers-unet": Kind(
        ("StableDiffusionPipeline",), "unet", "UNet2DConditionModel",
        ("vae", "text_encoder", "tokenizer", "scheduler"),
    ),
    "diffusers-dit": Kind(("DiTPipeline",), "transformer", "DiTTransformer2DModel", ("vae", "scheduler")),
    "diffusers-sd3": Kind(
        ("StableDiffusion3Pipeline",), "transformer", "SD3Transformer2DModel",
        ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler"),
    ),
}  # fmt: skip
"""By the backbone's name."""


def check_base(folder: Path, kind: Kind, who: str) -> dict[str, Any]:
    """The config of a pipeline's network, once pipeline, config and tensors fit each other."""
    told = read_json(folder / INDEX, who)
    pipeline = told.get("_class_name")
    if pipeline not in kind.pipelines:
        others = [name for name, other in KINDS.items() if pipeline in other.pipelines]
        hint = f"; that is a base for {others[0]}" if others else ""
        raise UsageError(
            who, f"{brief(str(folder / INDEX))!r} is of the pipeline {shown(pipeline)}, expected "
            f"{' or '.join(kind.pipelines)}{hint}",
        )  # fmt: skip
    for part in (kind.part, *kind.others):
        if not is_folder(folder / part):
            raise UsageError(who, f"{brief(str(folder))!r} has no folder {part!r}, which a {pipeline} needs")
    return check_network(folder / kind.part, kind, who)


def check_network(folder: Path, kind: Kind, who: str) -> dict[str, Any]:
    """The config of a network's folder; UsageError unless it is of the kind and its tensors have its blocks."""
    values = read_json(folder / CONFIG, who)
    if values.get("_class_name") != kind.network:
        raise UsageError(
            who, f"{brief(str(folder / CONFIG))!r}: _class_name is {shown(values.get('_class_name'))}, expected "
            f"{kind.network!r}",
        )  # fmt: skip
    if kind.part == "unet":
        _check_blocks(values, stored(folder, who), folder / CONFIG, who)
    else:
        _check_layers(values, stored(folder, who), folder / CONFIG, who)
    return values


def stored(folder: Path, who: str) -> dict[str, Stored]:
    """All tensors of a network's folder by name: of the single file, or of the shards that its index names."""
    if is_file(folder / SINGLE) and is_file(folder / SHARDS):
        raise UsageError(
            who, f"{brief(str(folder))!r} holds {SINGLE} and {SHARDS}; remove the one that is not meant"
        )
    if is_file(folder / SINGLE):
        return header(folder / SINGLE, who)
    if not is_file(folder / SHARDS):
        pickles = is_folder(folder) and any(p.suffix.lower() in PICKLES for p in folder.iterdir())
        told = "; only pickles, which can run code when read: convert them" if pickles else ""
        raise UsageError(who, f"no {SINGLE} in {brief(str(folder))!r}{told}")
    listed = read_json(folder / SHARDS, who).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise UsageError(who, f"{brief(str(folder / SHARDS))!r}: weight_map {shown(listed)} names no files")
    found: dict[str, Stored] = {}
    for name, shard in listed.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]{1,200}\.safetensors", shard):
            raise UsageError(
                who, f"{brief(str(folder / SHARDS))!r}: weight_map names {shown(shard)} for {brief(name)!r}"
            )
    for shard in sorted(set(listed.values())):
        found |= header(folder / shard, who)
    if wrong := next((n for n in {**listed, **found} if n not in found or n not in listed), ""):
        raise UsageError(
            who, f"{brief(str(folder / SHARDS))!r}: {brief(wrong)!r} is not where weight_map says"
        )
    return found


# --------------------------------------------------------------------------- configs


def _check_blocks(values: Mapping[str, Any], tensors: Mapping[str, Stored], path: Path, who: str) -> None:
    """UsageError where a UNet's blocks are others than its config tells."""
    down, up, widths = (values.get(n) for n in ("down_block_types", "up_block_types", "block_out_channels"))
    for name, given in (("down_block_types", down), ("up_block_types", up), ("block_out_channels", widths)):
        if not isinstance(given, list) or not given:
            raise UsageError(who, f"{brief(str(path))!r}: {name} is {shown(given)}, expected a list")
    assert isinstance(down, list) and isinstance(up, list) and isinstance(widths, list)
    if not len(down) == len(up) == len(widths):
        raise UsageError(
            who, f"{brief(str(path))!r}: blocks do not match: {len(down)} down_block_types, {len(up)} up_block_types, "
            f"{len(widths)} block_out_channels",
        )  # fmt: skip
    known = ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    for side, kinds, outs in (("down", down, widths), ("up", up, widths[::-1])):
        for i, (kind, width) in enumerate(zip(kinds, outs, strict=True)):
            if kind not in known:
                raise UsageError(
                    who, f"{brief(str(path))!r}: {side}_block_types[{i}] {shown(kind)} is not known here"
                    f"{nearest(str(kind), known)}",
                )  # fmt: skip
            where = f"{side}_blocks.{i}"
            attends = any(name.startswith(f"{where}.attentions.") for name in tensors)
            conv = tensors.get(f"{where}.resnets.0.conv1.weight")
            if attends != kind.startswith("Cross") or conv is None or conv.shape[0] != width:
                has = (
                    "no such block"
                    if conv is None
                    else f"{conv.shape[0]} channels{' and attention' * attends}"
                )
                raise UsageError(
                    who,
                    f"{brief(str(path))!r}: {where} is a {kind} of {shown(width)} channels, the tensors have {has}",
                )
    count = len({name.split(".")[1] for name in tensors if name.startswith("down_blocks.")})
    if count != len(down):
        raise UsageError(
            who, f"{brief(str(path))!r}: {len(down)} down_block_types, the tensors have {count} down blocks"
        )


def _check_layers(values: Mapping[str, Any], tensors: Mapping[str, Stored], path: Path, who: str) -> None:
    """UsageError where a transformer's blocks are others than its config tells."""
    count = len({n.split(".")[1] for n in tensors if n.startswith("transformer_blocks.")})
    if values.get("num_layers") != count:
        raise UsageError(
            who,
            f"{brief(str(path))!r}: num_layers is {shown(values.get('num_layers'))}, the tensors have {count} blocks",
        )
    norm = values.get("qk_norm")
    if norm not in (None, "rms_norm"):
        raise UsageError(
            who, f"{brief(str(path))!r}: qk_norm is {shown(norm)}, expected null or 'rms_norm': symmetries of others "
            "are not known here",
        )  # fmt: skip


# --------------------------------------------------------------------------- experts


def network_of(place: Path, kind: Kind, who: str) -> Path:
    """The folder of an expert's network: a pipeline's, or one by itself."""
    if is_file(place / INDEX):
        pipeline = read_json(place / INDEX, who).get("_class_name")
        if pipeline not in kind.pipelines:
            raise UsageError(
                who, f"{brief(str(place / INDEX))!r} is of the pipeline {shown(pipeline)}, the base is a "
                f"{kind.pipelines[0]}",
            )  # fmt: skip
        return place / kind.part
    return place


def is_factors(place: Path) -> bool:
    """Whether a place holds a LoRA as diffusers saves it: its folder, or the file itself."""
    return is_file(place / FACTORS) or (is_file(place) and place.suffix == ".safetensors")


def check_expert(place: Path, base: Path, kind: Kind, who: str) -> None:
    """UsageError unless an expert is the base's network with other weights, or factors for it."""
    if is_factors(place):
        file = place if is_file(place) else place / FACTORS
        shapes = {name: tensor.shape for name, tensor in stored(base / kind.part, who).items()}
        places(file, shapes, kind.part, who)
        alphas(file, kind.part, who)
        return
    if is_file(place / ADAPTER):
        return  # read by mergesec.adapters, which names what does not fit
    own = network_of(place, kind, who)
    check_network(own, kind, who)
    check_same_tensors(stored(base / kind.part, who), stored(own, who), own, who)


def check_same_tensors(base: Mapping[str, Stored], own: Mapping[str, Stored], folder: Path, who: str) -> None:
    """UsageError naming the first tensor that the base and an expert do not both have in one shape."""
    for name in sorted({*base, *own}):
        one, other = base.get(name), own.get(name)
        if one is None or other is None or one.shape != other.shape:
            held = "missing" if other is None else list(other.shape)
            wanted = "none" if one is None else list(one.shape)
            raise UsageError(
                who, f"{brief(str(folder))!r}: {brief(name)!r} is {held}, of the base it is {wanted}"
            )


# --------------------------------------------------------------------------- for the plan


def inspect(backbone: str, parameters: Mapping[str, Any], where: str, experts: Mapping[str, str]) -> None:
    """UsageError, naming the grid's field, for local folders that backbones here would refuse later. What lies on the
    hub is looked at when it has been fetched."""
    base, kind = Path(str(parameters["path"])).expanduser(), KINDS[backbone]
    if not parameters["path"] or not base.exists():
        return
    check_base(base, kind, f"{where}.path")
    for field, source in experts.items():
        place = Path(source).expanduser()
        if source and place.exists():
            check_expert(place, base, kind, field)
