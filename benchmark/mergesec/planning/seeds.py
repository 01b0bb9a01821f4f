"""Seeds from coordinates: the only source of randomness in a run."""

from __future__ import annotations

import hashlib
import json
import os
from functools import lru_cache

SALT = "MERGESEC_SALT"
"""Environment variable: a private text that enters every seed. Without it seeds are public functions of coordinates, and
code that knows this file can draw the other side's secret again; a run under a salt shows whether a result leans on
that. Records tell that there was one, and by its digest whether two runs had the same."""


def draw_seed(*coordinates: str | int) -> int:
    """A 63-bit seed from coordinates, and the salt if there is one."""
    return _drawn(os.environ.get(SALT, ""), coordinates)


@lru_cache(maxsize=65536)
def _drawn(salt: str, coordinates: tuple[str | int, ...]) -> int:
    text = json.dumps((*coordinates, {"salt": salt}) if salt else coordinates, separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def salt_digest() -> str:
    """What records tell of the salt; empty without one."""
    salt = os.environ.get(SALT, "")
    return hashlib.sha256(f"salt of a run: {salt}".encode()).hexdigest()[:12] if salt else ""
