"""Data as scripts: what a page opened from ``file://`` may load. Packed, since records repeat themselves."""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Mapping
from typing import Any

from mergesec.files import plain


def packed(name: str, value: Any) -> bytes:
    """A script that hands ``value`` to the page under ``name``: gzipped JSON in base64, so no text of a record can
    be code. The same value gives the same bytes."""
    text = json.dumps(safe(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    data = base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()
    return f"MergeSec.put({json.dumps(name)},'{data}')\n".encode()


def safe(value: Any) -> Any:
    """A value as JSON has it: no control characters or reversed writing, null for what is not finite."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, Mapping):
        return {plain(str(k)): safe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [safe(v) for v in value]
    if hasattr(value, "tolist"):  # NumPy's numbers
        return safe(value.tolist())
    if isinstance(value, (int, float)):
        return value if math.isfinite(value) else None
    return plain(str(value))


def spread(name: str, buckets: int) -> int:
    """Which of ``buckets`` scripts holds a cell: FNV-1a of its name, which the page computes as well."""
    value = 0x811C9DC5
    for byte in name.encode():
        value = (value ^ byte) * 0x01000193 & 0xFFFFFFFF
    return value % buckets
