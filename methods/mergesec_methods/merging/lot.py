"""LOT merging: every layer's task vectors are fused so that features drift least on the experts' own inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from mergesec.contracts import ContractError, Expert, MergeContext, Weights
from mergesec.tensorwise import Piece, running_mean
from mergesec_methods.merging._gram_regression import (
    InputGrams,
    Regression,
    gather,
    linear_weights,
    tied_names,
)
from mergesec_methods.merging._norm_inputs import NormSquares, norms
from mergesec_methods.merging._samples import Sample, StatisticsMerge, model_of

CARD = {
    "name": "lot",
    "kind": "merging",
    "class": "Lot",
    "version": "1",
    "title": "LOT merging",
    "paper": "Sun et al., Towards minimizing feature drift in model merging: layer-wise task vector fusion for "
    "adaptive knowledge integration, NeurIPS 2025",
    "url": "https://arxiv.org/abs/2505.23859",
    "summary": "task vectors of linear layers and norm scales by least squares of the drift of features",
    "output": "static",
    "data": "tuning",
    "modalities": ["image", "text"],
    "seeded": False,
    "parameters": {
        "num_examples": {
            "type": "int",
            "default": 64,
            "min": 1,
            "max": 1000000,
            "doc": "unlabelled inputs per task on which the features are computed",
        },
        "scaling": {
            "type": "float",
            "default": 1.0,
            "min": 0.0,
            "max": 10.0,
            "also": ["tuned"],
            "doc": "scaling coefficient λ; 'tuned' picks it from 'grid' on the tuning split",
        },
        "grid": {
            "type": "list",
            "default": [0.5, 0.75, 1.0, 1.25, 1.5],
            "doc": "coefficients tried when scaling is 'tuned'",
        },
    },
}


T = TypeVar("T")


class Scales:
    """Sums over experts that fix the merge of one norm's scale: τ = Σ s_k ∘ τ_k / Σ s_k, s_k the mean of x̂²."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.weight = torch.zeros(size, device=device)
        self.moment = torch.zeros(size, device=device)

    def add(self, squares: Tensor, delta: Tensor) -> None:
        """One expert's mean squares ``[d]`` and task vector ``[d]``."""
        self.weight += squares
        self.moment += squares * delta.to(squares)

    def solve(self) -> Tensor:
        """τ ``[d]``, 0 where no task's feature was ever other than 0."""
        seen = self.weight > 0
        return torch.where(seen, self.moment / torch.where(seen, self.weight, 1.0), 0.0)


class Fusion(NamedTuple):
    """What the experts' features say, by weight."""

    linear: dict[str, Regression]
    scales: dict[str, Scales]


class Lot(StatisticsMerge):
    """θ = θ0 + λ τ*, τ* = (Σ_k X_kᵀX_k)⁺ Σ_k X_kᵀX_k τ_k for the weight ``[in, out]`` of a linear layer: the
    least-norm minimum of Σ_k ‖X_k τ − X_k τ_k‖², X_k the rows that enter the layer in expert k.

    What no task's inputs reach stays the base's, where RegMean averages. The scale of a norm is the same
    problem entry by entry; biases, convolutions and embeddings are averaged. X_kᵀX_k is divided by its
    number of rows, so that tasks count alike.
    """

    def __init__(self, num_examples: int, scaling: float | str, grid: Sequence[float]) -> None:
        self.num_examples = num_examples
        self.scaling = scaling
        self.grid = grid

    @torch.no_grad()
    def survey(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Any:
        """The sums per weight; one expert's statistics are held at a time."""
        linear: dict[str, Regression] = {}
        scales: dict[str, Scales] = {}
        for expert in experts:
            sample = Sample(ctx, expert.task, self.num_examples)
            model = model_of(ctx, expert.weights)
            with InputGrams(model.network) as grams, NormSquares(model.network) as squares:
                for batch in sample.batches():
                    sample.outputs(model, batch)
            ties = tied_names(model.network)
            gather(linear, grams.means(), base, expert, ties, alpha=1.0)
            for name, means in squares.means().items():
                if not bool(torch.isfinite(means).all()):
                    raise ContractError(f"expert '{expert.task}': the inputs of '{name}' are not finite")
                first = ties[name][0]
                delta = expert.weights[first].float() - base[first].float()
                scales.setdefault(first, Scales(len(means), means.device)).add(means, delta)
            self.report.setdefault("examples", {})[expert.task] = len(sample)
        found = Fusion(_by_any_name(linear, ties), _by_any_name(scales, ties))
        wanted = [*linear_weights(model.network), *(name for name, _ in norms(model.network))]
        self.report["averaged"] = [n for n in wanted if n not in found.linear and n not in found.scales]
        return found

    def whole(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: Any) -> Tensor | None:
        """θ0 + τ* for weights of linear layers and scales of norms."""
        if name in facts.linear:
            delta, rank = least_norm(facts.linear[name])
            if rank < delta.shape[1]:
                self.report.setdefault("rank", {})[name] = rank
        elif name in facts.scales:
            delta = facts.scales[name].solve()
        else:
            return None
        return base.float() + delta.to(base.device)

    def combine(self, piece: Piece, out: Tensor, facts: Any) -> None:
        running_mean(piece, out)

    def facts(self) -> dict[str, Any]:
        return {"scaling": self.scaling, **self.report}


def least_norm(sums: Regression) -> tuple[Tensor, int]:
    """(τ ``[out, in]`` float32 of least norm that solves ``sums``, the rank of its Gram matrix).

    Eigenvalues below d ε times the largest are 0, ε of float32, in which the inputs are: the cut that
    ``torch.linalg.pinv`` makes by default.
    """
    values, vectors = torch.linalg.eigh(sums.gram.double())
    cut = len(values) * torch.finfo(torch.float32).eps * float(values[-1])
    seen = values > max(cut, 0.0)
    kept = vectors[:, seen]
    solution = (kept / values[seen]) @ (kept.T @ sums.moment.double())
    return solution.T.float().contiguous(), int(seen.sum())


def _by_any_name(found: dict[str, T], ties: dict[str, list[str]]) -> dict[str, T]:
    return {other: value for name, value in found.items() for other in ties[name]}
