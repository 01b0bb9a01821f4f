"""SAU: unlearn examples that fool the merged model and its former self alike. As BackdoorBench runs it, and as
DAM's authors use it on the merged task vector."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mergesec.contracts import Defense, MergeContext, Merged, Model, Split, Weights
from mergesec_methods.backdoor.defenses._perturb import Seen, Term, square
from mergesec_methods.backdoor.defenses._repair import Patient, Rows, clone, cosine, descend
from mergesec_methods.backdoor.defenses._task_vector_mask import MaskSettings, mask_task_vector
from mergesec_methods.merging._adaptation import progress

CARDS = [
    {
        "name": "sau",
        "kind": "defense",
        "class": "SharedAdversarialUnlearning",
        "version": "2",
        "title": "Shared adversarial unlearning",
        "paper": "Wei et al., Shared adversarial unlearning: backdoor mitigation by unlearning shared adversarial examples, NeurIPS 2023",
        "url": "https://arxiv.org/abs/2307.10562",
        "summary": "fine-tune so that what fools the model no longer fools it the way it fools its former self",
        "threat": "backdoor",
        "hooks": ["repair"],
        "knowledge": "clean tuning rows of every merged task, with labels unless `labels` is pseudo",
        "data": "tuning",
        "modalities": ["image"],
        "seeded": True,
        "trial": {"steps": 2, "batch_size": 16, "adv_steps": 2},
        "parameters": {
            "share": {
                "type": "float",
                "default": 0.5,
                "min": 0.0,
                "max": 1.0,
                "doc": "share of each task's tuning rows; tuning holds a tenth of a task's rows, so half is 5 %",
            },
            "labels": {
                "type": "choice",
                "choices": ["true", "pseudo"],
                "default": "true",
                "doc": "'true': the rows' labels; 'pseudo': what the merged model says before the repair",
            },
            "steps": {
                "type": "int",
                "default": 1000,
                "min": 0,
                "max": 1000000,
                "doc": "steps (BackdoorBench: 100 rounds of ten batches)",
            },
            "batch_size": {
                "type": "int",
                "default": 256,
                "min": 1,
                "max": 65536,
                "doc": "rows per task and step",
            },
            "lr": {
                "type": "float",
                "default": 1e-4,
                "min": 0.0,
                "max": 10.0,
                "doc": "Adam's step size, falling to 0 by a cosine over the steps",
            },
            "eps": {
                "type": "float",
                "default": 0.2,
                "min": 0.0,
                "max": 1.0,
                "doc": "largest change of a pixel in [0, 1]",
            },
            "patch": {
                "type": "int",
                "default": 0,
                "min": 0,
                "max": 32,
                "secret": "attack.patch",
                "doc": "side of the square that is perturbed, in pixels of a 32-pixel image, elsewhere in every batch; 0: the whole image, as published",
            },
            "adv_lr": {
                "type": "float",
                "default": 0.2,
                "min": 0.0,
                "max": 1.0,
                "doc": "size of a sign step, in pixels of [0, 1]",
            },
            "adv_steps": {
                "type": "int",
                "default": 5,
                "min": 0,
                "max": 10000,
                "doc": "sign steps per batch, from all pixels at +eps",
            },
            "beta1": {
                "type": "float",
                "default": 0.01,
                "min": 0.0,
                "max": 1000.0,
                "doc": "weight of fooling both models, for the perturbation",
            },
            "beta2": {
                "type": "float",
                "default": 1.0,
                "min": 0.0,
                "max": 1000.0,
                "doc": "weight of fooling them alike",
            },
            "lambda1": {
                "type": "float",
                "default": 1.0,
                "min": 0.0,
                "max": 1000.0,
                "doc": "weight of the clean loss",
            },
            "lambda2": {
                "type": "float",
                "default": 0.0,
                "min": 0.0,
                "max": 1000.0,
                "doc": "weight of the loss on perturbed rows (plain adversarial training)",
            },
            "lambda3": {
                "type": "float",
                "default": 1.0,
                "min": 0.0,
                "max": 1000.0,
                "doc": "weight of the shared loss",
            },
        },
    },
    {
        "name": "sau_dam",
        "kind": "defense",
        "class": "SharedMaskedTaskVector",
        "version": "2",
        "title": "SAU on the merged task vector (DAM's authors)",
        "paper": "Yang et al., Mitigating the backdoor effect for multi-task model merging via safety-aware subspace, ICLR 2025",
        "url": "https://arxiv.org/abs/2410.13910",
        "summary": "a mask of the merged task vector, learnt without labels, that disagrees with the merge where it is fooled",
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
            "shared_weight": {
                "type": "float",
                "default": 0.01,
                "min": 0.0,
                "max": 1000.0,
                "doc": "weight of the shared loss",
            },
            "beta1": {
                "type": "float",
                "default": 0.5,
                "min": 0.0,
                "max": 1000.0,
                "doc": "weight of fooling the masked model, for the perturbation",
            },
            "beta2": {
                "type": "float",
                "default": 0.5,
                "min": 0.0,
                "max": 1000.0,
                "doc": "weight of fooling it and the merge alike",
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

PLACE_STREAM = 1
TINY = 1e-8
LEAST, MOST = 0.001, 0.999
"""Probabilities beyond these count as these in the shared loss: what they would still gain is nothing."""


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """Jensen–Shannon divergence of softmax(first) and softmax(second), in nats per row: ``[N, K]`` to ``[N]``."""
    p, q = first.softmax(dim=1).clamp(min=TINY), second.softmax(dim=1).clamp(min=TINY)
    middle = (0.5 * (p + q)).log()
    return 0.5 * (p * (p.log() - middle) + q * (q.log() - middle)).sum(dim=1)


def apart(outputs: Tensor, classes: Tensor, where: Tensor) -> Tensor:
    """−(1/B) Σ_where ½ [log Σ_{k≠c} p_k + log(1 − p_c)]: small once the rows leave class c.

    outputs ``[B, K]``, classes int64 ``[B]``, where bool ``[B]``. The two terms are one in exact arithmetic;
    they differ where p_c is near 1.
    """
    p = outputs.softmax(dim=1)
    hit = p.gather(1, classes[:, None])[:, 0]
    rest = (p.sum(dim=1) - hit).clamp(min=0.0, max=MOST)
    terms = torch.log(1e-6 + rest) + torch.log(1.0 + 1e-6 - hit.clamp(min=LEAST))
    return -0.5 * (terms * where).sum() / len(outputs)


class SharedAdversarialUnlearning(Defense):
    """Per batch: perturb every row so that model and former self are fooled alike, then
    λ1 L(x) + λ2 L(x + δ) + λ3 L_shared on the model."""

    def __init__(
        self,
        share: float,
        labels: str,
        steps: int,
        batch_size: int,
        lr: float,
        eps: float,
        patch: int,
        adv_lr: float,
        adv_steps: int,
        beta1: float,
        beta2: float,
        lambda1: float,
        lambda2: float,
        lambda3: float,
    ) -> None:
        self.share = share
        self.labels = labels
        self.steps = steps
        self.batch_size = batch_size
        self.lr = lr
        self.eps = eps
        self.patch = patch
        self.adv_lr = adv_lr
        self.adv_steps = adv_steps
        self.betas = (beta1, beta2)
        self.lambdas = (lambda1, lambda2, lambda3)

    def repair(self, merged: Merged, base: Weights, ctx: MergeContext) -> Merged:
        """The model after unlearning; ``info["sau_shared"]``: share of rows that still fooled both alike."""
        patient, former = (
            Patient(merged, ctx, self.share, self.batch_size, "sau", images=True) for _ in range(2)
        )
        former.network.requires_grad_(False)
        shared: list[float] = []
        window = square(self.patch, ctx.generator(PLACE_STREAM)) if self.patch else None

        def loss_of(rows: Rows, batch: Split) -> Tensor:
            with torch.no_grad():
                known = former.outputs(rows, batch.inputs)
            labels = batch.targets if self.labels == "true" else known.argmax(dim=1)
            where = None if window is None else window(*batch.inputs.shape[-2:]).to(batch.inputs)
            moved = self._perturbed(patient, former, rows, batch.inputs, labels, known.argmax(dim=1), where)
            with torch.no_grad():
                fooled = former.outputs(rows, moved).argmax(dim=1)
            clean, perturbed = patient.outputs(rows, torch.cat([batch.inputs, moved])).chunk(2)
            leads = (fooled != labels) & (fooled != known.argmax(dim=1))
            alike = leads & (perturbed.argmax(dim=1) == fooled)
            shared.append(float(alike.float().mean()))
            loss = rows.view.task.loss
            first, second, third = self.lambdas
            total = first * loss(clean, labels) + third * apart(perturbed, fooled, leads)
            return total + second * loss(perturbed, labels) if second else total

        optimizer = torch.optim.Adam(patient.network.parameters(), lr=self.lr)
        losses = descend(patient, optimizer, self.steps, loss_of, cosine)
        return patient.finish({"sau_loss": progress(losses), "sau_shared": progress(shared)})

    def _perturbed(
        self,
        patient: Patient,
        former: Patient,
        rows: Rows,
        images: Tensor,
        labels: Tensor,
        known: Tensor,
        where: Tensor | None = None,
    ) -> Tensor:
        """Every image with its own δ, |δ| ≤ eps (and 0 outside of ``where``), in [0, 1], after sign steps from
        all pixels at +eps.

        Downhill on β1 · L_adv + β2 · L_share: L_adv = −½ Σ CE of the models that are not fooled yet, L_share
        the divergence between the models' outputs where they are not fooled alike.
        """
        with torch.no_grad():
            now = patient.outputs(rows, images).argmax(dim=1)
        bound = self.eps if where is None else self.eps * where
        moved = (images + bound).clamp(0.0, 1.0)
        for _ in range(self.adv_steps):
            leaf = moved.requires_grad_()
            own, old = patient.outputs(rows, leaf), former.outputs(rows, leaf)
            tricked, duped = own.argmax(dim=1) != now, old.argmax(dim=1) != known
            alike = tricked & duped & (own.argmax(dim=1) == old.argmax(dim=1))
            adverse = -0.5 * (
                functional.cross_entropy(own, labels, reduction="none") * ~tricked
                + functional.cross_entropy(old, labels, reduction="none") * ~duped
            )
            loss = (self.betas[0] * adverse + self.betas[1] * divergence(own, old) * ~alike).sum()
            (slope,) = torch.autograd.grad(loss, leaf)
            stepped = leaf.detach() - self.adv_lr * slope.sign()
            low, high = (images - bound).clamp(min=0.0), (images + bound).clamp(max=1.0)
            moved = torch.minimum(torch.maximum(stepped, low), high)
            if bool(alike.all()):
                break
        return moved.detach()


class SharedMaskedTaskVector(Defense):
    """The mask of ``awm_dam`` with SAU's two terms; the merge before the repair is the model to disagree with."""

    def __init__(
        self,
        steps: int,
        batch_size: int,
        lr: float,
        adv_lr: float,
        adv_weight: float,
        shared_weight: float,
        beta1: float,
        beta2: float,
        eps: float,
        temperature: float,
        final: str,
        safety: str = "published",
    ) -> None:
        self.settings = MaskSettings(
            steps, batch_size, lr, adv_lr, adv_weight, eps, temperature, final, safety
        )
        self.shared_weight = shared_weight
        self.betas = (beta1, beta2)

    def repair(self, merged: Merged, base: Weights, ctx: MergeContext) -> Merged:
        """The merge under the mask; see ``mask_task_vector``."""

        def terms() -> tuple[Term, Term]:
            former = Model(ctx.backbone, clone(merged, ctx, "sau_dam"))

            def leave(seen: Seen) -> Tensor:
                return self.shared_weight * left(seen, former)

            return (lambda seen: fooled_alike(seen, former, self.betas)), leave

        return mask_task_vector(merged, base, ctx, self.settings, "sau_dam", terms)


def fooled_alike(seen: Seen, former: Model, betas: tuple[float, float]) -> Tensor:
    """What δ climbs: β1 · the masked model's mean CE against its own clean prediction, − β2 · the mean over the
    batch of the divergence from the former model where the two are not fooled alike (0 where they are)."""
    with torch.no_grad():
        known = seen.stream.outputs(former, seen.images).argmax(dim=1)
    own, old = seen.perturbed, seen.stream.outputs(former, seen.moved)
    now, led = seen.clean.argmax(dim=1), own.argmax(dim=1)
    alike = (led != now) & (old.argmax(dim=1) != known) & (led == old.argmax(dim=1))
    adverse = functional.cross_entropy(own, now)
    unlike = (divergence(own, old) * ~alike).mean()
    value: Tensor = betas[0] * adverse - betas[1] * unlike
    return value


def left(seen: Seen, former: Model) -> Tensor:
    """The shared loss (``apart``) on rows whose former prediction δ leads to another class: neither the former
    model's clean one nor the masked model's own, which is right to stay there."""
    with torch.no_grad():
        known, fooled = (seen.stream.outputs(former, x).argmax(dim=1) for x in (seen.images, seen.moved))
    return apart(seen.perturbed, fooled, (fooled != known) & (fooled != seen.clean.argmax(dim=1)))
