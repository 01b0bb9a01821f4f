"""CLIP through open_clip: its vision tower, projection included, is what is fine-tuned and merged."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergesec.anatomy import Anatomy, describe
from mergesec.compat import ensure_torchvision
from mergesec.contracts import Backbone, ContractError, Weights
from mergesec_tasks._hub import model_folder
from mergesec_tasks._preprocessing import CLIP
from mergesec_tasks.vision.clip import TEXT_BATCH, text_head
from mergesec_tasks.vision.hf_vit import interpolated_positions, resized

CARD = {
    "name": "open-clip",
    "kind": "backbone",
    "class": "OpenClip",
    "version": "1",
    "title": "CLIP (open_clip)",
    "paper": "Cherti et al., Reproducible scaling laws for contrastive language-image learning, CVPR 2023",
    "url": "https://arxiv.org/abs/2212.07143",
    "summary": "open_clip's vision transformers with zero-shot heads from their text towers",
    "modalities": ["image"],
    "depends": ["open_clip_torch"],
    "requires": {"open_clip": "mergesec[clip]"},
    "zero_shot": True,
    "source": "a local folder or safetensors file, or the hub at a commit",
    "licence": "that of the weights",
    "recipe": {
        "optimizer": "adamw",
        "learning_rate": 1e-5,
        "weight_decay": 0.1,
        "schedule": "cosine",
        "epochs": 1,
        "steps": 4000,
        "batch_size": 128,
    },
    "parameters": {
        "model": {
            "type": "model",
            "default": "",
            "doc": "folder with open_clip_model.safetensors (and open_clip_config.json), such a file alone, or "
            "owner/name@commit of the hub",
        },
        "architecture": {
            "type": "str",
            "default": "",
            "doc": "open_clip's name, e.g. ViT-B-32-quickgelu, where no open_clip_config.json tells it",
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
        "head": {
            "type": "choice",
            "default": "zero-shot",
            "choices": ["zero-shot", "probe"],
            "doc": "frozen head: from the text tower and the task's prompts, or a linear probe on the base",
        },
    },
}

CONFIG = "open_clip_config.json"
FILES = ("*.json", "*.safetensors", "*.txt")


@dataclass(frozen=True)
class _Release:
    """Where a release's weights lie, what they are of, and how their pixels are normalised."""

    weights: Path
    model: dict[str, Any]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]


class OpenClip(Backbone):
    """Features are the image embeddings ``[N, d]``: open_clip's projection belongs to the vision tower."""

    def __init__(self, model: str, architecture: str, resolution: int, layers: int, head: str) -> None:
        self.source, self.architecture = model, architecture
        self.resolution, self.layers, self.head_kind = resolution, layers, head
        self._found: _Release | None = None
        self._template: Any = None

    # ---- configuration

    def _release(self) -> _Release:
        if self._found is None:
            place = model_folder(self.source, "open-clip", FILES)
            folder = place if place.is_dir() else place.parent
            told: dict[str, Any] = {}
            if (folder / CONFIG).is_file():
                told = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            pixels = told.get("preprocess_cfg") or {}
            mean, deviation = pixels.get("mean") or CLIP[0], pixels.get("std") or CLIP[1]
            model = dict(told.get("model_cfg") or self._named())
            weights = place if place.is_file() else self._weights(place)
            self._found = _Release(weights, model, tuple(mean), tuple(deviation))
        return self._found

    def _named(self) -> dict[str, Any]:
        ensure_torchvision()
        import open_clip

        found = open_clip.get_model_config(self.architecture) if self.architecture else None
        if found is None:
            raise ContractError(
                f"open-clip: no {CONFIG} beside the weights, and architecture {self.architecture!r} is not one "
                "of open_clip's names (open_clip.list_models())"
            )
        return dict(found)

    @staticmethod
    def _weights(folder: Path) -> Path:
        found = sorted(folder.glob("*.safetensors"))
        named = [p for p in found if p.name == "open_clip_model.safetensors"] or found
        if len(named) != 1:
            raise FileNotFoundError(
                f"open-clip: '{folder}' holds {len(named)} safetensors files, needs one "
                "(other formats are not read)"
            )
        return named[0]

    def config(self) -> dict[str, Any]:
        """The release's model configuration, ``resolution`` and ``layers`` applied and checked."""
        model = copy.deepcopy(self._release().model)
        vision = model["vision_cfg"]
        if vision.get("timm_model_name") or not isinstance(vision.get("layers"), int):
            raise ContractError("open-clip: only open_clip's own vision transformers are taken")
        side, count = self.resolution or vision["image_size"], self.layers or vision["layers"]
        if side % vision["patch_size"]:
            raise ContractError(
                f"open-clip: resolution {side} is not a multiple of the patch size {vision['patch_size']}"
            )
        if count > vision["layers"]:
            raise ContractError(f"open-clip: layers {count} exceed the {vision['layers']} of the model")
        vision["image_size"], vision["layers"] = side, count
        return model

    def _whole(self, config: dict[str, Any]) -> nn.Module:
        """Both towers of a configuration, untrained; the global randomness is left alone."""
        ensure_torchvision()
        import open_clip

        custom = config.pop("custom_text", False) or "hf_model_name" in config.get("text_cfg", {})
        kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
        with torch.random.fork_rng(devices=[]):
            whole: nn.Module = kind(**config)
        return whole

    # ---- network

    def build(self) -> nn.Module:
        """A fresh vision tower at the run's size; its weights mean nothing until loaded."""
        if self._template is None:
            whole: Any = self._whole(self.config())
            self._template = whole.visual
        template: nn.Module = copy.deepcopy(self._template)
        return template

    def base_weights(self) -> Weights:
        """The vision tower's weights, float32, position embeddings at the run's grid."""
        return self._weights_in(self._release().weights)

    def published(self, source: str) -> Weights:
        """A published expert: a whole CLIP's safetensors, or those of its vision tower alone."""
        place = model_folder(source, "expert", FILES)
        return self._weights_in(place if place.is_file() else self._weights(place))

    def _weights_in(self, file: Path) -> Weights:
        from safetensors import safe_open

        config = self.config()["vision_cfg"]
        side = config["image_size"] // config["patch_size"]
        weights: dict[str, Tensor] = {}
        with safe_open(file, framework="pt") as stored:
            names = set(stored.keys())
            prefix = "visual." if any(name.startswith("visual.") for name in names) else ""
            for name, target in self.build().state_dict().items():
                if prefix + name not in names:
                    raise ContractError(f"open-clip: '{file}' lacks '{prefix}{name}'")
                tensor = stored.get_tensor(prefix + name)
                if name == "positional_embedding" and tensor.shape != target.shape:
                    tensor = interpolated_positions(tensor, side)
                if tensor.shape != target.shape:
                    raise ContractError(
                        f"open-clip: '{name}' in '{file}' has shape {list(tensor.shape)}, the configuration needs "
                        f"{list(target.shape)}"
                    )
                weights[name] = tensor.float().clone() if tensor.is_floating_point() else tensor.clone()
        return weights

    def anatomy(self) -> Anatomy:
        """Blocks and heads of the tower as run."""
        vision = self.config()["vision_cfg"]
        shapes = {name: tuple(tensor.shape) for name, tensor in self.build().state_dict().items()}
        return describe(shapes, vision["width"] // vision.get("head_width", 64))

    def features(self, network: nn.Module, inputs: Any) -> Tensor:
        """Image embeddings ``[N, d]`` of images float32 in [0, 1] ``[N, 3, H, W]``, resized on their device."""
        release = self._release()
        images = resized(inputs, (self.resolution or release.model["vision_cfg"]["image_size"]), "bicubic")
        mean, deviation = (
            torch.tensor(v).view(3, 1, 1).to(images) for v in (release.mean, release.deviation)
        )
        embeddings: Tensor = network((images - mean) / deviation)
        return embeddings

    # ---- head

    def zero_shot(self, prompts: Sequence[Sequence[str]], device: torch.device) -> Weights | None:
        """The head from ``prompts``, by the release's text tower; None for ``head: probe``."""
        if self.head_kind == "probe":
            return None
        whole: Any = self._text_model().to(device).eval()
        tokens = self._tokens([sentence for texts in prompts for sentence in texts]).to(device)
        with torch.no_grad():
            rows = [whole.encode_text(part) for part in torch.split(tokens, TEXT_BATCH)]
        embeddings = torch.split(torch.cat(rows), [len(texts) for texts in prompts])
        return text_head(embeddings, whole.logit_scale.exp())

    def _text_model(self) -> nn.Module:
        """The whole model with all its weights; the vision tower at its own size."""
        from safetensors.torch import load_file

        whole = self._whole(copy.deepcopy(self._release().model))
        stored = load_file(self._release().weights)
        lacking = whole.load_state_dict(stored, strict=False).missing_keys
        if lacking:
            raise ContractError(f"open-clip: '{self._release().weights}' lacks '{lacking[0]}'")
        return whole.float()

    def _tokens(self, sentences: list[str]) -> Tensor:
        from open_clip.tokenizer import SimpleTokenizer

        text = self._release().model.get("text_cfg", {})
        if text.get("hf_tokenizer_name"):
            raise ContractError(
                f"open-clip: this text tower takes the tokenizer {text['hf_tokenizer_name']}, which is not "
                "supported; use head: probe"
            )
        tokens: Tensor = SimpleTokenizer(context_length=text.get("context_length", 77))(sentences)
        return tokens
