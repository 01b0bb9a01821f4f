"""MergeBarrier: flip the heads' strongest directions and publish the MLP in another topology.

Two modules; both keep the function, and neither needs training.

1. Attention. Per head, query and key rows are multiplied by one orthogonal P, so that ``(PQ)ᵀ(PK) = QᵀK``. The
   paper maximises ``‖(P − I)Q‖² + ‖(P − I)K‖²``; its optimum ``P = −I`` shows the weights up to a sign, so only the
   top eigen-directions U of ``QQᵀ + KKᵀ`` (biases as one more column) are flipped: ``P = I − 2UUᵀ``.
   A merge at coefficient λ of an expert near its base then multiplies the flipped part of every score by
   ``(1 − 2λ)²``, and leaves the rest. Grouped heads share P; under rotary positions, with which a general P does
   not commute, whole frequency pairs are flipped, strongest first.
2. MLP. The paper replaces the activation by its Taylor expansion and publishes polynomial coefficients in place of
   the weights; names and shapes no longer fit the base, so whoever merges by name and shape keeps the base's MLP.
   The truncated expansion costs the paper up to 1.1 % of the accuracy. **Reconstruction, exact instead:** of GELU
   (both forms), SiLU, quick GELU and ReLU the odd part of the expansion at 0 is z/2 and nothing else, i.e.
   ``φ(z) = z + φ(−z)``. A secret half J of the hidden units is published with the sign reversed, and the polynomial
   part it leaves behind, ``W2_J (W1_J x + b1_J) = S x + c``, is carried by 2(d + 1) further units, since
   ``φ(t) − φ(−t) = t``: rows ±B with B a random orthogonal matrix, columns ±S Bᵀ, and one pair for c.
   Gated MLPs (and ``ffn: split``, for any activation) double every unit instead: ``W2/2 + Δ`` and ``W2/2 − Δ``.
   Hidden units are then shuffled. The output bias keeps its name, shape and value, and so enters a merge.

What the free-rider who skips the MLP loses is its task vector, whatever the re-parametrisation: that much is the
paper's. What a free-rider who *knows* the re-parametrisation can undo is this reconstruction's alone: units match the
base's up to sign, so it folds back (docs); the paper argues hardness from the remainder of the truncated expansion.

Source: "Do Not Merge My Model! Safeguarding Open-Source LLMs Against Unauthorized Model Merging", AAAI 2026: its
abstract and public reading notes of its method section; no code was released. The share of directions that is
flipped is not in what could be read. The paper's randomised SVD only saves time over the exact decomposition here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mergesec.anatomy import Attention, Linear, Mlp
from mergesec.contracts import (
    Backbone,
    ContractError,
    Defense,
    Model,
    ProtectContext,
    Protected,
    Weights,
    load_network,
)
from mergesec.surgery import change_heads, head_rows, per_group, read

CARD = {
    "name": "mergebarrier",
    "kind": "defense",
    "class": "MergeBarrier",
    "version": "1",
    "title": "MergeBarrier",
    "paper": "Li et al., Do Not Merge My Model! Safeguarding Open-Source LLMs Against Unauthorized Model "
    "Merging, AAAI 2026",
    "url": "https://arxiv.org/abs/2511.10712",
    "summary": "flip the heads' top eigen-directions, publish the MLP in another topology (reconstruction)",
    "threat": "protection",
    "hooks": ["protect"],
    "knowledge": "the expert alone; a few of the owner's inputs to check that the function is kept",
    "data": "tuning",
    "modalities": ["image", "text"],
    "seeded": True,
    "parameters": {
        "flip": {
            "type": "float",
            "default": 0.5,
            "min": 0.0,
            "max": 1.0,
            "doc": "share of each head's query/key directions that is flipped, strongest first; 1 is P = -I",
        },
        "ffn": {
            "type": "choice",
            "default": "expand",
            "choices": ["expand", "split", "none"],
            "doc": "expand: reverse units, carry the polynomial part by further ones (gated MLPs: split); "
            "split: double every unit, right for any activation; none: leave the MLP",
        },
    },
}

TOLERANCE = 1e-3
"""Largest change of an output, relative to the largest output, that is rounding and not a wrong identity."""
CHECKED_ROWS = 16


class MergeBarrier(Defense):
    """The defense of the card above."""

    hooks = ("protect",)

    def __init__(self, flip: float = 0.5, ffn: str = "expand") -> None:
        self.flip, self.ffn = flip, ffn

    def protect(self, weights: Weights, ctx: ProtectContext) -> Protected:
        """The expert with flipped heads and, unless ``ffn`` is none, wider MLPs. The report has hidden sizes before
        and after and how far queries and keys moved.

        Raises ContractError if the owner's tuning inputs show that the function changed.
        """
        generator = ctx.generator()
        published = dict(weights)
        blocks: list[dict[str, Any]] = []
        for block in ctx.backbone.anatomy().blocks:
            matrix = flips(published, block.attention, self.flip)
            moved = _displacement(published, block.attention, matrix)
            eye = torch.eye(block.attention.head_dim, dtype=torch.float64).expand_as(matrix)
            published = change_heads(
                published, block.attention, query=matrix, key=matrix, value=eye, output=eye
            )
            if self.ffn != "none":
                published = self._widen(published, block.mlp, generator)
            hidden = published[block.mlp.down.weight].shape[1]
            facts = {"block": block.index, "moved": moved, "hidden": [block.mlp.hidden, hidden]}
            blocks.append(facts)
        error = self._error(weights, published, ctx) if ctx.view is not None else 0.0
        if error > TOLERANCE:
            raise ContractError(
                f"mergebarrier: outputs changed by {error:.1e} of their size; ffn: {self.ffn} needs an activation "
                "with φ(z) − φ(−z) = z, ffn: split does not"
            )
        return Protected(published, {"output_error": error, "blocks": blocks})

    def _widen(self, weights: Weights, mlp: Mlp, generator: torch.Generator) -> dict[str, Tensor]:
        if self.ffn == "expand" and mlp.gate is None:
            return expand(weights, mlp, generator)
        return split(weights, mlp, generator)

    def _error(self, weights: Weights, published: Weights, ctx: ProtectContext) -> float:
        """Largest change of the task's outputs on the owner's first tuning rows, relative to the largest output."""
        view = ctx.view
        rows = torch.arange(min(CHECKED_ROWS, len(view.tuning)))
        inputs = view.task.batch(view.tuning, rows, ctx.device).inputs
        networks = (load_network(ctx.backbone, weights), self.network(ctx.backbone, published))
        with torch.inference_mode():
            before, after = (
                view.task.outputs(Model(ctx.backbone, n.to(ctx.device)), view.head, inputs) for n in networks
            )
        return float((after - before).abs().max() / before.abs().max().clamp_min(1e-12))

    def network(self, backbone: Backbone, weights: Weights) -> nn.Module:
        """The backbone's network with the linear layers that ``weights`` has in other sizes replaced."""
        network = backbone.build()
        for name, own in network.state_dict().items():
            if name not in weights or weights[name].shape == own.shape or not name.endswith(".weight"):
                continue
            path = name.removesuffix(".weight")
            layer = network.get_submodule(path)
            if not isinstance(layer, nn.Linear):
                raise ContractError(f"mergebarrier: {path} is a {type(layer).__name__}, not a linear layer")
            outs, ins = weights[name].shape
            parent, _, leaf = path.rpartition(".")
            bias = layer.bias is not None
            fresh = nn.utils.skip_init(nn.Linear, ins, outs, bias)  # type: ignore[no-untyped-call]
            setattr(network.get_submodule(parent), leaf, fresh)
        network.load_state_dict(dict(weights), strict=True)
        return network.eval()


# ----------------------------------------------------------------------------- attention


def flips(weights: Weights, attention: Attention, share: float) -> Tensor:
    """``P = I − 2UUᵀ``, float64 ``[kv_heads, head_dim, head_dim]``; U spans the strongest directions.

    Grouped heads share it. Under rotary positions only whole pairs (i, i + head_dim/2) can be flipped.
    """
    rows, size = _together(weights, attention), attention.head_dim
    gram = rows @ rows.mT
    if attention.rotary:
        strength = gram.diagonal(dim1=1, dim2=2).reshape(len(gram), 2, size // 2).sum(1)
        ranks = strength.argsort(dim=1, descending=True).argsort(dim=1)
        signs = 1.0 - 2.0 * (ranks < round(share * (size // 2))).double()
        return torch.diag_embed(signs.repeat(1, 2))
    top = torch.linalg.eigh(gram).eigenvectors[..., size - round(share * size) :]
    matrix: Tensor = torch.eye(size, dtype=torch.float64) - 2 * top @ top.mT
    return matrix


def _together(weights: Weights, attention: Attention) -> Tensor:
    """Query and key rows side by side, float64 ``[kv_heads, head_dim, n]``."""
    query, key = (_rows(weights, m, attention) for m in (attention.query, attention.key))
    return torch.cat([per_group(query, attention), key], dim=-1)


def _rows(weights: Weights, linear: Linear, attention: Attention) -> Tensor:
    """Rows of a map by head with the bias as one more column, float64 ``[heads, head_dim, in (+ 1)]``."""
    weight, bias = head_rows(weights, linear, attention)
    return weight if bias is None else torch.cat([weight, bias[..., None]], dim=-1)


def _displacement(weights: Weights, attention: Attention, matrix: Tensor) -> float:
    """``‖(P − I)[Q K]‖ / ‖[Q K]‖`` of a layer; 2 where everything is flipped."""
    rows = _together(weights, attention)
    return float((matrix @ rows - rows).norm() / rows.norm())


# ----------------------------------------------------------------------------- MLP


def expand(weights: Weights, mlp: Mlp, generator: torch.Generator) -> dict[str, Tensor]:
    """``down(φ(up(x)))`` with a random half of the units reversed and their linear part on 2(d + 1) further units."""
    (up, bias), (down, _) = read(weights, mlp.up), read(weights, mlp.down)
    width = up.shape[1]
    reverse = torch.rand(mlp.hidden, generator=generator) < 0.5
    signs = 1.0 - 2.0 * reverse.double()
    gaussian = torch.randn(width, width, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(gaussian).Q
    carried = down[:, reverse] @ up[reverse] @ basis.mT
    rows, columns = [signs[:, None] * up, basis, -basis], [down, carried, -carried]
    offsets = None
    if bias is not None:
        constant = down[:, reverse] @ bias[reverse]
        rows.append(torch.zeros(2, width, dtype=torch.float64))
        columns += [constant[:, None], -constant[:, None]]
        offsets = torch.cat([signs * bias, torch.zeros(2 * width), torch.tensor([1.0, -1.0])]).double()
    order = torch.randperm(sum(map(len, rows)), generator=generator)
    into = [(mlp.up, torch.cat(rows)[order], None if offsets is None else offsets[order])]
    return _resized(weights, mlp, into, torch.cat(columns, dim=1)[:, order])


def split(weights: Weights, mlp: Mlp, generator: torch.Generator) -> dict[str, Tensor]:
    """Every hidden unit twice, with half of its down column plus or minus a random vector of the column's size."""
    down = read(weights, mlp.down)[0]
    noise = torch.randn(down.shape, generator=generator, dtype=torch.float64) * down.square().mean(0).sqrt()
    order = torch.randperm(2 * mlp.hidden, generator=generator)
    into = []
    for linear in (mlp.gate, mlp.up):
        if linear is not None:
            weight, bias = read(weights, linear)
            into.append((linear, weight.repeat(2, 1)[order], None if bias is None else bias.repeat(2)[order]))
    return _resized(weights, mlp, into, torch.cat([down / 2 + noise, down / 2 - noise], dim=1)[:, order])


def _resized(
    weights: Weights, mlp: Mlp, into: list[tuple[Linear, Tensor, Tensor | None]], down: Tensor
) -> dict[str, Tensor]:
    """``weights`` with these maps (of new sizes) in place of the MLP's; packed maps stay packed, in their order."""
    into = sorted(into, key=lambda part: part[0].rows or (0, 0))
    parts: dict[str, list[Tensor]] = {mlp.down.weight: [down]}
    for linear, weight, bias in into:
        parts.setdefault(linear.weight, []).append(weight)
        if linear.bias is not None and bias is not None:
            parts.setdefault(linear.bias, []).append(bias)
    return {**weights, **{name: torch.cat(found).to(weights[name]) for name, found in parts.items()}}
