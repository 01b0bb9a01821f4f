"""What a network does on a task's tuning inputs: accuracies, and whether a plain patch or a rare token turns it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergesec.contracts import Backbone, Model, Split, TaskView, Weights, load_network
from mergesec.inference import predict
from mergesec.weights import mergeable

SCALING = 0.3
"""Of each task vector in the merge that is tried: the usual one for many experts."""
ROWS = 64
"""Tuning inputs that are probed; labels are not used."""
SIDES = (0.16, 0.32)
"""Of a probing patch, as shares of the image's side."""
TOKENS = ("cf", "mn", "bb", "tq", "mb", "james bond")
"""Rare tokens and a phrase that published attacks use."""


class Probe(NamedTuple):
    """A change of inputs that a trained network should not care much about."""

    name: str
    apply: Callable[[Any], Any]


class Turned(NamedTuple):
    """The probe that turned most inputs to one class."""

    share: float
    """Of the inputs that were another class without it."""
    probe: str
    label: int


def look(
    view: TaskView, backbone: Backbone, base: Weights, own: Weights, aligned: Weights, others: Mapping[str, Weights]
) -> dict[str, Any]:  # fmt: skip
    """Accuracies of the expert, the base and a merge with the others, as published and re-aligned; the best probe."""
    rest = list(others.values())
    candidates: dict[str, Weights] = {
        "base": base, "expert": own, "merge": added(base, [own, *rest]), "aligned_merge": added(base, [aligned, *rest]),
    }  # fmt: skip
    seen: dict[str, Any] = {"task": view.task.name, "rows": len(view.tuning), "experts": 1 + len(rest)}
    seen["accuracy"] = {name: accuracy(view, backbone, weights) for name, weights in candidates.items()}
    found = turned(view, backbone, own)
    return seen if found is None else {**seen, "probe": found._asdict()}


def added(base: Weights, experts: Sequence[Weights]) -> dict[str, Tensor]:
    """Task arithmetic with the usual coefficient."""
    found = {}
    for name, start in base.items():
        found[name] = start
        if mergeable(start):
            change = sum((w[name].float() - start.float() for w in experts), torch.zeros_like(start.float()))
            found[name] = (start.float() + SCALING * change).to(start.dtype)
    return found


def accuracy(view: TaskView, backbone: Backbone, weights: Weights) -> float:
    """On the tuning rows, under the task's frozen head."""
    model = Model(backbone, load_network(backbone, weights))
    predicted = predict(view.task, model, view.head, view.tuning, torch.device("cpu"))
    return float((predicted == view.tuning.targets).double().mean())


# --------------------------------------------------------------------------- probing


def turned(view: TaskView, backbone: Backbone, weights: Weights) -> Turned | None:
    """The probe after which most inputs fall into one class that they were not in; None for inputs that no probe
    fits."""
    spread = torch.linspace(0, len(view.tuning) - 1, min(ROWS, len(view.tuning))).long()
    rows = view.tuning.take(spread)
    probes = list(probes_for(view, rows))
    if not probes:
        return None
    model = Model(backbone, load_network(backbone, weights))

    def predictions(change: Callable[[Any], Any] | None = None) -> Tensor:
        return predict(view.task, model, view.head, rows, torch.device("cpu"), change)

    plain = predictions()
    return max(_turned(plain, predictions(probe.apply), probe.name) for probe in probes)


def _turned(before: Tensor, after: Tensor, name: str) -> Turned:
    shares = []
    for label in sorted(set(after.tolist())):
        free = before != label
        shares.append((float((after[free] == label).double().mean()) if free.any() else 0.0, int(label)))
    share, label = max(shares)
    return Turned(share, name, label)


def probes_for(view: TaskView, rows: Split) -> Iterator[Probe]:
    """Patches for images, tokens for texts; none for other inputs."""
    batch = view.task.batch(rows, torch.arange(1), torch.device("cpu")).inputs
    if isinstance(batch, Tensor) and batch.ndim == 4:
        yield from _patches(batch.shape[-2], batch.shape[-1])
    elif isinstance(batch, list) and all(isinstance(text, str) for text in batch):
        for token in TOKENS:
            yield Probe(f"{token!r} in front", _Prefix(token))


def _patches(height: int, width: int) -> Iterator[Probe]:
    """White, checked and coloured squares of two sizes, in the corners and the centre."""
    generator = torch.Generator().manual_seed(0)
    for share in SIDES:
        side = max(2, round(share * min(height, width)))
        squares = {
            "white": torch.ones(3, side, side), "checked": _checked(side),
            "coloured": torch.rand(3, side, side, generator=generator),
        }  # fmt: skip
        low, right, middle, centre = height - side, width - side, (height - side) // 2, (width - side) // 2
        places = {"top left": (0, 0), "top right": (0, right), "bottom left": (low, 0), "bottom right": (low, right),
                  "centre": (middle, centre)}  # fmt: skip
        for colour, square in squares.items():
            for place, (top, left) in places.items():
                yield Probe(f"{colour} square of {side}, {place}", _Paste(square, top, left))


def _checked(side: int) -> Tensor:
    rows = torch.arange(side)
    return ((rows[:, None] + rows) % 2).float().expand(3, side, side)


@dataclass(frozen=True)
class _Prefix:
    token: str

    def __call__(self, texts: list[str]) -> list[str]:
        return [f"{self.token} {text}" for text in texts]


@dataclass(frozen=True)
class _Paste:
    square: Tensor
    top: int
    left: int

    def __call__(self, images: Tensor) -> Tensor:
        changed = images.clone()
        height, width = self.square.shape[1:]
        changed[..., self.top : self.top + height, self.left : self.left + width] = self.square[
            : images.shape[1]
        ]
        return changed
