"""Linear algebra of the merges that look at a weight matrix's singular values, without full SVDs.

What they need is less than an SVD: an orthogonal polar factor A (AᵀA)^(−1/2), a mean singular value,
or the leading triplets. All of it follows from an eigendecomposition of the Gram matrix on the
smaller side. That squares the condition number, so the Gram matrix is formed in double precision
(singular values are then resolved down to about 2e-8 of the largest, finer than a float32 SVD
does), except where single precision is known to do: polar factors of well conditioned matrices,
and leading triplets that are not small against the first. The three thresholds below decide; each is
set so that the result is no further from the exact one than a float32 SVD's, about 1e-5 of its norm.

Null singular values. An SVD returns arbitrary orthonormal vectors for them, and a rule that gives
them weight (UVᵀ does) then depends on the library. Here they are left out: everything acts on the
range, where it equals the SVD's answer, and is zero beyond. Null means below ``NULL`` times the
largest singular value; a float32 SVD finds no meaningful vectors there either.

``Aᵀ @ A`` is handed to numpy on a CPU because it calls ``syrk`` for it, half the work of a product.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from mergesec.contracts import ContractError
from mergesec.tensorwise import Piece, TensorwiseMerge, running_mean

NULL = 1e-6
"""Singular values at most this share of the largest count as zero."""
WELL_CONDITIONED = 1e-3
"""From this reciprocal condition of the Gram matrix on, single precision costs no more than 1e-5."""
MILD = 3e-3
"""From this ratio of the singular values on, the root may be found in double precision and applied in single."""
NOT_FINITE = "has entries that are not finite, or too large to square"
NOT_SMALL = 0.05
"""Single precision finds triplets with singular values from this share of the first on."""


# --------------------------------------------------------------------------- the merge methods' base


class MatrixMerge(TensorwiseMerge):
    """θ0 + λτ* with τ* from ``matrix`` for matrices and the mean task vector for everything else.

    Matrices are what ``takes`` says: by default the two-dimensional tensors whose name contains none of
    ``exclude``.
    """

    exclude: Sequence[str] = ()
    pointwise = True

    def takes(self, name: str, base: Tensor) -> bool:
        return base.ndim == 2 and base.numel() > 0 and not any(part in name for part in self.exclude)

    @abstractmethod
    def matrix(self, base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        """τ* ``[m, n]``, float32, of one matrix; the inputs are float32 ``[m, n]`` and read-only."""

    def whole(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: Any) -> Tensor | None:
        if not self.takes(name, base):
            return None
        try:
            return self.matrix(base.float(), [e.to(base.device, torch.float32) for e in experts])
        except ArithmeticError as error:
            raise ContractError(f"{self.name}: '{name}': {error}") from None

    def combine(self, piece: Piece, out: Tensor, facts: Any) -> None:
        running_mean(piece, out)
        out.sub_(piece.base)


def task_sum(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """Σ τ_i ``[m, n]``."""
    total = experts[0] - base
    for expert in experts[1:]:
        total.add_(expert).sub_(base)
    return total


# --------------------------------------------------------------------------- building blocks


def gram(matrix: Tensor) -> Tensor:
    """AᵀA ``[n, n]`` of A ``[m, n]``, in A's type."""
    if matrix.device.type != "cpu":
        return matrix.T @ matrix
    array = matrix.numpy()
    return torch.from_numpy(array.T @ array)


def eigh(symmetric: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest eigenvalues ``[k]``, ascending, and their eigenvectors ``[n, k]``.

    Raises ArithmeticError if the matrix is not finite.
    """
    size = len(symmetric)
    if not bool(torch.isfinite(symmetric.diagonal().sum())):
        raise ArithmeticError(NOT_FINITE)
    if symmetric.device.type != "cpu":
        values, vectors = torch.linalg.eigh(symmetric)
    elif count < size // 2:
        part = (size - count, size - 1)
        found = scipy.linalg.eigh(symmetric.numpy(), driver="evr", subset_by_index=part, check_finite=False)
        values, vectors = map(torch.from_numpy, found)
    else:
        found = scipy.linalg.eigh(symmetric.numpy(), driver="evd", check_finite=False)
        values, vectors = map(torch.from_numpy, found)
    return values[-count:], vectors[:, -count:]


def well_conditioned(symmetric: Tensor) -> bool:
    """Whether a float32 Gram matrix is so far from singular that single precision does for its root."""
    array = symmetric.numpy()
    factor, failed = scipy.linalg.lapack.spotrf(array)
    if failed:
        return False
    reciprocal, _ = scipy.linalg.lapack.spocon(factor, np.abs(array).sum(0).max())
    return bool(reciprocal >= WELL_CONDITIONED)


def polar(matrix: Tensor) -> tuple[Tensor, float]:
    """The polar factor ``[m, n]`` of A ``[m, n]`` float32, and A's nuclear norm.

    UVᵀ over the triplets that are not null, that is A (AᵀA)^(−1/2) on the range; on the smaller side.
    """
    if not matrix.numel():
        return matrix.clone(), 0.0
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    rows, columns = tall.shape
    inner = gram(tall) if tall.device.type == "cpu" and 2 * rows >= 3 * columns else None
    if inner is None or not well_conditioned(inner):  # (nearly) square ones hardly ever are
        tall = tall.double()
        inner = gram(tall)
    values, vectors = eigh(inner, columns)
    sigma = values.clamp(min=0.0).sqrt()
    kept = sigma > NULL * sigma[-1]
    sigma, vectors = sigma[kept], vectors[:, kept]
    root = gram((vectors / sigma.sqrt()).T)
    if len(sigma) == columns and sigma[0] > MILD * sigma[-1]:
        tall, root = tall.float(), root.float()
    factor = (tall @ root).float()
    return (factor if tall.shape == matrix.shape else factor.T), float(sigma.sum())


@dataclass(frozen=True)
class Triplets:
    """Singular triplets: ``left`` ``[m, k]``, ``sigma`` ``[k]`` falling, ``right`` ``[n, k]``; float32."""

    left: Tensor
    sigma: Tensor
    right: Tensor
    single: bool = False
    """Whether single precision did."""


def leading(matrix: Tensor, count: int, single: bool = True) -> Triplets:
    """The ``count`` ≥ 1 leading triplets of A ``[m, n]`` float32; fewer if the rest is null.

    With ``single`` single precision is tried first; its answer is kept if no triplet is small.
    """
    tall = matrix.T if _wide(matrix) else matrix
    single = single and matrix.device.type == "cpu"
    if single:
        inner = gram(tall)
        single = bool(torch.isfinite(inner.diagonal().sum()))
    if single:
        values, vectors = eigh(inner, count)
        single = bool(values[0] > NOT_SMALL**2 * values[-1])
    if not single:
        tall = tall.double()
        _, vectors = eigh(gram(tall), count)
    return _triplets(tall, vectors.flip(1), _wide(matrix), single)


def split(matrix: Tensor, count: int) -> tuple[Triplets, Tensor | None]:
    """The ``count`` leading triplets of A ``[m, n]`` float32 (fewer if the rest is null) and, if m ≤ n, an
    orthonormal basis ``[m, m − k]`` of what their left vectors leave."""
    tall = (matrix.T if _wide(matrix) else matrix).double()
    _, vectors = eigh(gram(tall), tall.shape[1])
    vectors = vectors.flip(1)
    found = _triplets(tall, vectors[:, :count], _wide(matrix))
    rest = vectors[:, len(found.sigma) :].float() if _wide(matrix) else None
    return found, rest


def _wide(matrix: Tensor) -> bool:
    return matrix.shape[0] <= matrix.shape[1]


def _triplets(tall: Tensor, vectors: Tensor, wide: bool, single: bool = False) -> Triplets:
    """From the Gram matrix's eigenvectors, largest first."""
    images = tall @ vectors
    sigma = torch.linalg.vector_norm(images, dim=0)
    kept = sigma > NULL * sigma.max() if sigma.numel() else sigma > 0.0
    sigma, vectors = sigma[kept], vectors[:, kept].float()
    images = (images[:, kept] / sigma).float()
    left, right = (vectors, images) if wide else (images, vectors)
    return Triplets(left, sigma.float(), right, single)
