"""Records of a grid as large as one asks for, as the text of their files: made up, but of the shape of real ones.
Controls (base, experts, clean merges) come out the same in every record that shares them, as they do in a grid."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from functools import cache
from itertools import count as numbers
from itertools import islice, product
from typing import Any

import numpy as np

SAMPLES = 800
TASKS = tuple(f"mini/t{i}" for i in range(8))
MASK = np.arange(SAMPLES) % 10 != 0
Fields = dict[str, Any]

ALL, SUBJECT = TASKS, None
_PROTECTION = {
    "base": ALL, "expert": ALL, "clean_merge": ALL, "published": SUBJECT, "recovered": SUBJECT,
    "published_bf16": SUBJECT, "protected_merge": ALL, "merge": ALL,
}  # fmt: skip
_BACKDOOR = {"base": ALL, "expert": ALL, "clean_merge": ALL, "poisoned": SUBJECT, "merge": ALL}
_DEFENDED = ("published", "recovered", "published_bf16", "protected_merge", "merge")
_ATTACKED = ("recovered", "merge", "poisoned")
"""Roles that depend on the defense and on the attack; the others are controls."""


def protection_texts(number: int) -> Iterator[bytes]:
    """JSON of so many records of a protection grid: eight victims, five seeds, ten merges, attacks and defenses."""
    return (_text("protection", *cell) for cell in islice(_cells(), number))


def backdoor_texts(number: int) -> Iterator[bytes]:
    """Of a backdoor grid; these hold the outcomes under the trigger beside the clean ones."""
    return (_text("backdoor", *cell) for cell in islice(_cells(), number))


def _cells() -> Iterator[tuple[str, str, str, str, int]]:
    for more in numbers():
        for merging, attack, subject, seed in product(range(10), range(10), TASKS, range(5)):
            yield f"merge{merging}", f"defense{more}", f"attack{attack}" if attack else "none", subject, seed


def _text(threat: str, merging: str, defense: str, attack: str, subject: str, seed: int) -> bytes:
    counts, where = {}, {"protection": _PROTECTION, "backdoor": _BACKDOOR}[threat]
    for role, tasks in where.items():
        own = f"{defense} {subject}" if role in _DEFENDED else ""
        own += f" {attack} {subject}" if role in _ATTACKED else ""
        merged = merging if "merge" in role else ""
        for task in tasks or (subject,):
            told = f"{role} {task} {seed} {merged} {own}"
            counts[f"acc/{role}/{task}"] = _count(told, masked=False)
            if threat == "backdoor" and attack != "none" and role != "expert":
                counts[f"asr/{role}/{task}"] = _count(told + " asr", masked=True)
                counts[f"ra/{role}/{task}"] = _count(told + " ra", masked=True)
    shown = "-".join(p for p in (threat, merging, attack if attack != "none" else "", defense) if p)
    digest = hashlib.sha256(f"{merging}{attack}{defense}{subject}{seed}".encode()).hexdigest()[:10]
    cost = {role: {"seconds": 1.0, "peak_mb": 300.0} for role in where}
    fields: Fields = {
        "schema_version": 1, "cell": f"{shown}-{subject.replace('/', '_')}-s{seed}-{digest}", "grid": "large",
        "suite": "mini", "backbone": "mini/vit", "protocol": "inductive", "threat": threat, "merging": merging,
        "attack": attack, "defense": defense, "subject": subject, "target_class": 0, "experts": TASKS, "seed": seed,
        "status": "done", "counts": counts, "steps": dict.fromkeys(where, digest * 4), "cost": cost,
    }  # fmt: skip
    return json.dumps(fields).encode()


@cache
def _count(told: str, masked: bool) -> Fields:
    rng = np.random.default_rng(int(hashlib.sha256(told.encode()).hexdigest()[:8], 16))
    hits = rng.random(SAMPLES) < rng.uniform(0.2, 0.9)
    if not masked:
        return {"k": int(hits.sum()), "n": SAMPLES, "total": SAMPLES, "hits": _packed(hits), "mask": None}
    hits &= MASK
    return {
        "k": int(hits.sum()), "n": int(MASK.sum()), "total": SAMPLES, "hits": _packed(hits), "mask": _packed(MASK),
    }  # fmt: skip


def _packed(bits: Any) -> str:
    return base64.b64encode(np.packbits(bits).tobytes()).decode()
