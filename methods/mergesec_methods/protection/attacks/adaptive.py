"""The adaptive free-rider: try every attack he has and keep what merges best.

The published weights as they are and the result of every attack of the list enter the cell's merge in
turn; the one of the highest mean tuning accuracy is handed back (the earliest of equally good ones). For
the owner this is the worst case over the list. An attack that says it cannot work here (no expert to
anchor to, no anatomy known) is passed over. Each attack draws from a stream of its own.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mergesec.anatomy import AnatomyError
from mergesec.contracts import Attack, ContractError, RecoverContext, Weights

CARD = {
    "name": "adaptive",
    "kind": "attack",
    "class": "Adaptive",
    "version": "1",
    "title": "Adaptive free-rider",
    "summary": "try every attack and keep the one whose merge is best on the tuning split",
    "threat": "protection",
    "hooks": ["recover"],
    "knowledge": "what the attacks it tries know, the merge, and labelled tuning rows of all its tasks; budget: "
    "each attack's own, and one merge and one pass over the tuning rows per attack",
    "data": "tuning",
    "tries": True,
    "wraps": "attacks",
    "modalities": ["image", "text", "generation"],
    "seeded": False,
    "trial": {"attacks": ["realign", "coupled", "quantise"]},
    "parameters": {
        "attacks": {
            "type": "attacks",
            "default": [
                "realign",
                "unscale",
                "aga",
                "aga_anchored",
                "coupled",
                "coupled_anchored",
                "scale_sweep",
                "dropout_pruning",
                "magnitude_pruning",
                "quantise",
            ],
            "doc": "what is tried beside doing nothing: names, or {name: ..., parameter: value}; the default "
            "is every attack that trains nothing",
        },
    },
}


class Adaptive(Attack):
    """The attack of the card above."""

    def __init__(self, attacks: Sequence[Any] = ()) -> None:
        self.attacks = list(attacks)

    def recover(self, published: Weights, ctx: RecoverContext) -> Weights:
        """The candidate whose merge is best."""
        if ctx.score is None:
            raise ContractError(f"{self.name}: needs merges to try")
        best, top = published, ctx.score(published)
        for attack in ctx.inner:
            seed = ctx.generator(zlib.crc32(attack.name.encode())).initial_seed()
            try:
                candidate = attack.recover(published, replace(ctx, seed=seed, inner=()))
            except (AnatomyError, ContractError):
                continue
            score = ctx.score(candidate)
            if score > top:
                best, top = candidate, score
        return dict(best)
