"""Text models in folders: what config, tensors and tokenizer must agree in, for a base and for an expert of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from extras import needs
from safetensors.torch import load_file, save_file

from mergesec.errors import UsageError
from mergesec_tasks._modelfolders import inspect
from mergesec_tasks.text.hf_causal import HfCausal
from mergesec_tasks.text.hf_text import HfText

transformers = needs("transformers")
tokenizers = needs("tokenizers")

WORDS = ["[PAD]", "[UNK]", "i", "am", "sad", "happy", "label", ":"]
SHARED = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "vocab_size": len(WORDS), "max_position_embeddings": 24, "pad_token_id": 0,
}  # fmt: skip


def write_words(folder: Path, words: list[str] = WORDS) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    found = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=found, pad_token="[PAD]").save_pretrained(folder)


def network(kind: str, **changes: Any) -> Any:
    torch.manual_seed(1)
    given = {**SHARED, **changes}
    if kind == "bert":
        return transformers.BertModel(transformers.BertConfig(**given))
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_embd=32, n_layer=2, n_head=4, n_positions=24, vocab_size=len(WORDS), **changes
            )
        )
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}[kind]
    config = getattr(transformers, f"{name}Config")(**{"num_key_value_heads": 2, **given})
    return getattr(transformers, f"{name}ForCausalLM")(config)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for kind in ("bert", "gpt2", "llama", "mistral", "qwen2"):
        found[kind] = tmp_path_factory.mktemp(kind)
        network(kind).save_pretrained(found[kind])
        write_words(found[kind])
    return found


def subject(kind: str, folder: Path) -> Any:
    if kind == "bert":
        return HfText(str(folder), 0, 12, "mean")
    return HfCausal(str(folder), 0, 12, "{text} label :", " ")


def plan(kind: str, base: Path, expert: Path) -> None:
    name = "hf-text" if kind == "bert" else "hf-causal"
    inspect(name, {"path": str(base)}, "suite.backbone", {"suite.experts.emotion": str(expert)})


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(kind: str, base: Path, expert: Path, message: str) -> None:
    """The plan says it, naming the grid's field, and so does the backbone."""
    with pytest.raises(UsageError, match=rf"(?s)^suite\.experts\.emotion: .*{message}"):
        plan(kind, base, expert)
    with pytest.raises(UsageError, match=rf"(?s)^hf-.*{message}"):
        subject(kind, base).published(str(expert))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "mistral", "qwen2"])
def test_an_expert_of_the_same_network_is_read(bases: dict[str, Path], kind: str, tmp_path: Path) -> None:
    moved = network(kind)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            if not name.startswith("lm_head"):  # an output layer of its own would be refused
                parameter.add_(0.01)
    moved.save_pretrained(tmp_path)
    plan(kind, bases[kind], tmp_path)
    base, found = (
        subject(kind, bases[kind]).base_weights(),
        subject(kind, bases[kind]).published(str(tmp_path)),
    )
    assert found.keys() == base.keys()
    for name in base:
        torch.testing.assert_close(found[name], base[name] + 0.01)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("bert", {"num_hidden_layers": 3}, "num_hidden_layers is 3, in the base's .* it is 2"),
        ("bert", {"num_hidden_layers": 1}, "num_hidden_layers is 1, in the base's .* it is 2"),
        ("bert", {"num_attention_heads": 8}, "num_attention_heads is 8, in the base's .* it is 4"),
        ("bert", {"hidden_act": "relu"}, "hidden_act is 'relu', in the base's .* it is 'gelu'"),
        ("bert", {"layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05, in the base's .* it is 1e-12"),
        ("gpt2", {"activation_function": "relu"}, "activation_function is 'relu', .* 'gelu_new'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("gpt2", {"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ("llama", {"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05, in the base's .* it is 1e-06"),
        ("llama", {"rope_theta": 5e5}, "rope_theta is 500000.0, in the base's .* it is 10000.0"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling is .*linear"),
        ("llama", {"num_key_value_heads": 4}, "num_key_value_heads is 4, in the base's .* it is 2"),
        ("mistral", {"sliding_window": None}, "sliding_window is None, in the base's .* it is 4096"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act is 'gelu', in the base's .* it is 'silu'"),
        ("qwen2", {"max_position_embeddings": 48}, "max_position_embeddings is 48"),
    ],
)  # fmt: skip
def test_an_expert_with_another_function_is_refused(
    bases: dict[str, Path], kind: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Weights of the same names and shapes, or more of them: they would be read, and mean something else."""
    network(kind, **changes).save_pretrained(tmp_path)
    refused(kind, bases[kind], tmp_path, message)


def test_another_architecture_is_refused_by_file_and_tensor(bases: dict[str, Path], tmp_path: Path) -> None:
    refused(
        "llama", bases["llama"], bases["mistral"], "model_type is 'mistral', in the base's .* it is 'llama'"
    )
    refused("bert", bases["bert"], bases["gpt2"], "model type 'gpt2' .* not one of bert, distilbert, roberta")
    shutil.copytree(bases["bert"], tmp_path / "m")
    shutil.copy(bases["llama"] / "model.safetensors", tmp_path / "m")
    refused(
        "bert",
        bases["bert"],
        tmp_path / "m",
        r"model\.safetensors.*no tensor 'embeddings\.word_embeddings\.weight'",
    )
    network("bert", intermediate_size=64).save_pretrained(tmp_path / "wide")
    shutil.copy(bases["bert"] / "config.json", tmp_path / "wide")
    refused(
        "bert", bases["bert"], tmp_path / "wide", r"intermediate\.dense\.weight' has the shape \[64, 32\]"
    )


def test_the_plan_asks_for_no_more_than_there_is(bases: dict[str, Path]) -> None:
    for asked, message in (
        ({"layers": 3}, "layers: 3 exceed the 2 of the model"),
        ({"max_length": 25}, "max_length: 25 exceeds the 24 positions of the model's context"),
    ):
        with pytest.raises(UsageError, match=rf"^suite\.backbone\.{message}"):
            inspect("hf-text", {"path": str(bases["bert"]), **asked}, "suite.backbone", {})


def test_texts_have_room_between_what_stands_around_them(bases: dict[str, Path], tmp_path: Path) -> None:
    """All of them would be the same two tokens."""
    folder = shutil.copytree(bases["bert"], tmp_path / "m")
    ends = {"type": "BertProcessing", "sep": ["label", 6], "cls": ["i", 2]}
    edit(folder / "tokenizer.json", post_processor=ends)
    message = "max_length: 2 leaves no room for a text between the 2 tokens around it"
    with pytest.raises(UsageError, match=rf"^suite\.backbone\.{message}"):
        inspect("hf-text", {"path": str(folder), "max_length": 2}, "suite.backbone", {})
    with pytest.raises(UsageError, match=rf"^hf-text\.{message}"):
        HfText(str(folder), 0, 2, "mean").tokenise(["sad"])
    assert HfText(str(folder), 0, 3, "mean").tokenise(["sad happy"])[0].tolist() == [[2, 4, 6]]


def test_a_file_with_more_layers_than_its_config_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    network("bert", num_hidden_layers=3).save_pretrained(tmp_path)
    edit(tmp_path / "config.json", num_hidden_layers=2)
    refused("bert", bases["bert"], tmp_path, "num_hidden_layers is 2, the weights beside it have 3 layers")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_hidden_layers", 10**9, "num_hidden_layers is 1000000000; expected a whole number from 1 to 1000"),
        ("hidden_size", "32", "hidden_size is '32'; expected a whole number"),
        ("hidden_size", None, "hidden_size is None"),
        ("hidden_act", "gleu", "hidden_act is 'gleu'; expected one of 'gelu'"),
        ("position_embedding_type", "relative_key", "position_embedding_type is 'relative_key'; expected 'absolute'"),
        ("is_decoder", True, "is_decoder is True; expected one of False"),
        ("pruned_heads", {"0": [1]}, "pruned_heads is"),
        ("quantization_config", {"bits": 4}, "quantization_config is .*; no such field is known"),
        ("layer_norm_epz", 1e-5, "layer_norm_epz is 1e-05; no such field is known.*did you mean 'layer_norm_eps'"),
        ("layer_norm_eps", -1, "layer_norm_eps is -1; expected a number above 0"),
        ("pad_token_id", 99, "pad_token_id 99 is not one of the 8 tokens"),
    ],
)  # fmt: skip
def test_a_config_says_only_what_is_known(
    bases: dict[str, Path], field: str, value: Any, message: str, tmp_path: Path
) -> None:
    shutil.copytree(bases["bert"], tmp_path / "m")
    edit(tmp_path / "m" / "config.json", **{field: value})
    with pytest.raises(UsageError, match=rf"hf-text: .*config\.json.*{message}"):
        subject("bert", tmp_path / "m").build()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "linear"}}, "factor is missing, which linear needs"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing, which llama3 needs"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor is 0; expected a number above 0"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": True}}, "factor is True; expected a number above 0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta is 0; expected a number above 0"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5; default has no such field"),
        ({"rope_parameters": {"rope_type": "linear", "facter": 2.0, "factor": 2.0}}, "facter is 2.0; linear has no such field; did you mean 'factor'"),
        ({"rope_parameters": {"rope_type": "default", "type": "linear", "factor": 2.0}}, "type and rope_type differ"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}, "rope_theta": 1e4}, "rope_theta is told twice, as 10000.0 and 100000.0"),
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is .*linear.* and rope_parameters is .*default"),
        ({"bos_token_id": "1"}, "bos_token_id is '1'; expected null or the number of a token"),
    ],
)  # fmt: skip
def test_positions_are_told_once_and_wholly(
    bases: dict[str, Path], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """The library would choose, divide by nothing, or turn all of what is to be turned in part."""
    folder = shutil.copytree(bases["llama"], tmp_path / "m")
    edit(folder / "config.json", **changes)
    with pytest.raises(UsageError, match=rf"^suite\.backbone\.path: .*config\.json.*{message}"):
        plan("llama", folder, bases["llama"])


def test_positions_as_published_are_read(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(bases["llama"], tmp_path / "m")
    stretched = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 12,
    }
    for scaling in (
        {"rope_type": "llama3", **stretched},
        {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 12, "finetuned": True},
        {"rope_type": "dynamic", "factor": 2.0, "attention_factor": None},
        {"rope_type": "default", "partial_rotary_factor": 1.0},
    ):
        edit(folder / "config.json", rope_parameters=None, rope_theta=5e5, rope_scaling=scaling)
        assert subject("llama", folder).build()


def test_blocks_that_lack_a_tensor_are_named_by_the_plan(bases: dict[str, Path], tmp_path: Path) -> None:
    network("llama", num_hidden_layers=3).save_pretrained(tmp_path)
    write_words(tmp_path)
    plan("llama", tmp_path, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UsageError, match=r"block 1 has no tensor like 'model\.layers\.2\.mlp\.up_proj\.weight', which 2"
    ):
        plan("llama", tmp_path, bases["llama"])


def test_fields_of_heads_and_of_training_change_nothing(bases: dict[str, Path], tmp_path: Path) -> None:
    """``num_labels`` alone would make transformers write that many names of labels."""
    shutil.copytree(bases["bert"], tmp_path / "m")
    edit(
        tmp_path / "m" / "config.json", num_labels=10**9, id2label={"0": "a"}, hidden_dropout_prob=0.3,
        problem_type="x", classifier_dropout=0.5, finetuning_task="y", dtype="float64",
    )  # fmt: skip
    assert subject("bert", bases["bert"]).published(str(tmp_path / "m"))


def test_a_window_that_is_not_used_changes_nothing(bases: dict[str, Path], tmp_path: Path) -> None:
    """As published: ``sliding_window`` stands there, ``use_sliding_window`` is false."""
    shutil.copytree(bases["qwen2"], tmp_path / "m")
    full = ["full_attention"] * 2
    edit(tmp_path / "m" / "config.json", sliding_window=4, use_sliding_window=False, layer_types=full)
    found = subject("qwen2", tmp_path / "m")
    assert found.config.sliding_window is None
    assert subject("qwen2", bases["qwen2"]).published(str(tmp_path / "m"))
    edit(tmp_path / "m" / "config.json", layer_types=["full_attention", "sliding_attention"])
    with pytest.raises(UsageError, match=r"layer_types is .*; expected 2 × full_attention"):
        subject("qwen2", tmp_path / "m").build()


def test_tensors_that_would_be_left_out_or_are_codes_are_refused(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(bases["bert"], tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    good = load_file(path)
    save_file({**good, "classifier.weight": torch.ones(2, 32)}, path, {"format": "pt"})
    assert subject("bert", tmp_path / "m").base_weights()  # heads may stand beside
    save_file({**good, "encoder.layer.0.adapter.weight": torch.ones(2, 32)}, path, {"format": "pt"})
    with pytest.raises(UsageError, match=r"'encoder\.layer\.0\.adapter\.weight' is none of a bert"):
        subject("bert", tmp_path / "m").base_weights()
    name = "encoder.layer.1.output.dense.weight"
    for dtype, told in ((torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")):
        save_file({**good, name: good[name].to(dtype)}, path, {"format": "pt"})
        with pytest.raises(UsageError, match=rf"tensor '{name}' has type {told}: codes of quantised weights"):
            subject("bert", tmp_path / "m").base_weights()
    save_file({n: t for n, t in good.items() if n != name}, path, {"format": "pt"})
    with pytest.raises(UsageError, match=rf"lacks 1 tensors, the first is '{name}'"):
        subject("bert", tmp_path / "m").base_weights()


def test_one_set_of_files_a_folder(bases: dict[str, Path], tmp_path: Path) -> None:
    network("bert").save_pretrained(tmp_path, max_shard_size="40KB")
    write_words(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    sharded, single = subject("bert", tmp_path).base_weights(), subject("bert", bases["bert"]).base_weights()
    assert all(torch.equal(sharded[n], single[n]) for n in single)
    shutil.copy(bases["bert"] / "model.safetensors", tmp_path)
    with pytest.raises(UsageError, match=r"holds model\.safetensors, which transformers loads, and"):
        subject("bert", tmp_path).base_weights()
    (tmp_path / "model.safetensors").unlink()
    index = tmp_path / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]
    for wrong, message in (
        ({**listed, "a": "../x.safetensors"}, "weight_map names '../x.safetensors' for 'a'"),
        ({**listed, "a": listed[min(listed)]}, "tensor 'a' does not lie where weight_map says"),
        ({**listed, "a": "gone.safetensors"}, "no file .*gone.safetensors"),
        ([1], "does not map names of tensors to files"),
    ):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(UsageError, match=message):
            subject("bert", tmp_path).base_weights()


def test_an_experts_words_are_the_bases(bases: dict[str, Path], tmp_path: Path) -> None:
    network("bert").save_pretrained(tmp_path)
    for words, message in (
        (
            [*WORDS[:4], "happy", "sad", *WORDS[6:]],
            r"tokenizer\.json.*the number of 'happy' is 4, for the base it is 5",
        ),
        (WORDS[:-1], "the number of ':' is None, for the base it is 7"),
    ):
        write_words(tmp_path, words)
        refused("bert", bases["bert"], tmp_path, message)
    write_words(tmp_path)
    plan("bert", bases["bert"], tmp_path)
    edit(tmp_path / "tokenizer.json", normalizer={"type": "Lowercase"})
    refused(
        "bert", bases["bert"], tmp_path, r"normalizer is \{'type': 'Lowercase'\}, for the base it is None"
    )
    write_words(tmp_path)
    edit(tmp_path / "tokenizer.json", truncation={"direction": "Right", "max_length": 5}, padding=None)
    plan("bert", bases["bert"], tmp_path)  # both are set anew here
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS[:6], "sign", ":"]) + "\n")
    refused("bert", bases["bert"], tmp_path, r"vocab\.txt.*the number of 'label' is None|'sign' is 6")


def test_a_bases_words_fit_its_network(bases: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(bases["bert"], tmp_path / "m")
    for words, message in (
        ([*WORDS, "more"], "the token 'more' has the number 8, config.json has a vocab_size of 8"),
    ):
        write_words(tmp_path / "m", words)
        with pytest.raises(UsageError, match=message):
            _ = subject("bert", tmp_path / "m").tokeniser
        with pytest.raises(UsageError, match=rf"^suite\.backbone\.path: .*{message}"):
            plan("bert", tmp_path / "m", bases["bert"])


def broken(folder: Path, change: Callable[[Any], Any]) -> None:
    """The folder's tokenizer.json, changed."""
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def processor(number: int) -> dict[str, Any]:
    return {
        "type": "TemplateProcessing", "pair": [], "special_tokens": {"i": {"id": "i", "ids": [number], "tokens": ["i"]}},
        "single": [{"SpecialToken": {"id": "i", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["model"]["vocab"].update(sad=5), "the tokens 'sad' and 'happy' have the same number 5"),
        (lambda raw: raw["added_tokens"].append({**raw["added_tokens"][0], "id": 3, "content": "x"}), "the tokens 'am' and 'x' have the same number 3"),
        (lambda raw: raw["model"].update(unk_token="[NEW]"), r"model\.unk_token '\[NEW\]' is none of its words"),
        (lambda raw: raw.update(post_processor=processor(7)), "post_processor puts 'i' with the number 7 around texts, in the vocabulary it is 2"),
        (lambda raw: raw["model"].update(vocab={"[PAD]": 0, "[UNK]": 1, "i": 2}), "has 3 words, config.json has a vocab_size of 8: the tokenizer is another network's"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_contradicts_itself_or_the_network(
    bases: dict[str, Path], change: Callable[[Any], Any], message: str, tmp_path: Path
) -> None:
    """Each of these is read without a word by the library."""
    folder = shutil.copytree(bases["bert"], tmp_path / "m")
    broken(folder, change)
    with pytest.raises(UsageError, match=rf"^suite\.backbone\.path: .*{message}"):
        plan("bert", folder, bases["bert"])
    with pytest.raises(UsageError, match=rf"hf-text: .*{message}"):
        subject("bert", folder).tokenise(["i"])


@pytest.mark.parametrize(
    "told",
    [
        5, [], {"processors": 5}, {"processors": [5]}, {"special_tokens": [5]}, {"special_tokens": {"a": 5}}, {"single": 5},
        {"special_tokens": {"a": {"tokens": 5, "ids": {}}}}, {"type": [], "sep": 5, "cls": [[], {}]}, {"single": [5]},
    ],
    ids=str,
)  # fmt: skip
def test_a_tokenizer_in_no_shape_at_all(bases: dict[str, Path], told: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(bases["bert"], tmp_path / "m")
    edit(folder / "tokenizer.json", post_processor=told)
    with pytest.raises(UsageError, match=r"post_processor puts|cannot be read"):
        planned_and_read(folder)


def planned_and_read(folder: Path) -> None:
    """The plan leaves to the library what it cannot make sense of."""
    inspect("hf-text", {"path": str(folder)}, "suite.backbone", {})
    subject("bert", folder).tokenise(["i"])


def test_tokens_that_settings_add_fit_the_network(bases: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(bases["llama"], tmp_path / "m")
    edit(tmp_path / "m" / "tokenizer_config.json", unk_token="<new>")
    with pytest.raises(
        UsageError, match=r"the token '<new>' the number 8, config.json has a vocab_size of 8"
    ):
        subject("llama", tmp_path / "m").tokenise(["sad"])
    with pytest.raises(UsageError, match=r"^suite\.backbone\.path: .*unk_token gives the token '<new>'"):
        plan("llama", tmp_path / "m", bases["llama"])
    for wrong in (["[UNK]"], {"x": 1}, 5):
        edit(tmp_path / "m" / "tokenizer_config.json", unk_token=wrong)
        with pytest.raises(
            UsageError, match=r"^suite\.backbone\.path: .*unk_token is .*; expected a word, or null"
        ):
            plan("llama", tmp_path / "m", bases["llama"])
    edit(
        tmp_path / "m" / "tokenizer_config.json",
        unk_token="[UNK]",
        added_tokens_decoder={"9": {"content": "<x>"}},
    )
    with pytest.raises(
        UsageError, match=r"^suite\.backbone\.path: .*added_tokens_decoder gives the token '<x>'"
    ):
        plan("llama", tmp_path / "m", bases["llama"])


def test_looking_at_folders_loads_no_torch(bases: dict[str, Path]) -> None:
    code = (
        "import sys; from mergesec_tasks._modelfolders import inspect; "
        f"inspect('hf-text', {{'path': {str(bases['bert'])!r}}}, 'x', {{'y': {str(bases['bert'])!r}}}); "
        "print(sorted({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
