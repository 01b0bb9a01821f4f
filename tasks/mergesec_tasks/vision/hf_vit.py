"""Any Hugging Face vision transformer (ViT, DeiT, DINOv2, CLIP's vision tower) from a local folder."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergesec.anatomy import Anatomy, describe
from mergesec.compat import ensure_torchvision
from mergesec.contracts import Backbone, ContractError, Weights
from mergesec_tasks._adapters import expert_weights
from mergesec_tasks._transformers import built, loaded, require_safetensors, shapes_of

CARD = {
    "name": "hf-vit",
    "kind": "backbone",
    "class": "HfVit",
    "version": "1",
    "title": "Hugging Face ViT from a local folder",
    "paper": "Dosovitskiy et al., An image is worth 16x16 words, ICLR 2021; Oquab et al., DINOv2, TMLR 2024",
    "url": "https://arxiv.org/abs/2010.11929",
    "summary": "ViT, DeiT, DINOv2 or CLIP vision tower from config.json and safetensors; never downloads",
    "modalities": ["image"],
    "depends": ["transformers"],
    "source": "a local folder in the Hugging Face layout",
    "licence": "that of the weights",
    "recipe": {
        "optimizer": "adamw",
        "learning_rate": 3e-5,
        "epochs": 3,
        "batch_size": 32,
        "schedule": "cosine",
    },
    "parameters": {
        "path": {
            "type": "path",
            "default": "",
            "doc": "folder with config.json and model.safetensors",
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

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NORMALISATION = {"vit": HALF, "deit": IMAGENET, "dinov2": IMAGENET, "clip_vision_model": CLIP}
"""Pixel mean and deviation by model type, used where the folder has no preprocessor_config.json."""
OPTIONAL = ("pooler.", "mask_token", "position_ids")
"""Tensors that a checkpoint may lack, since class-token features do not pass through them."""


def interpolated_positions(positions: Tensor, side: int) -> Tensor:
    """Position embeddings ``[..., 1 + s·s, d]``, class token first, for ``side`` × ``side`` patches.

    Bicubic over the grid, as ViT and DINOv2 do at every forward pass; here it happens once.
    """
    shape = positions.shape
    flat = positions.reshape(-1, shape[-1])
    old = round((flat.shape[0] - 1) ** 0.5)
    if old * old + 1 != flat.shape[0]:
        raise ContractError(f"{flat.shape[0]} position embeddings are not a square grid and one token")
    if old == side:
        return positions
    grid = flat[1:].reshape(1, old, old, -1).permute(0, 3, 1, 2).float()
    resized = functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    rows = resized.permute(0, 2, 3, 1).reshape(side * side, -1).to(positions.dtype)
    return torch.cat([flat[:1], rows]).reshape(*shape[:-2], side * side + 1, shape[-1])


def resized(images: Tensor, side: int, mode: str) -> Tensor:
    """Images float ``[N, 3, H, W]`` as ``[N, 3, side, side]``, antialiased; those of that size as they are.

    Bicubic overshoots; what leaves [0, 1] is cut off, as storing pixels as bytes would do.
    """
    if images.shape[-2:] == (side, side):
        return images
    found = functional.interpolate(images, size=(side, side), mode=mode, antialias=True, align_corners=False)
    return found.clamp(0.0, 1.0) if mode == "bicubic" else found


class HfVit(Backbone):
    """Runs at the native size ``resolution``: position embeddings are interpolated when the base is loaded.

    float16 or bfloat16 on disk becomes float32. Features are the class token after the final norm.
    """

    who, parameter = "hf-vit", "path"
    """How messages call this backbone and the parameter that names its folder."""
    interpolation = "bilinear"
    """How images are brought to the network's resolution; always antialiased."""

    def __init__(self, path: str, resolution: int, layers: int) -> None:
        self.source = path
        self.resolution = resolution
        self.layers = layers
        self._settings: Any = None
        self._template: nn.Module | None = None
        self._mean_std: tuple[Tensor, Tensor] | None = None

    # ---- configuration

    @property
    def path(self) -> Path:
        """The folder of the model."""
        return Path(self.source).expanduser()

    def _json(self, name: str) -> dict[str, Any]:
        target = self.path / name
        if not self.source or not target.is_file():
            raise FileNotFoundError(
                f"{self.who}: no {name} in '{self.path}'; set the parameter '{self.parameter}' to a folder "
                "with config.json and model.safetensors"
            )
        content: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
        return content

    def _read_config(self, **changes: Any) -> Any:
        """The vision tower's config with ``changes``. ContractError if the folder holds something else."""
        ensure_torchvision()
        from transformers import AutoConfig

        raw = self._json("config.json")
        kind = raw.pop("model_type", None)
        if kind == "clip":
            raw, kind = dict(raw.get("vision_config") or {}), "clip_vision_model"
            raw.pop("model_type", None)
        if kind not in NORMALISATION:
            known = ", ".join(sorted(NORMALISATION))
            raise ContractError(f"{self.who}: model type {kind!r} in '{self.path}' is not one of {known}")
        # Stage names and output indices list the layers by number and would contradict a smaller count.
        for name in ("stage_names", "out_features", "out_indices", "dtype", "torch_dtype"):
            raw.pop(name, None)
        return AutoConfig.for_model(kind, **{**raw, **changes})

    @property
    def config(self) -> Any:
        """The config of the network as run: ``resolution`` and ``layers`` applied and checked."""
        if self._settings is None:
            own = self._read_config()
            side, count = self.resolution or own.image_size, self.layers or own.num_hidden_layers
            if side % own.patch_size:
                raise ContractError(
                    f"{self.who}: resolution {side} is not a multiple of the patch size {own.patch_size}"
                )
            if count > own.num_hidden_layers:
                raise ContractError(
                    f"{self.who}: layers {count} exceed the {own.num_hidden_layers} of the model"
                )
            self._settings = self._read_config(image_size=side, num_hidden_layers=count)
        return self._settings

    def normalisation(self) -> tuple[Tensor, Tensor]:
        """Pixel mean and deviation ``[3, 1, 1]``: the folder's preprocessor_config.json, else by type."""
        if self._mean_std is None:
            mean, deviation = NORMALISATION[self.config.model_type]
            if (self.path / "preprocessor_config.json").is_file():
                given = self._json("preprocessor_config.json")
                mean = given.get("image_mean") or mean
                deviation = given.get("image_std") or deviation
            self._mean_std = torch.tensor(mean).view(3, 1, 1), torch.tensor(deviation).view(3, 1, 1)
        return self._mean_std

    # ---- network

    def build(self) -> nn.Module:
        """A fresh network at the run's size with fused attention; its weights mean nothing until loaded."""
        if self._template is None:
            self._template = built(self.config)
        return copy.deepcopy(self._template)

    def base_weights(self) -> Weights:
        """The folder's weights, float32, position embeddings at the run's grid. Only safetensors is read."""
        return self._weights_in(self.path)

    def published(self, source: str) -> Weights:
        """A published expert in the Hugging Face layout, or a LoRA adapter of peft: a folder, or the hub at a commit."""
        return expert_weights(source, self.who, self.base_weights, self._weights_in)

    def _weights_in(self, folder: Path) -> Weights:
        require_safetensors(folder, self.who)
        own = self._read_config(num_hidden_layers=self.config.num_hidden_layers)  # at its own resolution
        native = loaded(folder, own, self.who, OPTIONAL).state_dict()
        wanted = self.build().state_dict()
        weights: dict[str, Tensor] = {}
        for name, target in wanted.items():
            tensor = native[name]
            if tensor.shape != target.shape and "position_embedding" in name:
                tensor = interpolated_positions(tensor, self.config.image_size // self.config.patch_size)
            if tensor.shape != target.shape:
                raise ContractError(
                    f"{self.who}: '{name}' in '{folder}' has shape {list(tensor.shape)}, the base's config.json "
                    f"needs {list(target.shape)}"
                )
            weights[name] = tensor.float().clone() if tensor.is_floating_point() else tensor.clone()
        return weights

    def anatomy(self) -> Anatomy:
        """Blocks and heads of the network as run."""
        return describe(shapes_of(self.build()), self.config.num_attention_heads)

    def features(self, network: nn.Module, inputs: Any) -> Tensor:
        """Class token ``[N, d]`` of images float32 in [0, 1] ``[N, 3, H, W]``, resized on their device."""
        images = resized(inputs, self.config.image_size, self.interpolation)
        mean, deviation = self.normalisation()
        pixels = (images - mean.to(images)).div_(deviation.to(images))
        output = network(pixel_values=pixels)
        if self.config.model_type == "clip_vision_model":  # its last hidden state is not normed yet
            pooled: Tensor = output.pooler_output
            return pooled
        states: Tensor = output.last_hidden_state
        return states[:, 0]
