"""Any timm vision transformer (ViT, DeiT, the vision towers of CLIP) from a local folder or the hub."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergesec.anatomy import Anatomy, describe
from mergesec.compat import ensure_torchvision
from mergesec.contracts import Backbone, Weights
from mergesec.errors import UsageError
from mergesec.files import brief, is_file
from mergesec.modelfiles import header, read_json, shown
from mergesec_tasks._adapters import expert_weights
from mergesec_tasks._configs import (
    HEADS,
    LAYERS,
    PIXELS,
    WIDTH,
    Field,
    check_fields,
    flag,
    one_of,
    share,
    size,
)  # fmt: skip
from mergesec_tasks._hub import model_folder
from mergesec_tasks._networks import check_held, read_tensors
from mergesec_tasks._preprocessing import IMAGENET, check_three
from mergesec_tasks._transformers import complaining
from mergesec_tasks.vision.hf_vit import interpolated_positions, resized

CARD = {
    "name": "timm-vit",
    "kind": "backbone",
    "class": "TimmVit",
    "version": "1",
    "title": "timm ViT",
    "paper": "Dosovitskiy et al., An image is worth 16x16 words, ICLR 2021; Wightman, timm",
    "url": "https://github.com/huggingface/pytorch-image-models",
    "summary": "a timm VisionTransformer from config.json and safetensors; the head is fitted on the base",
    "modalities": ["image"],
    "depends": ["timm"],
    "requires": {"timm": "mergesec[timm]"},
    "source": "a local folder in the timm layout, or the hub at a commit",
    "licence": "that of the weights",
    "recipe": {
        "optimizer": "adamw",
        "learning_rate": 3e-5,
        "epochs": 3,
        "batch_size": 32,
        "schedule": "cosine",
    },
    "parameters": {
        "model": {
            "type": "model",
            "default": "",
            "doc": "folder with config.json and model.safetensors, or owner/name@commit of the hub",
        },
        "resolution": {
            "type": "int",
            "default": 0,
            "min": 0,
            "max": 4096,
            "doc": "image side the network runs at, a multiple of its patch size; 0 = the model's own",
        },
        "layers": {
            "type": "int",
            "default": 0,
            "min": 0,
            "max": 1000,
            "doc": "how many transformer blocks are kept, from the input on; 0 = all",
        },
    },
}

WHO, CONFIG, FILES = "timm-vit", "config.json", ("*.json", "*.safetensors")
RATIO = Field(4.0, "a number above 0, at most 64", lambda v: type(v) in (int, float) and 0 < v <= 64)
SCALE = Field(None, "null or a number", lambda v: v is None or (type(v) in (int, float) and abs(v) < 1e6))
EITHER = Field(None, "null, true or false", lambda v: v is None or isinstance(v, bool))
ARGUMENTS = {
    "img_size": size(224, PIXELS), "patch_size": size(16, PIXELS), "embed_dim": size(768, WIDTH),
    "depth": size(12, LAYERS), "num_heads": size(12, HEADS), "mlp_ratio": RATIO, "in_chans": one_of(3),
    "global_pool": one_of("token", "avg", "", "map"), "class_token": flag(True), "qkv_bias": flag(True),
    "qk_norm": flag(False), "proj_bias": flag(True), "init_values": SCALE, "no_embed_class": flag(False),
    "reg_tokens": Field(0, "a whole number to 64", lambda v: type(v) is int and 0 <= v <= 64), "pre_norm": flag(False),
    "final_norm": flag(True), "fc_norm": EITHER, "pool_include_prefix": flag(False), "pos_embed": one_of("learn", "none"),
    "dynamic_img_size": one_of(False), "dynamic_img_pad": one_of(False), "act_layer": one_of("gelu", "quick_gelu"),
    **{f"{n}_rate": share(0.0) for n in ("drop", "pos_drop", "patch_drop", "proj_drop", "attn_drop", "drop_path")},
}  # fmt: skip
"""Fields of model_args that are handed to timm: others may load files, or change what is not known."""


class TimmVit(Backbone):
    """Features are what timm feeds its classifier: the pooled, normed output (``forward_head``, pre-logits)."""

    def __init__(self, model: str, resolution: int, layers: int) -> None:
        self.source, self.resolution, self.layers = model, resolution, layers
        self._folder: Path | None = None
        self._told: dict[str, Any] = {}
        self._template: nn.Module | None = None

    # ---- configuration

    @property
    def path(self) -> Path:
        """The folder of the model."""
        if self._folder is None:
            self._folder = model_folder(self.source, WHO, FILES)
        return self._folder

    def config(self) -> dict[str, Any]:
        """The folder's config.json: ``architecture``, ``model_args``, ``pretrained_cfg``."""
        if not self._told:
            told = _told(self.path)
            self._check_file(_file(self.path), told)
            self._told = told
        return self._told

    def _check_file(self, file: Path, told: dict[str, Any]) -> None:
        """UsageError, naming the tensor, unless a file holds the network that a config describes."""
        stored = header(file, WHO)
        check_held(lambda: self._made(told, _side(told), 0), stored, "", ("head.", "head_dist."), WHO)

    @property
    def side(self) -> int:
        """Image side in pixels at which the network runs."""
        return self.resolution or _side(self.config())

    def _made(self, told: dict[str, Any], side: int, layers: int) -> Any:
        """timm's network of a config, untrained."""
        ensure_torchvision()
        import timm
        from timm.models.vision_transformer import VisionTransformer

        arguments = {**(told.get("model_args") or {}), "img_size": side, "num_classes": 0}
        if layers:
            arguments["depth"] = layers
        name = told["architecture"]
        if not timm.is_model(name):
            raise UsageError(WHO, f"architecture {shown(name)} is none of timm's (timm.list_models())")
        with torch.random.fork_rng(devices=[]), complaining(WHO, f"timm builds no {name} of {arguments}"):
            network = timm.create_model(name, pretrained=False, **arguments)
        if not isinstance(network, VisionTransformer):
            raise UsageError(WHO, f"{name} is no timm VisionTransformer")
        patch = network.patch_embed.patch_size[0]
        if side % patch:
            raise UsageError(WHO, f"resolution {side} is not a multiple of the patch size {patch}")
        return network

    # ---- network

    def build(self) -> nn.Module:
        """A fresh network at the run's size without classifier; its weights mean nothing until loaded."""
        if self._template is None:
            told, depth = self.config(), self._depth(_file(self.path))
            if self.layers > depth:
                raise UsageError(WHO, f"layers {self.layers} exceed the {depth} of the model")
            self._template = self._made(told, self.side, self.layers)
        return copy.deepcopy(self._template)

    def base_weights(self) -> Weights:
        """The folder's weights, float32, position embeddings at the run's grid. Only safetensors is read."""
        return self._weights_in(self.path)

    def published(self, source: str) -> Weights:
        """A published expert: a folder or safetensors file with timm's names, or a LoRA adapter of peft."""
        return expert_weights(source, WHO, self.base_weights, self._expert_in, FILES)

    def _expert_in(self, place: Path) -> Weights:
        if place.is_dir() and ((place / CONFIG).exists() or (place / CONFIG).is_symlink()):
            _check_same(self.config(), _told(place), self.path, place)
        self._check_file(_file(place), self.config())
        return self._weights_in(place)

    @staticmethod
    def _depth(file: Path) -> int:
        names = header(file, WHO)
        return sum(1 for n in names if n.startswith("blocks.") and n.endswith(".attn.qkv.weight"))

    def _weights_in(self, place: Path) -> Weights:
        network: Any = self.build()
        wanted = {name: tuple(target.shape) for name, target in network.state_dict().items()}
        weights: dict[str, Tensor] = {}
        for name, tensor in read_tensors(_file(place), "", wanted).items():
            if name == "pos_embed" and tuple(tensor.shape) != wanted[name]:
                tensor = interpolated_positions(tensor, network.patch_embed.grid_size[0])
            if tuple(tensor.shape) != wanted[name]:
                raise UsageError(
                    WHO,
                    f"'{name}' has shape {list(tensor.shape)}, at this resolution it would be {list(wanted[name])}",
                )
            weights[name] = tensor.float().clone() if tensor.is_floating_point() else tensor.clone()
        return weights

    def anatomy(self) -> Anatomy:
        """Blocks and heads of the network as run."""
        network: Any = self.build()
        shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        return describe(shapes, network.blocks[0].attn.num_heads)

    def features(self, network: nn.Module, inputs: Any) -> Tensor:
        """Pooled features ``[N, d]`` of images float32 in [0, 1] ``[N, 3, H, W]``, resized on their device."""
        pixels = self.config().get("pretrained_cfg") or {}
        mean, deviation = pixels.get("mean") or IMAGENET[0], pixels.get("std") or IMAGENET[1]
        images = resized(inputs, self.side, "bicubic")
        normal = (images - torch.tensor(mean).view(3, 1, 1).to(images)) / torch.tensor(deviation).view(
            3, 1, 1
        ).to(images)
        timm: Any = network
        features: Tensor = timm.forward_head(timm.forward_features(normal), pre_logits=True)
        return features


# --------------------------------------------------------------------------- files


def _file(place: Path) -> Path:
    files = [place] if place.is_file() else sorted(p for p in place.glob("*.safetensors") if is_file(p))
    if len(files) != 1:
        raise UsageError(
            WHO, f"'{place}' holds {len(files)} safetensors files, needs one (other formats are not read)"
        )
    return files[0]


def _told(folder: Path) -> dict[str, Any]:
    """A folder's config.json, checked."""
    path = folder / CONFIG
    told = read_json(path, WHO)
    where = f"{brief(str(path))!r}"
    name = told.get("architecture")
    if not isinstance(name, str) or not re.fullmatch(r"\w{1,100}(\.\w{1,100})?", name):
        odd = f" but {shown(name)}" if "architecture" in told else ""
        raise UsageError(WHO, f"{where} names no architecture{odd}: it is not in the timm layout")
    parts = {part: told.get(part) or {} for part in ("model_args", "pretrained_cfg")}
    for part, value in parts.items():
        if not isinstance(value, dict):
            raise UsageError(WHO, f"{where}: {part} {shown(value)} is not a mapping of fields")
    check_fields(
        parts["model_args"],
        ARGUMENTS,
        {"num_classes", "weight_init", "fix_init"},
        f"{where}: model_args",
        WHO,
    )
    check_three(parts["pretrained_cfg"], ("mean", "std"), f"{where}: pretrained_cfg", WHO)
    given = parts["pretrained_cfg"].get("input_size") or [3, 224, 224]
    sides = (
        isinstance(given, list) and len(given) == 3 and all(type(v) is int and 0 < v <= PIXELS for v in given)
    )
    if not sides or given[1] != given[2]:
        raise UsageError(WHO, f"{where}: input_size is {shown(given)}; expected channels, side and side")
    return told


def _side(told: dict[str, Any]) -> int:
    """Image side in pixels of a config."""
    own = (told.get("pretrained_cfg") or {}).get("input_size") or [3, 224, 224]
    return int((told.get("model_args") or {}).get("img_size") or own[-1])


def _function(told: dict[str, Any]) -> dict[str, Any]:
    """What decides the function, as far as a config says it."""
    pixels = told.get("pretrained_cfg") or {}
    given = {
        n: v for n, v in (told.get("model_args") or {}).items() if n in ARGUMENTS and ARGUMENTS[n].decides
    }
    mean, deviation = pixels.get("mean") or list(IMAGENET[0]), pixels.get("std") or list(IMAGENET[1])
    return {
        "architecture": told["architecture"].partition(".")[0], **given, "img_size": _side(told), "mean": list(mean),
        "std": list(deviation),
    }  # fmt: skip


def _check_same(base: dict[str, Any], other: dict[str, Any], home: Path, folder: Path) -> None:
    """UsageError, naming the field and both values, where an expert's config differs from the base's."""
    ours, theirs = _function(base), _function(other)
    for name in {**ours, **theirs}:
        if ours.get(name) != theirs.get(name):
            raise UsageError(
                WHO, f"{brief(str(folder / CONFIG))!r}: {name} is {shown(theirs.get(name))}, in the base's "
                f"{brief(str(home / CONFIG))!r} it is {shown(ours.get(name))}: the same weights would be another function",
            )  # fmt: skip
