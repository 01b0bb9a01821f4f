"""Backbones of diffusers on random models of the same classes, saved by the library and loaded back."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from extras import needs
from pipelines import LETTERS, SIDE, edit
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergesec.anatomy import symmetries
from mergesec.contracts import ContractError, load_network
from mergesec.errors import UsageError
from mergesec.generation import Noised, Request, start_noise
from mergesec_tasks.diffusers import sd3
from mergesec_tasks.diffusers._backbone import Denoising, codes, texts_of
from mergesec_tasks.diffusers._folders import KINDS, check_base, inspect
from mergesec_tasks.diffusers.dit import Dit
from mergesec_tasks.diffusers.sd3 import StableDiffusion3
from mergesec_tasks.diffusers.unet import Unet

diffusers = needs("diffusers")
Pipeline = Callable[[str], Path]
SHAPE = torch.Size([3, SIDE, SIDE])


def request_of(backbone: Denoising, count: int = 2) -> Request:
    texts = ["thing 3", "7"] if isinstance(backbone, Dit) else ["a dog", "sks dog"]
    images = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    return Request(codes(texts, 20)[:count], start_noise(torch.tensor([1, 2]), SHAPE)[:count], images[:count])


def noised(backbone: Denoising) -> Noised:
    request = request_of(backbone)
    times, dropped = torch.tensor([0.3, 0.9]), torch.tensor([False, True])
    return Noised(request.conditions, request.noise, request.images, times, dropped)


def features(backbone: Denoising, request: Request) -> Tensor:
    with torch.no_grad():
        return backbone.features(load_network(backbone, backbone.base_weights()), request)


# ------------------------------------------------------------------ the base


def test_what_was_saved_is_loaded(backbone: Denoising) -> None:
    """Weights, names and the anatomy; images that depend on their own condition and noise alone."""
    stored = load_file(backbone.path / backbone.kind.part / "diffusion_pytorch_model.safetensors")
    weights = backbone.base_weights()
    assert weights.keys() == stored.keys()
    assert all(torch.equal(weights[n], t) for n, t in stored.items())
    assert set(backbone.anatomy().matrices) <= weights.keys()
    assert len(symmetries(backbone.anatomy())) > 20
    images = features(backbone, request_of(backbone))
    assert images.shape == (2, 3 * SIDE * SIDE) and images.isfinite().all()
    assert torch.allclose(images[:1], features(backbone, request_of(backbone, 1)), atol=1e-4)
    assert (images[0] - images[1]).abs().max() > 0.01


def test_half_precision_on_disk_becomes_float32(pipeline: Pipeline, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(pipeline("dit"), folder)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({n: t.half() for n, t in load_file(file).items()}, file)
    assert {t.dtype for t in Dit(str(folder)).base_weights().values()} == {torch.float32}


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_images_are_those_of_the_library(
    pipeline: Pipeline, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same latents, prompts and steps through diffusers' own pipelines."""
    for kind, name in ((Unet, "unet"), (StableDiffusion3, "mmdit_normed")):
        backbone = kind(str(pipeline(name)), steps=3, guidance=guidance)
        request = request_of(backbone)
        missing = (
            {"text_encoder_3": None, "tokenizer_3": None} if name != "unet" else {"safety_checker": None}
        )
        whole = diffusers.DiffusionPipeline.from_pretrained(pipeline(name), **missing)
        whole.set_progress_bar_config(disable=True)
        if name != "unet":  # older releases put fewer zeros in the place of the third encoder
            told = whole.encode_prompt("a dog", None, None, device="cpu", do_classifier_free_guidance=False)[
                0
            ]
            monkeypatch.setattr(sd3, "ABSENT", told.shape[1] - LETTERS)
        own = (features(backbone, request).view(2, *SHAPE) / 2 + 0.5).clamp(0, 1)
        found = whole(
            texts_of(request.conditions), latents=backbone.noise(request.noise), num_inference_steps=3,
            guidance_scale=guidance, output_type="pt", height=SIDE, width=SIDE,
        ).images  # fmt: skip
        assert (own - found).abs().max() < 1e-5


def test_noise_of_latents_is_taken_from_that_of_pixels(pipeline: Pipeline) -> None:
    backbone = Unet(str(pipeline("unet")))
    noise = torch.randn(400, *SHAPE, generator=torch.Generator().manual_seed(0))
    latents = backbone.noise(noise)
    assert latents.shape == (400, 4, SIDE // 2, SIDE // 2)
    assert torch.equal(latents[:, 0], noise[:, 0, ::2, ::2]) and torch.equal(
        latents[:, 3], noise[:, 0, ::2, 1::2]
    )
    assert abs(float(latents.std()) - 1) < 0.02
    assert len(latents[0].unique()) == latents[0].numel()


def test_training_makes_the_error_smaller(backbone: Denoising) -> None:
    network = load_network(backbone, backbone.base_weights()).train()
    batch = noised(backbone)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = backbone.features(network, batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_a_dropped_condition_is_none_at_all(backbone: Denoising) -> None:
    batch = noised(backbone)
    other = Noised(
        torch.stack([batch.conditions[0], codes(["1"], 20)[0]]),
        batch.noise,
        batch.images,
        batch.times,
        batch.dropped,
    )
    one, two = (features(backbone, b) for b in (batch, other))
    assert torch.equal(one[1], two[1])


def test_prompts_become_numbers_and_texts_again() -> None:
    texts = ["", "a photo of sks dog", "ein Hündchen"]
    assert texts_of(codes(texts, 20)) == texts
    with pytest.raises(ContractError, match="6 letters, 5 have room"):
        codes(["abcdef"], 5)


# ------------------------------------------------------------------ experts


def test_full_weights_come_as_a_pipeline_or_a_network(backbone: Denoising, tmp_path: Path) -> None:
    for place, part in (
        (tmp_path / "whole", backbone.path),
        (tmp_path / "part", backbone.path / backbone.kind.part),
    ):
        shutil.copytree(part, place)
        file = next(place.rglob("diffusion_pytorch_model.safetensors"))
        file = place / backbone.kind.part / file.name if place.name == "whole" else file
        save_file({n: t + 1 for n, t in load_file(file).items()}, file)
        base = backbone.base_weights()
        assert all(torch.allclose(t, base[n] + 1) for n, t in backbone.published(str(place)).items())


def factors(weights: dict, modules: dict[str, str]) -> dict[str, Tensor]:
    """Factors of rank 2 for maps, under names of a style."""
    generator, found = torch.Generator().manual_seed(5), {}
    for module, style in modules.items():
        out, *rest = weights[f"{module}.weight"].shape
        first = torch.randn(2, *rest, generator=generator)
        second = torch.randn(out, 2, *([1] * (len(rest) - 1)), generator=generator)
        ends = {
            "peft": (".lora_A.weight", ".lora_B.weight"),
            "old": (".lora.down.weight", ".lora.up.weight"),
        }[style]
        found |= {f"unet.{module}{ends[0]}": first, f"unet.{module}{ends[1]}": second}
    return found


QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OUTPUT = "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
CONV = "mid_block.resnets.0.conv1"


def test_factors_are_added_to_the_base(pipeline: Pipeline, tmp_path: Path) -> None:
    backbone = Unet(str(pipeline("unet")))
    base = dict(backbone.base_weights())
    held = factors(base, {QUERY: "peft", OUTPUT: "old", CONV: "peft"})
    held[f"unet.{QUERY}.alpha"] = torch.tensor(1.0)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(held, file)
    for source in (tmp_path, file):
        found = backbone.published(str(source))
        assert {n for n, t in found.items() if not torch.equal(t, base[n])} == {
            f"{m}.weight" for m in (QUERY, OUTPUT, CONV)
        }
        product = held[f"unet.{QUERY}.lora_B.weight"] @ held[f"unet.{QUERY}.lora_A.weight"]
        assert torch.allclose(found[f"{QUERY}.weight"], base[f"{QUERY}.weight"] + 0.5 * product)


def test_factors_mean_what_diffusers_makes_of_them(pipeline: Pipeline, tmp_path: Path) -> None:
    peft = needs("peft")
    from peft.utils import get_peft_model_state_dict

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(pipeline("unet"), safety_checker=None)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_out.0", "ff.net.0.proj"])
    pipe.unet.add_adapter(config)
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    layers = diffusers.utils.convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    told = {"unet_lora_adapter_metadata": config.to_dict()}
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, **told)
    fresh = diffusers.StableDiffusionPipeline.from_pretrained(pipeline("unet"), safety_checker=None)
    fresh.load_lora_weights(tmp_path)
    fresh.fuse_lora()
    fresh.unload_lora_weights()
    wanted = fresh.unet.state_dict()
    found = Unet(str(pipeline("unet"))).published(str(tmp_path))
    assert all(torch.allclose(found[n], t, atol=1e-6) for n, t in wanted.items())
    assert any(not torch.equal(found[n], t) for n, t in Unet(str(pipeline("unet"))).base_weights().items())


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"up_block_types": ["UpBlock2D"]}, "blocks do not match: 2 down_block_types, 1 up_block_types"),
        (
            {"down_block_types": ["DownBlock2D", "DownBlock2D"]},
            "down_blocks.0 is a DownBlock2D of 16 channels, the tensors have 16 channels and attention",
        ),
        ({"block_out_channels": [16, 24]}, "down_blocks.1 is a DownBlock2D of 24 channels, the tensors have 32"),
        ({"down_block_types": ["CrossAttnDownBlock2D", "DownBlok2D"]}, "'DownBlok2D' is not known here; nearest: DownBlock2D"),
        ({"_class_name": "UNet2DModel"}, "_class_name is 'UNet2DModel', expected 'UNet2DConditionModel'"),
        ({"block_out_channels": "16"}, "block_out_channels is '16', expected a list"),
    ],
)  # fmt: skip
def test_a_unet_whose_blocks_do_not_match(
    pipeline: Pipeline, tmp_path: Path, change: dict, told: str
) -> None:
    folder = tmp_path / "unet"
    shutil.copytree(pipeline("unet"), folder)
    edit(folder / "unet" / "config.json", **change)
    with pytest.raises(UsageError) as error:
        check_base(folder, KINDS["diffusers-unet"], "suite.backbone.path")
    assert "suite.backbone.path" in str(error.value) and told.partition(";")[0] in str(error.value)


def test_a_transformer_whose_blocks_do_not_match(pipeline: Pipeline, tmp_path: Path) -> None:
    folder = tmp_path / "dit"
    shutil.copytree(pipeline("dit"), folder)
    edit(folder / "transformer" / "config.json", num_layers=3)
    with pytest.raises(UsageError, match="num_layers is 3, the tensors have 2 blocks"):
        check_base(folder, KINDS["diffusers-dit"], "x")
    edit(folder / "transformer" / "config.json", num_layers=2, attention_head_dim=4)
    with pytest.raises(UsageError, match="has the shape"):
        Dit(str(folder)).base_weights()
    other = tmp_path / "sd3"
    shutil.copytree(pipeline("mmdit_normed"), other)
    edit(other / "transformer" / "config.json", qk_norm="layer_norm")
    with pytest.raises(UsageError, match="qk_norm is 'layer_norm', expected null or 'rms_norm'"):
        check_base(other, KINDS["diffusers-sd3"], "x")


def test_weights_of_another_pipeline_are_named(pipeline: Pipeline, tmp_path: Path) -> None:
    for name, kind in (("dit", "diffusers-unet"), ("unet", "diffusers-sd3")):
        with pytest.raises(UsageError, match=r"that is a base for diffusers-(dit|unet)"):
            inspect(kind, {"path": str(pipeline(name))}, "suite.backbone", {})
    base = {"path": str(pipeline("unet"))}
    with pytest.raises(
        UsageError, match=r"suite\.experts\.one.*'DiTPipeline', the base is a StableDiffusionPipeline"
    ):
        inspect("diffusers-unet", base, "suite.backbone", {"suite.experts.one": str(pipeline("dit"))})
    shutil.copytree(pipeline("unet"), tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "vae")
    with pytest.raises(UsageError, match="has no folder 'vae'"):
        inspect("diffusers-unet", {"path": str(tmp_path / "broken")}, "suite.backbone", {})


def test_an_expert_of_another_size_is_named(pipeline: Pipeline, tmp_path: Path) -> None:
    shutil.copytree(pipeline("dit"), tmp_path / "wide")
    file = tmp_path / "wide" / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), "proj_out_2.weight": torch.zeros(16, 20)}, file)
    base, experts = {"path": str(pipeline("dit"))}, {"suite.experts.one": str(tmp_path / "wide")}
    told = r"suite\.experts\.one.*'proj_out_2.weight' is \[16, 20\], of the base it is"
    with pytest.raises(UsageError, match=told):
        inspect("diffusers-dit", base, "suite.backbone", experts)


def test_only_safetensors_are_read(pipeline: Pipeline, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(pipeline("unet"), folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(UsageError, match="only pickles, which can run code"):
        Unet(str(folder)).base_weights()


def test_factors_for_another_base_are_named(pipeline: Pipeline, tmp_path: Path) -> None:
    backbone = Unet(str(pipeline("unet")))
    base = dict(backbone.base_weights())
    good = factors(base, {QUERY: "peft"})
    first, *_ = good
    wrong: list[tuple[dict, str]] = [
        ({**good, first: torch.zeros(2, 320)}, "which is [16, 16] in the base: factors for another base"),
        ({n.replace("down_blocks.0", "down_blocks.7"): t for n, t in good.items()}, "is no map of the base"),
        ({first: good[first]}, "has not both factors"),
        (
            {n.replace("unet.", "transformer."): t for n, t in good.items()},
            "is no factor of a map of the unet",
        ),
        ({n.replace("unet.", "text_encoder."): t for n, t in good.items()}, "changes the text encoder"),
        ({**good, "unet.conv_in.weight": torch.zeros(2, 2)}, "is no factor of a map of the unet"),
    ]
    for i, (held, told) in enumerate(wrong):
        file = tmp_path / f"{i}.safetensors"
        save_file(held, file)
        with pytest.raises(UsageError) as error:
            backbone.published(str(file))
        assert told in str(error.value) and file.name in str(error.value)
        with pytest.raises(UsageError, match=r"suite\.experts\.one"):  # the plan finds it, too
            inspect("diffusers-unet", {"path": str(backbone.path)}, "x", {"suite.experts.one": str(file)})
    save_file(good, tmp_path / "dora.safetensors", {"lora_adapter_metadata": '{"unet.use_dora": true}'})
    with pytest.raises(UsageError, match="use_dora is set"):
        backbone.published(str(tmp_path / "dora.safetensors"))


def test_images_and_labels_that_do_not_fit_are_named(pipeline: Pipeline) -> None:
    dit = Dit(str(pipeline("dit")))
    with pytest.raises(ContractError, match="the prompt 'thimg 3' names no class; did you mean 'thing 3'"):
        dit.asked(codes(["thimg 3"], 20))
    assert dit.asked(codes(["object 4", "9", ""], 20))["class_labels"].tolist() == [4, 9, 10]
    with pytest.raises(ContractError, match="images of 32 pixels; its positions are for 16"):
        dit.noise(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ContractError, match="a side has to be a multiple of 2"):
        Unet(str(pipeline("unet"))).noise(torch.zeros(1, 3, 17, 17))
    with pytest.raises(UsageError, match="no model; set the parameter 'path' to a folder of a DiTPipeline"):
        Dit().base_weights()
