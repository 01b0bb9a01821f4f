"""WAG: weight averaging with further models, so that no single contributor's backdoor keeps its strength."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mergesec.contracts import (
    ContractError,
    Defense,
    Expert,
    MergeContext,
    Merged,
    MergeMethod,
    Weights,
)
from mergesec.weights import add_task_vector, apply_flat, check_same_layout, flat_layout, zeros_flat

CARD = {
    "name": "wag",
    "kind": "defense",
    "class": "Wag",
    "version": "1",
    "title": "WAG (weight averaging)",
    "paper": "Arora et al., Here's a free lunch: sanitizing backdoored models with merging, 2024",
    "url": "https://arxiv.org/abs/2402.19334",
    "summary": "average every contributed expert with further experts of its task before merging",
    "threat": "backdoor",
    "hooks": ["merge"],
    "knowledge": "further independently trained experts of the same tasks",
    "data": "none",
    "siblings": "models",
    "modalities": ["image", "text"],
    "seeded": False,
    "parameters": {
        "models": {
            "type": "int",
            "default": 1,
            "min": 1,
            "max": 16,
            "doc": "further experts per task that each contributed expert is averaged with",
        },
        "alone": {
            "type": "bool",
            "default": False,
            "later": True,
            "doc": "the control: the further experts without the contributed one, which a defender who has them could do without",
        },
    },
}


class Wag(Defense):
    """θ̄_t = (θ_t + Σ_{j ≤ m} θ_t^{(j)}) / (m + 1) per task (``alone``: Σ θ_t^{(j)} / m), then the merge method."""

    def __init__(self, models: int, alone: bool = False) -> None:
        self.models, self.alone = models, alone

    def merge(
        self, base: Weights, experts: Sequence[Expert], method: MergeMethod, ctx: MergeContext
    ) -> Merged:
        """``method`` on the averaged experts; ContractError where a task lacks siblings."""
        merged = method.merge(base, [self._averaged(base, expert, ctx) for expert in experts], ctx)
        return replace(merged, info={**merged.info, "wag_models": self.models})

    def _averaged(self, base: Weights, expert: Expert, ctx: MergeContext) -> Expert:
        siblings = ctx.siblings.get(expert.task, ())
        if len(siblings) < self.models:
            raise ContractError(
                f"wag: task '{expert.task}' has {len(siblings)} further experts, {self.models} are needed"
            )
        members = [*([] if self.alone else [expert]), *siblings[: self.models]]
        layout = flat_layout(base)
        total = zeros_flat(layout, base)
        for member in members:
            check_same_layout(base, member.weights, f"expert '{member.task}'")
            add_task_vector(total, layout, base, member.weights)
        return Expert(expert.task, apply_flat(layout, base, total, 1.0 / len(members)))
