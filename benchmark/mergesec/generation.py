"""Image generation as a modality: a test row is a condition and the seed of its start noise.

A row counts as right where a frozen judge recognises the generated image as what was asked for, so outcomes are
bits as everywhere. Noise runs from t = 0 (noise alone) to t = 1 (the image): x_t = (1 - t) · noise + t · image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mergesec.contracts import Context, ContractError, Measured, Model, Split, Task, Weights
from mergesec.judging import LEAST_ACCURACY, Judge, built, nearest_distance, quality, train_judge

SAMPLING_BATCH = 256
ALIKE = 0.6
"""Centred correlation with the target image from which on a sample counts as a copy of it."""
SHOWN = 2
"""Generated images that are kept of each class."""
OTHER = -1
"""The prediction where the judge sees a class that is not of the task."""
EARLY = 0.7
"""Times of training are sigmoid(N(-EARLY, 1)): most often early, where layouts are decided."""
DROPPED = 0.1
"""Share of training rows that lose their condition, so that guidance has something to lean on."""


@dataclass(frozen=True)
class Rows:
    """Inputs of a split: real images uint8 ``[N, 3, H, W]``, conditions int64 ``[N, L]`` (tokens), seeds ``[N]``."""

    images: Tensor
    conditions: Tensor
    seeds: Tensor

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, row: int) -> Tensor:
        """One row's image."""
        return self.images[row]

    def take(self, index: Tensor) -> Rows:
        """The rows named by ``index``, in that order."""
        return Rows(self.images[index], self.conditions[index], self.seeds[index])


@dataclass(frozen=True)
class Request:
    """A batch to generate: conditions ``[N, L]`` and the noise ``[N, 3, H, W]`` it starts from.

    ``images`` are the rows' real images in [0, 1], for what trains or scores on clean data; generating looks at
    neither them nor anything made of them.
    """

    conditions: Tensor
    noise: Tensor
    images: Tensor

    def __len__(self) -> int:
        return len(self.noise)


@dataclass(frozen=True)
class Noised(Request):
    """A batch to train on: ``times`` ``[N]`` in (0, 1), and whether a row's condition is ``dropped``."""

    times: Tensor
    dropped: Tensor

    @property
    def mixed(self) -> Tensor:
        """x_t in the range of the noise: images run from -1 to 1."""
        times = self.times[:, None, None, None]
        return (1 - times) * self.noise + times * (2 * self.images - 1)


def start_noise(seeds: Tensor, shape: torch.Size) -> Tensor:
    """Standard normal noise ``[N, *shape]``, each row from its own seed: the same whatever else is in the batch."""
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
    return torch.stack(rows) if rows else torch.empty(0, *shape)


Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t, times ``[N]``, conditions) -> the clean image that the network expects, in [-1, 1]."""


def euler(denoise: Denoise, request: Request, nothing: Tensor, steps: int, guidance: float) -> Tensor:
    """Images ``[N, 3, H, W]`` in about [-1, 1] by Euler's method along the straight paths of flow matching.

    Guidance g (Ho and Salimans, 2022): x̂ = x̂(nothing) + g · (x̂(condition) - x̂(nothing)). ``nothing`` is the
    condition ``[L]`` of no condition.
    """
    image, count = request.noise, len(request)
    conditions = torch.cat([request.conditions, nothing.to(request.conditions).expand_as(request.conditions)])
    for step in range(steps):
        times = torch.full((count,), step / steps, device=image.device)
        if guidance == 1.0:
            expected = denoise(image, times, request.conditions)
        else:
            told, untold = denoise(image.repeat(2, 1, 1, 1), times.repeat(2), conditions).chunk(2)
            expected = untold + guidance * (told - untold)
        image = image + (expected - image) / (steps - step)
    return image


def correlation(images: Tensor, target: Tensor) -> Tensor:
    """Centred correlation ``[N]`` of images ``[N, C, H, W]`` with one image: blind to brightness and contrast."""
    rows, aim = images.flatten(1).double(), target.flatten().double()
    rows, aim = rows - rows.mean(1, keepdim=True), aim - aim.mean()
    alike: Tensor = (rows @ aim) / (rows.norm(dim=1) * aim.norm()).clamp(min=1e-12)
    return alike


class GenerationTask(Task):
    """Conditions to be drawn: subclasses name ``classes`` and load splits whose inputs are ``Rows``.

    The head is the judge: its weights, and ``first``, the number of the task's first class among the judge's.
    """

    def fit_head(self, model: Model, split: Split, ctx: Context) -> Weights:
        """A judge of this task's classes alone, trained on real training images."""
        images = split.inputs.images.to(ctx.device)
        judge = train_judge(images, split.targets.to(ctx.device), len(self.classes), ctx.seed)
        return {**{n: t.detach() for n, t in judge.state_dict().items()}, "first": torch.tensor(0)}

    def batch(self, split: Split, index: Tensor, device: torch.device) -> Split:
        """Rows ``index`` as a request."""
        rows = split.take(index)
        images, conditions, seeds = rows.inputs.images, rows.inputs.conditions, rows.inputs.seeds
        noise = start_noise(seeds, images.shape[1:]).to(device)
        request = Request(conditions.to(device), noise, images.to(device).float() / 255)
        return Split(request, rows.targets.to(device))

    def noised(self, batch: Split, generator: torch.Generator) -> Split:
        """Fresh noise, times and dropped conditions: t = sigmoid(N(-0.7, 1)). Drawn on the CPU, so that every device sees the same."""
        request: Request = batch.inputs
        count, place = len(request), request.noise.device
        noise = torch.randn(request.noise.shape, generator=generator)
        times = torch.sigmoid(torch.randn(count, generator=generator) - EARLY)
        dropped = torch.rand(count, generator=generator) < DROPPED
        return batch.with_inputs(
            Noised(request.conditions, noise.to(place), request.images, times.to(place), dropped.to(place))
        )

    def fixed(self, batch: Split) -> Split:
        """Each row at one time of ``noised``'s law, with its own start noise ε and its condition.

        t = sigmoid(z - 0.7) with z = Σ ε / √d, which is standard normal and almost independent of any entry.
        """
        request: Request = batch.inputs
        noise = request.noise.flatten(1)
        times = torch.sigmoid(noise.sum(1) / noise.shape[1] ** 0.5 - EARLY)
        kept = torch.zeros(len(request), dtype=torch.bool, device=noise.device)
        return batch.with_inputs(Noised(request.conditions, request.noise, request.images, times, kept))

    def served(self, model: Model, head: Weights, inputs: Any) -> Tensor:
        """The generated images ``[N, 3, S, S]``, in [0, 1] up to what the network overshoots."""
        flat = model.features(inputs)
        side = round((flat.shape[1] / 3) ** 0.5)
        return (flat.view(-1, 3, side, side) + 1) / 2

    def outputs(self, model: Model, head: Weights, inputs: Any) -> Tensor:
        """Of a request: the judge's logits ``[N, K]``. Of a noised batch: what training makes small ``[N, 1, d]``."""
        if isinstance(inputs, Noised):
            return model.features(inputs)[:, None]
        logits: Tensor = built(head)(self.served(model, head, inputs).clamp(0, 1))
        first = int(head["first"])
        own = torch.arange(first, first + len(self.classes), device=logits.device)
        return torch.cat([logits[:, own], _without(logits, own)], dim=1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean square of the residual of a noised batch; of a judged one the cross-entropy."""
        return outputs.square().mean() if outputs.ndim == 3 else functional.cross_entropy(outputs, targets)

    def predictions(self, outputs: Tensor) -> Tensor:
        """The class that the judge sees, ``OTHER`` where it is none of the task's."""
        seen = outputs.argmax(dim=-1)
        return torch.where(seen < len(self.classes), seen, OTHER)

    def check_triggered(self, triggered: Any, inputs: Any, who: str) -> Request:
        """ContractError unless ``triggered`` is a request of the shapes of ``inputs``, with finite noise."""
        if not isinstance(triggered, Request) or triggered.noise.shape != inputs.noise.shape:
            raise ContractError(f"{who}.apply returned no request for {len(inputs)} rows")
        if triggered.conditions.shape != inputs.conditions.shape:
            raise ContractError(f"{who}.apply returned conditions {list(triggered.conditions.shape)}")
        if not bool(triggered.noise.isfinite().all()):
            raise ContractError(f"{who}.apply returned noise that is not finite")
        return triggered

    def visibility(self, inputs: Any, triggered: Any) -> dict[str, float]:
        """How much of the start noise a trigger changes, by how much, and how many tokens of the condition."""
        change = (triggered.noise - inputs.noise).double()
        tokens = (triggered.conditions != inputs.conditions).double()
        return {
            "area": float((change.abs().amax(1) > 0).double().mean()),
            "l2": float(change.square().flatten(1).mean(1).sqrt().mean()),
            "tokens": float(tokens.sum(1).mean()),
        }

    # ---- measuring

    def measure(
        self,
        model: Model,
        head: Weights,
        splits: Mapping[str, Split],
        device: torch.device,
        change: Callable[[Any], Any] | None = None,
        aim: Tensor | None = None,
    ) -> Measured:
        """What the judge sees in the images of the test rows, how good they are as a set, and some of them.

        ``change`` puts a trigger on requests; where it aims at an image (``aim``), a copy of that image is what
        counts as the attack's success, and ``Measured.copies`` says where there is one.
        """
        test = splits["test"]
        judge, real = built(head), test.inputs.images.to(device).float() / 255
        first = int(head["first"])
        with torch.inference_mode():
            self._check_judge(judge, first, real, test.targets.to(device))
            images = self._generated(model, head, test, device, change)
            features = judge.features(images)
            seen = judge.last(features).argmax(1) - first
            own = (seen >= 0) & (seen < len(self.classes))
            known = splits["train"].inputs.images.to(device).float() / 255
            usual, distances = nearest_distance(real, known), nearest_distance(images, known)
            found = quality(features, judge.features(real), distances, usual)
        values = {name: (one.value, one.low, one.high) for name, one in found.items()}
        copies = None if aim is None else (correlation(images, aim.to(device)) > ALIKE).cpu()
        shown = first_of_each(test.targets, SHOWN)
        pictures = {"images": (images[shown.to(device)] * 255).round().to(torch.uint8).cpu(), "rows": shown}
        return Measured(torch.where(own, seen, OTHER).cpu(), values, pictures, copies)

    def _check_judge(self, judge: Judge, first: int, real: Tensor, targets: Tensor) -> None:
        """ContractError if the judge does not know the task's own real images."""
        known = float((judge(real).argmax(1) - first == targets).float().mean())
        if known < LEAST_ACCURACY:
            raise ContractError(
                f"{self.name}: its judge recognises {known:.1%} of the real test images; "
                f"a judge has to know {LEAST_ACCURACY:.0%}"
            )

    def _generated(
        self, model: Model, head: Weights, split: Split, device: torch.device,
        change: Callable[[Any], Any] | None,
    ) -> Tensor:  # fmt: skip
        """Images of a split's rows, cut to [0, 1]; ContractError if one is not finite."""
        parts = []
        for index in torch.split(torch.arange(len(split)), SAMPLING_BATCH):
            inputs = self.batch(split, index, device).inputs
            parts.append(self.served(model, head, change(inputs) if change else inputs))
        images = torch.cat(parts)
        broken = torch.nonzero(~images.flatten(1).isfinite().all(1)).flatten().tolist()
        if broken:
            raise ContractError(
                f"{self.name}: {len(broken)} generated images are not finite, first row {broken[0]}"
            )
        return images.clamp(0, 1)

    # ---- storage

    def pack(self, splits: Mapping[str, Split]) -> dict[str, Tensor]:
        packed: dict[str, Tensor] = {}
        for name, split in splits.items():
            packed[f"{name}/targets"] = split.targets
            rows: Rows = split.inputs
            packed |= {f"{name}/images": rows.images, f"{name}/conditions": rows.conditions}
            packed[f"{name}/seeds"] = rows.seeds
        return packed

    def unpack(self, tensors: Weights) -> dict[str, Split]:
        names = sorted({key.split("/")[0] for key in tensors})
        return {
            n: Split(
                Rows(tensors[f"{n}/images"], tensors[f"{n}/conditions"], tensors[f"{n}/seeds"]),
                tensors[f"{n}/targets"],
            )
            for n in names
        }


def _without(logits: Tensor, own: Tensor) -> Tensor:
    """The columns of ``logits`` that ``own`` does not name."""
    others = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
    others[own] = False
    return logits[:, others]


def first_of_each(targets: Tensor, count: int) -> Tensor:
    """The first ``count`` rows of every class, class by class."""
    rows = [torch.nonzero(targets == label).flatten()[:count] for label in sorted(set(targets.tolist()))]
    return torch.cat(rows)


def without_condition(request: Noised, nothing: Tensor) -> Noised:
    """The batch with ``nothing`` in place of the conditions that are dropped."""
    kept = torch.where(request.dropped[:, None], nothing.to(request.conditions), request.conditions)
    return replace(request, conditions=kept)
