"""Un-scaling: estimate each head's scaling from the base and divide it out, then re-align the MLP.

The released PaRaMS code names three ways of recovering scaled attention (options ``rowwise``, "for
diagonal"; ``blockwise``; ``svd``, the default, "numerically stable") but has none of them. These are
reconstructions: what the names say, written down in the plainest form that undoes such a scaling. Per
head and map, with X ``[head_dim, n]`` the published rows (a query, key or value row with its bias, a
column of the output map) and X0 the base's, ``X ← T X`` where

* ``row``: T = diag(s_i), ``s_i = sign⟨x_i, x0_i⟩ · ‖x0_i‖ / ‖x_i‖``. A diagonal scaling is undone but for the
  change of norm that fine-tuning made;
* ``block``: T = s I with the same s over the whole head: undoes one scalar per head;
* ``svd``: with X = U S Vᵀ and X0 = U0 S0 V0ᵀ, ``T X = U0 S0 R Vᵀ``, R the orthogonal matrix for which this is
  nearest to X0 (Procrustes: the polar factor of S0² V0ᵀ V). Only the row space of X is kept, so what comes
  back is the same whatever invertible matrix scaled it, with the base's singular values. AGA projects
  instead, and loses the norm.

The four maps are treated apart, as the names suggest, so the function is kept only approximately.
``realign`` puts the MLP's hidden units back first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mergesec.contracts import Attack, RecoverContext, Weights
from mergesec.surgery import change_heads
from mergesec_methods.protection.attacks._anchors import MAPS, heads_as_rows
from mergesec_methods.protection.attacks.realign import Realign

CARD = {
    "name": "unscale",
    "kind": "attack",
    "class": "Unscale",
    "version": "1",
    "title": "Un-scaling",
    "paper": "Disrupting Model Merging: A Parameter-Level Defense Without Sacrificing Accuracy, ICCV 2025",
    "url": "https://arxiv.org/abs/2503.07661",
    "summary": "match each head's rows, norm or singular values to the base; a reconstruction from option names",
    "threat": "protection",
    "hooks": ["recover"],
    "knowledge": "the published expert and the public base",
    "data": "none",
    "modalities": ["image", "text", "generation"],
    "seeded": False,
    "parameters": {
        "mode": {
            "type": "choice",
            "default": "svd",
            "choices": ["row", "block", "svd"],
            "doc": "one scale per row, one per head, or the base's singular values (the released default)",
        },
        "realign": {
            "type": "bool",
            "default": True,
            "doc": "put the MLP's hidden units back in the base's order as well (Hungarian)",
        },
    },
}

TINY = 1e-300


def row_scales(own: Tensor, anchor: Tensor) -> Tensor:
    """T for ``row``, ``[heads, head_dim, head_dim]``; both arguments float64 ``[heads, head_dim, n]``."""
    return torch.diag_embed(_ratio(own, anchor, (2,)))


def block_scales(own: Tensor, anchor: Tensor) -> Tensor:
    """T for ``block``; shapes as in ``row_scales``."""
    scale = _ratio(own, anchor, (1, 2))
    return scale[:, None, None] * torch.eye(own.shape[1], dtype=own.dtype)


def singular_values(own: Tensor, anchor: Tensor) -> Tensor:
    """T for ``svd``; shapes as in ``row_scales``. Rows that depend on each other are left out of the inverse."""
    u, s, vh = torch.linalg.svd(own, full_matrices=False)
    u0, s0, v0h = torch.linalg.svd(anchor, full_matrices=False)
    left, _, right = torch.linalg.svd(s0.square()[..., None] * (v0h @ vh.mT))
    cut = s[:, :1] * max(own.shape[1:]) * torch.finfo(own.dtype).eps
    inverse = torch.where(s > cut, 1.0 / s.clamp_min(TINY), 0.0)
    scales: Tensor = (u0 * s0[:, None]) @ left @ right @ (inverse[..., None] * u.mT)
    return scales


def _ratio(own: Tensor, anchor: Tensor, dims: tuple[int, ...]) -> Tensor:
    """±‖anchor‖ / ‖own‖ over ``dims``, negative where they point apart; 1 where ``own`` is nothing."""
    norm = own.square().sum(dims).sqrt()
    size = torch.where(norm > 0, anchor.square().sum(dims).sqrt() / norm.clamp_min(TINY), 1.0)
    return torch.where((own * anchor).sum(dims) < 0, -size, size)


MODES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "row": row_scales,
    "block": block_scales,
    "svd": singular_values,
}


class Unscale(Attack):
    """The attack of the card above."""

    def __init__(self, mode: str = "svd", realign: bool = True) -> None:
        self.mode, self.realign = mode, realign

    def recover(self, published: Weights, ctx: RecoverContext) -> dict[str, Tensor]:
        """``published`` with every head scaled like the base's."""
        recovered = dict(Realign().recover(published, ctx) if self.realign else published)
        for attention in (a for block in ctx.backbone.anatomy().blocks for a in block.attentions):
            own, anchor = (heads_as_rows(w, attention) for w in (recovered, ctx.base))
            scales = {name: MODES[self.mode](own[name], anchor[name]) for name in MAPS}
            # rows of the output map are columns of its weight, on which T acts from the right
            scales["output"] = scales["output"].mT
            recovered = change_heads(recovered, attention, **scales)
        return recovered
