"""IBVS: the defender injects a backdoor of his own and subtracts what it took.

From one starting point two networks are trained on the same clean tuning rows in the same order: on these alone (θ_clean), and
also on copies of a share of every batch that show a known trigger and are labelled with a class it leads to (θ_backdoored).
Their difference is a backdoor vector v, and

    θ' = θ_merged − λ v

"Inherent" triggers use what is weak in the base, so that one backdoor's direction weakens others too.

**The defender does not know the adversary's target.** The classes that his triggers lead to are drawn from the seed he is
given, per task, never named: told the adversary's class, this method takes that class out of the network, and
the attack's success counts rows of other classes only. ``backdoors`` injects several at once, each with a class and
a corner of its own, and ``labels: random`` gives every triggered row a wrong class of its own, none preferred.

Source: Pawlak et al., "Backdoor Vectors", arXiv 2510.08016: the vector and its subtraction, with a fixed simple trigger.
*Reconstructed:* the starting point (``start: merged`` injects into what is defended, ``base`` into the public base), the
number of rows and steps, the optimiser, the square's side, and who chooses the target (the source's was not at hand). In
the table of LFPM's paper IBVS loses 21 points of accuracy for 34 points of attack success (BadMerging, task arithmetic).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from mergesec.contracts import Context, ContractError, Defense, MergeContext, Merged, Split, TaskView, Weights
from mergesec_methods.backdoor.defenses._repair import Patient, Rows, constant, descend
from mergesec_methods.merging._adaptation import progress

CARD = {
    "name": "ibvs",
    "kind": "defense",
    "class": "InjectionSubtraction",
    "version": "2",
    "title": "IBVS (injection BV subtraction)",
    "paper": "Pawlak et al., Backdoor vectors: a task arithmetic view on backdoor attacks and defenses, 2025",
    "url": "https://arxiv.org/abs/2510.08016",
    "summary": "inject backdoors with targets drawn by lot, subtract the weight difference they made",
    "threat": "backdoor",
    "hooks": ["repair"],
    "knowledge": "clean labelled tuning rows of every merged task",
    "data": "tuning",
    "modalities": ["image"],
    "seeded": True,
    "trial": {"steps": 4, "batch_size": 16},
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
            "default": 7,
            "min": 1,
            "max": 16,
            "secret": "attack.patch",
            "doc": "side of the defender's white squares in pixels of a 32-pixel image, each in a corner drawn by lot",
        },
        "backdoors": {"type": "int", "default": 1, "min": 1, "max": 4, "doc": "injected at once per task, each with a corner and a target class drawn by lot"},
        "labels": {
            "type": "choice",
            "choices": ["target", "random"],
            "default": "target",
            "doc": "'target': each backdoor leads to its class; 'random': every triggered row gets a wrong class of its own",
        },
        "poisoned": {"type": "float", "default": 0.5, "min": 0.0, "max": 1.0, "doc": "share of a batch that is also shown with a trigger"},
        "share": {"type": "float", "default": 0.5, "min": 0.0, "max": 1.0, "doc": "share of each task's tuning rows"},
        "steps": {"type": "int", "default": 40, "min": 0, "max": 1000000, "doc": "steps of both trainings (this suite's budget)"},
        "batch_size": {"type": "int", "default": 64, "min": 1, "max": 65536, "doc": "rows per task and step"},
        "lr": {"type": "float", "default": 1e-4, "min": 0.0, "max": 10.0, "doc": "of Adam"},
    },
}  # fmt: skip

REFERENCE_SIDE = 32
CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))
"""Upper or lower, left or right."""


class Backdoors:
    """What is injected into one task: squares in corners, and the classes they lead to, all drawn by lot."""

    def __init__(self, name: str, view: TaskView, count: int, patch: int, labels: str, ctx: Context) -> None:
        self.classes = len(view.task.classes)
        if count > self.classes:
            raise ContractError(
                f"ibvs: {count} backdoors asked for, task '{name}' has {self.classes} classes"
            )
        self.patch, self.labels = patch, labels
        self._generator = ctx.generator(zlib.crc32(f"ibvs/{name}".encode()))
        order = torch.randperm(len(CORNERS), generator=self._generator)[:count]
        self.corners = [CORNERS[place] for place in order.tolist()]
        self.targets = torch.randperm(self.classes, generator=self._generator)[:count].tolist()

    def on(self, rows: Split) -> Split:
        """Copies of ``rows`` with the squares, in turn, and the classes they lead to."""
        inputs, targets = rows.inputs.clone(), rows.targets.clone()
        height, width = inputs.shape[-2:]
        side = max(1, round(self.patch * min(height, width) / REFERENCE_SIDE))
        for place, (low, right) in enumerate(self.corners):
            own = slice(place, None, len(self.corners))
            top, left = low * (height - side), right * (width - side)
            inputs[own, :, top : top + side, left : left + side] = 1.0
            targets[own] = self.targets[place]
        if self.labels == "random":
            away = torch.randint(1, self.classes, (len(rows),), generator=self._generator)
            targets = (rows.targets + away.to(rows.targets.device)) % self.classes
        return Split(inputs, targets)


class InjectionSubtraction(Defense):
    """The defense of the card above."""

    hooks = ("repair",)

    def __init__(
        self, strength: float = 1.0, start: str = "merged", patch: int = 7, backdoors: int = 1,
        labels: str = "target", poisoned: float = 0.5, share: float = 0.5, steps: int = 40, batch_size: int = 64,
        lr: float = 1e-4,
    ) -> None:  # fmt: skip
        self.strength, self.start = strength, start
        self.patch, self.backdoors, self.labels, self.poisoned = patch, backdoors, labels, poisoned
        self.share, self.steps, self.batch_size, self.lr = share, steps, batch_size, lr

    def repair(self, merged: Merged, base: Weights, ctx: MergeContext) -> Merged:
        """θ_merged − λ v; ``info`` has ‖v‖, the classes that were drawn, and the loss of both trainings."""
        patient = Patient(merged, ctx, self.share, self.batch_size, "ibvs", images=True)
        start = merged if self.start == "merged" else Merged(base)
        injected = self.injected(ctx)
        clean, ordinary = self._trained(start, ctx, {})
        backdoored, raised = self._trained(start, ctx, injected)
        with torch.no_grad():
            vector = {n: backdoored[n] - clean[n] for n in clean}
            mended = {n: t - self.strength * vector[n] for n, t in patient.weights().items()}
            norm = torch.stack([v.double().square().sum() for v in vector.values()]).sum().sqrt()
        info = {
            "ibvs_norm": float(norm),
            "ibvs_targets": {name: own.targets for name, own in injected.items()},
            "ibvs_clean": ordinary,
            "ibvs_injected": raised,
        }
        return patient.finish(info, mended)

    def injected(self, ctx: MergeContext) -> dict[str, Backdoors]:
        """The defender's backdoors by task."""
        return {
            name: Backdoors(name, view, self.backdoors, self.patch, self.labels, ctx)
            for name, view in sorted(ctx.views.items())
        }

    def _trained(
        self, start: Merged, ctx: MergeContext, injected: Mapping[str, Backdoors]
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The network trained from ``start``, and its loss before and after; batches do not depend on ``injected``."""
        patient = Patient(start, ctx, self.share, self.batch_size, "ibvs", images=True)

        def loss_of(rows: Rows, batch: Split) -> Tensor:
            total = patient.loss(rows, batch)
            count = round(self.poisoned * len(batch))
            if injected and count:
                shown = Split(batch.inputs[:count], batch.targets[:count])
                total = total + patient.loss(rows, injected[rows.name].on(shown))
            return total

        optimizer = torch.optim.Adam(patient.network.parameters(), lr=self.lr)
        losses = descend(patient, optimizer, self.steps, loss_of, constant)
        return {n: t.detach() for n, t in patient.weights().items()}, progress(losses)
