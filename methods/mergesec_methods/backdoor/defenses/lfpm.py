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

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mergesec.classification import logits
from mergesec.contracts import Defense, MergeContext, Merged, Model, Split, Weights
from mergesec_methods.backdoor.defenses._perturb import Perturbations, Seen, disagreement, square
from mergesec_methods.backdoor.defenses._repair import Patient, Rows, clone, cosine, descend
from mergesec_methods.merging._adaptation import Stream, progress

CARD = {
    "name": "lfpm",
    "kind": "defense",
    "class": "FeaturePath",
    "version": "2",
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
    "trial": {"steps": 4, "batch_size": 16, "delta_lr": 0.02},
    "parameters": {
        "strength": {"type": "float", "default": 1.0, "min": 0.0, "max": 10.0, "doc": "κ: how often the vector is added"},
        "points": {"type": "int", "default": 4, "min": 1, "max": 64, "doc": "S: points on the path"},
        "robust": {"type": "float", "default": 1.0, "min": 0.0, "doc": "β: weight of the perturbed rows' loss"},
        "eps": {"type": "float", "default": 0.2, "min": 0.0, "max": 1.0, "doc": "largest change of a pixel, of 1"},
        "delta_lr": {"type": "float", "default": 0.002, "min": 0.0, "max": 1.0, "doc": "Adam step of the perturbations, in pixels; eps / delta_lr steps reach the bound"},
        "restart": {"type": "int", "default": 0, "min": 0, "max": 1000000, "doc": "steps after which the perturbations start from 0 again; 0: never"},
        "patch": {
            "type": "int",
            "default": 0,
            "min": 0,
            "max": 32,
            "secret": "attack.patch",
            "doc": "side of the square that is perturbed, in pixels of a 32-pixel image, elsewhere after every restart; 0: the whole image",
        },
        "aim": {
            "type": "choice",
            "choices": ["away", "class"],
            "default": "away",
            "doc": "what the perturbations climb: any other answer, or that of a class per task, drawn by lot at every restart",
        },
        "share": {"type": "float", "default": 0.5, "min": 0.0, "max": 1.0, "doc": "share of each task's tuning rows"},
        "steps": {"type": "int", "default": 400, "min": 0, "max": 1000000, "doc": "steps on the weights, and as many on the perturbations (this suite's budget)"},
        "batch_size": {"type": "int", "default": 64, "min": 1, "max": 65536, "doc": "rows per task and step"},
        "lr": {"type": "float", "default": 1e-4, "min": 0.0, "max": 10.0, "doc": "of Adam on the weights"},
    },
}  # fmt: skip

PLACE_STREAM, AIM_STREAM = 1, 2


class FeaturePath(Defense):
    """The defense of the card above."""

    hooks = ("repair",)

    def __init__(
        self, strength: float = 1.0, points: int = 4, robust: float = 1.0, eps: float = 0.2,
        delta_lr: float = 0.002, restart: int = 0, patch: int = 0, aim: str = "away", share: float = 0.5,
        steps: int = 400, batch_size: int = 64, lr: float = 1e-4,
    ) -> None:  # fmt: skip
        self.strength, self.points, self.robust = strength, points, robust
        self.eps, self.delta_lr, self.restart = eps, delta_lr, restart
        self.patch, self.aim = patch, aim
        self.share, self.steps, self.batch_size, self.lr = share, steps, batch_size, lr

    def repair(self, merged: Merged, base: Weights, ctx: MergeContext) -> Merged:
        """θ_m + κ τ; ``info`` has the loss before and after, ‖τ‖, and how often δ changed a prediction."""
        patient = Patient(merged, ctx, self.share, self.batch_size, "lfpm", images=True)
        start = Model(ctx.backbone, clone(merged, ctx, "lfpm"))
        streams = {
            rows.name: Stream(rows.name, ctx.views[rows.name], self.batch_size, ctx) for rows in patient.rows
        }
        window = square(self.patch, ctx.generator(PLACE_STREAM)) if self.patch else None
        deltas = Perturbations(list(streams.values()), self.delta_lr, self.eps, "lfpm", window)
        served = Model(ctx.backbone, patient.network)
        climb = self._climb(deltas, served, ctx)

        def loss_of(rows: Rows, batch: Split) -> Tensor:
            inputs = batch.inputs
            if self.robust:
                inputs = torch.cat([inputs, deltas.fixed(streams[rows.name], inputs)])
            return self.path_loss(rows, batch, served.features(inputs), _still(start, inputs))

        optimizer = torch.optim.Adam(patient.network.parameters(), lr=self.lr)
        losses = descend(patient, optimizer, self.steps, loss_of, cosine, climb)
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

    def _climb(self, deltas: Perturbations, served: Model, ctx: MergeContext) -> Callable[[], None]:
        """What happens to the perturbations after every step on the weights."""
        generator = ctx.generator(AIM_STREAM)
        classes: dict[str, int] = {}

        def aim() -> None:
            for stream in deltas.streams:
                many = len(stream.view.task.classes)
                classes[stream.name] = int(torch.randint(0, many, (), generator=generator))

        def towards(seen: Seen) -> Tensor:
            wanted = torch.full((len(seen.images),), classes[seen.stream.name], device=seen.images.device)
            return -functional.cross_entropy(seen.perturbed, wanted)

        def climb() -> None:
            if self.restart and deltas.flipped and len(deltas.flipped) % self.restart == 0:
                deltas.restart()
                aim()
            deltas.ascend(served, towards if self.aim == "class" else disagreement)

        aim()
        return climb

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
