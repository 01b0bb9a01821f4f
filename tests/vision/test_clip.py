"""CLIP backbones on tiny random models saved in the published format, down the road the real ones take."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from extras import needs
from safetensors.torch import load_file, save_file

from mergesec.contracts import load_network
from mergesec.errors import UsageError
from mergesec_tasks._modelfolders import inspect
from mergesec_tasks.vision.clip import Clip

transformers = needs("transformers")

CPU = torch.device("cpu")
PROMPTS = [[f"a photo of a {name}.", f"a drawing of the {name}."] for name in ("cat", "dog", "green tree")]


def clip(folder: Path | str, resolution: int = 0, layers: int = 0, head: str = "zero-shot") -> Clip:
    return Clip(str(folder), resolution, layers, head)


@pytest.fixture(scope="module")
def whole(tiny_clip: Path) -> Any:
    return transformers.CLIPModel.from_pretrained(tiny_clip).eval()


def test_features_and_logits_equal_the_whole_clip(tiny_clip: Path, whole: Any) -> None:
    subject = clip(tiny_clip)
    images = torch.rand(3, 3, 32, 32)
    mean, deviation = subject.normalisation()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_clip)
    with torch.no_grad():
        ours = subject.features(load_network(subject, subject.base_weights()), images)
        one = [[texts[0]] for texts in PROMPTS]
        head = subject.zero_shot(one, CPU)
        assert head is not None
        batch = tokenizer([texts[0] for texts in PROMPTS], padding=True, return_tensors="pt")
        output = whole(pixel_values=(images - mean) / deviation, **batch)
    unit = torch.nn.functional.normalize(ours, dim=-1)
    torch.testing.assert_close(unit, output.image_embeds, rtol=0, atol=1e-5)
    logits = head["scale"] * unit @ head["weight"].T
    torch.testing.assert_close(logits, output.logits_per_image, rtol=0, atol=1e-4)


def test_ensembles_average_in_embedding_space(tiny_clip: Path) -> None:
    subject = clip(tiny_clip)
    both = subject.zero_shot(PROMPTS, CPU)
    singles = [subject.zero_shot([[texts[i]] for texts in PROMPTS], CPU) for i in range(2)]
    assert both is not None
    mean = sum(head["weight"] for head in singles if head is not None)
    wanted = torch.nn.functional.normalize(mean, dim=-1)
    torch.testing.assert_close(both["weight"], wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(both["weight"].norm(dim=-1), torch.ones(3))
    assert float(both["scale"]) == pytest.approx(float(torch.tensor(2.6592).exp()), rel=1e-4)


def test_only_the_vision_tower_is_merged(tiny_clip: Path, whole: Any) -> None:
    weights = clip(tiny_clip).base_weights()
    assert not any("projection" in name or "text" in name or "scale" in name for name in weights)
    assert sum(t.numel() for t in weights.values()) == sum(p.numel() for p in whole.vision_model.parameters())


def test_resolution_and_layers(tiny_clip: Path, whole: Any) -> None:
    subject = clip(tiny_clip, resolution=48, layers=2)
    network = load_network(subject, subject.base_weights())
    images = torch.rand(2, 3, 48, 48)
    assert subject.features(network, images).shape == (2, 24)
    assert len(subject.anatomy().blocks) == 2
    whole_network = clip(tiny_clip, resolution=48)
    mean, deviation = subject.normalisation()
    with torch.no_grad():
        ours = whole_network.features(load_network(whole_network, whole_network.base_weights()), images)
        theirs = whole.get_image_features((images - mean) / deviation, interpolate_pos_encoding=True)
    torch.testing.assert_close(ours, getattr(theirs, "pooler_output", theirs), rtol=0, atol=1e-5)


def test_probe_heads_are_fitted_by_the_engine(tiny_clip: Path) -> None:
    assert clip(tiny_clip, head="probe").zero_shot(PROMPTS, CPU) is None


def test_features_resize_bicubic_within_the_pixel_range(tiny_clip: Path) -> None:
    subject = clip(tiny_clip)
    network = load_network(subject, subject.base_weights())
    images = (torch.rand(2, 3, 64, 64) > 0.5).float().requires_grad_()
    subject.features(network, images).square().sum().backward()
    assert images.grad is not None
    assert bool((images.grad != 0).any())


def test_a_vision_tower_alone_is_not_a_clip(tiny_clip: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_clip / "model.safetensors")
    for file in tiny_clip.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(
        {n: t for n, t in tensors.items() if "projection" not in n}, tmp_path / "model.safetensors",
        {"format": "pt"},
    )  # fmt: skip
    subject = clip(tmp_path)
    with pytest.raises(UsageError, match=r"visual_projection\.weight.*whole CLIP"):
        subject.features(load_network(subject, subject.base_weights()), torch.rand(1, 3, 32, 32))


def test_offline_absence_is_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def nothing(*_: object, **__: object) -> str:
        raise ConnectionError("no network here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing)
    name = "openai/clip-vit-base-patch32@" + "c" * 40
    with pytest.raises(UsageError, match=r"clip: model openai/clip-vit-base-patch32 at c{12}.*hf download"):
        _ = clip(name).config
    with pytest.raises(UsageError, match="no folder 'nowhere'"):
        _ = clip("nowhere").config


def test_a_clip_without_words_knows_none(tiny_clip: Path, tmp_path: Path) -> None:
    """Where no word is known, the library reads every prompt as the same."""
    folder = shutil.copytree(tiny_clip, tmp_path / "m")
    words = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    message = r"no tokenizer\.json, nor vocab\.json and merges\.txt"
    with pytest.raises(UsageError, match=rf"^suite\.backbone\.model: {message}"):
        inspect("clip", {"model": str(folder), "head": "zero-shot"}, "suite.backbone", {})
    with pytest.raises(UsageError, match=rf"^clip: {message}"):
        clip(folder).zero_shot(PROMPTS, CPU)
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    found, wanted = clip(folder).zero_shot(PROMPTS, CPU), clip(tiny_clip).zero_shot(PROMPTS, CPU)
    assert found is not None and wanted is not None
    assert torch.equal(found["weight"], wanted["weight"])
    (folder / "vocab.json").write_text(json.dumps({**words, "<|endoftext|>": 3, "\u0103": 513}))
    with pytest.raises(UsageError, match=r"have the same number|the end token has the number"):
        clip(folder).zero_shot(PROMPTS, CPU)


@pytest.mark.parametrize("name", ["visual_projection.weight", "text_projection.weight", "logit_scale"])
def test_frozen_parts_are_finite(tiny_clip: Path, name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_clip, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=f"'{name}' in .* holds values that are not finite"):
        clip(folder).frozen()


def test_an_end_token_is_a_number(tiny_clip: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_clip, tmp_path / "m")
    raw = json.loads((folder / "config.json").read_text())
    for value in (None, [513]):
        raw["text_config"]["eos_token_id"] = value
        (folder / "config.json").write_text(json.dumps(raw))
        with pytest.raises(UsageError, match=r"eos_token_id is .*; expected the number of a token"):
            clip(folder).zero_shot(PROMPTS, CPU)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("logit_scale", None, "no tensor 'logit_scale' in .*; a whole CLIP is needed"),
        ("text_projection.weight", None, "no tensor 'text_projection.weight' in .*; a whole CLIP is needed"),
        ("logit_scale", torch.ones(3), r"have the shapes \[\[24, 32\], \[24, 16\], \[3\]\]; expected \[d, 32\], \[d, h\] and one"),
        ("visual_projection.weight", torch.ones(24, 31), r"have the shapes \[\[24, 31\], \[24, 16\], \[\]\]"),
    ],
)  # fmt: skip
def test_the_plan_looks_for_a_whole_clip(
    tiny_clip: Path, name: str, tensor: torch.Tensor | None, message: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_clip, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if n != name} | ({} if tensor is None else {name: tensor})
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    for head in ("zero-shot", "probe"):
        with pytest.raises(UsageError, match=rf"^suite\.backbone\.model: .*{message}"):
            inspect("clip", {"model": str(folder), "head": head}, "suite.backbone", {})
    with pytest.raises(UsageError, match=f"^clip: .*{message}"):
        clip(folder).frozen()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"layers": 4}, "layers: 4 exceed the 3 of the model"),
        ({"resolution": 36}, "resolution: 36 is not a multiple of the patch size 8"),
    ],
)
def test_the_plan_asks_for_no_more_than_there_is(
    tiny_clip: Path, asked: dict[str, int], message: str
) -> None:
    with pytest.raises(UsageError, match=rf"^suite\.backbone\.{message}"):
        inspect("clip", {"model": str(tiny_clip), "head": "zero-shot", **asked}, "suite.backbone", {})
