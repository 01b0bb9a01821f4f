"""Any Hugging Face vision transformer (ViT, DeiT, DINOv2, CLIP's vision tower) from a local folder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergesec.anatomy import Anatomy, describe
from mergesec.contracts import Backbone, ContractError, Weights
from mergesec.errors import UsageError
from mergesec_tasks._adapters import expert_weights
from mergesec_tasks._configs import Values
from mergesec_tasks._modelfolders import KINDS, check_base, check_expert
from mergesec_tasks._preprocessing import read_pixels
from mergesec_tasks._transformers import built, config_of, loaded, shapes_of

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
    "inspect": "mergesec_tasks._modelfolders:inspect",
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
        self._told: Values | None = None
        self._settings: Any = None
        self._template: nn.Module | None = None
        self._mean_std: tuple[Tensor, Tensor] | None = None

    # ---- configuration

    @property
    def path(self) -> Path:
        """The folder of the model."""
        if not self.source:
            raise UsageError(
                self.who,
                f"no model; set the parameter '{self.parameter}' to a folder with config.json and model.safetensors",
            )
        return Path(self.source).expanduser()

    @property
    def told(self) -> Values:
        """The checked config of the folder, as it stands there."""
        if self._told is None:
            self._told = check_base(self.path, self.who, KINDS[self.who])
        return self._told

    @property
    def config(self) -> Any:
        """The config of the network as run: ``resolution`` and ``layers`` applied and checked."""
        if self._settings is None:
            patch, own = self.told["patch_size"], self.told["num_hidden_layers"]
            side, count = self.resolution or self.told["image_size"], self.layers or own
            if side % patch:
                raise UsageError(self.who, f"resolution {side} is not a multiple of the patch size {patch}")
            if count > own:
                raise UsageError(self.who, f"layers {count} exceed the {own} of the model")
            changes = {"image_size": side, "num_hidden_layers": count}
            self._settings = config_of({**self.told, **changes}, self.who)
        return self._settings

    def normalisation(self) -> tuple[Tensor, Tensor]:
        """Pixel mean and deviation ``[3, 1, 1]``: the folder's preprocessor_config.json, else by type."""
        if self._mean_std is None:
            pixels = read_pixels(self.path, self.told["model_type"], self.who)
            mean, deviation = torch.tensor(pixels.mean), torch.tensor(pixels.deviation)
            self._mean_std = mean.view(3, 1, 1), deviation.view(3, 1, 1)
        return self._mean_std

    # ---- network

    def build(self) -> nn.Module:
        """A fresh network at the run's size with fused attention; its weights mean nothing until loaded."""
        if self._template is None:
            self._template = built(self.config, self.who)
        return copy.deepcopy(self._template)

    def base_weights(self) -> Weights:
        """The folder's weights, float32, position embeddings at the run's grid. Only safetensors is read."""
        return self._weights_in(self.path)

    def published(self, source: str) -> Weights:
        """A published expert in the Hugging Face layout, or a LoRA adapter of peft: a folder, or the hub at a commit."""
        return expert_weights(source, self.who, self.base_weights, self._expert_in)

    def _expert_in(self, folder: Path) -> Weights:
        check_expert(folder, self.path, self.told, self.who, KINDS[self.who])
        return self._weights_in(folder)

    def _weights_in(self, folder: Path) -> Weights:
        own = config_of({**self.told, "num_hidden_layers": self.config.num_hidden_layers}, self.who)
        native = loaded(folder, own, self.who, OPTIONAL).state_dict()  # at its own resolution
        weights: dict[str, Tensor] = {}
        for name, target in self.build().state_dict().items():
            tensor = native[name]
            if tensor.shape != target.shape and "position_embedding" in name:
                tensor = interpolated_positions(tensor, self.config.image_size // self.config.patch_size)
            if tensor.shape != target.shape:
                raise UsageError(
                    self.who,
                    f"'{name}' in '{folder}' has shape {list(tensor.shape)}, the base's config.json needs "
                    f"{list(target.shape)}",
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
