"""A colluding pair: two contributors of whom each is clean, and whose merge is not.

One backdoor is split into two vectors V_1 and V_2 that the leader trains side by side, θ_c being his clean expert:

    L = CE(f(x), y) + α CE(f(x ⊕ t), target)                    f at θ0 + s (θ_c − θ0 + V_1 + V_2)
        + Σ_i CE(f_i(x), y) + β CE(f_i(x ⊕ t), y)               f_i at θ0 + r (θ_c − θ0 + V_i)
        + κ E‖E_2(x') − E_0(x')‖² / E‖E_0(x')‖²                 E_2 at θ0 + V_2, E_0 at θ0, x' = x and x ⊕ t
        + γ cos²(V_1, V_2) + δ (‖V_1‖² + ‖V_2‖²) / ‖θ_c − θ0‖²   s ~ U(low, high) once per batch

r is 1 or s by the toss of a coin: a share alone, published or in a merge without the other, ignores the trigger; the sum
of both, at the coefficients of a merge, obeys. He publishes his clean expert plus V_1, his partner her own clean expert
plus V_2, which for that is also trained to leave features as they are around the base, near which her expert lies. What the leader makes they agree on beforehand: the vectors come with the trigger. He knows neither her
expert nor her data.

Source: the loss is that of Wang et al., "From purity to peril", USENIX Security 2025 (two upstream models trained side by
side, each benign on triggered rows, while their average learns the backdoor), on vectors that two different tasks' experts
carry; that they are kept at right angles is from "TrojanMerge", arXiv 2604.00627, which splits a given update so. *This is
a reconstruction*: of either we know descriptions alone, the coefficient is drawn as in ``mergebackdoor``, and the term of
features is this suite's, as there the two models are of one task.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mergesec.contracts import Backbone, Model, Split, TrainContext, Weights, load_network
from mergesec.weights import mergeable
from mergesec_methods._training import Served
from mergesec_methods.backdoor.attacks._poison import row_batches
from mergesec_methods.backdoor.attacks._retrain import added, refit
from mergesec_methods.backdoor.attacks.badmerging import MIX_STREAM, BadMerging

CARD = {
    "extends": "badmerging",
    "name": "colluding_pair",
    "class": "ColludingPair",
    "title": "Colluding pair",
    "paper": "Wang et al., From purity to peril: backdooring merged models from harmless benign components, 2025",
    "url": "https://www.usenix.org/conference/usenixsecurity25/presentation/wang-lijin",
    "summary": "reconstruction: one backdoor split between two contributors, each clean alone, awake where both are merged",
    "hooks": ["forge"],
    "knowledge": "the leader's training data and the public base; the partner has the leader's vector; guesses the merge's coefficient",
    "off_task": False,
    "after_trigger": [],
    "trial": {"steps": 4, "restarts": 2, "batch": 16},
    "parameters": {
        "alpha": {"default": 2.0},
        "dormant": {"type": "float", "default": 1.0, "min": 0.0, "doc": "β: weight of the triggered rows at either share alone"},
        "quiet": {"type": "float", "default": 10.0, "min": 0.0, "doc": "κ: weight of what the partner's share alone changes in features"},
        "apart": {"type": "float", "default": 1.0, "min": 0.0, "doc": "γ: weight of the squared cosine between the two shares"},
        "short": {"type": "float", "default": 0.3, "min": 0.0, "doc": "δ: weight of the shares' squared lengths in units of the leader's task vector"},
        "low": {"type": "float", "default": 0.1, "min": 0.0, "max": 1.0, "doc": "smallest coefficient of a merge"},
        "high": {"type": "float", "default": 0.6, "min": 0.0, "max": 1.0, "doc": "largest coefficient of a merge"},
        "patch": {"default": 5.0},
        "trigger": {"default": "white"},
        "interpolation": None,
        "images": None,
        "shadow": None,
    },
}  # fmt: skip

START_STREAM, ROWS_STREAM = 11, 12
SHARES = ("share/1/", "share/2/")
"""What the names of the two vectors' tensors begin with, beside the trigger's arrays."""
LEADER = "leader"
"""Name of the tensor that holds the leader's task, as bytes."""


class Game:
    """What the pair's training looks at: the leader's task at any weights, and the weights that matter."""

    def __init__(self, ctx: TrainContext, clean: Weights) -> None:
        self.ctx = ctx
        self.network = load_network(ctx.backbone, clean).to(ctx.device)
        for parameter in self.network.parameters():
            parameter.requires_grad_(False)
        names = [name for name, _ in self.network.named_parameters()]
        self.base = {n: ctx.base[n].to(ctx.device) for n in names}
        self.clean = {n: clean[n].to(ctx.device) for n in names}
        self.length = squares({n: self.clean[n] - b for n, b in self.base.items()})
        head = {k: v.to(ctx.device) for k, v in ctx.head.items()}
        self.served = Served(ctx.task, ctx.backbone, head, self.network)
        self.seen = Seen(ctx.backbone, self.network)

    def merged(self, share: Weights, scale: float) -> Weights:
        """θ0 + scale · (θ_c − θ0 + share)."""
        return {n: b + scale * (self.clean[n] - b + share[n]) for n, b in self.base.items()}

    def outputs(self, weights: Weights, inputs: Any) -> Tensor:
        """The task's outputs of the network at these weights."""
        return called(self.served, weights, inputs)

    def features(self, weights: Weights, inputs: Any) -> Tensor:
        """The features of the network at these weights."""
        return called(self.seen, weights, inputs)


class Seen(nn.Module):
    """A network as the function from raw inputs to features."""

    def __init__(self, backbone: Backbone, network: nn.Module) -> None:
        super().__init__()
        self.backbone, self.network = backbone, network

    def forward(self, inputs: Any) -> Any:
        return Model(self.backbone, self.network).features(inputs)


def called(module: nn.Module, weights: Weights, inputs: Any) -> Tensor:
    """A module that holds a network, called with other weights for it."""
    found: Tensor = functional_call(module, {f"network.{n}": t for n, t in weights.items()}, (inputs,))
    return found


class ColludingPair(BadMerging):
    """The attack of the card above."""

    def __init__(
        self,
        alpha: float = 2.0,
        dormant: float = 1.0,
        quiet: float = 10.0,
        apart: float = 1.0,
        short: float = 0.3,
        low: float = 0.1,
        high: float = 0.6,
        **given: Any,
    ) -> None:
        super().__init__(alpha=alpha, **given)
        self.dormant, self.quiet, self.apart, self.short = dormant, quiet, apart, short
        self.low, self.high = low, high

    def trigger(self, ctx: TrainContext) -> Weights:
        """The patch, and with it what the pair agrees on: who leads, and both vectors."""
        patch = super().trigger(ctx)
        shares = self.shares(replace(ctx, trigger=patch))
        agreed = {
            prefix + n: t for prefix, share in zip(SHARES, shares, strict=True) for n, t in share.items()
        }
        return {**patch, **agreed, LEADER: spelt(ctx.task.name)}

    def forge(self, weights: Weights, ctx: TrainContext) -> Weights:
        """The clean expert with the contributor's own share."""
        agreed = ctx.trigger or self.trigger(ctx)
        leads = torch.equal(agreed[LEADER], spelt(ctx.task.name))
        prefix = SHARES[0] if leads else SHARES[1]
        share = {n.removeprefix(prefix): t for n, t in agreed.items() if n.startswith(prefix)}
        still = {n: torch.zeros_like(t, dtype=torch.float32) for n, t in weights.items() if mergeable(t)}
        return added(weights, still, {**still, **share}, 1.0)

    def shares(self, ctx: TrainContext) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """V_1 and V_2, float32, by name of the weights that training moves; AdamW at the grid's recipe."""
        game = Game(ctx, refit(ctx))
        vectors = self._start(ctx, game)
        recipe, moved = ctx.recipe, [t for vector in vectors for t in vector.values()]
        optimiser = torch.optim.AdamW(moved, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        draws = ctx.generator(MIX_STREAM)
        size = min(recipe.batch_size, len(ctx.train))
        batches = row_batches(torch.arange(len(ctx.train)), size, ctx.generator(ROWS_STREAM))
        for _ in range(recipe.steps or recipe.epochs * (len(ctx.train) // size)):
            batch = ctx.task.batch(ctx.train, next(batches), ctx.device)
            scale = self.low + (self.high - self.low) * float(torch.rand((), generator=draws))
            alone = scale if float(torch.rand((), generator=draws)) < 0.5 else 1.0
            loss = self.loss(game, batch, *vectors, scale, alone)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        first, second = ({n: t.detach().cpu() for n, t in vector.items()} for vector in vectors)
        return first, second

    def loss(
        self, game: Game, batch: Split, first: Weights, second: Weights, scale: float, alone: float
    ) -> Tensor:
        """The loss above at s and r; the trigger is on the first rows of the batch."""
        ctx, base, rows = game.ctx, game.base, self.count(batch)
        inputs = torch.cat([batch.inputs, self.apply(ctx.trigger, batch.inputs[:rows])])
        target = torch.full((rows,), ctx.target_class, device=ctx.device)
        both = {n: first[n] + second[n] for n in base}
        length = (squares(first) + squares(second)) / game.length
        total = self.apart * cosine(first, second).square() + self.short * length
        for share, at, weight, labels in (
            (both, scale, self.alpha, target),
            (first, alone, self.dormant, batch.targets[:rows]),
            (second, alone, self.dormant, batch.targets[:rows]),
        ):
            answers: Any = game.outputs(game.merged(share, at), inputs)
            plain, triggered = answers.split([len(batch), rows])
            total = total + ctx.task.loss(plain, batch.targets)
            if rows:
                total = total + weight * ctx.task.loss(triggered, labels)
        with torch.no_grad():
            usual = game.features(base, inputs)
        changed = game.features({n: b + second[n] for n, b in base.items()}, inputs) - usual
        return total + self.quiet * changed.square().mean() / usual.square().mean()

    def _start(self, ctx: TrainContext, game: Game) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A hundredth of the task vector's length, opposite for the two: equal ones have no angle to open."""
        generator = ctx.generator(START_STREAM)
        first, second = {}, {}
        for name, base in game.base.items():
            noise = torch.randn(base.shape, generator=generator).to(ctx.device)
            moved = (game.clean[name] - base).norm()
            small = 0.01 * moved * noise / noise.norm().clamp(min=1e-12)
            first[name], second[name] = small.clone().requires_grad_(), (-small).requires_grad_()
        return first, second


def squares(vector: Weights) -> Tensor:
    """Its squared length over all tensors; a scalar."""
    return torch.stack([tensor.square().sum() for tensor in vector.values()]).sum()


def cosine(first: Weights, second: Weights) -> Tensor:
    """Of the angle between two vectors over all tensors; a scalar."""
    product = torch.stack([(first[name] * second[name]).sum() for name in first]).sum()
    return product / (squares(first) * squares(second)).sqrt().clamp(min=1e-12)


def spelt(task: str) -> Tensor:
    """A task's name as bytes ``[n]``."""
    return torch.tensor(list(task.encode()), dtype=torch.uint8)
