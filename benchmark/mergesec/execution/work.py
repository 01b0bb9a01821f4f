"""A worker's workplace: verified, cached reads; checks of what hooks return."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from mergesec.contracts import (
    Backbone,
    ContractError,
    Merged,
    Model,
    Split,
    Task,
    Weights,
)
from mergesec.execution import allocation
from mergesec.execution.store import Blob, Laid, Raw, Store, laid, parse_safetensors, tensor_digest
from mergesec.planning.catalog import Catalog
from mergesec.planning.plan import Step
from mergesec.planning.refs import Ref
from mergesec.weights import DTYPE_NAMES, DTYPES, check_finite, check_same_layout, read_only


class Served(Protocol):
    """A guest that serves a plugin's own networks."""

    def model(self, role: str, task: str, cast: str) -> Model:
        """The model of an artifact for a task; its features come from the guest."""


class Guests(Protocol):
    """Runs plugins' code in processes of its own."""

    def run(self, work: Work) -> Result:
        """A whole step, with what its side may see of the inputs; checked."""

    def network(self, work: Work) -> AbstractContextManager[Served | None]:
        """The step's producer, if it makes its networks itself."""

    def trigger(self, work: Work) -> AbstractContextManager[Callable[[Any], Any]]:
        """What puts the step's trigger on a batch of raw inputs."""


MAPPED = ("data",)
"""Kinds of artifact whose large byte tensors (decoded images) stay on disk, mapped: batches copy what they need."""


LARGE = 1 << 20


def large_bytes(tensor: Tensor) -> bool:
    """Whether a tensor of bytes is large enough to be mapped."""
    return tensor.dtype == torch.uint8 and tensor.nbytes > LARGE


class Seal(NamedTuple):
    """What a tensor was before anybody was handed it. Writing to it by accident is what is looked for, so a sum will
    do, which takes less than half of a digest's time."""

    place: int
    shape: torch.Size
    strides: tuple[int, ...]
    data: memoryview
    """Its bytes, where they lie."""
    sum: int

    @classmethod
    def of(cls, tensor: Tensor) -> Seal:
        data = _raw(tensor).data
        return cls(tensor.data_ptr(), tensor.shape, tensor.stride(), data, zlib.crc32(data))

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor lies where it lay, as it lay, with the same bytes."""
        now = (tensor.data_ptr(), tensor.shape, tensor.stride())
        return now == self[:3] and zlib.crc32(self.data) == self.sum


class Held(NamedTuple):
    """What a worker keeps of an artifact."""

    tensors: Weights
    info: dict[str, Any]
    digests: Mapping[str, str]
    """Of each tensor, as verified when it was read."""
    seals: Mapping[str, Seal]
    """Of each tensor but mapped pixels."""
    bytes: int = 0
    """Of memory, what the cache is bounded by."""


@dataclass
class Bench:
    """A worker's workplace: store, catalogue, device, and what it keeps between steps."""

    store: Store
    catalog: Catalog
    device: torch.device
    data_root: Path | None = None
    cache_bytes: int = 600_000_000
    report: Callable[[str], None] = lambda text: None
    """Told how a long step goes, at most once a second."""
    checkpoint_seconds: float = float(os.environ.get("MERGESEC_CHECKPOINT_SECONDS", "120"))
    guests: Guests | None = None
    """Where plugins' code runs; None in a process that is a guest itself, and where somebody tries a component."""
    _held: OrderedDict[str, Held] = field(default_factory=OrderedDict)
    _bytes: int = 0
    """Of all that is held, kept up rather than added up: a worker reads thousands of artifacts."""
    _given: dict[str, Held] = field(default_factory=dict)
    _instances: dict[str, Any] = field(default_factory=dict)

    def read(self, kind: str, key: str) -> tuple[Weights, dict[str, Any]]:
        """Verified tensors and facts of an artifact; least recently used ones are dropped."""
        if key in self._given:
            return self._given[key][:2]
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key][:2]
        if kind in MAPPED:
            path, meta = self.store.open(kind, key)
            tensors = {n: t if large_bytes(t) else t.clone() for n, t in load_file(path).items()}
        else:
            blob, meta = self.store.read(kind, key)
            tensors = unpacked(blob)
        self._held[key] = held = Held(
            read_only(tensors), meta["info"], meta["digests"], _sealed(tensors), _size(tensors)
        )  # fmt: skip
        self._bytes += held.bytes
        while len(self._held) > 1 and self._bytes > self.cache_bytes:
            self.forget(next(iter(self._held)))
        if held.bytes >= allocation.HEAVY:
            allocation.trim()  # before the next network is made of it
        return held[:2]

    def give(self, tensors: Mapping[str, Tensor]) -> str:
        """Take somebody's own tensors as an artifact that is not stored; its key."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        digests = {name: _digest_of(name, tensor) for name, tensor in tensors.items()}
        key = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:40]
        self._given[key] = Held(read_only(tensors), {}, digests, _sealed(tensors))
        return key

    def digests(self, key: str) -> Mapping[str, str]:
        """Of each tensor of an artifact that was read."""
        return (self._given.get(key) or self._held[key]).digests

    def forget(self, key: str) -> None:
        """Read an artifact from the store again next time."""
        if held := self._held.pop(key, None):
            self._bytes -= held.bytes

    def touched(self, key: str) -> str:
        """The first tensor of a kept artifact whose bytes are no longer those that were read, whoever wrote them
        (``.data`` and ``.numpy()`` move no version counter); empty if none. Mapped pixels are let go of instead:
        mapping them anew costs less than reading them."""
        held = self._given.get(key) or self._held.get(key)
        if held is None:
            return ""
        for name, seal in held.seals.items():
            if not seal.holds(held.tensors[name]):
                return name
        if len(held.seals) < len(held.tensors):
            self.forget(key)
        return ""

    def component(self, ref: Ref) -> Any:
        if self.guests is not None and ref.plugins:
            raise RuntimeError(f"{ref.name}: a plugin's code is not for this process")
        if ref.text not in self._instances:
            entry = self.catalog.get(ref.kind, ref.name)
            parameters = {k: list(v) if isinstance(v, tuple) else v for k, v in ref.parameters}
            self._instances[ref.text] = entry.create(parameters)
        return self._instances[ref.text]


def _sealed(tensors: Mapping[str, Tensor]) -> dict[str, Seal]:
    return {name: Seal.of(tensor) for name, tensor in tensors.items() if not large_bytes(tensor)}


def _size(tensors: Weights) -> int:
    """Bytes of memory; mapped pixels are the system's to drop."""
    return sum(t.nbytes for t in tensors.values() if not large_bytes(t))


def packed(tensors: Mapping[str, Tensor]) -> Laid:
    """Tensors as a safetensors file. It shares their memory where that can be: on the CPU, row by row."""
    return laid({name: _raw(tensor) for name, tensor in tensors.items()})


def unpacked(blob: Blob | mmap.mmap) -> dict[str, Tensor]:
    """Tensors of a safetensors file in memory of their own; large ones of bytes stay where they are if it is mapped.

    Copies lie aligned: where a file's tensors lie depends on chance, and rounding on where they lie. Pages of a
    mapped file are let go of once they are copied.
    """
    found: dict[str, Tensor] = {}
    for name, raw in parse_safetensors(blob).items():
        if isinstance(blob, mmap.mmap) and raw.dtype == "U8" and raw.data.nbytes > LARGE:
            found[name] = torch.frombuffer(raw.data, dtype=torch.uint8).reshape(raw.shape)
            continue
        found[name] = own = torch.empty(raw.shape, dtype=DTYPES[raw.dtype])
        if raw.data.nbytes:
            _bytes(own)[:] = raw.data
        if isinstance(blob, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            blob.madvise(mmap.MADV_DONTNEED)
    return found


def _bytes(tensor: Tensor) -> memoryview:
    """What a tensor on the CPU that lies row by row holds."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _raw(tensor: Tensor) -> Raw:
    plain = tensor.detach().cpu().contiguous()
    return Raw(DTYPE_NAMES[plain.dtype], tuple(plain.shape), _bytes(plain))


def _digest_of(name: str, tensor: Tensor) -> str:
    raw = _raw(tensor)
    return tensor_digest(name, raw.dtype, raw.shape, raw.data)


class Work:
    """One step with its inputs and components at hand."""

    def __init__(self, step: Step, bench: Bench, kinds: Mapping[str, str]) -> None:
        self.step, self.bench = step, bench
        self.args: dict[str, Any] = json.loads(step.args)
        self.inputs = dict(step.inputs)
        self.refs = dict(step.components)
        self._kinds = kinds
        self._handed: list[tuple[str, str, Tensor, int]] = []
        self._moved: dict[str, Weights] = {}

    @property
    def device(self) -> torch.device:
        return self.bench.device

    @property
    def backbone(self) -> Backbone:
        backbone: Backbone = self.component("backbone")
        return backbone

    @property
    def seed(self) -> int:
        """The seed drawn for the component; that of the defense around a merge method that draws none."""
        return int(self.args.get("seed", self.args.get("defend", {}).get("seed", 0)))

    @property
    def guests(self) -> Guests:
        """Where plugins' code runs."""
        assert self.bench.guests is not None
        return self.bench.guests

    def foreign(self, role: str) -> bool:
        """Whether a component is a plugin's that must not be loaded in this process."""
        return self.bench.guests is not None and bool(self.refs[role].plugins)

    def component(self, role: str) -> Any:
        return self.bench.component(self.refs[role])

    def tensors(self, role: str) -> Weights:
        """An input's tensors, on the device: they go there once a step. Remembered, so that mutation is noticed."""
        if role not in self._moved:
            self._moved[role] = read_only({k: v.to(self.device) for k, v in self._read(role)[0].items()})
            self._watch(role, self._moved[role])
        return self._moved[role]

    @property
    def heavy(self) -> bool:
        """Whether the step's base is so large that memory counts for more than time."""
        return (
            "base" in self.inputs and sum(t.nbytes for t in self.tensors("base").values()) >= allocation.HEAVY
        )

    def kind_of(self, role: str) -> str:
        """The kind of step that made an input."""
        return self._kinds[self.inputs[role]]

    def info(self, role: str) -> dict[str, Any]:
        return self._read(role)[1]

    def splits(self, role: str, task: Task) -> dict[str, Split]:
        packed, _ = self._read(role)
        self._watch(role, packed)
        return task.unpack(packed)

    def _read(self, role: str) -> tuple[Weights, dict[str, Any]]:
        return self.bench.read(self._kinds[self.inputs[role]], self.inputs[role])

    def _watch(self, role: str, tensors: Weights) -> None:
        self._handed += [(role, name, v, v._version) for name, v in tensors.items()]

    def merged(self, role: str) -> Merged:
        """A merge artifact, or plain weights seen as one."""
        return unflatten(self.tensors(role), self.info(role))

    def changed(self) -> str:
        """The first input tensor that a hook wrote to; empty if none.

        The worker's copies of such inputs are dropped, so that no later step computes with them.
        """
        touched = [(role, name) for role, name, v, version in self._handed if v._version != version]
        for role in dict.fromkeys(role for role, *_ in self._handed):
            if name := self.bench.touched(self.inputs[role]):
                touched.append((role, name))
        for role, _ in touched:
            self.bench.forget(self.inputs[role])
        return ".".join(touched[0]) if touched else ""


class Keeper:
    """A training's watch: tells how far it is, and keeps checkpoints beside the store."""

    def __init__(self, bench: Bench, key: str, number: int) -> None:
        self._bench, self._key, self._number = bench, key, number
        self._started = self._spoken = self._saved = time.monotonic()
        self._first: int | None = None

    def resume(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was kept of this training by a run that was cut off."""
        blob = self._bench.store.kept(self._key, self._number)
        if blob is None:
            return None
        tensors = unpacked(blob)
        facts: dict[str, Any] = json.loads(bytes(tensors.pop("facts").tolist()))
        return tensors, facts

    def step(self, done: int, steps: int, loss: float) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = done - 1
        if now - self._spoken >= 1.0 or done == steps:
            self._spoken = now
            left = (now - self._started) / (done - self._first) * (steps - done)
            # what a method does after its training takes a time that nobody knows here
            rest = f", {left:.0f}s left" if done < steps else ", trained"
            self._bench.report(f"{done}/{steps} loss {loss:.3g}{rest}")

    def due(self) -> bool:
        return time.monotonic() - self._saved >= self._bench.checkpoint_seconds

    def keep(self, tensors: Weights, facts: Mapping[str, Any]) -> None:
        told = torch.frombuffer(bytearray(json.dumps(dict(facts)).encode()), dtype=torch.uint8)
        self._bench.store.keep(self._key, self._number, packed({**tensors, "facts": told}))
        self._saved = time.monotonic()


# --------------------------------------------------------------------------- merged artifacts


def flatten(merged: Merged) -> dict[str, Tensor]:
    """Tensors of a merge under names that tell shared, per-task and extra apart."""
    flat = {f"shared|{k}": v for k, v in merged.shared.items()}
    for task, weights in merged.per_task.items():
        flat |= {f"task|{task}|{k}": v for k, v in weights.items()}
    return flat | {f"extra|{k}": v for k, v in merged.extra.items()}


def unflatten(tensors: Weights, info: Mapping[str, Any]) -> Merged:
    """The merge that ``flatten`` took apart to be stored; tensors are read-only."""
    shared: dict[str, Tensor] = {}
    per_task: dict[str, dict[str, Tensor]] = {}
    extra: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        room, _, rest = name.partition("|")
        if room == "task":
            task, _, rest = rest.partition("|")
            per_task.setdefault(task, {})[rest] = tensor
        else:
            (shared if room == "shared" else extra)[rest] = tensor
    return Merged(read_only(shared), {t: read_only(w) for t, w in per_task.items()}, extra, dict(info))


def check_merged(merged: Any, base: Weights, who: str) -> Merged:
    """ContractError unless ``merged`` is a Merged of finite tensors that fit the base."""
    if not isinstance(merged, Merged):
        raise ContractError(f"{who} returned {type(merged).__name__}, not Merged")
    check_same_layout(base, merged.shared, who)
    check_finite(flatten(merged), who)
    return merged


def check_weights(weights: Any, base: Weights, who: str) -> Weights:
    """ContractError unless ``weights`` are finite and have the base's names, shapes and dtypes."""
    if not isinstance(weights, Mapping):
        raise ContractError(f"{who} returned {type(weights).__name__}, not named tensors")
    check_same_layout(base, weights, who)
    check_finite(weights, who)
    return weights


# --------------------------------------------------------------------------- what may be known of a task


class Result(NamedTuple):
    """What a step came to: tensors, and JSON facts about them."""

    tensors: dict[str, Tensor]
    facts: Mapping[str, Any] = MappingProxyType({})
