"""AWM: soften the weights that an input perturbation leans on. As published, and as DAM's authors use it."""

from __future__ import annotations

import torch
from torch import Tensor

from mergesec.contracts import ContractError, Defense, MergeContext, Merged, Split, Weights
from mergesec_methods.backdoor.defenses._perturb import universal
from mergesec_methods.backdoor.defenses._repair import Patient, Rows, constant, descend
from mergesec_methods.backdoor.defenses._task_vector_mask import MaskSettings, mask_task_vector
from mergesec_methods.merging._adaptation import progress

CARDS = [
    {
        "name": "awm",
        "kind": "defense",
        "class": "AdversarialWeightMasking",
        "version": "2",
        "title": "Adversarial weight masking",
        "paper": "Chai and Chen, One-shot neural backdoor erasing via adversarial weight masking, NeurIPS 2022",
        "url": "https://arxiv.org/abs/2207.04497",
        "summary": "a soft mask of the weights, learnt on clean rows with and without a universal perturbation",
        "threat": "backdoor",
        "hooks": ["repair"],
        "knowledge": "clean labelled tuning rows of every merged task",
        "data": "tuning",
        "modalities": ["image"],
        "seeded": True,
        "trial": {"rounds": 1, "inner_steps": 2, "batch_size": 16},
        "parameters": {
            "share": {
                "type": "float",
                "default": 0.5,
                "min": 0.0,
                "max": 1.0,
                "doc": "share of each task's tuning rows; tuning holds a tenth of a task's rows, so half is 5 %",
            },
            "rounds": {
                "type": "int",
                "default": 20,
                "min": 0,
                "max": 100000,
                "doc": "times a perturbation is found and masked away",
            },
            "inner_steps": {
                "type": "int",
                "default": 15,
                "min": 1,
                "max": 100000,
                "doc": "steps per round, for the perturbation and again for the mask (authors: five passes over 500 rows, three whole batches each)",
            },
            "batch_size": {
                "type": "int",
                "default": 128,
                "min": 1,
                "max": 65536,
                "doc": "rows per task and step",
            },
            "lr": {
                "type": "float",
                "default": 0.01,
                "min": 0.0,
                "max": 10.0,
                "doc": "Adam's step size for the mask",
            },
            "decay": {
                "type": "float",
                "default": 1.0,
                "min": 0.0,
                "max": 1.0,
                "doc": "factor of the step size after each round; 1: none (two commits of the authors' code that could be read: 0.9)",
            },
            "alpha": {
                "type": "float",
                "default": 0.9,
                "min": 0.0,
                "max": 1.0,
                "doc": "weight of the clean loss; the perturbed one has 1 − alpha",
            },
            "gamma": {
                "type": "float",
                "default": 1e-8,
                "min": 0.0,
                "max": 1.0,
                "doc": "weight of the mask's L1 norm",
            },
            "adv_lr": {
                "type": "float",
                "default": 10.0,
                "min": 0.0,
                "max": 1000.0,
                "doc": "SGD's step size for the perturbation, in pixels of [0, 1]",
            },
            "norm": {
                "type": "float",
                "default": 1000.0,
                "min": 0.0,
                "max": 1e6,
                "doc": "largest L1 norm of the perturbation, for 3×32×32 pixels (larger images: the same per pixel)",
            },
        },
    },
    {
        "name": "awm_dam",
        "kind": "defense",
        "class": "MaskedTaskVector",
        "version": "1",
        "title": "AWM on the merged task vector (DAM's authors)",
        "paper": "Yang et al., Mitigating the backdoor effect for multi-task model merging via safety-aware subspace, ICLR 2025",
        "url": "https://arxiv.org/abs/2410.13910",
        "summary": "a mask of the merged task vector, learnt without labels: sure predictions, perturbed or not",
        "threat": "backdoor",
        "hooks": ["repair"],
        "knowledge": "unlabelled inputs of every merged task",
        "data": "tuning",
        "unlabelled": True,
        "modalities": ["image"],
        "seeded": True,
        "trial": {"steps": 3},
        "parameters": {
            "steps": {"type": "int", "default": 2000, "min": 0, "max": 1000000, "doc": "steps of the mask"},
            "batch_size": {
                "type": "int",
                "default": 16,
                "min": 1,
                "max": 65536,
                "doc": "unlabelled inputs per task and batch; two batches per step",
            },
            "lr": {
                "type": "float",
                "default": 0.001,
                "min": 0.0,
                "max": 10.0,
                "doc": "Adam's step size for the mask's logits",
            },
            "adv_lr": {
                "type": "float",
                "default": 0.0001,
                "min": 0.0,
                "max": 1.0,
                "doc": "Adam's step size for the perturbations, in pixels of [0, 1]",
            },
            "adv_weight": {
                "type": "float",
                "default": 0.01,
                "min": 0.0,
                "max": 1000.0,
                "doc": "weight of the entropy on perturbed inputs",
            },
            "eps": {
                "type": "float",
                "default": 0.2,
                "min": 0.0,
                "max": 1.0,
                "doc": "largest change of a pixel in [0, 1]; the default is what 2000 released steps can reach",
            },
            "temperature": {
                "type": "float",
                "default": 0.5,
                "min": 0.001,
                "max": 100.0,
                "doc": "temperature of the relaxed Bernoulli distribution",
            },
            "final": {
                "type": "choice",
                "choices": ["continuous", "discrete", "mean"],
                "default": "continuous",
                "doc": "the repaired model's mask: a relaxed sample (as released), a 0/1 sample, or their mean",
            },
            "safety": {
                "type": "choice",
                "choices": ["published", "agreement"],
                "default": "published",
                "later": True,
                "doc": "on perturbed inputs: the entropy, or the cross-entropy to the clean prediction",
            },
        },
    },
]

REFERENCE_PIXELS = 3 * 32 * 32


class AdversarialWeightMasking(Defense):
    """min_{m ∈ [0, 1]} α L(x; m ⊙ w) + (1 − α) max_{‖δ‖₁ ≤ τ} L(x + δ; m ⊙ w) + γ ‖m‖₁.

    Masked are the weights of the linear maps that the anatomy names (the authors mask convolutions).
    """

    def __init__(
        self,
        share: float,
        rounds: int,
        inner_steps: int,
        batch_size: int,
        lr: float,
        decay: float,
        alpha: float,
        gamma: float,
        adv_lr: float,
        norm: float,
    ) -> None:
        self.share = share
        self.rounds = rounds
        self.inner_steps = inner_steps
        self.batch_size = batch_size
        self.lr = lr
        self.decay = decay
        self.alpha = alpha
        self.gamma = gamma
        self.adv_lr = adv_lr
        self.norm = norm

    def repair(self, merged: Merged, base: Weights, ctx: MergeContext) -> Merged:
        """The masked model; ``info["mask_sparsity"]``: per tensor, the share of entries below a half."""
        patient = Patient(merged, ctx, self.share, self.batch_size, "awm", images=True)
        patient.network.requires_grad_(False)
        own = patient.weights()
        names = ctx.backbone.anatomy().matrices
        if not names:
            raise ContractError("awm: the backbone's anatomy names no linear map to mask")
        masks = {n: torch.ones_like(own[n], requires_grad=True) for n in names}
        optimizer = torch.optim.Adam(list(masks.values()), lr=self.lr)

        def masked() -> dict[str, Tensor]:
            return {n: m * own[n] for n, m in masks.items()}

        def clip() -> None:
            for mask in masks.values():
                mask.clamp_(0.0, 1.0)

        losses: list[float] = []
        for turn in range(self.rounds):
            optimizer.param_groups[0]["lr"] = self.lr * self.decay**turn
            with torch.no_grad():
                now = masked()
            deltas = {rows.name: self._perturbation(patient, rows, now) for rows in patient.rows}

            def loss_of(rows: Rows, batch: Split, deltas: dict[str, Tensor] = deltas) -> Tensor:
                size = torch.stack([mask.sum() for mask in masks.values()]).sum()
                loss = self._loss(patient, rows, batch, deltas[rows.name], masked())
                return loss + self.gamma * size  # masks are not negative

            losses += descend(patient, optimizer, self.inner_steps, loss_of, constant, clip)
        closed = {n: float((m.detach() < 0.5).float().mean()) for n, m in masks.items()}
        with torch.no_grad():
            return patient.finish({"awm_loss": progress(losses), "mask_sparsity": closed}, masked())

    def _perturbation(self, patient: Patient, rows: Rows, weights: Weights) -> Tensor:
        """δ ``[C, H, W]``, scaled down to the L1 norm."""
        delta = universal(patient, rows, self.adv_lr, self.inner_steps, weights=weights)
        bound = self.norm * delta.numel() / REFERENCE_PIXELS
        return delta * min(1.0, bound / max(float(delta.abs().sum()), 1e-12))

    def _loss(self, patient: Patient, rows: Rows, batch: Split, delta: Tensor, weights: Weights) -> Tensor:
        """α L(x) + (1 − α) L(x + δ), in one forward."""
        both = torch.cat([batch.inputs, (batch.inputs + delta).clamp(0.0, 1.0)])
        clean, perturbed = patient.outputs(rows, both, weights).chunk(2)
        loss = rows.view.task.loss
        return self.alpha * loss(clean, batch.targets) + (1 - self.alpha) * loss(perturbed, batch.targets)


class MaskedTaskVector(Defense):
    """Σ_t [H(f(x_t)) + w H(f(x_t + δ_t))] over a mask of the merged task vector; no labels, no neurons."""

    def __init__(
        self,
        steps: int,
        batch_size: int,
        lr: float,
        adv_lr: float,
        adv_weight: float,
        eps: float,
        temperature: float,
        final: str,
        safety: str = "published",
    ) -> None:
        self.settings = MaskSettings(
            steps, batch_size, lr, adv_lr, adv_weight, eps, temperature, final, safety
        )

    def repair(self, merged: Merged, base: Weights, ctx: MergeContext) -> Merged:
        """The merge under the mask; see ``mask_task_vector``."""
        return mask_task_vector(merged, base, ctx, self.settings, "awm_dam")
