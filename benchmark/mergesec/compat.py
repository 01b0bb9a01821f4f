"""Guards against packages that break each other's import.

One so far: a torchvision built for another torch (the CUDA wheel beside CPU torch) cannot load its
compiled operators, and its ``import`` then raises ``RuntimeError: operator torchvision::nms does not
exist``. open_clip, timm and transformers' models import torchvision, so all of them fail with it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_alive: list[Any] = []
"""torch.library.Library objects; the schemas they declare vanish when they are collected."""
_outcome: list[str] = []


def ensure_torchvision() -> str:
    """Make ``import torchvision`` work, whatever torch it was built for.

    Call it before the first import of torchvision, open_clip, timm or a transformers model. Only
    declares the missing operators' schemas: calling one (``torchvision.ops.nms``) still fails, loudly.

    Returns ``"absent"`` (not installed), ``"healthy"`` (imported as it is) or ``"repaired"``; the
    same answer on every call. Errors other than the missing operator pass through.
    """
    if not _outcome:
        _outcome.append(_ensure())
    return _outcome[0]


def _ensure() -> str:
    if importlib.util.find_spec("torchvision") is None:
        return "absent"
    try:
        importlib.import_module("torchvision")
        return "healthy"
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    _forget()
    import torch

    library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS:
        library.define(schema)
    _alive.append(library)
    importlib.import_module("torchvision")
    return "repaired"


def _forget() -> None:
    """Drop the submodules a failed import leaves behind, so that the next one starts afresh."""
    for name in [m for m in sys.modules if m == "torchvision" or m.startswith("torchvision.")]:
        del sys.modules[name]
