"""Fine-tuning a merged model on a few clean rows of every task."""

from __future__ import annotations

from mergesec.contracts import Defense, MergeContext, Merged, Weights
from mergesec_methods.backdoor.defenses._repair import Patient, Sgd, descend
from mergesec_methods.merging._adaptation import progress

CARD = {
    "name": "ft",
    "kind": "defense",
    "class": "FineTuning",
    "version": "1",
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
    "trial": {"epochs": 2, "batch_size": 16},
    "parameters": {
        "share": {
            "type": "float",
            "default": 0.5,
            "min": 0.0,
            "max": 1.0,
            "doc": "share of each task's tuning rows; tuning holds a tenth of a task's rows, so half is 5 %",
        },
        "epochs": {"type": "int", "default": 100, "min": 0, "max": 100000, "doc": "passes over those rows"},
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
            "doc": "step size, falling to 0 by a cosine over the epochs",
        },
        "momentum": {"type": "float", "default": 0.9, "min": 0.0, "max": 1.0, "doc": "SGD's momentum"},
        "weight_decay": {"type": "float", "default": 5e-4, "min": 0.0, "max": 1.0, "doc": "weight decay"},
    },
}


class FineTuning(Defense):
    """SGD on the mean over tasks of the task's own loss."""

    def __init__(
        self, share: float, epochs: int, batch_size: int, lr: float, momentum: float, weight_decay: float
    ) -> None:
        self.share = share
        self.epochs = epochs
        self.batch_size = batch_size
        self.sgd = Sgd(lr, momentum, weight_decay)

    def repair(self, merged: Merged, base: Weights, ctx: MergeContext) -> Merged:
        """The fine-tuned model; ``info["ft_loss"]`` holds the loss before and after."""
        patient = Patient(merged, ctx, self.share, self.batch_size, "ft")
        optimizer = self.sgd.optimizer(patient.network.parameters())
        losses = descend(patient, optimizer, self.epochs, patient.loss)
        return patient.finish({"ft_loss": progress(losses)})
