"""Image models in folders: an expert's network and pixels are the base's, known fields only, nothing is loaded besides."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from extras import needs
from safetensors.torch import load_file, save_file

from mergesec.errors import UsageError
from mergesec_tasks._modelfolders import inspect
from mergesec_tasks.vision.clip import Clip
from mergesec_tasks.vision.hf_vit import HfVit

transformers = needs("transformers")

SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
    "intermediate_size": 64,
}  # fmt: skip


def vit(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(2)
    transformers.ViTModel(transformers.ViTConfig(**{**SMALL, **changes})).save_pretrained(folder)
    return folder


def refused(base: Path, expert: Path, message: str) -> None:
    """The plan says it, naming the grid's field, and so does the backbone."""
    with pytest.raises(UsageError, match=rf"^suite\.experts\.mnist: .*{message}"):
        inspect("hf-vit", {"path": str(base)}, "suite.backbone", {"suite.experts.mnist": str(expert)})
    with pytest.raises(UsageError, match=rf"^hf-vit: .*{message}"):
        HfVit(str(base), 0, 0).published(str(expert))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, in the base's .* it is 2"),
        ({"num_attention_heads": 2}, "num_attention_heads is 2, in the base's .* it is 4"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', in the base's .* it is 'gelu'"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps is 1e-06, in the base's .* it is 1e-12"),
        ({"qkv_bias": False}, "qkv_bias is False, in the base's .* it is True"),
        ({"image_size": 64}, "image_size is 64, in the base's .* it is 32"),
    ],
)
def test_an_expert_with_another_function_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    refused(vit(tmp_path / "base"), vit(tmp_path / "expert", **changes), message)


def test_an_experts_pixels_are_the_bases(tmp_path: Path) -> None:
    base, expert = vit(tmp_path / "base"), vit(tmp_path / "expert")
    own = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_rescale": True, "size": 32, "resample": 2}
    told = expert / "preprocessor_config.json"
    told.write_text(json.dumps({**own, "size": {"height": 32, "width": 32}, "rescale_factor": 1 / 255}))
    assert HfVit(str(base), 0, 0).published(str(expert))  # the base says nothing: by its type it is the same
    (base / "preprocessor_config.json").write_text(json.dumps(own))
    for changes, message in (
        (
            {"image_mean": [0.4, 0.5, 0.5]},
            r"preprocessor_config\.json.*image_mean is \[0.4, 0.5, 0.5\], for the base",
        ),
        ({"image_std": [0.5, 0.5, 0.2]}, "image_std is"),
        ({"do_normalize": False}, r"image_mean is \[0.0, 0.0, 0.0\]"),
        ({"size": {"shortest_edge": 64}}, "size is .*64"),
        ({"resample": 3}, "resample is 3, for the base it is 2"),
        ({"do_rescale": False}, "do_rescale is False; expected true"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor is 0.0078.*; expected 1/255"),
        ({"image_mean": [0.5]}, r"image_mean is \[0.5\]; expected three numbers"),
        ({"offset": True}, "offset is True; expected no such field"),
        ({"size": "small"}, "size is 'small'"),
    ):
        told.write_text(json.dumps({**own, **changes}))
        refused(base, expert, message)
    told.unlink()
    (expert / "processor_config.json").write_text(
        json.dumps({"image_processor": {**own, "image_mean": [0.1] * 3}})
    )
    refused(base, expert, "processor_config.json.*image_mean")


def test_a_base_without_normalisation_gets_none(tmp_path: Path) -> None:
    base = vit(tmp_path)
    (base / "preprocessor_config.json").write_text(
        json.dumps({"do_normalize": False, "image_mean": [0.5] * 3})
    )
    mean, deviation = HfVit(str(base), 0, 0).normalisation()
    assert mean.flatten().tolist() == [0, 0, 0] and deviation.flatten().tolist() == [1, 1, 1]


def test_the_files_that_transformers_loads_are_read_and_no_others(tiny_clip: Path, tmp_path: Path) -> None:
    """A stale file beside has other projections."""
    folder = tmp_path / "m"
    shutil.copytree(tiny_clip, folder)
    held = load_file(folder / "model.safetensors")
    stale = {n: t + 1 for n, t in held.items()}
    save_file(stale, folder / "zz-old.safetensors", {"format": "pt"})
    for name, tensor in Clip(str(folder), 0, 0, "probe").frozen().items():
        assert torch.equal(tensor, held[name])


def test_a_plan_names_the_experts_field_and_both_values(bench: Any, tiny_clip: Path, tmp_path: Path) -> None:
    expert = tmp_path / "expert"
    shutil.copytree(tiny_clip, expert)
    config = json.loads((expert / "config.json").read_text())
    config["vision_config"]["layer_norm_eps"] = 1e-3
    (expert / "config.json").write_text(json.dumps(config))
    grid = tmp_path / "g.yaml"
    grid.write_text(yaml.safe_dump({
        "name": "g",
        "suite": {
            "backbone": {"name": "clip", "model": str(tiny_clip)}, "tasks": ["mini/mnist", "mini/gtsrb"],
            "experts": {"mini/mnist": str(expert)},
        },
        "axes": {"merging": ["simple_average"], "experts": ["all"]}, "seeds": [0],
    }))  # fmt: skip
    done = bench("plan", "--grid", str(grid))
    assert done.code == 2 and "Traceback" not in done.err
    told = " ".join(done.err.split())
    for part in ("suite.experts.mini/mnist", "config.json", "layer_norm_eps is 0.001", "it is 1e-05"):
        assert part in told


# --------------------------------------------------------------------------- open_clip, timm

MODEL: dict[str, Any] = {
    "embed_dim": 24, "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}  # fmt: skip


def open_clip_folder(folder: Path, model: dict[str, Any], pixels: dict[str, Any] | None = None) -> Path:
    open_clip = needs("open_clip")
    folder.mkdir()
    state = open_clip.CLIP(**model).state_dict()
    save_file({n: t.contiguous() for n, t in state.items()}, folder / "open_clip_model.safetensors")
    told = {"model_cfg": model, "preprocess_cfg": pixels or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(told))
    return folder


def vision(**changes: Any) -> dict[str, Any]:
    return {**MODEL, "vision_cfg": {**MODEL["vision_cfg"], **changes}}


@pytest.mark.parametrize(
    ("model", "pixels", "message"),
    [
        ({**MODEL, "quick_gelu": True}, {}, "quick_gelu is True, for the base it is False"),
        (vision(head_width=16), {}, "vision_cfg.head_width is 16, for the base it is 8"),
        (vision(layers=3), {}, "vision_cfg.layers is 3, for the base it is 2"),
        (MODEL, {"mean": [0.1, 0.2, 0.3]}, r"mean is \[0.1, 0.2, 0.3\], for the base"),
    ],
)
def test_an_open_clip_expert_is_the_bases_network(
    model: dict[str, Any], pixels: dict[str, Any], message: str, tmp_path: Path
) -> None:
    from mergesec_tasks.vision.open_clip import OpenClip

    base = OpenClip(str(open_clip_folder(tmp_path / "base", MODEL)), "", 0, 0, "probe")
    expert = open_clip_folder(tmp_path / "expert", model, pixels)
    with pytest.raises(UsageError, match=message):
        base.published(str(expert))
    if model["vision_cfg"]["layers"] == 3:  # without a config the file alone tells
        (expert / "open_clip_config.json").unlink()
        with pytest.raises(
            UsageError, match=r"'visual\.transformer\.resblocks\.2\..* is none of the network"
        ):
            base.published(str(expert / "open_clip_model.safetensors"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (vision(layers=10**9), "vision_cfg: layers is 1000000000; expected a whole number from 1 to 1000"),
        (vision(width=64), r"visual.class_embedding' has the shape \[32\], by the config it would be \[64\]"),
        (vision(timm_model_name="vit"), "only open_clip's own vision transformers"),
        (vision(attentional_pool=True), "attentional_pool is True; expected False"),
        (vision(new=1), "new is 1; no such field is known"),
        ({**MODEL, "vision_cfg": []}, "needs embed_dim and vision_cfg"),
        ({**MODEL, "text_cfg": {"hf_model_name": "roberta-base"}}, "text_cfg: hf_model_name is 'roberta-base'; no such field"),
    ],
)  # fmt: skip
def test_an_open_clip_config_says_only_what_is_known(
    model: dict[str, Any], message: str, tmp_path: Path
) -> None:
    from mergesec_tasks.vision.open_clip import OpenClip

    folder = open_clip_folder(tmp_path / "m", MODEL)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    subject = OpenClip(str(folder), "", 0, 0, "zero-shot")

    def used() -> None:
        subject.build()
        subject.zero_shot([["a"], ["b"]], torch.device("cpu"))

    with pytest.raises(UsageError, match=message):
        used()


ARGUMENTS: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}


def timm_folder(folder: Path, arguments: dict[str, Any], told: dict[str, Any]) -> Path:
    timm = needs("timm")
    folder.mkdir()
    network = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=5, **arguments)
    save_file(network.state_dict(), folder / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "model_args": arguments, **told}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("arguments", "told", "message"),
    [
        ({**ARGUMENTS, "depth": 3}, {}, "depth is 3, in the base's .* it is 2"),
        ({**ARGUMENTS, "num_heads": 2}, {}, "num_heads is 2, in the base's .* it is 4"),
        ({**ARGUMENTS, "act_layer": "quick_gelu"}, {}, "act_layer is 'quick_gelu'"),
        (ARGUMENTS, {"pretrained_cfg": {"mean": [0.5] * 3}}, r"mean is \[0.5, 0.5, 0.5\], in the base's"),
        (ARGUMENTS, {"architecture": "deit_tiny_patch16_224"}, "architecture is 'deit_tiny_patch16_224'"),
    ],
)
def test_a_timm_expert_is_the_bases_network(
    arguments: dict[str, Any], told: dict[str, Any], message: str, tmp_path: Path
) -> None:
    from mergesec_tasks.vision.timm_vit import TimmVit

    base = TimmVit(str(timm_folder(tmp_path / "base", ARGUMENTS, {})), 0, 0)
    expert = timm_folder(tmp_path / "expert", arguments, told)
    with pytest.raises(UsageError, match=message):
        base.published(str(expert))
    if arguments["depth"] == 3:
        with pytest.raises(UsageError, match=r"'blocks\.2\..* is none of the network"):
            base.published(str(expert / "model.safetensors"))


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"model_args": {**ARGUMENTS, "checkpoint_path": "x.pth"}}, "checkpoint_path is 'x.pth'; no such field is known"),
        ({"architecture": "hf-hub:somebody/something"}, "names no architecture but 'hf-hub:somebody/something'"),
        ({"architecture": "vit_nothing"}, "architecture 'vit_nothing' is none of timm's"),
        ({"architecture": "resnet18", "model_args": {}}, "no network|is no timm VisionTransformer|timm builds no"),
        ({"model_args": {**ARGUMENTS, "depth": 10**9}}, "depth is 1000000000; expected a whole number"),
        ({"model_args": {**ARGUMENTS, "depth": 900}}, r"lacks 'blocks\.2\."),
        ({"model_args": {**ARGUMENTS, "embed_dim": 60000}}, r"has the shape .*, by the config it would be"),
        ({"model_args": [1]}, "model_args .* is not a mapping"),
        ({"pretrained_cfg": {"mean": "x"}}, "mean is 'x'; expected three numbers"),
        ({"pretrained_cfg": {"input_size": [3, 32]}}, "input_size is"),
    ],
)  # fmt: skip
def test_a_timm_config_says_only_what_is_known(told: dict[str, Any], message: str, tmp_path: Path) -> None:
    """A file that timm would unpickle, or a network that it would fetch, among them."""
    from mergesec_tasks.vision.timm_vit import TimmVit

    folder = timm_folder(tmp_path / "m", ARGUMENTS, {})
    config = {**json.loads((folder / "config.json").read_text()), **told}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=message):
        TimmVit(str(folder), 0, 0).build()
