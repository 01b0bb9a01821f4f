"""RegMean++: RegMean block by block, on the features that the merged blocks before give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mergesec.contracts import Expert, MergeContext, Model, Weights
from mergesec_methods.merging._blocks import Replay, Walk, block_paths, chained
from mergesec_methods.merging._gram_regression import (
    InputGrams,
    Regression,
    gather,
    linear_weights,
    tied_names,
)
from mergesec_methods.merging._samples import Sample, model_of
from mergesec_methods.merging.regmean import RegMean
from mergesec_methods.merging.simple_average import SimpleAverage

CARD = {
    "name": "regmean_plusplus",
    "kind": "merging",
    "class": "RegMeanPlusPlus",
    "version": "1",
    "title": "RegMean++",
    "paper": "Nguyen et al., RegMean++: enhancing effectiveness and generalization of regression mean, TMLR 2026",
    "url": "https://arxiv.org/abs/2508.03121",
    "summary": "RegMean, block by block, on the features that the merged blocks before give",
    "output": "static",
    "data": "tuning",
    "modalities": ["image", "text"],
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


class RegMeanPlusPlus(RegMean):
    """RegMean with X_i of block l computed by expert i's block l from the output of the *merged* blocks
    1 … l−1 on task i's inputs (eq. 4 onwards and algorithm 1), instead of by expert i alone.

    Everything outside the blocks is averaged, its linear layers included.
    """

    @torch.no_grad()
    def survey(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Any:
        """The merged weights of the blocks' linear layers, float32, found from the first block on."""
        average = SimpleAverage().merge(base, experts, ctx).shared
        model = model_of(ctx, average)
        samples = [Sample(ctx, expert.task, self.num_examples) for expert in experts]
        paths = block_paths(ctx.backbone.anatomy())
        blocks = [model.network.get_submodule(path) for path in paths]
        walks = walks_of(model, samples, blocks)
        ties = tied_names(model.network)
        merged: dict[str, Tensor] = {}
        for path, block in zip(paths, blocks, strict=True):
            names = {f"{path}.{name}": name for name in block.state_dict()}
            sums: dict[str, Regression] = {}
            for expert, walk in zip(experts, walks, strict=True):
                block.load_state_dict({own: expert.weights[name] for name, own in names.items()})
                with InputGrams(model.network, path) as grams:
                    walk.through(block)
                gather(sums, grams.means(), base, expert, ties)
            for name, regression in sums.items():
                merged |= dict.fromkeys(ties[name], self._solved(name, base[name], regression))
            block.load_state_dict({own: merged.get(name, average[name]) for name, own in names.items()})
            for walk in walks:
                walk.advance(block)
        for expert, sample in zip(experts, samples, strict=True):
            self._note(expert, sample)
        self._reached(linear_weights(model.network), merged)
        return merged

    def whole(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: Any) -> Tensor | None:
        """What the survey found."""
        found: Tensor | None = facts.get(name)
        return found


def walks_of(model: Model, samples: Sequence[Sample], blocks: Sequence[nn.Module]) -> list[Walk | Replay]:
    """One per sample: the quick way where blocks follow one another, else passes from the input on."""
    if chained(model, samples[0], blocks):
        return [Walk(model, sample, blocks[0]) for sample in samples]
    return [Replay(model, sample) for sample in samples]
