"""I-BAU: unlearn a universal perturbation, with the gradient that knows the perturbation will follow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mergesec.contracts import Defense, MergeContext, Merged, Split, Weights
from mergesec_methods.backdoor.defenses._perturb import universal
from mergesec_methods.backdoor.defenses._repair import Patient, Rows
from mergesec_methods.merging._adaptation import progress

CARD = {
    "name": "ibau",
    "kind": "defense",
    "class": "ImplicitBackdoorUnlearning",
    "version": "2",
    "title": "I-BAU",
    "paper": "Zeng et al., Adversarial unlearning of backdoors via implicit hypergradient, ICLR 2022",
    "url": "https://arxiv.org/abs/2110.03735",
    "summary": "minimax over a universal perturbation per task, by implicit hypergradients",
    "threat": "backdoor",
    "hooks": ["repair"],
    "knowledge": "clean labelled tuning rows of every merged task",
    "data": "tuning",
    "modalities": ["image"],
    "seeded": True,
    "trial": {"rounds": 1, "inner_steps": 2, "outer_steps": 2, "fixed_point_steps": 2, "batch_size": 16},
    "parameters": {
        "share": {
            "type": "float",
            "default": 0.5,
            "min": 0.0,
            "max": 1.0,
            "doc": "share of each task's tuning rows; tuning holds a tenth of a task's rows, so half is 5 %",
        },
        "rounds": {
            "type": "int",
            "default": 5,
            "min": 0,
            "max": 100000,
            "doc": "times a perturbation is found and unlearnt",
        },
        "inner_steps": {
            "type": "int",
            "default": 10,
            "min": 0,
            "max": 100000,
            "doc": "steps that find a round's perturbation (BackdoorBench: a pass of ten batches)",
        },
        "outer_steps": {
            "type": "int",
            "default": 10,
            "min": 0,
            "max": 100000,
            "doc": "steps that unlearn it (BackdoorBench: another pass, 50 in five rounds)",
        },
        "fixed_point_steps": {
            "type": "int",
            "default": 5,
            "min": 0,
            "max": 1000,
            "doc": "iterations that invert the inner problem's curvature (K)",
        },
        "batch_size": {
            "type": "int",
            "default": 256,
            "min": 1,
            "max": 65536,
            "doc": "rows per task and step",
        },
        "lr": {"type": "float", "default": 1e-4, "min": 0.0, "max": 1.0, "doc": "Adam's step size"},
        "adv_lr": {
            "type": "float",
            "default": 10.0,
            "min": 0.0,
            "max": 1000.0,
            "doc": "SGD's step size for the perturbation, in pixels of [0, 1]",
        },
        "norm": {
            "type": "float",
            "default": 10.0,
            "min": 0.0,
            "max": 1000.0,
            "doc": "largest L2 norm of the perturbation, for 3×32×32 pixels (larger images: the same per pixel)",
        },
        "portion": {
            "type": "float",
            "default": 0.01,
            "min": 0.0,
            "max": 1.0,
            "doc": "share of a batch that bears the perturbation while it is unlearnt, at least one row",
        },
    },
}

PENALTY = 0.001
"""Weight of ‖δ‖² in the inner problem."""
INNER_RATE = 0.1
"""Step size of the inner problem's fixed-point map δ ↦ δ − 0.1 ∇L_inner(δ)."""
REFERENCE_PIXELS = 3 * 32 * 32
ROWS_STREAM = 1


def hypergradient(
    delta: Tensor,
    parameters: Sequence[Tensor],
    outer: Callable[[Tensor], Tensor],
    inner: Callable[[Tensor], Tensor],
    steps: int,
) -> tuple[list[Tensor], float]:
    """d outer / dθ where δ solves the inner problem, and the outer loss.

    With Φ(δ, θ) = δ − 0.1 ∂L_inner/∂δ: v ← (∂Φ/∂δ)ᵀ v + ∂L_outer/∂δ ``steps`` times from v = 0, then
    ∂L_outer/∂θ + (∂Φ/∂θ)ᵀ v (Grazzi et al., ICML 2020; algorithm 1 of the paper).
    """
    start = delta.detach().requires_grad_()
    loss = outer(start)
    direct, *slopes = torch.autograd.grad(loss, [start, *parameters], allow_unused=True)
    found = [torch.zeros_like(p) if s is None else s for p, s in zip(parameters, slopes, strict=True)]
    direct = torch.zeros_like(start) if direct is None else direct
    if not steps:
        return found, float(loss.detach())
    (uphill,) = torch.autograd.grad(inner(start), start, create_graph=True)
    mapped = start - INNER_RATE * uphill
    v = torch.zeros_like(start)
    for _ in range(steps):
        (pulled,) = torch.autograd.grad(mapped, start, v, retain_graph=True)
        v = pulled + direct
    implicit = torch.autograd.grad(mapped, list(parameters), v, allow_unused=True)
    return [f if i is None else f + i for f, i in zip(found, implicit, strict=True)], float(loss.detach())


class ImplicitBackdoorUnlearning(Defense):
    """min_θ max_δ of the loss on perturbed clean rows, a universal δ per task."""

    def __init__(
        self,
        share: float,
        rounds: int,
        inner_steps: int,
        outer_steps: int,
        fixed_point_steps: int,
        batch_size: int,
        lr: float,
        adv_lr: float,
        norm: float,
        portion: float,
    ) -> None:
        self.share = share
        self.rounds = rounds
        self.inner_steps = inner_steps
        self.outer_steps = outer_steps
        self.fixed_point_steps = fixed_point_steps
        self.batch_size = batch_size
        self.lr = lr
        self.adv_lr = adv_lr
        self.norm = norm
        self.portion = portion

    def repair(self, merged: Merged, base: Weights, ctx: MergeContext) -> Merged:
        """The model after unlearning; ``info["ibau_loss"]``: the outer loss before and after."""
        patient = Patient(merged, ctx, self.share, self.batch_size, "ibau", images=True)
        parameters = list(patient.network.parameters())
        optimizer = torch.optim.Adam(parameters, lr=self.lr)
        generator = ctx.generator(ROWS_STREAM)
        losses, lengths = [], []
        # only the plain attention kernel can be differentiated twice
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for _ in range(self.rounds):
                deltas = {rows.name: self._perturbation(patient, rows) for rows in patient.rows}
                lengths += [float(torch.linalg.vector_norm(delta)) for delta in deltas.values()]
                first = {rows.name: rows.draw() for rows in patient.rows}
                for _ in range(self.outer_steps):
                    optimizer.zero_grad()
                    total = 0.0
                    for rows in patient.rows:
                        slopes, loss = self._unlearning(
                            patient, rows, deltas[rows.name], first[rows.name], generator
                        )
                        total += loss / len(patient.rows)
                        for parameter, slope in zip(parameters, slopes, strict=True):
                            slope /= len(patient.rows)
                            parameter.grad = slope if parameter.grad is None else parameter.grad + slope
                    optimizer.step()
                    losses.append(total)
        return patient.finish({"ibau_loss": progress(losses), "ibau_norm": progress(lengths)})

    def _perturbation(self, patient: Patient, rows: Rows) -> Tensor:
        """δ ``[C, H, W]`` after the inner steps, cut to the norm."""
        delta = universal(patient, rows, self.adv_lr, self.inner_steps, PENALTY)
        bound = self.norm * math.sqrt(delta.numel() / REFERENCE_PIXELS)
        return delta * min(1.0, bound / max(float(torch.linalg.vector_norm(delta)), 1e-12))

    def _unlearning(
        self, patient: Patient, rows: Rows, delta: Tensor, first: Split, generator: torch.Generator
    ) -> tuple[list[Tensor], float]:
        """The hypergradient on the task's next batch; the inner problem is that of the round's first one."""
        batch = rows.draw()
        count = max(1, int(self.portion * len(batch)))
        bears = torch.zeros(len(batch), 1, 1, 1, device=rows.device)
        bears[torch.randperm(len(batch), generator=generator)[:count]] = 1.0

        def outer(moved: Tensor) -> Tensor:
            images = (batch.inputs + bears * moved).clamp(0.0, 1.0)
            return patient.loss(rows, Split(images, batch.targets))

        def inner(moved: Tensor) -> Tensor:
            images = (first.inputs + moved).clamp(0.0, 1.0)
            return PENALTY * moved.square().sum() - patient.loss(rows, Split(images, first.targets))

        parameters = list(patient.network.parameters())
        return hypergradient(delta, parameters, outer, inner, self.fixed_point_steps)
