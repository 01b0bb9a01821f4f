"""Iso-CTS: isotropic merging in common and task-specific subspaces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mergesec_methods.merging._spectral import MatrixMerge, Triplets, leading, polar, split, task_sum

CARD = {
    "name": "iso_cts",
    "kind": "merging",
    "class": "IsoCTS",
    "version": "1",
    "title": "Iso-CTS",
    "paper": "Marczak et al., No task left behind: isotropic model merging with common and task-specific "
    "subspaces, ICML 2025",
    "url": "https://arxiv.org/abs/2502.04959",
    "summary": "Iso-C with the least directions of the sum replaced by each task's own",
    "output": "static",
    "data": "tuning",
    "modalities": ["image", "text"],
    "seeded": False,
    "parameters": {
        "common_space_fraction": {
            "type": "float",
            "default": 0.8,
            "min": 0.0,
            "max": 1.0,
            "doc": "share of the directions taken from the sum; the rest is divided among the tasks",
        },
        "scaling": {
            "type": "float",
            "default": 1.0,
            "min": 0.0,
            "max": 10.0,
            "also": ["tuned"],
            "doc": "scaling coefficient λ; 'tuned' picks it from 'grid' on the tuning split",
        },
        "grid": {
            "type": "list",
            "default": [0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0],
            "doc": "coefficients tried when scaling is 'tuned'",
        },
        "exclude": {
            "type": "list",
            "default": ["text_projection"],
            "doc": "two-dimensional tensors whose name contains one of these are averaged instead",
        },
    },
}


def share_out(size: int, tasks: int, fraction: float) -> tuple[int, int]:
    """(directions of the common space, directions per task); together at most ``size``.

    The task-specific space is rounded to a multiple of the number of tasks, as in the authors' code;
    where that exceeds ``size`` (tiny matrices, many tasks) every task gives one less.
    """
    each = min(round((size - int(size * fraction)) / tasks), size // tasks)
    return size - each * tasks, each


class IsoCTS(MatrixMerge):
    """τ* = σ̄ U* V*ᵀ for matrices (section 4 and the authors' code); mean τ_i for the rest.

    [U, U_1 … U_T] are the common left vectors (leading ones of Σ τ_i) beside each task's: the leading
    ones of τ_i with the common space projected out, (I − UUᵀ) τ_i. V alike. U* and V* are their polar
    factors, σ̄ the mean of all the singular values taken.
    """

    def __init__(
        self,
        common_space_fraction: float,
        scaling: float | str,
        grid: Sequence[float],
        exclude: Sequence[str],
    ) -> None:
        self.fraction = common_space_fraction
        self.scaling = scaling
        self.grid = grid
        self.exclude = exclude

    def matrix(self, base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        size = min(base.shape)
        common, each = share_out(size, len(experts), self.fraction)
        shared, rest = split(task_sum(base, experts), common)
        parts = [shared]
        for expert in experts if each else ():
            parts.append(self._own(expert - base, shared.left, rest, each))
        lefts, _ = polar(torch.cat([p.left for p in parts], dim=1))
        rights, _ = polar(torch.cat([p.right for p in parts], dim=1))
        mean = sum(float(p.sigma.sum()) for p in parts) / size
        return (lefts @ rights.T).mul_(mean)

    @staticmethod
    def _own(tau: Tensor, common: Tensor, rest: Tensor | None, each: int) -> Triplets:
        """Leading triplets of (I − UUᵀ) τ, by way of the coordinates in the complement if that is small."""
        if rest is None:
            return leading(tau.addmm_(common, common.T @ tau, alpha=-1.0), each)
        inside = leading(rest.T @ tau, each)
        return replace(inside, left=rest @ inside.left)
