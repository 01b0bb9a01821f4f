"""What DAM's authors run after a merge: one learnt mask over the merged task vector, θ0 + m ⊙ (θ_merged − θ0)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mergesec.contracts import Expert, MergeContext, Merged, Weights
from mergesec_methods.backdoor.defenses._perturb import SAFETIES, Perturbations, Safety, Term, disagreement
from mergesec_methods.backdoor.defenses._repair import check_plain
from mergesec_methods.merging._adaptation import Blend, Stream, progress
from mergesec_methods.merging._concrete import ConcreteMask, final_mask, learn_mask


@dataclass(frozen=True)
class MaskSettings:
    """How the mask is learnt; see the cards of ``awm_dam`` and ``sau_dam``."""

    steps: int
    batch_size: int
    lr: float
    adv_lr: float
    adv_weight: float
    eps: float
    temperature: float
    final: str
    safety: str = "published"


def mask_task_vector(
    merged: Merged,
    base: Weights,
    ctx: MergeContext,
    settings: MaskSettings,
    who: str,
    terms: Callable[[], tuple[Term, Term | None]] = lambda: (disagreement, None),
) -> Merged:
    """The merge under a mask that keeps predictions sure with and without a universal perturbation per task.

    ``terms`` gives what the perturbations climb and what the mask minimises besides. ``info["mask_sparsity"]``:
    per tensor, the share of entries that the mask leaves less than half of.
    """
    check_plain(merged, who)
    blend = Blend(base, [Expert("merged", merged.shared)], ctx.backbone, ctx.device)
    mask = ConcreteMask(blend, settings.temperature, ctx)
    whole = blend.coefficients("task", 1.0)

    def streams(purpose: str) -> list[Stream]:
        return [Stream(n, ctx.views[n], settings.batch_size, ctx, purpose) for n in sorted(ctx.views)]

    clean = streams("adapt")
    perturbations = Perturbations(streams("perturb"), settings.adv_lr, settings.eps, who)
    objective, extra = terms()
    safety = Safety(
        blend, clean, perturbations, settings.adv_weight, objective, extra, SAFETIES[settings.safety]
    )
    losses = learn_mask(blend, mask, clean, whole, settings.lr, settings.steps, None, safety)
    blend.assemble(whole, final_mask(mask, settings.final))
    info: dict[str, Any] = {
        f"{who}_loss": progress(losses),
        "perturbation": perturbations.largest(),
        "flipped": progress(perturbations.flipped),
        "mask_sparsity": blend.shares(mask.closed()),
    }
    return Merged(blend.result(base), info={**merged.info, **info})
