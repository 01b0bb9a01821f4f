"""NAD: a fine-tuned copy teaches the merged model where to look."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergesec.contracts import Backbone, ContractError, Defense, MergeContext, Merged, Split, Weights
from mergesec_methods.backdoor.defenses._repair import Patient, Rows, Sgd, descend
from mergesec_methods.merging._adaptation import progress

CARD = {
    "extends": "ft",
    "name": "nad",
    "class": "NeuralAttentionDistillation",
    "title": "Neural attention distillation",
    "paper": "Li et al., Neural attention distillation: erasing backdoor triggers from deep neural networks, ICLR 2021",
    "url": "https://arxiv.org/abs/2101.05930",
    "summary": "fine-tune a copy, then train the merged model on clean rows to attend to what the copy attends to",
    "trial": {"steps": 4, "teacher_steps": 2, "batch_size": 16},
    "parameters": {
        "teacher_steps": {"type": "int", "default": 100, "min": 0, "max": 1000000, "doc": "steps that fine-tune the teacher (BackdoorBench: 10 passes of ten batches)"},
        "steps": {"doc": "steps that train the student (BackdoorBench: 100 passes of ten batches)"},
        "lr": {"doc": "step size; the student's falls to a hundredth after a fifth of its steps"},
        "weight_decay": {"default": 0.0001},
        "beta1": {"type": "float", "default": 500.0, "min": 0.0, "max": 1000000.0, "doc": "weight of the attention after the first third of the blocks"},
        "beta2": {"type": "float", "default": 1000.0, "min": 0.0, "max": 1000000.0, "doc": "weight of the attention after the second third"},
        "beta3": {"type": "float", "default": 1000.0, "min": 0.0, "max": 1000000.0, "doc": "weight of the attention after the last block"},
        "p": {"type": "float", "default": 2.0, "min": 1.0, "max": 100.0, "doc": "power of the activations in the attention map"},
    },
}  # fmt: skip

STUDENT_DROP = 0.2
"""Share of the steps after which the student's step size is a hundredth (BackdoorBench: 20 of 100 passes)."""


def attention(activation: Tensor, p: float) -> Tensor:
    """Attention over tokens: Σ_c |a_c|^p, of unit length per input; ``[N, S, d]`` to ``[N, S]``."""
    summed = activation.abs().pow(p).sum(dim=-1)
    lengths: Tensor = torch.linalg.vector_norm(summed, dim=1, keepdim=True)
    return summed / (lengths + 1e-6)


def watched(backbone: Backbone, betas: tuple[float, float, float]) -> dict[str, float]:
    """Names of the blocks after each third of the network, with their weights; in a shallow network,
    where thirds end at the same block, the later weight counts."""
    names = [block.name for block in backbone.anatomy().blocks]
    if not names or not all(names):
        raise ContractError("nad: the backbone's anatomy names no blocks whose attention could be compared")
    ends = [-(-len(names) * third // 3) - 1 for third in (1, 2, 3)]
    return dict(zip((names[end] for end in ends), betas, strict=True))


@contextmanager
def recorded(network: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """A dictionary that holds what each named module returned last: ``[N, S, d]``."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [network.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def student_rate(step: int, steps: int) -> float:
    return 1.0 if step < STUDENT_DROP * steps else 0.01


class NeuralAttentionDistillation(Defense):
    """Teacher: the merged model, fine-tuned. Student: the merged model, on CE + Σ_b β_b · MSE(attention maps)."""

    def __init__(
        self,
        share: float,
        teacher_steps: int,
        steps: int,
        batch_size: int,
        lr: float,
        momentum: float,
        weight_decay: float,
        beta1: float,
        beta2: float,
        beta3: float,
        p: float,
    ) -> None:
        self.share = share
        self.teacher_steps = teacher_steps
        self.steps = steps
        self.batch_size = batch_size
        self.sgd = Sgd(lr, momentum, weight_decay)
        self.betas = (beta1, beta2, beta3)
        self.p = p

    def repair(self, merged: Merged, base: Weights, ctx: MergeContext) -> Merged:
        """The student; ``info["nad_loss"]``, ``info["nad_attention"]``: the loss and its attention part before
        and after."""
        teacher, student = (Patient(merged, ctx, self.share, self.batch_size, "nad") for _ in range(2))
        descend(teacher, self.sgd.optimizer(teacher.network.parameters()), self.teacher_steps, teacher.loss)
        teacher.network.requires_grad_(False)
        blocks = watched(ctx.backbone, self.betas)
        apart: list[float] = []
        with (
            recorded(teacher.network, list(blocks)) as taught,
            recorded(student.network, list(blocks)) as seen,
        ):

            def loss_of(rows: Rows, batch: Split) -> Tensor:
                teacher.outputs(rows, batch.inputs)
                loss = student.loss(rows, batch)
                maps = [
                    beta * functional.mse_loss(attention(seen[n], self.p), attention(taught[n], self.p))
                    for n, beta in blocks.items()
                ]
                distance = torch.stack(maps).sum()
                apart.append(float(distance.detach()))
                return loss + distance

            optimizer = self.sgd.optimizer(student.network.parameters())
            losses = descend(student, optimizer, self.steps, loss_of, student_rate)
        return student.finish({"nad_loss": progress(losses), "nad_attention": progress(apart)})
