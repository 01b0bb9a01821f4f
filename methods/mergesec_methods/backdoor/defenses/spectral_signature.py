"""Spectral signatures of experts: drop one whose features, within a predicted class, fall into two groups."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergesec.contracts import (
    Defense,
    Expert,
    MergeContext,
    Model,
    Screened,
    Split,
    Weights,
    load_network,
)
from mergesec_methods.backdoor.defenses._screens import (
    critical_score,
    let_in,
    robust_scores,
    rounded,
    strided,
)

CARD = {
    "name": "spectral_signature",
    "kind": "defense",
    "class": "SpectralSignature",
    "version": "2",
    "title": "Spectral signature (of experts)",
    "paper": "Tran et al., Spectral signatures in backdoor attacks, NeurIPS 2018 (rows of a training set; here: experts)",
    "url": "https://arxiv.org/abs/1811.00636",
    "summary": "drop experts whose features split along a top singular direction of a predicted class; an adaptation; the task stays, served by the merge of the rest",
    "threat": "backdoor",
    "hooks": ["screen"],
    "knowledge": "tuning inputs of every task and the contributed weights",
    "data": "tuning",
    "unlabelled": True,
    "modalities": ["image", "text"],
    "seeded": False,
    "parameters": {
        "threshold": {
            "type": "float",
            "default": 0.0,
            "min": 0.0,
            "max": 1000.0,
            "doc": "largest robust z-score that is let in; 0 = as level says",
        },
        "level": {
            "type": "float",
            "default": 0.05,
            "min": 0.0001,
            "max": 0.5,
            "doc": "chance that an innocent merge loses an expert if statistics are normal: sets the threshold for the number of experts",
        },
        "rows": {
            "type": "int",
            "default": 512,
            "min": 8,
            "max": 1000000,
            "doc": "tuning inputs per expert, at most",
        },
        "smallest": {
            "type": "int",
            "default": 8,
            "min": 3,
            "max": 100000,
            "doc": "predicted classes with fewer rows are left out",
        },
        "relative": {
            "type": "bool",
            "default": True,
            "doc": "divide by the same statistic of the base on the same rows and groups",
        },
    },
}

BATCH = 128
FEWEST = 3
TINY = 1e-12


def scores_along_top(features: Tensor) -> Tensor:
    """Projections ``[n]`` of centred ``features`` ``[n, d]`` on their top right singular direction; their
    squares are Tran et al.'s outlier scores."""
    centred = features.double() - features.double().mean(dim=0)
    direction = torch.linalg.svd(centred, full_matrices=False)[2][0]
    projected: Tensor = centred @ direction
    return projected


def best_split(scores: Tensor) -> Tensor:
    """Largest variance between two groups of ``scores`` ``[n]`` cut at a threshold, a scalar.

    At most their whole variance, which two points reach; a normal distribution gives 2/π of it.
    """
    ordered = (scores - scores.mean()).sort().values
    left = torch.arange(1, len(ordered), dtype=ordered.dtype, device=ordered.device)
    sums = ordered.cumsum(dim=0)[:-1]
    between = sums.square() * (1.0 / left + 1.0 / (len(ordered) - left)) / len(ordered)
    return between.max()


def signature(features: Tensor) -> float:
    """Share of the features' variance that one cut along their top singular direction explains, in [0, 1]."""
    total = features.double().var(dim=0, unbiased=False).sum()
    return float(best_split(scores_along_top(features)) / total.clamp_min(TINY))


class SpectralSignature(Defense):
    """The largest ``signature`` over predicted classes, per expert; kept unless it sticks out upwards."""

    def __init__(self, threshold: float, level: float, rows: int, smallest: int, relative: bool) -> None:
        self.threshold = threshold
        self.level = level
        self.rows = rows
        self.smallest = smallest
        self.relative = relative

    def statistic(self, base: Model, expert: Expert, ctx: MergeContext) -> float:
        """max over classes of the expert's signature (relative: the log of its ratio to the base's)."""
        view = ctx.views[expert.task]
        head = {n: t.to(ctx.device) for n, t in view.head.items()}
        model = Model(ctx.backbone, load_network(ctx.backbone, expert.weights).to(ctx.device))
        found, reference, predicted = [], [], []
        rows = strided(len(view.tuning))[: self.rows]
        with torch.inference_mode():
            for index in torch.split(rows, BATCH):
                batch: Split = view.task.batch(view.tuning, index, ctx.device)
                found.append(model.features(batch.inputs))
                if self.relative:
                    reference.append(base.features(batch.inputs))
                outputs = view.task.outputs(model, head, batch.inputs)
                predicted.append(view.task.predictions(outputs))
        return self.largest(
            torch.cat(found), torch.cat(reference) if self.relative else None, torch.cat(predicted)
        )

    def largest(self, features: Tensor, reference: Tensor | None, classes: Tensor) -> float:
        """Over the classes with enough rows; −∞ if there is none."""
        values = [-float("inf")]
        for label in sorted(set(classes.tolist())):
            members = classes == label
            if int(members.sum()) >= self.smallest:
                own = signature(features[members])
                if reference is None:
                    values.append(own)
                else:
                    before = signature(reference[members])
                    values.append(float(torch.tensor((own + TINY) / (before + TINY)).log()))
        return max(values)

    def screen(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Screened:
        """The experts that pass, untouched; those of which nothing can be told pass too. Reports the
        ``statistic`` (None: nothing can be told) and its z-score ``z`` per expert."""
        plain = Model(ctx.backbone, load_network(ctx.backbone, base).to(ctx.device))
        values = torch.tensor([self.statistic(plain, e, ctx) for e in experts], dtype=torch.float64)
        known = torch.isfinite(values)
        suspicion = torch.zeros_like(values)
        told = int(known.sum())
        if told >= FEWEST:
            suspicion[known] = robust_scores(values[known])
        limit = self.threshold or critical_score(max(told, FEWEST), 1, self.level, 1)
        report = {"statistic": rounded(experts, values), "z": rounded(experts, suspicion)}
        return Screened(let_in(experts, suspicion, limit), {**report, "threshold": limit})
