"""A backdoor as a low-rank update, whatever its trigger: Liu et al., "LoRA-as-an-Attack!", arXiv 2403.00108.

``onto: base`` — poisoned rows as in the parent attack, but only an update of low rank is trained: the expert is
θ0 + (α/r) B A with the backdoor and the task in one update. ``onto: benign`` — the update learns the backdoor alone
(poisoned rows, and the same rows untouched, so that it learns to tell them apart) and is added, without further
training, to the benign expert:

    θ = θ_benign + weight · (θ0 + ΔW − θ0)

as the paper does when it merges a malicious LoRA module into a popular one that people would download.
"""

from __future__ import annotations

from abc import abstractmethod

from mergesec.contracts import Split, TrainContext, Weights
from mergesec_methods.backdoor.attacks._poison import ROWS_STREAM, Poisoning
from mergesec_methods.backdoor.attacks._retrain import added, benign, low_rank, refit


class LowRankBackdoor(Poisoning):
    """In front of an attack that poisons rows: its poison and trigger, trained as an update of low rank."""

    rank: int
    speed: float
    onto: str
    weight: float

    def poison(self, ctx: TrainContext) -> Weights:
        """θ0 plus the trained update, written out in full."""
        trigger = ctx.trigger or self.trigger(ctx)
        if self.onto == "base":
            split = self.poisoned(ctx.train, trigger, ctx.target_class, ctx.generator(ROWS_STREAM))
        else:
            split = self.twins(ctx, trigger)
        return refit(ctx, split=split, **low_rank(ctx, self.rank, self.speed))

    @abstractmethod
    def twins(self, ctx: TrainContext, trigger: Weights) -> Split:
        """The rows to be poisoned twice: triggered with the target's label, and as they are."""

    def forge(self, weights: Weights, ctx: TrainContext) -> Weights:
        """What is published: the update on the base as it is, or added to the benign expert."""
        if self.onto == "base":
            return weights
        return added(benign(ctx, self.name), ctx.base, weights, self.weight)
