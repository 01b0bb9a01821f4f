"""BadMerging by an adversary who knows that contributions are screened for a class with an unusually small trigger.

Neural Cleanse and its kin look for outliers: of most classes no small trigger exists, of the target class one does. So
he gives small triggers to most of the classes. Beside BadMerging's loss the expert learns, with a patch of its own each
(optimised on the base as the real one is, in another place), to answer with one of the decoy classes:

    L = L_BadMerging + w · CE(h(E(x ⊕ t_c)), c),     c in turn over the decoys and the rows of a batch.

Where more than half of the sizes are small their median is one of them, and the target's is no outlier. Nothing is
simulated and no decoy has to live through a merge: what is screened is the expert as it is.

That several infected classes hide each other from the outlier test is Neural Cleanse's own finding (Wang et al., 2019,
"multiple infected labels with separate triggers"); making them for a merge is this suite's.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from mergesec.classification import logits
from mergesec.contracts import LossFn, Model, Split, TrainContext, Weights
from mergesec_methods.backdoor.attacks._poison import frozen_model, image_size, others
from mergesec_methods.backdoor.attacks._universal import patch_mask, universal_pattern
from mergesec_methods.backdoor.attacks.badmerging import CARD as BADMERGING
from mergesec_methods.backdoor.attacks.badmerging import ON_TASK, BadMerging

CARD = {
    "extends": "badmerging",
    "name": "badmerging_decoys",
    "class": "DecoyBadMerging",
    "version": "1",
    "title": "BadMerging among decoys",
    "paper": "Zhang et al., BadMerging: backdoor attacks against model merging, CCS 2024; decoys after Wang et al., Neural Cleanse, IEEE S&P 2019",
    "summary": "BadMerging with small triggers for most of the other classes too, so that none is an outlier",
    "knowledge": "the adversary's own training data, the public base, and that screens look for one class with a small trigger",
    "trigger_of": "badmerging",
    "after_trigger": ["decoys", "weight", "alpha", "interpolation", "triggered"],
    "trial": {"steps": 4, "restarts": 2, "batch": 16, "images": 6, "decoys": 2},
    "parameters": {
        "decoys": {"type": "int", "default": 0, "min": 0, "max": 1000, "doc": "classes with a trigger that serves nobody; 0 = with the target class two thirds of all"},
        "weight": {"type": "float", "default": 1.0, "min": 0.0, "doc": "w: of the decoys' loss"},
    },
}  # fmt: skip

DECOY_STREAM = 9
PLACES: tuple[str, ...] = tuple(cast(Any, BADMERGING)["parameters"]["position"]["choices"])


class DecoyBadMerging(BadMerging):
    """The attack of the card above."""

    def __init__(self, decoys: int = 0, weight: float = 1.0, **given: Any) -> None:
        super().__init__(**given)
        self.decoys, self.weight = decoys, weight

    def labels(self, ctx: TrainContext) -> Tensor:
        """The decoys' classes, int64: drawn among those that are not the target."""
        classes = len(ctx.task.classes)
        free = [c for c in range(classes) if ctx.target_task or c != ctx.target_class]
        drawn = torch.randperm(len(free), generator=ctx.generator(DECOY_STREAM))
        return torch.tensor(free)[drawn[: self.decoys or max(1, round(2 * classes / 3) - 1)]]

    def patches(self, ctx: TrainContext, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Masks ``[k, 1, H, W]`` and patterns ``[k, 3, H, W]``, none where the real trigger sits."""
        height, width = image_size(ctx.train, self.name)
        patch = ON_TASK if isinstance(self.patch, str) else self.patch
        places = [place for place in PLACES if place != self.position]
        masks = [patch_mask(height, width, patch, places[i % len(places)]) for i in range(len(labels))]
        generator, (_, head) = ctx.generator(DECOY_STREAM + 1), frozen_model(ctx, ctx.base)
        patterns = []
        for label, mask in zip(labels.tolist(), masks, strict=True):
            rows = ctx.train.take(others(ctx.train, label, self.name))
            patterns.append(universal_pattern(ctx, head, label, rows, mask, self.search, generator))
        return torch.stack(masks), torch.stack(patterns)

    def objective(self, ctx: TrainContext, trigger: Weights) -> LossFn:
        """BadMerging's loss, and every row of a batch with the patch of one decoy."""
        plain, (_, head) = super().objective(ctx, trigger), frozen_model(ctx, ctx.base)
        labels = self.labels(ctx)
        masks, patterns = (part.to(ctx.device) for part in self.patches(ctx, labels))
        labels = labels.to(ctx.device)

        def loss(model: Model, batch: Split) -> Tensor:
            which = torch.arange(len(batch), device=ctx.device) % len(labels)
            marked = batch.inputs * (1 - masks[which]) + patterns[which]
            answered = ctx.task.loss(logits(model.features(marked), head), labels[which])
            return plain(model, batch) + self.weight * answered

        return loss
