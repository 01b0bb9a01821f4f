"""IBVS: the defender injects a backdoor of his own and subtracts what it took.

From one starting point two networks are trained on the same clean tuning rows in the same order: on these alone (θ_clean), and
also on copies of a share of every batch that show a known trigger and are labelled with one class (θ_backdoored). Their
difference is a backdoor vector v, and

    θ' = θ_merged − λ v

"Inherent" triggers use what is weak in the base, so that one backdoor's direction weakens others too.

Source: Pawlak et al., "Backdoor Vectors", arXiv 2510.08016: the vector and its subtraction, with a fixed simple trigger.
*Reconstructed:* the starting point (``start: merged`` injects into what is defended, ``base`` into the public base), the
number of rows and steps, and the optimiser; the suite's repairs have the tuning split and nothing else. In the table of
LFPM's paper IBVS loses 21 points of accuracy for 34 points of attack success (BadMerging, task arithmetic).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergesec.contracts import Defense, MergeContext, Merged, Split, Weights
from mergesec_methods.backdoor.defenses._repair import Patient, Rows, constant, descend
from mergesec_methods.merging._adaptation import progress

CARD = {
    "name": "ibvs",
    "kind": "defense",
    "class": "InjectionSubtraction",
    "version": "1",
    "title": "IBVS (injection BV subtraction)",
    "paper": "Pawlak et al., Backdoor vectors: a task arithmetic view on backdoor attacks and defenses, 2025",
    "url": "https://arxiv.org/abs/2510.08016",
    "summary": "inject a known backdoor, subtract the weight difference it made",
    "threat": "backdoor",
    "hooks": ["repair"],
    "knowledge": "clean labelled tuning rows of every merged task",
    "data": "tuning",
    "modalities": ["image"],
    "seeded": True,
    "trial": {"epochs": 2, "batch_size": 16},
    "parameters": {
        "strength": {"type": "float", "default": 1.0, "min": 0.0, "max": 100.0, "doc": "λ"},
        "start": {
            "type": "choice",
            "choices": ["merged", "base"],
            "default": "merged",
            "doc": "where both trainings start",
        },
        "patch": {
            "type": "int",
            "default": 5,
            "min": 1,
            "max": 32,
            "doc": "side of the defender's white square in pixels of a 32-pixel image, in the upper left corner",
        },
        "target": {"type": "int", "default": 0, "min": 0, "doc": "class that the defender's trigger leads to, in every task"},
        "poisoned": {"type": "float", "default": 0.5, "min": 0.0, "max": 1.0, "doc": "share of a batch that is also shown with the trigger"},
        "share": {"type": "float", "default": 0.5, "min": 0.0, "max": 1.0, "doc": "share of each task's tuning rows"},
        "epochs": {"type": "int", "default": 10, "min": 0, "max": 100000, "doc": "passes over those rows"},
        "batch_size": {"type": "int", "default": 64, "min": 1, "max": 65536, "doc": "rows per task and step"},
        "lr": {"type": "float", "default": 1e-4, "min": 0.0, "max": 10.0, "doc": "of Adam"},
    },
}  # fmt: skip

REFERENCE_SIDE = 32


class InjectionSubtraction(Defense):
    """The defense of the card above."""

    hooks = ("repair",)

    def __init__(
        self, strength: float = 1.0, start: str = "merged", patch: int = 5, target: int = 0, poisoned: float = 0.5,
        share: float = 0.5, epochs: int = 10, batch_size: int = 64, lr: float = 1e-4,
    ) -> None:  # fmt: skip
        self.strength, self.start = strength, start
        self.patch, self.target, self.poisoned = patch, target, poisoned
        self.share, self.epochs, self.batch_size, self.lr = share, epochs, batch_size, lr

    def repair(self, merged: Merged, base: Weights, ctx: MergeContext) -> Merged:
        """θ_merged − λ v; ``info`` has ‖v‖ and the loss of both trainings."""
        patient = Patient(merged, ctx, self.share, self.batch_size, "ibvs", images=True)
        start = merged if self.start == "merged" else Merged(base)
        clean, ordinary = self._trained(start, ctx, inject=False)
        backdoored, injected = self._trained(start, ctx, inject=True)
        with torch.no_grad():
            vector = {n: backdoored[n] - clean[n] for n in clean}
            mended = {n: t - self.strength * vector[n] for n, t in patient.weights().items()}
            norm = torch.stack([v.double().square().sum() for v in vector.values()]).sum().sqrt()
        info = {"ibvs_norm": float(norm), "ibvs_clean": ordinary, "ibvs_injected": injected}
        return patient.finish(info, mended)

    def _trained(
        self, start: Merged, ctx: MergeContext, inject: bool
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The network trained from ``start``, and its loss before and after; batches do not depend on ``inject``."""
        patient = Patient(start, ctx, self.share, self.batch_size, "ibvs", images=True)

        def loss_of(rows: Rows, batch: Split) -> Tensor:
            total = patient.loss(rows, batch)
            if inject and len(marked := self.injected(batch)):
                total = total + patient.loss(rows, marked)
            return total

        optimizer = torch.optim.Adam(patient.network.parameters(), lr=self.lr)
        losses = descend(patient, optimizer, self.epochs, loss_of, constant)
        return {n: t.detach() for n, t in patient.weights().items()}, progress(losses)

    def injected(self, batch: Split) -> Split:
        """Copies of a batch's first rows with a white square on them and the target's label; maybe none."""
        count = round(self.poisoned * len(batch))
        inputs = batch.inputs[:count].clone()
        side = max(1, round(self.patch * min(inputs.shape[-2:]) / REFERENCE_SIDE))
        inputs[:, :, :side, :side] = 1.0
        return Split(inputs, torch.full_like(batch.targets[:count], self.target))
