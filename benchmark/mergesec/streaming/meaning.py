"""Whether tensors are a network's weights, which can be averaged, or something that stands for them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mergesec.errors import UsageError
from mergesec.files import brief, plain
from mergesec.streaming.mapped import Extent, LazyWeights

ADAPTER = "adapter_config.json"
QUANTISED = ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quantization_config.json")
"""Files in which tools for quantisation say what they did."""
FIELDS = ("quantization_config", "compression_config", "quantization")
"""Fields of config.json that say it."""
FACTORS = re.compile(
    r"(^|\.)base_model\.model\.|(^|[._])(lora|dora)([._]|$)|(^|\.)prompt_embeddings$"
    r"|(^|\.)((hada|lokr|oft|boft|ia3|vera|randlora|vblora)_)",
    re.IGNORECASE,
)
"""Names of tensors that adapters have: of factors, scales, rotations and prompts, and what peft puts before any."""
COMPANIONS = re.compile(
    r"(^|\.)(SCB|qweight|qzeros|g_idx|absmax|nested_absmax|quant_map|nested_quant_map|quant_state\..*|weight_format"
    r"|(weight|input|output|k|v)_(scale|zero_point)(_inv|_2)?|weight_(packed|shape|global_scale|g_idx)"
    r"|weight\._(data|scale|zeropoint))$"
)
"""Names of tensors that stand beside codes: of bitsandbytes, GPTQ, AWQ, compressed-tensors, ModelOpt, quanto, fp8."""
CODES = ("weight", "W_q", "_blocks", "_scales")
"""How names of codes end."""
SIDES, LETTERS = 64, 500
"""What torch computes with; what a name of a tensor has at most."""


def check_config(folder: Path, config: Mapping[str, Any], field: str) -> None:
    """UsageError if a folder says that its tensors are an adapter or quantised."""
    if (folder / ADAPTER).exists():
        raise UsageError(
            field,
            f"{folder} holds an adapter ({ADAPTER}), whose factors cannot be merged apart; merge it into its base "
            "first (peft: merge_and_unload, then save_pretrained elsewhere), or publish it to a grid as it is",
        )
    for name in QUANTISED:
        if (folder / name).exists():
            raise UsageError(field, f"{folder} is quantised, says {name}; {_DEQUANTISE}")
    for key, value in _said(config):
        if value not in (None, {}):
            raise UsageError(field, f"{folder} is quantised, says {key} in config.json; {_DEQUANTISE}")


_DEQUANTISE = (
    "codes cannot be merged: save the dequantised weights in float16, bfloat16 or float32 "
    "(transformers: from_pretrained, dequantize, save_pretrained) and merge those"
)


def _said(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a config, or that of one of its parts, says about quantisation."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        yield from ((key, part[key]) for key in FIELDS if key in part)


def check_tensors(weights: LazyWeights, field: str) -> None:
    """UsageError, naming the tensor, unless names and types are those of weights that can be merged."""
    for name, extent in weights.extents.items():
        if reason := _strange(name, extent):
            raise UsageError(field, f"{extent.file}: tensor {brief(name)!r} {reason}")


def _strange(name: str, extent: Extent) -> str:
    if plain(name) != name or not 0 < len(name) <= LETTERS:
        return f"has a name that is empty, cannot be printed or is longer than {LETTERS} characters"
    if len(extent.shape) > SIDES or math.prod(side or 1 for side in extent.shape) >= 1 << 63:
        return f"has the shape {brief(str(list(extent.shape)))}, with which nothing can be computed"
    if FACTORS.search(name):
        return "is a part of an adapter, which cannot be merged apart; merge the adapter into its base first"
    if extent.dtype.is_floating_point and extent.dtype.itemsize == 1:
        return f"has type {_name(extent.dtype)}; {_DEQUANTISE}"
    if COMPANIONS.search(name):
        return f"stands beside codes of quantised weights; {_DEQUANTISE}"
    if not extent.dtype.is_floating_point and name.endswith(CODES):
        return f"holds weights as {_name(extent.dtype)}; {_DEQUANTISE}"
    return ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


TRIFLES = re.compile(
    r"^_|name_or_path$|version$|architectures$|dtype$|label|problem_type|task|token_id|use_cache|output_|return_|summary_"
    r"|drop|initializer|_loss|gradient_checkpointing|pretraining_tp|torchscript|auto_map|vocab_size|transformers_weights"
    r"|attn_implementation|encoder_stride|pooler_|mask_time|mask_feature|apply_spec"
)
"""Fields of a config that do not decide what a body makes of its weights, or that shapes of tensors decide."""


def other_function(base: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """A field in which two configs of the same weights make another function of them, in words; empty if none.

    A field that only one of them has is a release's default. One may be a part of the other: a tower of CLIP.
    """
    base, config = _part(base, config), _part(config, base)
    for name, value in sorted(
        base.items(), key=lambda item: item[0] != "model_type"
    ):  # what says most goes first
        given = config.get(name, value)
        if TRIFLES.search(name) or given == value:
            continue
        if isinstance(given, dict) and isinstance(value, dict):
            if reason := other_function(value, given):
                return reason
            continue
        return f"{brief(name)} in its config.json is {brief(repr(given))}, in the base's {brief(repr(value))}"
    return ""


def _part(config: Mapping[str, Any], of: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of ``config`` that is of the other's kind; itself if there is none."""
    kind = of.get("model_type")
    if kind is None or config.get("model_type") == kind:
        return config
    parts = [
        value for value in config.values() if isinstance(value, dict) and value.get("model_type") == kind
    ]
    return parts[0] if len(parts) == 1 else config
