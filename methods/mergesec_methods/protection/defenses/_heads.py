"""Attention heads in new coordinates: what every protection that multiplies heads by matrices shares.

How exactly the function is kept is derived in ``params`` (the module of PaRaMS): the transform is done in
float64 and rounded once, the relative error of what the network effectively computes with is at most u·κ,
and ``|Δlogit| ≤ κ_max · η`` with η the float32 error bound of the unprotected network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergesec.anatomy import Attention
from mergesec.contracts import ContractError, Weights
from mergesec.surgery import (
    change_heads,
    head_columns,
    head_rows,
    per_query_head,
    rotary_factors,
    rotary_matrix,
)

LOGIT_TOLERANCE = 1e-4
"""Largest |Δlogit| allowed at condition numbers up to WELL_CONDITIONED."""
WELL_CONDITIONED = 400.0
"""Largest condition number of PaRaMS' published range 0.05 to 20."""


@dataclass(frozen=True)
class HeadMatrices:
    """The four factors of ``change_heads``, each float64 ``[heads, head_dim, head_dim]``."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor

    def condition(self) -> float:
        """Largest 2-norm condition number; those of key and output equal those of query and value."""
        both = torch.cat([self.query, self.value])
        return float(torch.linalg.cond(both).max())

    def within(self, attention: Attention) -> HeadMatrices:
        """What of these matrices the attention allows; all of them where it is plain.

        Grouped heads share the matrices of the group's first. Under rotary positions query matrices are
        reduced to what commutes with the rotations, one complex factor per pair, and the key's follow; from
        orthogonal matrices the factors get modulus 1, and are 1 where nothing of the matrix is left. Of normed
        queries and keys signs are kept, and nothing of any other matrix.
        """
        shared = [
            m if len(m) == attention.kv_heads else m[:: attention.group]
            for m in (self.query, self.key, self.value, self.output)
        ]
        if attention.rotary:
            factors = rotary_factors(shared[0])
            if torch.allclose(shared[0] @ shared[0].mT, torch.eye(attention.head_dim, dtype=torch.float64)):
                factors = torch.where(factors.abs() > 1e-9, factors / factors.abs(), 1.0)
            shared[0] = rotary_matrix(factors)
            shared[1] = torch.linalg.inv(shared[0]).mT
        if attention.head_norm is not None:
            shared[:2] = [_signs(matrices) for matrices in shared[:2]]
        return HeadMatrices(*shared)


def _signs(matrices: Tensor) -> Tensor:
    """``matrices`` where they are signs alone, else the identity."""
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype)
    alone = (matrices.abs() == eye).flatten(1).all(1)
    return torch.where(alone[:, None, None], matrices, eye)


def apply(
    weights: Weights, attention: Attention, matrices: HeadMatrices
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The attention layer with every head in new coordinates, and its condition number and effective error.

    Of the matrices only what the attention allows is used; what was left out is said (``left_out``).
    Raises ContractError for tensors below float32 precision.
    """
    require_precision(weights, attention)
    matrices = matrices.within(attention)
    changed = scale_heads(weights, attention, matrices)
    facts: dict[str, Any] = {
        "condition": matrices.condition(),
        "effective_error": effective_error(weights, changed, attention, matrices),
    }
    if left_out := restrictions(attention):
        facts["left_out"] = left_out
    return changed, facts


def restrictions(attention: Attention) -> list[str]:
    """In words, what this attention does not allow."""
    said = []
    if attention.group > 1:
        said.append(f"{attention.group} query heads share each matrix: they have one key and value head")
    if attention.rotary:
        said.append("rotary positions: query and key get one complex factor per pair, no general matrix")
    if attention.head_norm is not None:
        said.append("queries and keys are normed: no matrix but signs commutes with that")
    return said


def scale_heads(weights: Weights, attention: Attention, matrices: HeadMatrices) -> dict[str, Tensor]:
    """The attention layer with every head in new coordinates, as far as the attention allows."""
    allowed = matrices.within(attention)
    return change_heads(
        weights,
        attention,
        query=allowed.query,
        key=allowed.key,
        value=allowed.value,
        output=allowed.output,
    )


def order_of_heads(attention: Attention, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random order of the key and value heads, and one of the query heads: random inside every group."""
    groups = torch.randperm(attention.kv_heads, generator=generator)
    if attention.group == 1:
        return groups, groups
    noise = torch.rand(attention.kv_heads, attention.group, generator=generator)
    return groups, (groups[:, None] * attention.group + noise.argsort(dim=1)).flatten()


def random_rotations(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Orthogonal matrices from the Haar measure, float64 ``[count, size, size]``.

    Q of the QR decomposition of a Gaussian, its columns multiplied by the signs of R's diagonal.
    """
    gaussian = torch.randn(count, size, size, generator=generator, dtype=torch.float64)
    basis, triangle = torch.linalg.qr(gaussian)
    rotations: Tensor = basis * triangle.diagonal(dim1=1, dim2=2).sign()[:, None, :]
    return rotations


def summary(blocks: Sequence[Mapping[str, Any]], *, amplifies: bool) -> dict[str, float]:
    """What a report says of all blocks together; ``amplifies`` is False if no matrix mixes dimensions."""
    condition = max((b.get("condition", 1.0) for b in blocks), default=1.0)
    amplified = condition if amplifies else 1.0
    return {
        "condition": condition,
        "logit_bound": LOGIT_TOLERANCE * max(1.0, amplified / WELL_CONDITIONED),
        "effective_error": max((b.get("effective_error", 0.0) for b in blocks), default=0.0),
    }


def effective_error(before: Weights, after: Weights, attention: Attention, matrices: HeadMatrices) -> float:
    """Largest ``‖W_eff − W‖_F / ‖W‖_F`` over heads and maps; at most u·κ."""
    worst = 0.0
    back = (
        (attention.query, per_query_head(matrices.key.mT, attention)),
        (attention.key, matrices.query.mT),
    )
    for linear, matrix in (*back, (attention.value, matrices.output)):
        old, new = head_rows(before, linear, attention)[0], head_rows(after, linear, attention)[0]
        worst = max(worst, _relative(matrix @ new, old))
    old, new = head_columns(before, attention), head_columns(after, attention)
    return max(worst, _relative(new @ per_query_head(matrices.value, attention), old))


def _relative(value: Tensor, reference: Tensor) -> float:
    norm = torch.linalg.matrix_norm(reference).clamp_min(1e-300)
    return float((torch.linalg.matrix_norm(value - reference) / norm).max())


def require_precision(weights: Weights, attention: Attention) -> None:
    """ContractError if a map is stored with less precision than float32."""
    for linear in attention.maps:
        dtype = weights[linear.weight].dtype
        if torch.finfo(dtype).eps > torch.finfo(torch.float32).eps:
            raise ContractError(
                f"{linear.weight} is {dtype}: scaling needs at least float32 to keep the function"
            )
