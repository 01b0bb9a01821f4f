"""A weight watermark: secret projections of the weights read as bits. White-box ownership proof.

The owner draws positions among the matrices' entries, T random sign vectors x_j over them and T bits
``s_j ∈ {−1, 1}``. Readings are taken of the *task vector*, since the base is public: ``r_j = x_j · (θ − θ0)``.
Embedding makes every ``s_j r_j`` at least m, by the smallest update that gives these readings,
``δ = Xᵀ(XXᵀ)⁻¹ (r' − r)`` with ``r'_j = s_j max(m, s_j r_j)``; m is ``margin`` times ``‖τ‖`` on the chosen entries, which
is the standard deviation of a reading of anything that knows nothing of X. A suspect bears bit j if ``s_j r_j > 0``.

*After a merge* ``θ0 + λ Σ_i τ_i`` the mark is λ times as strong, but so is all else in the reading:

    s_j r_j = λ (≥ m + Σ_{i ≠ owner} s_j x_j · τ_i),     x_j · τ_i of mean 0 and variance ‖τ_i‖²,

so with n other experts whose task vectors are as long as the owner's the bit error rate is at most
``Q(margin / √n)``, Q being the normal tail, *whatever λ is*. (Had the weights themselves been read, as Uchida et
al. do, the base would add noise that λ does not scale.) If random dropping at rate p with rescaling comes
first, the variance is ``(n + p ‖τ_marked‖² / ‖τ‖²) / (1 − p)`` instead of n, in units of ``‖τ‖²``.
A permutation or scaling of the published weights destroys the reading: this is a mark against merging, not against
an attacker who rewrites coordinates.

*False positives.* Bits are fair coins that no unmarked network knows, so its matches are Binomial(T, 1/2) exactly,
whatever the network; the p-value of the observed number is the statistic. A reading of 0 (the base) is a miss.

Source: Uchida et al., "Embedding Watermarks into Deep Neural Networks" (ICMR 2017), for bits as signs of a secret
random projection of weights; they embed by a regulariser while training and project averaged kernels. The closed
form, the reading against the base and the analysis of merging are this benchmark's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mergesec.contracts import (
    Adapted,
    ContractError,
    Defense,
    ProtectContext,
    Protected,
    Verification,
    Weights,
)
from mergesec.weights import mergeable, owners
from mergesec_methods.protection.defenses._marks import decide

CARD = {
    "name": "watermark",
    "kind": "defense",
    "class": "Watermark",
    "version": "1",
    "title": "Weight watermark",
    "paper": "Uchida et al., Embedding Watermarks into Deep Neural Networks, ICMR 2017",
    "url": "https://arxiv.org/abs/1701.04082",
    "summary": "write bits into secret projections of the task vector; read them from a suspect's weights",
    "threat": "protection",
    "hooks": ["protect", "verify"],
    "knowledge": "the expert and the public base; a suspect's weights when verifying",
    "data": "none",
    "modalities": ["image", "text"],
    "seeded": False,  # protect draws nothing: all randomness is in the secret, which always has a seed
    "parameters": {
        "bits": {"type": "int", "default": 64, "min": 8, "max": 4096, "doc": "length of the mark"},
        "entries": {
            "type": "int",
            "default": 65536,
            "min": 64,
            "max": 10000000,
            "doc": "weights the mark is spread over, at most; more make the update smaller",
        },
        "margin": {
            "type": "float",
            "default": 4.0,
            "min": 0.0,
            "max": 1000.0,
            "doc": "smallest reading, in standard deviations of another expert's",
        },
        "significance": {
            "type": "float",
            "default": 1e-3,
            "min": 1e-12,
            "max": 0.5,
            "doc": "p-value below which a suspect is said to bear the mark",
        },
    },
}


class Watermark(Defense):
    """The defense of the card above. ``protect`` keeps keys, shapes and dtypes."""

    hooks = ("protect", "verify")

    def __init__(
        self, bits: int = 64, entries: int = 65536, margin: float = 4.0, significance: float = 1e-3
    ) -> None:
        self.bits, self.entries, self.margin, self.significance = bits, entries, margin, significance

    def secret(self, weights: Weights, ctx: ProtectContext) -> dict[str, Tensor]:
        """``bits`` uint8 ``[T]``, ``signs`` int8 ``[T, M]`` and the sorted ``positions`` int64 ``[M]`` they apply to."""
        generator = ctx.generator()
        spans = carriers(ctx.base)
        total = sum(stop - start for start, stop in spans.values())
        drawn = torch.randint(total, (min(self.entries, total),), generator=generator)
        positions: Tensor = drawn.unique()  # type: ignore[no-untyped-call]
        if len(positions) < 2 * self.bits:
            raise ContractError(f"watermark: {len(positions)} weights are too few for {self.bits} bits")
        signs = torch.randint(2, (self.bits, len(positions)), generator=generator, dtype=torch.int8)
        bits = torch.randint(2, (self.bits,), generator=generator, dtype=torch.uint8)
        return {"positions": positions, "signs": 2 * signs - 1, "bits": bits}

    def protect(self, weights: Weights, ctx: ProtectContext) -> Protected:
        """The expert with the mark. The report has the margin, the size of the update and the bit error expected
        in merges with n further experts.

        Raises ContractError if the expert is the base, for there is no task vector to hide in.
        """
        vector = chosen(weights, ctx.base, ctx.secret["positions"])
        scale = float(vector.norm())
        if not scale:
            raise ContractError("watermark: the expert equals the base where the mark would go")
        signs, bits = ctx.secret["signs"].double(), _signed(ctx.secret["bits"])
        readings = signs @ vector
        wanted = bits * torch.clamp(bits * readings, min=self.margin * scale)
        update = signs.T @ torch.linalg.solve(signs @ signs.T, wanted - readings)
        return Protected(
            added(weights, ctx.base, ctx.secret["positions"], update),
            {
                "margin": self.margin * scale,
                "entries": len(vector),
                "update": float(update.norm()) / scale,
                "bit_error": {str(n): bit_error(self.margin, n) for n in (1, 3, 7)},
            },
        )

    def verify(self, network: nn.Module, ctx: ProtectContext) -> Verification:
        """Which bits the suspect's weights bear; tensors it lacks or has in another shape read as the base's."""
        held = network.network if isinstance(network, Adapted) else network
        vector = chosen(held.state_dict(), ctx.base, ctx.secret["positions"])
        readings = ctx.secret["signs"].double() @ vector
        return decide(readings * _signed(ctx.secret["bits"]) > 0, 0.5, self.significance)


def bit_error(margin: float, others: int) -> float:
    """Largest bit error rate expected after a linear merge with ``others`` experts: ``Q(margin / √n)``."""
    return 0.5 * math.erfc(margin / math.sqrt(2 * others))


def _signed(bits: Tensor) -> Tensor:
    return 2.0 * bits.double() - 1.0


def carriers(base: Weights) -> dict[str, tuple[int, int]]:
    """The floating matrices (and kernels) of the base, sorted: name -> its range of positions."""
    spans: dict[str, tuple[int, int]] = {}
    tied, place = owners(base), 0
    for name in sorted(base):
        if mergeable(base[name]) and base[name].dim() > 1 and name not in tied:
            spans[name] = (place, place + base[name].numel())
            place += base[name].numel()
    return spans


def chosen(weights: Weights, base: Weights, positions: Tensor) -> Tensor:
    """``weights − base`` at these positions, float64 ``[M]``; 0 where ``weights`` lacks the base's tensor."""
    parts = []
    for name, local in _located(base, positions):
        reference = base[name].reshape(-1)[local].double()
        own = weights.get(name)
        if own is None or own.shape != base[name].shape:
            parts.append(torch.zeros_like(reference))
        else:
            parts.append(own.detach().reshape(-1)[local.to(own.device)].cpu().double() - reference)
    return torch.cat(parts)


def added(weights: Weights, base: Weights, positions: Tensor, update: Tensor) -> dict[str, Tensor]:
    """``weights`` plus ``update`` ``[M]`` at these positions; tied names stay equal."""
    moved: dict[str, Tensor] = {}
    done = 0
    for name, local in _located(base, positions):
        flat = weights[name].reshape(-1).clone()
        part = update[done : done + len(local)]
        flat[local] = (flat[local].double() + part).to(flat.dtype)
        moved[name] = flat.reshape(weights[name].shape)
        done += len(local)
    tied = owners(base)
    return {name: moved.get(tied.get(name, name), tensor) for name, tensor in weights.items()}


def _located(base: Weights, positions: Tensor) -> list[tuple[str, Tensor]]:
    """(name, positions within that tensor) of every tensor that carries part of the mark."""
    found = []
    for name, (start, stop) in carriers(base).items():
        inside = positions[(positions >= start) & (positions < stop)] - start
        if len(inside):
            found.append((name, inside))
    return found
