"""Neural Cleanse: invert a trigger for every class; a class that needs a far smaller one betrays a backdoor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mergesec.contracts import (
    ContractError,
    Defense,
    Expert,
    MergeContext,
    Model,
    Screened,
    TaskView,
    Weights,
    load_network,
)
from mergesec_methods.backdoor.defenses._screens import CONSISTENT, let_in, rounded, strided

CARD = {
    "name": "neural_cleanse",
    "kind": "defense",
    "class": "NeuralCleanse",
    "version": "1",
    "title": "Neural Cleanse",
    "paper": "Wang et al., Neural Cleanse: identifying and mitigating backdoor attacks in neural networks, IEEE S&P 2019",
    "url": "https://doi.org/10.1109/SP.2019.00031",
    "summary": "drop experts with a class whose inverted trigger is abnormally small; the task stays, served by the merge of the rest",
    "threat": "backdoor",
    "hooks": ["examine", "screen"],
    "after_examine": ["index"],
    "knowledge": "tuning rows of every task and the contributed weights",
    "data": "tuning",
    "modalities": ["image"],
    "seeded": False,
    "trial": {"steps": 4, "rows": 16, "batch": 8},
    "parameters": {
        "index": {
            "type": "float",
            "default": 2.0,
            "min": 0.0,
            "max": 1000.0,
            "doc": "largest anomaly index that is let in",
        },
        "steps": {
            "type": "int",
            "default": 1000,
            "min": 1,
            "max": 100000,
            "doc": "Adam steps per class; classes are optimised side by side, 16 at a time",
        },
        "batch": {
            "type": "int",
            "default": 32,
            "min": 1,
            "max": 4096,
            "doc": "tuning rows per step and class",
        },
        "rows": {
            "type": "int",
            "default": 512,
            "min": 1,
            "max": 1000000,
            "doc": "tuning rows per expert, at most",
        },
        "classes": {
            "type": "int",
            "default": 0,
            "min": 0,
            "max": 100000,
            "doc": "classes looked at, at most, evenly spread; 0 = all. A target class left out is not found",
        },
        "learning_rate": {
            "type": "float",
            "default": 0.1,
            "min": 0.0,
            "max": 10.0,
            "doc": "of Adam (0.5, 0.9)",
        },
        "success": {
            "type": "float",
            "default": 0.99,
            "min": 0.0,
            "max": 1.0,
            "doc": "share of rows that an inverted trigger has to send to its class",
        },
    },
}

FIRST_COST, PATIENCE, COST_FACTOR = 1e-3, 5, 1.5
WINDOW = 10
"""Steps between two looks at the success rate (the released code looks once per pass over its data)."""
FEWEST = 3
TOGETHER = 16
"""Classes optimised side by side, at most: bounds the memory of one step."""
EPSILON = 1e-7


@dataclass
class _Costs:
    """The weight λ of the mask's size, per class: up while the trigger works, down while it does not."""

    cost: Tensor
    up: Tensor
    down: Tensor

    @classmethod
    def start(cls, count: int) -> _Costs:
        return cls(torch.full((count,), FIRST_COST), torch.zeros(count), torch.zeros(count))

    def update(self, works: Tensor) -> None:
        """After PATIENCE looks in a row λ grows by 1.5, or shrinks by 1.5^1.5."""
        self.up = (self.up + 1) * works
        self.down = (self.down + 1) * ~works
        grow, shrink = self.up >= PATIENCE, self.down >= PATIENCE
        self.cost = self.cost * COST_FACTOR ** grow.float() / COST_FACTOR ** (1.5 * shrink.float())
        self.up[grow], self.down[shrink] = 0, 0


def anomaly_indices(sizes: Tensor) -> Tensor:
    """|L1 − median| / (1.4826 · MAD) of the masks' sizes ``[K]``; 0 for sizes above the median."""
    sizes = sizes.double()
    below = torch.quantile(sizes, 0.5) - sizes
    spread = CONSISTENT * torch.quantile(below.abs(), 0.5)
    return below.clamp_min(0.0) / spread.clamp_min(EPSILON)


class NeuralCleanse(Defense):
    """An expert is dropped if the largest anomaly index of its classes exceeds ``index``."""

    def __init__(
        self, index: float, steps: int, batch: int, rows: int, classes: int, learning_rate: float, success: float
    ) -> None:  # fmt: skip
        self.index = index
        self.steps = steps
        self.batch = batch
        self.rows = rows
        self.classes = classes
        self.learning_rate = learning_rate
        self.success = success

    def looked_at(self, view: TaskView) -> Tensor:
        """The classes that get a trigger, int64."""
        total = len(view.task.classes)
        count = min(self.classes or total, total)
        return (torch.arange(count) * total) // count

    def sizes(self, expert: Expert, ctx: MergeContext) -> Tensor:
        """L1 norm of the smallest mask that works, per class, ``[K]``; of the last one where none does."""
        view = ctx.views[expert.task]
        if not isinstance(view.tuning.inputs, Tensor) or view.tuning.inputs.ndim != 4:
            raise ContractError("neural_cleanse: needs images [N, 3, H, W] as raw inputs")
        network = load_network(ctx.backbone, expert.weights).to(ctx.device)
        for parameter in network.parameters():
            parameter.requires_grad_(False)
        model = Model(ctx.backbone, network)
        groups = torch.split(self.looked_at(view), TOGETHER)
        return torch.cat([self._inverted(view, model, labels, ctx) for labels in groups])

    def _inverted(self, view: TaskView, model: Model, labels: Tensor, ctx: MergeContext) -> Tensor:
        """Sizes of the masks of ``labels``, found side by side from grey at half opacity, on rows in a fixed
        order."""
        height, width = view.tuning.inputs.shape[2:]
        leaves = [
            torch.zeros(len(labels), channels, height, width, device=ctx.device, requires_grad=True)
            for channels in (1, 3)
        ]
        optimizer = torch.optim.Adam(leaves, lr=self.learning_rate, betas=(0.5, 0.9))
        head = {n: t.to(ctx.device) for n, t in view.head.items()}
        costs = _Costs.start(len(labels))
        best = torch.full((len(labels),), float("inf"))
        hits: list[Tensor] = []
        rows = strided(len(view.tuning))[: self.rows]
        for step in range(self.steps):
            index = rows[(torch.arange(min(self.batch, len(rows))) + step * self.batch) % len(rows)]
            images = view.task.batch(view.tuning, index, ctx.device).inputs
            mask, pattern = (torch.tanh(leaf) / (2 - EPSILON) + 0.5 for leaf in leaves)
            mixed = images[None] * (1 - mask[:, None]) + (mask * pattern)[:, None]
            outputs = view.task.outputs(model, head, mixed.flatten(0, 1))
            aim = labels.to(ctx.device).repeat_interleave(len(index))
            losses = functional.cross_entropy(outputs, aim, reduction="none").view(len(labels), -1).mean(1)
            size = mask.flatten(1).sum(dim=1)
            optimizer.zero_grad(set_to_none=True)
            (losses + costs.cost.to(ctx.device) * size).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            hits.append((outputs.argmax(1) == aim).view(len(labels), -1).float().mean(1).cpu())
            if len(hits) == WINDOW or step == self.steps - 1:
                works = torch.stack(hits).mean(0) >= self.success
                best = torch.where(works, torch.minimum(best, size.detach().cpu()), best)
                costs.update(works)
                hits = []
        return torch.where(best.isfinite(), best, size.detach().cpu())

    def examine(self, base: Weights, expert: Expert, ctx: MergeContext) -> Weights:
        """``{"sizes": [K]}``: the L1 norms of the masks, see ``sizes``."""
        return {"sizes": self.sizes(expert, ctx)}

    def screen(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Screened:
        """The experts that pass, untouched; one with fewer than three classes looked at passes.

        Reports per expert the largest anomaly ``index``, the ``class`` that has it (that of the smallest mask)
        with the L1 norm of its mask (``smallest``), and the ``median`` norm of all classes.
        """
        worst, found = [], []
        for expert in self.examined(base, experts, ctx):
            sizes = expert.findings["sizes"].cpu()
            worst.append(float(anomaly_indices(sizes).max()) if len(sizes) >= FEWEST else 0.0)
            least = int(sizes.argmin())
            label = int(self.looked_at(ctx.views[expert.task])[least])
            found.append((label, float(sizes[least]), float(torch.quantile(sizes.double(), 0.5))))
        indices = torch.tensor(worst, dtype=torch.float64)
        labels, smallest, medians = zip(*found, strict=True)
        report = {
            "index": rounded(experts, indices),
            "class": {e.task: label for e, label in zip(experts, labels, strict=True)},
            "smallest": rounded(experts, torch.tensor(smallest)),
            "median": rounded(experts, torch.tensor(medians)),
            "threshold": self.index,
        }
        return Screened(let_in(experts, indices, self.index), report)
