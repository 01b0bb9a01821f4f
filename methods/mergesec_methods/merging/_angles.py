"""Angles between experts, tensor by tensor. Used by ``model_stock`` and ``slerp``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergesec.contracts import Expert, Weights
from mergesec.tensorwise import BLOCK, Workspace, pieces
from mergesec.weights import mergeable, owners


def inner_products(base: Weights, experts: Sequence[Expert], task_vectors: bool) -> dict[str, Tensor]:
    """Per floating tensor, ⟨v_i, v_j⟩ as float64 ``[T, T]`` on the CPU, by name (tied names included).

    v_i is the expert's tensor, or with ``task_vectors`` its difference to the base. One read of all
    inputs; blocks are summed in float32, the blocks' sums in float64.
    """
    tied = owners(base)
    found: dict[str, Tensor] = {}
    for name, tensor in base.items():
        if mergeable(tensor) and name not in tied:
            found[name] = _products(name, tensor, [e.weights[name] for e in experts], task_vectors)
    for name, owner in tied.items():
        found[name] = found[owner]
    return found


def _products(name: str, base: Tensor, experts: Sequence[Tensor], task_vectors: bool) -> Tensor:
    count = len(experts)
    workspace = Workspace(base.device)
    total = torch.zeros(count, count, dtype=torch.float64)
    for piece in pieces(name, base, experts, workspace, max(BLOCK // count, 1)):
        rows = workspace.row("products", count * piece.base.numel()).view(count, -1)
        for row, expert in zip(rows, piece.experts, strict=True):
            if task_vectors:
                torch.sub(expert, piece.base, out=row)
            else:
                row.copy_(expert)
        total += (rows @ rows.T).cpu().double()
    return total


def cosines(products: Tensor) -> Tensor:
    """cos of the angles between vectors, from their inner products ``[T, T]``; 0 where a vector is 0."""
    norms = products.diagonal().clamp(min=0.0).sqrt()
    lengths = norms[:, None] * norms[None, :]
    return torch.where(lengths > 0, products / lengths.where(lengths > 0, 1.0), 0.0).clamp(-1.0, 1.0)
