"""PaRaMS: protect a published expert by function-preserving changes of its coordinates.

Three modules, in this order:

1. dropout (off by default): a share p of the task vector is dropped and the rest divided by 1 − p,
   so that later matching against the base sees more noise (no code was released for this module).
2. rearrangement of the MLP's hidden units, as far from the base as a permutation can:
   ``A = W1 W1_baseᵀ + b1 b1_baseᵀ + W2ᵀ W2_base`` and a linear assignment minimising ``Σ_i A[i, σ(i)]``;
   unit i moves to place σ(i).
3. scaling of the attention heads by invertible matrices that cancel inside query·key and output·value.

Modules 2 and 3 keep the function. How exactly: the transform is done in float64 and rounded once to
the expert's dtype (unit roundoff u; float32: 6e-8). With ``Q' = fl(A Q)`` the network effectively
computes with ``Q_eff = A⁻¹ Q'`` and ``‖Q_eff − Q‖_F ≤ ‖A⁻¹‖ u ‖A Q‖_F ≤ u κ(A) ‖Q‖_F`` (K, V and O
alike, with A⁻ᵀ, A and A⁻¹, which have the same κ). An error δ that the forward pass makes in a head's
coordinates returns to the old ones as A⁻¹δ, again at most κ(A) times its relative size; errors made
elsewhere are not amplified. To first order in u therefore ``|Δlogit| ≤ κ_max · η``, where η is the
float32 error bound of the unprotected network on the same input. For diagonal A the amplification is 1
whatever κ is: scaling a row scales its rounding error by the same factor. The error being linear in κ,
and the well-conditioned variants (κ ≤ 20 / 0.05 = 400) being held to |Δlogit| ≤ 1e-4, the bound the report
gives is ``logit_bound = 1e-4 · max(1, κ_max / 400)``, i.e. about 4 u κ_max. The report also has κ_max
(``condition``) and the largest ``‖W_eff − W‖_F / ‖W‖_F`` as measured (``effective_error``, at most u κ_max).

Source: "Disrupting Model Merging: A Parameter-Level Defense Without Sacrificing Accuracy", ICCV 2025,
and the two versions of its released code for the variants of module 3. Written from the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mergesec.anatomy import Attention, Mlp
from mergesec.contracts import Defense, ProtectContext, Protected, Weights
from mergesec.surgery import drop_task_vector, hidden_units, reorder_hidden
from mergesec_methods._matching import best_order
from mergesec_methods.protection.defenses._heads import HeadMatrices, apply, summary

CARD = {
    "name": "params",
    "kind": "defense",
    "class": "Params",
    "version": "1",
    "title": "PaRaMS",
    "paper": "Disrupting Model Merging: A Parameter-Level Defense Without Sacrificing Accuracy, ICCV 2025",
    "url": "https://arxiv.org/abs/2503.07661",
    "summary": "reorder the MLP's hidden units away from the base and rescale the attention heads",
    "threat": "protection",
    "hooks": ["protect"],
    "knowledge": "the expert and the public base; no data, no training",
    "data": "none",
    "modalities": ["image", "text", "generation"],
    "seeded": True,
    "holds": ["range_low <= range_high"],
    "parameters": {
        "permute": {"type": "bool", "default": True, "doc": "rearrange the MLP's hidden units"},
        "scaling": {
            "type": "choice",
            "default": "v1",
            "choices": ["none", "v1", "diagonal", "symmetric", "nonsymmetric"],
            "doc": "attention scaling: v1 draws query/key and value/output scales independently, diagonal "
            "uses one for both, symmetric and nonsymmetric use full matrices per head",
        },
        "range_low": {
            "type": "float",
            "default": "published",
            "min": 1e-6,
            "max": 1e6,
            "also": ["published"],
            "doc": "smallest scale; published: 0.05, nonsymmetric 0.1",
        },
        "range_high": {
            "type": "float",
            "default": "published",
            "min": 1e-6,
            "max": 1e6,
            "also": ["published"],
            "doc": "largest scale; published: 20, nonsymmetric 15",
        },
        "distribution": {
            "type": "choice",
            "default": "published",
            "choices": ["published", "uniform", "log_uniform", "beta"],
            "doc": "how scales are drawn; published: uniform for v1 and diagonal, else log_uniform; "
            "beta is Beta(1/2, 1/2) stretched over the range",
        },
        "dropout": {
            "type": "float",
            "default": 0.0,
            "min": 0.0,
            "max": 0.99,
            "doc": "share of the task vector dropped (rest rescaled) before rearrangement; 0 = off. "
            "Changes the function",
        },
    },
}

EYE_EPS = 1e-3
"""Multiple of the identity added to the Gaussian of the nonsymmetric variant (released code)."""

PUBLISHED = {
    "v1": (0.05, 20.0, "uniform"),
    "diagonal": (0.05, 20.0, "uniform"),
    "symmetric": (0.05, 20.0, "log_uniform"),
    "nonsymmetric": (0.1, 15.0, "log_uniform"),
}
"""Range and distribution of each variant: command-line defaults of the released code."""


class Params(Defense):
    """The defense of the card above. ``protect`` keeps keys, shapes and dtypes."""

    hooks = ("protect",)

    def __init__(
        self,
        permute: bool = True,
        scaling: str = "v1",
        range_low: float | str = "published",
        range_high: float | str = "published",
        distribution: str = "published",
        dropout: float = 0.0,
    ) -> None:
        low, high, law = PUBLISHED.get(scaling, PUBLISHED["v1"])
        self.permute, self.scaling, self.dropout = permute, scaling, dropout
        self.low = low if isinstance(range_low, str) else range_low
        self.high = high if isinstance(range_high, str) else range_high
        self.distribution = law if distribution == "published" else distribution
        if not 0 < self.low <= self.high:
            raise ValueError(f"range_low {self.low} must be positive and at most range_high {self.high}")

    def protect(self, weights: Weights, ctx: ProtectContext) -> Protected:
        """The expert in new coordinates. The report has, per block and as maxima, condition numbers
        and effective errors of the scaling, and how far the rearrangement moved the hidden units.

        Raises ContractError for attention tensors below float32 precision if they are to be scaled.
        """
        blocks: list[dict[str, Any]] = []
        # A stream per module, so that switching one on leaves the draws of the others as they were.
        drop, scale = ctx.generator(0), ctx.generator(1)
        published = dict(weights)
        if self.dropout:
            published = drop_task_vector(published, ctx.base, self.dropout, drop)
        for block in ctx.backbone.anatomy().blocks:
            facts: list[dict[str, Any]] = [{"block": block.index} for _ in block.attentions]
            if self.permute:
                for mlp in block.mlps:
                    published, moved = rearrange(published, ctx.base, mlp)
                    facts[0].update(moved)
            if self.scaling != "none":
                for told, attention in zip(facts, block.attentions, strict=True):
                    published, scaled = apply(published, attention, self.draw(attention, scale))
                    told.update(scaled)
            blocks += facts
        mixed = self.scaling in ("symmetric", "nonsymmetric")
        return Protected(published, {**summary(blocks, amplifies=mixed), "blocks": blocks})

    def draw(self, attention: Attention, generator: torch.Generator) -> HeadMatrices:
        """Fresh matrices for one attention layer."""
        heads, size = attention.heads, attention.head_dim
        if self.scaling in ("v1", "diagonal"):
            alpha = self._scales(heads, size, generator)
            gamma = self._scales(heads, size, generator) if self.scaling == "v1" else alpha
            return HeadMatrices(
                torch.diag_embed(alpha),
                torch.diag_embed(1 / alpha),
                torch.diag_embed(gamma),
                torch.diag_embed(1 / gamma),
            )
        gaussian = torch.randn(heads, size, size, generator=generator, dtype=torch.float64)
        scales = self._scales(heads, size, generator)
        if self.scaling == "symmetric":
            basis = torch.linalg.qr(gaussian).Q
            matrix = (basis * scales[:, None, :]) @ basis.mT
            inverse = (basis / scales[:, None, :]) @ basis.mT
        else:
            matrix = (gaussian + EYE_EPS * torch.eye(size, dtype=torch.float64)) * scales[:, None, :]
            inverse = torch.linalg.inv(matrix)
        return HeadMatrices(matrix, inverse.mT, matrix, inverse)

    def _scales(self, heads: int, size: int, generator: torch.Generator) -> Tensor:
        """Scales in [low, high], float64 ``[heads, head_dim]``."""
        uniform = torch.rand(heads, size, generator=generator, dtype=torch.float64)
        if self.distribution == "log_uniform":
            low, high = math.log(self.low), math.log(self.high)
            return torch.exp(low + (high - low) * uniform)
        if self.distribution == "beta":
            # Beta(1/2, 1/2) is the arcsine law, whose quantile function is sin²(πu/2).
            uniform = torch.sin(uniform * (math.pi / 2)) ** 2
        return self.low + (self.high - self.low) * uniform


def rearrange(weights: Weights, base: Weights, mlp: Mlp) -> tuple[dict[str, Tensor], Mapping[str, float]]:
    """Hidden units in the order that is least like the base's (module 2).

    The second value has the inner product with the base before and after, and the share of units moved.
    """
    scores = hidden_units(weights, mlp) @ hidden_units(base, mlp).T
    order = best_order(scores, maximize=False)
    places = torch.arange(mlp.hidden)
    facts = {
        "moved": float((order != places).double().mean()),
        "similarity_before": float(scores.diagonal().sum()),
        "similarity_after": float(scores[order, places].sum()),
    }
    return reorder_hidden(weights, mlp, order), facts
