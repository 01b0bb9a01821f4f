"""MSD: modules switched between experts of a task, so that no backdoor finds its whole path in one network.

Every transformer block has six modules: query, key, value, output, up (with gate) and down. Each is taken from one of
the M = models + 1 experts of a task (the contributed one and further ones). A switching strategy assigns one of M roles to
every module of every block; it is found by evolution, once for a depth and M, and looks at no weights. It pays for

* neighbours from one expert along the computation of a block (query–key, key–value, value–output, output–up, up–down),
* neighbours from one expert across blocks (down of a block, which writes what query, key and value of the next read),
* residual connections: output and down of a block with those of later blocks, 2^−distance each,
* unequal shares of the experts (variance of the counts), and blocks with the same pattern as another.

Then the roles are given to the experts in several orders, and the order with the smallest loss on clean tuning rows stays.
What is in no module (embeddings, norms) is averaged over the experts, as by WAG.

Source: Li et al., "Defending against backdoor attacks via module switching", ICLR 2026 (arXiv 2504.05902): module switching,
evolutionary search under heuristic rules, and a choice among candidates with 20 to 50 clean samples. *The weights of the
rules, the evolution's settings and the choice by tuning loss are a reconstruction* (the paper defends a single task; here
every expert of a merge is treated, and the merge method follows, as for WAG).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mergesec.anatomy import Block, Linear
from mergesec.contracts import (
    ContractError,
    Defense,
    Expert,
    MergeContext,
    Merged,
    MergeMethod,
    Model,
    Weights,
    load_network,
)
from mergesec.weights import add_task_vector, apply_flat, check_same_layout, flat_layout, zeros_flat

CARD = {
    "name": "msd",
    "kind": "defense",
    "class": "ModuleSwitching",
    "version": "1",
    "title": "MSD (module switching)",
    "paper": "Li et al., Defending against backdoor attacks via module switching, ICLR 2026",
    "url": "https://arxiv.org/abs/2504.05902",
    "summary": "every module of a contributed expert comes from it or from further experts of its task",
    "threat": "backdoor",
    "hooks": ["merge"],
    "knowledge": "further independently trained experts of the same tasks, a few clean tuning rows",
    "data": "tuning",
    "siblings": "models",
    "modalities": ["image", "text"],
    "seeded": True,
    "trial": {"generations": 20, "rows": 16},
    "parameters": {
        "models": {"type": "int", "default": 1, "min": 1, "max": 16, "doc": "further experts per task"},
        "generations": {"type": "int", "default": 500, "min": 0, "doc": "of the search for a strategy"},
        "population": {"type": "int", "default": 64, "min": 2, "doc": "strategies per generation"},
        "candidates": {"type": "int", "default": 6, "min": 1, "doc": "orders of the experts that are tried, at most"},
        "rows": {"type": "int", "default": 50, "min": 1, "doc": "clean tuning rows per task to choose among them with"},
    },
}  # fmt: skip

MODULES = 6
INSIDE = ((0, 1), (1, 2), (2, 3), (3, 4), (4, 5))
"""Neighbours in a block, by their place in query, key, value, output, up, down."""
OUTPUT, DOWN = 3, 5
BALANCE, DIVERSITY = 1.0, 1.0
STRATEGY_STREAM, CHOICE_STREAM = 1, 2


def penalty(strategies: Tensor, models: int) -> Tensor:
    """How much each strategy pays, float32 ``[S]``; strategies int64 ``[S, L, 6]`` with roles below ``models``."""
    depth = strategies.shape[1]
    total = torch.zeros(len(strategies))
    for left, right in INSIDE:
        total += (strategies[:, :, left] == strategies[:, :, right]).sum(dim=1)
    for part in range(3):
        total += (strategies[:, :-1, DOWN] == strategies[:, 1:, part]).sum(dim=1) / 3
    for distance in range(1, depth):
        for part in (OUTPUT, DOWN):
            same = strategies[:, :-distance, part] == strategies[:, distance:, part]
            total += same.sum(dim=1) * 0.5**distance
    counts = torch.nn.functional.one_hot(strategies.flatten(1), models).sum(dim=1).float()
    total += BALANCE * counts.var(dim=1, unbiased=False)
    codes = (strategies * models ** torch.arange(MODULES)).sum(dim=2)
    repeats = (codes[:, :, None] == codes[:, None, :]).sum(dim=(1, 2)) - depth
    return total + DIVERSITY * repeats / 2


def strategy(
    depth: int, models: int, generations: int, population: int, generator: torch.Generator
) -> Tensor:
    """The best assignment found, int64 ``[depth, 6]``: the better half survives, a copy of it mutates one module each."""
    shape = (population, depth, MODULES)
    pool = torch.randint(0, models, shape, generator=generator)
    half = population // 2
    for _ in range(generations):
        survivors = pool[penalty(pool, models).argsort(stable=True)[: population - half]]
        children = survivors[torch.randint(0, len(survivors), (half,), generator=generator)].clone()
        place = torch.randint(0, depth * MODULES, (half,), generator=generator)
        role = torch.randint(0, models, (half,), generator=generator)
        children.view(half, -1)[torch.arange(half), place] = role
        pool = torch.cat([survivors, children])
    return pool[int(penalty(pool, models).argmin())]


def modules(block: Block) -> tuple[tuple[Linear, ...], ...]:
    """The linear maps of a block's six modules."""
    *into, down = block.mlp.maps  # up and, where there is one, its gate
    return (*((linear,) for linear in block.attention.maps), tuple(into), (down,))


class ModuleSwitching(Defense):
    """The defense of the card above."""

    hooks = ("merge",)

    def __init__(
        self,
        models: int = 1,
        generations: int = 500,
        population: int = 64,
        candidates: int = 6,
        rows: int = 50,
    ) -> None:
        self.models, self.generations, self.population = models, generations, population
        self.candidates, self.rows = candidates, rows

    def merge(
        self, base: Weights, experts: Sequence[Expert], method: MergeMethod, ctx: MergeContext
    ) -> Merged:
        """``method`` on the switched experts; ContractError where a task lacks siblings."""
        blocks = ctx.backbone.anatomy().blocks
        chosen = strategy(
            len(blocks), self.models + 1, self.generations, self.population, ctx.generator(STRATEGY_STREAM)
        )
        switched, orders = [], {}
        for expert in experts:
            weights, order = self._switched(base, expert, blocks, chosen, ctx)
            switched.append(Expert(expert.task, weights))
            orders[expert.task] = list(order)
        merged = method.merge(base, switched, ctx)
        paid = float(penalty(chosen[None], self.models + 1))
        return replace(merged, info={**merged.info, "msd_penalty": paid, "msd_orders": orders})

    def _switched(
        self, base: Weights, expert: Expert, blocks: Sequence[Block], chosen: Tensor, ctx: MergeContext
    ) -> tuple[Weights, tuple[int, ...]]:
        """The task's expert made of all of its experts' modules, and which expert plays each role."""
        members = [expert, *ctx.siblings.get(expert.task, ())[: self.models]]
        if len(members) <= self.models:
            raise ContractError(
                f"msd: task '{expert.task}' has {len(members) - 1} further experts, {self.models} are needed"
            )
        for member in members:
            check_same_layout(base, member.weights, f"expert '{member.task}'")
        mean = average(base, members)
        best: tuple[float, Weights, tuple[int, ...]] | None = None
        for order in itertools.islice(_orders(len(members)), self.candidates):
            weights = assembled(mean, [members[i] for i in order], blocks, chosen)
            value = self._loss(expert.task, weights, ctx)
            if best is None or value < best[0]:
                best = value, weights, order
        if best is None:
            raise ContractError("msd: no order of the experts to try")
        return best[1], best[2]

    def _loss(self, name: str, weights: Weights, ctx: MergeContext) -> float:
        """The task's loss on a few tuning rows."""
        view = ctx.views[name]
        order = torch.randperm(len(view.tuning), generator=ctx.generator(CHOICE_STREAM))
        batch = view.task.batch(view.tuning, order[: self.rows], ctx.device)
        head = {k: v.to(ctx.device) for k, v in view.head.items()}
        model = Model(ctx.backbone, load_network(ctx.backbone, weights).to(ctx.device))
        with torch.no_grad():
            return float(view.task.loss(view.task.outputs(model, head, batch.inputs), batch.targets))


def _orders(members: int) -> Iterator[tuple[int, ...]]:
    """Who plays which role: rotations first, in which every expert gets every role, then the rest."""
    rotations = [tuple((i + k) % members for i in range(members)) for k in range(members)]
    yield from rotations
    yield from (order for order in itertools.permutations(range(members)) if order not in rotations)


def average(base: Weights, members: Sequence[Expert]) -> Weights:
    """The mean of the experts, in the base's types."""
    layout = flat_layout(base)
    total = zeros_flat(layout, base)
    for member in members:
        add_task_vector(total, layout, base, member.weights)
    return apply_flat(layout, base, total, 1.0 / len(members))


def assembled(mean: Weights, members: Sequence[Expert], blocks: Sequence[Block], chosen: Tensor) -> Weights:
    """``mean`` with every module from the member that ``chosen`` ``[L, 6]`` names."""
    weights = dict(mean)
    fresh: set[str] = set()
    for block, roles in zip(blocks, chosen.tolist(), strict=True):
        for linears, role in zip(modules(block), roles, strict=True):
            source = members[role].weights
            for linear in linears:
                for name in (linear.weight, linear.bias):
                    if name is None:
                        continue
                    if name not in fresh:
                        weights[name] = weights[name].clone()
                        fresh.add(name)
                    start, stop = linear.rows or (0, weights[name].shape[0])
                    weights[name][start:stop] = source[name][start:stop]
    return weights
