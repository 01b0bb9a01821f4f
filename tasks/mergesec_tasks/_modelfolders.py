"""Bases and published experts as folders of transformers: each is one network, and an expert's is the base's.

No torch: ``bench plan`` looks at local folders with this before anything runs, the backbones again before they load
them. Every complaint is a UsageError of ``who``, a grid's field or a backbone's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mergesec.adapterconfig import CONFIG as ADAPTER
from mergesec.adapterconfig import is_adapter, read_lora
from mergesec.errors import UsageError
from mergesec.files import brief
from mergesec.modelfiles import CONFIG, stored_tensors
from mergesec_tasks._adapterfit import check_factors, check_frozen_output
from mergesec_tasks._cliptext import check_text_tower, check_whole
from mergesec_tasks._configs import (
    Values,
    check_same_function,
    check_tensors,
    layers_of,
    positions_of,
    read_config,
)
from mergesec_tasks._preprocessing import check_same_pixels, read_pixels
from mergesec_tasks._words import (
    check_between,
    check_many_words,
    check_same_words,
    check_words,
    tokens_around,
)

IMAGES = ("vit", "deit", "dinov2", "clip_vision_model")
ENCODERS = ("bert", "roberta", "xlm-roberta", "distilbert")
DECODERS = ("gpt2", "llama", "qwen2", "mistral")


class Kinds(NamedTuple):
    """What a backbone reads: types of models, whether its inputs are images or texts, and whether it reads the
    network's own output layer."""

    types: Sequence[str]
    images: bool
    output: bool = False


KINDS = {
    "hf-vit": Kinds(IMAGES, True),
    "clip": Kinds(("clip_vision_model",), True),
    "hf-text": Kinds(ENCODERS, False),
    "hf-causal": Kinds(DECODERS, False, True),
}
"""By the backbone's name."""


def check_base(folder: Path, who: str, kinds: Kinds) -> Values:
    """The config of a base's folder, once config and tensors are of one network."""
    if is_adapter(folder, who):
        raise UsageError(who, f"{brief(str(folder))!r} holds an adapter ({ADAPTER}), not a network")
    values = read_config(folder, who, kinds.types)
    check_tensors(values, stored_tensors(folder, who), folder / CONFIG, who)
    return values


def check_expert(folder: Path, base: Path, values: Values, who: str, kinds: Kinds) -> None:
    """UsageError unless a folder holds an adapter that can be merged, or a network with the base's function for equal
    weights; what makes its inputs may be missing, but not differ."""
    if is_adapter(folder, who):
        check_factors(folder, stored_tensors(base, who), read_lora(folder, who), who)
        if kinds.output:
            check_frozen_output(folder, who)
    else:
        own = read_config(folder, who, kinds.types)
        check_same_function(values, own, base / CONFIG, folder / CONFIG, who)
        check_tensors(own, stored_tensors(folder, who), folder / CONFIG, who)
    if kinds.images:
        check_same_pixels(base, folder, str(values["model_type"]), who)
    else:
        check_same_words(base, folder, who)


# --------------------------------------------------------------------------- for the plan


def inspect(backbone: str, parameters: Mapping[str, Any], where: str, experts: Mapping[str, str]) -> None:
    """UsageError, naming the grid's field, for local folders that backbones here would refuse later. What lies on the
    hub is looked at when it has been fetched."""
    name = "model" if "model" in parameters else "path"
    base, kinds = Path(str(parameters[name])).expanduser(), KINDS[backbone]
    if not parameters[name] or not base.exists():
        return
    values = check_base(base, f"{where}.{name}", kinds)
    _check_asked(values, parameters, where)
    if backbone == "clip":
        check_whole(base, int(values["hidden_size"]), f"{where}.{name}")
    if kinds.images:
        read_pixels(base, str(values["model_type"]), f"{where}.{name}")
        if parameters.get("head") == "zero-shot":
            check_text_tower(base, f"{where}.{name}")
    else:
        words = check_words(base, int(values["vocab_size"]), f"{where}.{name}")
        check_many_words(base, words, int(values["vocab_size"]), f"{where}.{name}")
    if backbone == "hf-text":
        longest = parameters.get("max_length") or positions_of(values)
        check_between(longest, tokens_around(base, f"{where}.{name}"), where)
    for field, source in experts.items():
        place = Path(source).expanduser()
        if source and place.exists():
            check_expert(place, base, values, field, kinds)


def _check_asked(values: Values, parameters: Mapping[str, Any], where: str) -> None:
    """UsageError, naming the grid's field, for more layers or places than the network has, or a part of a patch."""
    own, asked = layers_of(values), parameters.get("layers", 0)
    if asked > own:
        raise UsageError(f"{where}.layers", f"{asked} exceed the {own} of the model")
    side = parameters.get("resolution", 0)
    if side and side % values["patch_size"]:
        raise UsageError(
            f"{where}.resolution", f"{side} is not a multiple of the patch size {values['patch_size']}"
        )
    longest = parameters.get("max_length", 0)
    if longest and longest > positions_of(values):
        raise UsageError(
            f"{where}.max_length",
            f"{longest} exceeds the {positions_of(values)} positions of the model's context",
        )
