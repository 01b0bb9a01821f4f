"""FT-SAM: fine-tuning by sharpness-aware steps, which move the weights far enough to lose a backdoor."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergesec.contracts import Defense, MergeContext, Merged, Split, Weights
from mergesec_methods.backdoor.defenses._repair import Patient, Rows, Sgd, cosine, slope
from mergesec_methods.merging._adaptation import progress

CARD = {
    "extends": "ft",
    "name": "ft_sam",
    "class": "SharpnessAwareFineTuning",
    "title": "FT-SAM",
    "paper": "Zhu et al., Enhancing fine-tuning based backdoor defense with sharpness-aware minimization, ICCV 2023",
    "url": "https://arxiv.org/abs/2304.11823",
    "summary": "fine-tune on a few clean rows with (adaptive) sharpness-aware steps",
    "trial": {"steps": 4, "batch_size": 16, "rho": 0.1},
    "parameters": {
        "rho": {"type": "float", "default": 2.0, "min": 0.0, "max": 1000.0, "doc": "radius of the neighbourhood that is made flat (published: 2; GTSRB and Tiny ImageNet 8)"},
        "adaptive": {"type": "bool", "default": True, "doc": "measure the radius in units of each weight's size, as BackdoorBench does"},
        "label_smoothing": {"type": "float", "default": 0.1, "min": 0.0, "max": 1.0, "doc": "mass given to the wrong classes"},
    },
}  # fmt: skip

NEAR_ZERO = 1e-12


def smoothed(outputs: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """KL(q ‖ softmax(outputs)), batch mean: q has 1 − ``smoothing`` on the target, the rest spread evenly.

    outputs ``[N, K]``, K ≥ 2; targets int64 ``[N]``.
    """
    classes = outputs.shape[1]
    wanted = torch.full_like(outputs, smoothing / (classes - 1))
    wanted.scatter_(1, targets[:, None], 1.0 - smoothing)
    return functional.kl_div(outputs.log_softmax(dim=1), wanted, reduction="batchmean")


def climb(parameters: list[nn.Parameter], rho: float, adaptive: bool) -> list[Tensor]:
    """Move the parameters uphill by their gradients, by ``rho`` together, in place; the moves.

    e = ρ g / ‖g‖, or with s = |w|: e = ρ s² g / ‖s g‖ (Kwon et al., ICML 2021).
    """
    scales = [p.detach().abs() if adaptive else torch.ones_like(p) for p in parameters]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    squares = [(s * g).square().sum() for s, g in zip(scales, gradients, strict=True)]
    length = torch.stack(squares).sum().sqrt() + NEAR_ZERO
    moves = [s.square() * g * (rho / length) for s, g in zip(scales, gradients, strict=True)]
    with torch.no_grad():
        for parameter, move in zip(parameters, moves, strict=True):
            parameter.add_(move)
    return moves


class SharpnessAwareFineTuning(Defense):
    """SGD with the gradient taken at the worst point of a neighbourhood, to first order."""

    def __init__(
        self,
        share: float,
        steps: int,
        batch_size: int,
        lr: float,
        momentum: float,
        weight_decay: float,
        rho: float,
        adaptive: bool,
        label_smoothing: float,
    ) -> None:
        self.share = share
        self.steps = steps
        self.batch_size = batch_size
        self.sgd = Sgd(lr, momentum, weight_decay)
        self.rho = rho
        self.adaptive = adaptive
        self.label_smoothing = label_smoothing

    def repair(self, merged: Merged, base: Weights, ctx: MergeContext) -> Merged:
        """The fine-tuned model; ``info["ft_sam_loss"]`` holds the loss (at the weights) before and after."""
        patient = Patient(merged, ctx, self.share, self.batch_size, "ft_sam")
        parameters = list(patient.network.parameters())
        optimizer = self.sgd.optimizer(parameters)

        def loss_of(rows: Rows, batch: Split) -> Tensor:
            return smoothed(patient.outputs(rows, batch.inputs), batch.targets, self.label_smoothing)

        losses = []
        for step in range(self.steps):
            optimizer.param_groups[0]["lr"] = self.sgd.lr * cosine(step, self.steps)
            batches = patient.draw()
            optimizer.zero_grad()
            losses.append(slope(patient, batches, loss_of))
            moves = climb(parameters, self.rho, self.adaptive)
            optimizer.zero_grad()
            slope(patient, batches, loss_of)
            with torch.no_grad():
                for parameter, move in zip(parameters, moves, strict=True):
                    parameter.sub_(move)
            optimizer.step()
        return patient.finish({"ft_sam_loss": progress(losses)})
