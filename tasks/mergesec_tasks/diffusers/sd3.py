"""Stable Diffusion 3 and 3.5: an MMDiT that predicts velocities of a flow, text by two CLIPs.

The third text encoder (T5) is left out; zeros stand in its place, as the pipeline itself does without it.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergesec.generation import Noised
from mergesec_tasks._transformers import complaining
from mergesec_tasks.diffusers._backbone import Denoising, Told, library, texts_of

CARD = {
    "extends": "_pipeline",
    "name": "diffusers-sd3",
    "class": "StableDiffusion3",
    "title": "Stable Diffusion 3's MMDiT (diffusers)",
    "paper": "Esser et al., Scaling rectified flow transformers for high-resolution image synthesis, ICML 2024",
    "url": "https://arxiv.org/abs/2403.03206",
    "summary": "the transformer of a StableDiffusion3Pipeline; text encoders (without T5) and autoencoder stay frozen",
    "parameters": {"steps": {"default": 28}, "guidance": {"default": 7.0}},
}

ENCODERS = ("", "_2")
ABSENT = 256
"""Tokens of the encoder that is left out, as many as the pipeline has of it; zeros take part in the softmax, too."""


class StableDiffusion3(Denoising):
    """The backbone of the card above."""

    who = "diffusers-sd3"
    encoder = "CLIPTextModelWithProjection"

    def __init__(self, path: str = "", steps: int = 28, guidance: float = 7.0) -> None:
        super().__init__(path, steps, guidance)
        self._known: dict[str, tuple[Tensor, Tensor]] = {}

    def asked(self, conditions: Tensor) -> Told:
        texts = texts_of(conditions)
        if new := [text for text in dict.fromkeys(texts) if text not in self._known]:
            states, pooled = self._encoded(new, conditions.device)
            self._known |= {text: (states[i].cpu(), pooled[i].cpu()) for i, text in enumerate(new)}
        rows = [self._known[text] for text in texts]
        return {
            "encoder_hidden_states": torch.stack([states for states, _ in rows]).to(conditions.device),
            "pooled_projections": torch.stack([pooled for _, pooled in rows]).to(conditions.device),
        }

    def _encoded(self, texts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        states, pooled = [], []
        length = self.part("tokenizer", device).model_max_length
        for which in ENCODERS:
            tokenizer: Any = self.part(f"tokenizer{which}", device)
            with torch.no_grad(), complaining(self.who, f"text_encoder{which} takes no texts"):
                numbers = tokenizer(
                    texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
                ).input_ids
                found = self.part(f"text_encoder{which}", device)(
                    numbers.to(device), output_hidden_states=True
                )
            states.append(found.hidden_states[-2])
            pooled.append(found.text_embeds)
        clip, width = torch.cat(states, dim=-1), int(self.told["joint_attention_dim"])
        padded = functional.pad(clip, (0, width - clip.shape[-1]))
        absent = padded.new_zeros(len(texts), ABSENT, width)
        return torch.cat([padded, absent], dim=1), torch.cat(pooled, dim=-1)

    def scheduler(self) -> Any:
        """Euler along the flow, with the folder's shift of times."""
        folder = self.path / "scheduler"
        with complaining(self.who, f"the scheduler in {str(folder)!r} is not loaded"):
            kind = library("FlowMatchEulerDiscreteScheduler")
            return kind.from_pretrained(os.fspath(folder), local_files_only=True)

    def error(self, network: nn.Module, batch: Noised, told: Told) -> Tensor:
        clean, noise = self.latents(batch.images), self.noise(batch.noise)
        level = (1 - batch.times)[:, None, None, None]
        mixed = (1 - level) * clean + level * noise
        return self.predicted(network, mixed, 1000 * (1 - batch.times), told) - (noise - clean)

    def sampled(self, network: nn.Module, noise: Tensor, told: Told, untold: Told) -> Tensor:
        scheduler = self.scheduler()
        scheduler.set_timesteps(self.steps, device=noise.device)
        latents = noise
        for time in scheduler.timesteps:
            predicted = self.guided(network, latents, time.expand(len(latents)), told, untold)
            latents = scheduler.step(predicted, time, latents).prev_sample
        return latents
