"""Trigger inversion for generators (Elijah): a shift of the start noise under which all images become one.

Elijah (An et al., AAAI 2024) looks for r = argmin ‖λ r − ε̂(noise + r, T)‖₁: a backdoored network, fed the trigger,
predicts a shifted noise. A network that predicts the image says the same by what it expects at t = 0, where a
backdoor with a fixed target makes every noise look alike. So here

    r = argmin  E_i ‖ x̂(ε_i + r) − mean_j x̂(ε_j + r) ‖₁ + weight · mean |r|,

and as in the paper's detection the *uniformity* of what comes of it decides: an expert is dropped if its images lie
closer together under its own r, as a share of their spread without it, than ``collapse`` times the base's share. A
reconstruction for flow matching; nothing is removed from a network here, the merge goes on without it. Triggers in
the condition leave no trace in the noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergesec.contracts import Defense, Expert, MergeContext, Screened, Weights
from mergesec.generation import Request
from mergesec_methods.backdoor.defenses._denoising import expected, generator_of, requests
from mergesec_methods.backdoor.defenses._screens import let_in, rounded

CARD = {
    "name": "trigger_inversion",
    "kind": "defense",
    "class": "TriggerInversion",
    "version": "1",
    "title": "Trigger inversion (Elijah)",
    "paper": "An et al., Elijah: eliminating backdoors injected in diffusion models via distribution shift, AAAI 2024",
    "url": "https://arxiv.org/abs/2312.00050",
    "summary": "drop generators in which a shift of the start noise makes all images one (reconstruction)",
    "threat": "backdoor",
    "hooks": ["examine", "screen"],
    "after_examine": ["collapse"],
    "knowledge": "conditions of tuning rows of every task, the base and the contributed weights",
    "data": "tuning",
    "unlabelled": True,
    "modalities": ["generation"],
    "seeded": False,
    "trial": {"steps": 3, "rows": 4},
    "parameters": {
        "steps": {"type": "int", "default": 60, "min": 1, "max": 100000, "doc": "Adam steps per expert"},
        "rows": {"type": "int", "default": 32, "min": 2, "max": 100000, "doc": "noises that should end alike"},
        "learning_rate": {"type": "float", "default": 0.1, "min": 0.0, "max": 10.0, "doc": "of Adam"},
        "weight": {"type": "float", "default": 0.05, "min": 0.0, "doc": "of the size of r"},
        "collapse": {"type": "float", "default": 0.5, "min": 0.0, "doc": "least share of the base's spread that is let in"},
    },
}  # fmt: skip


class TriggerInversion(Defense):
    """The defense of the card above."""

    def __init__(
        self, steps: int = 60, rows: int = 32, learning_rate: float = 0.1, weight: float = 0.05,
        collapse: float = 0.5,
    ) -> None:  # fmt: skip
        self.steps, self.rows, self.learning_rate = steps, rows, learning_rate
        self.weight, self.collapse = weight, collapse

    def examine(self, base: Weights, expert: Expert, ctx: MergeContext) -> Weights:
        """``{"spread": scalar, "usual": scalar}``: what is left of the expert's and of the base's, each under its own
        shift; float64."""
        request = requests(ctx.views[expert.task], self.rows, ctx, self.name)
        usual = self.spread_left(base, request, ctx)
        left = self.spread_left(expert.weights, request, ctx)
        return {
            name: torch.tensor(value, dtype=torch.float64)
            for name, value in (("spread", left), ("usual", usual))
        }

    def screen(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Screened:
        """The experts that pass, untouched. Reports per expert the ``spread`` that is left under its own shift, as
        a share of the base's under its own (``relative``)."""
        left, relative = [], []
        for expert in self.examined(base, experts, ctx):
            usual = float(expert.findings["usual"])
            left.append(float(expert.findings["spread"]))
            relative.append(left[-1] / max(usual, 1e-9))
        suspicion = -torch.tensor(relative, dtype=torch.float64)
        report = {
            "spread": rounded(experts, torch.tensor(left)),
            "relative": rounded(experts, -suspicion),
            "threshold": self.collapse,
        }
        return Screened(let_in(experts, suspicion, -self.collapse), report)

    def spread_left(self, weights: Weights, request: Request, ctx: MergeContext) -> float:
        """The spread of expected images under the inverted shift, as a share of that without one."""
        model = generator_of(ctx, weights)
        generator = torch.Generator().manual_seed(0)  # the same noises for every expert and seed
        shape = request.noise.shape
        shift = torch.zeros(1, *shape[1:], device=ctx.device, requires_grad=True)
        optimizer = torch.optim.Adam([shift], lr=self.learning_rate)
        with torch.enable_grad():
            for _ in range(self.steps):
                noise = torch.randn(shape, generator=generator).to(ctx.device)
                loss = _spread(expected(model, request, noise + shift, told=True))
                loss = loss + self.weight * shift.abs().mean()
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        noise = torch.randn(shape, generator=generator).to(ctx.device)
        with torch.no_grad():
            after = float(_spread(expected(model, request, noise + shift, told=True)))
            before = float(_spread(expected(model, request, noise, told=True)))
        return after / max(before, 1e-9)


def _spread(images: Tensor) -> Tensor:
    """Mean absolute distance of images ``[N, d]`` to their mean."""
    return (images - images.mean(0, keepdim=True)).abs().mean()
