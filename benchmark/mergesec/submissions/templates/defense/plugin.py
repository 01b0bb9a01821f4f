"""A merger's defense, after the merge: half of the merged task vector, and half of what hides in it."""

from __future__ import annotations

import torch

from mergesec.contracts import Defense, MergeContext, Merged, Weights

CARD = {
    "name": "fresh",
    "kind": "defense",
    "class": "Fresh",
    "version": "1",
    "title": "Fresh",
    "summary": "half of the way back to the base",
    "knowledge": "the base and the merged weights",
    "data": "none",
    "threat": "backdoor",
    "hooks": ["repair"],
    "parameters": {
        "share": {
            "type": "float",
            "default": 0.5,
            "min": 0.0,
            "max": 1.0,
            "doc": "share of the task vector that stays",
        },
    },
}


class Fresh(Defense):
    """θ ← θ_base + share · (θ − θ_base)."""

    def __init__(self, share: float) -> None:
        self.share = share

    def repair(self, merged: Merged, base: Weights, ctx: MergeContext) -> Merged:
        return Merged(
            {
                name: torch.lerp(base[name], w, self.share) if w.is_floating_point() else w
                for name, w in merged.shared.items()
            }
        )
