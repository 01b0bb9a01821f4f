"""A learnt, relaxed Bernoulli mask over the entries of task vectors (Tang et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergesec.contracts import Context
from mergesec_methods.merging._adaptation import Blend, Stream, backward

TINY = torch.finfo(torch.float32).tiny


class ConcreteMask:
    """m = s / mean(s) per tensor, s = σ((φ + L) / T), L standard logistic noise, φ the logits ``[P]``.

    The last sample is kept, so that gradients of m can be pulled back to φ. Noise is drawn on the
    device: a GPU draws other numbers than a CPU.
    """

    def __init__(self, blend: Blend, temperature: float, ctx: Context, stream: int = 0) -> None:
        self.spans = blend.spans
        self.temperature = temperature
        self.logits = torch.zeros_like(blend.base)
        self._generator = torch.Generator(device=blend.base.device)
        self._generator.manual_seed(ctx.generator(stream).initial_seed())
        self._soft = torch.empty_like(blend.base)
        self._mask = torch.ones_like(blend.base)
        self._means: list[Tensor] = []

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """A fresh mask ``[P]``, mean 1 per tensor; ``noise``: uniform in (0, 1) instead of drawn."""
        if noise is None:
            noise = torch.rand(self.logits.shape, generator=self._generator, device=self.logits.device)
        edge = torch.finfo(torch.float32).eps  # as torch.distributions does: log(0) is out of reach
        soft = torch.logit(noise, eps=edge).add_(self.logits).div_(self.temperature).sigmoid_()
        self._soft = soft.clamp_(TINY, 1.0 - edge)
        return self._rescaled(self._soft)

    def discrete(self) -> Tensor:
        """A mask of Bernoulli(σ(φ)) draws, rescaled alike; a tensor without a 1 stays 0."""
        drawn = torch.bernoulli(self.logits.sigmoid(), generator=self._generator)
        return self._rescaled(drawn)

    def _rescaled(self, mask: Tensor) -> Tensor:
        scaled = torch.empty_like(mask)
        self._means = []
        for start, stop in self.spans:
            mean = mask[start:stop].mean().clamp_(min=TINY)
            self._means.append(mean)
            torch.div(mask[start:stop], mean, out=scaled[start:stop])
        self._mask = scaled
        return scaled

    def pull_back(self, gradient: Tensor) -> Tensor:
        """dL/dφ ``[P]`` from dL/dm ``[P]`` at the last ``sample``; ``gradient`` is not changed.

        With μ = mean(s) over a tensor of n entries, dL/ds = (dL/dm − Σ_k dL/dm_k m_k / n) / μ.
        """
        soft = self._soft
        found = torch.empty_like(soft)
        for (start, stop), mean in zip(self.spans, self._means, strict=True):
            own = gradient[start:stop]
            shared = torch.dot(own, self._mask[start:stop]) / (stop - start)
            torch.sub(own, shared, out=found[start:stop]).div_(mean)
        return found.mul_(soft).mul_(1.0 - soft).div_(self.temperature)


def learn_mask(
    blend: Blend,
    mask: ConcreteMask,
    streams: Sequence[Stream],
    coefficients: Tensor,
    rate: float,
    steps: int,
    inner_rate: float | None = None,
) -> list[float]:
    """Adam on the mask's logits for Σ_t entropy; mean entropy per step.

    With ``inner_rate``, λ first takes one Adam step from ``coefficients`` under the sampled mask (the
    inner problem; first order: no gradient flows through it). As in the released code the inner
    gradient is taken at the λ that the step before ended at, and the step itself starts from
    ``coefficients``. Without, λ stays as given.
    """
    optimizer = torch.optim.Adam([mask.logits], lr=rate)
    inner = coefficients.clone()
    inner_optimizer = None if inner_rate is None else torch.optim.Adam([inner], lr=inner_rate)
    losses = []
    for _ in range(steps):
        drawn = mask.sample()
        if inner_optimizer is not None:
            blend.assemble(inner, drawn)
            backward(blend, streams)
            inner.grad = blend.coefficient_gradient(inner, drawn)
            inner.copy_(coefficients)
            inner_optimizer.step()
        blend.assemble(inner, drawn)
        losses.append(backward(blend, streams))
        mask.logits.grad = mask.pull_back(blend.mask_gradient())
        optimizer.step()
    return losses


def final_mask(mask: ConcreteMask, kind: str) -> Tensor:
    """The mask of the merged model: ``"continuous"`` (one more relaxed sample) or ``"discrete"``."""
    return mask.discrete() if kind == "discrete" else mask.sample()
