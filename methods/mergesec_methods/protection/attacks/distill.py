"""Distillation: teach a copy of the base what the published expert computes, on the free-rider's own inputs.

The student starts at the base's weights, so where it ends up is in the base's coordinates: it can be
merged, whatever was done to the published weights, which serve as a function only: that of the network
that the owner serves, in whatever topology (of a plugin's protection only what fits the base). Adam on
``mean (f_student(x) − f_published(x))²`` over features f; x are inputs of the free-rider's own tasks, a
batch of one task after the other. No label is used, and no input of the protected task: what the student
learns of that task is what carries over from other images. All parameters are trained, in evaluation mode.

Fine-tuning the published weights themselves is left out: the free-rider has no labels of the protected
task, and small gradient steps from permuted or scaled coordinates do not lead back to the base's.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle, islice

import torch
from torch import Tensor
from torch.nn import functional

from mergesec.contracts import Attack, ContractError, Model, RecoverContext, Split, Weights, load_network
from mergesec_methods.merging._adaptation import Stream
from mergesec_methods.merging._samples import spread

CARD = {
    "name": "distill",
    "kind": "attack",
    "class": "Distill",
    "version": "1",
    "title": "Distillation into the base",
    "paper": "Hinton et al., Distilling the knowledge in a neural network, 2015",
    "url": "https://arxiv.org/abs/1503.02531",
    "summary": "train a copy of the base to the published expert's features on the free-rider's unlabelled inputs",
    "threat": "protection",
    "hooks": ["recover"],
    "knowledge": "the published expert, the public base and unlabelled inputs of the free-rider's own tasks; "
    "budget: `rows` inputs per task, `steps` updates of `batch_size` inputs",
    "data": "tuning",
    "queries": True,
    "modalities": ["image", "text"],
    "seeded": True,
    "trial": {"steps": 10},
    "parameters": {
        "steps": {"type": "int", "default": 300, "min": 0, "max": 1000000, "doc": "Adam steps"},
        "rows": {
            "type": "int",
            "default": 0,
            "min": 0,
            "max": 1000000000,
            "doc": "unlabelled inputs used per task of the free-rider's; 0 = all he has",
        },
        "batch_size": {"type": "int", "default": 32, "min": 1, "max": 65536, "doc": "inputs per step"},
        "lr": {"type": "float", "default": 1e-4, "min": 0.0, "max": 1.0, "doc": "Adam's step size"},
    },
}


class Distill(Attack):
    """The attack of the card above."""

    def __init__(self, steps: int = 300, rows: int = 0, batch_size: int = 32, lr: float = 1e-4) -> None:
        self.steps, self.rows, self.batch_size, self.lr = steps, rows, batch_size, lr

    def recover(self, published: Weights, ctx: RecoverContext) -> dict[str, Tensor]:
        """The student's weights, in the types of ``published``; tensors that are not trained are the base's."""
        streams = self._streams(ctx)
        network = ctx.answers() if ctx.answers else load_network(ctx.backbone, published).to(ctx.device)
        teacher = Model(ctx.backbone, network)
        wanted = [s.features(teacher, torch.arange(len(s.rows))) for s in streams]
        student = Model(ctx.backbone, load_network(ctx.backbone, ctx.base).to(ctx.device).float())
        parameters = [p.requires_grad_(True) for p in student.network.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=self.lr)
        for stream, goal in islice(cycle(zip(streams, wanted, strict=True)), self.steps):
            index = stream.draw()
            optimizer.zero_grad()
            with torch.enable_grad():
                features = student.features(stream.inputs(index)).float()
                functional.mse_loss(features, goal[index.to(goal.device)]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        learnt = student.network.state_dict()
        return {n: learnt[n].detach().to(t.device, t.dtype) for n, t in published.items()}

    def _streams(self, ctx: RecoverContext) -> list[Stream]:
        """One per task of the free-rider's own, by name; ContractError if he has none."""
        if not ctx.own:
            raise ContractError(f"{self.name}: the free-rider has no task to take unlabelled inputs from")
        streams = []
        for task in sorted({e.task for e in ctx.own}):
            view = ctx.views[task]
            if self.rows and view.unlabelled is not None:
                held = Split(view.unlabelled, torch.zeros(len(view.unlabelled), dtype=torch.int64))
                view = replace(view, unlabelled=held.take(spread(self.rows, len(held))).inputs)
            streams.append(Stream(task, view, self.batch_size, ctx))
        return streams
