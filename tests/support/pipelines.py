"""Pipelines of diffusers with random weights, saved as the library saves them, and what goes with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from denoising import build
from extras import needs

from mergesec.compat import ensure_torchvision
from mergesec_tasks.mini_clip._words import Words, tokenizer

TEXT_WIDTH, LETTERS = {"unet": 12, "mmdit_normed": 6}, 8
VOCABULARY = 20
SIDE = 16
"""Pixels of an image: the autoencoder halves it, and transformers have positions for 8 × 8 latents."""


def save(name: str, folder: Path) -> Path:
    """A pipeline of the network ``name`` (see ``denoising``), with random weights, in ``folder``."""
    needs("diffusers")
    ensure_torchvision()
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        network, vae = build(name), autoencoder(shifted=name.startswith("mmdit"))
        for parameter in network.parameters():
            if not parameter.any():  # gates that begin closed
                torch.nn.init.normal_(parameter, std=0.2)
        levels = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear"}
        if name == "dit":
            labels = {str(i): f"thing {i}, object {i}" for i in range(10)}
            scheduler = diffusers.DDIMScheduler(**levels)
            diffusers.DiTPipeline(network, vae, scheduler).save_pretrained(folder)
            edit(folder / "model_index.json", id2label=labels)  # as in the published folder
        elif name.startswith("mmdit"):
            encoders, tokenizer = [encoder(6, 5, True), encoder(6, 5, True)], words()
            diffusers.StableDiffusion3Pipeline(
                network, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae, encoders[0], tokenizer,
                encoders[1], tokenizer, None, None,
            ).save_pretrained(folder)  # fmt: skip
        else:
            diffusers.StableDiffusionPipeline(
                vae, encoder(12, 12, False), words(), network,
                diffusers.DDIMScheduler(**levels, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
                None, None, requires_safety_checker=False,
            ).save_pretrained(folder)  # fmt: skip
    return folder


def autoencoder(shifted: bool) -> Any:
    import diffusers

    shift = {"shift_factor": 0.06} if shifted else {}
    return diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        **shift,
    )  # fmt: skip


def encoder(width: int, projected: int, projects: bool) -> Any:
    ensure_torchvision()
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=LETTERS, projection_dim=projected, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return (transformers.CLIPTextModelWithProjection if projects else transformers.CLIPTextModel)(config)


def words() -> Any:
    """A tokenizer of CLIP's kind for the letters of a few words."""
    letters = ["<|startoftext|>", "<|endoftext|>", *"adfghkop", *(f"{c}</w>" for c in "adgkost")]
    folder_words = {word: i for i, word in enumerate(letters)}
    assert len(folder_words) < VOCABULARY
    found = tokenizer(Words(folder_words, []))
    found.model_max_length = LETTERS
    return found


def clip(folder: Path, seed: int = 3) -> Path:
    """A CLIP with random weights, as transformers saves it."""
    ensure_torchvision()
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = transformers.CLIPConfig(
            text_config={**sizes, "vocab_size": VOCABULARY, "max_position_embeddings": LETTERS, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
            vision_config={**sizes, "image_size": 16, "patch_size": 8},
            projection_dim=8,
        )  # fmt: skip
        transformers.CLIPModel(config).save_pretrained(folder)
        words().save_pretrained(folder)
    return folder


def edit(path: Path, **values: Any) -> None:
    """Fields of a JSON file changed; None takes one away."""
    told = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({k: v for k, v in told.items() if v is not None}))
