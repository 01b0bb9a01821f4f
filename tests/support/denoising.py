"""Small random networks of diffusers' classes, with nothing left at zero, and an expert near each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from extras import needs
from torch import Tensor, nn

from mergesec.anatomy import Anatomy, describe, describe_denoiser
from mergesec.compat import ensure_torchvision
from mergesec.contracts import ProtectContext, RecoverContext
from mergesec_tasks.diffusion._network import HEADS as SINGLE_HEADS
from mergesec_tasks.diffusion._network import SIDE, Generator

CPU = torch.device("cpu")
HEADS, GROUPS, TEXT, POOLED = 2, 4, 12, 10
UNET = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32), "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": TEXT, "attention_head_dim": HEADS, "norm_num_groups": GROUPS,
}  # fmt: skip
FLAT = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2,
    "attention_head_dim": 8, "num_attention_heads": HEADS,
}  # fmt: skip
JOINT = {
    "joint_attention_dim": TEXT, "caption_projection_dim": 16, "pooled_projection_dim": POOLED, "pos_embed_max_size": 8,
}  # fmt: skip
NAMES = ("unet", "unet_linear", "dit", "mmdit", "mmdit_normed", "single")
"""``single`` is the mini suite's own: adaptive norms from one map that all blocks share."""


class ExactRms(nn.Module):
    """diffusers' RMS norm takes its variance in float32, whatever the network's type; this one does not."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


@dataclass(frozen=True)
class Denoiser:
    """A network, its anatomy, its base weights and an expert not far from them."""

    name: str
    network: nn.Module
    anatomy_: Anatomy
    base: dict[str, Tensor]
    expert: dict[str, Tensor]

    def anatomy(self) -> Anatomy:
        return self.anatomy_

    def logits(self, weights: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """What the network predicts on a few inputs, float64 ``[rows, entries]``."""
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(2, 4, 8, 8, generator=generator).to(dtype)
        text = torch.randn(2, 5, TEXT, generator=generator).to(dtype)
        pooled = torch.randn(2, POOLED, generator=generator).to(dtype)
        times = torch.tensor([10, 700])
        nn.Module.to(self.network, dtype)  # diffusers' own method warns
        self.network.load_state_dict(weights, strict=True)
        if self.name == "single":
            images = torch.randn(2, 3, SIDE, SIDE, generator=generator).to(dtype)
            moments, asked = torch.tensor([0.1, 0.8]).to(dtype), torch.tensor([[1, -1], [4, 7]])
            with torch.no_grad():
                found: Tensor = self.network.eval()(images, moments, asked)
            return found.double().flatten(1)
        inputs: dict[str, Any] = {
            "hidden_states": x,
            "timestep": times,
            "class_labels": torch.tensor([0, 9]),
        }
        if self.name.startswith("unet"):
            inputs = {"sample": x, "timestep": times, "encoder_hidden_states": text}
        if self.name.startswith("mmdit"):
            inputs = {**inputs, "encoder_hidden_states": text, "pooled_projections": pooled}
            del inputs["class_labels"]
        with torch.no_grad():
            return self.network.eval()(**inputs).sample.double().flatten(1)

    def protect_context(self, seed: int = 0) -> ProtectContext:
        return ProtectContext(CPU, seed, self, self.base, None)  # type: ignore[arg-type]

    def recover_context(self, seed: int = 0) -> RecoverContext:
        return RecoverContext(CPU, seed, self, self.base, "victim", (), {})  # type: ignore[arg-type]


def build(name: str) -> nn.Module:
    """A fresh network of diffusers, or the mini suite's."""
    if name == "single":
        return Generator()
    needs("diffusers")
    ensure_torchvision()
    import diffusers

    with torch.random.fork_rng(devices=[]):
        if name == "unet":
            return diffusers.UNet2DConditionModel(**UNET)
        if name == "unet_linear":  # as Stable Diffusion 2 and SDXL: linear projections, deeper transformers
            more = {"use_linear_projection": True, "transformer_layers_per_block": 2}
            return diffusers.UNet2DConditionModel(**UNET, **more, resnet_time_scale_shift="scale_shift")
        if name == "dit":
            return diffusers.DiTTransformer2DModel(**FLAT, num_embeds_ada_norm=10, norm_num_groups=GROUPS)
        more = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)} if name == "mmdit_normed" else {}
        return diffusers.SD3Transformer2DModel(**FLAT, **JOINT, **more)


def exact(network: nn.Module) -> nn.Module:
    """``network`` with norms that keep float64."""
    for holder in list(network.modules()):
        for name, child in list(holder.named_children()):
            if type(child).__name__ == "RMSNorm":
                setattr(holder, name, ExactRms(child.weight.detach().clone(), child.eps))
    return network


def random_weights(network: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Weights at which every tensor matters: biases away from 0, norms away from 1, sharp attention."""
    weights = {}
    for name, tensor in network.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() > 1 and "embedding_table" not in name:
            weights[name] = noise / tensor[0].numel() ** 0.5
        elif "norm" in name and name.endswith("weight"):
            weights[name] = 1.0 + 0.3 * noise
        else:
            weights[name] = 0.4 * noise
    return weights


@cache
def make(name: str) -> Denoiser:
    network = exact(build(name))
    generator = torch.Generator().manual_seed(11)
    base = random_weights(network, generator)
    expert = {n: w + 0.02 * w.std() * torch.randn(w.shape, generator=generator) for n, w in base.items()}
    shapes = {n: tuple(w.shape) for n, w in base.items()}
    anatomy = describe(shapes, SINGLE_HEADS) if name == "single" else describe_denoiser(shapes, HEADS, GROUPS)
    return Denoiser(name, network, anatomy, base, expert)
