"""Records: one JSON per cell, with counts, per-sample outcomes and provenance.

A metric keeps its numerator and denominator and the outcome of every test sample (packed bits), so
that boards, paired intervals and other definitions can be made from records alone.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mergesec.errors import UsageError, nearest
from mergesec.files import brief
from mergesec.threats import TRIGGERED, Company, Role, Secrets, Threat

SCHEMA: Literal[1] = 1
GRID_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
CELL_NAME = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,399}"
MOST_SAMPLES = 100_000_000
"""Test samples of a task that a record may tell of."""
Bits = NDArray[np.bool_]
Status = Literal["done", "failed", "blocked", "missing"]


class Count(BaseModel):
    """``k`` of ``n`` samples. ``hits`` and ``mask`` are bits over all test samples, base64 of packed bytes.

    ``mask`` is None where every sample counts (accuracy); for ASR it leaves out the target class.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    k: int = Field(ge=0)
    n: int = Field(ge=0)
    total: int = Field(ge=0, le=MOST_SAMPLES)
    hits: str
    mask: str | None = None

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        """``k`` and ``n`` are what the bits say, and no hit lies outside the mask."""
        if (self.k, self.n) != _told(self.total, self.hits, self.mask):
            raise ValueError(f"{self.k} of {self.n} is not what its bits say")
        return self

    def packed(self) -> tuple[bytes, bytes]:
        """(hits, mask), eight samples a byte, the first one in the highest bit; what is over is 0."""
        return _packed(self.total, self.hits, self.mask)

    def arrays(self) -> tuple[Bits, Bits]:
        """(hits, mask), each bool ``[total]``."""
        hits, mask = (
            np.unpackbits(np.frombuffer(bits, np.uint8), count=self.total) for bits in self.packed()
        )
        return hits.astype(bool), mask.astype(bool)


class Component(BaseModel):
    """A method as it was run: its name and all its parameters, defaults filled in."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    parameters: dict[str, Any] = {}


class Record(BaseModel):
    """What one cell came to. ``merging``, ``attack`` and ``defense`` are labels, for people."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: Literal[1] = SCHEMA
    cell: str
    grid: str
    suite: str
    backbone: str
    protocol: Literal["inductive", "transductive"]
    threat: Threat
    merging: str
    attack: str
    defense: str
    components: dict[str, Component] = {}
    """By ``merging``, ``attack``, ``defense``: what the labels stand for. Empty in records of before 0.1."""
    subject: str
    target_class: int = Field(ge=0)
    experts: list[str]
    seed: int
    protected: int = Field(default=1, ge=1)
    secrets: Secrets = "own"
    adversaries: int = Field(default=1, ge=1)
    target_task: str = ""
    """Off-task backdoors: the task that the target class belongs to; empty: the subject's own."""
    company: Company = "next"
    drawn: list[Literal["target_class", "experts"]] = []
    """Axes whose value was drawn by the subject and the seed: seeds of one subject differ in them and are still
    replications of each other."""
    status: Status
    reason: str = ""
    contained: Literal["yes", "no"] = "yes"
    """``no``: a plugin's code took part where it could see test data (docs/trust.md)."""
    counts: dict[str, Count] = {}
    """``acc/<role>/<task>``, ``asr/<role>/<task>``, ``ra/<role>/<task>``, ``mark/<suspect>/<task>``."""
    values: dict[str, float] = {}
    """Backdoor: ``visibility/<measure>``, ``screen/caught``, ``screen/false``; protection: distances, marks."""
    facts: dict[str, Any] = {}
    """Backdoor: ``merge`` and ``screen``, what the defended merge and the screen say of themselves."""
    steps: dict[str, str] = {}
    cost: dict[str, dict[str, float]] = {}
    """By role; ``attack`` and ``defense`` are a backdoor's two sides over all their steps, with ``rows``."""
    provenance: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _told(cls, fields: Any) -> Any:
        """Records of before plugins were contained say so, if plugins took part."""
        if isinstance(fields, dict) and "contained" not in fields:
            provenance = fields.get("provenance")
            parts = provenance.get("components") if isinstance(provenance, dict) else None
            foreign = isinstance(parts, dict) and any(
                isinstance(p, dict) and "digest" in p for p in parts.values()
            )
            return {**fields, "contained": "no" if foreign else "yes"}
        return fields


SUBMISSION = "submission"
"""The field of ``provenance`` that records of an accepted entry have: whose they are, and whether the cell was
run again."""


def is_claimed(record: Record) -> bool:
    """Whether a record is an entry's that nobody ran again."""
    mark = record.provenance.get(SUBMISSION)
    return mark is not None and not (isinstance(mark, dict) and mark.get("rerun") is True)


APART = "@"
"""Between a step's kind and its key in the names of costs that are a step's own, whichever cells share it."""


def disagreement(record: Record) -> str:
    """What in a record contradicts the rest of it, empty if nothing does: its cell's name, numbers that are not
    finite, cost by halves, counts of no role, evaluations of a done cell without counts."""
    shown = readable_name(
        record.threat, record.merging, record.attack, record.defense, record.subject, record.seed
    )
    if record.cell.rpartition("-")[0] != shown:
        return f"cell {record.cell} is not the name of its content ({shown}-…)"
    if not all(math.isfinite(v) for v in record.values.values()):
        return "a value is not finite"
    for side, cost in record.cost.items():
        if not all(math.isfinite(v) and v >= 0 for v in cost.values()):
            return f"the cost of {side} is not seconds, MiB or rows"
        if {"seconds", "peak_mb"} - cost.keys() or ("made_seconds" in cost) != ("made_peak_mb" in cost):
            return f"the cost of {side} lacks seconds or peak_mb"
    if nameless := next((key for key in record.counts if "/" not in key), None):
        return f"counts of {nameless[:60]!r} name no role (expected WHAT/ROLE or WHAT/ROLE/TASK)"
    if record.status == "done":
        counted = {key.split("/")[1] for key in record.counts}
        evaluated = {role for role in map(_counted_role, record.steps) if role}
        if counted != evaluated or not counted:
            odd = ", ".join(sorted(counted ^ evaluated)) or "any role"
            return f"done, but steps and counts disagree on {odd}"
    return ""


def readable_name(threat: str, merging: str, attack: str, defense: str, subject: str, seed: int) -> str:
    """The part of a cell's name that people read; labels give their names."""
    parts = [threat, *(label.partition("(")[0] for label in (merging, attack, defense)), subject, f"s{seed}"]
    return "-".join(part.replace("/", "_") for part in parts if part and part != "none")


def _counted_role(role: str) -> str:
    """The name under which an evaluation's counts stand; empty for a step that is not counted."""
    name, _, triggered = role.partition(TRIGGERED[0])
    kind, _, whom = name.partition(":")
    if kind in (Role.LOGITS, Role.GAP, Role.VISIBILITY) or triggered:
        return ""
    return whom if kind == Role.VERIFY else kind


def _pack(bits: Bits) -> str:
    return base64.b64encode(np.packbits(bits).tobytes()).decode()


def _packed(total: int, hits: str, mask: str | None) -> tuple[bytes, bytes]:
    return _decoded(hits, total), _all_set(total) if mask is None else _decoded(mask, total)


@lru_cache(maxsize=1 << 14)
def _told(total: int, hits: str, mask: str | None) -> tuple[int, int] | None:
    """How many hits and samples these bits are; None if a hit lies outside the mask. Remembered, as a grid's records
    share their controls."""
    inside, among = (int.from_bytes(bits) for bits in _packed(total, hits, mask))
    return (inside.bit_count(), among.bit_count()) if inside & among == inside else None


def _decoded(text: str, total: int) -> bytes:
    """The bytes of ``total`` bits; ValueError if the text holds another number of them."""
    packed = binascii.a2b_base64(text, strict_mode=True)
    over = 8 * len(packed) - total
    if not 0 <= over < 8 or (over and packed[-1] & ((1 << over) - 1)):
        raise ValueError(f"{len(packed)} bytes of bits for {total} samples")
    return packed


@lru_cache(maxsize=64)
def _all_set(total: int) -> bytes:
    return np.packbits(np.ones(total, bool)).tobytes()


def count(hits: Bits, mask: Bits | None = None) -> Count:
    """Count hits, inside ``mask`` if there is one."""
    if mask is None:
        return Count(k=int(hits.sum()), n=len(hits), total=len(hits), hits=_pack(hits))
    inside = hits & mask
    return Count(
        k=int(inside.sum()), n=int(mask.sum()), total=len(hits), hits=_pack(inside), mask=_pack(mask)
    )


# --------------------------------------------------------------------------- reading and writing


def grid_folder(folder: Path, grid: str) -> Path:
    """Where a grid's records lie; UsageError unless ``grid`` is a plain name."""
    if not re.fullmatch(GRID_NAME, grid):
        raise UsageError("grid", f"{brief(grid)!r} is not a grid's name: letters, digits, '.', '_' and '-'")
    return folder / grid


def read_records(folder: Path, grid: str) -> list[Record]:
    """The records of a grid's current cells; UsageError if the grid was never run there, or if one is not a
    record of this version that agrees with itself."""
    home = grid_folder(folder, grid)
    manifest = home / "grid.json"
    if not manifest.is_file():
        known = [p.parent.name for p in folder.glob("*/grid.json")]
        raise UsageError("grid", f"no records of {grid!r} in {folder}{nearest(grid, known)}")
    try:
        names = [str(name) for name in json.loads(manifest.read_bytes())["cells"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UsageError(f"{grid}/grid.json", "unreadable; run the grid again to write it anew") from None
    pool = _Pool()
    return [pool.shared(read_record(home, name)) for name in names]


class _Pool:
    """What the records of a grid tell alike is held once: outcomes of controls, costs, provenance."""

    def __init__(self) -> None:
        self._held: dict[Any, Any] = {}

    def shared(self, record: Record) -> Record:
        """The record, its parts exchanged for those of earlier ones that equal them."""
        parts = record.__dict__
        parts["counts"] = {sys.intern(name): self._count(told) for name, told in record.counts.items()}
        parts["steps"] = {sys.intern(name): sys.intern(key) for name, key in record.steps.items()}
        parts["cost"] = {
            sys.intern(name): self._once(("cost", *numbers.items()), numbers)
            for name, numbers in record.cost.items()
        }
        parts["provenance"] = {
            sys.intern(name): self._once(("provenance", json.dumps(told, sort_keys=True)), told)
            for name, told in record.provenance.items()
        }
        for name in _REPEATED:
            parts[name] = sys.intern(parts[name])
        parts["experts"] = self._once(("experts", *record.experts), record.experts)
        names = frozenset(record.model_fields_set)
        object.__setattr__(record, "__pydantic_fields_set__", self._once(names, set(names)))
        return record

    def _count(self, told: Count) -> Count:
        mask = None if told.mask is None else self._once(told.mask, told.mask)
        key = (told.k, told.n, told.total, told.hits, mask)
        if key not in self._held:  # one set of names for all: theirs would be a fourth of their memory
            fields = dict(zip(_COUNTED, key, strict=True))
            self._held[key] = Count.model_construct(_fields_set=_COUNTED_SET, **fields)
        found: Count = self._held[key]
        return found

    def _once(self, key: Any, value: Any) -> Any:
        return self._held.setdefault(key, value)


_REPEATED = (
    "grid", "suite", "backbone", "protocol", "merging", "attack", "defense", "subject", "target_task",
)  # fmt: skip
_COUNTED = ("k", "n", "total", "hits", "mask")
_COUNTED_SET = set(_COUNTED)


def read_record(home: Path, name: str) -> Record:
    """One cell's record in a grid's folder; UsageError names the file and what is wrong with it."""
    where = f"{name}.json"[:200]
    if not re.fullmatch(CELL_NAME, name):
        raise UsageError(f"{home.name}/grid.json", f"{name[:80]!r} is not a cell's name")
    try:
        record = Record.model_validate_json((home / f"{name}.json").read_bytes())
    except OSError as error:
        raise UsageError(where, f"unreadable record ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        spot = ".".join(map(str, first["loc"]))
        raise UsageError(where, f"not a record: {spot + ': ' if spot else ''}{first['msg']}"[:300]) from None
    if record.cell != name or record.grid != home.name:
        raise UsageError(where, f"holds cell {record.cell} of grid {record.grid}")
    if wrong := disagreement(record):
        raise UsageError(where, f"contradicts itself: {wrong}")
    return record
