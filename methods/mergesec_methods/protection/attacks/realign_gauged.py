"""Re-alignment as published, behind the gauge: what a free-rider gets who knows the symmetries but not ``coupled``.

AGA and the matching of hidden units compare weights with the base's as they stand. Scales of adaptive norms and
gates, signs of groups, channels in another order and whatever else the function does not depend on mislead both. Here all
of that is put right first, as ``coupled`` does it (``_fixing``); then heads are fitted by AGA's least squares, each map
by itself (``maps: aga``), or left as they are (``maps: none``, re-alignment of hidden units alone).
Like AGA, and unlike ``coupled``, the first keeps the function only nearly.
"""

from __future__ import annotations

from torch import Tensor

from mergesec.anatomy import Attention
from mergesec.contracts import Weights
from mergesec.surgery import head_columns, head_rows, mix_columns, mix_rows
from mergesec_methods.protection.attacks.aga import fit, fitted_heads
from mergesec_methods.protection.attacks.coupled import Coupled

CARD = {
    "extends": "aga",
    "name": "realign_gauged",
    "class": "RealignGauged",
    "title": "Re-alignment behind the gauge",
    "paper": "",
    "url": "",
    "summary": "AGA, or matching of hidden units alone, after norms, gates, signs and orders were put right",
    "parameters": {
        "maps": {
            "type": "choice",
            "default": "aga",
            "choices": ["aga", "none"],
            "doc": "what is done to attention heads: AGA's fits, or nothing",
        },
    },
}


class RealignGauged(Coupled):
    """The attack of the card above."""

    def __init__(self, maps: str = "aga", ridge: float = 1e-8) -> None:
        super().__init__(match_heads=maps == "aga")
        self.maps, self.ridge = maps, ridge

    def _align(self, weights: Weights, reference: Weights, attention: Attention) -> dict[str, Tensor]:
        if self.maps == "none":
            return dict(weights)
        if attention.head_norm is None:
            return fitted_heads(weights, reference, attention, self.ridge)
        changed = dict(weights)
        for side in attention.sides:  # normed queries and keys are put right without fits
            own, anchor = (head_rows(w, side.value, attention)[0] for w in (weights, reference))
            changed = mix_rows(changed, attention, side.value, fit(own.mT, anchor.mT, self.ridge).mT)
            if side.output is not None:
                own, anchor = (head_columns(w, attention, side.output) for w in (weights, reference))
                changed = mix_columns(changed, attention, side.output, fit(own, anchor, self.ridge))
        return changed
