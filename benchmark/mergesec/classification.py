"""What every classification task shares: a frozen head over normalised features, its loss and fit.

The head is a mapping ``{"weight": [K, d], "scale": []}`` with an optional ``"bias": [K]``. Nothing
here knows the modality: a task adds its data (``load``) and the names of its classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mergesec.contracts import Context, ContractError, Model, Split, Task, Weights

PROBE_SCALE = 16.0
"""Logit scale of fitted heads; features have unit length, so logits need a temperature."""
PROBE_PENALTY = 1e-3
"""L2 penalty on the probe's weight rows, which are of order 1 at ``PROBE_SCALE``."""
PROBE_ITERATIONS = 200
FEATURE_BATCH = 256


def logits(features: Tensor, head: Weights) -> Tensor:
    """``scale · normalise(features) @ weightᵀ (+ bias)``: features ``[N, d]`` to logits ``[N, K]``.

    Raises ContractError if the head was made for another feature width.
    """
    weight = head["weight"]
    if features.ndim != 2 or features.shape[1] != weight.shape[1]:
        shape = list(features.shape)
        raise ContractError(f"head expects features [N, {weight.shape[1]}], the backbone gave {shape}")
    scores = head["scale"] * (functional.normalize(features, dim=-1) @ weight.T)
    bias = head.get("bias")
    return scores if bias is None else scores + bias


def linear_probe(features: Tensor, targets: Tensor, classes: int) -> Weights:
    """Logistic regression on L2-normalised ``features`` ``[N, d]``: a head for ``classes`` classes.

    Full-batch L-BFGS from zero on a convex loss, so the result does not depend on any seed.
    """
    inputs = functional.normalize(features.detach().float(), dim=-1)
    weight = torch.zeros(classes, inputs.shape[1], device=inputs.device, requires_grad=True)
    bias = torch.zeros(classes, device=inputs.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=PROBE_ITERATIONS, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        scores = PROBE_SCALE * (inputs @ weight.T) + bias
        loss = functional.cross_entropy(scores, targets) + 0.5 * PROBE_PENALTY * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    scale = torch.tensor(PROBE_SCALE, device=inputs.device)
    return {"weight": weight.detach(), "bias": bias.detach(), "scale": scale}


class ClassificationTask(Task):
    """A task of K classes: subclasses name ``classes`` and implement ``load``."""

    def features(self, model: Model, split: Split, device: torch.device) -> Tensor:
        """Features ``[N, d]`` of a whole split, without gradients and in evaluation mode."""
        training = model.network.training
        model.network.eval()
        rows: list[Tensor] = []
        with torch.no_grad():
            for index in torch.split(torch.arange(len(split)), FEATURE_BATCH):
                rows.append(model.features(self.batch(split, index, device).inputs))
        model.network.train(training)
        return torch.cat(rows)

    def fit_head(self, model: Model, split: Split, ctx: Context) -> Weights:
        """Linear probe on the base's features of ``split`` (training rows only)."""
        if len(split) == 0:
            raise ContractError(f"{self.name}: cannot fit a head on an empty split")
        features = self.features(model, split, ctx.device)
        return linear_probe(features, split.targets.to(ctx.device), len(self.classes))

    def outputs(self, model: Model, head: Weights, inputs: object) -> Tensor:
        """Logits ``[N, K]`` of raw ``inputs``."""
        return logits(model.features(inputs), head)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy."""
        return functional.cross_entropy(outputs, targets)

    def predictions(self, outputs: Tensor) -> Tensor:
        """The class of the largest logit, int64 ``[N]``."""
        return outputs.argmax(dim=-1)
