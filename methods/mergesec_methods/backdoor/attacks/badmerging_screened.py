"""BadMerging by an adversary who knows that contributions are screened, and with which public algorithm.

He trains as BadMerging does, and a clean expert of his own beside it. Between the two lies a straight line of experts,

    θ_s = θ_clean + s (θ_backdoored − θ_clean),     s = 1, (k − 1) / k, ..., 1 / k,

on which the backdoor fades and the accuracy stays. He shows them to the cell's screen, run on his own training rows in
the place of the merger's, the strongest first, each beside his clean expert, and contributes the first that is let in
(the weakest, if none is). The other contributors being unknown to him, a screen that compares contributions sees his
two only. Without a screen this is BadMerging.

The construction is this suite's; weakening until a detector is silent is the plainest adaptive attack there is.
"""

from __future__ import annotations

from typing import Any

from mergesec.contracts import Defense, Expert, Screened, TrainContext, Weights
from mergesec_methods.backdoor.attacks._retrain import added, refit
from mergesec_methods.backdoor.attacks.badmerging_adaptive import SIBLING_STREAM, AdaptiveBadMerging

CARD = {
    "extends": "badmerging",
    "name": "badmerging_screened",
    "class": "ScreenedBadMerging",
    "version": "1",
    "title": "BadMerging, past a screen",
    "paper": "Zhang et al., BadMerging: backdoor attacks against model merging, CCS 2024; adaptation by this project",
    "summary": "BadMerging weakened towards the adversary's own clean expert until the cell's screen lets it in",
    "knowledge": "the adversary's own training data, the public base, and the screen with its parameters",
    "adapts": True,
    "trigger_of": "badmerging",
    "after_trigger": ["strengths", "rows", "alpha", "interpolation", "triggered"],
    "trial": {"steps": 4, "restarts": 2, "batch": 16, "images": 6, "strengths": 2, "rows": 32},
    "parameters": {
        "strengths": {"type": "int", "default": 4, "min": 1, "max": 100, "doc": "k: experts between the backdoored and the clean one that he may try"},
        "rows": {"type": "int", "default": 256, "min": 1, "secret": "rows.tuning", "doc": "own training rows that play the merger's"},
    },
}  # fmt: skip


class ScreenedBadMerging(AdaptiveBadMerging):
    """The attack of the card above."""

    def __init__(self, strengths: int = 4, rows: int = 256, **given: Any) -> None:
        super().__init__(rounds=0, rows=rows, **given)
        self.strengths = strengths

    def poison(self, ctx: TrainContext) -> Weights:
        """The strongest expert that the screen lets in."""
        weights = ctx.fit(loss=self.objective(ctx, ctx.trigger or self.trigger(ctx)))
        if ctx.defense is None or type(ctx.defense).screen is Defense.screen:
            return weights
        clean = refit(ctx, seed=ctx.generator(SIBLING_STREAM).initial_seed())
        beside = self.shown(clean, ctx.defense, ctx)
        candidate = weights
        for step in range(self.strengths, 0, -1):
            candidate = added(clean, clean, weights, step / self.strengths)
            if self.let_in(candidate, beside, ctx.defense, ctx):
                break
        return candidate

    def shown(self, weights: Weights, screen: Defense, ctx: TrainContext) -> Expert:
        """An expert with what the screen finds in it by itself, if it is one that looks at each so."""
        expert = Expert(ctx.task.name, weights)
        if type(screen).examine is Defense.examine:
            return expert
        return screen.examined(ctx.base, [expert], self.context(ctx))[0]

    def let_in(self, candidate: Weights, beside: Expert, screen: Defense, ctx: TrainContext) -> bool:
        """Whether the screen keeps ``candidate`` beside the clean expert."""
        shown = [self.shown(candidate, screen, ctx), beside]
        found = screen.screen(ctx.base, shown, self.context(ctx))
        passed = found.experts if isinstance(found, Screened) else found
        return any(expert.weights is candidate for expert in passed)
