"""The Hugging Face ViT backbone on tiny checkpoints written here, and on real ones where they lie beside."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from extras import needs

from mergesec.contracts import ContractError, load_network
from mergesec.errors import UsageError
from mergesec.weights import digest_weights
from mergesec_tasks.vision.hf_vit import HfVit, interpolated_positions

transformers = needs("transformers")

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
KINDS = ("vit", "dinov2", "clip", "clip-vision")


def tiny(kind: str) -> Any:
    """A small random network of a kind, in evaluation mode."""
    torch.manual_seed(3)
    if kind == "vit":
        return transformers.ViTModel(transformers.ViTConfig(**SMALL, intermediate_size=64)).eval()
    if kind == "dinov2":
        return transformers.Dinov2Model(transformers.Dinov2Config(**SMALL, mlp_ratio=2)).eval()
    vision = transformers.CLIPVisionConfig(**SMALL, intermediate_size=64)
    if kind == "clip-vision":
        return transformers.CLIPVisionModel(vision).eval()
    text = transformers.CLIPTextConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=50
    )
    config = transformers.CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8
    )
    return transformers.CLIPModel(config).eval()


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    network = tiny(request.param)
    network.save_pretrained(folder)
    return request.param, folder, network


def backbone(folder: Path, resolution: int = 0, layers: int = 0) -> HfVit:
    return HfVit(str(folder), resolution, layers)


def reference_features(kind: str, network: Any, pixels: torch.Tensor) -> torch.Tensor:
    if kind == "clip":
        network = network.vision_model
    output = network(pixel_values=pixels)
    features: torch.Tensor = output.pooler_output if "clip" in kind else output.last_hidden_state[:, 0]
    return features


def test_features_equal_the_library_at_the_native_size(checkpoint: tuple[str, Path, Any]) -> None:
    kind, folder, network = checkpoint
    subject = backbone(folder)
    images = torch.rand(3, 3, 32, 32)
    mean, deviation = subject.normalisation()
    with torch.no_grad():
        ours = subject.features(load_network(subject, subject.base_weights()), images)
        wanted = reference_features(kind, network, (images - mean) / deviation)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)


def test_other_resolution_equals_the_library_interpolating_at_every_forward(
    checkpoint: tuple[str, Path, Any],
) -> None:
    kind, folder, network = checkpoint
    subject = backbone(folder, resolution=48)
    weights = subject.base_weights()
    images = torch.rand(2, 3, 48, 48)
    mean, deviation = subject.normalisation()
    pixels = (images - mean) / deviation
    vision = network.vision_model if kind == "clip" else network
    extra = {} if kind == "dinov2" else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        ours = subject.features(load_network(subject, weights), images)
        output = vision(pixel_values=pixels, **extra)
    wanted = output.pooler_output if "clip" in kind else output.last_hidden_state[:, 0]
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)
    positions = next(t for n, t in weights.items() if "position_embedding" in n)
    assert positions.shape[-2] == 1 + 36


def test_fewer_layers_keep_the_first_ones(checkpoint: tuple[str, Path, Any]) -> None:
    _, folder, _ = checkpoint
    whole, part = backbone(folder).base_weights(), backbone(folder, layers=2).base_weights()
    assert set(part) < set(whole)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in part.items())
    assert len(backbone(folder, layers=2).anatomy().blocks) == 2
    with pytest.raises(UsageError, match="layers 4 exceed the 3"):
        _ = backbone(folder, layers=4).config


def test_anatomy_names_tensors_of_the_network(checkpoint: tuple[str, Path, Any]) -> None:
    _, folder, _ = checkpoint
    subject = backbone(folder)
    weights = subject.base_weights()
    blocks = subject.anatomy().blocks
    assert len(blocks) == 3
    for block in blocks:
        assert (block.attention.heads, block.attention.head_dim) == (4, 8)
        assert weights[block.mlp.up.weight].shape == (64, 32)
        assert weights[block.mlp.down.weight].shape == (32, 64)
        assert weights[block.attention.value.weight].shape == (32, 32)


def test_build_gives_independent_networks_and_leaves_the_global_randomness_alone(
    checkpoint: tuple[str, Path, Any],
) -> None:
    _, folder, _ = checkpoint
    subject = backbone(folder)
    torch.manual_seed(11)
    first = subject.build()
    drawn = torch.rand(1)
    torch.manual_seed(11)
    assert torch.equal(drawn, torch.rand(1))
    weights = subject.base_weights()
    before = digest_weights(weights)
    network = load_network(subject, weights)
    for parameter in network.parameters():
        parameter.data.zero_()
    assert digest_weights(weights) == before
    assert digest_weights(load_network(subject, weights).state_dict()) == before
    assert any(bool(p.any()) for p in first.parameters())


def test_half_precision_on_disk_becomes_float32(tmp_path: Path) -> None:
    network = tiny("dinov2")
    network.half().save_pretrained(tmp_path)
    weights = backbone(tmp_path).base_weights()
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert torch.equal(weights["layernorm.weight"], network.layernorm.weight.float())


def test_features_resize_and_are_differentiable_in_the_pixels(checkpoint: tuple[str, Path, Any]) -> None:
    _, folder, _ = checkpoint
    subject = backbone(folder)
    network = load_network(subject, subject.base_weights())
    images = torch.rand(2, 3, 50, 41, requires_grad=True)
    subject.features(network, images).square().sum().backward()
    assert images.grad is not None
    assert float((images.grad != 0).float().mean()) > 0.9


def test_own_preprocessing_wins(tmp_path: Path) -> None:
    tiny("vit").save_pretrained(tmp_path)
    torch.testing.assert_close(backbone(tmp_path).normalisation()[0].flatten(), torch.full((3,), 0.5))
    given = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 2.0, 3.0]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(given))
    mean, deviation = backbone(tmp_path).normalisation()
    torch.testing.assert_close(mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))
    torch.testing.assert_close(deviation.flatten(), torch.tensor([1.0, 2.0, 3.0]))


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no config.json in"):
        _ = backbone(tmp_path / "nowhere").config
    with pytest.raises(UsageError, match="'path'"):
        _ = HfVit("", 0, 0).config
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 8}))
    with pytest.raises(UsageError, match=r"'bert'.*dinov2"):
        _ = backbone(tmp_path).config
    tiny("vit").config.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="no safetensors"):
        backbone(tmp_path).base_weights()
    tiny("vit").save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="resolution 30 is not a multiple of the patch size 8"):
        _ = backbone(tmp_path, resolution=30).config


def test_incomplete_checkpoint_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny("dinov2").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in sorted(tensors) if "mlp.fc1.weight" in name)
    save_file(
        {n: t for n, t in tensors.items() if n != gone}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UsageError, match=r"mlp\.fc1\.weight|lacks 1 tensors"):
        backbone(tmp_path).base_weights()


def test_positions_keep_the_class_token_and_constant_grids() -> None:
    positions = torch.cat([torch.full((1, 1, 4), 9.0), torch.full((1, 16, 4), 2.0)], dim=1)
    resized = interpolated_positions(positions, 7)
    assert resized.shape == (1, 50, 4)
    torch.testing.assert_close(resized[:, 0], positions[:, 0])
    torch.testing.assert_close(resized[:, 1:], torch.full((1, 49, 4), 2.0))
    assert interpolated_positions(positions, 4) is positions
    with pytest.raises(ContractError, match="square grid"):
        interpolated_positions(torch.zeros(1, 16, 4), 7)


def shared_folder() -> Path:
    root = os.environ.get("MERGESEC_SHARED", str(Path(__file__).resolve().parents[2].parent / "shared"))
    return Path(root)


@pytest.mark.shared
def test_real_dinov2_knows_scenes_at_56_pixels() -> None:
    """A probe on 300 rows beats chance (12.5 %) by far: weights and pixels fit each other."""
    folder = shared_folder()
    if not (folder / "models" / "dinov2-small").is_dir() or not (folder / "data" / "sun397").is_dir():
        pytest.skip(f"no development data in '{folder}' (MERGESEC_SHARED)")
    needs("pyarrow")
    from mergesec.contracts import Context, DataContext, Model
    from mergesec_tasks.vision.folder import FolderTask

    task = FolderTask(64, 300, 150, "image", "label")
    task.name = "sun397"
    splits = task.load(DataContext(torch.device("cpu"), 0, str(folder / "data" / "sun397")))
    subject = backbone(folder / "models" / "dinov2-small", resolution=56)
    model = Model(subject, load_network(subject, subject.base_weights()))
    head = task.fit_head(model, splits["train"], Context(torch.device("cpu"), 0))
    test = task.batch(splits["test"], torch.arange(150), torch.device("cpu"))
    with torch.no_grad():
        predicted = task.predictions(task.outputs(model, head, test.inputs))
    assert float((predicted == test.targets).float().mean()) > 0.75
