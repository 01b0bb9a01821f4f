"""Git Re-Basin by weight matching: bring every expert into the reference's coordinates, then merge.

Ainsworth et al. 2023, section 3.2 (eq. 1, algorithm 1): among the permutations π that keep the
network's function, take the one of largest ⟨vec Θ_ref, vec π(Θ)⟩, by coordinate descent over groups of
permutations. In a transformer the residual stream's order is fixed by the base (it is read by norms,
embeddings and head alike), which leaves per block

* the order of the MLP's hidden units;
* the order of the attention heads, and within a head that of the query/key coordinates (one
  permutation for both) and that of the value/output coordinates (one for both).

No weight carries two of these groups except those of heads and within heads. So descent over groups
decomposes into independent linear assignments and is done after one round; heads and their inner order
are solved jointly, by assigning heads on the best score any inner order gives each pair. What comes out
is thus the global optimum of eq. 1, not a local one as in networks with permutations on both sides of a
weight. Norm scales, output biases and everything outside blocks stay.

References. ``base``: every expert is matched to the base. ``first``: to the first expert (the paper's
two-model case). ``mean``: MergeMany (the paper's appendix and the released code), each in turn to the
mean of the others until nothing moves; the paper visits them in random order, here it is that of the
tasks' names. With the last two the whole group is then taken, by one common permutation, to where it
is nearest the base, so that task vectors exist; this changes nothing among the experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mergesec.anatomy import Anatomy, Attention, Mlp
from mergesec.contracts import ContractError, Expert, MergeContext, Merged, MergeMethod, Weights
from mergesec.surgery import head_columns, head_rows, hidden_units, per_group, read, reorder_hidden, write
from mergesec.tensorwise import check_experts
from mergesec_methods._matching import Anchors, matched_order

CARD = {
    "name": "git_rebasin",
    "kind": "merging",
    "class": "GitRebasin",
    "version": "1",
    "title": "Git Re-Basin",
    "paper": "Ainsworth et al., Git Re-Basin: merging models modulo permutation symmetries, ICLR 2023",
    "url": "https://arxiv.org/abs/2209.04836",
    "summary": "permute hidden units and attention heads to match a reference, then merge",
    "output": "static",
    "data": "tuning",
    "modalities": ["image", "text"],
    "seeded": False,
    "wraps": "base_method",
    "parameters": {
        "base_method": {
            "type": "merging",
            "default": "task_arithmetic",
            "doc": "the merge method that gets the matched experts",
        },
        "reference": {
            "type": "choice",
            "choices": ["base", "first", "mean"],
            "default": "base",
            "doc": "match every expert to the base, to the first expert, or to the mean of the others",
        },
        "attention": {
            "type": "choice",
            "choices": ["none", "heads", "inner"],
            "default": "heads",
            "doc": "what is matched besides hidden units: nothing, whole heads, or also each head's "
            "query/key and value/output coordinates",
        },
    },
}

ROUNDS = 100
"""Most rounds of MergeMany; as in the released code. It stops by itself, long before."""

Coordinates = tuple[Tensor, ...]
"""What a group of permutations acts on, by unit: float64 ``[n, f]`` each."""
Orders = tuple[Tensor, ...]
"""Per entry of the coordinates, which row goes to place j: int64 ``[n]``."""
Matcher = Callable[[Coordinates], Orders]


def reordered(coordinates: Coordinates, orders: Orders) -> Coordinates:
    """The coordinates with their rows in the new order."""
    return tuple(rows[order] for rows, order in zip(coordinates, orders, strict=True))


def moves(orders: Orders) -> int:
    """How many rows change place."""
    return sum(int((order != torch.arange(len(order))).sum()) for order in orders)


class Group(ABC):
    """Permutations that keep the function and that no other group's weights feel."""

    @abstractmethod
    def read(self, weights: Weights) -> Coordinates:
        """What the permutations act on."""

    @abstractmethod
    def write(self, weights: Weights, orders: Orders) -> Weights:
        """``weights`` permuted: the same function."""

    @abstractmethod
    def matcher(self, reference: Coordinates) -> Matcher:
        """A function that finds the orders of the largest inner product with ``reference``."""


@dataclass(frozen=True)
class HiddenUnits(Group):
    """The hidden units of one MLP."""

    mlp: Mlp

    def read(self, weights: Weights) -> Coordinates:
        return (hidden_units(weights, self.mlp),)

    def write(self, weights: Weights, orders: Orders) -> Weights:
        return reorder_hidden(weights, self.mlp, orders[0])

    def matcher(self, reference: Coordinates) -> Matcher:
        anchors = Anchors(reference[0])
        return lambda own: (anchors.order(own[0]),)


@dataclass(frozen=True)
class Heads(Group):
    """The heads of one attention layer; with ``inner`` also the coordinates within them.

    Coordinates: query and key rows with biases, then value rows with biases and output columns, both
    head after head, ``[kv_heads · head_dim, f]``. Query heads that share a key and value head count as one and
    keep their order in it. Under rotary positions query/key coordinates keep theirs.
    """

    attention: Attention
    inner: bool

    def read(self, weights: Weights) -> Coordinates:
        attention = self.attention
        columns: list[Tensor] = []
        for linear in (attention.query, attention.key, attention.value):
            weight, bias = head_rows(weights, linear, attention)
            rows = weight if bias is None else torch.cat([weight, bias[..., None]], dim=2)
            together = per_group(rows, attention) if linear is attention.query else rows
            columns.append(together.flatten(0, 1))
        output = per_group(head_columns(weights, attention).mT, attention).flatten(0, 1)
        return torch.cat(columns[:2], dim=1), torch.cat([columns[2], output], dim=1)

    def write(self, weights: Weights, orders: Orders) -> Weights:
        attention, (query_key, value_output) = self.attention, orders
        changed = dict(weights)
        rows = (
            (attention.query, self._of_queries(query_key)),
            (attention.key, query_key),
            (attention.value, value_output),
        )
        for linear, order in rows:
            weight, bias = read(weights, linear)
            changed = write(changed, linear, weight[order], None if bias is None else bias[order])
        weight, bias = read(weights, attention.output)
        return write(changed, attention.output, weight[:, self._of_queries(value_output)], bias)

    def _of_queries(self, order: Tensor) -> Tensor:
        """The order of query rows (and output columns) that goes with one of key (value) rows."""
        size, group = self.attention.head_dim, self.attention.group
        source = order.view(-1, 1, size)
        members = torch.arange(group)[:, None]
        return ((source // size * group + members) * size + source % size).flatten()

    def matcher(self, reference: Coordinates) -> Matcher:
        if self.inner:
            return lambda own: self._match_inner(own, reference)
        anchors = Anchors(self._whole(reference))
        return lambda own: self._rows(anchors.order(self._whole(own)))

    def _whole(self, coordinates: Coordinates) -> Tensor:
        """One row per head ``[heads, head_dim · f]``."""
        return torch.cat([rows.view(self.attention.kv_heads, -1) for rows in coordinates], dim=1)

    def _rows(self, heads: Tensor, inner: Sequence[Tensor] | None = None) -> Orders:
        """Orders of rows from one of heads ``[heads]`` and, per entry, one inside ``[heads, head_dim]``."""
        within = inner or [torch.arange(self.attention.head_dim)] * 2
        first, second = ((heads[:, None] * self.attention.head_dim + w).flatten() for w in within)
        return first, second

    def _match_inner(self, own: Coordinates, reference: Coordinates) -> Orders:
        """Heads and their inner orders at once."""
        heads, size = self.attention.kv_heads, self.attention.head_dim
        total = torch.zeros(heads, heads, dtype=torch.float64)
        best = []
        for mine, theirs, fixed in zip(own, reference, (self.attention.rotary, False), strict=True):
            scores = (mine @ theirs.T).view(heads, size, heads, size).transpose(1, 2)
            match = _as_they_are if fixed else matched_order
            orders = torch.stack([torch.stack([match(pair) for pair in row]) for row in scores])
            total += scores.gather(2, orders[:, :, None]).sum(dim=(2, 3))
            best.append(orders)
        order = matched_order(total)
        return self._rows(order, [orders[order, torch.arange(heads)] for orders in best])


def _as_they_are(scores: Tensor) -> Tensor:
    return torch.arange(len(scores))


# --------------------------------------------------------------------------- one group, all experts


def to_first(group: Group, own: Sequence[Coordinates]) -> tuple[list[Orders], Coordinates]:
    """Orders that match everyone to the first, and the first's coordinates."""
    match = group.matcher(own[0])
    return [match(coordinates) for coordinates in own], own[0]


def to_mean(group: Group, own: Sequence[Coordinates]) -> tuple[list[Orders], Coordinates]:
    """Orders that match everyone to the mean of the others, and the mean of all (MergeMany).

    Every accepted step raises the sum of all pairs' inner products, so it ends.
    """
    placed = list(own)
    orders: list[Orders] = [tuple(torch.arange(len(rows)) for rows in c) for c in own]
    for _ in range(ROUNDS if len(own) > 1 else 0):
        still = True
        for index in range(len(own)):
            others = mean(placed[:index] + placed[index + 1 :])
            step = group.matcher(others)(placed[index])
            if moves(step):
                placed[index] = reordered(placed[index], step)
                orders[index] = reordered(orders[index], step)
                still = False
        if still:
            break
    return orders, mean(placed)


def mean(members: Sequence[Coordinates]) -> Coordinates:
    """Entry by entry."""
    return tuple(torch.stack(rows).mean(dim=0) for rows in zip(*members, strict=True))


def match_group(group: Group, base: Weights, experts: Sequence[Weights], reference: str) -> list[Orders]:
    """The orders that bring every expert's share of this group to the reference, in the base's place."""
    home = group.matcher(group.read(base))
    if reference == "base":
        return [home(group.read(weights)) for weights in experts]
    together = to_first if reference == "first" else to_mean
    orders, centre = together(group, [group.read(weights) for weights in experts])
    common = home(centre)
    return [reordered(order, common) for order in orders]


def groups(anatomy: Anatomy, attention: str) -> list[Group]:
    """All groups of a network; ``attention`` is ``"none"``, ``"heads"`` or ``"inner"``.

    Two streams with one softmax stay as they are; normed queries and keys keep the order of their coordinates.
    """
    found: list[Group] = []
    for block in anatomy.blocks:
        found += [HiddenUnits(mlp) for mlp in block.mlps]
        for part in block.attentions if attention != "none" else ():
            if part.joint is None:
                found.append(Heads(part, attention == "inner" and part.head_norm is None))
    return found


class GitRebasin(MergeMethod):
    """The merge of the card above: match, then ``ctx.inner``. ``info['moved']`` counts rows moved per task."""

    def __init__(self, base_method: Any, reference: str, attention: str) -> None:
        self.base_method = base_method
        self.reference = reference
        self.attention = attention

    def merge(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Merged:
        if ctx.inner is None:
            raise ContractError(f"{self.name}: wraps another merge method, and was given none")
        check_experts(base, experts)
        aligned, moved = self.align(base, experts, ctx.backbone.anatomy())
        merged = ctx.inner.merge(base, aligned, replace(ctx, inner=None))
        return replace(merged, info={**merged.info, "moved": moved})

    def align(
        self, base: Weights, experts: Sequence[Expert], anatomy: Anatomy
    ) -> tuple[list[Expert], Mapping[str, int]]:
        """The experts in the reference's coordinates, in the order given, and how many rows moved.

        What need not move is shared with the expert handed in.
        """
        visited = sorted(range(len(experts)), key=lambda i: experts[i].task)
        if self.reference == "first":
            visited = list(range(len(experts)))
        weights = [experts[i].weights for i in visited]
        moved = dict.fromkeys((e.task for e in experts), 0)
        for group in groups(anatomy, self.attention):
            found = match_group(group, base, weights, self.reference)
            for place, orders in enumerate(found):
                if moves(orders):
                    weights[place] = group.write(weights[place], orders)
                    moved[experts[visited[place]].task] += moves(orders)
        aligned = dict(zip(visited, weights, strict=True))
        return [Expert(e.task, aligned[i]) for i, e in enumerate(experts)], moved
