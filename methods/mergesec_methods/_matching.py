"""Matching the units of one network to those of another: exact, and fast where there is little to decide.

Units are rows ``[n, f]``; unit i goes to the place j of the anchor (the reference's row) it resembles.
The best one-to-one placement for ``Σ ⟨x_i, y_σ(i)⟩`` is the one of least ``Σ ‖x_i − y_σ(i)‖²``, and

* if every unit is closer to its place than half that place's distance to the next one, then by the
  triangle inequality every unit sits at its nearest place: the placement is the only best one, and no
  scores are needed. Experts fine-tuned from the anchor pass by a wide margin, reordered or not;
* otherwise scores are made, and potentials taken off their rows and columns. They change no placement's
  rank, only how far one has to search. If the best places of all rows now differ, they are the optimum;
  else SciPy solves what is left, an order of magnitude sooner on real weights.
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergesec.surgery import assign

FEW = 256
"""Up to this many units the assignment itself costs less than looking for a way around it."""
BID_STEPS = (0.05, 0.005)
"""The auction's ε, phase by phase, in standard deviations of the costs."""
BIDS = 30
"""Most bids per row and phase; a third is usual."""
SKETCH = 96
"""Features that are compared to guess which place is nearest."""


def best_order(scores: Tensor, *, maximize: bool) -> Tensor:
    """``surgery.assign``: the same optimum (any one of equally good ones), found sooner.

    ``scores`` float64 ``[n, n]`` on a CPU. Taken off are row and column means, that is the units' common
    part; when matching, half of each row's and column's maximum, which turns scores of units that have a
    counterpart into (minus half) their squared distance; and, if that does not decide it, an auction's prices.
    """
    costs = -scores if maximize else scores.clone()
    costs -= costs.mean(dim=1, keepdim=True)
    costs -= costs.mean(dim=0)
    if maximize:
        rows, columns = costs.amin(dim=1, keepdim=True), costs.amin(dim=0)
        costs.sub_(rows, alpha=0.5).sub_(columns, alpha=0.5)
    order = _inverse(costs.argmin(dim=1))
    if order is not None:
        return order
    if len(costs) > FEW:
        costs -= torch.from_numpy(_auction(costs.numpy()))
    return assign(costs, maximize=False)


def _inverse(places: Tensor) -> Tensor | None:
    """The unit at each place, given the place of each unit; None if two share one."""
    order = torch.full((len(places),), -1)
    order[places] = torch.arange(len(places))
    return None if bool((order < 0).any()) else order


def _auction(costs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Column potentials ``[n]`` close to the dual optimum of the assignment problem, by ε-scaled auction.

    Rows in turn take their cheapest column from whoever has it and raise its cost by what they can
    afford, plus ε (Bertsekas 1988). What comes out is only a start: it need not be exact, or even done.
    """
    size, spread = len(costs), float(costs.std())
    potentials, net = np.zeros(size), np.empty(size)
    for share in BID_STEPS if 0.0 < spread < math.inf else ():
        owner, waiting, bids = [-1] * size, list(range(size)), BIDS * size
        while waiting and bids:
            bids -= 1
            bidder = waiting.pop()
            np.subtract(costs[bidder], potentials, out=net)
            column = int(net.argmin())
            cheapest, net[column] = net[column], np.inf
            potentials[column] -= net.min() - cheapest + share * spread
            if owner[column] >= 0:
                waiting.append(owner[column])
            owner[column] = bidder
    return potentials


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
        flat = self.units.float().numpy()
        lost = 1.01 * (self.units.shape[1] + 16) * 2.0**-24
        norms = (self.units.square().sum(dim=1) * (1.0 - lost)).float()
        squares = torch.from_numpy(flat @ flat.T)  # NumPy calls syrk for this, half the work of a product
        squares.mul_(-2.0).add_(norms).add_(norms[:, None])
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
        part = units[:, :: self._stride].float()
        return _inverse(torch.addmm(halves, part, anchors.T, beta=-1.0).argmax(dim=1))

    def _settles(self, units: Tensor, order: Tensor) -> bool:
        """Whether this is certainly the only best order (see the module's docstring)."""
        distances = torch.linalg.vector_norm(units[order] - self.units, dim=1)
        return bool((distances < self.reach).all())
