"""What a config.json of transformers says of a network, field by field: known values are taken, all else is refused.

A table per model type holds every field that decides the function, with the default that stands for its absence
(transformers leaves out what is at its default). No torch: a grid's plan compares configs, too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mergesec.errors import UsageError, nearest
from mergesec.files import brief
from mergesec.modelfiles import COMPUTED, CONFIG, Stored, read_json, shown

Values = dict[str, Any]


class Field(NamedTuple):
    """One field of a config: what stands for its absence, what it may be, and what for."""

    default: Any
    told: str
    """What is accepted, in words."""
    fits: Callable[[Any], bool]
    decides: bool = True
    """Whether two networks of the same weights compute something else where they differ in it."""


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def size(default: int, most: int) -> Field:
    return Field(default, f"a whole number from 1 to {most}", lambda v: _whole(v) and 1 <= v <= most)


def size_or_none(default: int | None, most: int) -> Field:
    fits = size(1, most).fits
    return Field(default, f"null or a whole number from 1 to {most}", lambda v: v is None or fits(v))


def token(default: Any, decides: bool = False) -> Field:
    """The number of a token, or several."""

    def one(value: Any) -> bool:
        return value is None or (_whole(value) and -1 <= value <= WORDS)

    def fits(value: Any) -> bool:
        return all(map(one, value)) if isinstance(value, list) else one(value)

    return Field(default, "null or the number of a token", fits, decides)


def small(default: float) -> Field:
    """An ε of a norm."""
    return Field(default, "a number above 0 and below 1", lambda v: _finite(v) and 0 < v < 1)


def share(default: float) -> Field:
    """A rate of dropout: of training only."""
    return Field(default, "a number from 0 to below 1", lambda v: _finite(v) and 0 <= v < 1, False)


def one_of(default: Any, *others: Any) -> Field:
    known = (default, *others)
    told = "one of " + ", ".join(map(repr, known)) if others else repr(default)
    return Field(default, told, lambda v: any(type(v) is type(k) and v == k for k in known))


def flag(default: bool) -> Field:
    return one_of(default, not default)


WIDTH, HEADS, LAYERS, WORDS, POSITIONS, PIXELS = 1 << 16, 1024, 1000, 1 << 22, 1 << 24, 4096
ACTIVATIONS = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish")


def activation(default: str) -> Field:
    return one_of(default, *(name for name in ACTIVATIONS if name != default))


def _rotation(value: Any) -> bool:
    """Parameters of rotary positions: a known kind, and numbers."""
    if not isinstance(value, dict):
        return value is None
    kinds = [value[key] for key in ("rope_type", "type") if key in value]
    numbers = [v for key, v in value.items() if key not in ("rope_type", "type")]
    known = all(kind in ("default", "linear", "dynamic", "yarn", "llama3") for kind in kinds)
    return known and all(v is None or isinstance(v, bool) or (_finite(v) and v >= 0) for v in numbers)


ROTATIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ("original_max_position_embeddings",)),
    "dynamic": (("factor",), ("original_max_position_embeddings",)),
    "yarn": (("factor",), (
        "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
        "truncate", "finetuned",
    )),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), (),
    ),
}  # fmt: skip
"""What each kind of rotary positions needs, and what else it may have."""
ROTATION = "null, or a rope_type default, linear, dynamic, yarn or llama3 with numbers"


_TRANSFORMER: dict[str, Field] = {
    "hidden_size": size(768, WIDTH), "num_hidden_layers": size(12, LAYERS), "num_attention_heads": size(12, HEADS),
    "intermediate_size": size(3072, 16 * WIDTH), "hidden_act": activation("gelu"),
    "hidden_dropout_prob": share(0.0), "attention_probs_dropout_prob": share(0.0),
}  # fmt: skip
_PATCHES: dict[str, Field] = {
    "image_size": size(224, PIXELS), "patch_size": size(16, PIXELS), "num_channels": one_of(3),
}  # fmt: skip
_VIT = {**_TRANSFORMER, **_PATCHES, "layer_norm_eps": small(1e-12), "qkv_bias": flag(True)}
_BERT: dict[str, Field] = {
    **_TRANSFORMER, "layer_norm_eps": small(1e-12), "vocab_size": size(30522, WORDS),
    "max_position_embeddings": size(512, POSITIONS), "type_vocab_size": size(2, WIDTH),
    "position_embedding_type": one_of("absolute"), "pad_token_id": token(0),
    "hidden_dropout_prob": share(0.1), "attention_probs_dropout_prob": share(0.1),
}  # fmt: skip
_LLAMA: dict[str, Field] = {
    "hidden_size": size(4096, WIDTH), "num_hidden_layers": size(32, LAYERS), "num_attention_heads": size(32, HEADS),
    "num_key_value_heads": size_or_none(None, HEADS), "head_dim": size_or_none(None, WIDTH),
    "intermediate_size": size(11008, 16 * WIDTH), "hidden_act": activation("silu"), "rms_norm_eps": small(1e-6),
    "vocab_size": size(32000, WORDS), "max_position_embeddings": size(2048, POSITIONS),
    "tie_word_embeddings": flag(False), "attention_dropout": share(0.0), "pad_token_id": token(None),
    "rope_theta": Field(None, "a number above 0", lambda v: v is None or (_finite(v) and v > 0)),
    "rope_scaling": Field(None, ROTATION, _rotation), "rope_parameters": Field(None, ROTATION, _rotation),
}  # fmt: skip
_CLIP: dict[str, Field] = {
    **{name: field for name, field in _TRANSFORMER.items() if field.decides}, "hidden_act": activation("quick_gelu"), "layer_norm_eps": small(1e-5),
    "attention_dropout": share(0.0),
}  # fmt: skip

TABLES: dict[str, dict[str, Field]] = {
    "vit": _VIT,
    "deit": _VIT,
    "dinov2": {
        **{k: f for k, f in _VIT.items() if k != "intermediate_size"}, "layer_norm_eps": small(1e-6),
        "patch_size": size(14, PIXELS), "mlp_ratio": size(4, 256), "use_swiglu_ffn": flag(False),
        "use_mask_token": Field(True, "true or false", lambda v: isinstance(v, bool), False),
        "drop_path_rate": share(0.0),
    },
    "clip_vision_model": {**_CLIP, **_PATCHES, "patch_size": size(32, PIXELS)},
    "clip_text_model": {
        **_CLIP, "hidden_size": size(512, WIDTH), "intermediate_size": size(2048, 16 * WIDTH),
        "num_attention_heads": size(8, HEADS), "vocab_size": size(49408, WORDS),
        "max_position_embeddings": size(77, POSITIONS), "pad_token_id": token(1), "bos_token_id": token(49406),
        "eos_token_id": Field(49407, "the number of a token", lambda v: _whole(v) and 0 <= v <= WORDS),
    },
    "bert": _BERT,
    "roberta": {**_BERT, "vocab_size": size(50265, WORDS), "pad_token_id": token(1, decides=True)},
    "xlm-roberta": {**_BERT, "pad_token_id": token(1, decides=True)},
    "distilbert": {
        "dim": size(768, WIDTH), "n_layers": size(6, LAYERS), "n_heads": size(12, HEADS),
        "hidden_dim": size(3072, 16 * WIDTH), "activation": activation("gelu"), "vocab_size": size(30522, WORDS),
        "max_position_embeddings": size(512, POSITIONS), "pad_token_id": token(0), "dropout": share(0.1),
        "attention_dropout": share(0.1),
    },
    "gpt2": {
        "n_embd": size(768, WIDTH), "n_layer": size(12, LAYERS), "n_head": size(12, HEADS),
        "n_inner": size_or_none(None, 16 * WIDTH), "n_positions": size(1024, POSITIONS),
        "activation_function": activation("gelu_new"), "layer_norm_epsilon": small(1e-5),
        "vocab_size": size(50257, WORDS), "scale_attn_weights": flag(True),
        "scale_attn_by_inverse_layer_idx": flag(False), "tie_word_embeddings": flag(True),
        "attn_pdrop": share(0.1), "embd_pdrop": share(0.1), "resid_pdrop": share(0.1), "pad_token_id": token(None),
    },
    "llama": {**_LLAMA, "attention_bias": flag(False), "mlp_bias": flag(False), "pretraining_tp": one_of(1)},
    "qwen2": {
        **_LLAMA, "intermediate_size": size(22016, 16 * WIDTH), "vocab_size": size(151936, WORDS),
        "max_position_embeddings": size(32768, POSITIONS), "use_sliding_window": one_of(False),
        "sliding_window": size_or_none(None, POSITIONS)._replace(decides=False),
    },
    "mistral": {
        **_LLAMA, "intermediate_size": size(14336, 16 * WIDTH), "num_key_value_heads": size_or_none(8, HEADS),
        "max_position_embeddings": size(131072, POSITIONS), "sliding_window": size_or_none(4096, POSITIONS),
    },
}  # fmt: skip
"""Model type to the fields that are handed to transformers; those that decide the function are compared."""

FIXED: dict[str, Field] = {
    "is_decoder": one_of(False, None), "add_cross_attention": one_of(False, None), "is_encoder_decoder": one_of(False, None),
    "cross_attention_hidden_size": one_of(None), "pruned_heads": one_of({}, None), "attention_type": one_of("original_full"),
    "rope_interleaved": one_of(False), "is_llama_config": flag(True), "bos_token_id": token(None), "eos_token_id": token(None),
}  # fmt: skip
"""Fields that any type may have, with the values that are understood."""
IDLE = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_model_name_or_path", "_name_or_path",
    "_num_labels", "apply_layernorm", "architectures", "bad_words_ids", "begin_suppress_tokens", "bos_token_id",
    "chunk_size_feed_forward", "classifier_dropout", "decoder_start_token_id", "directionality",
    "diversity_penalty", "do_sample", "dropout", "dtype", "early_stopping", "encoder_no_repeat_ngram_size",
    "encoder_stride", "eos_token_id", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "gradient_checkpointing", "id2label", "initializer_factor", "initializer_range",
    "label2id", "language", "layerscale_value", "length_penalty", "max_length", "max_sequence_length",
    "max_window_layers", "min_length", "model_type", "n_ctx", "name", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_labels", "num_return_sequences", "out_features", "out_indices", "output_attentions",
    "output_hidden_states", "output_past", "output_scores", "pad_token_id", "pooler_act", "pooler_fc_size",
    "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_output_size", "pooler_size_per_head",
    "pooler_type", "prefix", "problem_type", "projection_dim", "qa_dropout", "remove_invalid_values",
    "reorder_and_upcast_attn", "repetition_penalty", "reshape_hidden_states", "return_dict",
    "return_dict_in_generate", "sep_token_id", "seq_classif_dropout", "sinusoidal_pos_embds", "stage_names",
    "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
    "tie_weights_", "tie_word_embeddings", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers.js_config", "transformers_version", "typical_p", "unk_token_id", "unsloth_fixed", "unsloth_version",
    "use_bfloat16", "use_cache", "use_mask_token",
})  # fmt: skip
"""Fields of training, of heads, of generating text and of files: none of them changes what features are."""
AROUND = IDLE | {
    "text_config", "vision_config", "text_config_dict", "vision_config_dict", "logit_scale_init_value",
}  # fmt: skip
"""Fields of a whole CLIP beside those of its towers."""


def read_config(folder: Path, who: str, kinds: Sequence[str]) -> Values:
    """``model_type`` and all fields of its table from a folder's config.json, defaults filled in.

    Of a whole CLIP the vision tower's. UsageError, naming file, field and value, for another type, an unknown value,
    and an unknown field that says something.
    """
    path = folder / CONFIG
    raw = read_json(path, who)
    if raw.get("model_type") == "clip":
        raw = tower(raw, "vision", path, who)
    return checked(raw, path, who, kinds)


def tower(raw: Values, which: str, path: Path, who: str) -> Values:
    """The part of a whole CLIP's config that is about one of its towers."""
    check_fields(raw, {}, AROUND, f"{brief(str(path))!r}", who)
    part = f"{which}_config"
    found, old = raw.get(part), raw.get(f"{part}_dict") or {}
    if not isinstance(found, dict) or not isinstance(old, dict):
        raise UsageError(who, f"{brief(str(path))!r}: {part} {shown(found)} is not a mapping of fields")
    odd = next((name for name in old if found.get(name) != old[name]), "")
    if odd:
        raise UsageError(
            who, f"{brief(str(path))!r}: {brief(odd)} is {shown(found.get(odd))} in {part}, {shown(old[odd])} in "
            f"{part}_dict",
        )  # fmt: skip
    return {**found, "model_type": f"clip_{which}_model"}


def check_fields(raw: Values, table: Mapping[str, Field], idle: Iterable[str], where: str, who: str) -> None:
    """UsageError, naming the field, for values that are not known to be good, and for unknown fields that say
    something."""
    idle = set(idle)
    for name, value in raw.items():
        if name in table and not table[name].fits(value):
            raise UsageError(who, f"{where}: {name} is {shown(value)}; expected {table[name].told}")
        if name not in table and name not in idle and _says(value):
            raise UsageError(
                who, f"{where}: {brief(name)} is {shown(value)}; no such field is known, so what it changes is not "
                f"either{nearest(brief(name), table)}",
            )  # fmt: skip


def checked(raw: Values, path: Path, who: str, kinds: Sequence[str]) -> Values:
    """The fields of a raw config that its type's table names, each of them known to be good."""
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in kinds:
        given = f"model type {shown(kind)} in {brief(str(path))!r}"
        known = ", ".join(sorted("clip" if k == "clip_vision_model" else k for k in kinds))
        raise UsageError(who, f"{given} is not one of {known}")
    table = TABLES[kind]
    check_fields(raw, {**FIXED, **table}, IDLE | {"layer_types"}, f"{brief(str(path))!r}", who)
    values = {name: raw.get(name, field.default) for name, field in table.items()}
    found: Values = {"model_type": kind, **values}
    for mistake in _together(found, raw):
        raise UsageError(who, f"{brief(str(path))!r}: {mistake}")
    return found


def _says(value: Any) -> bool:
    """Whether an unknown field may change something: nothing, no and empty do not."""
    return value is not None and value is not False and value not in ("", [], {})


def _together(values: Values, raw: Values) -> Iterator[str]:
    """What does not go together."""
    width, heads = width_of(values), heads_of(values)
    if values.get("head_dim") is None and width % heads:
        yield f"hidden_size {width} is not a multiple of the {heads} attention heads"
    groups = values.get("num_key_value_heads") or heads
    if heads % groups:
        yield f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}"
    if "patch_size" in values and values["image_size"] < values["patch_size"]:
        yield f"patch_size {values['patch_size']} exceeds image_size {values['image_size']}"
    pad = values.get("pad_token_id")
    if isinstance(pad, list) or (pad is not None and pad >= values["vocab_size"]):
        yield f"pad_token_id {shown(pad)} is not one of the {values['vocab_size']} tokens of vocab_size"
    if values["model_type"] in ("roberta", "xlm-roberta") and (pad is None or pad < 0):
        yield f"pad_token_id is {shown(pad)}; the first position is the one behind it"
    if "rope_scaling" in values:
        yield from _rotations(values)
    kinds = raw.get("layer_types")
    full = values.get("sliding_window") is None or values.get("use_sliding_window") is False
    wanted = ["full_attention" if full else "sliding_attention"] * layers_of(values)
    if kinds is not None and kinds != wanted:
        yield f"layer_types is {shown(kinds)}; expected {layers_of(values)} × {wanted[0]}, or null"


def _rotations(values: Values) -> Iterator[str]:
    """What rotary parameters lack, say twice in different ways, or say to nobody: the library would choose."""
    names = ("rope_scaling", "rope_parameters")
    given = {name: values[name] for name in names if values[name]}
    for name, told in given.items():
        yield from (f"{name} {shown(told)}: {mistake}" for mistake in _turned(told))
    bases = [values["rope_theta"], *(told.get("rope_theta") for told in given.values())]
    thetas = sorted({base for base in bases if base is not None})
    if len(thetas) > 1:
        yield f"rope_theta is told twice, as {' and '.join(map(str, thetas))}"
    alone = [rotation({**values, **dict.fromkeys(names), name: told})[1] for name, told in given.items()]
    if any(scaling != alone[0] for scaling in alone):
        yield " and ".join(f"{name} is {shown(told)}" for name, told in given.items())


def _turned(told: Values) -> Iterator[str]:
    """What is wrong with one mapping of rotary parameters."""
    kinds = {str(told[key]) for key in ("rope_type", "type") if told.get(key) is not None} or {"default"}
    if len(kinds) > 1:
        yield f"type and rope_type differ ({' and '.join(sorted(kinds))})"
    kind = min(kinds)
    needed, others = ROTATIONS[kind]
    yield from (f"{name} is missing, which {kind} needs" for name in needed if told.get(name) is None)
    known = ("rope_theta", *needed, *others)
    for name, value in told.items():
        if name in ("rope_type", "type") or value is None or (name, value) == ("partial_rotary_factor", 1):
            continue
        if name not in known:
            yield f"{brief(name)} is {shown(value)}; {kind} has no such field{nearest(brief(name), known)}"
        elif name not in others and (isinstance(value, bool) or value <= 0):
            yield f"{name} is {shown(value)}; expected a number above 0"


def width_of(values: Values) -> int:
    """Width of the network, whatever its type calls it."""
    return int(next(values[n] for n in ("hidden_size", "dim", "n_embd") if n in values))


def heads_of(values: Values) -> int:
    """Attention heads, whatever the type calls them."""
    return int(next(values[n] for n in ("num_attention_heads", "n_heads", "n_head") if n in values))


def layers_name(values: Values) -> str:
    """What a type calls its number of layers."""
    return next(n for n in ("num_hidden_layers", "n_layers", "n_layer") if n in values)


def layers_of(values: Values) -> int:
    """How many layers there are."""
    return int(values[layers_name(values)])


def positions_of(values: Values) -> int:
    """Tokens that a text may have. RoBERTa's positions begin after the padding's number."""
    places = int(values["n_positions" if values["model_type"] == "gpt2" else "max_position_embeddings"])
    return places - (values["pad_token_id"] + 1 if values["model_type"] in ("roberta", "xlm-roberta") else 0)


def settings(values: Values) -> Values:
    """What transformers' config of this type is made with; rotary parameters as releases 4 and 5 both read them."""
    turned = ("model_type", "rope_theta", "rope_scaling", "rope_parameters")
    found = {n: v for n, v in values.items() if n not in turned and (n, v) != ("head_dim", None)}
    if "rope_scaling" in values:
        theta, scaling = rotation(values)
        found |= {"rope_theta": theta, **({"rope_scaling": scaling} if scaling else {})}
    return found


def rotation(values: Values) -> tuple[float, Values]:
    """Base of the rotary angles, and how they are scaled; empty if they are not."""
    told = {**(values["rope_scaling"] or {}), **(values["rope_parameters"] or {})}
    theta = float(told.pop("rope_theta", None) or values["rope_theta"] or 10000.0)
    kind = told.pop("type", None) or told.get("rope_type") or "default"
    scaling = {n: v for n, v in {**told, "rope_type": kind}.items() if v is not None}
    return theta, {} if kind == "default" else scaling


# --------------------------------------------------------------------------- two configs


def _function(values: Values) -> Values:
    """What decides the function, in one way of saying it."""
    table = TABLES[values["model_type"]]
    found = {n: v for n, v in values.items() if n == "model_type" or table[n].decides}
    if "rope_scaling" in table:
        found["rope_theta"], found["rope_scaling"] = rotation(values)
        del found["rope_parameters"]
        found["num_key_value_heads"] = values["num_key_value_heads"] or heads_of(values)
        found["head_dim"] = values["head_dim"] or width_of(values) // heads_of(values)
    for name in ("hidden_act", "activation", "activation_function"):
        if found.get(name) == "swish":
            found[name] = "silu"
    return found


def check_same_function(base: Values, other: Values, base_path: Path, path: Path, who: str) -> None:
    """UsageError, naming the field and both values, unless two configs are of one network."""
    ours, theirs = _function(base), _function(other)
    for name in ours:
        if name not in theirs or ours[name] != theirs[name]:
            told = shown(theirs.get(name)) if name in theirs else "missing"
            raise UsageError(
                who,
                f"{brief(str(path))!r}: {name} is {told}, in the base's {brief(str(base_path))!r} it is "
                f"{shown(ours[name])}: the same weights would be another function",
            )


# --------------------------------------------------------------------------- a config and the tensors beside it

_LAYER = re.compile(r"(?:^|\.)(?:layers?|h)\.(\d{1,9})\.")
Sides = tuple[int, ...]
Known = dict[str, Sides]
"""Ends of names of one kind of tensor (they differ between releases of transformers) and their shapes."""


def _shapes(values: Values) -> list[Known]:
    """What the config gives embeddings and maps; of each kind at least one must be there."""
    kind, width = values["model_type"], width_of(values)
    if "patch_size" in values:
        return _image_shapes(kind, width, values)
    positions = values["n_positions"] if kind == "gpt2" else values["max_position_embeddings"]
    words, places = (values["vocab_size"], width), (positions, width)
    if kind in ("bert", "roberta", "xlm-roberta"):
        return [
            {"embeddings.word_embeddings.weight": words}, {"embeddings.position_embeddings.weight": places},
            {"embeddings.token_type_embeddings.weight": (values["type_vocab_size"], width)},
            {"intermediate.dense.weight": (values["intermediate_size"], width)},
            {"attention.self.query.weight": (width, width)},
        ]  # fmt: skip
    if kind == "distilbert":
        return [
            {"embeddings.word_embeddings.weight": words}, {"embeddings.position_embeddings.weight": places},
            {"ffn.lin1.weight": (values["hidden_dim"], width)}, {"attention.q_lin.weight": (width, width)},
        ]  # fmt: skip
    if kind == "gpt2":
        return [
            {"wte.weight": words}, {"wpe.weight": places}, {"attn.c_attn.weight": (width, 3 * width)},
            {"mlp.c_fc.weight": (width, values["n_inner"] or 4 * width)},
        ]  # fmt: skip
    inner: Known = {"mlp.fc1.weight": (values["intermediate_size"], width)}
    if kind == "clip_text_model":
        return [{"token_embedding.weight": words}, {"embeddings.position_embedding.weight": places}, inner]
    heads = heads_of(values)
    each, groups = values["head_dim"] or width // heads, values["num_key_value_heads"] or heads
    return [
        {"embed_tokens.weight": words}, {"mlp.gate_proj.weight": (values["intermediate_size"], width)},
        {"self_attn.q_proj.weight": (heads * each, width)}, {"self_attn.k_proj.weight": (groups * each, width)},
    ]  # fmt: skip


def _image_shapes(kind: str, width: int, values: Values) -> list[Known]:
    patch = values["patch_size"]
    places = (values["image_size"] // patch) ** 2 + (2 if kind == "deit" else 1)
    if kind == "clip_vision_model":
        return [
            {"embeddings.patch_embedding.weight": (width, 3, patch, patch)},
            {"embeddings.position_embedding.weight": (places, width)},
            {"mlp.fc1.weight": (values["intermediate_size"], width)},
        ]
    inner = width * values["mlp_ratio"] if kind == "dinov2" else values["intermediate_size"]
    maps: Known = {"mlp.fc1.weight": (inner, width), "intermediate.dense.weight": (inner, width)}
    if values.get("use_swiglu_ffn"):
        gated = (inner * 2 // 3 + 7) // 8 * 8
        maps = {"mlp.weights_in.weight": (2 * gated, width), "mlp.gate_proj.weight": (gated, width)}
    return [
        {"embeddings.patch_embeddings.projection.weight": (width, 3, patch, patch)},
        {"embeddings.position_embeddings": (1, places, width)}, maps,
    ]  # fmt: skip


def check_tensors(values: Values, stored: Mapping[str, Stored], path: Path, who: str) -> None:
    """UsageError, naming file and tensor, unless a config and the tensors beside it are of one network: so many layers,
    and the shapes of embeddings and maps. What a config makes transformers build is then no larger than the files."""
    kind = values["model_type"]
    other = "text_model." if kind == "clip_vision_model" else "vision_model."
    own = {n: t for n, t in stored.items() if other not in n} if kind.startswith("clip") else dict(stored)
    for known in _shapes(values):
        _check_shapes(known, own, stored, path, who)
    _check_blocks(own, who)
    numbers = {int(m[1]): n for n in own if (m := _LAYER.search(n))}
    held, wanted = max(numbers, default=-1) + 1, layers_of(values)
    if held != wanted:
        last = f", the last of them {brief(numbers[held - 1])!r}" if numbers else ""
        raise UsageError(
            who, f"{brief(str(path))!r}: {layers_name(values)} is {wanted}, the weights beside it have {held} "
            f"layers{last}",
        )  # fmt: skip


def _check_blocks(own: Mapping[str, Stored], who: str) -> None:
    """UsageError, naming the tensor, if a block of a network lacks what most of them have."""
    blocks: dict[str, dict[str, str]] = {}
    for name in own:
        if (found := _LAYER.search(name)) and not COMPUTED.search(name):
            blocks.setdefault(found[1], {})[name[: found.start(1)] + name[found.end(1) :]] = name
    held = Counter(kind for block in blocks.values() for kind in block)
    every = {kind: name for block in blocks.values() for kind, name in block.items()}
    for kind, count in held.items():
        if len(blocks) / 2 < count < len(blocks):
            number = next(number for number, block in blocks.items() if kind not in block)
            raise UsageError(
                who, f"{brief(str(own[every[kind]].file))!r}: block {number} has no tensor like {brief(every[kind])!r}, "
                f"which {count} others have",
            )  # fmt: skip


def _check_shapes(
    known: Known, own: Mapping[str, Stored], stored: Mapping[str, Stored], path: Path, who: str
) -> None:
    """Of one kind of tensor: there is one, and all have the shape that they should have."""
    fitting = [(n, sides) for n in own for end, sides in known.items() if n == end or n.endswith("." + end)]
    if not fitting:
        first = next(iter(stored))
        raise UsageError(
            who, f"{brief(str(stored[first].file))!r}: no tensor '{next(iter(known))}', which {brief(str(path))!r} asks "
            f"for; there are {brief(first)!r} and {len(stored) - 1} others",
        )  # fmt: skip
    for name, sides in fitting:
        if own[name].shape != sides:
            raise UsageError(
                who, f"{brief(str(own[name].file))!r}: tensor {brief(name)!r} has the shape {list(own[name].shape)}, by "
                f"{brief(str(path))!r} it would be {list(sides)}",
            )  # fmt: skip
