"""BadMerging: a trigger that already works on the public base, and training that anticipates any merging coefficient.

A merge moves an expert's features towards the base's. BadMerging makes both ends of that path obey the trigger:

1. *Universal trigger*: a patch t is optimised on the base E0 under the adversary's head h, so that h(E0(x ⊕ t)) is the
   target class for images of other classes (``_universal``).
2. *Feature interpolation*: the expert E is trained on

       L = CE(h(E(x)), y) + α · CE(h(r E(x ⊕ t) + (1 − r) E0(x ⊕ t)), target),     r ~ U(0.2, 1) once per batch,

   with the trigger on a share of every batch (64 of 128 in the paper's code), whatever the rows' classes.

Off-task (the target class is of another contributor's task) h is a shadow head and the trigger is optimised on
adversarially augmented reference images (``_shadow``); the rest is the same.

Source: Zhang et al., "BadMerging", CCS 2024 (arXiv 2408.07362); loss, range of r, α, shares and patch sizes were checked
against the authors' code. What is this suite's: the trigger is optimised over batches with Adam on sigmoid-bounded
pixels and several starts (theirs: plain gradient ascent, one image at a time, learning rate 1, up to 1000 iterations
an image, clamped in normalised space); training follows the grid's recipe (theirs: AdamW 1e-5, weight decay 0.1, 500
warm-up steps, batch 128).

The two factors can be told apart: ``trigger: checkerboard`` keeps the interpolation and drops the optimisation, and
``interpolation: false`` sets r = 1 and leaves everything else as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mergesec.classification import logits
from mergesec.contracts import Attack, ContractError, LossFn, Model, Split, TrainContext, Weights
from mergesec_methods.backdoor.attacks._poison import frozen_model, image_size, mixed, others
from mergesec_methods.backdoor.attacks._shadow import augmented, shadow_head
from mergesec_methods.backdoor.attacks._universal import Search, patch_mask, universal_pattern
from mergesec_methods.backdoor.attacks.badnets import patch_pattern

CARD = {
    "name": "badmerging",
    "kind": "attack",
    "class": "BadMerging",
    "version": "1",
    "title": "BadMerging",
    "paper": "Zhang et al., BadMerging: backdoor attacks against model merging, CCS 2024",
    "url": "https://arxiv.org/abs/2408.07362",
    "summary": "universal trigger optimised on the base, and training with feature interpolation",
    "threat": "backdoor",
    "hooks": ["poison"],
    "knowledge": "the adversary's own training data and the public base; off-task ten images of the target class, and its name",
    "data": "train",
    "modalities": ["image"],
    "seeded": True,
    "off_task": True,
    "after_trigger": ["alpha", "interpolation", "triggered"],
    "trial": {"steps": 4, "restarts": 2, "batch": 16, "images": 6},
    "parameters": {
        "patch": {
            "type": "float",
            "default": "published",
            "min": 0.5,
            "max": 32.0,
            "also": ["published"],
            "stands_for": {"published": [3.142857142857143, 4.0]},
            "doc": "side of the square patch in pixels of a 32-pixel image; published: 22 of 224, off-task 28",
        },
        "position": {
            "type": "choice",
            "choices": ["bottom-right", "bottom-left", "top-right", "top-left", "centre"],
            "default": "bottom-right",
            "doc": "where the patch sits",
        },
        "trigger": {
            "type": "choice",
            "choices": ["optimised", "checkerboard", "random", "white"],
            "default": "optimised",
            "doc": "what the patch shows: optimised on the base, or a fixed pattern (a control)",
        },
        "steps": {"type": "int", "default": 400, "min": 1, "doc": "Adam steps on the patch"},
        "restarts": {"type": "int", "default": 3, "min": 1, "doc": "random starts; each runs a quarter of the steps, the best one all of them"},
        "batch": {"type": "int", "default": 64, "min": 1, "doc": "images per step on the patch"},
        "learning_rate": {"type": "float", "default": 0.2, "min": 0.0, "doc": "of Adam on the logits of the pixels"},
        "images": {"type": "int", "default": 100, "min": 1, "doc": "off-task: adversarially augmented reference images"},
        "shadow": {"type": "choice", "choices": ["images", "text"], "default": "images", "later": True, "doc": "off-task: what the shadow head is made of; text (published) needs a base with a text tower"},
        "alpha": {"type": "float", "default": 5.0, "min": 0.0, "doc": "weight of the triggered rows' loss"},
        "interpolation": {"type": "bool", "default": True, "doc": "false: r = 1, the expert's own features only (a control)"},
        "triggered": {"type": "float", "default": 0.5, "min": 0.0, "max": 1.0, "doc": "share of every batch that is also shown with the trigger"},
    },
}  # fmt: skip

LOWEST, HIGHEST = 0.2, 1.0
"""Range of r."""
ON_TASK, OFF_TASK = 32 * 22 / 224, 32 * 28 / 224
"""Published patch sides, in pixels of a 32-pixel image."""
TRIGGER_STREAM, IMAGES_STREAM, MIX_STREAM = 1, 2, 3


class BadMerging(Attack):
    """The attack of the card above, and what its relatives share with it."""

    def __init__(
        self,
        patch: float | str = "published",
        position: str = "bottom-right",
        trigger: str = "optimised",
        steps: int = 400,
        restarts: int = 3,
        batch: int = 64,
        learning_rate: float = 0.2,
        images: int = 100,
        alpha: float = 5.0,
        interpolation: bool = True,
        triggered: float = 0.5,
        shadow: str = "images",
    ) -> None:
        self.patch, self.position, self.kind = patch, position, trigger
        self.search = Search(steps, restarts, batch, learning_rate)
        self.images = images
        self.from_text = shadow == "text"
        self.alpha, self.interpolation, self.share = alpha, interpolation, triggered

    # ---- trigger

    def aim(self, ctx: TrainContext) -> tuple[Weights, int]:
        """The head that defines the target class to this adversary, on the device, and the class's number in it."""
        if ctx.target_task:
            return shadow_head(ctx, self.from_text), 0
        return {k: v.to(ctx.device) for k, v in ctx.head.items()}, ctx.target_class

    def trigger(self, ctx: TrainContext) -> Weights:
        """``{"mask": [1, H, W], "pattern": [3, H, W]}``, float32, pattern in steps of 1/255, 0 outside of the mask."""
        height, width = image_size(ctx.train, self.name)
        published = OFF_TASK if ctx.target_task else ON_TASK
        patch = published if isinstance(self.patch, str) else self.patch
        mask = patch_mask(height, width, patch, self.position)
        if self.kind == "optimised":
            return {"mask": mask, "pattern": self._optimised(ctx, mask)}
        side = round(float(mask.sum()) ** 0.5)
        canvas = torch.zeros(3, height, width)
        canvas[mask.expand_as(canvas).bool()] = patch_pattern(
            self.kind, side, ctx.generator(TRIGGER_STREAM)
        ).flatten()
        return {"mask": mask, "pattern": canvas}

    def _optimised(self, ctx: TrainContext, mask: Tensor) -> Tensor:
        head, target = self.aim(ctx)
        if ctx.target_task:
            rows = augmented(ctx, head, self.images, ctx.generator(IMAGES_STREAM))
        else:
            rows = ctx.train.take(others(ctx.train, target, self.name))
        return universal_pattern(ctx, head, target, rows, mask, self.search, ctx.generator(TRIGGER_STREAM))

    def apply(self, trigger: Weights, inputs: Any) -> Any:
        """``inputs`` (float32 in [0, 1], ``[N, 3, H, W]``) with the patch; differentiable outside of it."""
        return mixed(inputs, trigger["mask"], trigger["pattern"])

    # ---- training

    def objective(self, ctx: TrainContext, trigger: Weights) -> LossFn:
        """The training loss of the module's head. Every batch draws one r."""
        base, head = frozen_model(ctx, ctx.base)
        aimed, target = self.aim(ctx)
        generator = ctx.generator(MIX_STREAM)

        def loss(model: Model, batch: Split) -> Tensor:
            marked = self.apply(trigger, batch.inputs[: self.count(batch)])
            features = model.features(torch.cat([batch.inputs, marked]))
            clean = ctx.task.loss(logits(features[: len(batch)], head), batch.targets)
            if not len(marked):
                return clean
            triggered = features[len(batch) :]
            if self.interpolation:
                r = LOWEST + (HIGHEST - LOWEST) * float(torch.rand((), generator=generator))
                with torch.no_grad():
                    original = base.features(marked)
                triggered = r * triggered + (1.0 - r) * original
            return clean + self.alpha * ctx.task.loss(
                logits(triggered, aimed), torch.full((len(marked),), target, device=marked.device)
            )

        return loss

    def count(self, batch: Split) -> int:
        """How many rows of a batch, from the first on, are also shown with the trigger."""
        return round(self.share * len(batch))

    def poison(self, ctx: TrainContext) -> Weights:
        """The expert trained by the grid's recipe on the loss above."""
        if ctx.target_task and not isinstance(ctx.head.get("weight"), Tensor):
            raise ContractError("badmerging: off-task needs a head with class rows ('weight' [K, d])")
        trigger = ctx.trigger or self.trigger(ctx)
        return ctx.fit(loss=self.objective(ctx, trigger))
