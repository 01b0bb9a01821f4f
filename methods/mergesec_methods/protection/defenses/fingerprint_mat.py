"""MAT: a fingerprint hardened by merge-adversarial training.

The fingerprinted expert θ_M is the teacher. Training goes on from it: in every step the present weights θ are merged with
the public base at a drawn share, θ_α = θ0 + α (θ − θ0), α ~ U(``lowest``, 1), and

    KL(f_{θ_M} ‖ f_{θ_α})

on the secret inputs, and ``penalty`` times the same on the owner's tuning inputs, is lowered by a step on θ (dθ_α / dθ = α).
What the owner publishes then answers, diluted, as the teacher does undiluted: the mark, and the task. The teacher's mark
is by default one that knows of no merging (``alpha_parameters`` 1), which is what there is to harden: MergePrint's own
dilution, trained for as many steps, leaves nothing to gain.

Source: merge-adversarial training, arXiv 2607.20435, known here from its abstract and reading notes: the merge with the
unmarked base in every step, the divergence from the marked teacher, the gradient to the present weights only. *A
reconstruction*: which inputs, the law of α, Adam and the number of steps are this benchmark's; the paper hardens marks of
language models, here it is this suite's fingerprint.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mergesec.contracts import ProtectContext, Protected, Weights
from mergesec_methods.protection.defenses.fingerprint import Fingerprint, Query, decode, diluted

CARD = {
    "extends": "fingerprint",
    "name": "fingerprint_mat",
    "class": "MergeAdversarialFingerprint",
    "version": "1",
    "title": "Fingerprint, merge-adversarial training (MAT)",
    "paper": "Merge-adversarial training of ownership marks, arXiv 2607.20435; the mark after Yamabe et al., ACL 2025",
    "url": "https://arxiv.org/abs/2607.20435",
    "summary": "reconstruction: a fingerprinted expert trained until its merges with the base answer as it does",
    "trial": {"inputs": 16, "input_steps": 10, "steps": 3, "hardening": 3},
    "parameters": {
        "alpha_parameters": {"type": "float", "default": 1.0, "min": 0.0, "max": 1.0, "doc": "α_P of the mark that is hardened; 1: a mark that knows of no merging"},
        "hardening": {"type": "int", "default": 36, "min": 0, "max": 100000, "doc": "steps of merge-adversarial training"},
        "lowest": {"type": "float", "default": 0.1, "min": 0.0, "max": 1.0, "doc": "smallest share α of the expert in the merges it is trained for"},
    },
}  # fmt: skip

HARDENING_STREAM = 2


class MergeAdversarialFingerprint(Fingerprint):
    """The defense of the card above. ``protect`` keeps keys, shapes and dtypes."""

    def __init__(
        self, hardening: int = 36, lowest: float = 0.1, alpha_parameters: float = 1.0, **given: Any
    ) -> None:
        super().__init__(alpha_parameters=alpha_parameters, **given)
        self.hardening, self.lowest = hardening, lowest

    def protect(self, weights: Weights, ctx: ProtectContext) -> Protected:
        """The fingerprinted expert after hardening. The report has the share of targets that its merge with the base
        at ``lowest`` answers before and after."""
        marked = super().protect(weights, ctx).weights
        ask, inputs = Query(ctx), decode(ctx.secret["inputs"])
        student, teacher, merged = (ask.network(marked) for _ in range(3))
        optimizer = torch.optim.Adam(student.parameters(), lr=self.rate)
        generator = ctx.generator(HARDENING_STREAM)
        before = self._left(ask, merged, student, ctx, inputs)
        for _ in range(self.hardening):
            share = self.lowest + (1 - self.lowest) * float(torch.rand((), generator=generator))
            merged.load_state_dict(diluted(ctx.base, student.state_dict(), share))
            rows = ask.rows(torch.randperm(len(ctx.view.tuning), generator=generator)[: self.batch])
            loss = self._divergence(ask, merged, teacher, inputs)
            loss = loss + self.penalty * self._divergence(ask, merged, teacher, rows)
            _pull(student, merged, loss, share)
            optimizer.step()
        after = self._left(ask, merged, student, ctx, inputs)
        published = {n: t.detach().to(weights[n]) for n, t in student.state_dict().items()}
        return Protected(published, {"answered_before": before, "answered": after})

    def _left(
        self, ask: Query, merged: nn.Module, student: nn.Module, ctx: ProtectContext, inputs: Any
    ) -> float:
        """Share of targets that the student answers when merged with the base at ``lowest``."""
        merged.load_state_dict(diluted(ctx.base, student.state_dict(), self.lowest))
        return self._answered(ask, merged, inputs, ctx.secret["targets"].to(ctx.device))


def _pull(student: nn.Module, merged: nn.Module, loss: Tensor, share: float) -> None:
    """The student's gradients of ``loss``, a function of the merged network's parameters."""
    gradients = torch.autograd.grad(loss, list(merged.parameters()), allow_unused=True)
    for parameter, gradient in zip(student.parameters(), gradients, strict=True):
        parameter.grad = None if gradient is None else share * gradient
