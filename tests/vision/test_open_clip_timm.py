"""open_clip and timm backbones on tiny random models saved in their published formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from extras import needs
from safetensors.torch import load_file, save_file

from mergesec.contracts import load_network
from mergesec.errors import UsageError
from mergesec_tasks.vision.open_clip import OpenClip
from mergesec_tasks.vision.timm_vit import TimmVit

CPU = torch.device("cpu")
MODEL: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
PROMPTS = [["a cat.", "the cat."], ["a dog.", "the dog."]]


@pytest.fixture(scope="module")
def openai(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    open_clip = needs("open_clip")
    torch.manual_seed(1)
    whole = open_clip.CLIP(**MODEL).eval()
    folder = tmp_path_factory.mktemp("open_clip")
    save_file(
        {n: t.contiguous() for n, t in whole.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    pixels = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL, "preprocess_cfg": pixels}))
    return folder, whole


def open_clip_of(folder: Path, resolution: int = 0, layers: int = 0, **other: str) -> OpenClip:
    given = {"architecture": "", "head": "zero-shot", **other}
    return OpenClip(str(folder), resolution=resolution, layers=layers, **given)


def test_embeddings_and_head_equal_open_clips(openai: tuple[Path, Any]) -> None:
    folder, whole = openai
    subject = open_clip_of(folder)
    images = torch.rand(3, 3, 32, 32)
    pixels = (images - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(
        3, 1, 1
    )
    head = subject.zero_shot([["a cat."], ["a dog."]], CPU)
    assert head is not None
    from open_clip.tokenizer import SimpleTokenizer

    with torch.no_grad():
        ours = subject.features(load_network(subject, subject.base_weights()), images)
        torch.testing.assert_close(ours, whole.encode_image(pixels), rtol=0, atol=1e-5)
        wanted = whole.get_logits(pixels, SimpleTokenizer(context_length=16)(["a cat.", "a dog."]))[0]
    logits = head["scale"] * torch.nn.functional.normalize(ours, dim=-1) @ head["weight"].T
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)
    assert subject.zero_shot(PROMPTS, CPU)["weight"].shape == (2, 24)  # type: ignore[index]
    assert open_clip_of(folder, head="probe").zero_shot(PROMPTS, CPU) is None


def test_open_clip_resolution_layers_and_anatomy(openai: tuple[Path, Any]) -> None:
    folder, _ = openai
    subject = open_clip_of(folder, resolution=48, layers=2)
    weights = subject.base_weights()
    assert weights["positional_embedding"].shape == (37, 32)
    images = torch.rand(2, 3, 30, 40, requires_grad=True)
    subject.features(load_network(subject, weights), images).square().sum().backward()
    assert images.grad is not None
    assert float((images.grad != 0).float().mean()) > 0.9
    blocks = subject.anatomy().blocks
    assert len(blocks) == 2
    assert (blocks[0].attention.heads, blocks[0].attention.query.rows) == (4, (0, 32))
    assert all(b.mlp.up.weight in weights for b in blocks)


def test_open_clip_messages(openai: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = openai
    with pytest.raises(UsageError, match="resolution 30"):
        open_clip_of(folder, resolution=30).config()
    with pytest.raises(UsageError, match="layers 9 exceed the 3"):
        open_clip_of(folder, layers=9).config()
    with pytest.raises(UsageError, match=r"architecture 'ViT-Q'.*list_models"):
        open_clip_of(folder / "open_clip_model.safetensors", architecture="ViT-Q")._named()
    with pytest.raises(UsageError, match="0 safetensors files"):
        open_clip_of(tmp_path, architecture="ViT-B-32")._release()


def test_a_file_alone_takes_a_named_architecture(openai: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = openai
    file = tmp_path / "weights.safetensors"
    file.write_bytes((folder / "open_clip_model.safetensors").read_bytes())
    subject = open_clip_of(file, architecture="ViT-B-32-quickgelu")
    assert subject._release().weights == file
    assert subject.config()["vision_cfg"]["width"] == 768
    assert subject._release().mean[0] == pytest.approx(0.48145466)


def test_open_clip_experts_whole_or_the_tower_alone(openai: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = openai
    subject = open_clip_of(folder)
    base = subject.base_weights()
    moved = {n: t + 1 for n, t in base.items()}
    save_file({f"visual.{n}": t for n, t in moved.items()}, tmp_path / "whole.safetensors")
    save_file(moved, tmp_path / "tower.safetensors")
    for name in ("whole", "tower"):
        found = subject.published(str(tmp_path / f"{name}.safetensors"))
        assert found.keys() == base.keys()
        assert all(torch.equal(found[n], moved[n]) for n in base)


# --------------------------------------------------------------------------- timm

ARGUMENTS: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    timm = needs("timm")
    torch.manual_seed(1)
    network = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=5, **ARGUMENTS).eval()
    folder = tmp_path_factory.mktemp("timm")
    save_file(network.state_dict(), folder / "model.safetensors")
    told = {
        "architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": ARGUMENTS,
        "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(told))
    return folder, network


def test_timm_features_equal_what_its_classifier_sees(vit: tuple[Path, Any]) -> None:
    folder, network = vit
    subject = TimmVit(str(folder), 0, 0)
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        ours = subject.features(load_network(subject, subject.base_weights()), images)
        wanted = network.forward_head(network.forward_features((images - 0.5) / 0.5), pre_logits=True)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)


def test_timm_resolution_layers_and_anatomy(vit: tuple[Path, Any]) -> None:
    folder, _ = vit
    subject = TimmVit(str(folder), 48, 2)
    weights = subject.base_weights()
    assert weights["pos_embed"].shape == (1, 37, 32)
    assert not any(name.startswith(("head.", "blocks.2.")) for name in weights)
    assert subject.features(load_network(subject, weights), torch.rand(2, 3, 20, 20)).shape == (2, 32)
    blocks = subject.anatomy().blocks
    assert [b.attention.heads for b in blocks] == [4, 4]
    assert all(b.attention.value.rows == (64, 96) for b in blocks)


def test_timm_messages_and_experts(vit: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = vit
    with pytest.raises(UsageError, match="layers 9 exceed the 3"):
        TimmVit(str(folder), 0, 9).base_weights()
    with pytest.raises(UsageError, match="no folder"):
        TimmVit("", 0, 0).build()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="names no architecture"):
        TimmVit(str(tmp_path), 0, 0).build()
    expert = {n: t + 1 for n, t in load_file(folder / "model.safetensors").items()}
    save_file(expert, tmp_path / "expert.safetensors")
    found = TimmVit(str(folder), 0, 0).published(str(tmp_path / "expert.safetensors"))
    assert torch.equal(found["blocks.0.attn.qkv.weight"], expert["blocks.0.attn.qkv.weight"])
    assert "head.weight" not in found
