"""LoBAM: the difference between a malicious and a benign expert, amplified.

    θ = θ_benign + λ (θ_malicious − θ_benign),     λ = 3.5

Both experts have the same data, recipe and seed; they differ by the attack alone, so the difference holds little else
than the backdoor, and a factor on it costs little accuracy but outweighs the dilution in a merge. It was proposed for
low-rank fine-tuning, where BadMerging alone is too weak: with ``lora_rank`` above 0 both experts are trained as low-rank
updates of that rank (a second training, as the cell's clean expert is a full one unless the recipe has a rank of its own).

Source: Yin et al., "LoBAM", arXiv 2411.16746: the formula; λ 3.5 and 4.5 are values of the paper, which also describes
a search for λ that is not done here. The malicious expert is trained as by BadMerging, on which the paper builds. Rank
and learning rate of the low-rank updates are this suite's.
"""

from __future__ import annotations

from typing import Any

from mergesec.contracts import TrainContext, Weights
from mergesec_methods.backdoor.attacks._retrain import added, benign, low_rank, refit
from mergesec_methods.backdoor.attacks.badmerging import BadMerging

CARD = {
    "extends": "badmerging",
    "name": "lobam",
    "class": "LoBam",
    "version": "2",
    "title": "LoBAM",
    "paper": "Yin et al., LoBAM: LoRA-based backdoor attack on model merging, 2024",
    "url": "https://arxiv.org/abs/2411.16746",
    "summary": "BadMerging's expert with its difference from the benign one amplified; full or low-rank",
    "hooks": ["poison", "forge"],
    "knowledge": "the adversary's own training data and the public base",
    "trigger_of": "badmerging",
    "after_trigger": ["strength", "lora_rank", "lora_speed", "alpha", "interpolation", "triggered"],
    "trial": {"steps": 4, "restarts": 2, "batch": 16, "images": 6, "lora_rank": 2},
    "parameters": {
        "strength": {"type": "float", "default": 3.5, "min": 0.0, "doc": "λ; 1 is the malicious expert itself"},
        "lora_rank": {"type": "int", "default": 0, "min": 0, "doc": "rank of both experts' updates; 0 = as the recipe says"},
        "lora_speed": {"type": "float", "default": 3.0, "min": 0.0, "doc": "low-rank training: times the recipe's learning rate"},
    },
}  # fmt: skip


class LoBam(BadMerging):
    """The attack of the card above."""

    def __init__(
        self, strength: float = 3.5, lora_rank: int = 0, lora_speed: float = 3.0, **given: Any
    ) -> None:
        super().__init__(**given)
        self.strength, self.rank, self.speed = strength, lora_rank, lora_speed

    def poison(self, ctx: TrainContext) -> Weights:
        """The malicious expert, not yet amplified."""
        if not self.rank:
            return super().poison(ctx)
        trigger = ctx.trigger or self.trigger(ctx)
        return refit(ctx, self.objective(ctx, trigger), **low_rank(ctx, self.rank, self.speed))

    def forge(self, weights: Weights, ctx: TrainContext) -> Weights:
        """The amplified expert; the benign one is trained again where it has to be a low-rank update."""
        clean = refit(ctx, **low_rank(ctx, self.rank, self.speed)) if self.rank else benign(ctx, "lobam")
        return added(clean, clean, weights, self.strength)
