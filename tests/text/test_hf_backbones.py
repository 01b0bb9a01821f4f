"""Hugging Face text backbones on tiny random checkpoints written here, and on real ones where they lie beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from extras import needs

from mergesec.anatomy import AnatomyError, describe
from mergesec.contracts import (
    Context,
    DataContext,
    Model,
    ProtectContext,
    Split,
    TaskView,
    load_network,
)
from mergesec.errors import UsageError
from mergesec_methods.protection.defenses.params import Params
from mergesec_tasks.text.emotion import FolderText
from mergesec_tasks.text.hf_causal import HfCausal
from mergesec_tasks.text.hf_text import HfText

transformers = needs("transformers")
tokenizers = needs("tokenizers")

CPU = torch.device("cpu")
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    *["i", "am", "not", "so", "sad", "happy", "angry", "but", "my", "dog", "is", "glad", "label", ":"],
]
TEXTS = ["i am so happy", "my dog is sad but i am not", "i", "so so glad"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
ENCODERS = ("bert", "roberta", "distilbert")
DECODERS = ("gpt2", "llama", "qwen2")


def write_tokeniser(folder: Path, special: bool) -> None:
    """A word-level tokeniser in the library's own format."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
    if special:
        words.post_processor = processors.TemplateProcessing(
            "[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)]
        )
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)


def tiny(kind: str) -> Any:
    """A small random network of a kind with its output layer, if it is a language model, in evaluation mode."""
    torch.manual_seed(3)
    shared = {"vocab_size": len(WORDS), "max_position_embeddings": 24, "pad_token_id": 0}
    if kind == "bert":
        return transformers.BertModel(transformers.BertConfig(**SIZES, **shared)).eval()
    if kind == "roberta":
        return transformers.RobertaModel(transformers.RobertaConfig(**SIZES, **shared)).eval()
    if kind == "distilbert":
        return transformers.DistilBertModel(
            transformers.DistilBertConfig(dim=32, n_layers=3, n_heads=4, hidden_dim=48, **shared)
        ).eval()
    if kind == "gpt2":
        config = transformers.GPT2Config(
            n_embd=32, n_layer=3, n_head=4, n_inner=48, n_positions=24, vocab_size=len(WORDS), pad_token_id=0
        )
        network = transformers.GPT2LMHeadModel(config).eval()
        with torch.no_grad():  # its biases begin at zero, where a wrong order of them would not show
            for name, value in network.named_parameters():
                if name.endswith("bias"):
                    value.normal_(std=0.3)
        return network
    grouped = {"num_key_value_heads": 2, "tie_word_embeddings": kind == "qwen2"}
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **shared, **grouped)).eval()
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, **shared, **grouped)).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    found = {}
    for kind in (*ENCODERS, *DECODERS):
        folder = tmp_path_factory.mktemp(kind)
        network = tiny(kind)
        network.save_pretrained(folder)
        write_tokeniser(folder, kind in ENCODERS)
        found[kind] = folder, network
    return found


def encoder(folder: Path, **given: Any) -> HfText:
    return HfText(**{"path": str(folder), "layers": 0, "max_length": 12, "pooling": "mean", **given})


def decoder(folder: Path, **given: Any) -> HfCausal:
    return HfCausal(**{
        "path": str(folder), "layers": 0, "max_length": 12, "template": "{text} label :", "label_prefix": " ",
        **given,
    })  # fmt: skip


def subject(kind: str, folder: Path, **given: Any) -> Any:
    return (encoder if kind in ENCODERS else decoder)(folder, **given)


@pytest.mark.parametrize("kind", ENCODERS)
def test_features_of_an_encoder_equal_the_library(folders: Any, kind: str) -> None:
    folder, network = folders[kind]
    for pooling in ("mean", "cls"):
        backbone = encoder(folder, pooling=pooling)
        with torch.no_grad():
            found = backbone.features(load_network(backbone, backbone.base_weights()), TEXTS)
            for row, text in zip(found, TEXTS, strict=True):  # one at a time: nothing is padded
                numbers = torch.tensor([[2, *(WORDS.index(w) for w in text.split()), 3]])
                states = network(
                    input_ids=numbers, attention_mask=torch.ones_like(numbers)
                ).last_hidden_state[0]
                torch.testing.assert_close(
                    row, states.mean(0) if pooling == "mean" else states[0], rtol=0, atol=1e-5
                )


@pytest.mark.parametrize("kind", DECODERS)
def test_label_tokens_of_a_language_model_score_as_the_library_does(folders: Any, kind: str) -> None:
    folder, network = folders[kind]
    backbone, classes = decoder(folder), ["sad", "happy", "angry"]
    loaded = load_network(backbone, backbone.base_weights())
    with torch.no_grad():
        found = backbone.features(loaded, TEXTS) @ backbone.label_rows(loaded, classes).T
        for row, text in zip(found, TEXTS, strict=True):
            numbers = torch.tensor([[WORDS.index(w) for w in [*text.split(), "label", ":"]]])
            wanted = network(input_ids=numbers).logits[0, -1, [WORDS.index(c) for c in classes]]
            torch.testing.assert_close(row, wanted, rtol=0, atol=1e-5)


def test_a_head_of_label_rows_is_taken_instead_of_a_probe(folders: Any) -> None:
    backbone = decoder(folders["gpt2"][0])
    task = FolderText(0, 0, "text", "label")
    task.classes = ["sad", "happy", "angry"]
    model = Model(backbone, load_network(backbone, backbone.base_weights()))
    split = Split(TEXTS, torch.tensor([1, 0, 2, 1]))
    head = task.fit_head(model, split, Context(CPU, 0))
    assert torch.equal(head["weight"], model.network.wte.weight[[8, 9, 10]])
    with torch.no_grad():
        raw = model.features(TEXTS) @ head["weight"].T
        assert torch.equal(task.outputs(model, head, TEXTS).argmax(1), raw.argmax(1))
        torch.testing.assert_close(task.outputs(model, head, TEXTS), raw, rtol=0.2, atol=0.05)
    with pytest.raises(UsageError, match=r"'sad' and 'sad day' begin with the same token"):
        decoder(folders["gpt2"][0], labels="first").label_rows(model.network, ["sad", "sad day"])
    probe = task.fit_head(
        Model(encoder(folders["bert"][0]), _network(folders["bert"][0])), split, Context(CPU, 0)
    )
    assert probe["weight"].shape == (3, 32) and "bias" in probe


def _network(folder: Path) -> Any:
    backbone = encoder(folder)
    return load_network(backbone, backbone.base_weights())


@pytest.mark.parametrize("kind", [*ENCODERS, *DECODERS])
def test_padding_changes_nothing_and_fewer_layers_keep_the_first(folders: Any, kind: str) -> None:
    backbone = subject(kind, folders[kind][0])
    weights = backbone.base_weights()
    network = load_network(backbone, weights)
    with torch.no_grad():
        alone = torch.cat([backbone.features(network, [text]) for text in TEXTS])
        torch.testing.assert_close(backbone.features(network, TEXTS), alone, rtol=0, atol=1e-5)
    part = subject(kind, folders[kind][0], layers=2)
    kept = part.base_weights()
    assert set(kept) < set(weights) and all(torch.equal(t, weights[n]) for n, t in kept.items())
    assert len(part.anatomy().blocks) == 2 and len(backbone.anatomy().blocks) == 3
    assert weights[backbone.embedding()].shape == (len(WORDS), 32)
    with pytest.raises(UsageError, match="layers 4 exceed the 3"):
        _ = subject(kind, folders[kind][0], layers=4).config


@pytest.mark.parametrize("kind", [*ENCODERS, *DECODERS])
def test_params_keeps_the_function(folders: Any, kind: str) -> None:
    backbone = subject(kind, folders[kind][0])
    base = backbone.base_weights()
    generator = torch.Generator().manual_seed(0)
    expert = {
        n: w + 0.02 * torch.randn(w.shape, generator=generator) if w.is_floating_point() else w
        for n, w in base.items()
    }
    task, split = FolderText(0, 0, "text", "label"), Split(TEXTS, torch.tensor([0, 1, 2, 0]))
    view = TaskView(
        task, {"weight": torch.randn(3, 32, generator=generator), "scale": torch.tensor(4.0)}, split
    )
    scaling = "diagonal" if kind in ENCODERS else "v1"
    params = Params(permute=True, scaling=scaling)
    changed = params.protect(expert, ProtectContext(CPU, 1, backbone, base, view)).weights
    moved = [n for n in expert if not torch.equal(changed[n], expert[n])]
    assert len(moved) >= 2 * 3
    with torch.no_grad():
        before, after = (backbone.features(load_network(backbone, w), TEXTS) for w in (expert, changed))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-3)


def test_long_texts_are_cut_and_a_prompt_never_is(folders: Any) -> None:
    long = " ".join(["happy"] * 40)
    numbers, mask = encoder(folders["bert"][0]).tokenise([long, "i"])
    assert numbers.shape == (2, 12) and numbers[0, -1] == 3 and mask.sum(1).tolist() == [12, 3]
    numbers, mask = decoder(folders["gpt2"][0]).tokenise([long, ""])
    end = [WORDS.index("label"), WORDS.index(":")]
    assert (
        numbers[0, -2:].tolist() == end and numbers[1, :2].tolist() == end and mask.sum(1).tolist() == [12, 2]
    )
    with pytest.raises(UsageError, match="leave no room"):
        decoder(folders["gpt2"][0], max_length=2).tokenise(["i"])
    with pytest.raises(UsageError, match="exceeds the 23 positions"):
        _ = encoder(folders["roberta"][0], max_length=24).max_length
    assert encoder(folders["bert"][0], max_length=0).max_length == 24
    with pytest.raises(UsageError, match=r"\{text\} once"):
        decoder(folders["gpt2"][0], template="no slot")


def test_gpt2_as_stored_is_refused_and_as_built_is_read(folders: Any) -> None:
    folder, network = folders["gpt2"]
    raw = {n: tuple(t.shape) for n, t in network.transformer.state_dict().items()}
    with pytest.raises(AnatomyError, match="transposed"):
        describe(raw, 4)
    built = decoder(folder).base_weights()
    for name in ("h.0.attn.c_attn.weight", "h.1.mlp.c_fc.weight", "h.2.mlp.c_proj.weight"):
        assert torch.equal(built[name], network.transformer.state_dict()[name].T)


def test_wrong_folders_are_named(tmp_path: Path, folders: Any) -> None:
    with pytest.raises(UsageError, match=r"hf-text: no config\.json in"):
        encoder(tmp_path).build()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(UsageError, match=r"'t5' .* not one of bert, distilbert, roberta"):
        encoder(tmp_path).build()
    with pytest.raises(UsageError, match=r"'bert' .* not one of gpt2, llama"):
        decoder(folders["bert"][0]).build()
    (tmp_path / "config.json").write_text((folders["bert"][0] / "config.json").read_text())
    with pytest.raises(UsageError, match="no safetensors"):
        encoder(tmp_path).base_weights()


@pytest.mark.shared
def test_minilm_separates_emotions_better_than_chance(shared: Path) -> None:
    needs("pyarrow")
    task = FolderText(600, 120, "text", "label")
    task.name = "emotion"
    splits = task.load(DataContext(CPU, 0, str(shared / "data" / "emotion")))
    backbone = encoder(shared / "models" / "all-MiniLM-L6-v2", max_length=32)
    weights = backbone.base_weights()
    assert all(w.dtype == torch.float32 for w in weights.values() if w.is_floating_point())
    assert len(backbone.anatomy().blocks) == 6
    model = Model(backbone, load_network(backbone, weights))
    head = task.fit_head(model, splits["train"], Context(CPU, 0))
    with torch.no_grad():
        batch = task.batch(splits["test"], torch.arange(120), CPU)
        right = task.predictions(task.outputs(model, head, batch.inputs)) == batch.targets
    assert right.float().mean() > 0.45
