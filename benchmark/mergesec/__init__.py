"""MergeSec: a benchmark for the security of model merging. The engine; it imports neither catalogue."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

__version__ = "0.1.0"

_MOVED = {
    "steps": "mergesec.inference (predict, task_outputs)",
    "grid": "mergesec.threats (accomplices); the rest is the engine's own, in mergesec.planning",
    "executors": "the engine's own, in mergesec.execution.engines",
    "runner": "the engine's own, in mergesec.execution.scheduler",
    "checkpoints": "the engine's own, in mergesec.streaming",
    "measures": "the engine's own, in mergesec.evidence.estimates",
    "backdoors": "the engine's own, in mergesec.evidence.backdoor",
    **{
        name: f"the engine's own, in mergesec.planning.{name}"
        for name in ("cards", "catalog", "gridspec", "plan", "presets")
    },
    **{
        name: f"the engine's own, in mergesec.evidence.{name}" for name in ("boards", "records", "statistics")
    },
    **{
        name: f"the engine's own, in mergesec.execution.{name}"
        for name in ("session", "store", "visibility", "work")
    },
}
"""Modules of 0.1's first layout and where their content went. Goes with the next release."""


class _Moved:
    """Asked for modules nobody else found: says where an old one went, for plugins written before the move."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        room = name.removeprefix("mergesec.")
        if room != name and room in _MOVED:
            raise ModuleNotFoundError(f"{name} has moved: {_MOVED[room]} (docs/plugins.md)", name=name)
        return None


sys.meta_path.append(_Moved)
