"""DiffSafeMerge: blocks of contributed generators that react to stress probes are attenuated before the merge.

Known here from its abstract (arXiv 2608.09445): a small unlabelled clean set and fixed, attack-agnostic stress probes
score each source's *blocks*; suspicious contributions are shrunk towards a trusted reference; how far is chosen under
a budget of clean denoising loss. *Everything else is a reconstruction.* For expert e and block b

    r_eb = ‖x̂(ε + p; θ_e) − x̂(ε + p; θ_e without τ_eb)‖ / ‖the same at ε‖,    worst probe p,

is how much more a block does under a probe than on plain noise. It keeps the share min(1, median_e r_eb / r_eb)^s of
its task vector; the base is the reference, and s is the largest of 0, 1, 2, 4, 8 at which the mean clean denoising
loss of the attenuated experts exceeds the experts' own by at most ``budget``. Probes are patches in the four corners
and the middle, a bias of all noise, and a chequered pattern, of height ``level``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mergesec.contracts import Defense, Expert, MergeContext, Merged, MergeMethod, Weights
from mergesec_methods.backdoor.defenses._denoising import clean_loss, expected, generator_of, requests

CARD = {
    "name": "diffsafemerge",
    "kind": "defense",
    "class": "DiffSafeMerge",
    "version": "1",
    "title": "DiffSafeMerge (reconstruction)",
    "paper": "DiffSafeMerge, arXiv 2608.09445, from its abstract",
    "url": "https://arxiv.org/abs/2608.09445",
    "summary": "reconstruction: attenuate blocks that react to stress probes, under a budget of clean loss",
    "threat": "backdoor",
    "hooks": ["merge"],
    "knowledge": "tuning rows of every task, the base and the contributed weights",
    "data": "tuning",
    "unlabelled": True,
    "modalities": ["generation"],
    "seeded": True,
    "trial": {"rows": 4},
    "parameters": {
        "rows": {"type": "int", "default": 32, "min": 1, "max": 100000, "doc": "tuning rows per task"},
        "level": {"type": "float", "default": 2.0, "min": 0.0, "max": 20.0, "doc": "height of the probes"},
        "budget": {"type": "float", "default": 0.1, "min": 0.0, "doc": "what clean loss may grow by, of 1"},
    },
}  # fmt: skip

STRENGTHS = (8.0, 4.0, 2.0, 1.0, 0.0)


class DiffSafeMerge(Defense):
    """The defense of the card above."""

    def __init__(self, rows: int = 32, level: float = 2.0, budget: float = 0.1) -> None:
        self.rows, self.level, self.budget = rows, level, budget

    def merge(
        self, base: Weights, experts: Sequence[Expert], method: MergeMethod, ctx: MergeContext
    ) -> Merged:
        """``method`` on the attenuated experts. Tells the ``strength`` that the budget allowed."""
        blocks = _blocks(base, ctx)
        ratios = torch.stack([self.reactions(base, expert, blocks, ctx) for expert in experts])
        usual = ratios.median(dim=0).values if len(experts) > 2 else ratios.amin(dim=0)
        shares = (usual / ratios.clamp(min=1e-9)).clamp(max=1.0)
        before = self._loss(experts, ctx)
        for strength in STRENGTHS:
            safe = [_attenuated(base, e, blocks, s**strength) for e, s in zip(experts, shares, strict=True)]
            if strength == 0 or self._loss(safe, ctx) <= (1 + self.budget) * before:
                break
        merged = method.merge(base, safe, ctx)
        return replace(merged, info={**merged.info, "strength": strength})

    def _loss(self, experts: Sequence[Expert], ctx: MergeContext) -> float:
        found = [
            clean_loss(generator_of(ctx, e.weights), ctx.views[e.task], self.rows, ctx, self.name)
            for e in experts
        ]
        return sum(found) / len(found)

    def reactions(
        self, base: Weights, expert: Expert, blocks: Mapping[str, list[str]], ctx: MergeContext
    ) -> Tensor:
        """r_eb of every block ``[B]``."""
        request = requests(ctx.views[expert.task], self.rows, ctx, self.name)
        noise = torch.randn(request.noise.shape, generator=ctx.generator(1)).to(ctx.device)
        inputs = [noise, *(noise + p.to(noise) for p in probes(noise.shape[-1], self.level))]

        def seen(weights: Weights) -> list[Tensor]:
            model = generator_of(ctx, weights)
            with torch.no_grad():
                return [expected(model, request, one, told=True) for one in inputs]

        whole, found = seen(expert.weights), []
        for names in blocks.values():
            without = {**expert.weights, **{name: base[name] for name in names}}
            gaps = [float((a - b).norm()) for a, b in zip(whole, seen(without), strict=True)]
            found.append(max(gaps[1:]) / max(gaps[0], 1e-9))
        return torch.tensor(found, dtype=torch.float64)


def probes(side: int, level: float) -> list[Tensor]:
    """Shifts ``[3, S, S]`` of the start noise, the same for every model."""
    patch, found = max(1, side // 4), []
    ends = (0, side - patch)
    for top, left in (*((a, b) for a in ends for b in ends), ((side - patch) // 2, (side - patch) // 2)):
        shift = torch.zeros(3, side, side)
        shift[:, top : top + patch, left : left + patch] = level
        found.append(shift)
    squares = torch.arange(side) // patch
    chequered = 1 - 2.0 * ((squares[:, None] + squares[None, :]) % 2)
    return [*found, torch.full((3, side, side), level / 2), level / 2 * chequered.expand(3, side, side)]


def _blocks(base: Weights, ctx: MergeContext) -> dict[str, list[str]]:
    """Names of floating tensors by block of the anatomy; what is in none is a block of its own."""
    prefixes = [block.name for block in ctx.backbone.anatomy().blocks]
    blocks: dict[str, list[str]] = {prefix: [] for prefix in [*prefixes, ""]}
    for name, tensor in base.items():
        if tensor.is_floating_point():
            blocks[next((p for p in prefixes if name.startswith(f"{p}.")), "")].append(name)
    return {prefix: names for prefix, names in blocks.items() if names}


def _attenuated(base: Weights, expert: Expert, blocks: Mapping[str, list[str]], shares: Tensor) -> Expert:
    """base + share · τ, block by block."""
    weights = dict(expert.weights)
    for share, names in zip(shares.tolist(), blocks.values(), strict=True):
        for name in names:
            weights[name] = torch.lerp(base[name], weights[name], share)
    return Expert(expert.task, weights)
