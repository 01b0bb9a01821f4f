"""A free-rider's attack: what is done to a published expert before it is merged."""

from __future__ import annotations

from mergesec.contracts import Attack, RecoverContext, Weights

CARD = {
    "name": "fresh",
    "kind": "attack",
    "class": "Fresh",
    "version": "1",
    "title": "Fresh",
    "summary": "a protection that hides in the last digits is gone",
    "knowledge": "the published weights",
    "data": "none",
    "threat": "protection",
    "hooks": ["recover"],
}


class Fresh(Attack):
    """Rounds to bfloat16."""

    def recover(self, published: Weights, ctx: RecoverContext) -> Weights:
        return {
            name: w.bfloat16().to(w.dtype) if w.is_floating_point() else w for name, w in published.items()
        }
