"""Angles between experts, tensor by tensor. Used by ``model_stock`` and ``slerp``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mergesec.contracts import Expert, Weights
from mergesec.tensorwise import BLOCK, Span, Workspace, spans, sweep
from mergesec.weights import mergeable, owners


def inner_products(base: Weights, experts: Sequence[Expert], task_vectors: bool) -> dict[str, Tensor]:
    """Per floating tensor, ⟨v_i, v_j⟩ as float64 ``[T, T]`` on the CPU, by name (tied names included).

    v_i is the expert's tensor, or with ``task_vectors`` its difference to the base. One read of all
    inputs; blocks are summed in float32, the blocks' sums in float64.
    """
    tied, count = owners(base), len(experts)
    sums: dict[str, dict[int, Tensor]] = {}

    def work() -> Iterator[Span]:
        for name, tensor in base.items():
            if mergeable(tensor) and name not in tied:
                sums[name] = {}
                yield from spans(
                    name, tensor, [e.weights[name] for e in experts], max(BLOCK // (2 * count), 1)
                )

    def visit(span: Span, workspace: Workspace) -> None:
        piece = span.piece(workspace)
        rows = workspace.row("products", count * piece.base.numel()).view(count, -1)
        for row, expert in zip(rows, piece.experts, strict=True):
            if task_vectors:
                torch.sub(expert, piece.base, out=row)
            else:
                row.copy_(expert)
        sums[span.name][span.start] = (rows @ rows.T).cpu().double()

    sweep(work(), visit)
    found = {name: _ordered_sum(parts, count) for name, parts in sums.items()}
    return {**found, **{name: found[owner] for name, owner in tied.items()}}


def _ordered_sum(parts: dict[int, Tensor], count: int) -> Tensor:
    """Blocks arrive in any order; rounding must not depend on it."""
    total = torch.zeros(count, count, dtype=torch.float64)
    for start in sorted(parts):
        total += parts[start]
    return total


def cosines(products: Tensor) -> Tensor:
    """cos of the angles between vectors, from their inner products ``[T, T]``; 0 where a vector is 0."""
    norms = products.diagonal().clamp(min=0.0).sqrt()
    lengths = norms[:, None] * norms[None, :]
    return torch.where(lengths > 0, products / lengths.where(lengths > 0, 1.0), 0.0).clamp(-1.0, 1.0)
