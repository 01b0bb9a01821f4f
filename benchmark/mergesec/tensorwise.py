"""Merges of the form θ0 + λ·τ*, done tensor by tensor and, within one, block by block.

One pass reads every input once and writes the result once; blocks are small enough to stay in the
processor's cache between the operations of a rule. The same pass serves weights in memory and
weights that are read lazily from files, so memory is bounded by the largest tensor, not the network.

A merge method of this kind says what τ* is, in one of two ways:

* ``combine`` for rules that look at one entry of every expert at a time (task arithmetic, TIES...);
* ``whole`` for rules that need a whole tensor (SVD-based merges...).

Floating tensors are computed in float32 and rounded once to the base's type. Integer buffers are
the base's; names that share memory in the base (tied weights) are computed once.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import islice
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mergesec.contracts import ContractError, Expert, MergeContext, Merged, MergeMethod, Weights
from mergesec.weights import Outline, check_same_layout, mergeable, outlines, owners

BLOCK = 1 << 18
"""Entries a rule sees at a time on a CPU: 1 MiB of float32, so that a few rows fit in the cache."""
BATCH = 1 << 23
"""Entries merged together where tensors lie in memory: results share pages, threads share the work."""
SMALL = 1 << 12
"""Tensors of at most so many entries go through a rule side by side: each alone costs more than its entries."""

WORTH = 1 << 28
"""Entries of all experts together from which on compiled loops earn back the time to load them."""
SHORTEST = 1 << 7
"""Entries of a block from which on they are called."""
_found: list[ModuleType | None] = []
"""The compiled loops, or None where they cannot be had; empty until a merge was worth asking."""


def wake(base: Weights, experts: Sequence[Expert]) -> None:
    """Load the compiled loops (extra ``fast``) if this merge is worth it. They change no bit of a result."""
    if _found or next(iter(base.values())).device.type != "cpu":
        return
    if len(experts) * sum(math.prod(like.shape) for like in outlines(base).values()) < WORTH:
        return
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):  # torch's roundings are known there
        _found.append(None)
        return
    try:
        _found.append(import_module("mergesec.kernels"))
    except Exception:  # not installed, not fit for the NumPy at hand, or no place to keep compiled code
        _found.append(None)


def kernels() -> ModuleType | None:
    """``mergesec.kernels``, if it was loaded."""
    return _found[0] if _found else None


def empty(shape: Sequence[int], device: torch.device) -> Tensor:
    """Uninitialised float32. NumPy asks the system for huge pages, torch does not: first writes cost a third."""
    (made,) = slab([(shape, torch.float32)], device)
    return made


def slab(wanted: Sequence[tuple[Sequence[int], torch.dtype]], device: torch.device) -> list[Tensor]:
    """Uninitialised tensors of these shapes and types, on a CPU cut from one piece of memory.

    NumPy's allocator asks for huge pages from 4 MiB on, which most tensors alone do not reach.
    """
    if device.type != "cpu":
        return [torch.empty(tuple(shape), dtype=dtype, device=device) for shape, dtype in wanted]
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in wanted]
    memory = torch.from_numpy(np.empty(max(sum(-(-size // 64) * 64 for size in sizes), 1), np.uint8))
    cut, start = [], 0
    for (shape, dtype), size in zip(wanted, sizes, strict=True):
        cut.append(memory[start : start + size].view(dtype).view(tuple(shape)))
        start += -(-size // 64) * 64
    return cut


@dataclass
class Workspace:
    """Rows of scratch memory that blocks take turns in; never part of a result."""

    device: torch.device
    rows: dict[object, Tensor] = field(default_factory=dict)

    def row(self, key: object, size: int) -> Tensor:
        """``[size]`` float32, the same memory for the same ``key`` as long as it is large enough."""
        held = self.rows.get(key)
        if held is None or held.numel() < size:
            held = self.rows[key] = torch.empty(size, dtype=torch.float32, device=self.device)
        return held[:size]


@dataclass(frozen=True)
class Piece:
    """A block of one tensor: the same entries of the base and of every expert.

    ``base`` and each of ``experts`` are float32 ``[n]`` and read-only; ``start`` is the position of
    the first entry in the flattened tensor ``name``. On a CPU pieces start at multiples of ``BLOCK``.
    """

    name: str
    start: int
    base: Tensor
    experts: Sequence[Tensor]
    workspace: Workspace

    def scratch(self, key: object) -> Tensor:
        """``[n]`` uninitialised float32 to compute in; reused by the next piece."""
        return self.workspace.row(("rule", key), self.base.numel())

    def task_vector(self, index: int, key: object = "tau") -> Tensor:
        """τ_index ``[n]`` in scratch memory ``key``; the caller may write to it."""
        return torch.sub(self.experts[index], self.base, out=self.scratch(key))

    def part(self, start: int, stop: int) -> Piece:
        """The entries from ``start`` to ``stop``."""
        experts = [expert[start:stop] for expert in self.experts]
        return Piece(self.name, self.start + start, self.base[start:stop], experts, self.workspace)


@dataclass(frozen=True)
class Loops:
    """The compiled loops for one block, whose first ``size`` entries (a multiple of 64) they take."""

    module: ModuleType
    piece: Piece
    size: int
    others: np.ndarray[Any, np.dtype[np.int64]]
    """Where the experts' entries lie."""

    @classmethod
    def of(cls, piece: Piece) -> Loops | None:
        """None if nothing is loaded, or nothing that fits the block."""
        module = kernels()
        if module is None or piece.base.numel() < SHORTEST or piece.base.device.type != "cpu":
            return None
        if any(row.stride(0) != 1 for row in (piece.base, *piece.experts)):
            return None
        size = piece.base.numel() // module.LANES * module.LANES
        return cls(module, piece, size, addresses(piece.experts))

    def rule(self, name: str, out: Tensor, after: str, reach: float, *facts: Any) -> None:
        """Run a rule into ``out`` ``[n]``; ``after`` is ``"raw"``, ``"add"`` or ``"lerp"``."""
        follows = {"raw": self.module.RAW, "add": self.module.ADD, "lerp": self.module.LERP}[after]
        base, place = self.piece.base.data_ptr(), out.data_ptr()
        getattr(self.module, name)(base, self.others, place, self.size, follows, np.float32(reach), *facts)


Rule = Callable[..., None]
"""``rule(name, *facts)``: a compiled loop into a block's place, with what follows the rule."""


def addresses(rows: Iterable[Tensor]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Where tensors begin."""
    return np.array([row.data_ptr() for row in rows], np.int64)


@dataclass(frozen=True)
class Span:
    """The same entries of the base and of every expert as they are stored, ``[n]``, not yet float32."""

    name: str
    start: int
    base: Tensor
    experts: Sequence[Tensor]
    members: Sequence[str] = ()
    """The tensors whose entries lie here one after the other, if it is more than one."""

    @property
    def plain(self) -> bool:
        """Whether compiled loops can read it as it is: float32 in order, on the CPU."""
        rows = (self.base, *self.experts)
        return all(r.dtype == torch.float32 and r.stride(0) == 1 and r.device.type == "cpu" for r in rows)

    def piece(self, workspace: Workspace) -> Piece:
        """float32: float32 inputs are viewed, others converted into ``workspace``."""
        rows = [_float(part, workspace, i) for i, part in enumerate((self.base, *self.experts))]
        return Piece(self.name, self.start, rows[0], rows[1:], workspace)


def spans(name: str, base: Tensor, experts: Sequence[Tensor], block: int = BLOCK) -> Iterator[Span]:
    """The blocks of one tensor."""
    if base.device.type != "cpu":
        block = 1 << 26  # a kernel launch costs more than the cache saves
    flats = [t.to(base.device).reshape(-1) for t in (base, *experts)]
    for start in range(0, base.numel(), block):
        rows = [flat[start : start + block] for flat in flats]
        yield Span(name, start, rows[0], rows[1:])


Source = tuple[str, Tensor, Sequence[Tensor]]
"""A tensor's name, the base's and the experts'."""


def together(tensors: Iterable[Source]) -> Iterator[Span]:
    """The blocks of many tensors, small ones side by side: for rules to which an entry is an entry."""
    waiting: list[Source] = []
    size = 0
    for source in tensors:
        name, base, experts = source
        if base.numel() > SMALL:
            yield from spans(name, base, experts)
        elif base.numel():
            waiting.append(source)
            size += base.numel()
        if size >= BLOCK:
            yield _side_by_side(waiting)
            waiting, size = [], 0
    if waiting:
        yield _side_by_side(waiting)


def runs(names: Sequence[str], inputs: Sequence[Weights]) -> list[Tensor] | None:
    """Of each of ``inputs`` these tensors as one, where all of them are read from files in which they lie one behind
    the other (``LazyWeights.run``); else None."""
    found = []
    for weights in inputs if len(names) > 1 else ():
        run = getattr(weights, "run", None)
        row = None if run is None else run(names)
        if row is None:
            return None
        found.append(row)
    return found or None


def joined(names: Collection[str], base: Weights, experts: Sequence[Weights]) -> Iterator[Span]:
    """``together`` of these tensors, read at once where they lie one behind the other in every file."""
    for some in batches(base, names):
        rows = runs(some, [base, *experts])
        if rows is None:
            yield from together((name, base[name], [weights[name] for weights in experts]) for name in some)
        else:
            yield Span(some[0], 0, rows[0], rows[1:], some)


def _side_by_side(sources: Sequence[Source]) -> Span:
    names = [name for name, _, _ in sources]
    device = sources[0][1].device
    columns = zip(*((base, *experts) for _, base, experts in sources), strict=True)
    rows = [torch.cat([part if part.ndim == 1 else part.reshape(-1) for part in parts]) for parts in columns]
    base, *experts = (row.to(device) for row in rows)
    return Span(names[0], 0, base, experts, names if len(names) > 1 else ())


def pieces(
    name: str, base: Tensor, experts: Sequence[Tensor], workspace: Workspace, block: int = BLOCK
) -> Iterator[Piece]:
    """The blocks of one tensor, float32, one after the other."""
    return (span.piece(workspace) for span in spans(name, base, experts, block))


def sweep(
    work: Iterable[Span], visit: Callable[[Span, Workspace], None], device: torch.device | None = None
) -> None:
    """``visit(span, workspace)`` for every span, in any order and from several threads at once.

    On a CPU there are as many Python threads as torch would use within one operation; a whole block
    each keeps them busier than the pieces of a block. ``visit`` may write only to what is its span's.
    """
    source = iter(work)
    start = list(islice(source, 2))
    if not start:
        return
    device = device or start[0].base.device
    threads = torch.get_num_threads() if device.type == "cpu" and len(start) > 1 else 1
    rest = _drained(start, source)
    if threads == 1:
        workspace = Workspace(device)
        for span in rest:
            visit(span, workspace)
    else:
        _sweep_threads(rest, visit, device, threads)


def _drained(start: list[Span], source: Iterator[Span]) -> Iterator[Span]:
    """``start``, then ``source``; nothing is held on to, as spans keep tensors mapped from files."""
    while start:
        yield start.pop(0)
    yield from source


def _sweep_threads(
    source: Iterator[Span], visit: Callable[[Span, Workspace], None], device: torch.device, threads: int
) -> None:
    lock, failed = threading.Lock(), list[BaseException]()

    def take() -> Span | None:
        with lock:
            return None if failed else next(source, None)

    def run() -> None:
        workspace = Workspace(device)
        try:
            while (span := take()) is not None:
                visit(span, workspace)
        except BaseException as error:
            failed.append(error)

    others = [threading.Thread(target=run, daemon=True) for _ in range(threads - 1)]
    torch.set_num_threads(1)  # what new threads start from; they are the parallelism here
    try:
        for thread in others:
            thread.start()
        run()
        for thread in others:
            thread.join()
    finally:
        torch.set_num_threads(threads)
    if failed:
        raise failed[0]


def _float(part: Tensor, workspace: Workspace, index: int) -> Tensor:
    if part.dtype == torch.float32:
        return part
    return workspace.row(("input", index), part.numel()).copy_(part)


def select(chosen: Tensor, where_one: Tensor, where_zero: Tensor, out: Tensor) -> Tensor:
    """``where_one`` where ``chosen`` is 1.0, ``where_zero`` where it is 0.0 (exactly; finite values only).

    Several times faster than ``torch.where`` with a Boolean mask, which is not vectorised on CPUs.
    """
    return torch.lerp(where_zero, where_one, chosen, out=out)


class TensorwiseMerge(MergeMethod):
    """Base of merges θ0 + λ·τ*. A subclass has ``combine`` or ``whole``, and ``survey`` if it needs one.

    ``yields`` says what the rule writes: ``"task_vector"`` (τ*) or ``"weights"`` (θ0 + τ*).
    """

    yields: ClassVar[str] = "task_vector"
    scaling: float | str = 1.0
    """λ, or ``"tuned"``: chosen from ``grid`` on the tuning split."""
    grid: Sequence[float] = ()
    pointwise: ClassVar[bool] = False
    """Whether ``combine`` makes of an entry the same in any tensor and beside any others."""

    def survey(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Any:
        """What the rule must know of all tensors before the first is merged (thresholds...)."""
        return None

    def combine(self, piece: Piece, out: Tensor, facts: Any) -> None:
        """Write the rule's value for one block to ``out`` ``[n]``, float32; ``facts`` is the survey's.

        Blocks come in any order and from several threads at once: write to nothing else.
        """
        raise ContractError(f"{self.name}: has neither combine nor whole")

    def fused(self, rule: Rule, piece: Piece, facts: Any) -> bool:
        """``combine`` by a compiled loop: ``rule(name, *facts)`` with a name from ``mergesec.kernels`` does
        the entries it is for; those left go to ``combine``. False: ``combine`` takes them all."""
        return False

    def whole(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: Any) -> Tensor | None:
        """The rule's value for one tensor (the shapes and types given are those stored), float32 and
        of the tensor's shape; None leaves the tensor to ``combine``."""
        return None

    def reach(self, scaling: float, count: int) -> float:
        """How far to go from the base along what the rule wrote; λ unless the rule wrote e.g. a mean."""
        return scaling

    # ------------------------------------------------------------------ the drivers

    def merge(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Merged:
        """The merged weights; ``info`` records λ and, when tuned, every score."""
        if self.scaling != "tuned":
            merged = dict(self.stream(base, experts, ctx))
            return Merged({n: merged[n] for n in base}, info=self.facts())
        return self._tuned(base, experts, ctx)

    def facts(self) -> dict[str, Any]:
        """Small JSON facts kept with a merge."""
        return {"scaling": self.scaling}

    def stream(
        self, base: Weights, experts: Sequence[Expert], ctx: MergeContext
    ) -> Iterator[tuple[str, Tensor]]:
        """(name, merged tensor) in the base's type, one at a time: what is merged may be let go at once.

        Raises ContractError if λ is to be tuned, which needs the whole network.
        """
        if isinstance(self.scaling, str):
            raise ContractError(f"{self.name}: scaling 'tuned' needs a network to score; give a number")
        check_experts(base, experts)
        wake(base, experts)
        reach = self.reach(self.scaling, len(experts))
        facts = self.survey(base, experts, ctx)
        tied, known = owners(base), outlines(base)
        shared = set(tied.values())
        done: dict[str, Tensor] = {}
        for names in batches(base):
            owned = {name: tied.get(name, name) for name in names if mergeable(known[name])}
            fresh = [owner for owner in dict.fromkeys(owned.values()) if owner not in done]
            merged = self._merged(fresh, base, experts, facts, reach)
            done.update((name, merged[name]) for name in fresh if name in shared)
            for name in names:
                if name not in owned:
                    yield name, base[name]
                elif owned[name] in shared:
                    yield name, done[owned[name]]
                else:
                    yield name, merged.pop(name)

    def _merged(
        self, names: Sequence[str], base: Weights, experts: Sequence[Expert], facts: Any, reach: float | None
    ) -> dict[str, Tensor]:
        """Merged tensors in the base's type; with ``reach`` None the rule's raw values, float32."""
        if self.pointwise and type(self).whole is TensorwiseMerge.whole:
            rows = runs(names, [base, *(e.weights for e in experts)])
            if rows is not None:
                return self._merged_run(names, outlines(base), rows, facts, reach)
        known = outlines(base)
        types = [(known[n].shape, known[n].dtype if reach is not None else torch.float32) for n in names]
        merged: dict[str, Tensor] = {}
        waiting: dict[str, tuple[Tensor, list[Tensor]]] = {}
        for name in names:
            own, others = base[name], [e.weights[name] for e in experts]
            if not merged:  # in one piece, apart from what rules make and let go on the way
                merged = dict(zip(names, slab(types, own.device), strict=True))
            raw = self.whole(name, own, others, facts)
            if raw is None:
                waiting[name] = own, others
            elif raw.shape != own.shape:
                raise ContractError(
                    f"{self.name}: '{name}' came out as {list(raw.shape)}, not {list(own.shape)}"
                )
            elif reach is not None and own.dtype == torch.float32:
                self._finish(own, raw, reach, merged[name])
            else:
                merged[name].copy_(raw if reach is None else self._finish(own.float(), raw, reach))
        if waiting:
            self._combined(waiting, merged, facts, reach)
        return merged

    def _merged_run(
        self, names: Sequence[str], known: Mapping[str, Outline], rows: Sequence[Tensor], facts: Any,
        reach: float | None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """``_merged`` for tensors that lie one behind the other in every file, as if they were one."""
        own, *others = rows
        span = Span(names[0], 0, own, others, list(names))
        out = torch.empty(len(own), dtype=torch.float32)
        self._into(out, span.piece(Workspace(own.device)), facts, reach)
        done = out if reach is None else out.to(own.dtype)
        shapes = [tuple(known[name].shape) for name in names]
        parts = torch.split(done, [math.prod(shape) for shape in shapes])
        return {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}

    def _combined(
        self,
        waiting: Mapping[str, tuple[Tensor, list[Tensor]]],
        into: Mapping[str, Tensor],
        facts: Any,
        reach: float | None,
    ) -> None:
        """Write what ``combine`` makes of some tensors (name -> base, experts), on one device."""
        device = next(iter(waiting.values()))[0].device
        flats = {name: into[name].view(-1) for name in waiting}

        def visit(span: Span, workspace: Workspace) -> None:
            size = span.base.numel()
            place = flats[span.name][span.start : span.start + size]
            direct = place.dtype == torch.float32 and not span.members
            out = place if direct else workspace.row("out", size)
            self._into(out, span.piece(workspace), facts, reach)
            if span.members:
                places = [flats[name] for name in span.members]
                for part, own in zip(places, torch.split(out, [len(part) for part in places]), strict=True):
                    part.copy_(own)
            elif not direct:
                place.copy_(out)

        sources = ((name, own, others) for name, (own, others) in waiting.items())
        apart = (span for source in sources for span in spans(*source))
        sweep(together(sources) if self.pointwise else apart, visit, device)

    def _into(self, out: Tensor, piece: Piece, facts: Any, reach: float | None) -> None:
        """The rule's value for a block, and what follows it, into ``out`` ``[n]`` float32."""
        done = self._fused(piece, out, facts, reach)
        if done < len(out):
            left = piece if not done else piece.part(done, len(out))
            self.combine(left, out[done:], facts)
            if reach is not None:
                self._finish(left.base, out[done:], reach, out[done:])

    def _fused(self, piece: Piece, out: Tensor, facts: Any, reach: float | None) -> int:
        """How many entries of ``out`` a compiled loop has written, what follows the rule included."""
        loops = Loops.of(piece)
        if loops is None:
            return 0
        after = "raw" if reach is None else "lerp" if self.yields == "weights" else "add"

        def rule(name: str, *own: Any) -> None:
            loops.rule(name, out, after, reach or 0.0, *own)

        return loops.size if self.fused(rule, piece, facts) else 0

    def _finish(self, base: Tensor, raw: Tensor, reach: float, out: Tensor | None = None) -> Tensor:
        if self.yields == "weights":
            return torch.lerp(base, raw, reach, out=out)
        return torch.add(base, raw, alpha=reach, out=out)

    def _tuned(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Merged:
        """The grid's λ with the best mean tuning accuracy; equal scores go to the smaller one.

        The rule runs once; only what follows from λ is done for every candidate.
        """
        check_experts(base, experts)
        wake(base, experts)
        coefficients = sorted({float(value) for value in self.grid})
        if not coefficients:
            raise ContractError("scaling 'tuned' needs at least one coefficient in 'grid'")
        facts = self.survey(base, experts, ctx)
        tied = owners(base)
        raw: dict[str, Tensor] = {}
        for names in batches(base):
            fresh = [n for n in names if n not in tied and mergeable(base[n])]
            raw.update(self._merged(fresh, base, experts, facts, None))

        def at(scaling: float) -> dict[str, Tensor]:
            reach = self.reach(scaling, len(experts))
            done = {n: self._finish(base[n].float(), r, reach).to(base[n].dtype) for n, r in raw.items()}
            return {name: done.get(tied.get(name, name), tensor) for name, tensor in base.items()}

        scores = {value: float(ctx.score(Merged(at(value)))) for value in coefficients}
        best = max(coefficients, key=lambda value: (scores[value], -abs(value)))
        tuned = {"scaling": best, "tuned": True, "tuning_scores": {str(k): v for k, v in scores.items()}}
        return Merged(at(best), info={**self.facts(), **tuned})


def batches(base: Weights, among: Collection[str] | None = None) -> Iterator[list[str]]:
    """The names (``among`` these) in order, some at a time: few entries where weights are read lazily, to hold
    little."""
    limit, known = BLOCK if getattr(base, "lazy", False) else BATCH, outlines(base)
    names: list[str] = []
    size = 0
    for name in known if among is None else among:
        entries = math.prod(known[name].shape)
        if names and size + entries > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += entries
    if names:
        yield names


def check_experts(base: Weights, experts: Sequence[Expert]) -> None:
    """ContractError unless there is an expert and every one fits the base, ties included."""
    if not experts:
        raise ContractError("nothing to merge: no expert was handed over")
    tied = owners(base)
    for expert in experts:
        check_same_layout(base, expert.weights, f"expert '{expert.task}'")
        for name, owner in tied.items():
            if not torch.equal(expert.weights[name], expert.weights[owner]):
                raise ContractError(
                    f"expert '{expert.task}': '{name}' and '{owner}' are tied in the base but differ here"
                )


def fused_mean(rule: Rule, piece: Piece) -> bool:
    """``running_mean`` by a compiled loop."""
    rule("mean", np.array([1.0 / (index + 1) for index in range(len(piece.experts))], np.float32))
    return True


def running_mean(piece: Piece, out: Tensor) -> None:
    """The mean of the experts' weights into ``out``, one read of each.

    m_k = m_{k−1} + (θ_k − m_{k−1}) / k: equal inputs give that input bit by bit.
    """
    mean = piece.experts[0]
    for index in range(1, len(piece.experts)):
        mean = torch.lerp(mean, piece.experts[index], 1.0 / (index + 1), out=out)
    if len(piece.experts) == 1:
        out.copy_(mean)
