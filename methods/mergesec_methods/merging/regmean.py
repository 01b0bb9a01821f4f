"""RegMean: linear layers are merged by least squares on the experts' own inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mergesec.contracts import Expert, MergeContext, Weights
from mergesec.tensorwise import Piece, running_mean
from mergesec_methods.merging._gram_regression import (
    InputGrams,
    Regression,
    gather,
    linear_weights,
    tied_names,
)
from mergesec_methods.merging._samples import Sample, StatisticsMerge, model_of

CARD = {
    "name": "regmean",
    "kind": "merging",
    "class": "RegMean",
    "version": "1",
    "title": "RegMean",
    "paper": "Jin et al., Dataless knowledge fusion by merging weights of language models, ICLR 2023",
    "url": "https://arxiv.org/abs/2212.09849",
    "summary": "linear layers by least squares on each expert's inputs, everything else averaged",
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
            "doc": "unlabelled inputs per task on which the Gram matrices are computed",
        },
        "alpha": {
            "type": "float",
            "default": 0.95,
            "min": 0.0,
            "max": 1.0,
            "doc": "factor on the off-diagonals of the Gram matrices; 1 is plain least squares",
        },
    },
}


class RegMean(StatisticsMerge):
    """W = (Σ_i G̃_i)⁻¹ Σ_i G̃_i W_i, W_i ``[in, out]``, G_i = X_iᵀX_i of the rows X_i that enter the layer
    in expert i, G̃ = G with off-diagonals times α: the W that is closest to all W_i on their inputs.

    G_i is divided by its number of rows, as the authors' code and FusionBench do, so that tasks count
    alike. Biases, norms, convolutions and embeddings are averaged.
    """

    def __init__(self, num_examples: int, alpha: float) -> None:
        self.num_examples = num_examples
        self.alpha = alpha

    @torch.no_grad()
    def survey(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Any:
        """The regression per weight; one expert's Gram matrices are held at a time."""
        sums: dict[str, Regression] = {}
        for expert in experts:
            sample = Sample(ctx, expert.task, self.num_examples)
            model = model_of(ctx, expert.weights)
            with InputGrams(model.network) as grams:
                for batch in sample.batches():
                    sample.outputs(model, batch)
            ties = tied_names(model.network)
            gather(sums, grams.means(), base, expert, ties, self.alpha)
            self._note(expert, sample)
        reached = {other: found for name, found in sums.items() for other in ties[name]}
        self._reached(linear_weights(model.network), reached)
        return reached

    def whole(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: Any) -> Tensor | None:
        """The least-squares solution, for weights of linear layers."""
        if name not in facts:
            return None
        return self._solved(name, base, experts, facts[name])

    def combine(self, piece: Piece, out: Tensor, facts: Any) -> None:
        running_mean(piece, out)

    def _note(self, expert: Expert, sample: Sample) -> None:
        self.report.setdefault("examples", {})[expert.task] = len(sample)

    def _solved(self, name: str, base: Tensor, experts: Sequence[Tensor], sums: Regression) -> Tensor:
        """The merged weight, float32."""
        origin = base.float()
        mean = torch.stack([expert.float() - origin for expert in experts]).mean(dim=0)
        delta, ridge = sums.solve(mean)
        if ridge:
            self.report.setdefault("ridge", {})[name] = ridge
        return origin + delta.to(base.device)

    def _reached(self, linear: Sequence[str], reached: Mapping[str, object]) -> None:
        self.report["linear_layers"] = sum(name in reached for name in linear)
        self.report["linear_layers_averaged"] = [name for name in linear if name not in reached]
