"""Any timm vision transformer (ViT, DeiT, the vision towers of CLIP) from a local folder or the hub."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergesec.anatomy import Anatomy, describe
from mergesec.compat import ensure_torchvision
from mergesec.contracts import Backbone, ContractError, Weights
from mergesec_tasks._adapters import expert_weights
from mergesec_tasks._hub import model_folder
from mergesec_tasks._preprocessing import IMAGENET
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

FILES = ("*.json", "*.safetensors")


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
            self._folder = model_folder(self.source, "timm-vit", FILES)
        return self._folder

    def config(self) -> dict[str, Any]:
        """The folder's config.json: ``architecture``, ``model_args``, ``pretrained_cfg``."""
        if not self._told:
            file = self.path / "config.json"
            if not file.is_file():
                raise FileNotFoundError(
                    f"timm-vit: no config.json in '{self.path}'; set the parameter 'model'"
                )
            told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            if "architecture" not in told:
                raise ContractError(f"timm-vit: '{file}' names no architecture: it is not in the timm layout")
            self._told = told
        return self._told

    @property
    def side(self) -> int:
        """Image side in pixels at which the network runs."""
        own = (self.config().get("pretrained_cfg") or {}).get("input_size") or [3, 224, 224]
        given = (self.config().get("model_args") or {}).get("img_size")
        return int(self.resolution or given or own[-1])

    def _network(self) -> Any:
        ensure_torchvision()
        import timm
        from timm.models.vision_transformer import VisionTransformer

        arguments = {**(self.config().get("model_args") or {}), "img_size": self.side, "num_classes": 0}
        if self.layers:
            arguments["depth"] = self.layers
        with torch.random.fork_rng(devices=[]):  # construction draws initial weights
            try:
                network = timm.create_model(self.config()["architecture"], pretrained=False, **arguments)
            except (RuntimeError, TypeError, AssertionError) as error:
                raise ContractError(f"timm-vit: {self.config()['architecture']}: {error}") from None
        if not isinstance(network, VisionTransformer):
            raise ContractError(f"timm-vit: {self.config()['architecture']} is no timm VisionTransformer")
        patch = network.patch_embed.patch_size[0]
        if self.side % patch:
            raise ContractError(
                f"timm-vit: resolution {self.side} is not a multiple of the patch size {patch}"
            )
        return network

    # ---- network

    def build(self) -> nn.Module:
        """A fresh network at the run's size without classifier; its weights mean nothing until loaded."""
        if self._template is None:
            self._template = self._network()
        return copy.deepcopy(self._template)

    def base_weights(self) -> Weights:
        """The folder's weights, float32, position embeddings at the run's grid. Only safetensors is read."""
        return self._weights_in(self.path)

    def published(self, source: str) -> Weights:
        """A published expert: a folder or safetensors file with timm's names, or a LoRA adapter of peft."""
        return expert_weights(source, "timm-vit", self.base_weights, self._weights_in, FILES)

    def _weights_in(self, place: Path) -> Weights:
        from safetensors.torch import load_file

        files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
        if len(files) != 1:
            raise FileNotFoundError(
                f"timm-vit: '{place}' holds {len(files)} safetensors files, needs one "
                "(other formats are not read)"
            )
        stored, weights = load_file(files[0]), {}
        depth = sum(1 for name in stored if name.startswith("blocks.") and name.endswith(".attn.qkv.weight"))
        if self.layers > depth:
            raise ContractError(f"timm-vit: layers {self.layers} exceed the {depth} of the model")
        network: Any = self.build()
        for name, target in network.state_dict().items():
            if name not in stored:
                raise ContractError(f"timm-vit: '{files[0]}' lacks '{name}'")
            tensor = stored[name]
            if name == "pos_embed" and tensor.shape != target.shape:
                tensor = interpolated_positions(tensor, network.patch_embed.grid_size[0])
            if tensor.shape != target.shape:
                raise ContractError(
                    f"timm-vit: '{name}' has shape {list(tensor.shape)}, config.json needs {list(target.shape)}"
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
