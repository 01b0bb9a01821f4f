"""Networks of open_clip and timm against the header of a safetensors file: the same tensors, no more and no fewer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mergesec.errors import UsageError
from mergesec.files import brief
from mergesec.modelfiles import Stored
from mergesec_tasks._transformers import complaining


def check_held(
    make: Callable[[], nn.Module],
    stored: Mapping[str, Stored],
    prefix: str,
    beside: Collection[str],
    who: str,
) -> None:
    """UsageError, naming the tensor, unless ``stored`` holds under ``prefix`` what ``make`` builds, in its shapes, and
    nothing else but what begins with one of ``beside``.

    The network is built without memory: a config asks for no more than the file holds before anything is made.
    """
    file = next(iter(stored.values())).file
    with torch.device("meta"), complaining(who, f"no network can be built by the config of {str(file)!r}"):
        wanted = {n: tuple(t.shape) for n, t in make().state_dict().items()}
    held = {n.removeprefix(prefix): t.shape for n, t in stored.items() if n.startswith(prefix)}
    for name, shape in wanted.items():
        if name not in held:
            raise UsageError(who, f"{brief(str(file))!r} lacks '{prefix}{name}'")
        if held[name] != shape:
            raise UsageError(
                who, f"{brief(str(file))!r}: tensor '{prefix}{name}' has the shape {list(held[name])}, by the config it "
                f"would be {list(shape)}",
            )  # fmt: skip
    left = next((n for n in held if n not in wanted and not n.startswith(tuple(beside))), "")
    if left:
        raise UsageError(
            who,
            f"{brief(str(file))!r}: tensor '{brief(prefix + left)}' is none of the network that the config describes",
        )


def read_tensors(file: Path, prefix: str, names: Collection[str]) -> dict[str, Tensor]:
    """Tensors of a file by name without ``prefix``."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(prefix + name) for name in names}
