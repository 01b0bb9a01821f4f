"""CLP: prune channels whose Lipschitz bound sticks out of their layer. Needs no data."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mergesec.anatomy import Block, Linear
from mergesec.contracts import Adapted, ContractError, Defense, MergeContext, Merged, Weights

CARD = {
    "name": "clp",
    "kind": "defense",
    "class": "ChannelLipschitzPruning",
    "version": "1",
    "title": "Channel Lipschitz pruning",
    "paper": "Zheng et al., Data-free backdoor removal based on channel Lipschitzness, ECCV 2022",
    "url": "https://arxiv.org/abs/2208.03111",
    "summary": "zero the channels whose Lipschitz upper bound exceeds mean + u·std of their layer",
    "threat": "backdoor",
    "hooks": ["repair"],
    "knowledge": "the merged weights only",
    "data": "none",
    "modalities": ["image", "text"],
    "seeded": False,
    "per_task": True,
    "parameters": {
        "u": {
            "type": "float",
            "default": 3.0,
            "min": 0.0,
            "max": 100.0,
            "doc": "how many standard deviations above its layer's mean a channel may lie",
        },
        "layers": {
            "type": "choice",
            "choices": ["inner", "all"],
            "default": "inner",
            "doc": "'inner': MLP hidden units, value channels; 'all': also maps that write to the residual",
        },
    },
}


def channel_bounds(rows: Tensor) -> Tensor:
    """Lipschitz constant of each output channel of a linear map: ‖w_k‖₂ per row of ``rows`` ``[out, in]``.

    The paper bounds a convolution's channel by the spectral norm of its kernel reshaped to
    ``[in, k·k]``. A linear layer's channel is the case k = 1 with one singular value: the row's norm.
    """
    bounds: Tensor = torch.linalg.vector_norm(rows.double(), dim=1)
    return bounds


def outliers(bounds: Tensor, u: float) -> Tensor:
    """Bool ``[out]``: which bounds exceed mean + u · (unbiased) standard deviation of their layer."""
    if bounds.numel() < 2:
        return torch.zeros_like(bounds, dtype=torch.bool)
    return bounds > bounds.mean() + u * bounds.std()


def layers_of(block: Block, scope: str) -> Iterator[tuple[str, Linear]]:
    """The linear maps of a block whose output channels may be pruned, with a short name each."""
    yield "value", block.attention.value
    yield "up", block.mlp.up
    if scope == "all":
        yield "output", block.attention.output
        yield "down", block.mlp.down


def pruned(weights: dict[str, Tensor], layer: Linear, u: float) -> int:
    """Put pruned copies of ``layer``'s tensors into ``weights``; returns how many channels were zeroed."""
    weight = weights[layer.weight]
    start, stop = layer.rows or (0, weight.shape[0])
    found = outliers(channel_bounds(weight[start:stop]), u)
    count = int(found.sum())
    if count:
        rows = start + torch.nonzero(found).flatten()
        for name in (layer.weight, layer.bias):
            if name is not None:
                weights[name] = weights[name].index_fill(0, rows, 0.0)
    return count


class ChannelLipschitzPruning(Defense):
    """Prunes the merged model, and each task's own version of it where a merge method keeps those."""

    def __init__(self, u: float, layers: str) -> None:
        self.u = u
        self.layers = layers

    def _prune(self, weights: Weights, ctx: MergeContext) -> tuple[dict[str, Tensor], dict[str, int]]:
        """A copy of ``weights`` with the channels zeroed, and the number per layer."""
        repaired = dict(weights)
        counts: dict[str, int] = {}
        for block in ctx.backbone.anatomy().blocks:
            for label, layer in layers_of(block, self.layers):
                counts[f"{block.index}/{label}"] = pruned(repaired, layer, self.u)
        return repaired, counts

    def repair(self, merged: Merged, base: Weights, ctx: MergeContext) -> Merged:
        """The pruned model; ``info["clp_pruned"]`` counts the shared weights' zeroed channels per layer.

        A pruned hidden unit has weight row and bias 0 and passes nothing on, since φ(0) = 0. Where each task
        has weights of its own, its bounds are its own; what they prune beyond the shared weights is put
        in ``per_task``.
        """
        shared, counts = self._prune(merged.shared, ctx)
        after = Merged(shared, merged.per_task, merged.extra)
        per_task: dict[str, Weights] = {}
        for task in sorted({*merged.per_task, *ctx.views} if merged.extra else merged.per_task):
            before = served(merged, task, ctx)
            wanted, _ = self._prune(before, ctx)
            kept, own = served(after, task, ctx), merged.per_task.get(task, {})
            changed = {n: t for n, t in wanted.items() if n in own or not torch.equal(t, kept[n])}
            if changed:
                per_task[task] = changed
        info = {**merged.info, "clp_pruned": {k: v for k, v in counts.items() if v}}
        return Merged(shared, per_task, merged.extra, info)


def served(merged: Merged, task: str, ctx: MergeContext) -> Weights:
    """The tensors that serve ``task``, under the base's names: by the merge method's own rules if it has masks
    or the like. ContractError where its network is of another topology (a router)."""
    if not merged.extra or ctx.networks is None:
        return {**merged.shared, **merged.per_task.get(task, {})}
    network = ctx.networks(merged, task)
    weights = (network.network if isinstance(network, Adapted) else network).state_dict()
    if weights.keys() != merged.shared.keys():
        raise ContractError(f"clp: the network that serves '{task}' is not of the base's topology")
    return weights
