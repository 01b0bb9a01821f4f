"""Low-rank updates as factors: Δ = B A, as LoRA adapters store them. Nothing here makes Δ unless asked.

``left`` is B ``[m, r]`` with the adapter's scale (LoRA: α/r) already in it, ``right`` is A ``[r, n]``.
Factors come from adapter files, or from a dense update by ``extract``. Sums and concatenations of
adapters are ``joined``, cut back to a rank with ``truncated``; ``tied`` is KnOTS' joint basis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergesec_methods.merging._spectral import leading


@dataclass(frozen=True)
class Factors:
    """An update ``left @ right``; ``left`` ``[m, r]``, ``right`` ``[r, n]``, r may be 0."""

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """Stored rank r, an upper bound of the update's."""
        return self.left.shape[1]

    def dense(self) -> Tensor:
        """Δ ``[m, n]``."""
        return self.left @ self.right


def extract(update: Tensor, rank: int = 0, noise: float = 0.0) -> Factors:
    """Factors of the best approximation of rank ``rank`` (0: the numerical rank) of a dense update ``[m, n]``.

    Singular values at most ``noise``, or at most 1e-6 of the largest, count as zero.
    """
    if not bool(update.any()):  # what LoRA left alone
        return Factors(update.new_zeros(len(update), 0).float(), update.new_zeros(0, update.shape[1]).float())
    size = min(update.shape)
    found = leading(update.float(), min(rank, size) if rank else size, single=bool(rank))
    kept = found.sigma > noise
    return Factors(found.left[:, kept] * found.sigma[kept], found.right[:, kept].T)


def rounding(weights: Tensor) -> float:
    """What rounding to the stored type adds to the singular values of ``weights − base``, at most.

    An expert stored as fl(θ0 + BA) differs from it by independent errors of up to u |θ| per entry (unit
    roundoff u): a matrix whose largest singular value is about their root mean square, u ‖θ‖_F / √(3mn),
    times √m + √n. The √3 is left out for safety.
    """
    rows, columns = weights.shape
    unit = torch.finfo(weights.dtype).eps / 2
    spread = (math.sqrt(rows) + math.sqrt(columns)) / math.sqrt(rows * columns)
    return unit * spread * float(torch.linalg.vector_norm(weights.float()))


def joined(members: Sequence[Factors], coefficients: Sequence[float] = ()) -> Factors:
    """Σ w_i B_i A_i, exactly, of stored rank Σ r_i: factors side by side. All coefficients 1 if none are given."""
    weights = list(coefficients) or [1.0] * len(members)
    left = torch.cat([w * f.left for w, f in zip(weights, members, strict=True)], dim=1)
    return Factors(left, torch.cat([f.right for f in members]))


def truncated(factors: Factors, rank: int) -> Factors:
    """The best approximation of rank ``rank``: QR of both factors, then an SVD of ``[r, r]``."""
    left, inner_left = torch.linalg.qr(factors.left.double())
    right, inner_right = torch.linalg.qr(factors.right.double().T)
    u, sigma, vh = torch.linalg.svd(inner_left @ inner_right.T)
    u, sigma, vh = u[:, :rank], sigma[:rank], vh[:rank]
    made = Factors(left @ u * sigma, vh @ right.T)
    return Factors(made.left.to(factors.left.dtype), made.right.to(factors.right.dtype))


def joint_basis(updates: Sequence[Tensor], floor: float) -> tuple[Tensor, list[Tensor]]:
    """U ``[m, k]`` and ΣV_iᵀ ``[k, n]`` per update, from [Δ_1 … Δ_T] = U Σ [V_1ᵀ … V_Tᵀ]; float32.

    Directions with singular values at most ``floor``, or at most 1e-6 of the largest, are left out.
    """
    side_by_side = torch.cat([u.float() for u in updates], dim=1)
    found = leading(side_by_side, min(side_by_side.shape), single=False)
    kept = found.sigma > floor
    weighted = (found.right[:, kept] * found.sigma[kept]).T
    return found.left[:, kept], list(torch.split(weighted, [u.shape[1] for u in updates], dim=1))


def tied(members: Sequence[Factors], floor: float) -> tuple[Tensor, list[Tensor]]:
    """``joint_basis`` of B_i A_i without making them: a QR of [B_1 … B_T] leaves Σ r_i rows to decompose."""
    basis, inner = torch.linalg.qr(torch.cat([f.left for f in members], dim=1).float())
    parts = torch.split(inner, [f.rank for f in members], dim=1)
    small, shares = joint_basis([p @ f.right.float() for p, f in zip(parts, members, strict=True)], floor)
    return basis @ small, shares
