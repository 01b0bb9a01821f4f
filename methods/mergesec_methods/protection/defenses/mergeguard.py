"""MergeGuard: spread the task's information by an L2 penalty, then take part of the task vector back.

Stage 1 (training) adds a penalty on every layer's weights:  L = L_task + α Σ_l ‖θ^l‖².
Stage 2 (no training) goes back along the task vector τ = θ' − θ_base where a mask M says so:

    θ̂ = θ' − β · M ⊙ τ

M is 0 on the top k' % most critical layers, by the accuracy lost when a layer is masked, and on the (1 − k)(1 − k') least
important parameters; so it is 1 on the k most important of the rest, a share k (1 − k') of all parameters: 9 % with the
published k' = 10 %, k = 0.1, α = 0.01, β = 1.

Source: "Defending Unauthorized Model Merging via Dual-Stage Weight Protection", CVPR 2026 (arXiv 2511.11851), through a
published summary with formulas and settings; no code was released. *Reconstructions*, where the summary leaves a choice:

* a layer is a transformer block, and everything outside of the blocks is one more (``layers: tensor`` takes every tensor
  as a layer): the paper names embeddings, last norm and head as what is kept out for language models, which is what lies
  outside of a language model's layers. ``outside: false`` keeps all of that out of M;
* a layer is masked by giving it the base's weights, so what is measured is its share of the task vector; equal accuracy is
  decided by the loss. k' % of the layers is rounded up;
* importance of a parameter is |τ|, and the k most important are counted over all remaining layers together;
* Σ_l ‖θ^l‖² runs over everything that is trained.

With β = 1 the task vector is *gone* where M is 1, and those are its largest entries: the stand-alone accuracy has to be
looked at, and is in the report, on the owner's tuning split, before and after. α times a sum over all parameters is a strong
pull: under Adam, where the loss hardly depends on a weight, the penalty decides its direction alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergesec.anatomy import Anatomy
from mergesec.contracts import (
    Defense,
    Model,
    ProtectContext,
    Protected,
    Split,
    TrainContext,
    Weights,
    load_network,
)
from mergesec.weights import mergeable, owners
from mergesec_methods._training import squared_norm
from mergesec_methods.merging._blocks import block_paths

CARD = {
    "name": "mergeguard",
    "kind": "defense",
    "class": "MergeGuard",
    "version": "1",
    "title": "MergeGuard",
    "paper": "Defending Unauthorized Model Merging via Dual-Stage Weight Protection, CVPR 2026",
    "url": "https://arxiv.org/abs/2511.11851",
    "summary": "fine-tune with an L2 penalty, then undo the task vector at its largest entries outside critical layers",
    "threat": "protection",
    "hooks": ["train", "protect"],
    "knowledge": "the owner's training and tuning data and the public base; retrains the expert",
    "data": "tuning",
    "modalities": ["image", "text", "generation"],
    "seeded": False,
    "trial": {"rows": 32},
    "parameters": {
        "penalty": {"type": "float", "default": 0.01, "min": 0.0, "max": 100.0, "doc": "α of stage 1"},
        "critical": {
            "type": "float",
            "default": 10.0,
            "min": 0.0,
            "max": 100.0,
            "doc": "k': share of the layers left alone, in percent, rounded up to whole layers",
        },
        "share": {
            "type": "float",
            "default": 0.1,
            "min": 0.0,
            "max": 1.0,
            "doc": "k: share of the other layers' parameters that is changed, the most important ones",
        },
        "negation": {
            "type": "float",
            "default": 1.0,
            "min": 0.0,
            "max": 10.0,
            "doc": "β: how far back; 1 is the base, 2 the mirror image",
        },
        "layers": {
            "type": "choice",
            "default": "block",
            "choices": ["block", "tensor"],
            "doc": "what counts as a layer",
        },
        "outside": {"type": "bool", "default": True, "doc": "also change what lies outside of the blocks"},
        "rows": {
            "type": "int",
            "default": 512,
            "min": 0,
            "max": 1000000,
            "doc": "tuning rows that layers are measured on, evenly spaced; 0 = all",
        },
    },
}

BATCH = 256
OUTSIDE = "outside of the blocks"


@dataclass(frozen=True)
class Score:
    """Accuracy, in [0, 1], and mean loss on the owner's tuning rows."""

    accuracy: float
    loss: float


class MergeGuard(Defense):
    """The defense of the card above."""

    hooks = ("train", "protect")

    def __init__(
        self,
        penalty: float = 0.01,
        critical: float = 10.0,
        share: float = 0.1,
        negation: float = 1.0,
        layers: str = "block",
        outside: bool = True,
        rows: int = 512,
    ) -> None:
        self.penalty, self.critical, self.share, self.negation = penalty, critical, share, negation
        self.layers, self.outside, self.rows = layers, outside, rows

    def train(self, ctx: TrainContext) -> Weights:
        """Stage 1: the expert, trained on the task's loss and the penalty."""
        head = {k: v.to(ctx.device) for k, v in ctx.head.items()}

        def loss(model: Model, batch: Split) -> Tensor:
            task = ctx.task.loss(ctx.task.outputs(model, head, batch.inputs), batch.targets)
            return task + self.penalty * squared_norm(model.network)

        return ctx.fit(loss=loss)

    def protect(self, weights: Weights, ctx: ProtectContext) -> Protected:
        """Stage 2. The report has the critical layers and what each layer is worth, the share of parameters
        changed, the length of the task vector that is left, and the tuning accuracy before and after."""
        judge = Judge(weights, ctx, self.rows)
        groups = layer_groups(weights, judge.tied, ctx.backbone.anatomy(), self.layers, self.outside)
        before = judge.score(weights)
        masked = {
            layer: judge.score({**weights, **{n: ctx.base[n] for n in names}})
            for layer, names in groups.items()
        }
        spared = most_critical(masked, self.critical)
        candidates = [n for layer, names in groups.items() if layer not in spared for n in names]
        mask = largest(weights, ctx.base, [n for n in candidates if n not in judge.tied], self.share)
        published = {
            n: retract(t, ctx.base[n], mask.get(judge.tied.get(n, n)), self.negation)
            for n, t in weights.items()
        }
        after = judge.score(published)
        total = sum(t.numel() for n, t in weights.items() if mergeable(t) and n not in judge.tied)
        facts = {
            "critical": spared,
            "accuracy_lost": {layer: before.accuracy - score.accuracy for layer, score in masked.items()},
            "changed": sum(int(m.sum()) for m in mask.values()) / total,
            "task_vector_left": _length(published, ctx.base) / max(_length(weights, ctx.base), 1e-30),
            "accuracy_before": before.accuracy,
            "accuracy_after": after.accuracy,
            "loss_before": before.loss,
            "loss_after": after.loss,
        }
        return Protected(published, facts)


class Judge:
    """Scores versions of an expert on the owner's tuning rows. One network serves them all."""

    def __init__(self, weights: Weights, ctx: ProtectContext, rows: int) -> None:
        self.view, self.device = ctx.view, ctx.device
        count = len(ctx.view.tuning)
        self.rows = torch.linspace(0, count - 1, min(rows or count, count)).round().long()
        self.head = {k: v.to(ctx.device) for k, v in ctx.view.head.items()}
        self.model = Model(ctx.backbone, load_network(ctx.backbone, weights).to(ctx.device))
        self.tied = owners(self.model.network.state_dict())
        """Name → the first name of the same tensor, where the network has several for one."""

    def score(self, version: Weights) -> Score:
        """Of the expert with these weights."""
        task, right, loss = self.view.task, 0, 0.0
        self.model.network.load_state_dict(dict(version))
        with torch.inference_mode():
            for index in torch.split(self.rows, BATCH):
                batch = task.batch(self.view.tuning, index, self.device)
                outputs = task.outputs(self.model, self.head, batch.inputs)
                right += int((task.predictions(outputs) == batch.targets).sum())
                loss += float(task.loss(outputs, batch.targets)) * len(index)
        return Score(right / len(self.rows), loss / len(self.rows))


def layer_groups(
    weights: Weights, tied: Mapping[str, str], anatomy: Anatomy, layers: str, outside: bool
) -> dict[str, list[str]]:
    """Layer → names of its floating tensors; a tied name goes where its owner is."""
    paths = block_paths(anatomy)
    groups: dict[str, list[str]] = {}
    for name, tensor in weights.items():
        owner = tied.get(name, name)
        block = next((path for path in paths if owner.startswith(f"{path}.")), OUTSIDE)
        if mergeable(tensor) and (outside or block != OUTSIDE):
            groups.setdefault(owner if layers == "tensor" else block, []).append(name)
    return groups


def most_critical(masked: Mapping[str, Score], percent: float) -> list[str]:
    """The layers without which the expert is worst: ``percent`` of them, rounded up, worst first."""
    count = math.ceil(len(masked) * percent / 100 - 1e-9)
    return sorted(masked, key=lambda layer: (masked[layer].accuracy, -masked[layer].loss))[:count]


def largest(weights: Weights, base: Weights, names: Sequence[str], share: float) -> dict[str, Tensor]:
    """Masks, bool, of the largest |θ − θ_base| among the tensors ``names`` together: ⌊share · n⌋ entries."""
    if not names:
        return {}
    sizes = [(weights[n].float() - base[n].float()).abs().flatten() for n in names]
    flat = torch.cat(sizes)
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(math.floor(share * len(flat) + 1e-9), sorted=False).indices] = True
    parts = torch.split(mask, [len(s) for s in sizes])
    return {n: part.view(weights[n].shape) for n, part in zip(names, parts, strict=True)}


def retract(tensor: Tensor, base: Tensor, mask: Tensor | None, negation: float) -> Tensor:
    """θ − β (θ − θ_base) where the mask says so, θ itself elsewhere, bit by bit."""
    if mask is None:
        return tensor
    back = torch.lerp(base.float(), tensor.float(), 1.0 - negation).to(tensor.dtype)
    return torch.where(mask, back, tensor)


def _length(weights: Weights, base: Weights) -> float:
    squares = [(t.double() - base[n].double()).square().sum() for n, t in weights.items() if mergeable(t)]
    return math.sqrt(float(sum(squares)))
