"""MergeSec: a benchmark for the security of model merging.

Grids: ``run``, ``plan``. Boards and records: ``boards``, ``load_board``, ``records``, ``write_site``. What is installed:
``catalogue``. Single models: ``merge``, ``base``, ``expert``, ``attack``, ``protect``, ``recover``, ``evaluate``,
``scan``. Importing this loads none of them, and no torch until one needs it. See docs/python.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergesec.api.grids import Planned, Run, boards, catalogue, load_board, plan, records, run, write_site
    from mergesec.api.models import Evaluated, Model, attack, base, evaluate, expert, merge, protect, recover
    from mergesec.api.scans import Scan, calibrate, scan

__version__ = "0.1.0"
__all__ = [
    "Evaluated", "Model", "Planned", "Run", "Scan", "attack", "base", "boards", "calibrate", "catalogue", "evaluate",
    "expert", "load_board", "merge", "plan", "protect", "records", "recover", "run", "scan",
    "write_site",
]  # fmt: skip

_HOMES = {
    "grids": ("Planned", "Run", "boards", "catalogue", "load_board", "plan", "records", "run", "write_site"),
    "scans": ("Scan", "calibrate", "scan"),
}
"""Modules of ``mergesec.api`` by what they hold; the rest is in ``models``."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = next((module for module, names in _HOMES.items() if name in names), "models")
    return getattr(import_module(f"mergesec.api.{home}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


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
