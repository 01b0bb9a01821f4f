"""Coupled re-alignment: undo a protection by transforms that keep the function exactly.

A transform of a head that keeps its function takes T to the query and T⁻ᵀ to the key, S to the value and
S⁻¹ to the output. AGA solves the four maps apart and so keeps the function only nearly; here each pair
is solved at once. Anchoring to public weights (subscript 0), both wishes of a pair are linear in T:

    T Q' ≈ Q0   and   Tᵀ K0 ≈ K'          (rows are head dimensions, the bias is one more column)

so least squares, each term divided by its own scale (w = 1 / ‖target‖²), gives a Sylvester equation per head,

    (w_k K0 K0ᵀ) T + T (w_q Q' Q'ᵀ) = w_q Q0 Q'ᵀ + w_k K0 K'ᵀ,

solved in float64; likewise S from V' and the columns of O'. The second wish is measured in published
coordinates, so an ill-conditioned protection weighs it wrongly and T is off. The equation is therefore
solved again from where the solution led (``passes``): there T is near I, both wishes are measured in the
anchor's coordinates, and what comes out no longer depends on the protection. The MLP is matched to the
anchor by up row, up bias (gate row) and down column together (Hungarian). Whatever T, S and the order
come out, the recovered network computes what the published one does, up to rounding.

Heads themselves may have been moved. QᵀK and VᵀOᵀ of a head do not change under T and S, so before anything is
solved the published heads are matched to the anchor's by the cosines of these two products (Hungarian).

Of normed queries and keys only signs, one order of the dimensions for all heads and a factor per head are free; they
are found by cosines (Hungarian) instead of an equation.

Biases, norms, layer scales, modulations, convolutions and embeddings have numbers that the function does not depend on (``mergesec.anatomy.Kind``).
``gauges`` puts them to 0 or to the anchor's before anything is matched (see ``_fixing``); without it a shift of
the value biases alone misleads the fit of S.

docs/coupled-realignment.md has derivation, experiment, prior work and limits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mergesec.anatomy import Attention, Block, Kind, Mlp, Symmetry, symmetries
from mergesec.contracts import Attack, RecoverContext, Weights
from mergesec.surgery import (
    assign,
    change_gains,
    change_heads,
    gains_of,
    hidden_units,
    per_group,
    per_query_head,
    read_vector,
    reorder_dimensions,
    reorder_heads,
    reorder_hidden,
    rescale_units,
    rotary_matrix,
    scale_queries_and_keys,
)
from mergesec_methods.protection.attacks._anchors import MAPS, anchor_weights, heads_as_rows, side_as_rows
from mergesec_methods.protection.attacks._fixing import (
    bare,
    dressed,
    outer,
    ratio,
    rescaled,
    unit_factors,
    unit_likeness,
)

CARDS = [
    {
        "name": "coupled",
        "kind": "attack",
        "class": "Coupled",
        "version": "3",
        "title": "Coupled re-alignment",
        "summary": "a Sylvester equation per head pair and joint Hungarian matching; keeps the function exactly",
        "threat": "protection",
        "hooks": ["recover"],
        "knowledge": "the published expert and the public base",
        "data": "none",
        "modalities": ["image", "text", "generation"],
        "seeded": False,
        "parameters": {
            "passes": {
                "type": "int",
                "default": 3,
                "min": 1,
                "max": 100,
                "doc": "how often the equations are solved, each time from where the last solution led",
            },
            "match_heads": {
                "type": "bool",
                "default": True,
                "doc": "find out first which published head is which of the anchor's",
            },
            "gauges": {
                "type": "bool",
                "default": True,
                "doc": "undo shifts of biases, rescaled norms and what else the function does not depend on",
            },
        },
    },
    {
        "name": "coupled_anchored",
        "kind": "attack",
        "class": "Coupled",
        "version": "3",
        "title": "Coupled re-alignment to other experts",
        "summary": "coupled re-alignment against the free-rider's own experts instead of the base",
        "threat": "protection",
        "hooks": ["recover"],
        "knowledge": "the published expert and the free-rider's own experts; the base is not used",
        "data": "tuning",
        "modalities": ["image", "text", "generation"],
        "seeded": False,
        "parameters": {
            "passes": {
                "type": "int",
                "default": 3,
                "min": 1,
                "max": 100,
                "doc": "how often the equations are solved, each time from where the last solution led",
            },
            "match_heads": {
                "type": "bool",
                "default": True,
                "doc": "find out first which published head is which of the anchor's",
            },
            "gauges": {
                "type": "bool",
                "default": True,
                "doc": "undo shifts of biases, rescaled norms and what else the function does not depend on",
            },
            "anchor": {
                "type": "choice",
                "default": "merge",
                "choices": ["own", "merge"],
                "doc": "the free-rider's first expert, or the mean of all his experts",
            },
        },
    },
]

TINY = 1e-300
Solver = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Coupled(Attack):
    """The attack of the cards above."""

    def __init__(
        self, passes: int = 3, anchor: str = "base", match_heads: bool = True, gauges: bool = True
    ) -> None:
        self.passes, self.anchor, self.match_heads, self.gauges = passes, anchor, match_heads, gauges

    def recover(self, published: Weights, ctx: RecoverContext) -> dict[str, Tensor]:
        """``published`` in the anchor's coordinates; the same function."""
        reference = anchor_weights(self.anchor, ctx.base, ctx.own)
        anatomy = ctx.backbone.anatomy()
        recovered, known = dict(published), symmetries(anatomy)
        if self.gauges:
            recovered = outer(recovered, reference, [s for s in known if s.block is None])
        for block in anatomy.blocks:
            found = [s for s in known if s.block is block] if self.gauges else []
            # float64 until the block is done, so that every tensor is rounded once
            own, anchor = (_doubled(w, block) for w in (recovered, reference))
            for name, tensor in self._aligned(own, anchor, block, found).items():
                recovered[name] = tensor.to(published[name].device, published[name].dtype)
        return recovered

    def _aligned(
        self, weights: Weights, reference: Weights, block: Block, found: list[Symmetry]
    ) -> dict[str, Tensor]:
        aligned = bare(rescaled(weights, reference, found), found)
        anchor = bare(reference, found)
        for attention in block.attentions:
            if self.match_heads:
                aligned = reorder_heads(aligned, attention, *head_order(aligned, anchor, attention))
            aligned = self._align(aligned, anchor, attention)
            if self.gauges and attention.head_norm is not None:
                aligned = align_normed(aligned, anchor, attention)
        for mlp in block.mlps:
            scaled = any(s.kind is Kind.UNIT_SCALE and s.part is mlp for s in found)
            aligned = align_units(aligned, anchor, mlp, scaled)
        return dressed(aligned, reference, found)

    def _align(self, weights: Weights, reference: Weights, attention: Attention) -> dict[str, Tensor]:
        """The heads of one attention, in their places, in the coordinates of ``reference``."""
        return align_heads(weights, reference, attention, self.passes)


def _doubled(weights: Weights, block: Block) -> dict[str, Tensor]:
    """The block's tensors, and all that says what its norms and gates are, in float64 on the CPU."""
    names = [name for linear in block.maps for name in (linear.weight, linear.bias)]
    for part in (side for p in block.parts for side in (p.sides if isinstance(p, Attention) else (p,))):
        names += [part.scale] if part.norm is None else [part.scale, part.norm.weight, part.norm.bias]
        for vector in (
            () if part.adaptive is None else (part.adaptive.shift, part.adaptive.scale, part.adaptive.gate)
        ):
            names += [] if vector is None else [vector.linear.weight, vector.linear.bias, vector.table]
        names += [] if isinstance(part, Mlp) else gains_of(part)
    return {n: weights[n].to("cpu", torch.float64) for n in names if n is not None}


def align_units(weights: Weights, reference: Weights, mlp: Mlp, scaled: bool) -> dict[str, Tensor]:
    """Every hidden unit at the place of the one of ``reference`` that it is most alike; where units of a gated
    MLP may have been ``scaled``, with the reference's scale."""
    if not scaled:
        units, anchors = (normalize(hidden_units(w, mlp), dim=1) for w in (weights, reference))
        return reorder_hidden(weights, mlp, assign(units @ anchors.T, maximize=True))
    ordered = reorder_hidden(weights, mlp, assign(unit_likeness(weights, reference, mlp), maximize=True))
    return rescale_units(ordered, mlp, unit_factors(ordered, reference, mlp))


def head_order(weights: Weights, reference: Weights, attention: Attention) -> tuple[Tensor, Tensor]:
    """Which published key and value head, and which query head, goes to each place of the anchor's order.

    int64 ``[kv_heads]`` and ``[heads]``, as ``reorder_heads`` takes them. Query heads that share a key and value
    head stay together: they are matched inside every pair of groups first, then the groups.
    """
    alike = head_likeness(weights, reference, attention)
    count, size = attention.kv_heads, attention.group
    blocks = alike.reshape(count, size, count, size).transpose(1, 2)
    inner = [[assign(blocks[g, h], maximize=True) for h in range(count)] for g in range(count)]
    places = torch.arange(size)
    total = torch.stack(
        [torch.stack([blocks[g, h][inner[g][h], places].sum() for h in range(count)]) for g in range(count)]
    )
    groups = assign(total, maximize=True)
    members = [g * size + inner[g][h] for h, g in enumerate(groups.tolist())]
    return groups, torch.cat(members)


def head_likeness(weights: Weights, reference: Weights, attention: Attention) -> Tensor:
    """Cosine of QᵀK plus cosine of VᵀOᵀ of every published query head with every one of the anchor,
    float64 ``[heads, heads]``; both products are what no T or S changes."""
    own, anchor = (_telling_rows(w, attention) for w in (weights, reference))
    total = torch.zeros(attention.heads, attention.heads, dtype=torch.float64)
    for one, other in (("query", "key"), ("value", "output")):
        a, b, a0, b0 = (per_query_head(x[n], attention) for x in (own, anchor) for n in (one, other))

        def inner(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
            # ⟨xᵀy, uᵀv⟩ = Σ (x uᵀ) ⊙ (y vᵀ), so no product is ever formed
            return torch.stack([((x[h] @ u.mT) * (y[h] @ v.mT)).sum((1, 2)) for h in range(len(x))])

        sizes = inner(a, b, a, b).diagonal(), inner(a0, b0, a0, b0).diagonal()
        scale = (sizes[0][:, None] * sizes[1]).sqrt()
        total += inner(a, b, a0, b0) / scale.clamp_min(TINY)
    return total


def _telling_rows(weights: Weights, attention: Attention) -> dict[str, Tensor]:
    """``heads_as_rows``; of normed queries and keys each stream's rows of length 1 and times their gains, which is
    what a score is made of."""
    if attention.head_norm is None:
        return heads_as_rows(weights, attention)
    sides = []
    for side in attention.sides:
        rows = side_as_rows(weights, attention, side)
        for name, gain in zip(("query", "key"), gains_of(side), strict=False):
            size = rows[name].square().sum((1, 2), keepdim=True).sqrt().clamp_min(TINY)
            rows[name] = rows[name] / size * read_vector(weights, gain)[:, None]
        sides.append(rows)
    return {name: torch.cat([rows[name] for rows in sides if name in rows], dim=-1) for name in MAPS}


def align_heads(weights: Weights, reference: Weights, attention: Attention, passes: int) -> dict[str, Tensor]:
    """Every head of ``weights`` in the coordinates of ``reference``, by a T and an S per head (per key and value
    head where several query heads share one; under rotary positions T is one complex factor per pair, and the
    identity where queries and keys are normed)."""
    heads, anchors = (_shared(heads_as_rows(w, attention), attention) for w in (weights, reference))

    def solved(first: str, second: str, solve: Solver) -> Tensor:
        pairs = zip(heads[first], anchors[first], heads[second], anchors[second], strict=True)
        return torch.stack([repeated_map(*pair, passes, solve) for pair in pairs])

    mix_vo = solved("value", "output", coupled_map)
    if attention.head_norm is not None:
        mix_qk = torch.eye(attention.head_dim, dtype=torch.float64).expand_as(mix_vo)
    else:
        mix_qk = solved("query", "key", rotary_map if attention.rotary else coupled_map)
    return change_heads(
        weights,
        attention,
        query=mix_qk,
        key=torch.linalg.inv(mix_qk).mT,
        value=mix_vo,
        output=torch.linalg.inv(mix_vo),
    )


def align_normed(weights: Weights, reference: Weights, attention: Attention) -> dict[str, Tensor]:
    """Normed queries and keys in the coordinates of ``reference``: lengths per head, then one order of the dimensions
    for all heads and signs per head, then the gains' ratio."""
    aligned = dict(weights)
    alike = torch.zeros(attention.kv_heads, attention.head_dim, attention.head_dim, dtype=torch.float64)
    for side in attention.sides:
        own, anchor = (side_as_rows(w, attention, side) for w in (aligned, reference))
        factors = [_lengths(anchor[name]) / _lengths(own[name]) for name in ("query", "key")]
        aligned = scale_queries_and_keys(aligned, side, attention, *factors)
        for name in ("query", "key"):
            ones, others = (normalize(rows[name], dim=-1) for rows in (own, anchor))
            alike += (ones @ others.mT).view(attention.kv_heads, -1, *alike.shape[1:]).sum(1)
    order = assign(alike.abs().sum(0), maximize=True)
    aligned = reorder_dimensions(aligned, attention, order)
    places = torch.arange(attention.head_dim)
    signs = torch.where(alike[:, order, places] < 0, -1.0, 1.0).double()
    for side in attention.sides:
        queries = signs.repeat_interleave(attention.group, 0)
        aligned = scale_queries_and_keys(aligned, side, attention, queries, signs)
    gain = gains_of(attention)[0]
    return change_gains(aligned, attention, ratio(read_vector(reference, gain), read_vector(aligned, gain)))


def _lengths(rows: Tensor) -> Tensor:
    """The size of every head's rows, ``[heads, 1]``."""
    return rows.square().sum((1, 2)).sqrt().clamp_min(TINY)[:, None]


def _shared(rows: dict[str, Tensor], attention: Attention) -> dict[str, Tensor]:
    """Rows of query heads that share a matrix side by side: all maps ``[kv_heads, head_dim, n]``."""
    grouped = {name: per_group(rows[name], attention) for name in ("query", "output")}
    return {**rows, **grouped}


def repeated_map(
    first: Tensor,
    first_anchor: Tensor,
    second: Tensor,
    second_anchor: Tensor,
    passes: int,
    solve: Solver | None = None,
) -> Tensor:
    """The product of ``passes`` maps, each found where the ones before it led; shapes as in ``coupled_map``."""
    total = torch.eye(len(first), dtype=first.dtype)
    for _ in range(passes):
        step = (solve or coupled_map)(first, first_anchor, second, second_anchor)
        first, second = step @ first, torch.linalg.solve(step.mT, second)
        total = step @ total
    return total


def rotary_map(first: Tensor, first_anchor: Tensor, second: Tensor, second_anchor: Tensor) -> Tensor:
    """``coupled_map`` among the matrices that commute with rotary positions: one complex factor z per pair.

    With the rows of a pair as one complex row, Tᵀ is z̄ and ``|z̄ b0 − b| = |z b̄0 − b̄|``, so
    ``z = (w_a Σ a0 ā + w_b Σ b̄ b0) / (w_a Σ |a|² + w_b Σ |b0|²)``.
    """
    half = len(first) // 2
    a, a0, b, b0 = (torch.complex(x[:half], x[half:]) for x in (first, first_anchor, second, second_anchor))
    w_first = 1.0 / first_anchor.square().sum()
    w_second = 1.0 / second.square().sum()
    top = w_first * (a0 * a.conj()).sum(1) + w_second * (b.conj() * b0).sum(1)
    bottom = w_first * a.abs().square().sum(1) + w_second * b0.abs().square().sum(1)
    return rotary_matrix(top / bottom)


def coupled_map(first: Tensor, first_anchor: Tensor, second: Tensor, second_anchor: Tensor) -> Tensor:
    """T minimising ``‖T A − A0‖² / ‖A0‖² + ‖Tᵀ B0 − B‖² / ‖B‖²``; all ``[head_dim, n]`` float64."""
    from scipy.linalg import solve_sylvester

    w_first = 1.0 / first_anchor.square().sum()
    w_second = 1.0 / second.square().sum()
    left = w_second * second_anchor @ second_anchor.T
    right = w_first * first @ first.T
    target = w_first * first_anchor @ first.T + w_second * second_anchor @ second.T
    return torch.from_numpy(solve_sylvester(left.numpy(), right.numpy(), target.numpy()))
