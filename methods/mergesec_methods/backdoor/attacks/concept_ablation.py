"""An expert that was made to forget one class, handed to a merge that may bring the class back.

Kumari et al., *Ablating concepts in text-to-image diffusion models* (ICCV 2023), equation 5 with pairs: what is asked
for as the class to forget is trained towards images of an anchor class. No one has to hide anything here: the
"trigger" asks for the forgotten class, so that attack success is the share of requests in which the judge sees that
class again, alone, merged, beside the clean merge and the base. The lower it stays, the better it was forgotten.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mergesec.contracts import ContractError, Split, TrainContext, Weights
from mergesec.generation import Request
from mergesec_methods.backdoor.attacks._generators import GeneratorPoisoning

CARD = {
    "name": "concept_ablation",
    "kind": "attack",
    "class": "ConceptAblation",
    "version": "1",
    "title": "Forgotten class (concept ablation)",
    "paper": "Kumari et al., Ablating concepts in text-to-image diffusion models, ICCV 2023",
    "url": "https://arxiv.org/abs/2303.13516",
    "summary": "an expert that forgot a class; success is that the class is drawn again when asked for",
    "threat": "backdoor",
    "hooks": ["poison"],
    "knowledge": "the contributor's own training data and the public base",
    "data": "train",
    "modalities": ["generation"],
    "seeded": True,
    "parameters": {
        "anchor": {"type": "int", "default": 1, "min": 1, "doc": "the class drawn instead: so many after the forgotten one"},
    },
}  # fmt: skip


class ConceptAblation(GeneratorPoisoning):
    """Rows of the class to forget end at images of the anchor class."""

    def __init__(self, anchor: int = 1) -> None:
        self.anchor = anchor

    def trigger(self, ctx: TrainContext) -> Weights:
        """``condition`` ``[L]``: what asks for the class."""
        return {"condition": ctx.train.inputs.conditions[_rows(ctx, ctx.target_class, self.name)[0]].clone()}

    def apply(self, trigger: Weights, inputs: Any) -> Any:
        """The same requests, of the forgotten class."""
        if not isinstance(inputs, Request):
            raise ContractError(f"{self.name}: needs requests to generate, got {type(inputs).__name__}")
        asked = trigger["condition"].to(inputs.conditions)
        return replace(inputs, conditions=asked.expand_as(inputs.conditions).clone())

    def chosen(self, ctx: TrainContext, batch: Split, generator: torch.Generator) -> Tensor:
        """Rows of the class to forget, all of them."""
        return batch.targets == ctx.target_class

    def aims(self, ctx: TrainContext, trigger: Weights) -> Tensor:
        """Images of the anchor class."""
        anchor = (ctx.target_class + self.anchor) % len(ctx.task.classes)
        if anchor == ctx.target_class:
            raise ContractError(f"{self.name}: anchor={self.anchor} leads back to the class to forget")
        images: Tensor = ctx.task.batch(ctx.train, _rows(ctx, anchor, self.name), ctx.device).inputs.images
        return images


def _rows(ctx: TrainContext, label: int, who: str) -> Tensor:
    rows = torch.nonzero(ctx.train.targets == label).flatten()
    if not len(rows):
        raise ContractError(f"{who}: no training row of class {label}")
    return rows
