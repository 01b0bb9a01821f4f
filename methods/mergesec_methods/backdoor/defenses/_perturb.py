"""Universal perturbations, one per task: what a defender puts in the place of a trigger he does not know.

Of images in pixel space; of texts a shift of every word's embedding, since letters have no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mergesec.contracts import Backbone, ContractError, Model, Weights
from mergesec.text import ShiftedTexts, TextBackbone
from mergesec_methods.backdoor.defenses._repair import Patient, Rows
from mergesec_methods.merging._adaptation import Blend, Stream, entropy

REFERENCE_SIDE = 32
"""Image side, in pixels, that sizes on the cards refer to."""


@dataclass(frozen=True)
class Seen:
    """One task's images ``[N, C, H, W]`` or texts, the same perturbed, and the model's outputs ``[N, K]`` on both."""

    stream: Stream
    images: Any
    moved: Any
    clean: Tensor
    perturbed: Tensor


Term = Callable[[Seen], Tensor]
"""A scalar of what a model made of clean and perturbed images."""


def disagreement(seen: Seen) -> Tensor:
    """CE(f(x+δ), argmax f(x)): how far the perturbation leads away from what the model says now."""
    return functional.cross_entropy(seen.perturbed, seen.clean.argmax(dim=-1))


def unsure(seen: Seen) -> Tensor:
    """H(f(x+δ)): smallest where the answer is sure, right or wrong."""
    return entropy(seen.perturbed)


SAFETIES: dict[str, Term] = {"published": unsure, "agreement": disagreement}
"""What a mask minimises on perturbed images: the released term, and one that asks for the clean prediction."""


class Perturbations:
    """δ_t of the shape of one image per task, |δ| ≤ ``eps`` in pixels of [0, 1]; starts at 0.

    x + δ_t is cut to [0, 1] on raw images, before a backbone resizes or normalises anything. With ``window``
    (an image's height and width → where δ may be, 0 or 1) it is no larger than that. Of texts, where ``words`` is
    the width of their embeddings (``word_width``), δ_t ``[words]`` is added to every word's embedding, in units of
    the embeddings' root mean square. ContractError if a task's inputs are neither.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        rate: float,
        eps: float,
        who: str,
        window: Callable[[int, int], Tensor] | None = None,
        words: int = 0,
    ) -> None:
        self.streams, self.rate, self.eps, self.window, self.words = streams, rate, eps, window, words
        self.deltas = {s.name: self._start(s, who) for s in streams}
        self.flipped: list[float] = []
        """Share of predictions that the perturbations changed, per step of ``ascend``."""
        self.restart()

    def restart(self) -> None:
        """From 0 again, with a fresh optimizer and, if there are windows, elsewhere."""
        self.windows: dict[str, Tensor] = {}
        for name, delta in self.deltas.items():
            delta.detach().zero_()
            if self.window is not None:
                self.windows[name] = self.window(delta.shape[-2], delta.shape[-1]).to(delta.device)
        self._optimizer = torch.optim.Adam(list(self.deltas.values()), lr=self.rate)

    def _start(self, stream: Stream, who: str) -> Tensor:
        inputs = stream.rows.inputs
        if isinstance(inputs, Tensor) and inputs.ndim == 4:
            return torch.zeros(inputs.shape[1:], device=stream.device, requires_grad=True)
        if self.words and not isinstance(inputs, Tensor):
            return torch.zeros(self.words, device=stream.device, requires_grad=True)
        raise ContractError(f"{who}: task '{stream.name}' has no images [N, C, H, W] to perturb")

    def on(self, stream: Stream, inputs: Any) -> Any:
        """Images ``[N, C, H, W]`` in [0, 1] with the task's perturbation, in [0, 1]; or texts with theirs."""
        delta = self.deltas[stream.name]
        return (inputs + delta).clamp(0.0, 1.0) if isinstance(inputs, Tensor) else ShiftedTexts(inputs, delta)

    def fixed(self, stream: Stream, inputs: Any) -> Any:
        """``on`` without a gradient to δ."""
        if not isinstance(inputs, Tensor):
            return ShiftedTexts(inputs, self.deltas[stream.name].detach())
        with torch.no_grad():
            return self.on(stream, inputs)

    def ascend(self, model: Model, objective: Term = disagreement) -> None:
        """One Adam step of every δ_t uphill on a fresh batch; the model's own gradients are left alone."""
        flips = 0.0
        for stream in self.streams:
            delta, images = self.deltas[stream.name], stream.inputs(stream.draw())
            with torch.no_grad():
                clean = stream.outputs(model, images)
            with torch.enable_grad():
                moved = self.on(stream, images)
                perturbed = stream.outputs(model, moved)
                value = objective(Seen(stream, images, moved, clean, perturbed))
                delta.grad = -torch.autograd.grad(value, delta)[0]
            flips += float((perturbed.argmax(dim=-1) != clean.argmax(dim=-1)).float().mean())
        self._optimizer.step()
        with torch.no_grad():
            for name, delta in self.deltas.items():
                delta.clamp_(-self.eps, self.eps)
                if name in self.windows:
                    delta.mul_(self.windows[name])
        self.flipped.append(flips / len(self.streams))

    def largest(self) -> dict[str, float]:
        """max |δ_t| per task in pixels, for a merge's info."""
        return {name: float(delta.detach().abs().max()) for name, delta in self.deltas.items()}


class Safety:
    """The outer objective of a mask with the safety term, called with the blend assembled.

    Perturbations are trained on batches of their own, so that the other steps see the same batches as
    without them. ``objective`` is what they climb, ``robust`` what the mask minimises of them with its weight;
    ``extra`` is added to that.
    """

    def __init__(
        self,
        blend: Blend,
        streams: Sequence[Stream],
        perturbations: Perturbations,
        weight: float,
        objective: Term = disagreement,
        extra: Term | None = None,
        robust: Term = unsure,
    ) -> None:
        self.blend, self.streams, self.perturbations, self.weight = blend, streams, perturbations, weight
        self.objective, self.extra, self.robust = objective, extra, robust

    def __call__(self) -> float:
        """Perturb, then leave d Σ_t [H(f(x)) + w robust + extra] / dθ; the mean over tasks."""
        self.perturbations.ascend(self.blend.model, self.objective)
        total = 0.0
        with torch.enable_grad():
            for stream in self.streams:
                images = stream.inputs(stream.draw())
                moved = self.perturbations.fixed(stream, images)
                clean, perturbed = self._outputs(stream, images, moved)
                seen = Seen(stream, images, moved, clean, perturbed)
                loss = entropy(clean) + self.weight * self.robust(seen)
                if self.extra is not None:
                    loss = loss + self.extra(seen)
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
        return total / len(self.streams)

    def _outputs(self, stream: Stream, inputs: Any, moved: Any) -> tuple[Tensor, Tensor]:
        """Of the inputs and of the same perturbed; of images in one forward."""
        model = self.blend.model
        if not isinstance(inputs, Tensor):
            return stream.outputs(model, inputs), stream.outputs(model, moved)
        clean, perturbed = stream.outputs(model, torch.cat([inputs, moved])).chunk(2)
        return clean, perturbed


def word_width(backbone: Backbone, base: Weights) -> int:
    """The width of a text backbone's word embeddings; 0 of another backbone."""
    return base[backbone.embedding()].shape[1] if isinstance(backbone, TextBackbone) else 0


def square(patch: float, generator: torch.Generator) -> Callable[[int, int], Tensor]:
    """Windows with one square of ``patch`` pixels of a 32-pixel image a side, at a place drawn by lot: ``[H, W]``."""

    def window(height: int, width: int) -> Tensor:
        side = min(height, width, max(1, round(patch * min(height, width) / REFERENCE_SIDE)))
        top = int(torch.randint(0, height - side + 1, (), generator=generator))
        left = int(torch.randint(0, width - side + 1, (), generator=generator))
        found = torch.zeros(height, width)
        found[top : top + side, left : left + side] = 1.0
        return found

    return window


def universal(
    patient: Patient,
    rows: Rows,
    rate: float,
    steps: int,
    penalty: float = 0.0,
    weights: Weights | None = None,
) -> Tensor:
    """δ ``[C, H, W]`` in pixels by SGD from 0 on penalty · ‖δ‖² − CE(f(x + δ), argmax f(x)), a batch a step.

    x + δ is cut to [0, 1]; δ itself is not bounded here. ``weights`` stand in for the patient's own; its gradients
    are left alone.
    """
    delta = torch.zeros(rows.split.inputs.shape[1:], device=rows.device)
    for _ in range(steps):
        inputs = rows.draw().inputs
        with torch.no_grad():
            labels = patient.outputs(rows, inputs, weights).argmax(dim=1)
        with torch.enable_grad():
            leaf = delta.requires_grad_()
            moved = patient.outputs(rows, (inputs + leaf).clamp(0.0, 1.0), weights)
            loss = penalty * leaf.square().sum() - functional.cross_entropy(moved, labels)
            (downhill,) = torch.autograd.grad(loss, leaf)
        delta = leaf.detach() - rate * downhill
    return delta
