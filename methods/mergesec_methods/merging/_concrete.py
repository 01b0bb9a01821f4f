"""A learnt, relaxed Bernoulli mask over the entries of task vectors (Tang et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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

    def expected(self) -> Tensor:
        """The mask of the probabilities σ(φ) themselves, rescaled alike: nothing is drawn."""
        return self._rescaled(self.logits.sigmoid())

    def _rescaled(self, mask: Tensor) -> Tensor:
        scaled = torch.empty_like(mask)
        self._means = []
        for start, stop in self.spans:
            mean = mask[start:stop].mean().clamp_(min=TINY)
            self._means.append(mean)
            torch.div(mask[start:stop], mean, out=scaled[start:stop])
        self._mask = scaled
        return scaled

    def closed(self) -> Tensor:
        """Bool ``[P]``: which entries the last mask drew leaves less than half of, before the division by its mean."""
        halves = [torch.full((b - a,), 0.5, device=self._mask.device) / m for (a, b), m in self._spanned()]
        return self._mask < torch.cat(halves)

    def _spanned(self) -> list[tuple[tuple[int, int], Tensor]]:
        return list(zip(self.spans, self._means, strict=True))

    def pull_back(self, gradient: Tensor) -> Tensor:
        """dL/dφ ``[P]`` from dL/dm ``[P]`` at the last ``sample``; ``gradient`` is not changed.

        With μ = mean(s) over a tensor of n entries, dL/ds = (dL/dm − Σ_k dL/dm_k m_k / n) / μ.
        """
        soft = self._soft
        found = torch.empty_like(soft)
        for (start, stop), mean in self._spanned():
            own = gradient[start:stop]
            shared = torch.dot(own, self._mask[start:stop]) / (stop - start)
            torch.sub(own, shared, out=found[start:stop]).div_(mean)
        return found.mul_(soft).mul_(1.0 - soft).div_(self.temperature)


class Inner:
    """The inner problem: λ is one Adam step away from where it starts, under the mask at hand.

    As in the released code the gradient is taken at the λ that the step before ended at, and the step
    itself goes from the start; Adam's moments live on. ``rate`` None: λ stays as given.
    """

    def __init__(self, start: Tensor, rate: float | None) -> None:
        self.start, self.coefficients = start, start.clone()
        self._optimizer = None if rate is None else torch.optim.Adam([self.coefficients], lr=rate)

    def step(self, blend: Blend, streams: Sequence[Stream], drawn: Tensor) -> Tensor:
        """λ after the step on fresh batches of entropy; the blend is left assembled with it and ``drawn``."""
        if self._optimizer is not None:
            blend.assemble(self.coefficients, drawn)
            backward(blend, streams)
            self.coefficients.grad = blend.coefficient_gradient(self.coefficients, drawn)
            self.coefficients.copy_(self.start)
            self._optimizer.step()
        blend.assemble(self.coefficients, drawn)
        return self.coefficients


def learn_mask(
    blend: Blend,
    mask: ConcreteMask,
    streams: Sequence[Stream],
    coefficients: Tensor,
    rate: float,
    steps: int,
    inner_rate: float | None = None,
    outer: Callable[[], float] | None = None,
) -> list[float]:
    """Adam on the mask's logits for Σ_t entropy; the mean loss of each step.

    With ``inner_rate``, λ first takes one Adam step from ``coefficients`` under the sampled mask (see
    ``Inner``; first order: no gradient flows through it). Without, λ stays as given. ``outer`` replaces
    the outer objective: it is called with the blend assembled, leaves dL/dθ in the blend's gradient and
    returns the loss. By default that is the entropy on fresh batches.
    """
    optimizer = torch.optim.Adam([mask.logits], lr=rate)
    inner = Inner(coefficients, inner_rate)
    losses = []
    for _ in range(steps):
        inner.step(blend, streams, mask.sample())
        losses.append(backward(blend, streams) if outer is None else outer())
        mask.logits.grad = mask.pull_back(blend.mask_gradient())
        optimizer.step()
    return losses


def final_mask(mask: ConcreteMask, kind: str) -> Tensor:
    """The mask of the merged model: ``"continuous"`` (one more relaxed sample), ``"discrete"``, or ``"mean"``."""
    if kind == "mean":
        return mask.expected()
    return mask.discrete() if kind == "discrete" else mask.sample()
