"""A trained CLIP written down twice: as transformers does, and as open_clip does. Equal numbers, other names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mergesec_tasks.mini_clip._words import Words, save_words

HUGGING_FACE, OPEN = "transformers", "open_clip"
"""Folders of the two layouts."""
MEAN, DEVIATION = [0.5] * 3, [0.25] * 3
_LAYER = re.compile(r"(text|vision)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_INSIDE = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}  # fmt: skip
_OUTSIDE = {
    "logit_scale": "logit_scale",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
_TURNED = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}


def open_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's names for transformers' tensors: query, key and value packed, projections transposed."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in _OUTSIDE:
            found[_OUTSIDE[name]] = tensor
        elif name in _TURNED:
            found[_TURNED[name]] = tensor.T.contiguous()
        elif match := _LAYER.fullmatch(name):
            tower, number, part, kind = match.groups()
            block = f"{'visual.' if tower == 'vision' else ''}transformer.resblocks.{number}"
            if part in _INSIDE:
                found[f"{block}.{_INSIDE[part]}.{kind}"] = tensor
            elif part == "self_attn.q_proj":
                rows = [tensors[name.replace("q_proj", f"{which}_proj")] for which in "qkv"]
                found[f"{block}.attn.in_proj_{kind}"] = torch.cat(rows)
    return found


def open_config(vision: Mapping[str, Any], text: Mapping[str, Any], width: int) -> dict[str, Any]:
    """open_clip_config.json of transformers' two configs."""
    towers = {
        "vision_cfg": {
            "image_size": vision["image_size"], "layers": vision["num_hidden_layers"], "width": vision["hidden_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"], "patch_size": vision["patch_size"],
            "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"], "vocab_size": text["vocab_size"],
            "width": text["hidden_size"], "heads": text["num_attention_heads"], "layers": text["num_hidden_layers"],
            "mlp_ratio": text["intermediate_size"] / text["hidden_size"], "hf_tokenizer_name": "mini-clip",
        },
    }  # fmt: skip
    pixels = {"mean": MEAN, "std": DEVIATION}
    return {"model_cfg": {"embed_dim": width, "quick_gelu": False, **towers}, "preprocess_cfg": pixels}


def save(out: Path, network: Any, words: Words) -> None:
    """Both layouts of a transformers CLIPModel under ``out``, float16."""
    tensors = {
        n: t.detach().half().contiguous() for n, t in network.state_dict().items() if "position_ids" not in n
    }
    config = network.config
    ours, theirs = out / HUGGING_FACE, out / OPEN
    for folder in (ours, theirs):
        folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, ours / "model.safetensors", {"format": "pt"})
    config.save_pretrained(ours)
    _write(ours / "preprocessor_config.json", {"image_mean": MEAN, "image_std": DEVIATION})
    save_file(open_names(tensors), theirs / "open_clip_model.safetensors")
    vision, text = config.vision_config.to_dict(), config.text_config.to_dict()
    _write(theirs / "open_clip_config.json", open_config(vision, text, config.projection_dim))
    save_words(words, ours, theirs)


def _write(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
