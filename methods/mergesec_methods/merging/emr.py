"""EMR-merging: elect a unified task vector, mask it per task, rescale it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergesec.contracts import Expert, MergeContext, Weights
from mergesec.tensorwise import Loops, Piece
from mergesec.weights import mergeable
from mergesec_methods.merging._masks import MaskedMerge, greater, rows, sums_in_order, task_vectors

CARD = {
    "name": "emr",
    "kind": "merging",
    "class": "Emr",
    "version": "1",
    "title": "EMR-merging",
    "paper": "Huang et al., EMR-merging: tuning-free high-performance model merging, NeurIPS 2024",
    "url": "https://arxiv.org/abs/2405.17461",
    "summary": "one elected task vector; per task a mask of the agreeing signs and one rescaling factor",
    "output": "per_task",
    "data": "none",
    "modalities": ["image", "text"],
    "seeded": False,
    "parameters": {
        "rescale": {
            "type": "choice",
            "choices": ["tensor_means", "entries", "none"],
            "default": "tensor_means",
            "doc": "magnitudes are compared as sums of the tensors' means (released code) or over all "
            "entries (paper)",
        },
    },
}


LANES, STRIP = 32, 1024
"""Sums are made in so many lanes, of so many entries before they are added to what came before: ``unified``'s."""


@dataclass(frozen=True)
class Sums:
    """Gathered over all blocks: Σ|m_t ⊙ τ| and Σ|τ_t| per expert, each tensor's weighted by ``share``."""

    share: Mapping[str, float]
    blocks: dict[tuple[str, int], tuple[list[float], list[float]]] = field(default_factory=dict)

    def gather(self, piece: Piece, kept: list[float], own: list[float]) -> None:
        """Those of a block, from any thread."""
        self.blocks[piece.name, piece.start] = kept, own

    def total(self) -> tuple[list[float], list[float]]:
        """(kept, own) ``[T]``, in one order whatever the threads'."""
        place = {name: index for index, name in enumerate(self.share)}
        found = sorted(self.blocks, key=lambda key: (place[key[0]], key[1]))
        weights = np.array([self.share[name] for name, _ in found])
        kept, own = (np.array([self.blocks[key][side] for key in found]).T * weights for side in (0, 1))
        return kept.sum(1).tolist(), own.sum(1).tolist()


class Emr(MaskedMerge):
    """θ_t = θ0 + s_t · m_t ⊙ τ, as in the released code.

    Elect: γ = sign Σ_t τ_t (−1 where the sum is 0), τ = γ ⊙ the largest |τ_t| among the τ_t of that
    sign. Mask: m_t = [τ_t ⊙ γ > 0]. Rescale: s_t = Σ|τ_t| / Σ|m_t ⊙ τ|; 1 where nothing of a task is
    left to rescale. The shared weights are θ0 + τ.
    """

    def __init__(self, rescale: str) -> None:
        self.rescale = rescale

    def survey(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Sums:
        by_tensor = self.rescale == "tensor_means"
        share = {n: 1.0 / max(t.numel(), 1) if by_tensor else 1.0 for n, t in base.items() if mergeable(t)}
        return Sums(share)

    def localize(self, piece: Piece, vector: Tensor, facts: Sums) -> Tensor:
        taus = task_vectors(piece)
        total = torch.sum(taus, 0, out=piece.scratch("total"))
        sign = torch.gt(total, 0.0, out=total).mul_(2.0).sub_(1.0)
        agreement = taus.mul_(sign)
        size = torch.amax(agreement, 0, out=vector).clamp_(min=0.0)
        chosen = greater(agreement, 0.0)
        kept = rows(piece, "chosen").copy_(chosen.view(torch.uint8)).mul_(size)
        facts.gather(piece, sums(kept), sums(agreement.abs_()))
        size.mul_(sign)
        return chosen

    def fused(
        self,
        loops: Loops,
        vector: Tensor,
        shared: Tensor,
        masks: np.ndarray[Any, np.dtype[np.int64]],
        facts: Sums,
    ) -> bool:
        piece, whole = loops.piece, loops.size == loops.piece.base.numel()
        if not whole or not sums_in_order(len(masks)):  # the sums are over whole blocks
            return False
        kept, own = np.zeros((2, len(masks), LANES), np.float32)
        places = piece.base.data_ptr(), loops.others, loops.size, shared.data_ptr(), vector.data_ptr()
        held = piece.workspace.row("strips", 2 * STRIP).view(2, STRIP).numpy()
        loops.module.unified(*places, np.float32(self.scaling), masks, kept, own, held)
        facts.gather(piece, _over_lanes(kept), _over_lanes(own))
        return True

    def scales(self, experts: Sequence[Expert], facts: Sums) -> list[float]:
        if self.rescale == "none":
            return [1.0] * len(experts)
        return [own / kept if kept > 0.0 else 1.0 for kept, own in zip(*facts.total(), strict=True)]

    def facts(self, experts: Sequence[Expert], facts: Sums) -> dict[str, Any]:
        return {"rescalers": {e.task: s for e, s in zip(experts, self.scales(experts, facts), strict=True)}}


def sums(rows: Tensor) -> list[float]:
    """Of each row of ``[T, n]``, none below 0; on a CPU with the compiled loop's operations in its order."""
    if rows.device.type != "cpu":
        return rows.sum(1).tolist()
    found = rows.numpy()
    count, size = found.shape
    whole = size - size % STRIP
    strips = found[:, :whole].reshape(count, -1, STRIP // LANES, LANES)
    lanes = np.add.reduce(np.add.reduce(strips, axis=2), axis=1)
    if whole < size:
        rest = np.zeros((count, STRIP), np.float32)
        rest[:, : size - whole] = found[:, whole:]
        lanes += np.add.reduce(rest.reshape(count, -1, LANES), axis=1)
    return _over_lanes(lanes)


def _over_lanes(lanes: np.ndarray[Any, np.dtype[np.float32]]) -> list[float]:
    return [float(total) for total in lanes.sum(1, dtype=np.float64)]
