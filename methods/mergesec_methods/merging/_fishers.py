"""Diagonal Fisher information of a network's parameters, and the mean that it weighs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mergesec.contracts import ContractError, Model
from mergesec_methods.merging._samples import Sample

ENTRIES = 1 << 26
"""Gradient entries held at a time: 256 MiB of float32."""


class FisherMean:
    """Σ w_i τ_i and Σ w_i of one tensor, w_i = c_i (F_i + ε); float32 in the base's shape, on its device."""

    def __init__(self, base: Tensor) -> None:
        self.base = base
        self.weighted = torch.zeros(base.shape, device=base.device)
        self.weights = torch.zeros(base.shape, device=base.device)
        self.informed = False
        """Whether any expert's F has an entry other than 0."""

    def add(self, fisher: Tensor, expert: Tensor, minimal: float, factor: float) -> None:
        """One expert's F ≥ 0 and weights, both in the base's shape, its ε and c."""
        self.informed |= bool(fisher.any())
        weight = fisher.to(self.weights).add(minimal).mul_(factor)
        self.weights += weight
        self.weighted.addcmul_(weight, expert.float() - self.base.float())


def diagonal_fisher(model: Model, sample: Sample, expectation: str, coverage: float) -> dict[str, Tensor]:
    """Mean over the sample's rows of squared gradients of log p(y|x), float32, per parameter name.

    ``expectation`` says which y: ``predictive`` Σ_y p(y|x) (∂ log p(y|x))², as in the paper and its
    authors' code; ``argmax`` the most probable y; ``label`` the row's target; ``batch`` the square of
    Σ_x Σ_y √p(y|x) ∂ log p(y|x) over the rows of a batch, as in MergeLM and FusionBench.

    A generator's outputs are the residual r ``[n, 1, d]`` of a normal distribution. There ``predictive`` is
    the same mean, Σ_j (∂ r_j)², by one vector z of random signs a row, fixed per row: E (∂ zᵀr)² is it.
    Raises ContractError for other outputs, and for ``argmax`` and ``batch`` of residuals.
    """
    named = {n: p.requires_grad_() for n, p in model.network.named_parameters() if p.is_floating_point()}
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in named.items()}
    parameters = list(named.values())
    # the plain attention kernel can be differentiated for several classes at once
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        for value, seeds in _targets(model, sample, expectation, coverage):
            for part in torch.split(seeds, max(1, ENTRIES // max(1, sum(p.numel() for p in parameters)))):
                for name, gradient in zip(named, _gradients(value, parameters, part), strict=True):
                    if gradient is not None:
                        for row in gradient:
                            sums[name].addcmul_(row.float(), row.float())
    return {name: total.div_(len(sample)) for name, total in sums.items()}


def _gradients(value: Tensor, parameters: list[Tensor], seeds: Tensor) -> list[Tensor | None]:
    """Gradients of ``seeds @ value`` for each row of ``seeds``: ``[rows, *shape]`` per parameter."""
    if len(seeds) == 1:
        found = torch.autograd.grad(value, parameters, seeds[0], retain_graph=True, allow_unused=True)
        return [None if g is None else g[None] for g in found]
    return list(
        torch.autograd.grad(
            value, parameters, seeds, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
    )


def _targets(
    model: Model, sample: Sample, expectation: str, coverage: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """(differentiable values ``[m]``, seeds ``[s, m]``): F sums the squared gradient of each seed @ values."""
    if expectation == "batch":
        for batch in sample.batches():
            scores = _log_probabilities(model, sample, batch)
            yield scores.flatten(), (0.5 * scores.detach()).exp().reshape(1, -1)
        return
    if expectation == "label":
        for one in sample.batches(1):
            loss = sample.view.task.loss(sample.outputs(model, one), one.targets)
            yield loss.reshape(1), torch.ones(1, 1, device=loss.device)
        return
    if expectation == "predictive" and sample.residual(model):
        for row, one in enumerate(sample.batches(1)):
            residual = sample.outputs(model, one).reshape(-1)
            signs = (
                torch.randint(2, (1, len(residual)), generator=torch.Generator().manual_seed(row)) * 2.0 - 1
            )
            yield residual, signs.to(residual)
        return
    kept = important(_probabilities(model, sample), coverage) if expectation == "predictive" else None
    for row, one in enumerate(sample.batches(1)):
        chosen = None if kept is None else kept[row].nonzero().flatten()
        if chosen is not None and not len(chosen):
            continue
        scores = _log_probabilities(model, sample, one)[0]
        if chosen is None:
            seeds = torch.zeros_like(scores).index_fill_(0, scores.detach().argmax(), 1.0)[None]
        else:
            seeds = torch.diag((0.5 * scores.detach()).exp())[chosen]
        yield scores, seeds


def _log_probabilities(model: Model, sample: Sample, batch: object) -> Tensor:
    """log p(y|x) ``[n, K]``."""
    outputs = sample.outputs(model, batch)  # type: ignore[arg-type]
    if outputs.ndim != 2:
        raise ContractError(f"Fisher merging needs logits [N, K], the task gave {list(outputs.shape)}")
    return outputs.log_softmax(dim=-1)


@torch.no_grad()
def _probabilities(model: Model, sample: Sample) -> Tensor:
    return torch.cat([_log_probabilities(model, sample, batch).exp() for batch in sample.batches()])


def important(probabilities: Tensor, coverage: float) -> Tensor:
    """Bool ``[N, K]``: the fewest pairs (x, y) that hold ``coverage`` of the information in the logits.

    The gradient of log p(y|x) in the logits is e_y − p, so the pair contributes
    p_y ‖e_y − p‖² = p_y (1 − 2 p_y + ‖p‖²) to the trace. A confident prediction contributes little,
    and most of that through the classes that it rules out; leaving out pairs saves a backward pass each.
    """
    p = probabilities.double()
    shares = (p * (1 - 2 * p + p.square().sum(1, keepdim=True))).clamp(min=0)
    if coverage >= 1:
        return shares > 0
    ordered = shares.flatten().sort(descending=True).values
    enough = int((ordered.cumsum(0) < coverage * ordered.sum()).sum())
    return shares >= ordered[min(enough, len(ordered) - 1)]
