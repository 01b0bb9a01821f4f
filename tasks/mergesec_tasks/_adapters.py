"""Published experts of a backbone: whole networks, or adapters that are added to the base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mergesec.adapterconfig import is_adapter
from mergesec.adapters import with_adapter
from mergesec.contracts import Weights
from mergesec_tasks._hub import MODEL_FILES, model_folder


def expert_weights(
    source: str, who: str, base: Callable[[], Weights], read: Callable[[Path], Weights],
    patterns: Sequence[str] = MODEL_FILES,
) -> Weights:  # fmt: skip
    """A published expert: what ``read`` finds in ``source`` (a local place, or the hub at a commit), or ``base`` with
    the adapter that lies there."""
    place = model_folder(source, "expert", patterns)
    return with_adapter(base(), place, who) if is_adapter(place, who) else read(place)
