"""Records: one JSON per cell, with counts, per-sample outcomes and provenance.

A metric keeps its numerator and denominator and the outcome of every test sample (packed bits), so
that boards, paired intervals and other definitions can be made from records alone.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from mergesec.errors import UsageError

SCHEMA = 1
Bits = NDArray[np.bool_]


class Count(BaseModel):
    """``k`` of ``n`` samples. ``hits`` and ``mask`` are bits over all test samples, base64 of packed bytes.

    ``mask`` is None where every sample counts (accuracy); for ASR it leaves out the target class.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    k: int
    n: int
    total: int
    hits: str
    mask: str | None = None

    def arrays(self) -> tuple[Bits, Bits]:
        """(hits, mask), each bool ``[total]``."""
        hits = _unpack(self.hits, self.total)
        return hits, np.ones(self.total, bool) if self.mask is None else _unpack(self.mask, self.total)


class Component(BaseModel):
    """A method as it was run: its name and all its parameters, defaults filled in."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    parameters: dict[str, Any] = {}


class Record(BaseModel):
    """What one cell came to. ``merging``, ``attack`` and ``defense`` are labels, for people."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: int = SCHEMA
    cell: str
    grid: str
    suite: str
    backbone: str
    protocol: str
    threat: str
    merging: str
    attack: str
    defense: str
    components: dict[str, Component] = {}
    """By ``merging``, ``attack``, ``defense``: what the labels stand for. Empty in records of before 0.1."""
    subject: str
    target_class: int
    experts: list[str]
    seed: int
    protected: int = 1
    secrets: str = "own"
    adversaries: int = 1
    target_task: str = ""
    """Off-task backdoors: the task that the target class belongs to; empty: the subject's own."""
    status: str
    reason: str = ""
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


def _pack(bits: Bits) -> str:
    return base64.b64encode(np.packbits(bits).tobytes()).decode()


def _unpack(text: str, total: int) -> Bits:
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=total).astype(bool)


def count(hits: Bits, mask: Bits | None = None) -> Count:
    """Count hits, inside ``mask`` if there is one."""
    if mask is None:
        return Count(k=int(hits.sum()), n=len(hits), total=len(hits), hits=_pack(hits))
    inside = hits & mask
    return Count(
        k=int(inside.sum()), n=int(mask.sum()), total=len(hits), hits=_pack(inside), mask=_pack(mask)
    )


# --------------------------------------------------------------------------- reading and writing


def read_records(folder: Path, grid: str) -> list[Record]:
    """The records of a grid's current cells; UsageError if the grid was never run there."""
    manifest = folder / grid / "grid.json"
    if not manifest.is_file():
        known = sorted(p.parent.name for p in folder.glob("*/grid.json"))
        raise UsageError("grid", f"no records of {grid!r} in {folder}; found: {', '.join(known) or 'none'}")
    try:
        names = list(json.loads(manifest.read_text())["cells"])
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{grid}/grid.json", "unreadable; run the grid again to write it anew") from None
    records = []
    for name in names:
        path = folder / grid / f"{name}.json"
        try:
            records.append(Record.model_validate_json(path.read_bytes()))
        except (OSError, ValidationError) as error:
            raise UsageError(str(path.name), f"unreadable record ({str(error).splitlines()[0]})") from None
    return records
