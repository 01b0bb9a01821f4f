"""Regression of linear layers on their inputs: Gram matrices by forward hooks, and the merge they give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from mergesec.contracts import ContractError, Expert, Weights

PIVOT = 1e-6
"""Smallest Cholesky pivot of a unit-diagonal Gram matrix that float32 inputs resolve."""
SHRINKAGE = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Tried in turn until the system is regular: off-diagonals are divided by one plus this."""


def scale_off_diagonal(gram: Tensor, scale: float) -> Tensor:
    """A copy of ``gram`` ``[d, d]`` with everything off the diagonal times ``scale``."""
    scaled = gram * scale
    scaled.diagonal().copy_(gram.diagonal())
    return scaled


class Regression:
    """Sums over experts that fix the merge of one linear layer: RegMean in one pass, whatever their number.

    With G_i ``[in, in]`` the Gram matrix of expert i's inputs and τ_i ``[out, in]`` its task vector,
    the merge solves (Σ G̃_i) τᵀ = Σ G̃_i τ_iᵀ, where G̃ has its off-diagonals times α. Beside Σ G_i and
    Σ G_i τ_iᵀ the sum Σ diag(G_i) τ_iᵀ is kept, so that α can be chosen after the data are gone.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        self.gram = torch.zeros(inputs, inputs, device=device)
        self.moment = torch.zeros(inputs, outputs, device=device)
        self.diagonal = torch.zeros(inputs, outputs, device=device)
        self.total = torch.zeros(inputs, outputs, device=device)
        self.count = 0

    def add(self, gram: Tensor, delta: Tensor, name: str = "") -> None:
        """One expert's Gram matrix ``[in, in]`` and task vector ``[out, in]``."""
        if not bool(torch.isfinite(gram).all()):
            raise ContractError(f"the inputs of '{name}' are not finite")
        moved = delta.to(self.gram.device, torch.float32).T
        gram = gram.to(self.gram)
        self.gram += gram
        self.moment.addmm_(gram, moved)
        self.diagonal.addcmul_(gram.diagonal()[:, None], moved)
        self.total += moved
        self.count += 1

    def solve(self, scale: float) -> tuple[Tensor, float]:
        """(τ ``[out, in]`` float32, the α that was used: ``scale`` unless the system was singular).

        Solved by Cholesky in float64 after scaling the matrix to a unit diagonal, which leaves the
        solution as it is. A singular system gets slightly smaller off-diagonals, and an input that
        was zero on all rows says nothing about its column, which then is the average.
        """
        diagonal = self.gram.diagonal().double()
        seen = diagonal > 0
        root = torch.where(seen, diagonal, 1.0).rsqrt()
        unit = self.gram.double() * root * root[:, None]
        unit.diagonal().fill_(1.0)
        for shrinkage in SHRINKAGE:
            alpha = scale / (1 + shrinkage)
            factor, failed = torch.linalg.cholesky_ex(scale_off_diagonal(unit, alpha))
            if not int(failed) and float(factor.diagonal().min()) ** 2 > PIVOT:
                break
        else:
            raise ContractError("a Gram matrix stays singular however small its off-diagonals are made")
        right = alpha * self.moment.double() + (1 - alpha) * self.diagonal.double()
        solution = torch.cholesky_solve(right * root[:, None], factor) * root[:, None]
        average = self.total.double() / self.count
        solution = torch.where(seen[:, None], solution, average)
        return solution.T.float().contiguous(), alpha


class InputGrams:
    """Mean of x xᵀ over the rows that enter each linear layer, gathered while the context is open.

    Keys are names of weights: ``<module>.weight`` of every ``nn.Linear`` that is called, and
    ``<module>.in_proj_weight`` of packed ``nn.MultiheadAttention`` used as self-attention. Weights
    that a module reads without calling a linear layer (its ``out_proj``) are not reached. No
    activation outlives its forward pass.
    """

    def __init__(self, network: nn.Module, within: str = "") -> None:
        self.network = network
        self.prefix = f"{within}." if within else ""
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}
        self._handles: list[Any] = []
        self._last: tuple[Tensor, int, Tensor, int] | None = None
        self._mixed: set[str] = set()

    def __enter__(self) -> InputGrams:
        for path, module in self.network.named_modules():
            if not f"{path}.".startswith(self.prefix):
                continue
            if isinstance(module, nn.Linear):
                hook = self._linear(join(path, "weight"))
            elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
                hook = self._packed(join(path, "in_proj_weight"))
            else:
                continue
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._last = None

    def means(self) -> dict[str, Tensor]:
        """G ``[in, in]`` float32 per weight, divided by the number of rows so that tasks count alike."""
        return {n: total / self.rows[n] for n, total in self.sums.items() if n not in self._mixed}

    def _linear(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._add(name, args[0] if args else kwargs["input"])

        return hook

    def _packed(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            if given["query"] is given["key"] is given["value"]:
                self._add(name, given["query"])
            else:
                self._mixed.add(name)

        return hook

    def _add(self, name: str, inputs: Tensor) -> None:
        last = self._last  # query, key and value are maps of one tensor: its Gram matrix is made once
        if last is None or last[0] is not inputs or last[1] != inputs._version:
            flat = inputs.detach().reshape(-1, inputs.shape[-1]).float()
            last = self._last = (inputs, inputs._version, flat.T @ flat, flat.shape[0])
        if name in self.sums:
            self.sums[name] += last[2]
        else:
            self.sums[name] = last[2].clone()
        self.rows[name] = self.rows.get(name, 0) + last[3]


def join(path: str, name: str) -> str:
    """The name of a module's tensor in the network's ``state_dict``."""
    return f"{path}.{name}" if path else name


def linear_weights(network: nn.Module) -> list[str]:
    """Names of the weights of linear maps: ``nn.Linear`` and packed projections."""
    found = []
    for path, module in network.named_modules():
        if isinstance(module, nn.Linear):
            found.append(join(path, "weight"))
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            found.append(join(path, "in_proj_weight"))
    return found


def tied_names(network: nn.Module) -> dict[str, list[str]]:
    """For every tensor of the network, the names under which its memory is reached, itself included."""
    groups: dict[int, list[str]] = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return {name: names for names in groups.values() for name in names}


def gather(
    sums: dict[str, Regression],
    grams: Mapping[str, Tensor],
    base: Weights,
    expert: Expert,
    ties: Mapping[str, Sequence[str]],
) -> None:
    """Add one expert's Gram matrices to ``sums``, by weight; uses of one tied weight are added up."""
    for used, gram in grams.items():
        name = ties[used][0]
        if name not in sums:
            sums[name] = Regression(gram.shape[0], base[name].shape[0], gram.device)
        sums[name].add(gram, expert.weights[name].float() - base[name].float(), name)
