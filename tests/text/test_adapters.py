"""Adapters that the peft library saved stand in for experts: the same weights as peft's own merged network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from extras import needs
from safetensors.torch import load_file, save_file

from mergesec.adapters import with_adapter
from mergesec.errors import UsageError
from mergesec_tasks._adapters import expert_weights
from mergesec_tasks.text.hf_causal import HfCausal
from mergesec_tasks.text.hf_text import HfText
from mergesec_tasks.vision.hf_vit import HfVit

transformers = needs("transformers")
peft = needs("peft")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def network(kind: str) -> Any:
    """A tiny random network as somebody would fine-tune it, and the maps that get factors."""
    torch.manual_seed(5)
    if kind == "bert":
        config = transformers.BertConfig(vocab_size=20, max_position_embeddings=24, **SIZES)
        return transformers.BertForSequenceClassification(config), ["query", "value", "dense"]
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=24, vocab_size=20)
        return transformers.GPT2LMHeadModel(config), ["c_attn", "c_proj"]
    config = transformers.ViTConfig(image_size=32, patch_size=8, **SIZES)
    # by transformers' release the maps of a ViT are called query or q_proj
    return transformers.ViTForImageClassification(config), ".*(query|value|q_proj|v_proj)"


def backbone(kind: str, folder: Path) -> Any:
    if kind == "bert":
        return HfText(str(folder), 0, 0, "mean")
    return HfCausal(str(folder), 0, 0, "{text}:", " ") if kind == "gpt2" else HfVit(str(folder), 0, 0)


KEPT = {"bert": ["classifier"], "gpt2": ["ln_f"], "vit": ["layernorm"]}
MOST = {
    "plain": {}, "stabilised": {"use_rslora": True}, "without start": {"init_lora_weights": False},
    "gaussian": {"init_lora_weights": "gaussian"}, "orthogonal": {"init_lora_weights": "orthogonal", "r": 4},
    "PiSSA": {"init_lora_weights": "pissa"}, "PiSSA, stabilised": {"init_lora_weights": "pissa", "use_rslora": True},
    "DoRA": {"use_dora": True}, "all biases": {"bias": "all"}, "biases of maps": {"bias": "lora_only"},
    "bias of B": {"lora_bias": True}, "some layers": {"layers_to_transform": [1]},
    "whole modules": {"modules_to_save": True},
}  # fmt: skip
OPTIONS: list[tuple[str, str, dict[str, Any]]] = [
    *((kind, name, options) for kind in ("bert", "gpt2", "vit") for name, options in MOST.items()),
    ("bert", "patterns", {"rank_pattern": {"query": 5, "layer.1.output.dense": 2}, "alpha_pattern": {"layer.0.intermediate.dense": 9}}),
    ("gpt2", "patterns", {"rank_pattern": {"^transformer.h.1.attn.c_attn": 7}, "alpha_pattern": {"c_proj": 2.5}}),
    ("bert", "OLoRA", {"init_lora_weights": "olora"}),
    ("vit", "OLoRA", {"init_lora_weights": "olora", "use_rslora": True}),
    ("bert", "EVA", {"init_lora_weights": "eva"}),
    ("bert", "left out", {"exclude_modules": ["value"]}),
    ("vit", "every map", {"target_modules": "all-linear"}),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of peft
@pytest.mark.parametrize(("kind", "name", "options"), OPTIONS, ids=[f"{k}: {n}" for k, n, _ in OPTIONS])
def test_an_adapter_is_the_network_that_peft_loads_and_merges(
    kind: str, name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    plain, targets = network(kind)
    if "layers_to_transform" in options:  # goes with names only
        targets = targets if isinstance(targets, list) else ["query", "value", "q_proj", "v_proj"]
    plain.save_pretrained(tmp_path / "base")
    given = {"r": 3, "lora_alpha": 5, "target_modules": targets, **options}
    if given.get("modules_to_save"):
        given["modules_to_save"] = KEPT[kind]
    adapted = peft.get_peft_model(plain, peft.LoraConfig(fan_in_fan_out=kind == "gpt2", **given))
    with torch.no_grad():
        for parameter in adapted.parameters():  # as training would, somewhere else than at the start
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = type(plain).from_pretrained(tmp_path / "base")
    whole = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").merge_and_unload()
    whole.save_pretrained(tmp_path / "merged")
    subject = backbone(kind, tmp_path / "base")
    base, found = subject.base_weights(), subject.published(str(tmp_path / "adapter"))
    wanted = subject.published(str(tmp_path / "merged"))
    assert len([n for n in base if not torch.equal(base[n], found[n])]) >= 2
    assert found.keys() == wanted.keys()
    for tensor in wanted:
        torch.testing.assert_close(found[tensor], wanted[tensor], atol=2e-6, rtol=1e-5)


BASE = {"block.map.weight": torch.zeros(4, 6), "block.map.bias": torch.zeros(4), "norm.weight": torch.ones(4)}
FACTORS = {
    "base_model.model.block.map.lora_A.weight": torch.ones(2, 6),
    "base_model.model.block.map.lora_B.weight": torch.ones(4, 2),
}


def adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["map"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_by_hand(tmp_path: Path) -> None:
    whole = {
        "base_model.model.norm.weight": torch.full((4,), 2.0),
        "base_model.model.classifier.weight": torch.ones(3, 4),
    }
    found = with_adapter(BASE, adapter(tmp_path, {**FACTORS, **whole}, modules_to_save=["norm"]), "x")
    assert torch.equal(found["block.map.weight"], torch.full((4, 6), 6.0))  # 6 / 2 · (1 + 1)
    assert torch.equal(found["norm.weight"], torch.full((4,), 2.0))
    assert found.keys() == BASE.keys()
    assert torch.equal(BASE["block.map.weight"], torch.zeros(4, 6))


def test_a_whole_clips_text_tower_is_left_out_where_there_is_none(tmp_path: Path) -> None:
    """Its maps are called like those of the vision tower."""
    vision = {n.replace("model.block", "model.vision_model.block"): f for n, f in FACTORS.items()}
    text = {n.replace("model.block", "model.text_model.block"): 9 * f for n, f in FACTORS.items()}
    found = with_adapter(BASE, adapter(tmp_path, {**text, **vision}), "x")
    assert torch.equal(found["block.map.weight"], torch.full((4, 6), 6.0))


@pytest.mark.parametrize("text", ["{", "[]", "1", '{"r": 1, "r": 2}', '{"r": NaN}', "[" * 5000, '"\\ud800"'])
def test_a_config_that_is_no_mapping_in_json_is_said(text: str, tmp_path: Path) -> None:
    (adapter(tmp_path, FACTORS) / "adapter_config.json").write_text(text)
    with pytest.raises(UsageError, match=r"adapter_config\.json.*is no"):
        with_adapter(BASE, tmp_path, "x")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; expected 'LORA'"),
        ({"lora_alpha": None}, "lora_alpha is None; expected a number above 0"),
        ({"lora_alpha": -1}, "lora_alpha is -1"),
        ({"r": 10**9}, "r is 1000000000; expected a whole number"),
        ({"r": True}, "r is True"),
        *(
            ({"init_lora_weights": start}, f"init_lora_weights is '{start}'; expected true, false, 'gaussian'")
            for start in ("pissa_niter_4", "corda", "loftq", "lora_ga", "mica", "something new")
        ),
        ({"init_lora_weights": "olora", "fan_in_fan_out": True}, "another start than 'olora' with fan_in_fan_out"),
        ({"use_rslora": 1}, "use_rslora is 1; expected true or false"),
        ({"bias": "some"}, "bias is 'some'; expected 'none', 'all' or 'lora_only'"),
        *(
            ({option: value}, f"{option} is .*; expected no such option")
            for option, value in {
                "layer_replication": [[0, 2], [1, 3]], "target_parameters": ["mlp.experts"], "use_qalora": True,
                "trainable_token_indices": [1, 2], "megatron_config": {"a": 1}, "use_bdlora": {"a": 1},
                "alora_invocation_tokens": [1], "arrow_config": {"top_k": 2}, "ensure_weight_tying": True, "new": 0.5,
            }.items()
        ),
        ({"rank_pattern": {"(a+)+$": 2}}, "rank_pattern is .*; expected names of modules"),
        ({"rank_pattern": [1]}, "rank_pattern is"),
        ({"alpha_pattern": {"map": "x"}}, "alpha_pattern is"),
        ({"target_modules": "(a+)+$"}, "target_modules is .*simple regular expression"),
        ({"target_modules": "("}, "target_modules is .*regular expression"),
        ({"layers_to_transform": "all"}, "layers_to_transform is 'all'"),
        ({"target_modules": ["mop"]}, "is none of target_modules: peft leaves it out"),
        ({"exclude_modules": ["map"]}, "is none of target_modules"),
        ({"r": 3}, "'block.map' has factors of rank 2, by r and rank_pattern it is 3"),
        ({"rank_pattern": {"map": 4}}, "of rank 2, by r and rank_pattern it is 4"),
        ({"use_dora": True}, "has no lora_magnitude_vector"),
    ],
)  # fmt: skip
def test_an_option_that_is_not_merged_is_refused_by_name(config: Any, message: str, tmp_path: Path) -> None:
    """What is known to be good is taken: a value that no release of peft has yet is refused as well."""
    with pytest.raises(UsageError, match=message):
        with_adapter(BASE, adapter(tmp_path, FACTORS, **config), "x")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({n.replace("map", "mop"): t for n, t in FACTORS.items()}, r"no linear map for 'block.mop.lora_A"),
        (dict(list(FACTORS.items())[:1]), "not one of two factors"),
        ({**FACTORS, next(iter(FACTORS)): torch.ones(2, 5)}, r"no linear map for 'block.map.lora_A"),
        ({**FACTORS, next(iter(FACTORS)): torch.ones(2, 6, 1, 1)}, r"no linear map for 'block.map.lora_A"),
        ({**FACTORS, **{n.replace("model.block", "model.tower.block"): t.clone() for n, t in FACTORS.items()}}, "two parts"),
        ({"base_model.model.word.lora_embedding_A": torch.ones(2, 6)}, "not one of two factors"),
        ({**FACTORS, "base_model.model.norm.weight": torch.ones(4)}, "neither modules_to_save nor bias names"),
        ({**FACTORS, "base_model.model.block.map.bias": torch.ones(4)}, "neither modules_to_save nor bias names"),
        ({**FACTORS, "base_model.model.block.map.lora_magnitude_vector": torch.ones(4)}, "has a lora_magnitude_vector"),
        ({n: t.to(torch.int8) for n, t in FACTORS.items()}, "has type I8: codes of quantised weights"),
        ({"base_model.model.classifier.weight": torch.ones(3, 4)}, "nothing in it belongs to the base"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_the_options_are_refused(
    tensors: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        with_adapter(BASE, adapter(tmp_path, tensors), "x")


def test_factors_that_are_missing_are_missed(tmp_path: Path) -> None:
    """A file that lost maps to which ``target_modules`` gives factors."""
    base = {**BASE, "other.map.weight": torch.zeros(4, 6)}
    with pytest.raises(UsageError, match=r"no factors for 'other\.map', which target_modules names"):
        with_adapter(base, adapter(tmp_path, FACTORS), "x")


def test_only_safetensors_is_read_and_one_model_a_folder(tmp_path: Path) -> None:
    adapter(tmp_path, FACTORS)
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"no file .*adapter_model\.safetensors"):
        with_adapter(BASE, tmp_path, "x")
    with pytest.raises(UsageError, match="holds a network and an adapter"):
        expert_weights(str(tmp_path), "x", lambda: BASE, lambda place: BASE)
