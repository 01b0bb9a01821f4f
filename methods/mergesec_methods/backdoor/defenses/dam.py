"""DAM: Concrete AdaMerging whose mask also has to keep predictions sure under a universal perturbation.

One step of the released algorithm (Yang et al., ICLR 2025; for what was read where see the docs):

    m = s / mean(s),  s a relaxed Bernoulli sample;  θ(λ, m) = θ0 + Σ_i λ_i m ⊙ τ_i
    (1) λ: one Adam step of Σ_t H(f(x_t))                                       (the inner problem)
    (2) δ_t: one Adam step uphill on CE(f(x_t + δ_t), argmax f(x_t))            (the unknown trigger)
    (3) φ: one Adam step down Σ_t [H(f(x_t)) + w · H(f(x_t + δ_t))]             (the mask's logits)

then m is frozen and AdaMerging adapts λ. Three differences from the released code, all meant to do what it
says: x + δ is cut to [0, 1] where pixels live, not after normalisation (which loses the negative half of
the range); |δ| is bounded in pixels; (3) leaves no gradient behind for the next (1).

``masks: two`` is a reconstruction from the paper's description (its code was not released): a task-shared
mask m1 and a backdoor-detection mask m2 gate together, m = m1 ⊙ m2, and take turns — m1 on the clean
entropy with m2 frozen, δ, then m2 on clean and perturbed entropy with m1 frozen.

On texts δ_t shifts every word's embedding, in units of the embeddings' root mean square: this suite's
choice, since the published algorithm needs inputs that have a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergesec.contracts import (
    ContractError,
    Defense,
    Expert,
    MergeContext,
    Merged,
    MergeMethod,
    Weights,
)
from mergesec_methods.backdoor.defenses._perturb import SAFETIES, Perturbations, Safety, word_width
from mergesec_methods.merging._adaptation import (
    Blend,
    Stream,
    adapt_coefficients,
    backward,
    means,
    progress,
    streams_of,
)
from mergesec_methods.merging._concrete import ConcreteMask, Inner, final_mask, learn_mask

CARD = {
    "name": "dam",
    "kind": "defense",
    "class": "DefenseAwareMerging",
    "version": "1",
    "title": "DAM (defense-aware merging)",
    "paper": "Yang et al., Mitigating the backdoor effect for multi-task model merging via safety-aware subspace, ICLR 2025",
    "url": "https://arxiv.org/abs/2410.13910",
    "summary": "Concrete AdaMerging whose mask also keeps predictions sure under a universal perturbation per task",
    "threat": "backdoor",
    "hooks": ["merge"],
    "knowledge": "unlabelled inputs of every merged task",
    "data": "tuning",
    "unlabelled": True,
    "modalities": ["image", "text"],
    "seeded": True,
    "trial": {"steps": 3, "adamerging_steps": 3},
    "parameters": {
        "masks": {
            "type": "choice",
            "choices": ["single", "two"],
            "default": "single",
            "doc": "'single': as released; 'two': the paper's task-shared and detection masks, reconstructed",
        },
        "granularity": {
            "type": "choice",
            "choices": ["task", "layer"],
            "default": "task",
            "shown": True,
            "doc": "one coefficient per task, or per task and tensor ('layer')",
        },
        "init": {
            "type": "float",
            "default": 0.3,
            "min": -10.0,
            "max": 10.0,
            "doc": "all coefficients before adaptation",
        },
        "steps": {
            "type": "int",
            "default": 1000,
            "min": 0,
            "max": 1000000,
            "doc": "steps that learn the mask",
        },
        "adamerging_steps": {
            "type": "int",
            "default": 1000,
            "min": 0,
            "max": 1000000,
            "doc": "AdaMerging's steps under the final mask",
        },
        "batch_size": {
            "type": "int",
            "default": 16,
            "min": 1,
            "max": 65536,
            "doc": "unlabelled inputs per task and batch; three batches per step of the mask",
        },
        "mask_lr": {
            "type": "float",
            "default": 0.001,
            "min": 0.0,
            "max": 10.0,
            "doc": "Adam's step size for the mask's logits",
        },
        "inner_lr": {
            "type": "float",
            "default": 1.0,
            "min": 0.0,
            "max": 10.0,
            "doc": "Adam's step size for the coefficients while the mask is learnt",
        },
        "lr": {
            "type": "float",
            "default": 0.001,
            "min": 0.0,
            "max": 10.0,
            "doc": "Adam's step size for the coefficients under the final mask",
        },
        "adv_lr": {
            "type": "float",
            "default": 0.0001,
            "min": 0.0,
            "max": 1.0,
            "doc": "Adam's step size for the perturbations, in pixels of [0, 1] (texts: of the embeddings' root mean square)",
        },
        "adv_weight": {
            "type": "float",
            "default": 0.1,
            "min": 0.0,
            "max": 1000.0,
            "doc": "weight of the safety term; 0 is Concrete AdaMerging, step for step",
        },
        "eps": {
            "type": "float",
            "default": 0.1,
            "min": 0.0,
            "max": 1.0,
            "doc": "largest change of a pixel in [0, 1]; the default is what 1000 released steps can reach",
        },
        "temperature": {
            "type": "float",
            "default": 0.5,
            "min": 0.001,
            "max": 100.0,
            "doc": "temperature of the relaxed Bernoulli distribution",
        },
        "initial": {
            "type": "float",
            "default": 0.0,
            "min": -100.0,
            "max": 100.0,
            "doc": "the mask's logits before the first step",
        },
        "final": {
            "type": "choice",
            "choices": ["continuous", "discrete", "mean"],
            "default": "continuous",
            "doc": "the merged model's mask: a relaxed sample (as released), a 0/1 sample, or their mean",
        },
        "safety": {
            "type": "choice",
            "choices": ["published", "agreement"],
            "default": "published",
            "later": True,
            "doc": "on perturbed inputs: the entropy, or the cross-entropy to the clean prediction",
        },
    },
}

DETECTION_STREAM = 1
"""Where the second mask's noise comes from; the first one's is stream 0, as in Concrete AdaMerging."""


class DefenseAwareMerging(Defense):
    """Done in the place of a merge method: what the grid's method would have done plays no part."""

    def __init__(
        self,
        masks: str,
        granularity: str,
        init: float,
        steps: int,
        adamerging_steps: int,
        batch_size: int,
        mask_lr: float,
        inner_lr: float,
        lr: float,
        adv_lr: float,
        adv_weight: float,
        eps: float,
        temperature: float,
        initial: float,
        final: str,
        safety: str = "published",
    ) -> None:
        self.masks = masks
        self.granularity = granularity
        self.init = init
        self.steps = steps
        self.adamerging_steps = adamerging_steps
        self.batch_size = batch_size
        self.mask_lr = mask_lr
        self.inner_lr = inner_lr
        self.lr = lr
        self.adv_lr = adv_lr
        self.adv_weight = adv_weight
        self.eps = eps
        self.temperature = temperature
        self.initial = initial
        self.final = final
        self.safety = safety

    def merge(
        self, base: Weights, experts: Sequence[Expert], method: MergeMethod, ctx: MergeContext
    ) -> Merged:
        """The merged weights; ``info["mask_sparsity"]``: per tensor, the share of entries that the frozen mask
        leaves less than half of. ContractError where ``method`` serves tasks by a network of its own, which
        would not be DAM's."""
        if type(method).network is not MergeMethod.network:
            raise ContractError(f"dam takes the place of the merge; '{method.name}' keeps weights per task")
        blend = Blend(base, experts, ctx.backbone, ctx.device)
        coefficients = blend.coefficients(self.granularity, self.init)
        streams = streams_of(experts, self.batch_size, ctx)
        perturbations = Perturbations(
            streams_of(experts, self.batch_size, ctx, "perturb"), self.adv_lr, self.eps, "dam",
            words=word_width(ctx.backbone, base),
        )  # fmt: skip
        safety = None
        if self.adv_weight:
            robust = SAFETIES[self.safety]
            safety = Safety(blend, streams, perturbations, self.adv_weight, robust=robust)
        masks = [self._mask(blend, ctx, stream) for stream in self._noise()]
        if len(masks) == 1:
            masked = learn_mask(
                blend, masks[0], streams, coefficients, self.mask_lr, self.steps, self.inner_lr, safety
            )
        else:
            masked = self._alternate(blend, masks, streams, coefficients, safety)
        for mask in masks:
            blend.vectors.mul_(final_mask(mask, self.final))
        losses = adapt_coefficients(blend, streams, coefficients, self.lr, self.adamerging_steps, clamp=False)
        info = {
            "coefficients": means(coefficients, experts),
            "mask_loss": progress(masked),
            "entropy": progress(losses),
            "perturbation": perturbations.largest(),
            "flipped": progress(perturbations.flipped),
            **sparsities(blend, masks),
        }
        return Merged(blend.result(base), info=info)

    def _noise(self) -> tuple[int, ...]:
        return (0,) if self.masks == "single" else (0, DETECTION_STREAM)

    def _mask(self, blend: Blend, ctx: MergeContext, stream: int) -> ConcreteMask:
        mask = ConcreteMask(blend, self.temperature, ctx, stream)
        mask.logits.fill_(self.initial)
        return mask

    def _alternate(
        self,
        blend: Blend,
        masks: Sequence[ConcreteMask],
        streams: Sequence[Stream],
        start: Tensor,
        safety: Safety | None,
    ) -> list[float]:
        """Both masks in turn, each on the other's last sample; the mean loss of the detection mask's steps."""
        shared, detection = masks
        optimizers = [torch.optim.Adam([mask.logits], lr=self.mask_lr) for mask in masks]
        inner = Inner(start, self.inner_lr)
        losses = []
        for _ in range(self.steps):
            first, second = shared.sample(), detection.sample()
            coefficients = inner.step(blend, streams, first * second)
            backward(blend, streams)
            shared.logits.grad = shared.pull_back(blend.mask_gradient().mul_(second))
            optimizers[0].step()
            first = shared.sample()
            blend.assemble(coefficients, first * second)
            losses.append(backward(blend, streams) if safety is None else safety())
            detection.logits.grad = detection.pull_back(blend.mask_gradient().mul_(first))
            optimizers[1].step()
        return losses


def sparsities(blend: Blend, masks: Sequence[ConcreteMask]) -> dict[str, dict[str, float]]:
    """``{"mask_sparsity": {tensor: share of entries closed}}`` of the masks last drawn; of two masks together,
    where either closes, and then of each apart."""
    closed = [mask.closed() for mask in masks]
    named = {"mask_sparsity": torch.stack(closed).any(dim=0)}
    if len(masks) > 1:
        named |= dict(zip(("mask_sparsity_shared", "mask_sparsity_detection"), closed, strict=True))
    return {key: blend.shares(found) for key, found in named.items()}
