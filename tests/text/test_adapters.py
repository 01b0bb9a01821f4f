"""Adapters that the peft library saved stand in for experts: the same weights as peft's own merged network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from extras import needs
from safetensors.torch import load_file, save_file

from mergesec.contracts import ContractError
from mergesec_tasks._adapters import with_adapter
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


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "vit"])
def test_an_adapter_is_the_network_that_peft_merges(kind: str, stabilised: bool, tmp_path: Path) -> None:
    plain, targets = network(kind)
    plain.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=targets, use_rslora=stabilised, fan_in_fan_out=kind == "gpt2",
        modules_to_save=["classifier"] if kind == "bert" else None,
    )  # fmt: skip
    adapted = peft.get_peft_model(plain, settings)
    with torch.no_grad():
        for name, factor in adapted.named_parameters():
            if "lora_B" in name:  # zero at first
                factor.normal_(std=0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    subject = backbone(kind, tmp_path / "base")
    base, found = subject.base_weights(), subject.published(str(tmp_path / "adapter"))
    wanted = subject.published(str(tmp_path / "merged"))
    changed = [n for n in base if not torch.equal(base[n], found[n])]
    assert len(changed) >= 4
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-6, rtol=1e-5)


BASE = {"block.map.weight": torch.zeros(4, 6), "block.map.bias": torch.zeros(4), "norm.weight": torch.ones(4)}
FACTORS = {
    "base_model.model.block.map.lora_A.weight": torch.ones(2, 6),
    "base_model.model.block.map.lora_B.weight": torch.ones(4, 2),
}


def adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6, **config})
    )
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_by_hand(tmp_path: Path) -> None:
    whole = {
        "base_model.model.norm.weight": torch.full((4,), 2.0),
        "base_model.model.classifier.weight": torch.ones(3, 4),
    }
    found = with_adapter(BASE, adapter(tmp_path, {**FACTORS, **whole}), "x")
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


def test_a_config_that_is_no_json_is_said(tmp_path: Path) -> None:
    (adapter(tmp_path, FACTORS) / "adapter_config.json").write_text("{")
    with pytest.raises(ContractError, match="is no JSON"):
        with_adapter(BASE, tmp_path, "x")


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (FACTORS, {"peft_type": "IA3"}, "of type 'IA3'"),
        (FACTORS, {"lora_alpha": None}, "no number lora_alpha"),
        (FACTORS, {"use_dora": True}, "LoRA with use_dora"),
        ({n.replace("map", "mop"): t for n, t in FACTORS.items()}, {}, r"no tensor \[4, 6\] for 'block.mop.lora_A"),
        (dict(list(FACTORS.items())[:1]), {}, "not one of two factors"),
        ({**FACTORS, next(iter(FACTORS)): torch.ones(2, 5)}, {}, r"no tensor \[4, 5\] for 'block.map.lora_A"),
        ({**FACTORS, **{n.replace("model.block", "model.tower.block"): t.clone() for n, t in FACTORS.items()}}, {}, "two parts"),
        ({"base_model.model.word.lora_embedding_A": torch.ones(2, 6)}, {}, "not one of two factors"),
    ],
)  # fmt: skip
def test_what_is_not_plain_lora_is_refused(
    tensors: dict[str, torch.Tensor], config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ContractError, match=message):
        with_adapter(BASE, adapter(tmp_path, tensors, **config), "x")


def test_only_safetensors_is_read(tmp_path: Path) -> None:
    adapter(tmp_path, FACTORS)
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no adapter_model\.safetensors"):
        with_adapter(BASE, tmp_path, "x")
