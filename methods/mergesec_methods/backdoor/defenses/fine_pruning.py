"""Fine-pruning: drop the hidden units that clean inputs leave asleep, then fine-tune."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mergesec.anatomy import Mlp
from mergesec.contracts import ContractError, Defense, MergeContext, Merged, Weights
from mergesec_methods.backdoor.defenses._repair import SCORE_BATCH, Patient, Sgd, descend
from mergesec_methods.merging._adaptation import progress

CARD = {
    "extends": "ft",
    "name": "fine_pruning",
    "class": "FinePruning",
    "title": "Fine-pruning",
    "paper": "Liu et al., Fine-pruning: defending against backdooring attacks on deep neural networks, RAID 2018",
    "url": "https://arxiv.org/abs/1805.12185",
    "summary": "prune hidden units by their mean activation on clean rows, then fine-tune",
    "trial": {"steps": 4, "batch_size": 16, "prune_step": 0.2},
    "parameters": {
        "layers": {"type": "choice", "choices": ["last", "all"], "default": "all", "doc": "whose hidden units: every block's MLP in one ranking, or the last block's (which a network may hardly need: then acc_ratio stops nothing)"},
        "prune_step": {"type": "float", "default": 0.01, "min": 0.0001, "max": 1.0, "doc": "share of the units pruned between two looks at the accuracy"},
        "acc_ratio": {"type": "float", "default": 0.1, "min": 0.0, "max": 1.0, "doc": "stop before the accuracy on the same rows falls by this share of itself"},
        "steps": {"doc": "steps of fine-tuning"},
    },
}  # fmt: skip


def activity(patient: Patient, mlps: Sequence[Mlp]) -> Tensor:
    """Mean |activation| of every hidden unit over all tasks' rows and tokens, units of all ``mlps`` in a row ``[U]``.

    Activations are what the MLP's last map is fed. Tasks count alike.
    """
    sums = [torch.zeros(mlp.hidden, device=patient.rows[0].device) for mlp in mlps]
    share = [0.0]
    handles = []
    for total, mlp in zip(sums, mlps, strict=True):
        module = patient.network.get_submodule(mlp.down.weight.rpartition(".")[0])

        def add(module: object, inputs: tuple[Tensor, ...], total: Tensor = total) -> None:
            total.add_(inputs[0].detach().abs().flatten(0, -2).mean(dim=0), alpha=share[0])

        handles.append(module.register_forward_pre_hook(add))
    try:
        with torch.no_grad():
            for rows in patient.rows:
                for index in torch.split(torch.arange(len(rows.split)), SCORE_BATCH):
                    share[0] = len(index) / len(rows.split) / len(patient.rows)
                    patient.outputs(rows, rows.at(index).inputs)
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(sums)


class Units:
    """The hidden units of some MLPs in one numbering; a pruned unit has weight row and bias 0 and passes nothing on."""

    def __init__(self, patient: Patient, mlps: Sequence[Mlp]) -> None:
        self.weights, self.mlps = patient.weights(), mlps

    def closed(self, units: Tensor) -> dict[str, Tensor]:
        """The tensors of the MLPs with ``units`` (int64) pruned; copies."""
        changed: dict[str, Tensor] = {}
        first = 0
        for mlp in self.mlps:
            own = units[(units >= first) & (units < first + mlp.hidden)] - first
            first += mlp.hidden
            offset = mlp.up.rows[0] if mlp.up.rows else 0
            for name in (mlp.up.weight, mlp.up.bias):
                if name is not None and len(own):
                    tensor = changed.get(name, self.weights[name].detach())
                    changed[name] = tensor.index_fill(0, offset + own, 0.0)
        return changed


class FinePruning(Defense):
    """Units go in the order of their activity, as many as the accuracy allows; then SGD with them kept at 0."""

    def __init__(
        self,
        share: float,
        layers: str,
        prune_step: float,
        acc_ratio: float,
        steps: int,
        batch_size: int,
        lr: float,
        momentum: float,
        weight_decay: float,
    ) -> None:
        self.share = share
        self.layers = layers
        self.prune_step = prune_step
        self.acc_ratio = acc_ratio
        self.steps = steps
        self.batch_size = batch_size
        self.sgd = Sgd(lr, momentum, weight_decay)

    def repair(self, merged: Merged, base: Weights, ctx: MergeContext) -> Merged:
        """The pruned and fine-tuned model; ``info["fine_pruning_pruned"]``: units pruned, of how many;
        ``fine_pruning_stopped``: by the accuracy, or because there was no unit left."""
        patient = Patient(merged, ctx, self.share, self.batch_size, "fine_pruning")
        blocks = ctx.backbone.anatomy().blocks
        if not blocks:
            raise ContractError("fine_pruning: the backbone's anatomy names no block to prune")
        mlps = [b.mlp for b in (blocks if self.layers == "all" else blocks[-1:])]
        units = Units(patient, mlps)
        order = torch.argsort(activity(patient, mlps), stable=True)
        pruned, stopped = self._pruned(patient, units, order)

        def hold() -> None:
            for name, tensor in units.closed(pruned).items():
                units.weights[name].copy_(tensor)

        with torch.no_grad():
            hold()
        optimizer = self.sgd.optimizer(patient.network.parameters())
        losses = descend(patient, optimizer, self.steps, patient.loss, after=hold)
        info = {
            "fine_pruning_loss": progress(losses),
            "fine_pruning_pruned": [len(pruned), len(order)],
            "fine_pruning_stopped": stopped,
        }
        return patient.finish(info)

    def _pruned(self, patient: Patient, units: Units, order: Tensor) -> tuple[Tensor, str]:
        """The longest run of the least active units, in whole steps, that the accuracy allows; what ended it."""
        before = patient.accuracy()
        step = math.ceil(self.prune_step * len(order))
        kept = 0
        for count in range(step, len(order), step):
            if before - patient.accuracy(units.closed(order[:count])) > self.acc_ratio * before:
                return order[:kept], "accuracy"
            kept = count
        return order[:kept], "no unit left"
