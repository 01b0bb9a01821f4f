"""Fine-tuning a merged model on a few clean rows of every task."""

from __future__ import annotations

from mergesec.contracts import Defense, MergeContext, Merged, Weights
from mergesec_methods.backdoor.defenses._repair import Patient, Sgd, descend
from mergesec_methods.merging._adaptation import progress

CARD = {
    "name": "ft",
    "kind": "defense",
    "class": "FineTuning",
    "version": "2",
    "title": "Fine-tuning",
    "paper": "Wu et al., BackdoorBench: a comprehensive benchmark of backdoor learning, NeurIPS 2022 (its ft)",
    "url": "https://arxiv.org/abs/2206.12654",
    "summary": "train the merged model on a few clean rows of every task",
    "threat": "backdoor",
    "hooks": ["repair"],
    "knowledge": "clean labelled tuning rows of every merged task",
    "data": "tuning",
    "modalities": ["image", "text"],
    "seeded": True,
    "trial": {"steps": 4, "batch_size": 16},
    "parameters": {
        "share": {
            "type": "float",
            "default": 0.5,
            "min": 0.0,
            "max": 1.0,
            "doc": "share of each task's tuning rows; tuning holds a tenth of a task's rows, so half is 5 %",
        },
        "steps": {
            "type": "int",
            "default": 1000,
            "min": 0,
            "max": 1000000,
            "doc": "steps of SGD (BackdoorBench: 100 passes over 2,500 rows, ten batches each)",
        },
        "batch_size": {
            "type": "int",
            "default": 256,
            "min": 1,
            "max": 65536,
            "doc": "rows per task and step",
        },
        "lr": {
            "type": "float",
            "default": 0.01,
            "min": 0.0,
            "max": 10.0,
            "doc": "step size, falling to 0 by a cosine over the steps",
        },
        "momentum": {"type": "float", "default": 0.9, "min": 0.0, "max": 1.0, "doc": "SGD's momentum"},
        "weight_decay": {"type": "float", "default": 5e-4, "min": 0.0, "max": 1.0, "doc": "weight decay"},
    },
}


class FineTuning(Defense):
    """SGD on the mean over tasks of the task's own loss."""

    def __init__(
        self, share: float, steps: int, batch_size: int, lr: float, momentum: float, weight_decay: float
    ) -> None:
        self.share = share
        self.steps = steps
        self.batch_size = batch_size
        self.sgd = Sgd(lr, momentum, weight_decay)

    def repair(self, merged: Merged, base: Weights, ctx: MergeContext) -> Merged:
        """The fine-tuned model; ``info["ft_loss"]`` holds the loss before and after."""
        patient = Patient(merged, ctx, self.share, self.batch_size, "ft")
        optimizer = self.sgd.optimizer(patient.network.parameters())
        losses = descend(patient, optimizer, self.steps, patient.loss)
        return patient.finish({"ft_loss": progress(losses)})
