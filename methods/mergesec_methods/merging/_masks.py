"""Merges that serve every task its own part of one task vector: θ_t = θ0 + s_t · m_t ⊙ τ.

What is kept is one network, one task vector and one bit per entry and task, never a network per task.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mergesec.contracts import (
    Backbone,
    ContractError,
    Expert,
    MergeContext,
    Merged,
    MergeMethod,
    Weights,
    load_network,
)
from mergesec.tensorwise import (
    Loops,
    Piece,
    Span,
    Workspace,
    addresses,
    batches,
    check_experts,
    kernels,
    slab,
    spans,
    sweep,
    wake,
)
from mergesec.weights import mergeable, owners

ENTRIES = 1 << 20
"""Entries of all task vectors together that a rule here holds at a time on a CPU: 4 MiB, for the cache."""
DEVICE_ENTRIES = 1 << 26
"""The same elsewhere: 256 MiB, as a kernel launch costs more than a cache saves."""


def split(piece: Piece) -> Iterator[tuple[slice, Piece]]:
    """Smaller pieces of a piece, and where in it they lie; they start at multiples of 8."""
    entries = ENTRIES if piece.base.device.type == "cpu" else DEVICE_ENTRIES
    size = max(entries >> (len(piece.experts) - 1).bit_length(), 1 << 12)
    for start in range(0, piece.base.numel(), size):
        yield slice(start, start + size), piece.part(start, start + size)


def task_vectors(piece: Piece) -> Tensor:
    """τ of all experts ``[T, n]`` in scratch memory; the caller may write to it."""
    taus = rows(piece, "taus")
    for index, expert in enumerate(piece.experts):
        torch.sub(expert, piece.base, out=taus[index])
    return taus


def sums_in_order(count: int) -> bool:
    """Whether torch adds so many task vectors up one after the other, as compiled loops do."""
    module = kernels()
    return module is not None and count <= module.MOST_ROWS


def rows(piece: Piece, key: str) -> Tensor:
    """``[T, n]`` uninitialised float32 to compute in; reused by the next piece."""
    count, size = len(piece.experts), piece.base.numel()
    return piece.workspace.row(("rows", key), count * size).view(count, size)


def greater(left: Tensor, right: float) -> Tensor:
    """``left > right``; NumPy's comparison into Booleans is the one that is vectorised on CPUs."""
    if left.device.type == "cpu":
        return torch.from_numpy(np.greater(left.numpy(), right))
    return left > right


def greater_equal(left: Tensor, right: Tensor) -> Tensor:
    """``left ≥ right`` of equal shapes; see ``greater``."""
    if left.device.type == "cpu":
        return torch.from_numpy(np.greater_equal(left.numpy(), right.numpy()))
    return left >= right


def pack(chosen: Tensor) -> Tensor:
    """Bits of a Boolean ``[..., n]``: uint8 ``[..., ⌈n/8⌉]``, entry i in bit i mod 8 of its byte."""
    if chosen.device.type == "cpu":
        return torch.from_numpy(np.packbits(chosen.numpy(), axis=-1, bitorder="little"))
    return pack_on_device(chosen)


def unpack(packed: Tensor, count: int) -> Tensor:
    """The first ``count`` bits of ``[⌈n/8⌉]`` as float32 ``[count]``: 1.0 where set, else 0.0."""
    if packed.device.type == "cpu":
        bits = np.unpackbits(packed.numpy(), count=count, bitorder="little")
        return torch.from_numpy(bits).float()
    return unpack_on_device(packed, count)


def pack_on_device(chosen: Tensor) -> Tensor:
    """``pack`` in torch's own operations, for any device."""
    *leading, count = chosen.shape
    bits = torch.nn.functional.pad(chosen.to(torch.uint8), (0, -count % 8)).view(*leading, -1, 8)
    shifts = torch.arange(8, dtype=torch.uint8, device=chosen.device)
    return (bits << shifts).sum(-1, dtype=torch.uint8)


def unpack_on_device(packed: Tensor, count: int) -> Tensor:
    """``unpack`` in torch's own operations, for any device."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & 1).view(-1)[:count].float()


class _Parts(NamedTuple):
    """What is kept of one tensor: shared weights and task vector as the base's, packed masks ``[T, ⌈n/8⌉]``."""

    shared: Tensor
    vector: Tensor
    masks: Tensor


class MaskedMerge(MergeMethod):
    """Base of merges with a mask per task. A subclass has ``localize``, and ``scales`` if it rescales.

    Stored are θ0 + λτ as the shared weights (they serve tasks that have no expert, and are what a
    repair sees), and in ``extra``, under ``vector|NAME``, ``mask|TASK|NAME``, ``scale|TASK`` and
    ``reach``: τ in the base's type, the packed m_t, s_t and λ. A task's weights are put together as
    shared + (s_t · m_t − λ) ⊙ τ, so what a repair does to the shared weights reaches every task.
    """

    scaling: float = 1.0
    """λ of the shared weights."""

    def survey(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Any:
        """What the rule must know before the first tensor, and where it may gather sums of blocks, which come in
        any order and from several threads at once."""
        return None

    @abstractmethod
    def localize(self, piece: Piece, vector: Tensor, facts: Any) -> Tensor:
        """Write τ of one block to ``vector`` ``[n]``, float32; the result are the masks, bool ``[T, n]``."""

    def fused(
        self,
        loops: Loops,
        vector: Tensor,
        shared: Tensor,
        masks: np.ndarray[Any, np.dtype[np.int64]],
        facts: Any,
    ) -> bool:
        """τ, θ0 + λτ and the packed masks (at these addresses ``[T]``) of a block's first ``loops.size``
        entries by a compiled loop; False if there is none."""
        return False

    def scales(self, experts: Sequence[Expert], facts: Any) -> list[float]:
        """s_t per expert, asked for after the last block."""
        return [1.0] * len(experts)

    def facts(self, experts: Sequence[Expert], facts: Any) -> dict[str, Any]:
        """Small JSON facts kept with a merge."""
        return {"scaling": self.scaling}

    # ------------------------------------------------------------------ the driver

    def merge(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Merged:
        """Shared weights, task vector, masks and scales; ContractError if two experts have one task."""
        check_experts(base, experts)
        tasks = [expert.task for expert in experts]
        for task in tasks:
            if tasks.count(task) > 1:
                raise ContractError(f"{self.name}: two experts of '{task}'; a task has one mask")
        wake(base, experts)
        facts = self.survey(base, experts, ctx)
        tied = owners(base)
        shared: dict[str, Tensor] = {n: t for n, t in base.items() if not mergeable(t)}
        extra: dict[str, Tensor] = {"reach": torch.tensor(self.scaling)}
        owned = [name for name in base if name not in shared and name not in tied]
        for names in batches(base, owned):
            made = self._tensors(names, base, experts, facts)
            for name, own in made.items():
                shared[name], extra[f"vector|{name}"] = own.shared, own.vector
                extra |= {f"mask|{task}|{name}": row for task, row in zip(tasks, own.masks, strict=True)}
        for name, owner in tied.items():
            if name not in shared:
                shared[name], extra[f"vector|{name}"] = shared[owner], extra[f"vector|{owner}"]
                extra |= {f"mask|{task}|{name}": extra[f"mask|{task}|{owner}"] for task in tasks}
        for task, scale in zip(tasks, self.scales(experts, facts), strict=True):
            extra[f"scale|{task}"] = torch.tensor(scale)
        return Merged({n: shared[n] for n in base}, extra=extra, info=self.facts(experts, facts))

    def _tensors(
        self, names: Sequence[str], base: Weights, experts: Sequence[Expert], facts: Any
    ) -> dict[str, _Parts]:
        """What becomes of some tensors, cut from one piece of memory."""
        sources = [(name, base[name], [e.weights[name] for e in experts]) for name in names]
        device = sources[0][1].device
        types: list[tuple[Sequence[int], torch.dtype]] = []
        for _, own, _ in sources:
            rows = (len(experts), -(-own.numel() // 8))
            types += [(own.shape, own.dtype), (own.shape, own.dtype), (rows, torch.uint8)]
        cut = iter(slab(types, device))
        made = {name: _Parts(next(cut), next(cut), next(cut)) for name in names}

        def visit(span: Span, workspace: Workspace) -> None:
            for _, piece in split(span.piece(workspace)):
                self._into(made[span.name], piece, facts)

        sweep((span for source in sources for span in spans(*source)), visit, device)
        return made

    def _into(self, into: _Parts, piece: Piece, facts: Any) -> None:
        """One block."""
        span = slice(piece.start, piece.start + piece.base.numel())
        direct = into.shared.dtype == torch.float32
        loops = Loops.of(piece) if direct else None
        if loops is not None:
            places = addresses(into.masks[:, piece.start // 8 :])
            if self.fused(loops, into.vector.view(-1)[span], into.shared.view(-1)[span], places, facts):
                piece = piece.part(loops.size, piece.base.numel())
                span = slice(piece.start, span.stop)
        if not piece.base.numel():
            return
        row = into.vector.view(-1)[span] if direct else piece.workspace.row("vector", piece.base.numel())
        bits = pack(self.localize(piece, row, facts))
        into.masks[:, piece.start // 8 : piece.start // 8 + bits.shape[1]] = bits
        if direct:
            torch.add(piece.base, row, alpha=self.scaling, out=into.shared.view(-1)[span])
        else:
            into.vector.view(-1)[span] = row
            into.shared.view(-1)[span] = row.mul_(self.scaling).add_(piece.base)

    # ------------------------------------------------------------------ serving

    def network(self, backbone: Backbone, merged: Merged, task: str) -> nn.Module:
        """The network of ``task``; the shared one if no expert of that task was merged."""
        return load_network(backbone, {**task_weights(merged, task), **merged.per_task.get(task, {})})


def task_weights(merged: Merged, task: str) -> Weights:
    """shared + (s_t · m_t − λ) ⊙ τ in the shared weights' types, computed in float32, rounded once."""
    scale = merged.extra.get(f"scale|{task}")
    if scale is None:
        return merged.shared
    reach = float(merged.extra["reach"])
    found: dict[str, Tensor] = {}
    for name, shared in merged.shared.items():
        vector = merged.extra.get(f"vector|{name}")
        if vector is None:
            found[name] = shared
            continue
        factor = unpack(merged.extra[f"mask|{task}|{name}"], shared.numel()).view(shared.shape)
        factor.mul_(float(scale)).sub_(reach)
        found[name] = torch.addcmul(shared.float(), factor, vector.float()).to(shared.dtype)
    return found
