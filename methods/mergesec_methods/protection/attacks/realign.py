"""Re-alignment: put rearranged hidden units back by matching them to the public base.

The adaptive attack of the PaRaMS paper (the released repository has the matching routine but not the
attack). Per block, ``S[i, j]`` is the similarity of published unit i and base unit j over up row, up
bias (gate row, gate bias) and down column; the assignment maximising ``Σ_i S[i, σ(i)]`` is found and
unit i goes to place σ(i), i.e. the inverse permutation is applied.
Attention is left as published: this attack undoes rearrangement only.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from mergesec.contracts import Attack, RecoverContext, Weights
from mergesec.surgery import hidden_units, reorder_hidden
from mergesec_methods._matching import Anchors

CARD = {
    "name": "realign",
    "kind": "attack",
    "class": "Realign",
    "version": "1",
    "title": "Re-alignment",
    "paper": "Disrupting Model Merging: A Parameter-Level Defense Without Sacrificing Accuracy, ICCV 2025",
    "url": "https://arxiv.org/abs/2503.07661",
    "summary": "match the MLP's hidden units to the base (Hungarian) and put them back in its order",
    "threat": "protection",
    "hooks": ["recover"],
    "knowledge": "the published expert and the public base",
    "data": "none",
    "modalities": ["image", "text", "generation"],
    "seeded": False,
    "parameters": {
        "similarity": {
            "type": "choice",
            "default": "inner",
            "choices": ["inner", "cosine"],
            "doc": "inner product (weight matching) or cosine of hidden units",
        },
    },
}


class Realign(Attack):
    """The attack of the card above."""

    def __init__(self, similarity: str = "inner") -> None:
        self.similarity = similarity

    def recover(self, published: Weights, ctx: RecoverContext) -> dict[str, Tensor]:
        """``published`` with every MLP's hidden units in the base's order."""
        recovered = dict(published)
        for mlp in (mlp for block in ctx.backbone.anatomy().blocks for mlp in block.mlps):
            units, anchors = hidden_units(published, mlp), hidden_units(ctx.base, mlp)
            if self.similarity == "cosine":
                units, anchors = normalize(units, dim=1), normalize(anchors, dim=1)
            recovered = reorder_hidden(recovered, mlp, Anchors(anchors).order(units))
        return recovered
