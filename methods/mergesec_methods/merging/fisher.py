"""Fisher merging: a mean weighted, entry by entry, by each expert's diagonal Fisher information."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mergesec.contracts import Expert, MergeContext, Weights
from mergesec.tensorwise import Piece, running_mean
from mergesec_methods.merging._fishers import FisherMean, diagonal_fisher
from mergesec_methods.merging._gram_regression import tied_names
from mergesec_methods.merging._samples import Sample, StatisticsMerge, model_of

CARD = {
    "name": "fisher",
    "kind": "merging",
    "class": "Fisher",
    "version": "1",
    "title": "Fisher merging",
    "paper": "Matena and Raffel, Merging models with Fisher-weighted averaging, NeurIPS 2022",
    "url": "https://arxiv.org/abs/2111.09832",
    "summary": "the mean of the experts, weighted per entry by the diagonal Fisher information of each",
    "output": "static",
    "data": "tuning",
    "modalities": ["image", "text", "generation"],
    "seeded": False,
    "parameters": {
        "num_examples": {
            "type": "int",
            "default": 256,
            "min": 1,
            "max": 1000000,
            "doc": "inputs per task on which the Fisher information is computed",
        },
        "expectation": {
            "type": "choice",
            "choices": ["predictive", "argmax", "label", "batch"],
            "default": "predictive",
            "doc": "labels of the squared gradients: the model's own distribution as in the paper, its best "
            "guess, the true label, or summed over a batch before squaring as FusionBench does",
        },
        "coverage": {
            "type": "float",
            "default": 0.99,
            "min": 0.0,
            "max": 1.0,
            "doc": "share of the Fisher information (in the logits) that 'predictive' computes; 1 = every class",
        },
        "normalise": {
            "type": "bool",
            "default": True,
            "doc": "divide each expert's Fisher information by its Euclidean norm over all weights",
        },
        "minimal": {
            "type": "float",
            "default": 1e-6,
            "min": 1e-30,
            "max": 1e30,
            "doc": "added to every Fisher entry, so that entries no expert needs are averaged",
        },
    },
}


class Fisher(StatisticsMerge):
    """θ = Σ_i F_i θ_i / Σ_i F_i per entry, F_i the diagonal of expert i's Fisher information on its task.

    Computed as θ0 + Σ F_i τ_i / Σ F_i. Tensors without information in any expert
    (buffers, parameters that are not used) are averaged.
    """

    def __init__(
        self, num_examples: int, expectation: str, coverage: float, normalise: bool, minimal: float
    ) -> None:
        self.num_examples = num_examples
        self.expectation = expectation
        self.coverage = coverage
        self.normalise = normalise
        self.minimal = minimal

    def survey(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Any:
        """Numerator and denominator per name; one expert's Fisher information is held at a time."""
        means: dict[str, FisherMean] = {}
        examples: dict[str, int] = {}
        for expert in experts:
            sample = Sample(ctx, expert.task, self.num_examples, labelled=self.expectation == "label")
            model = model_of(ctx, expert.weights)
            fisher = diagonal_fisher(model, sample, self.expectation, self.coverage)
            self._gather(means, fisher, base, expert)
            examples[expert.task] = len(sample)
        ties = tied_names(model.network)
        informed = {other: m for name, m in means.items() if m.informed for other in ties[name]}
        missed = [n for n, t in base.items() if t.is_floating_point() and n not in informed]
        self.report.update(examples=examples, averaged=missed)
        return informed

    def _gather(
        self, means: dict[str, FisherMean], fisher: Mapping[str, Tensor], base: Weights, expert: Expert
    ) -> None:
        factor = 1.0
        if self.normalise:
            norms = torch.stack([torch.linalg.vector_norm(f.double()) for f in fisher.values()])
            factor = 1.0 / (float(torch.linalg.vector_norm(norms)) + self.minimal)
        for name, values in fisher.items():
            if name not in means:
                means[name] = FisherMean(base[name])
            means[name].add(values, expert.weights[name], self.minimal, factor)

    def combine(self, piece: Piece, out: Tensor, facts: Any) -> None:
        """The Fisher mean where there is one, else the mean."""
        found: FisherMean | None = facts.get(piece.name)
        if found is None:
            running_mean(piece, out)
        else:
            part = slice(piece.start, piece.start + out.numel())
            torch.div(found.weighted.view(-1)[part], found.weights.view(-1)[part], out=out)
            out.add_(piece.base)
