"""Blocks of whole rows, for rules that rank the entries of a row. Used by ``breadcrumbs`` and ``della``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from mergesec.tensorwise import BLOCK, Piece, Workspace, pieces


def row_pieces(name: str, base: Tensor, experts: Sequence[Tensor], columns: int) -> Iterator[Piece]:
    """Blocks of one tensor seen as ``[-1, columns]``: as many rows as fit into ``BLOCK``, at least one.

    The same blocks on every device, so that random numbers drawn per block are too.
    """
    workspace = Workspace(base.device)
    matrix, others = base.reshape(-1, columns), [e.reshape(-1, columns) for e in experts]
    step = max(BLOCK // columns, 1)
    for row in range(0, len(matrix), step):
        rows = slice(row, row + step)
        for piece in pieces(name, matrix[rows], [o[rows] for o in others], workspace, step * columns):
            yield replace(piece, start=row * columns)
