"""Task-vector outlier test: drop experts whose update is unlike the others' in size or direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mergesec.contracts import Defense, Expert, MergeContext, Screened, Weights
from mergesec.weights import mergeable, owners
from mergesec_methods.backdoor.defenses._screens import critical_score, let_in, robust_scores, rounded

CARD = {
    "name": "outlier_test",
    "kind": "defense",
    "class": "OutlierTest",
    "version": "2",
    "title": "Task-vector outlier test",
    "paper": "this benchmark's; robust z-scores after Iglewicz and Hoaglin, How to detect and handle outliers, 1993",
    "summary": "drop experts whose task vector's norm or mean cosine to the others is an outlier; their task stays, served by the merge of the rest",
    "threat": "backdoor",
    "hooks": ["screen"],
    "knowledge": "the base's and the contributed weights only",
    "data": "none",
    "modalities": ["image", "text"],
    "seeded": False,
    "parameters": {
        "threshold": {
            "type": "float",
            "default": 0.0,
            "min": 0.0,
            "max": 1000.0,
            "doc": "largest |robust z-score| that is let in; 0 = as level says",
        },
        "level": {
            "type": "float",
            "default": 0.05,
            "min": 0.0001,
            "max": 0.5,
            "doc": "chance that an innocent merge loses an expert if statistics are normal: sets the threshold for the number of experts",
        },
        "statistics": {
            "type": "choice",
            "choices": ["both", "norm", "cosine"],
            "default": "both",
            "doc": "what is tested: norms of the task vectors, mean cosines to the other ones, or both",
        },
    },
}

FEWEST = 3
"""With two experts each is as far from the median as the other."""


def gram_matrix(base: Weights, experts: Sequence[Expert]) -> Tensor:
    """⟨τ_i, τ_j⟩ over all floating tensors, float64 ``[n, n]``; tied tensors count once. One tensor at a time."""
    tied = owners(base)
    total = torch.zeros(len(experts), len(experts), dtype=torch.float64)
    for name in sorted(base):
        if mergeable(base[name]) and name not in tied:
            origin = base[name].double().flatten()
            rows = torch.stack([e.weights[name].double().flatten() - origin for e in experts])
            total += (rows @ rows.T).cpu()
    return total


class OutlierTest(Defense):
    """s_i = max(|z(‖τ_i‖)|, |z(mean_{j ≠ i} cos(τ_i, τ_j))|); kept if s_i ≤ threshold."""

    def __init__(self, threshold: float, level: float, statistics: str) -> None:
        self.threshold = threshold
        self.level = level
        self.statistics = statistics

    def measured(self, base: Weights, experts: Sequence[Expert]) -> dict[str, Tensor]:
        """What is tested, float64 ``[n]`` each: ``norm``, and ``cosine``, the mean one to the other experts; an
        expert equal to the base has cosine 0 to all."""
        gram = gram_matrix(base, experts)
        norms = gram.diagonal().clamp_min(0.0).sqrt()
        cosines = gram / (norms[:, None] * norms[None]).clamp_min(1e-300)
        means = (cosines.sum(dim=1) - cosines.diagonal()) / (len(experts) - 1)
        both = {"norm": norms, "cosine": means}
        return both if self.statistics == "both" else {self.statistics: both[self.statistics]}

    def suspicion(self, base: Weights, experts: Sequence[Expert]) -> Tensor:
        """s, float64 ``[n]``."""
        return _largest({n: robust_scores(v) for n, v in self.measured(base, experts).items()})

    def screen(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Screened:
        """The experts that pass, untouched; all of them where there are fewer than three. Reports each
        statistic and its z-score (``norm``, ``norm_z``, ``cosine``, ``cosine_z``) per expert."""
        if len(experts) < FEWEST:
            return Screened(experts)
        values = self.measured(base, experts)
        scores = {f"{n}_z": robust_scores(v) for n, v in values.items()}
        report: dict[str, Any] = {n: rounded(experts, v) for n, v in {**values, **scores}.items()}
        limit = self.threshold or critical_score(len(experts), len(values), self.level, 2)
        return Screened(let_in(experts, _largest(scores), limit), report | {"threshold": limit})


def _largest(scores: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([z.abs() for z in scores.values()]).amax(dim=0)
