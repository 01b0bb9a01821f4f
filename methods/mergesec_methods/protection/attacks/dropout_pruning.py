"""Dropout pruning by the free-rider: drop a share of the protected task vector and rescale the rest.

``τ' = m ⊙ (θ_published − θ_base) / (1 − p)``, ``m ~ Bernoulli(1 − p)`` entry by entry (the drop-and-rescale
rule of DARE), done to the published expert before it enters any merge. The expectation of
τ' is τ, so it helps only where the protection concentrates its harm in few entries.
"""

from __future__ import annotations

from torch import Tensor

from mergesec.contracts import Attack, RecoverContext, Weights
from mergesec.surgery import drop_task_vector

CARD = {
    "name": "dropout_pruning",
    "kind": "attack",
    "class": "DropoutPruning",
    "version": "1",
    "title": "Dropout pruning",
    "paper": "Yu et al., Language Models are Super Mario (DARE), ICML 2024",
    "url": "https://arxiv.org/abs/2311.03099",
    "summary": "drop a random share of the protected task vector and rescale the rest",
    "threat": "protection",
    "hooks": ["recover"],
    "knowledge": "the published expert and the public base",
    "data": "none",
    "modalities": ["image", "text", "generation"],
    "seeded": True,
    "parameters": {
        "drop": {
            "type": "float",
            "default": 0.5,
            "min": 0.0,
            "max": 0.99,
            "doc": "share p of the task vector dropped; no published value for this attack, 0.5 is the "
            "usual default of DARE",
        },
    },
}


class DropoutPruning(Attack):
    """The attack of the card above."""

    def __init__(self, drop: float = 0.5) -> None:
        self.drop = drop

    def recover(self, published: Weights, ctx: RecoverContext) -> dict[str, Tensor]:
        """Base plus the dropped and rescaled task vector; tensors that are not floats stay."""
        return drop_task_vector(published, ctx.base, self.drop, ctx.generator())
