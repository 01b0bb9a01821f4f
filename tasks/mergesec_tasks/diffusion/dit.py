"""The suite's base: a class-conditional diffusion transformer that predicts the clean image."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mergesec.anatomy import Anatomy, describe
from mergesec.contracts import Backbone, Weights
from mergesec.generation import Noised, Request, euler, without_condition
from mergesec_tasks.diffusion._network import HEADS, Generator
from mergesec_tasks.diffusion._vocabulary import CONCEPTS, LENGTH, NOTHING, PADDING, first_class

CARD = {
    "name": "mini-diffusion/dit",
    "kind": "backbone",
    "class": "MiniDiT",
    "version": "1",
    "title": "DiT 6 x 128 (mini)",
    "summary": "6 blocks of width 128 on 16 patches, flow matching, pretrained by `bench pretrain`",
    "modalities": ["generation"],
    "source": "bench pretrain, shifted renderings of four mini tasks",
    "licence": "the project's",
    "pretrain": "mergesec_tasks.diffusion.pretrain:pretrain",
    "recipe": {
        "optimizer": "adamw",
        "learning_rate": 7e-4,
        "weight_decay": 0.01,
        "schedule": "cosine",
        "warmup": 0.05,
        "epochs": 1,
        "steps": 400,
        "batch_size": 96,
        "gradient_clip": 1.0,
        "precision": "float32",
        "max_train": 0,
    },
    "parameters": {
        "steps": {"type": "int", "default": 10, "min": 1, "max": 1000, "doc": "steps of Euler's method"},
        "guidance": {"type": "float", "default": 2.0, "min": 0.0, "max": 20.0, "doc": "1 asks the condition alone"},
    },
}  # fmt: skip

WEIGHTS_FOLDER = Path(__file__).parent / "weights"
BASE_FILE, JUDGE_FILE = "dit.safetensors", "judge.safetensors"
CLAMP = 0.35
"""The loss is that of the velocity, (x̂ - x) / (1 - t), without its pole: 1 - t counts as at least this."""


class MiniDiT(Backbone):
    """The base of the card above. Features are the generated image of a request, or the weighted error of x̂ on a
    noised batch, flat: ``[N, 3 · S · S]``."""

    def __init__(self, steps: int = 10, guidance: float = 2.0) -> None:
        self.steps, self.guidance = steps, guidance

    def build(self) -> nn.Module:
        return Generator()

    def base_weights(self) -> Weights:
        return {name: tensor.clone() for name, tensor in _stored(WEIGHTS_FOLDER / BASE_FILE).items()}

    def head(self, task: str) -> Weights | None:
        """The joint judge of all concepts' classes; None for tasks it was not trained on."""
        concept = task.rpartition("/")[2]
        if concept not in CONCEPTS:
            return None
        judge = {name: tensor.clone() for name, tensor in _stored(WEIGHTS_FOLDER / JUDGE_FILE).items()}
        return {**judge, "first": torch.tensor(first_class(concept))}

    def features(self, network: nn.Module, inputs: Any) -> Tensor:
        request: Request = inputs
        nothing = torch.full((LENGTH,), PADDING)
        nothing[0] = NOTHING
        if isinstance(request, Noised):
            asked = without_condition(request, nothing)
            error = network(request.mixed, request.times, asked.conditions) - (2 * request.images - 1)
            weight = (1 - request.times).clamp(min=CLAMP)
            weighed: Tensor = (error / weight[:, None, None, None]).flatten(1)
            return weighed
        return euler(network, request, nothing, self.steps, self.guidance).flatten(1)

    def anatomy(self) -> Anatomy:
        with torch.device("meta"):
            shapes = {name: tuple(tensor.shape) for name, tensor in Generator().state_dict().items()}
        return describe(shapes, HEADS)


@cache
def _stored(file: Path) -> dict[str, Tensor]:
    """A file's tensors, float16 on disk, as float32."""
    return {name: tensor.float() for name, tensor in load_file(file).items()}
