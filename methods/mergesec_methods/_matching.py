"""Matching the units of one network to those of another: exact, and fast where there is little to decide.

Units are rows ``[n, f]``; unit i goes to the place j of the anchor (the reference's row) it resembles.
The best one-to-one placement for ``Σ ⟨x_i, y_σ(i)⟩`` is the one of least ``Σ ‖x_i − y_σ(i)‖²``, and

* if every unit is closer to its place than half that place's distance to the next one, then by the
  triangle inequality every unit sits at its nearest place: the placement is the only best one, and no
  assignment problem is solved. Experts fine-tuned from the anchor pass by a wide margin, reordered or not;
* otherwise the assignment problem is solved, after potentials have been taken off its rows and columns.
  They change no placement's rank, only how far SciPy has to search: an order of magnitude on real weights.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from mergesec.surgery import assign

FEW = 256
"""Up to this many units the assignment itself costs less than looking for a way around it."""
SKETCH = 96
"""Features that are compared to guess which place is nearest."""


def best_order(scores: Tensor, *, maximize: bool) -> Tensor:
    """``surgery.assign``: the same optimum (any one of equally good ones), found sooner.

    ``scores`` float64 ``[n, n]``. Row and column means are taken off, that is the units' common part;
    when matching, also half of each row's and column's maximum, which turns scores of units that have a
    counterpart into (minus half) their squared distance.
    """
    eased = scores - scores.mean(dim=1, keepdim=True)
    eased -= eased.mean(dim=0)
    if maximize:
        rows, columns = eased.amax(dim=1, keepdim=True), eased.amax(dim=0)
        eased.sub_(rows, alpha=0.5).sub_(columns, alpha=0.5)
    return assign(eased, maximize=maximize)


def matched_order(scores: Tensor) -> Tensor:
    """``order[j]``, the row of ``scores`` ``[n, n]`` that goes to place j, of the largest total score.

    Rows stay where they are if no order is better than that.
    """
    places = torch.arange(len(scores))
    order = best_order(scores, maximize=True)
    gain = (scores[order, places] - scores.diagonal()).sum()
    return order if gain > 1e-12 * scores.diagonal().abs().sum() else places


class Anchors:
    """The units that others are matched to. Made once, it serves any number of networks.

    ``units`` float64 ``[n, f]`` on a CPU.
    """

    def __init__(self, units: Tensor) -> None:
        self.units = units

    @cached_property
    def reach(self) -> Tensor:
        """Half of each unit's distance to its nearest neighbour ``[n]``, float64, never too large.

        In single precision, less all that rounding can add: with u = 2^-24 an inner product of f
        terms is off by (f + 2) u ‖y_i‖ ‖y_j‖ at most, and the sums after it by a few u (‖y_i‖² + ‖y_j‖²).
        """
        flat = self.units.float()
        lost = 1.01 * (self.units.shape[1] + 16) * 2.0**-24
        norms = (self.units.square().sum(dim=1) * (1.0 - lost)).float()
        squares = torch.addmm(norms, flat, flat.T, alpha=-2.0).add_(norms[:, None])
        squares.fill_diagonal_(torch.inf)
        return squares.amin(dim=1).clamp_(min=0.0).double().sqrt_() / 2

    @cached_property
    def _sketch(self) -> tuple[Tensor, Tensor]:
        part = self.units[:, :: self._stride].float()
        return part, part.square().sum(dim=1) / 2

    @property
    def _stride(self) -> int:
        return max(1, self.units.shape[1] // SKETCH)

    def order(self, units: Tensor) -> Tensor:
        """``order[j]`` (int64 ``[n]``) is the unit of ``units`` ``[n, f]`` that belongs in place j.

        The placement of the largest total inner product; the one they are in if none is better.
        """
        if len(units) > FEW:
            for guess in (torch.arange(len(units)), self._nearest(units)):
                if guess is not None and self._settles(units, guess):
                    return guess
        return matched_order(units @ self.units.T)

    def _nearest(self, units: Tensor) -> Tensor | None:
        """The order in which units sit at the place nearest in a few features; None if two share one."""
        anchors, halves = self._sketch
        places = torch.addmm(halves, units[:, :: self._stride].float(), anchors.T, beta=-1.0).argmax(dim=1)
        order = torch.full((len(units),), -1)
        order[places] = torch.arange(len(units))
        return None if bool((order < 0).any()) else order

    def _settles(self, units: Tensor, order: Tensor) -> bool:
        """Whether this is certainly the only best order (see the module's docstring)."""
        distances = torch.linalg.vector_norm(units[order] - self.units, dim=1)
        return bool((distances < self.reach).all())
