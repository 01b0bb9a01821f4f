"""Stable Diffusion 1 and 2, and UNets of their class: text to image in the latents of an autoencoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mergesec_tasks._transformers import complaining
from mergesec_tasks.diffusers._backbone import Ddim, Told, texts_of

CARD = {
    "extends": "_pipeline",
    "name": "diffusers-unet",
    "class": "Unet",
    "title": "Stable Diffusion's UNet (diffusers)",
    "paper": "Rombach et al., High-resolution image synthesis with latent diffusion models, CVPR 2022",
    "url": "https://arxiv.org/abs/2112.10752",
    "summary": "the UNet of a StableDiffusionPipeline; text encoder and autoencoder stay frozen",
    "recipe": {
        "optimizer": "adamw",
        "learning_rate": 2e-6,
        "weight_decay": 0.01,
        "schedule": "constant",
        "warmup": 0.0,
        "epochs": 1,
        "steps": 800,
        "batch_size": 1,
        "gradient_clip": 1.0,
    },
    "parameters": {"guidance": {"default": 7.5}},
}


class Unet(Ddim):
    """The backbone of the card above."""

    who = "diffusers-unet"

    def __init__(self, path: str = "", steps: int = 50, guidance: float = 7.5) -> None:
        super().__init__(path, steps, guidance)
        self._known: dict[str, Tensor] = {}

    def asked(self, conditions: Tensor) -> Told:
        texts = texts_of(conditions)
        if new := [text for text in dict.fromkeys(texts) if text not in self._known]:
            self._known |= dict(zip(new, self._encoded(new, conditions.device).cpu(), strict=True))
        rows = torch.stack([self._known[text] for text in texts])
        return {"encoder_hidden_states": rows.to(conditions.device)}

    def _encoded(self, texts: list[str], device: torch.device) -> Tensor:
        tokenizer: Any = self.part("tokenizer", device)
        with torch.no_grad(), complaining(self.who, "the folder's text encoder takes no texts"):
            numbers = tokenizer(
                texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
                return_tensors="pt",
            ).input_ids  # fmt: skip
            found: Tensor = self.part("text_encoder", device)(numbers.to(device))[0]
        return found
