"""Small random networks of every architecture family, built offline, with nothing left at zero."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from extras import needs
from torch import Tensor, nn

from mergesec.anatomy import Anatomy, describe
from mergesec.contracts import ProtectContext, RecoverContext
from mergesec_tasks.text._hf import straightened

WIDTH, HEADS, HIDDEN, DEPTH = 24, 3, 40, 2
CPU = torch.device("cpu")


class MiniBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.ModuleDict({n: nn.Linear(WIDTH, WIDTH) for n in "qkvo"})
        self.mlp = nn.ModuleDict({"up": nn.Linear(WIDTH, HIDDEN), "down": nn.Linear(HIDDEN, WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (self.attn[n](y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for n in "qkv")
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.attn["o"](y.transpose(1, 2).flatten(2))
        return x + self.mlp["down"](nn.functional.gelu(self.mlp["up"](self.norm2(x))))


class MiniNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 4, 4)
        self.blocks = nn.ModuleList(MiniBlock() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


@dataclass(frozen=True)
class Architecture:
    """A network, its inputs, its anatomy, its base weights and an expert not far from them."""

    name: str
    network: nn.Module
    call: Callable[[nn.Module, Any], Tensor]
    inputs: Any
    anatomy_: Anatomy
    base: dict[str, Tensor]
    expert: dict[str, Tensor]

    def anatomy(self) -> Anatomy:
        return self.anatomy_

    def logits(self, weights: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """Features under a fixed random head, float64 ``[..., 5]``."""
        self.network.to(dtype).load_state_dict(weights, strict=True)
        inputs = self.inputs.to(dtype) if self.inputs.is_floating_point() else self.inputs
        with torch.no_grad():
            features = self.call(self.network.eval(), inputs)
        head = torch.randn(features.shape[-1], 5, generator=torch.Generator().manual_seed(5))
        return (features @ head.to(dtype)).double() / features.shape[-1] ** 0.5

    def protect_context(self, seed: int = 0) -> ProtectContext:
        return ProtectContext(CPU, seed, self, self.base, None)  # type: ignore[arg-type]

    def recover_context(self, seed: int = 0) -> RecoverContext:
        return RecoverContext(CPU, seed, self, self.base, "victim", (), {})  # type: ignore[arg-type]


def hidden_state(network: nn.Module, inputs: Tensor) -> Tensor:
    return network(inputs).last_hidden_state


def pooled(network: nn.Module, inputs: Tensor) -> Tensor:
    return network(inputs).pooler_output


def plain(network: nn.Module, inputs: Tensor) -> Tensor:
    return network(inputs)


def build(name: str) -> tuple[nn.Module, Callable[[nn.Module, Any], Tensor]]:
    if name == "mini":
        return MiniNet(), plain
    if name == "open_clip":
        ratio = HIDDEN / WIDTH
        return needs("open_clip.transformer").VisionTransformer(
            8, 4, WIDTH, DEPTH, HEADS, ratio, output_dim=WIDTH
        ), plain
    if name == "timm":
        from mergesec.compat import ensure_torchvision

        ensure_torchvision()
        vit = needs("timm.models.vision_transformer").VisionTransformer
        ratio = HIDDEN / WIDTH
        sizes = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "mlp_ratio": ratio}
        return vit(8, 4, num_classes=0, init_values=1.0, **sizes), plain
    hf = needs("transformers")
    if name == "hf_distilbert":
        config = {"dim": WIDTH, "n_layers": DEPTH, "n_heads": HEADS, "hidden_dim": HIDDEN, "vocab_size": 30}
        return hf.DistilBertModel(hf.DistilBertConfig(**config)), hidden_state
    if name == "hf_gpt2":
        config = {"n_embd": WIDTH, "n_layer": DEPTH, "n_head": HEADS, "n_inner": HIDDEN, "vocab_size": 30}
        return straightened(hf.GPT2Model(hf.GPT2Config(**config))), hidden_state
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS}
    image = {**sizes, "image_size": 8, "patch_size": 4}
    mlp = {"intermediate_size": HIDDEN}
    if name == "hf_clip":
        return hf.CLIPVisionModel(hf.CLIPVisionConfig(**image, **mlp)), pooled
    if name == "hf_vit":
        return hf.ViTModel(hf.ViTConfig(**image, **mlp), add_pooling_layer=False), hidden_state
    if name == "hf_bert":
        text = {"vocab_size": 30, "max_position_embeddings": 16}
        config = hf.BertConfig(**sizes, **mlp, **text)
        return hf.BertModel(config, add_pooling_layer=False), hidden_state
    if name in ROTARY:
        grouped = {"num_attention_heads": ROTARY_HEADS, "num_key_value_heads": 2, "head_dim": 8, **mlp}
        config = {"hf_llama": hf.LlamaConfig, "hf_qwen2": hf.Qwen2Config}[name]
        return hf.AutoModel.from_config(config(**{**sizes, **grouped}, vocab_size=30)), hidden_state
    swiglu = name == "hf_dinov2_swiglu"
    return hf.Dinov2Model(hf.Dinov2Config(**image, mlp_ratio=2, use_swiglu_ffn=swiglu)), hidden_state


def random_weights(network: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Weights at which every tensor matters: biases and layer scales away from 0, sharp attention."""
    weights = {}
    for name, tensor in network.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if not tensor.is_floating_point():
            weights[name] = tensor.clone()
        elif tensor.dim() > 1 and "embed" not in name:
            weights[name] = 1.3 * noise / tensor[0].numel() ** 0.5
        elif "norm" in name.lower() or "ln_" in name or "lambda" in name or "gamma" in name:
            weights[name] = 0.3 * noise + (0.0 if name.endswith("bias") else 1.0)
        else:
            weights[name] = 0.5 * noise
    return weights


@cache
def make(name: str) -> Architecture:
    network, call = build(name)
    generator = torch.Generator().manual_seed(11)
    base = random_weights(network, generator)
    expert = {
        n: w + 0.02 * torch.randn(w.shape, generator=generator) if w.is_floating_point() else w
        for n, w in base.items()
    }
    inputs = torch.randn(3, 3, 8, 8, generator=generator)
    if name in TEXT or name in ROTARY:
        inputs = torch.randint(0, 30, (3, 7), generator=generator)
    rotary = name in ROTARY
    shapes = {n: tuple(w.shape) for n, w in base.items()}
    anatomy = describe(shapes, ROTARY_HEADS if rotary else HEADS, rotary)
    return Architecture(name, network, call, inputs, anatomy, base, expert)


TEXT = ("hf_bert", "hf_distilbert", "hf_gpt2")
NAMES = ("mini", "hf_clip", "hf_vit", "hf_dinov2", "hf_dinov2_swiglu", "hf_bert", "open_clip")
ROTARY, ROTARY_HEADS = ("hf_llama", "hf_qwen2"), 6
"""Six query heads on two key and value heads, rotary positions, gated MLP; Qwen2 has biases on q, k, v."""


@pytest.fixture(params=NAMES)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return make(request.param)


@pytest.fixture
def mini() -> Architecture:
    return make("mini")


@pytest.fixture(params=ROTARY)
def rotary(request: pytest.FixtureRequest) -> Architecture:
    return make(request.param)


@pytest.fixture
def packed() -> Architecture:
    return make("open_clip")


@pytest.fixture(params=(*NAMES, *ROTARY, "hf_distilbert", "hf_gpt2", "timm"))
def any_architecture(request: pytest.FixtureRequest) -> Architecture:
    return make(request.param)
