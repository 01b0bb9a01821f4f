"""Weight-space screen: a logistic regression on the spectra of attention's updates, trained on experts of the merger's own.

From the source (Merenciano et al., arXiv 2602.15195, known here by its abstract and by descriptions of it): per map Q, K,
V, O of the attention five statistics of the update ΔW = W − W0, its largest singular value, Frobenius norm, energy
concentration, spectral entropy and kurtosis; 20 numbers per adapter; a logistic regression trained on clean and
poisoned adapters; statistics in standard deviations of a clean bank. Reported for LoRA adapters of language models.

This suite's reading, where that leaves it open, with σ_i the singular values of one map and p_i = σ_i² / Σ σ²:

    log σ_1,   log ‖ΔW‖_F,   p_1,   −Σ p_i log p_i,   log (mean (w − w̄)⁴ / (mean (w − w̄)²)²)  over ΔW's entries,

each as the mean over all blocks (all attentions of a block). Experts here are of different tasks, and full
fine-tunings: statistics are taken relative to the clean references of the same task (``centre``), a clean reference
relative to the *others*, so that it is as far from them as an innocent contribution is. They are divided by their root
mean square over all references, cut off at ±10, and given to scikit-learn's regression (L2, classes balanced).

Who trains the references? The merger. Clean ones are the siblings that other defenses have too; malicious ones he makes
by an attack of his own, of which everything is drawn: side, place and pixels of a patch, target class, poisoned share.
He knows nothing of the cell's trigger, target class or adversary. Neither does he know that his attack is like theirs:
that is the method's bet. Each pair (the i-th clean and the i-th malicious reference of a task) is judged by a regression on the
rest. Where malicious ones do not come out above clean ones there, nothing can be told and everybody is let in: the share
of (malicious, clean) that are in this order must be larger than what all but the share ``level`` of exchanges of labels
within tasks give. (Ranks alone, as in Mann and Whitney's test, flag too often: held-out values share their references.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any

import torch
from torch import Tensor

from mergesec.anatomy import Anatomy, Linear
from mergesec.contracts import ContractError, Defense, Expert, MergeContext, Screened, TrainContext, Weights
from mergesec.surgery import read
from mergesec_methods.backdoor.attacks._poison import REFERENCE_SIDE, PatchPoisoning, image_size
from mergesec_methods.backdoor.defenses._screens import let_in, rounded

CARD = {
    "name": "weight_screen",
    "kind": "defense",
    "class": "WeightScreen",
    "version": "1",
    "title": "Weight-space screen",
    "paper": "Merenciano et al., Weight space detection of backdoors in LoRA adapters, 2026 (from its abstract; here: experts)",
    "url": "https://arxiv.org/abs/2602.15195",
    "summary": "drop experts whose attention updates a regression on the merger's own clean and poisoned experts calls poisoned",
    "threat": "backdoor",
    "hooks": ["screen"],
    "knowledge": "the contributed weights, labelled training rows of every task and the recipe, for clean and poisoned experts of his own",
    "data": "train",
    "siblings": "references",
    "references": "references",
    "after_reference": ["references", "threshold", "false_alarms", "level", "draws", "centre", "strength"],
    "modalities": ["image"],
    "seeded": True,
    "trial": {"references": 2, "draws": 19},
    "parameters": {
        "references": {
            "type": "int",
            "default": 2,
            "min": 2,
            "max": 64,
            "doc": "clean experts per task that the merger trains, and as many poisoned ones",
        },
        "threshold": {
            "type": "float",
            "default": 0.5,
            "min": 0.0,
            "max": 1.0,
            "also": ["held_out"],
            "doc": "largest probability that is let in; held_out: the one that held-out clean references exceed with the rate false_alarms",
        },
        "false_alarms": {
            "type": "float",
            "default": 0.05,
            "min": 0.0,
            "max": 1.0,
            "doc": "with threshold: held_out, the share of clean references above it",
        },
        "level": {
            "type": "float",
            "default": 0.05,
            "min": 0.0,
            "max": 1.0,
            "doc": "largest p-value at which held-out references count as told apart; else everybody is let in",
        },
        "draws": {
            "type": "int",
            "default": 199,
            "min": 1,
            "max": 100000,
            "doc": "exchanges of labels behind that p-value; the smallest one is 1 / (draws + 1)",
        },
        "centre": {
            "type": "choice",
            "choices": ["task", "all"],
            "default": "task",
            "doc": "the clean references that statistics are relative to: those of the expert's task, or all",
        },
        "strength": {
            "type": "float",
            "default": 1.0,
            "min": 0.000001,
            "max": 1000000.0,
            "doc": "C of the regression: the inverse of its L2 penalty's weight",
        },
    },
}  # fmt: skip

MAPS = ("query", "key", "value", "output")
STATISTICS = ("sigma", "norm", "concentration", "entropy", "kurtosis")
TINY = 1e-12
FURTHEST = 10.0
"""Where standardised statistics are cut off: beyond its references a regression only extrapolates."""
TRIGGER_STREAM, ROWS_STREAM, LABELS_STREAM = 1, 2, 3
SMALLEST_SIDE, LARGEST_SIDE = 3, 8
"""Sides of drawn patches, in pixels of a 32-pixel image."""
LOWEST_RATE, HIGHEST_RATE = 0.05, 0.3


# --------------------------------------------------------------------------- statistics


def statistics(change: Tensor) -> Tensor:
    """The five of one map's update ``[out, in]``, float64 ``[5]``, in the order of ``STATISTICS``.

    Of an update of zeros: σ_1 and ‖·‖_F count as ``TINY``, concentration and entropy are 0, kurtosis is a normal's.
    """
    change = change.double()
    squares = torch.linalg.svdvals(change).square()
    total = squares.sum()
    if float(total) <= TINY**2:
        floor, normal = torch.tensor(TINY).log(), torch.tensor(3.0).log()
        return torch.stack([floor, floor, torch.zeros(()), torch.zeros(()), normal]).double()
    shares = squares / total
    centred = (change - change.mean()).square()
    kurtosis = centred.square().mean() / centred.mean().square().clamp_min(TINY**4)
    return torch.stack([
        squares[0].sqrt().log(), total.sqrt().log(), shares[0], torch.special.entr(shares).sum(),
        kurtosis.clamp_min(1.0).log(),
    ])  # fmt: skip


def signature(base: Weights, weights: Weights, anatomy: Anatomy) -> Tensor:
    """The 20 numbers of an expert: for Q, K, V and O the five ``statistics``, means over attentions, float64 ``[20]``.

    ContractError if no block of the network has an attention.
    """
    attentions = [a for block in anatomy.blocks for a in block.attentions]
    if not attentions:
        raise ContractError(
            "weight_screen: the network's anatomy names no attention, so it has no Q, K, V and O"
        )
    return torch.cat([
        torch.stack([statistics(_change(base, weights, getattr(a, name))) for a in attentions]).mean(dim=0)
        for name in MAPS
    ])  # fmt: skip


def _change(base: Weights, weights: Weights, linear: Linear) -> Tensor:
    return read(weights, linear)[0] - read(base, linear)[0]


# --------------------------------------------------------------------------- the detector


@dataclass(frozen=True)
class Population:
    """The merger's experts: 20 numbers each, whether they are poisoned, their tasks, and which pair they belong to."""

    values: Tensor
    """float64 ``[n, d]``"""
    poisoned: Tensor
    """bool ``[n]``"""
    tasks: tuple[str, ...]
    pairs: Tensor
    """int64 ``[n]``: one clean and one poisoned expert of a task have the same number."""

    def without(self, pair: int) -> Population:
        """All but one pair."""
        kept = self.pairs != pair
        tasks = tuple(t for t, k in zip(self.tasks, kept.tolist(), strict=True) if k)
        return Population(self.values[kept], self.poisoned[kept], tasks, self.pairs[kept])

    def exchanged(self, generator: torch.Generator) -> Population:
        """Each task's experts in a drawn order, labels in their places."""
        order = torch.arange(len(self.tasks))
        for task in dict.fromkeys(self.tasks):
            own = torch.tensor([i for i, t in enumerate(self.tasks) if t == task])
            order[own] = own[torch.randperm(len(own), generator=generator)]
        return Population(self.values[order], self.poisoned, self.tasks, self.pairs)


class Detector:
    """A regression on a population, or none where the rest of its task is too small for it (``fitted``)."""

    def __init__(self, known: Population, centre: str, strength: float) -> None:
        self.known, self.centre = known, centre
        self.clean = [i for i, poisoned in enumerate(known.poisoned.tolist()) if not poisoned]
        rows = [self._relative(known.values[i], known.tasks[i], i) for i in range(len(known.tasks))]
        usable = [i for i, row in enumerate(rows) if row is not None]
        given = [row for row in rows if row is not None]
        labels = known.poisoned[usable]
        self.fitted = bool(labels.any()) and not bool(labels.all())
        if not self.fitted:
            return
        from sklearn.linear_model import LogisticRegression

        spread = torch.stack(given).square().mean(dim=0).sqrt()
        self.scale = torch.where(spread > TINY, spread, torch.inf)
        self.model = LogisticRegression(C=strength, class_weight="balanced", max_iter=10_000, tol=1e-8)
        self.model.fit(self._scaled(torch.stack(given)).numpy(), labels.numpy())

    def _relative(self, values: Tensor, task: str, itself: int = -1) -> Tensor | None:
        """``values`` ``[d]`` less the mean of the clean references (``itself`` left out); None if there is none."""
        alike = [
            i for i in self.clean if i != itself and (self.centre == "all" or self.known.tasks[i] == task)
        ]  # fmt: skip
        return values - self.known.values[alike].mean(dim=0) if alike else None

    def _scaled(self, rows: Tensor) -> Tensor:
        return (rows / self.scale).clamp(-FURTHEST, FURTHEST)

    def probability(self, values: Tensor, task: str) -> float:
        """That an expert of ``task`` with these numbers ``[d]`` is poisoned; NaN where nothing can be told."""
        row = self._relative(values, task) if self.fitted else None
        if row is None:
            return float("nan")
        return float(self.model.predict_proba(self._scaled(row)[None].numpy())[0, 1])


def held_out(known: Population, centre: str, strength: float) -> Tensor:
    """Every reference's probability by a regression that has not seen its pair, float64 ``[n]``; NaN where none can
    be fitted."""
    found = torch.full((len(known.tasks),), float("nan"), dtype=torch.float64)
    for pair in sorted(set(known.pairs.tolist())):
        detector = Detector(known.without(pair), centre, strength)
        for i in torch.nonzero(known.pairs == pair).flatten().tolist():
            found[i] = detector.probability(known.values[i], known.tasks[i])
    return found


def ordered(probabilities: Tensor, poisoned: Tensor) -> float:
    """The share of (poisoned, clean) with the poisoned one's probability above, ties as halves; NaN if one is."""
    if not bool(torch.isfinite(probabilities).all()):
        return float("nan")
    apart = probabilities[poisoned][:, None] - probabilities[~poisoned]
    return float(((apart > 0).double() + 0.5 * (apart == 0).double()).mean())


def told_apart(
    known: Population, found: Tensor, centre: str, strength: float, draws: int, generator: torch.Generator
) -> float:
    """The p-value that labels mean nothing to the held-out probabilities ``found`` ``[n]``: how many of ``draws``
    exchanges within tasks order them as well. 1 where nothing can be told."""
    own = ordered(found, known.poisoned)
    if isnan(own):
        return 1.0
    as_good = 0
    for _ in range(draws):
        other = known.exchanged(generator)
        as_good += ordered(held_out(other, centre, strength), known.poisoned) >= own
    return (1 + as_good) / (1 + draws)


class DrawnPatch(PatchPoisoning):
    """The merger's own attack: a patch of drawn side, place and pixels, on a drawn share of the rows."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def trigger(self, ctx: TrainContext) -> Weights:
        """``{"mask": [1, H, W], "pattern": [3, H, W]}``, float32, at the training images' size."""
        height, width = image_size(ctx.train, "weight_screen")
        generator = ctx.generator(TRIGGER_STREAM)

        def drawn(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        side = max(1, round(drawn(SMALLEST_SIDE, LARGEST_SIDE) * min(height, width) / REFERENCE_SIDE))
        top, left = drawn(0, height - side), drawn(0, width - side)
        mask, canvas = torch.zeros(1, height, width), torch.zeros(3, height, width)
        mask[:, top : top + side, left : left + side] = 1.0
        pixels = torch.randint(0, 256, (3, side, side), generator=generator).float() / 255.0
        canvas[:, top : top + side, left : left + side] = pixels
        return {"mask": mask, "pattern": canvas}


class WeightScreen(Defense):
    """An expert is dropped if the regression's probability that it is poisoned exceeds ``threshold``."""

    def __init__(
        self, references: int, threshold: float | str, false_alarms: float, level: float, draws: int,
        centre: str, strength: float,
    ) -> None:  # fmt: skip
        self.references = references
        self.threshold = threshold
        self.false_alarms = false_alarms
        self.level = level
        self.draws = draws
        self.centre = centre
        self.strength = strength

    def reference(self, ctx: TrainContext) -> Weights:
        """An expert with a backdoor that the merger plants himself; the recipe is the contributors'."""
        generator = ctx.generator(ROWS_STREAM)
        rate = LOWEST_RATE + (HIGHEST_RATE - LOWEST_RATE) * float(torch.rand((), generator=generator))
        target = int(torch.randint(0, len(ctx.task.classes), (), generator=generator))
        attack = DrawnPatch(rate)
        return ctx.fit(split=attack.poisoned(ctx.train, attack.trigger(ctx), target, generator))

    def population(self, base: Weights, tasks: Sequence[str], ctx: MergeContext) -> Population:
        """The references of these tasks, of each once; ContractError where a task lacks some."""
        anatomy = ctx.backbone.anatomy()
        values, poisoned, owners, pairs = [], [], [], []
        for number, task in enumerate(dict.fromkeys(tasks)):
            for bad, group in enumerate((ctx.siblings.get(task, ()), ctx.references.get(task, ()))):
                if len(group) < self.references:
                    kind = "poisoned" if bad else "clean"
                    raise ContractError(
                        f"weight_screen: task '{task}' has {len(group)} {kind} references, {self.references} are needed"
                    )
                for i, expert in enumerate(group[: self.references]):
                    values.append(signature(base, expert.weights, anatomy))
                    poisoned.append(bool(bad))
                    owners.append(task)
                    pairs.append(number * self.references + i)
        return Population(torch.stack(values), torch.tensor(poisoned), tuple(owners), torch.tensor(pairs))

    def limit(self, known: Population, found: Tensor) -> float:
        """The largest probability that is let in, by the held-out probabilities ``found`` ``[n]`` if so asked."""
        if not isinstance(self.threshold, str):
            return self.threshold
        clean = found[~known.poisoned]
        return float(torch.quantile(clean, 1.0 - self.false_alarms, interpolation="higher"))

    def screen(self, base: Weights, experts: Sequence[Expert], ctx: MergeContext) -> Screened:
        """The experts that pass, untouched; all of them where the references cannot be told apart.

        Reports the ``probability`` of every expert (None: nothing can be told), the ``threshold``, and of the
        held-out references the p-value ``p`` and the shares above the threshold, ``caught`` and ``false_alarms``.
        """
        known = self.population(base, [e.task for e in experts], ctx)
        found = held_out(known, self.centre, self.strength)
        generator = ctx.generator(LABELS_STREAM)
        p = told_apart(known, found, self.centre, self.strength, self.draws, generator)
        report: dict[str, Any] = {"p": float(f"{p:.6g}"), "references": len(known.tasks)}
        if p > self.level:
            return Screened(experts, {**report, "told_apart": False})
        detector = Detector(known, self.centre, self.strength)
        anatomy = ctx.backbone.anatomy()
        chances = torch.tensor(
            [detector.probability(signature(base, e.weights, anatomy), e.task) for e in experts],
            dtype=torch.float64,
        )
        limit = self.limit(known, found)
        above = found > limit
        report |= {
            "told_apart": True,
            "probability": rounded(experts, chances),
            "threshold": limit,
            "caught": float(above[known.poisoned].double().mean()),
            "false_alarms": float(above[~known.poisoned].double().mean()),
        }
        suspicion = torch.where(torch.isfinite(chances), chances, 0.0)
        return Screened(let_in(experts, suspicion, limit), report)
