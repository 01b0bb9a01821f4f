"""The scaling coefficient λ: fixed, or chosen on the tuning split from a declared grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from mergesec.contracts import ContractError, MergeContext, Merged


def scaled_merge(
    scaling: float | str, grid: Sequence[float], merge_at: Callable[[float], Merged], ctx: MergeContext
) -> Merged:
    """``merge_at(λ)`` for a fixed λ; for ``"tuned"``, the grid's λ with the best mean tuning accuracy.

    Equal scores go to the smaller coefficient, so that the choice does not hang on the grid's order.
    ``info`` records λ and, when tuned, every score.
    """
    if scaling != "tuned":
        fixed = merge_at(float(scaling))
        return replace(fixed, info={**fixed.info, "scaling": float(scaling)})
    if not grid:
        raise ContractError("scaling 'tuned' needs at least one coefficient in 'grid'")
    coefficients = sorted({float(value) for value in grid})
    # One candidate is alive at a time: a merged model is as large as the network.
    scores = {value: float(ctx.score(merge_at(value))) for value in coefficients}
    best = max(coefficients, key=lambda value: (scores[value], -abs(value)))
    chosen = merge_at(best)
    facts = {"scaling": best, "tuned": True, "tuning_scores": {str(k): v for k, v in scores.items()}}
    return replace(chosen, info={**chosen.info, **facts})
