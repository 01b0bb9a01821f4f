"""Blocks of whole rows, for rules that rank the entries of a row. Used by ``breadcrumbs`` and ``della``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from mergesec.tensorwise import BLOCK, Span


def row_spans(name: str, base: Tensor, experts: Sequence[Tensor], columns: int) -> Iterator[Span]:
    """Blocks of one tensor seen as ``[-1, columns]``: as many rows as fit into ``BLOCK``, at least one.

    The same blocks on every device, so that random numbers drawn per block are too.
    """
    own, *others = (tensor.to(base.device).reshape(-1) for tensor in (base, *experts))
    step = max(BLOCK // columns, 1) * columns
    for start in range(0, own.numel(), step):
        part = slice(start, start + step)
        yield Span(name, start, own[part], [other[part] for other in others])
