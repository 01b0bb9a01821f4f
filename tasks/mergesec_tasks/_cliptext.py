"""A CLIP's text tower beside its tokenizer and its vision tower: whether they were trained together, as far as files tell.

No torch: ``bench plan`` looks at local folders with this before anything runs, the backbones again before they load them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergesec.errors import UsageError
from mergesec.files import brief
from mergesec.modelfiles import CONFIG, Stored, header, read_json, shown, stored_tensors
from mergesec_tasks._configs import WIDTH, WORDS, Values, check_fields, check_tensors, checked, size, tower
from mergesec_tasks._words import TOKENIZER, check_old_words, check_words, encoded, read_tokenizer

OPEN_CONFIG, OPEN_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
OPEN_CONTEXT = 77
"""Places of a text tower whose release does not say how many."""
END = ("<|endoftext|>", "<end_of_text>")
OLD_END = 2
"""What configs of old releases call the end token: the tower looks for the largest number instead."""
TEXT_PROJECTION, VISUAL_PROJECTION, SCALE = (
    "text_projection.weight",
    "visual_projection.weight",
    "logit_scale",
)
OPEN_SIZES = {
    "vocab_size": size(49408, WORDS), "context_length": size(OPEN_CONTEXT, WIDTH), "width": size(512, WIDTH),
}  # fmt: skip
"""Of a release's text_cfg: what its tensors are held against."""


def check_text_tower(folder: Path, who: str) -> Values:
    """The text tower's config. UsageError, naming the file and both values, unless tensors, tokenizer and projections of a
    folder of transformers are of one CLIP."""
    path = folder / CONFIG
    raw = read_json(path, who)
    values = checked(tower(raw, "text", path, who), path, who, ("clip_text_model",))
    stored = stored_tensors(folder, who)
    check_tensors(values, stored, path, who)
    _check_projections(stored, TEXT_PROJECTION, (0, 1), values["hidden_size"], VISUAL_PROJECTION, 0, who)
    check, size = check_words if (folder / TOKENIZER).exists() else check_old_words, values["vocab_size"]
    _check_end(check(folder, size, who), size, values["eos_token_id"], folder / TOKENIZER, who)
    return values


def check_whole(folder: Path, width: int, who: str) -> dict[str, Stored]:
    """The projections of both towers and the logit scale; UsageError if a folder of transformers lacks one, or a vision
    tower of ``width`` and they are not of one CLIP."""
    stored, names = stored_tensors(folder, who), (VISUAL_PROJECTION, TEXT_PROJECTION, SCALE)
    lost = next((name for name in names if name not in stored), "")
    if lost:
        raise UsageError(
            who, f"no tensor '{lost}' in {str(folder)!r}; a whole CLIP is needed, not its vision tower alone (that is a "
            "backbone for hf-vit, or an expert)",
        )  # fmt: skip
    visual, text, scale = shapes = [stored[name].shape for name in names]
    fits = len(visual) == len(text) == 2 and visual[0] == text[0] and visual[1] == width
    if not fits or math.prod(scale) != 1:
        raise UsageError(
            who, f"'{VISUAL_PROJECTION}', '{TEXT_PROJECTION}' and '{SCALE}' in {str(folder)!r} have the shapes "
            f"{[list(shape) for shape in shapes]}; expected [d, {width}], [d, h] and one number",
        )  # fmt: skip
    return {name: stored[name] for name in names}


def check_context(prompt: str, tokens: int, most: int, who: str) -> None:
    """UsageError, naming the prompt, if a text tower of ``most`` places would read it only in part."""
    if tokens > most:
        raise UsageError(
            who,
            f"the prompt {brief(prompt)!r} has {tokens} tokens, the text tower's context has {most}; use head: probe",
        )


def inspect_prompts(parameters: Mapping[str, Any], where: str, prompts: Mapping[str, Sequence[str]]) -> None:
    """UsageError, naming the grid's field and the task, for prompts that are longer than a local folder's text tower
    takes. What lies on the hub is looked at when it has been fetched."""
    place = Path(str(parameters["model"])).expanduser()
    if parameters["head"] != "zero-shot" or not parameters["model"] or not (place / TOKENIZER).is_file():
        return
    most = _context(place, f"{where}.model")
    if not most:
        return
    words = read_tokenizer(place, f"{where}.model")
    for task, sentences in prompts.items():
        for sentence in sentences:
            tokens = 2 + len(encoded(words, sentence, f"{where}.model").ids)  # a start and an end
            check_context(sentence, tokens, most, f"{where}.model ({task})")


def _context(place: Path, who: str) -> int:
    """Places of the text tower that reads by the folder's own tokenizer; 0 if none does."""
    if (place / CONFIG).is_file():
        return int(check_text_tower(place, who)["max_position_embeddings"])
    model = read_json(place / OPEN_CONFIG, who).get("model_cfg") if (place / OPEN_CONFIG).is_file() else None
    text = model.get("text_cfg") if isinstance(model, dict) else None
    length = text.get("context_length", OPEN_CONTEXT) if isinstance(text, dict) else 0
    if not isinstance(text, dict) or not text.get("hf_tokenizer_name") or type(length) is not int:
        return 0
    if type(text.get("vocab_size")) is int:
        check_open_words(place, text["vocab_size"], who)  # by another CLIP's tokenizer lengths say nothing
    return length


def _check_projections(
    stored: Mapping[str, Stored],
    text: str,
    sides: tuple[int, int],
    width: int,
    visual: str,
    side: int,
    who: str,
) -> None:
    """Both projections end in the same space, and the text's begins at its tower; ``sides``: where those are."""
    if any(name not in stored or len(stored[name].shape) != 2 for name in (text, visual)):
        return  # no whole CLIP: what loads it says so
    ends, begins = (stored[text].shape[i] for i in sides)
    if begins != width:
        raise UsageError(
            who, f"{brief(str(stored[text].file))!r}: '{text}' takes features of width {begins}, the text tower has {width}: "
            "it is another CLIP's",
        )  # fmt: skip
    if ends != stored[visual].shape[side]:
        raise UsageError(
            who, f"{brief(str(stored[text].file))!r}: '{text}' ends in {ends} dimensions, '{visual}' in "
            f"{stored[visual].shape[side]}: the text tower is another CLIP's",
        )  # fmt: skip


def _check_end(words: Mapping[str, int], size: int, told: Any, path: Path, who: str) -> None:
    """The features of a sentence stand at its end token."""
    found = next((words[name] for name in END if name in words), None)
    wanted = size - 1 if told in (None, OLD_END) else told
    if found != wanted:
        raise UsageError(
            who, f"{brief(str(path))!r}: the end token has the number {shown(found)}, the text tower looks for "
            f"{shown(wanted)}: the tokenizer is another CLIP's",
        )  # fmt: skip


# --------------------------------------------------------------------------- open_clip


def inspect_open(
    backbone: str, parameters: Mapping[str, Any], where: str, experts: Mapping[str, str]
) -> None:
    """UsageError, naming the grid's field, for a local release whose text tower, tokenizer and vision tower do not go
    together; of a single file without a config nothing is known yet."""
    place = Path(str(parameters["model"])).expanduser()
    file, config = place / OPEN_WEIGHTS, place / OPEN_CONFIG
    if (
        parameters["head"] != "zero-shot"
        or not parameters["model"]
        or not (file.is_file() and config.is_file())
    ):
        return
    who = f"{where}.model"
    model = read_json(config, who).get("model_cfg")
    text = model.get("text_cfg") if isinstance(model, dict) else None
    if not isinstance(text, dict):
        return
    sizes = {name: text[name] for name in OPEN_SIZES if name in text}
    check_fields(sizes, OPEN_SIZES, (), f"{brief(str(config))!r}: text_cfg", who)
    told = {name: field.default for name, field in OPEN_SIZES.items()}
    check_open_text(place, {**told, **text}, header(file, who), who)


def check_open_text(folder: Path, text: Mapping[str, Any], stored: Mapping[str, Stored], who: str) -> None:
    """UsageError, naming the tensor or file, unless a release's text tower is what text_cfg describes, and its own
    tokenizer, if it names one, speaks its words."""
    size, width = text["vocab_size"], text["width"]
    for name, wanted in (
        ("token_embedding.weight", (size, width)), ("positional_embedding", (text["context_length"], width))
    ):  # fmt: skip
        if name in stored and stored[name].shape != wanted:
            raise UsageError(
                who, f"{brief(str(stored[name].file))!r}: tensor '{name}' has the shape {list(stored[name].shape)}, by "
                f"text_cfg it would be {list(wanted)}",
            )  # fmt: skip
    _check_projections(stored, "text_projection", (1, 0), width, "visual.proj", 1, who)
    if text.get("hf_tokenizer_name"):
        check_open_words(folder, size, who)


def check_open_words(folder: Path, size: int, who: str) -> None:
    """UsageError unless a release's folder holds a tokenizer whose words, the end token last, are the network's."""
    words = check_words(folder, size, who)
    _check_end(words, size, None, folder / TOKENIZER, who)
