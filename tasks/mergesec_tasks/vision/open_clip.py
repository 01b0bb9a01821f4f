"""CLIP through open_clip: its vision tower, projection included, is what is fine-tuned and merged."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergesec.anatomy import Anatomy, describe
from mergesec.compat import ensure_torchvision
from mergesec.contracts import Backbone, Weights
from mergesec.errors import UsageError
from mergesec.files import brief, is_file
from mergesec.modelfiles import Stored, header, read_json, shown
from mergesec_tasks._cliptext import OPEN_SIZES, check_open_text
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
from mergesec_tasks._preprocessing import CLIP, check_three
from mergesec_tasks._transformers import clip_tokenizer, complaining, fitting_numbers, numbers_of
from mergesec_tasks._words import TOKENIZER
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
    "inspect": "mergesec_tasks._cliptext:inspect_open",
    "inspect_tasks": "mergesec_tasks._cliptext:inspect_prompts",
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

WHO, CONFIG = "open-clip", "open_clip_config.json"
FILES = ("*.json", "*.safetensors", "*.txt")
RATIO = Field(4.0, "a number above 0, at most 64", lambda v: type(v) in (int, float) and 0 < v <= 64)
SCALE = Field(None, "null or a number", lambda v: v is None or (type(v) in (int, float) and abs(v) < 1e6))
FLAGS = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
MODEL = {
    "embed_dim": size(512, WIDTH), "quick_gelu": flag(False), "custom_text": flag(False), "init_logit_scale": SCALE,
    "init_logit_bias": SCALE, "nonscalar_logit_scale": one_of(False), "multimodal_cfg": one_of(None),
}  # fmt: skip
LAYOUT = {
    "layers": size(12, LAYERS), "width": size(768, WIDTH), "mlp_ratio": RATIO, "ls_init_value": SCALE,
    "final_ln_after_pool": flag(False), "output_tokens": one_of(False), "act_kwargs": one_of(None, {}),
    "norm_kwargs": one_of(None, {}), "block_type": one_of(None, "default"), **{name: flag(False) for name in FLAGS},
}  # fmt: skip
VISION = {
    **LAYOUT, "image_size": size(224, PIXELS), "patch_size": size(16, PIXELS), "head_width": size(64, WIDTH),
    "patch_dropout": share(0.0), "attentional_pool": one_of(False), "no_ln_pre": flag(False),
    "pos_embed_type": one_of("learnable", "sin_cos_2d"), "pool_type": one_of("tok", "avg"),
}  # fmt: skip
TEXT = {
    **LAYOUT, **OPEN_SIZES, "heads": size(8, HEADS),
    "hf_tokenizer_name": Field(None, "a name", lambda v: v is None or isinstance(v, str)), "embed_cls": one_of(False),
    "pad_id": one_of(0), "eos_id": one_of(2), "no_causal_mask": flag(False), "pool_type": one_of("argmax", "last", "first"),
    "proj_bias": flag(False), "proj_type": one_of("linear", "none"), "tokenizer_mode": one_of(None),
}  # fmt: skip
"""Fields of a release's model_cfg, vision_cfg and text_cfg that are handed to open_clip, and what they may be."""
UNUSED = {"timm_pool", "timm_proj", "timm_drop", "attn_pooler_queries", "attn_pooler_heads"}
PLAIN_TEXT = {"context_length": 8, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
"""A text tower that is built beside the vision tower and thrown away."""


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
            place = model_folder(self.source, WHO, FILES)
            told = _told(place)
            model = told.get("model_cfg")
            model = self._named() if model is None else model
            _check_model(model, f"{brief(str(_folder(place) / CONFIG))!r}: model_cfg")
            pixels = told.get("preprocess_cfg") or {}
            mean, deviation = pixels.get("mean") or CLIP[0], pixels.get("std") or CLIP[1]
            self._found = _Release(_weights(place), model, tuple(mean), tuple(deviation))
        return self._found

    def _check_tower(self, stored: Mapping[str, Stored], model: dict[str, Any]) -> None:
        whole = any(name.startswith("visual.") for name in stored)
        check_held(lambda: self._visual(model), stored, "visual." if whole else "", (), WHO)

    def _named(self) -> dict[str, Any]:
        ensure_torchvision()
        import open_clip

        found = open_clip.get_model_config(self.architecture) if self.architecture else None
        if found is None:
            raise UsageError(
                WHO, f"no {CONFIG} beside the weights, and architecture {self.architecture!r} is not one of open_clip's "
                "names (open_clip.list_models())",
            )  # fmt: skip
        return dict(found)

    def config(self) -> dict[str, Any]:
        """The release's model configuration, ``resolution`` and ``layers`` applied and checked."""
        model = copy.deepcopy(self._release().model)
        vision = model["vision_cfg"]
        patch, own = vision.get("patch_size", 16), vision.get("layers", 12)
        side, count = self.resolution or vision.get("image_size", 224), self.layers or own
        if side % patch:
            raise UsageError(WHO, f"resolution {side} is not a multiple of the patch size {patch}")
        if count > own:
            raise UsageError(WHO, f"layers {count} exceed the {own} of the model")
        vision |= {
            "image_size": side,
            "layers": count,
            "patch_size": patch,
            "width": vision.get("width", 768),
        }
        return model

    def _whole(self, config: dict[str, Any]) -> nn.Module:
        """Both towers of a configuration, untrained; the global randomness is left alone."""
        ensure_torchvision()
        import open_clip

        kind = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
        names = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale", "init_logit_bias")
        given = {n: config[n] for n in names if config.get(n) is not None}
        with torch.random.fork_rng(devices=[]), complaining(WHO, f"open_clip builds no network of {given}"):
            whole: nn.Module = kind(**copy.deepcopy(given))
        return whole

    def _visual(self, config: dict[str, Any]) -> nn.Module:
        """The vision tower of a configuration, untrained."""
        whole: Any = self._whole({**config, "text_cfg": PLAIN_TEXT, "custom_text": False})
        visual: nn.Module = whole.visual
        return visual

    # ---- network

    def build(self) -> nn.Module:
        """A fresh vision tower at the run's size; its weights mean nothing until loaded."""
        if self._template is None:
            release = self._release()
            self._check_tower(header(release.weights, WHO), release.model)
            self._template = self._visual(self.config())
        template: nn.Module = copy.deepcopy(self._template)
        return template

    def base_weights(self) -> Weights:
        """The vision tower's weights, float32, position embeddings at the run's grid."""
        return self._weights_in(self._release().weights)

    def published(self, source: str) -> Weights:
        """A published expert: a whole CLIP's safetensors, or those of its vision tower alone."""
        place = model_folder(source, "expert", FILES)
        told, own = _told(place), self._release()
        stored = header(_weights(place), WHO)
        if told.get("model_cfg") is not None:
            _check_model(told["model_cfg"], f"{brief(str(_folder(place) / CONFIG))!r}: model_cfg")
            _check_same(_function(own.model), _function(told["model_cfg"]), _folder(place))
        pixels = told.get("preprocess_cfg") or {}
        _check_same({"mean": list(own.mean), "std": list(own.deviation)}, pixels, _folder(place))
        self._check_tower(stored, own.model)
        return self._weights_in(_weights(place))

    def _weights_in(self, file: Path) -> Weights:
        config = self.config()["vision_cfg"]
        side = config["image_size"] // config["patch_size"]
        prefix = "visual." if any(name.startswith("visual.") for name in header(file, WHO)) else ""
        wanted = {name: tuple(target.shape) for name, target in self.build().state_dict().items()}
        weights: dict[str, Tensor] = {}
        for name, tensor in read_tensors(file, prefix, wanted).items():
            if name == "positional_embedding" and tuple(tensor.shape) != wanted[name]:
                tensor = interpolated_positions(tensor, side)
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

        release = self._release()
        text = release.model.get("text_cfg")
        where = f"{brief(str(release.weights.parent / CONFIG))!r}: text_cfg"
        if not isinstance(text, dict):
            raise UsageError(WHO, f"{where} {shown(text)} is not a mapping of fields")
        check_fields(text, TEXT, (), where, WHO)
        if text.get("hf_tokenizer_name") and not (release.weights.parent / TOKENIZER).exists():
            raise UsageError(
                WHO, f"this text tower takes the tokenizer {shown(text['hf_tokenizer_name'])}, and there is no {TOKENIZER} "
                "beside the weights; use head: probe",
            )  # fmt: skip
        given = {name: text.get(name, TEXT[name].default) for name in TEXT}
        check_open_text(release.weights.parent, given, header(release.weights, WHO), WHO)
        check_held(lambda: self._whole(release.model), header(release.weights, WHO), "", (), WHO)
        whole = self._whole(release.model)
        with complaining(WHO, f"open_clip does not load {str(release.weights)!r}"):
            whole.load_state_dict(load_file(release.weights))
        return whole.float()

    def _tokens(self, sentences: list[str]) -> Tensor:
        """``[N, context]``, filled up with zeros, by the folder's own tokenizer or open_clip's."""
        text = self._release().model["text_cfg"]
        length, size = (text.get(name, TEXT[name].default) for name in ("context_length", "vocab_size"))
        tokenize = self._tokenizer(text.get("hf_tokenizer_name"), size)
        tokens = torch.zeros(len(sentences), length, dtype=torch.long)
        for row, own in zip(tokens, fitting_numbers(tokenize, sentences, length, WHO), strict=True):
            row[: len(own)] = torch.tensor(own)
        return tokens

    def _tokenizer(self, named: str | None, size: int) -> Callable[[Sequence[str]], list[list[int]]]:
        """Sentences to the numbers of their tokens, start and end included."""
        if named:
            own = clip_tokenizer(self._release().weights.parent, size, WHO)
            return lambda texts: numbers_of(own, texts, WHO)
        from open_clip.tokenizer import SimpleTokenizer

        simple = SimpleTokenizer()
        if simple.vocab_size != size:
            raise UsageError(
                WHO, f"the text tower has a vocab_size of {size}, open_clip's tokenizer {simple.vocab_size} words; a release "
                f"with a {TOKENIZER} of its own names it in text_cfg (hf_tokenizer_name)",
            )  # fmt: skip
        return lambda texts: [
            [simple.sot_token_id, *simple.encode(text), simple.eot_token_id] for text in texts
        ]


# --------------------------------------------------------------------------- files


def _folder(place: Path) -> Path:
    return place if place.is_dir() else place.parent


def _told(place: Path) -> dict[str, Any]:
    """What open_clip_config.json says, its pixels checked; empty without one."""
    path = _folder(place) / CONFIG
    if not path.exists() and not path.is_symlink():
        return {}
    told = read_json(path, WHO)
    pixels = told.get("preprocess_cfg") or {}
    if not isinstance(pixels, dict):
        raise UsageError(
            WHO, f"{brief(str(path))!r}: preprocess_cfg {shown(pixels)} is not a mapping of fields"
        )
    check_three(pixels, ("mean", "std"), f"{brief(str(path))!r}: preprocess_cfg", WHO)
    return told


def _check_model(model: Any, where: str) -> None:
    """UsageError, naming the field, for a model_cfg that says what is not known."""
    if not isinstance(model, dict):
        raise UsageError(WHO, f"{where} {shown(model)} is not a mapping of fields")
    check_fields(model, MODEL, {"vision_cfg", "text_cfg", "cast_dtype", "output_dict"}, where, WHO)
    vision = model.get("vision_cfg")
    if not isinstance(vision, dict) or not isinstance(model.get("embed_dim"), int):
        raise UsageError(WHO, f"{where} needs embed_dim and vision_cfg, a mapping of fields")
    if vision.get("timm_model_name") or isinstance(vision.get("layers"), list):
        raise UsageError(WHO, f"{where}: only open_clip's own vision transformers are taken")
    check_fields(vision, VISION, UNUSED, f"{where}.vision_cfg", WHO)


def _function(model: dict[str, Any]) -> dict[str, Any]:
    """What decides the function of a vision tower."""
    tower = {f"vision_cfg.{n}": model["vision_cfg"].get(n, f.default) for n, f in VISION.items() if f.decides}
    return {**tower, "quick_gelu": model.get("quick_gelu", False), "embed_dim": model["embed_dim"]}


def _check_same(ours: Mapping[str, Any], theirs: Mapping[str, Any], folder: Path) -> None:
    """UsageError, naming the field and both values, where two releases differ."""
    for name, own in ours.items():
        other = theirs.get(name)
        if other is not None and other != own:
            raise UsageError(
                WHO, f"{brief(str(folder / CONFIG))!r}: {name} is {shown(other)}, for the base it is {shown(own)}: the same "
                "weights would be another function",
            )  # fmt: skip


def _weights(place: Path) -> Path:
    if place.is_file():
        return place
    found = sorted(p for p in place.glob("*.safetensors") if is_file(p))
    named = [p for p in found if p.name == "open_clip_model.safetensors"] or found
    if len(named) != 1:
        raise UsageError(
            WHO, f"'{place}' holds {len(named)} safetensors files, needs one (other formats are not read)"
        )
    return named[0]
