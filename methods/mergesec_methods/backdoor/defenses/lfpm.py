"""LFPM: an anti-backdoor task vector, trained so that features along the whole way to it resist a universal perturbation.

With θ_m the merged model, τ the anti-backdoor vector and f features, cross-task linearity says

    f(θ_m + s τ, x) ≈ (1 − s) f(θ_m, x) + s f(θ_m + τ, x) =: g_s(x),     s ∈ [0, 1]

so the robustness of every point on the path is a function of the two ends' features. τ minimises the path integral

    1/S Σ_{s = 1/S..1} [ CE(h(g_s(x)), y) + β CE(h(g_s(x ⊕ δ_t)), y) ],

gradients accumulated over the S points and all tasks before a step, and δ_t, one universal perturbation per task, climbs
the disagreement with the present model's predictions between steps: it stands in for the unknown trigger. What is
returned is θ_m + κ τ.

Source: Zhu et al., "From parameters to feature space", ICML 2026 (arXiv 2606.12498), known here from its abstract and its
table: the vector added to the merged model, the view in feature space under cross-task linearity,
gradient accumulation and the loss's path integral. *Everything else is a reconstruction*: cross-entropy on labelled tuning
rows for both terms, additive perturbations bounded in the maximum norm (``eps`` 0.2 is SAU's in BackdoorBench), points evenly spaced, Adam and the
number of steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mergesec.classification import logits
from mergesec.contracts import Defense, MergeContext, Merged, Model, Split, Weights
from mergesec_methods.backdoor.defenses._perturb import Perturbations
from mergesec_methods.backdoor.defenses._repair import Patient, Rows, clone, cosine, descend
from mergesec_methods.merging._adaptation import Stream, progress

CARD = {
    "name": "lfpm",
    "kind": "defense",
    "class": "FeaturePath",
    "version": "1",
    "title": "LFPM (linear feature path minimization)",
    "paper": "Zhu et al., From parameters to feature space: task arithmetic for backdoor mitigation in model merging, ICML 2026",
    "url": "https://arxiv.org/abs/2606.12498",
    "summary": "reconstruction: add a vector trained for robust features along the path to it",
    "threat": "backdoor",
    "hooks": ["repair"],
    "knowledge": "clean labelled tuning rows of every merged task",
    "data": "tuning",
    "modalities": ["image"],
    "seeded": True,
    "trial": {"epochs": 2, "batch_size": 16},
    "parameters": {
        "strength": {"type": "float", "default": 1.0, "min": 0.0, "max": 10.0, "doc": "κ: how often the vector is added"},
        "points": {"type": "int", "default": 4, "min": 1, "max": 64, "doc": "S: points on the path"},
        "robust": {"type": "float", "default": 1.0, "min": 0.0, "doc": "β: weight of the perturbed rows' loss"},
        "eps": {"type": "float", "default": 0.2, "min": 0.0, "max": 1.0, "doc": "largest change of a pixel, of 1"},
        "delta_lr": {"type": "float", "default": 0.02, "min": 0.0, "max": 1.0, "doc": "Adam step of the perturbations, in pixels"},
        "share": {"type": "float", "default": 0.5, "min": 0.0, "max": 1.0, "doc": "share of each task's tuning rows"},
        "epochs": {"type": "int", "default": 20, "min": 0, "max": 100000, "doc": "passes over those rows"},
        "batch_size": {"type": "int", "default": 64, "min": 1, "max": 65536, "doc": "rows per task and step"},
        "lr": {"type": "float", "default": 1e-4, "min": 0.0, "max": 10.0, "doc": "of Adam on the weights"},
    },
}  # fmt: skip


class FeaturePath(Defense):
    """The defense of the card above."""

    hooks = ("repair",)

    def __init__(
        self, strength: float = 1.0, points: int = 4, robust: float = 1.0, eps: float = 0.2, delta_lr: float = 0.02,
        share: float = 0.5, epochs: int = 20, batch_size: int = 64, lr: float = 1e-4,
    ) -> None:  # fmt: skip
        self.strength, self.points, self.robust = strength, points, robust
        self.eps, self.delta_lr = eps, delta_lr
        self.share, self.epochs, self.batch_size, self.lr = share, epochs, batch_size, lr

    def repair(self, merged: Merged, base: Weights, ctx: MergeContext) -> Merged:
        """θ_m + κ τ; ``info`` has the loss before and after, ‖τ‖, and how often δ changed a prediction."""
        patient = Patient(merged, ctx, self.share, self.batch_size, "lfpm", images=True)
        start = Model(ctx.backbone, clone(merged, ctx, "lfpm"))
        streams = {
            rows.name: Stream(rows.name, ctx.views[rows.name], self.batch_size, ctx) for rows in patient.rows
        }
        deltas = Perturbations(list(streams.values()), self.delta_lr, self.eps, "lfpm")
        served = Model(ctx.backbone, patient.network)

        def loss_of(rows: Rows, batch: Split) -> Tensor:
            inputs = batch.inputs
            if self.robust:
                inputs = torch.cat([inputs, deltas.fixed(streams[rows.name], inputs)])
            return self.path_loss(rows, batch, served.features(inputs), _still(start, inputs))

        optimizer = torch.optim.Adam(patient.network.parameters(), lr=self.lr)
        losses = descend(patient, optimizer, self.epochs, loss_of, cosine, lambda: deltas.ascend(served))
        origin = dict(start.network.named_parameters())
        with torch.no_grad():
            vector = {n: t - origin[n] for n, t in patient.weights().items()}
            mended = {n: origin[n] + self.strength * v for n, v in vector.items()}
            norm = torch.stack([v.double().square().sum() for v in vector.values()]).sum().sqrt()
        info = {
            "lfpm_loss": progress(losses),
            "lfpm_norm": float(norm),
            "lfpm_flipped": _ends(deltas.flipped),
        }
        return patient.finish(info, mended)

    def path_loss(self, rows: Rows, batch: Split, moved: Tensor, still: Tensor) -> Tensor:
        """The mean over the path's points; features ``[B, d]`` of clean rows, then (β > 0) ``[B, d]`` of perturbed."""
        total = torch.zeros((), device=moved.device)
        for point in range(1, self.points + 1):
            s = point / self.points
            scores = logits((1 - s) * still + s * moved, rows.head)
            total = total + rows.view.task.loss(scores[: len(batch)], batch.targets)
            if self.robust:
                total = total + self.robust * rows.view.task.loss(scores[len(batch) :], batch.targets)
        return total / self.points


def _still(model: Model, inputs: Any) -> Tensor:
    with torch.no_grad():
        return model.features(inputs)


def _ends(values: list[float]) -> list[float]:
    """The first and the last value; empty if there is none."""
    return [values[0], values[-1]] if values else []
