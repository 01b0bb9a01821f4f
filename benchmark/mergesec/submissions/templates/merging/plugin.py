"""A merge method: one set of weights from the base and the experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mergesec.contracts import Expert, MergeContext, Merged, MergeMethod, Weights

CARD = {
    "name": "fresh",
    "kind": "merging",
    "class": "Fresh",
    "version": "1",
    "title": "Fresh",
    "summary": "the median of the experts, entry by entry",
}


class Fresh(MergeMethod):
    """Integer buffers keep the base's value."""

    def merge(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Merged:
        merged = dict(base)
        for name, tensor in base.items():
            if tensor.is_floating_point():
                merged[name] = torch.stack([e.weights[name] for e in experts]).median(0).values
        return Merged(merged)
