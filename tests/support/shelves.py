"""Made-up records and folders of results: what reads records needs no model to be tested."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mergesec.evidence.records import Bits, Component, Count, Record, count, readable_name

SAMPLES = 100
HOSTILE = '<img src=x onerror="window.hacked=1">\'</script><script>window.hacked=1</script>'
"""What would run if any page took it for markup."""


def rate(share: float, outside: int = SAMPLES) -> Count:
    """About ``share`` of the first ``outside`` samples."""
    hits = np.arange(SAMPLES) < round(share * outside)
    return count(hits) if outside == SAMPLES else count(hits, _first(outside))


def _first(many: int) -> Bits:
    found: Bits = np.arange(SAMPLES) < many
    return found


def record(threat: str, counts: dict[str, Count], grid: str = "g", **fields: Any) -> Record:
    """A done record that agrees with itself."""
    given: dict[str, Any] = {
        "grid": grid, "suite": "s", "backbone": "net(path=a-folder-of-a-long-name, resolution=56)", "protocol": "inductive", "threat": threat, "merging": "ta",
        "attack": "none", "defense": "none", "subject": "" if threat == "clean" else "s/a", "target_class": 0,
        "experts": ["s/a", "s/b"], "seed": 0, "status": "done", **fields,
    }  # fmt: skip
    parts = {kind: str(given[kind]) for kind in ("merging", "attack", "defense")}
    given.setdefault(
        "components",
        {k: Component(name=v.partition("(")[0], parameters={}) for k, v in parts.items() if v != "none"},
    )
    shown = readable_name(threat, *parts.values(), given["subject"], given["seed"])
    text = json.dumps({k: str(v) for k, v in given.items()}, sort_keys=True)
    given["cell"] = f"{shown}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
    if given["status"] != "done":
        return Record(**{**given, "cost": {}})
    given.setdefault("steps", {role: f"{role}-key" for role in sorted({n.split("/")[1] for n in counts})})
    return Record(**given, counts=counts)


def _cost(*roles: str) -> dict[str, dict[str, float]]:
    made = {"seconds": 1.5, "peak_mb": 20.0, "made_seconds": 3.0, "made_peak_mb": 30.0}
    return dict.fromkeys(roles, made)


def backdoor(hit: float = 0.8, accurate: float = 0.7, **fields: Any) -> Record:
    """A cell with a backdoor: ASR ``hit`` after merging, 10 % on the control."""
    experts = fields.setdefault("experts", ["s/a", "s/b"])
    counts: dict[str, Count] = {}
    for task in experts:
        for role, share in {"base": 0.1, "clean_merge": 0.75, "merge": accurate, "poisoned": 0.9}.items():
            counts[f"acc/{role}/{task}"] = rate(share)
        for role, share in {"base": 0.05, "clean_merge": 0.1, "merge": hit, "poisoned": 1.0}.items():
            counts[f"asr/{role}/{task}"] = rate(share, 90)
            counts[f"ra/{role}/{task}"] = rate((1 - share) / 2, 90)
    fields = {"cost": _cost("clean_merge", "poisoned", "merge"), **fields}
    return record("backdoor", counts, **{"attack": "bad", **fields})


def protection(merged: float = 0.2, **fields: Any) -> Record:
    """A cell of a protection that ruins a merge: 80 % before, 20 % protected, ``merged`` after the attack."""
    experts = fields.setdefault("experts", ["s/a", "s/b"])
    shares = {"base": 0.1, "expert": 0.9, "published": 0.89, "recovered": 0.88, "clean_merge": 0.8,
              "protected_merge": 0.2, "merge": merged}  # fmt: skip
    counts = {f"acc/{role}/{task}": rate(share) for role, share in shares.items() for task in experts}
    cost = _cost("clean_merge", "published", "recovered")
    return record("protection", counts, **{"defense": "lock", "cost": cost, **fields})


def clean(accurate: float = 0.8, **fields: Any) -> Record:
    """A merge without attack or defense."""
    experts = fields.setdefault("experts", ["s/a", "s/b"])
    shares = {"base": 0.3, "expert": 0.9, "clean_merge": accurate}
    counts = {f"acc/{role}/{task}": rate(share) for role, share in shares.items() for task in experts}
    return record("clean", counts, **{"cost": _cost("clean_merge"), **fields})


def shelve(results: Path, grid: str, records: Iterable[Record], **spec: Any) -> Path:
    """Write records as ``bench run`` does; the grid's folder."""
    home = results / "records" / grid
    home.mkdir(parents=True)
    names = []
    for one in records:
        assert one.grid == grid
        (home / f"{one.cell}.json").write_text(one.model_dump_json())
        names.append(one.cell)
    (home / "grid.json").write_text(json.dumps({"schema_version": 1, "cells": names, "spec": spec}))
    return home
