"""What ownership marks share: how sure a number of hits makes the owner."""

from __future__ import annotations

from torch import Tensor

from mergesec.contracts import Verification


def decide(hits: Tensor, chance: float, significance: float) -> Verification:
    """The test of ``hits`` (bool ``[n]``) against ``chance``, the probability of one hit without a mark.

    ``statistic`` is P(Binomial(n, chance) ≥ number of hits); the mark is detected if it is below ``significance``.
    """
    from scipy.stats import binom

    value = 1.0 if chance >= 1 else float(binom.sf(int(hits.sum()) - 1, hits.numel(), chance))
    return Verification(hits, value < significance, value)
