"""ANP: prune the neurons that a small change of the weights turns against clean inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mergesec.anatomy import Anatomy, Linear
from mergesec.contracts import ContractError, Defense, MergeContext, Merged, Split, Weights
from mergesec_methods.backdoor.defenses._repair import Patient, Rows, slope
from mergesec_methods.backdoor.defenses.clp import layers_of
from mergesec_methods.merging._adaptation import progress

CARD = {
    "extends": "ft",
    "name": "anp",
    "class": "AdversarialNeuronPruning",
    "title": "Adversarial neuron pruning",
    "paper": "Wu and Wang, Adversarial neuron pruning purifies backdoored deep models, NeurIPS 2021",
    "url": "https://arxiv.org/abs/2110.14430",
    "summary": "learn a mask of neurons under the worst small change of their weights, prune what it closes",
    "trial": {"steps": 5, "batch_size": 16, "pruning_step": 0.3},
    "parameters": {
        "steps": {"default": 2000, "doc": "steps that learn the mask"},
        "lr": {"doc": "SGD's step size for the mask: BackdoorBench's (the authors' own release: 0.2)"},
        "eps": {"type": "float", "default": 0.4, "min": 0.0, "max": 10.0, "doc": "largest relative change of a neuron's weights"},
        "eps_steps": {"type": "int", "default": 1, "min": 1, "max": 1000, "doc": "sign steps that look for the worst change, each of eps / eps_steps"},
        "alpha": {"type": "float", "default": 0.2, "min": 0.0, "max": 1.0, "doc": "weight of the loss without the change; the loss with it has 1 − alpha"},
        "pruning_max": {"type": "float", "default": 0.9, "min": 0.0, "max": 1.0, "doc": "highest threshold of the mask (BackdoorBench's); 1: acc_ratio alone stops the pruning"},
        "pruning_step": {"type": "float", "default": 0.05, "min": 0.001, "max": 1.0, "doc": "thresholds are tried in these steps from 0"},
        "acc_ratio": {"type": "float", "default": 0.1, "min": 0.0, "max": 1.0, "doc": "stop before the accuracy on the same rows falls by this share of itself"},
        "layers": {"type": "choice", "choices": ["inner", "all"], "default": "inner", "doc": "'inner': MLP hidden units, value channels; 'all': also maps that write to the residual"},
        "momentum": None,
        "weight_decay": None,
    },
}  # fmt: skip

NOISE_STREAM = 1
MOMENTUM = 0.9


def neurons(anatomy: Anatomy, scope: str) -> dict[str, Linear]:
    """The linear maps whose output channels count as neurons: ``"block/map"`` → map."""
    return {f"{b.index}/{label}": layer for b in anatomy.blocks for label, layer in layers_of(b, scope)}


def scaled(
    weights: Mapping[str, Tensor],
    layers: Sequence[Linear],
    gains: Sequence[Tensor],
    offsets: Sequence[Tensor],
) -> dict[str, Tensor]:
    """The tensors of ``layers`` with weight row k times ``gains[k]`` and bias k times ``offsets[k]``,
    differentiable; packed maps change their own rows only."""
    changed: dict[str, Tensor] = {}
    for layer, gain, offset in zip(layers, gains, offsets, strict=True):
        for name, factor in ((layer.weight, gain), (layer.bias, offset)):
            if name is None:
                continue
            tensor = changed.get(name, weights[name])
            start, stop = layer.rows or (0, tensor.shape[0])
            rows = tensor[start:stop] * (factor[:, None] if tensor.ndim > 1 else factor)
            changed[name] = torch.cat([tensor[:start], rows, tensor[stop:]])
    return changed


class NeuronMask:
    """One gain in [0, 1] per neuron, and the relative change of its weight and bias that hurts most."""

    def __init__(self, patient: Patient, layers: Mapping[str, Linear], eps: float) -> None:
        self.patient, self.layers, self.eps = patient, list(layers.values()), eps
        self.weights = {n: t.detach() for n, t in patient.weights().items()}
        device = next(iter(self.weights.values())).device
        sizes = [self._size(layer) for layer in self.layers]
        self.gains = [torch.ones(size, device=device, requires_grad=True) for size in sizes]
        self.noise = [torch.zeros(size, device=device) for size in (*sizes, *sizes)]
        """Changes of the weights, then of the biases; in [−eps, eps]."""

    def _size(self, layer: Linear) -> int:
        start, stop = layer.rows or (0, self.weights[layer.weight].shape[0])
        return stop - start

    def changed(self, noise: Sequence[Tensor]) -> dict[str, Tensor]:
        """(m + δ) ⊙ w and (1 + ξ) ⊙ b, by name."""
        count = len(self.layers)
        gains = [g + n for g, n in zip(self.gains, noise[:count], strict=True)]
        return scaled(self.weights, self.layers, gains, [1.0 + n for n in noise[count:]])

    def masked(self) -> dict[str, Tensor]:
        """m ⊙ w and b, by name."""
        return scaled(self.weights, self.layers, self.gains, [torch.ones_like(g) for g in self.gains])

    def attack(self, batches: list[tuple[Rows, Split]], steps: int, generator: torch.Generator) -> None:
        """Changes from a random start uphill on the loss, by signs of the gradient."""
        for held in self.noise:
            drawn = torch.rand(held.shape, generator=generator).to(held.device)
            held.copy_(drawn.mul_(2 * self.eps).sub_(self.eps))
        for _ in range(steps):
            leaves = [n.clone().requires_grad_() for n in self.noise]
            slope(self.patient, batches, lambda r, b: self.patient.loss(r, b, self.changed(leaves)))  # noqa: B023
            for held, leaf in zip(self.noise, leaves, strict=True):
                if leaf.grad is not None:
                    held.add_(leaf.grad.sign(), alpha=self.eps / steps).clamp_(-self.eps, self.eps)

    def pruned(self, threshold: float) -> tuple[dict[str, Tensor], list[int]]:
        """The tensors with the weight rows of neurons at or below the threshold at 0; how many per layer."""
        closed = [g.detach() <= threshold for g in self.gains]
        kept = [(~c).float() for c in closed]
        with torch.no_grad():
            tensors = scaled(self.weights, self.layers, kept, [torch.ones_like(k) for k in kept])
        return tensors, [int(c.sum()) for c in closed]


class AdversarialNeuronPruning(Defense):
    """min_m α L(m ⊙ w, b) + (1 − α) max_{|δ|,|ξ| ≤ ε} L((m + δ) ⊙ w, (1 + ξ) ⊙ b), then m ≤ threshold is pruned."""

    def __init__(
        self,
        share: float,
        steps: int,
        batch_size: int,
        lr: float,
        eps: float,
        eps_steps: int,
        alpha: float,
        pruning_max: float,
        pruning_step: float,
        acc_ratio: float,
        layers: str,
    ) -> None:
        self.share = share
        self.steps = steps
        self.batch_size = batch_size
        self.lr = lr
        self.eps = eps
        self.eps_steps = eps_steps
        self.alpha = alpha
        self.pruning_max = pruning_max
        self.pruning_step = pruning_step
        self.acc_ratio = acc_ratio
        self.layers = layers

    def repair(self, merged: Merged, base: Weights, ctx: MergeContext) -> Merged:
        """The pruned model; ``info["anp_pruned"]``: neurons pruned per layer, ``anp_threshold``: the mask's bound
        (−1: nothing could be pruned), ``anp_stopped``: by the accuracy, or at ``pruning_max``."""
        patient = Patient(merged, ctx, self.share, self.batch_size, "anp")
        patient.network.requires_grad_(False)
        layers = neurons(ctx.backbone.anatomy(), self.layers)
        if not layers:
            raise ContractError("anp: the backbone's anatomy names no block to prune")
        mask = NeuronMask(patient, layers, self.eps)
        losses = self._learn(patient, mask, ctx)
        threshold, tensors, counts, stopped = self._prune(patient, mask)
        pruned = {label: count for label, count in zip(layers, counts, strict=True) if count}
        info = {
            "anp_loss": progress(losses),
            "anp_threshold": threshold,
            "anp_pruned": pruned,
            "anp_stopped": stopped,
        }
        return patient.finish(info, tensors)

    def _learn(self, patient: Patient, mask: NeuronMask, ctx: MergeContext) -> list[float]:
        optimizer = torch.optim.SGD(mask.gains, lr=self.lr, momentum=MOMENTUM)
        generator = ctx.generator(NOISE_STREAM)

        def loss_of(rows: Rows, batch: Split) -> Tensor:
            clean = patient.loss(rows, batch, mask.masked())
            if not self.eps:
                return self.alpha * clean
            return self.alpha * clean + (1 - self.alpha) * patient.loss(rows, batch, mask.changed(mask.noise))

        losses = []
        for _ in range(self.steps):
            batches = patient.draw()
            if self.eps:
                mask.attack(batches, self.eps_steps, generator)
            optimizer.zero_grad()
            losses.append(slope(patient, batches, loss_of))
            optimizer.step()
            with torch.no_grad():
                for gain in mask.gains:
                    gain.clamp_(0.0, 1.0)
        return losses

    def _prune(self, patient: Patient, mask: NeuronMask) -> tuple[float, dict[str, Tensor], list[int], str]:
        """The highest threshold reached before accuracy falls too far, its tensors and counts, what ended it."""
        before = patient.accuracy()
        best, tensors, counts = -1.0, dict[str, Tensor](), [0] * len(mask.layers)
        for index in range(round(self.pruning_max / self.pruning_step) + 1):
            threshold = index * self.pruning_step
            tried, found = mask.pruned(threshold)
            if found != counts and before - patient.accuracy(tried) > self.acc_ratio * before:
                return best, tensors, counts, "accuracy"
            best, tensors, counts = threshold, tried, found
        return best, tensors, counts, "pruning_max"
