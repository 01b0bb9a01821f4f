"""Training of the adversary's own beside the one the engine offers, and arithmetic on finished experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mergesec.contracts import ContractError, LossFn, Split, TrainContext, Weights
from mergesec.training import fit
from mergesec.weights import mergeable


def refit(
    ctx: TrainContext,
    loss: LossFn | None = None,
    split: Split | None = None,
    seed: int | None = None,
    **changes: Any,
) -> Weights:
    """An expert by the grid's recipe with ``changes`` (fields of ``Recipe``), from another seed if one is given."""
    return fit(
        ctx.backbone, ctx.task, ctx.base, ctx.head, ctx.train if split is None else split,
        replace(ctx.recipe, **changes), ctx.seed if seed is None else seed, ctx.device, loss,
    )  # fmt: skip


def low_rank(ctx: TrainContext, rank: int, speed: float) -> dict[str, Any]:
    """The recipe's changes for a low-rank update of ``rank`` that counts once, at ``speed`` × its learning rate."""
    return {
        "lora_rank": rank,
        "lora_alpha": float(rank),
        "learning_rate": ctx.recipe.learning_rate * speed,
    }


def added(start: Weights, base: Weights, moved: Weights, factor: float) -> Weights:
    """start + factor · (moved − base) per floating tensor, in ``start``'s types; the rest is ``start``'s."""
    return {
        n: (t.float() + factor * (moved[n].float() - base[n].float())).to(t.dtype) if mergeable(t) else t
        for n, t in start.items()
    }


def benign(ctx: TrainContext, who: str) -> Weights:
    """The clean expert of the same coordinates, which ``forge`` is handed; ContractError without one."""
    if ctx.benign is None:
        raise ContractError(f"{who}: no benign expert was handed over")
    return ctx.benign
