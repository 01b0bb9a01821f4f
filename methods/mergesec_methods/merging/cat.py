"""CAT merging: what a task vector does to the features of other tasks is projected or masked away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergesec.contracts import ContractError, Expert, MergeContext, Weights
from mergesec.tensorwise import Piece
from mergesec_methods.merging._gram_regression import InputGrams, tied_names
from mergesec_methods.merging._norm_inputs import NormSquares
from mergesec_methods.merging._samples import Sample, StatisticsMerge, model_of

CARD = {
    "name": "cat",
    "kind": "merging",
    "class": "Cat",
    "version": "1",
    "title": "CAT merging (reconstruction)",
    "paper": "Sun et al., CAT merging: a training-free approach for resolving conflicts in model merging, "
    "ICML 2025",
    "url": "https://arxiv.org/abs/2505.06977",
    "summary": "task arithmetic after what harms other tasks' features is cut from each task vector; rebuilt "
    "from the stated objective",
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
        "rank": {
            "type": "int",
            "default": 4,
            "min": 0,
            "max": 1000000,
            "doc": "directions (entries of norm scales and biases) that each task has cut from the others",
        },
        "tradeoff": {
            "type": "float",
            "default": 5.0,
            "min": 0.0,
            "max": 1000000.0,
            "doc": "weight of what a task vector does for its own task's features against the conflict",
        },
        "rescale": {
            "type": "bool",
            "default": True,
            "doc": "give what is left of a task's tensor the length it had",
        },
        "scaling": {
            "type": "float",
            "default": 0.4,
            "min": 0.0,
            "max": 10.0,
            "also": ["tuned"],
            "doc": "scaling coefficient λ; 'tuned' picks it from 'grid' on the tuning split",
        },
        "grid": {
            "type": "list",
            "default": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0],
            "doc": "coefficients tried when scaling is 'tuned'",
        },
    },
}


class Features(NamedTuple):
    """What enters one expert's layers, on its own task, by weight."""

    grams: Mapping[str, Tensor]
    squares: Mapping[str, Tensor]


class Conflicts(NamedTuple):
    """What each task has cut from the others, by weight: one entry per expert, in their order."""

    bases: dict[str, list[Tensor]]
    masks: dict[str, list[Tensor]]


class Cat(StatisticsMerge):
    """θ = θ0 + λ Σ_i Φ(τ_i): each τ_i without what conflicts with the features of tasks k ≠ i.

    For a linear weight ``[in, out]`` task k names the orthonormal B_k ``[out, rank]`` that maximises
    Σ_{i≠k} ‖X_k τ_i B_k‖² − μ ‖X_i τ_i B_k‖², μ the trade-off: the leading eigenvectors of
    Σ_{i≠k} τ_iᵀ (X_kᵀX_k − μ X_iᵀX_i) τ_i, those with positive eigenvalues. τ_i loses the span of all B_k,
    k ≠ i. The scale of a norm is the same problem on entries, and a bias too, where nothing but the size of
    Σ_{i≠k} τ_i² tells entries apart. Everything else is added up as in task arithmetic.
    """

    yields = "task_vector"

    def __init__(
        self,
        num_examples: int,
        rank: int,
        tradeoff: float,
        rescale: bool,
        scaling: float | str,
        grid: Sequence[float],
    ) -> None:
        self.num_examples = num_examples
        self.rank = rank
        self.tradeoff = tradeoff
        self.rescale = rescale
        self.scaling = scaling
        self.grid = grid

    @torch.no_grad()
    def survey(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Any:
        """The conflicts per weight, in two passes over the inputs: one expert's statistics are held at a time."""
        own: dict[str, Tensor] = {}
        for expert in experts:
            found, ties = self._features(expert, ctx)
            for name, gram in found.grams.items():
                self._add(own, name, response(_delta(base, expert, name), gram))
            for name, squares in found.squares.items():
                self._add(own, name, squares * _delta(base, expert, name).square())
        bases: dict[str, list[Tensor]] = {}
        masks: dict[str, list[Tensor]] = {}
        for expert in experts:
            found, _ = self._features(expert, ctx)
            others = [other for other in experts if other is not expert]
            for name, gram in found.grams.items():
                mine = response(_delta(base, expert, name), gram)
                theirs = sum((response(_delta(base, o, name), gram) for o in others), torch.zeros_like(mine))
                conflict = theirs - self.tradeoff * (own[name] - mine)
                bases.setdefault(name, []).append(leading(conflict, self.rank))
            for name, squares in found.squares.items():
                mine = squares * _delta(base, expert, name).square()
                sizes = [_delta(base, o, name).square() for o in others]
                theirs = sum((squares * size for size in sizes), torch.zeros_like(mine))
                conflict = theirs - self.tradeoff * (own[name] - mine)
                masks.setdefault(name, []).append(largest(conflict, self.rank))
        return Conflicts(_by_any_name(bases, ties), _by_any_name(masks, ties))

    def whole(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: Any) -> Tensor | None:
        """Σ_i Φ(τ_i) for weights of linear layers, scales of norms and biases."""
        deltas = [expert.float() - base.float() for expert in experts]
        if name in facts.bases:
            kept = [
                without(delta, others(facts.bases[name], index, delta)) for index, delta in enumerate(deltas)
            ]
        elif name in facts.masks or base.dim() == 1:
            masks = facts.masks.get(name) or shift_masks(deltas, self.rank)
            kept = [delta * _open(masks, index, delta) for index, delta in enumerate(deltas)]
        else:
            return None
        if self.rescale:
            kept = [_resized(new, old) for new, old in zip(kept, deltas, strict=True)]
        return torch.stack(kept).sum(0)

    def combine(self, piece: Piece, out: Tensor, facts: Any) -> None:
        out.zero_()
        for expert in piece.experts:
            out.add_(expert).sub_(piece.base)

    def facts(self) -> dict[str, Any]:
        return {"scaling": self.scaling, **self.report}

    def _features(self, expert: Expert, ctx: MergeContext) -> tuple[Features, dict[str, list[str]]]:
        """What enters an expert's layers, by the first name of a weight, and all names of each."""
        sample = Sample(ctx, expert.task, self.num_examples)
        model = model_of(ctx, expert.weights)
        with InputGrams(model.network) as grams, NormSquares(model.network) as squares:
            for batch in sample.batches():
                sample.outputs(model, batch)
        self.report.setdefault("examples", {})[expert.task] = len(sample)
        ties = tied_names(model.network)
        linear: dict[str, Tensor] = {}
        scales: dict[str, Tensor] = {}
        for into, found in ((linear, grams.means()), (scales, squares.means())):
            for name, value in found.items():
                if not bool(torch.isfinite(value).all()):
                    raise ContractError(f"expert '{expert.task}': the inputs of '{name}' are not finite")
                self._add(into, ties[name][0], value)
        return Features(linear, scales), ties

    @staticmethod
    def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
        sums[name] = sums[name] + value if name in sums else value


def response(delta: Tensor, gram: Tensor) -> Tensor:
    """τᵀ XᵀX τ ``[out, out]`` of a task vector ``[out, in]``: the second moment of what it does to features."""
    moved = delta.to(gram)
    found: Tensor = moved @ gram @ moved.T
    return found


def leading(conflict: Tensor, rank: int) -> Tensor:
    """Eigenvectors ``[out, ≤ rank]`` of the largest eigenvalues of a symmetric matrix that are positive."""
    values, vectors = torch.linalg.eigh((conflict + conflict.T).double() / 2)
    count = min(rank, int((values > 0).sum()))
    best: Tensor = vectors[:, len(values) - count :]
    return best


def largest(conflict: Tensor, rank: int) -> Tensor:
    """Boolean ``[d]``: the ``rank`` largest entries that are positive."""
    count = min(rank, int((conflict > 0).sum()))
    chosen = torch.zeros_like(conflict, dtype=torch.bool)
    chosen[conflict.topk(count).indices] = True
    return chosen


def shift_masks(deltas: Sequence[Tensor], rank: int) -> list[Tensor]:
    """For every task, the entries in which the others' biases move most."""
    squares = torch.stack([delta.square() for delta in deltas])
    total = squares.sum(0)
    return [largest((total - own).clamp(min=0), rank) for own in squares]


def others(bases: Sequence[Tensor], index: int, like: Tensor) -> Tensor:
    """Orthonormal columns ``[out, m]`` float64 that span all bases but one."""
    joined = torch.cat([basis for k, basis in enumerate(bases) if k != index] or [bases[0][:, :0]], dim=1)
    left, sizes, _ = torch.linalg.svd(joined, full_matrices=False)
    span: Tensor = left[:, sizes > 1e-6].to(like.device)
    return span


def without(delta: Tensor, span: Tensor) -> Tensor:
    """A task vector ``[out, in]`` without its part in a span ``[out, m]`` of outputs."""
    exact = delta.double()
    return (exact - span @ (span.T @ exact)).float()


def _open(masks: Sequence[Tensor], index: int, like: Tensor) -> Tensor:
    """Boolean ``[d]``: entries that no other task has closed."""
    closed = torch.zeros_like(like, dtype=torch.bool)
    for k, mask in enumerate(masks):
        if k != index:
            closed |= mask.to(like.device)
    return ~closed


def _resized(new: Tensor, old: Tensor) -> Tensor:
    """``new`` with the length of ``old``, unless next to nothing is left of it."""
    length, before = float(new.norm()), float(old.norm())
    return new * (before / length) if length > 1e-4 * before else new


def _delta(base: Weights, expert: Expert, name: str) -> Tensor:
    return expert.weights[name].float() - base[name].float()


def _by_any_name(found: dict[str, list[Tensor]], ties: dict[str, list[str]]) -> dict[str, list[Tensor]]:
    return {other: value for name, value in found.items() for other in ties[name]}
