"""Causal language models as bases: perplexity, what prompts and label tokens must fit, adapters, and the whole road."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from extras import needs
from safetensors.torch import load_file, save_file

from mergesec.contracts import Context, ContractError, DataContext, Model, load_network
from mergesec.errors import UsageError
from mergesec.evidence.boards import make_boards
from mergesec.evidence.estimates import Board
from mergesec.evidence.records import Record
from mergesec.evidence.tables import display
from mergesec.execution.harvest import make_records
from mergesec.execution.scheduler import Outcome
from mergesec.execution.steps import run
from mergesec.execution.store import Store
from mergesec.execution.work import Bench
from mergesec.inference import predict
from mergesec.planning.catalog import load_catalog
from mergesec.planning.gridspec import parse_grid
from mergesec.planning.plan import make_plan
from mergesec.planning.resolve import resolve
from mergesec.text import perplexity
from mergesec_tasks.mini.question import Question
from mergesec_tasks.text.emotion import FolderText
from mergesec_tasks.text.hf_causal import HfCausal

transformers = needs("transformers")
tokenizers = needs("tokenizers")

CPU = torch.device("cpu")
LABELS = ["negative", "neutral", "positive", "person", "place", "time", "number", "reason", "manner"]
WORDS = ["[PAD]", "[UNK]", "<s>", "label", ":", *LABELS, "the", "film", "was", "good", "i", "not", "who"]
TEXTS = ["the film was good", "i", "the film was not good i was not", "who was the"]
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": len(WORDS), "max_position_embeddings": 24, "pad_token_id": 0, "bos_token_id": 2,
}  # fmt: skip


def write_words(folder: Path, words: list[str] = WORDS, **settings: str) -> None:
    found = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    )
    found.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    kind = transformers.PreTrainedTokenizerFast
    kind(tokenizer_object=found, pad_token="[PAD]", **settings).save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Tiny random Llamas by whether their embeddings are tied, with the library's own networks."""
    found = {}
    for kind in ("tied", "untied"):
        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(4)
        config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=kind == "tied")
        network = transformers.LlamaForCausalLM(config).eval()
        network.save_pretrained(folder)
        write_words(folder)
        found[kind] = folder, network
    return found


def causal(folder: Path, **given: Any) -> HfCausal:
    return HfCausal(**{
        "path": str(folder), "layers": 0, "max_length": 12, "template": "{text} label :", "label_prefix": " ", **given
    })  # fmt: skip


def loaded(backbone: HfCausal) -> Any:
    return load_network(backbone, backbone.base_weights())


# --------------------------------------------------------------------------- perplexity


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_losses_are_the_librarys_text_by_text(folders: Any, kind: str) -> None:
    folder, network = folders[kind]
    backbone = causal(folder)
    with torch.no_grad():
        losses, counts = backbone.token_losses(loaded(backbone), TEXTS)
        for row, text in enumerate(TEXTS):
            numbers = torch.tensor([[WORDS.index(word) for word in text.split()]])
            assert counts[row] == numbers.shape[1] - 1
            if numbers.shape[1] > 1:
                wanted = network(input_ids=numbers, labels=numbers).loss * (numbers.shape[1] - 1)
                torch.testing.assert_close(losses[row], wanted, rtol=1e-5, atol=1e-5)
            else:
                assert losses[row] == 0
    cut, _ = causal(folder, max_length=3).token_losses(loaded(backbone), TEXTS)
    short, _ = backbone.token_losses(loaded(backbone), ["the film was"])
    torch.testing.assert_close(cut[:1], short)


def test_perplexity_is_of_tokens_and_its_interval_of_texts() -> None:
    value, low, high = perplexity(torch.tensor([2.0, 6.0]), torch.tensor([1, 2]))
    assert value == pytest.approx(math.exp(8 / 3))
    # deviations from 8/3 per token: -2/3 and 2/3; their sum of squares 8/9, times n / (n - 1), over 3 tokens
    wide = 1.96 * math.sqrt(8 / 9 * 2) / 3
    assert (low, high) == (pytest.approx(math.exp(8 / 3 - wide)), pytest.approx(math.exp(8 / 3 + wide)))
    assert perplexity(torch.tensor([math.log(5) * 7]), torch.tensor([7])) == (
        pytest.approx(5), pytest.approx(5), pytest.approx(5),
    )  # fmt: skip
    with pytest.raises(ContractError, match="no token after the first"):
        perplexity(torch.zeros(2), torch.zeros(2))
    with pytest.raises(ContractError, match="not finite"):
        perplexity(torch.tensor([math.inf, 1.0]), torch.ones(2))
    assert math.isfinite(perplexity(torch.tensor([1e6, 1.0]), torch.ones(2))[2])


def test_it_is_measured_where_it_is_asked_for_and_not_under_a_trigger(folders: Any) -> None:
    task = Question(max_test=12)
    task.name = "mini/question"
    splits = task.load(DataContext(CPU, 0))
    assert len(splits["test"]) == 12 and len(Question().load(DataContext(CPU, 0))["test"]) == 800
    silent, asked = causal(folders["tied"][0]), causal(folders["tied"][0], perplexity_rows=5)
    model = Model(asked, loaded(asked))
    head = task.fit_head(model, splits["train"].take(torch.arange(8)), Context(CPU, 0))
    found = task.measure(model, head, splits, CPU)
    assert found is not None and torch.equal(
        found.predictions, predict(task, model, head, splits["test"], CPU)
    )
    with torch.no_grad():
        wanted = perplexity(*asked.token_losses(model.network, splits["test"].inputs[:5]))
    assert found.values == {"perplexity": wanted}
    assert task.measure(model, head, splits, CPU, change=lambda texts: texts) is None
    assert task.measure(Model(silent, model.network), head, splits, CPU) is None


# --------------------------------------------------------------------------- what does not fit


def looked_at(folder: Path, classes: dict[str, tuple[str, ...]] | None = None, **given: Any) -> None:
    """As the plan does, by the card."""
    card = load_catalog().get("backbone", "hf-causal").card
    module, _, function = card.inspect_tasks.partition(":")
    parameters = card.bind(
        "x", {"path": str(folder), "template": "{text} label :", "max_length": 12, **given}
    )
    getattr(importlib.import_module(module), function)(parameters, "suite.backbone", classes or {})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layers": 4}, r"suite\.backbone\.layers: 4 exceed the 3 of the model"),
        ({"max_length": 25}, r"suite\.backbone\.max_length: 25 exceeds the 24 positions of the model's context"),
        ({"max_length": 2}, r"suite\.backbone\.template: its 2 tokens leave no room for a text in max_length 2"),
        ({"template": "{text}" + " label" * 24, "max_length": 0}, r"its 24 tokens leave no room .* max_length 24"),
        ({"template": "no place"}, r"suite\.backbone\.template: needs \{text\} once, got 'no place'"),
        ({"label_prefix": " not "}, r"label_prefix \(t\): .*'negative' is split into 2 tokens \('not' 'negative'\) after label_prefix ' not '; .*'first'"),
        ({"label_prefix": " not ", "labels": "first"}, r"'negative' and 'neutral' begin with the same token \('not'\)"),
    ],
)  # fmt: skip
def test_prompts_and_labels_that_do_not_fit_are_named_before_anything_runs(
    folders: Any, given: dict[str, Any], message: str
) -> None:
    labels = {"t": ("negative", "neutral")}
    looked_at(folders["tied"][0], labels)
    with pytest.raises(UsageError, match=message):
        looked_at(folders["tied"][0], labels, **given)


def test_the_backbone_says_the_same(folders: Any) -> None:
    folder = folders["tied"][0]
    with pytest.raises(UsageError, match=r"hf-causal\.template: needs \{text\} once"):
        causal(folder, template="x")
    with pytest.raises(UsageError, match=r"hf-causal\.template: its 2 tokens leave no room"):
        causal(folder, max_length=2).tokenise(["i"])
    backbone = causal(folder)
    with pytest.raises(UsageError, match="'not good' is split into 2 tokens"):
        backbone.label_rows(loaded(backbone), ["neutral", "not good"])
    first = causal(folder, labels="first")
    rows = first.label_rows(loaded(first), ["neutral", "not good"])
    assert torch.equal(
        rows, first.base_weights()[first.embedding()][[WORDS.index("neutral"), WORDS.index("not")]]
    )


def test_a_tokenizer_of_another_network_is_told_by_its_first_word(folders: Any, tmp_path: Path) -> None:
    shutil.copytree(folders["tied"][0], tmp_path / "m")
    write_words(tmp_path / "m", bos_token="<s>")
    looked_at(tmp_path / "m")
    assert causal(tmp_path / "m").tokenise(["i"])[0].shape == (1, 3)
    write_words(tmp_path / "m", ["<s>", *(word for word in WORDS if word != "<s>")], bos_token="<s>")
    message = r"bos_token '<s>' has the number 0, config\.json has a bos_token_id of 2"
    with pytest.raises(UsageError, match=rf"suite\.backbone\.path: .*{message}"):
        looked_at(tmp_path / "m")
    with pytest.raises(UsageError, match=rf"hf-causal: .*{message}"):
        causal(tmp_path / "m").tokenise(["i"])


def told(folder: Path, **changes: Any) -> None:
    """Fields of the folder's tokenizer.json, changed."""
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_how_texts_are_cut_and_filled_up_is_not_the_tokenizers(folders: Any, tmp_path: Path) -> None:
    """Both are set anew when texts are read, so the plan may not count by them either."""
    folder = shutil.copytree(folders["tied"][0], tmp_path / "m")
    cut = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    filled = {
        "strategy": {"Fixed": 20}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "[PAD]",
    }  # fmt: skip
    told(folder, padding=filled)
    looked_at(folder, {"t": ("negative", "neutral")})
    told(folder, padding=None, truncation=cut)
    with pytest.raises(UsageError, match="'not good' is split into 2 tokens"):
        looked_at(folder, {"t": ("negative", "not good")})


def test_a_tokenizer_that_cannot_say_a_word_is_named(folders: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(folders["tied"][0], tmp_path / "m")
    vocab = {word: i for i, word in enumerate(WORDS) if word != "[UNK]"}
    told(folder, model={"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"}, added_tokens=[])
    with pytest.raises(
        UsageError, match=r"suite\.backbone\.path: the folder's tokenizer takes no text 'maybe'"
    ):
        looked_at(folder, {"t": ("maybe",)}, label_prefix="")


def test_a_label_that_the_tokenizer_does_not_know_is_named(folders: Any, tmp_path: Path) -> None:
    """One such label is read by the token of all that is unknown, two of them alike."""
    folder = folders["tied"][0]
    message = r"label_prefix.*: the tokenizer does not know the class name 'neither' after label_prefix ' ' \('\[UNK\]'\)"
    with pytest.raises(UsageError, match=rf"^suite\.backbone\.{message}"):
        looked_at(folder, {"t": ("negative", "neither")})
    backbone = causal(folder)
    with pytest.raises(UsageError, match=rf"^hf-causal\.{message}"):
        backbone.label_rows(loaded(backbone), ["negative", "neither"])
    pieces = shutil.copytree(folder, tmp_path / "m")
    told(pieces, model={"type": "Unigram", "unk_id": 1, "vocab": [[word, -1.0] for word in WORDS]})
    with pytest.raises(
        UsageError, match=r"does not know the class name 'yes' after label_prefix '' \('\[UNK\]'\)"
    ):
        looked_at(pieces, {"t": ("yes", "no")}, label_prefix="")


def test_a_text_without_tokens_has_no_features(folders: Any) -> None:
    """They would be those of a padded place."""
    for template, message in (("{text}", "the text '' has no token"), ("{text} label :", "")):
        backbone = causal(folders["tied"][0], template=template)
        if message:
            with pytest.raises(UsageError, match=message):
                backbone.features(loaded(backbone), ["the film", ""])
        else:
            assert backbone.features(loaded(backbone), ["the film", ""]).isfinite().all()


def test_a_prompt_behind_the_first_word_leaves_room(folders: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(folders["tied"][0], tmp_path / "m")
    write_words(folder, bos_token="<s>")
    told(folder, post_processor={
        "type": "TemplateProcessing", "pair": [],
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [2], "tokens": ["<s>"]}},
    })  # fmt: skip
    for look in (looked_at, lambda place, **given: causal(place, **given).tokenise(["i"])):
        look(folder, max_length=4)
        with pytest.raises(UsageError, match="its 3 tokens leave no room for a text in max_length 3"):
            look(folder, max_length=3)


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_weights_that_are_not_finite_give_no_answer(folders: Any, kind: str, tmp_path: Path) -> None:
    """The largest of NaN is the first, and would be counted."""
    folder = shutil.copytree(folders[kind][0], tmp_path / "m")
    name = "lm_head.weight" if kind == "untied" else "model.embed_tokens.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name][LABELS.index("place") + 5] = math.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if kind == "tied":
        with pytest.raises(ContractError, match=r"base: tensor 'embed_tokens\.weight' holds 32 non-finite"):
            made(folder, tmp_path, "base")
    else:
        backbone = causal(folder)
        with pytest.raises(UsageError, match=r"'lm_head\.weight' in .* holds values that are not finite"):
            backbone.answered(loaded(backbone), ["who"], ["not"])
        with pytest.raises(UsageError, match=r"'lm_head\.weight' in .* holds values that are not finite"):
            backbone.label_rows(loaded(backbone), LABELS)


def made(folder: Path, home: Path, kind: str) -> None:
    """The first step of a kind, of a grid on this folder."""
    catalog = load_catalog()
    raw = {**_grid(folder), "axes": {"merging": ["ties"]}, "threats": ["clean"]}
    steps = make_plan(resolve(parse_grid(raw, "grid"), catalog), lambda task: "").steps
    step = next(step for step in steps.values() if step.kind == kind)
    run(step, Bench(Store(home / "store"), catalog, CPU), {})


def test_cards_name_the_classes_that_tasks_have() -> None:
    catalog, named = load_catalog(), []
    for entry in catalog.entries["task"].values():
        card = entry.card
        if card.labels and card.name.startswith("mini/"):
            kind = getattr(importlib.import_module(entry.module), card.class_name)
            assert tuple(kind.classes) == card.labels
            named.append(card.name)
    assert {"mini/emotion", "mini/sentiment", "mini/topic", "mini/question"} <= set(named)


def test_bench_refuses_with_code_2(bench: Any, folders: Any, tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"  # JSON is YAML
    grid.write_text(json.dumps(_grid(folders["tied"][0], label_prefix=" not ")))
    done = bench("plan", "--grid", str(grid))
    assert done.code == 2 and "Traceback" not in done.err
    assert "suite.backbone.label_prefix (mini/sentiment): the class name 'negative' is split" in done.err


def adapter(folder: Path, layers: int, width: int) -> Path:
    """Factors for the query maps of a Llama."""
    folder.mkdir()
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    tensors = {name.format(i, "A"): torch.ones(2, width) for i in range(layers)}
    tensors |= {name.format(i, "B"): torch.ones(width, 2) for i in range(layers)}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_for_another_base_is_refused_by_the_plan(folders: Any, tmp_path: Path) -> None:
    from mergesec_tasks._modelfolders import inspect

    good, bad = adapter(tmp_path / "good", 3, 32), adapter(tmp_path / "bad", 3, 16)
    base = {"path": str(folders["tied"][0])}
    inspect("hf-causal", base, "suite.backbone", {"suite.experts.t": str(good)})
    with pytest.raises(
        UsageError,
        match=r"(?s)^suite\.experts\.t: .*make a map \[16, 16\], .* \[32, 32\]: an adapter for another base",
    ):
        inspect("hf-causal", base, "suite.backbone", {"suite.experts.t": str(bad)})


def test_an_adapter_of_more_blocks_or_with_maps_missing_is_refused_by_the_plan(
    folders: Any, tmp_path: Path
) -> None:
    from mergesec_tasks._modelfolders import inspect

    base = {"path": str(folders["tied"][0])}
    deep, cut = adapter(tmp_path / "deep", 5, 32), adapter(tmp_path / "cut", 2, 32)
    with pytest.raises(
        UsageError, match=r"no 'model\.layers\.3\.self_attn\.q_proj': an adapter for another base"
    ):
        inspect("hf-causal", base, "suite.backbone", {"suite.experts.t": str(deep)})
    with pytest.raises(
        UsageError, match=r"no factors for 'model\.layers\.2\.self_attn\.q_proj', which target_m"
    ):
        inspect("hf-causal", base, "suite.backbone", {"suite.experts.t": str(cut)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"r": 8},
            r"'model\.layers\.0\.self_attn\.q_proj' has factors of rank 2, by r and rank_pattern it is 8",
        ),
        ({"rank_pattern": {"q_proj": 4}}, "has factors of rank 2, by r and rank_pattern it is 4"),
        ({"target_modules": ["k_proj"]}, "has factors, but is none of target_modules: peft leaves it out"),
        ({"layers_to_transform": [99]}, "has factors, but is none of target_modules: peft leaves it out"),
    ],
)
def test_an_adapter_that_contradicts_its_options_is_refused_by_the_plan(
    folders: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    from mergesec_tasks._modelfolders import inspect

    place = adapter(tmp_path / "adapter", 3, 32)
    told = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps({**told, **options}))
    with pytest.raises(UsageError, match=rf"^suite\.experts\.t: .*{message}"):
        inspect(
            "hf-causal", {"path": str(folders["tied"][0])}, "suite.backbone", {"suite.experts.t": str(place)}
        )


def test_an_output_layer_is_looked_for_before_anything_runs(folders: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(folders["untied"][0], tmp_path / "m")
    looked_at(folder)
    tensors = load_file(folder / "model.safetensors")
    for kept, message in (
        ({"lm_head.weight": torch.ones(3, 32)}, r"'lm_head\.weight' in .* has the shape \[3, 32\]"),
        ({}, r"has no lm_head\.weight, and its embeddings are not tied"),
    ):
        body = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
        save_file({**body, **kept}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UsageError, match=rf"^suite\.backbone\.path: .*{message}"):
            looked_at(folder)
        backbone = causal(folder)
        with pytest.raises(UsageError, match=rf"^hf-causal: .*{message}"):
            backbone.label_rows(loaded(backbone), LABELS)


@pytest.mark.parametrize("output", ["same", "rounded", "missing", "trained"])
def test_an_expert_with_an_output_layer_of_its_own_is_no_number(
    folders: Any, output: str, tmp_path: Path
) -> None:
    """It would be read by the base's."""
    base = folders["untied"][0]
    expert = shutil.copytree(base, tmp_path / "expert")
    tensors = load_file(base / "model.safetensors")
    own = tensors.pop("lm_head.weight")
    if output == "trained":
        own[5, 7] += 0.5
    stored = {} if output == "missing" else {"lm_head.weight": own.bfloat16() if output == "rounded" else own}
    body = {name: tensor + 0.01 for name, tensor in tensors.items()}
    save_file({**body, **stored}, expert / "model.safetensors", {"format": "pt"})
    backbone = causal(base)
    if output == "trained":
        with pytest.raises(
            UsageError, match=r"^hf-causal: 'lm_head\.weight' in '.*expert' is not that of the base; here"
        ):
            backbone.published(str(expert))
    else:
        found = backbone.published(str(expert))
        torch.testing.assert_close(found["norm.weight"], tensors["model.norm.weight"] + 0.01)


@pytest.mark.parametrize("end", ["weight", "lora_A.weight"])
def test_an_adapter_that_trains_the_output_layer_is_refused(folders: Any, end: str, tmp_path: Path) -> None:
    from mergesec_tasks._modelfolders import inspect

    base, place = folders["untied"][0], adapter(tmp_path / "adapter", 3, 32)
    assert causal(base).published(str(place))
    factors = load_file(place / "adapter_model.safetensors")
    name = f"base_model.model.lm_head.{end}"
    save_file({**factors, name: torch.ones(2, 32)}, place / "adapter_model.safetensors")
    message = rf"'{re.escape(name)}' trains the output layer; here that is the base's"
    with pytest.raises(UsageError, match=rf"^suite\.experts\.t: .*{message}"):
        inspect("hf-causal", {"path": str(base)}, "suite.backbone", {"suite.experts.t": str(place)})
    with pytest.raises(UsageError, match=rf"^hf-causal: .*{message}"):
        causal(base).published(str(place))


def test_an_adapter_of_one_tower_needs_no_factors_for_the_other(tmp_path: Path) -> None:
    from mergesec.adapterconfig import read_lora
    from mergesec.modelfiles import header
    from mergesec_tasks._adapterfit import check_factors

    folder = adapter(tmp_path / "adapter", 3, 32)
    names = [
        f"{tower}.layers.{i}.self_attn.q_proj.weight" for tower in ("model", "text_model") for i in range(3)
    ]
    save_file({name: torch.zeros(32, 32) for name in names}, tmp_path / "base.safetensors")
    base = header(tmp_path / "base.safetensors", "base")
    check_factors(folder, base, read_lora(folder, "x"), "x")
    more = {**base, "model.layers.3.self_attn.q_proj.weight": base[names[0]]}
    with pytest.raises(UsageError, match=r"no factors for 'model\.layers\.3\.self_attn\.q_proj'"):
        check_factors(folder, more, read_lora(folder, "x"), "x")


@pytest.mark.parametrize("task", ["secrets", "refusal"])
def test_answers_that_do_not_fit_are_named_before_anything_runs(folders: Any, task: str) -> None:
    catalog = load_catalog()
    folder = folders["tied"][0]
    backbone = {"name": "hf-causal", "path": str(folder), "max_length": 12, "template": "{text} label :"}
    raw = {"name": "g", "suite": {"backbone": backbone, "tasks": [task]}, "axes": {"merging": ["ties"]}}
    with pytest.raises(UsageError) as told:
        resolve(parse_grid(raw, "grid g"), catalog)
    found = re.fullmatch(
        rf"suite\.backbone\.max_length \({task}\): 12 is less than the (\d+) tokens of a prompt and its answer",
        str(told.value),
    )
    assert found
    component = catalog.get("task", task).load()(**catalog.get("task", task).card.bind("x", {}))
    rows = [row for some in (*component.written().values(), *component.others().values()) for row in some]
    asked = causal(folder)
    with pytest.raises(UsageError, match=f"is less than the {found[1]} tokens"):
        asked.answered(loaded(asked), [prompt for prompt, _ in rows], [answer for _, answer in rows])


def test_of_an_adapter_for_all_blocks_those_that_are_kept_count(folders: Any, tmp_path: Path) -> None:
    place = str(adapter(tmp_path / "all", 3, 32))
    whole, part = causal(folders["tied"][0]), causal(folders["tied"][0], layers=2)
    every, kept = whole.published(place), part.published(place)
    assert kept.keys() == part.base_weights().keys() < every.keys()
    assert all(torch.equal(kept[name], every[name]) for name in kept)
    moved = [n for n, t in part.base_weights().items() if not torch.equal(t, kept[n])]
    assert moved == [f"layers.{i}.self_attn.q_proj.weight" for i in range(2)]


# --------------------------------------------------------------------------- the road


def _grid(folder: Path, **backbone: Any) -> dict[str, Any]:
    return {
        "name": "tiny-llm",
        "suite": {
            "name": "tiny",
            "backbone": {
                "name": "hf-causal", "path": str(folder), "layers": 2, "max_length": 12, "template": "{text} label :",
                "perplexity_rows": 6, **backbone,
            },
            "tasks": [{"name": "mini/sentiment", "max_test": 8}, {"name": "mini/question", "max_test": 8}],
        },
        "threats": ["clean", "protection", "backdoor"],
        "axes": {
            "merging": ["simple_average"], "attacks": ["none", "coupled", "lora_phrase"],
            "defenses": ["none", {"name": "params", "scaling": "v1"}],
            "victim": ["mini/sentiment"], "adversary": ["mini/sentiment"],
        },
        "exclude": [{"threat": "protection", "defense": "none", "attack": "coupled"}, {"threat": "backdoor", "attack": "none"}],
        "seeds": [0], "recipe": {"steps": 3, "batch_size": 8, "max_train": 16, "learning_rate": 0.01},
    }  # fmt: skip


class Ran(NamedTuple):
    records: list[Record]
    boards: dict[str, Board]


@pytest.fixture(scope="module")
def ran(folders: Any, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    catalog, place = load_catalog(), tmp_path_factory.mktemp("store")
    plan = make_plan(resolve(parse_grid(_grid(folders["tied"][0]), "tiny"), catalog), lambda task: "")
    store = Store(place)
    bench, kinds = Bench(store, catalog, CPU), {k: s.kind for k, s in plan.steps.items()}
    for key, step in plan.steps.items():
        blob, info = run(step, bench, kinds)
        store.put(step.kind, key, blob, {**info, "seconds": 0.0, "peak_mb": 0.0, "device": "cpu"})
    records = make_records(plan, store, Outcome())
    return Ran(records, {board.name: board for board in make_boards(records)})


def test_perplexity_stands_beside_accuracy_on_a_board_of_its_own(ran: Ran) -> None:
    assert {record.status for record in ran.records} == {"done"}
    frame = ran.boards["language"].frame.set_index(["model", "attack", "defense"])["perplexity"]
    assert set(frame.index.get_level_values("model")) == {
        "base", "expert", "merge", "published", "recovered", "protected merge", "poisoned", "poisoned merge",
    }  # fmt: skip
    assert (frame > 1).all() and (frame < 100 * len(WORDS)).all()
    own = [r.values["perplexity/expert/mini/sentiment"] for r in ran.records if r.threat == "protection"]
    # the protection keeps the function
    assert frame["published", "", "params"] == pytest.approx(own[0], rel=1e-4)
    header, rows = display(ran.boards["language"])
    shown = rows[0][header.index("perplexity")]
    assert shown.startswith(f"{frame.iloc[0]:.1f} ("), shown  # no share: not times a hundred


def test_records_name_no_place_of_this_machine(ran: Ran, folders: Any) -> None:
    place = str(folders["tied"][0].parent)
    for record in ran.records:
        text = record.model_dump_json()
        assert place not in text
        assert record.provenance["backbone"]["parameters"]["perplexity_rows"] == 6


@pytest.mark.shared
def test_a_real_one_at_two_blocks(shared: Path) -> None:
    """SmolLM2-135M-Instruct as ``../shared/models/make_smollm2.py`` makes it, where somebody did."""
    folder = Path(os.environ.get("MERGESEC_SMOLLM2") or shared / "models" / "SmolLM2-135M-Instruct")
    if not (folder / "config.json").is_file():
        pytest.skip(f"no {folder.name}: shared/models/make_smollm2.py makes it; set MERGESEC_SMOLLM2")
    needs("pyarrow")
    looked_at(
        folder,
        {"emotion": ("sadness", "joy", "love", "anger", "fear", "surprise")},
        template="{text}\nLabel:",
    )
    task = FolderText(40, 20, "text", "label")
    task.name = "emotion"
    splits = task.load(DataContext(CPU, 0, str(shared / "data" / "emotion")))
    backbone = causal(folder, layers=2, max_length=32, template="{text}\nLabel:", perplexity_rows=4)
    weights = backbone.base_weights()
    anatomy = backbone.anatomy()
    assert len(anatomy.blocks) == 2 and weights[backbone.embedding()].shape == (49152, 576)
    model = Model(backbone, load_network(backbone, weights))
    head = task.fit_head(model, splits["train"], Context(CPU, 0))
    assert head["weight"].shape == (6, 576)
    found = task.measure(model, head, splits, CPU)
    assert found is not None and found.values["perplexity"][0] > 1
