"""The judge of generated images: a small classifier of real ones, frozen, and what a set of its features tells."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergesec.contracts import Weights

FEATURES = 64
LEAST_ACCURACY = 0.9
"""A judge that knows fewer of the real images is none."""
NEIGHBOURS = 5
"""Whose distance is the radius of a real image's ball (Naeem et al., ICML 2020, section 4)."""
BLOCKS = 8
"""Of the jackknife behind the measures' intervals."""
MEMORISED = 0.01
"""Share of real test images that lie nearer to a training image than what counts as memorised."""
_FOLD = 1000


class Judge(nn.Module):
    """Which class an image shows: float images ``[N, 3, H, W]`` in [0, 1] to features and logits."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.third, self.fourth = nn.Conv2d(64, 96, 3, padding=1), nn.Linear(96 * 4, FEATURES)
        self.last = nn.Linear(FEATURES, classes)

    def features(self, images: Tensor) -> Tensor:
        """``[N, FEATURES]``."""
        seen = functional.max_pool2d(functional.relu(self.first(2 * images - 1)), 2)
        seen = functional.max_pool2d(functional.relu(self.second(seen)), 2)
        seen = functional.adaptive_max_pool2d(functional.relu(self.third(seen)), 2)
        return functional.relu(self.fourth(seen.flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.last(self.features(images)))


def built(head: Weights) -> Judge:
    """The judge whose weights ``head`` holds (beside ``first``), in evaluation mode."""
    weights = {name: tensor for name, tensor in head.items() if name != "first"}
    judge = Judge(len(weights["last.bias"])).to(weights["last.bias"].device)
    judge.load_state_dict(weights, strict=True)
    return judge.eval()


def train_judge(
    images: Tensor, labels: Tensor, classes: int, seed: int, steps: int = 1500, batch: int = 64
) -> Judge:
    """A judge of ``classes`` classes from bytes ``[N, 3, H, W]``: AdamW, one cycle, images shifted by a pixel and
    made a little noisy. Deterministic for a seed, a thread count and a processor."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge(classes).to(images.device)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    height, width = images.shape[2:]
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(len(images), (batch,), generator=generator).to(images.device)
            seen = functional.pad(images[rows].float() / 255, (1, 1, 1, 1), mode="replicate")
            down, right = torch.randint(0, 3, (2,), generator=generator).tolist()
            seen = seen[:, :, down : down + height, right : right + width]
            grain = 0.05 * float(torch.rand(1, generator=generator))
            seen = seen + grain * torch.randn(seen.shape, generator=generator).to(seen.device)
            loss = functional.cross_entropy(judge(seen), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return judge.eval()


# --------------------------------------------------------------------------- measures of a set of images


class Quality(NamedTuple):
    """A measure with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def quality(made: Tensor, real: Tensor, distances: Tensor, usual: Tensor) -> dict[str, Quality]:
    """Measures of generated rows: features ``made`` beside ``real`` ones, both ``[N, d]``; distances ``[N]`` to the
    nearest training image, beside those of real test images.

    Intervals come from a jackknife over blocks of the generated rows: the real rows are the same for every
    method, so their chance is not counted.
    """
    made, real = made.double(), real.double()
    near = float(usual.double().quantile(MEMORISED))
    balls = radii(real)

    def all_of(rows: Tensor) -> dict[str, float]:
        within = torch.cdist(made[rows], real) < balls
        return {
            "kid": kid(made[rows], real),
            "fid": frechet(made[rows], real),
            "coverage": float(within.any(0).double().mean()),
            "density": float(within.double().sum(1).mean()) / NEIGHBOURS,
            "nearest": float(distances[rows].double().mean()),
            "memorised": float((distances[rows] < near).double().mean()),
        }

    return _jackknifed(len(made), all_of)


def _jackknifed(count: int, all_of: Callable[[Tensor], dict[str, float]]) -> dict[str, Quality]:
    whole = all_of(torch.arange(count))
    blocks = min(BLOCKS, count // 2)
    places = torch.arange(count) % max(blocks, 1)
    without = [all_of(torch.nonzero(places != block).flatten()) for block in range(blocks)]
    found = {}
    for name, value in whole.items():
        spread = _spread([one[name] for one in without])
        found[name] = Quality(value, value - 1.96 * spread, value + 1.96 * spread)
    return found


def _spread(values: Iterable[float]) -> float:
    """The jackknife's standard error from what the measure is without each block."""
    column = torch.tensor(list(values), dtype=torch.float64)
    if len(column) < 2:
        return 0.0
    return math.sqrt((len(column) - 1) / len(column) * float((column - column.mean()).square().sum()))


def kid(made: Tensor, real: Tensor) -> float:
    """Kernel inception distance on any features: the unbiased squared MMD with the kernel (xᵀy / d + 1)³.

    Binkowski et al., Demystifying MMD GANs, ICLR 2018, section 4. May be a little below 0.
    """

    def kernel(first: Tensor, second: Tensor) -> Tensor:
        return (first @ second.T / first.shape[1] + 1).pow(3)

    def among(rows: Tensor) -> float:
        found = kernel(rows, rows)
        return float((found.sum() - found.diagonal().sum()) / (len(rows) * (len(rows) - 1)))

    return among(made) + among(real) - 2 * float(kernel(made, real).mean())


def frechet(made: Tensor, real: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to both sets of features (Heusel et al., NeurIPS 2017, eq. 6).

    Biased upwards for few rows: compare only sets of the same size.
    """
    gap = (made.mean(0) - real.mean(0)).square().sum()
    first, second = made.T.cov(), real.T.cov()
    root = _root(first)
    mixed = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return float(gap + first.trace() + second.trace() - 2 * mixed)


def _root(matrix: Tensor) -> Tensor:
    """The square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def radii(real: Tensor) -> Tensor:
    """Distance ``[N]`` of each row to its ``NEIGHBOURS``-th neighbour among the others."""
    nearest = torch.cdist(real, real).sort(dim=1).values
    return nearest[:, min(NEIGHBOURS, len(real) - 1)]


def nearest_distance(images: Tensor, others: Tensor) -> Tensor:
    """Root mean square distance ``[N]`` of images to the nearest of ``others``, both float in [0, 1]."""
    flat, known = images.flatten(1), others.flatten(1)
    parts = [torch.cdist(part, known).amin(1) for part in torch.split(flat, _FOLD)]
    return torch.cat(parts) / math.sqrt(flat.shape[1])
