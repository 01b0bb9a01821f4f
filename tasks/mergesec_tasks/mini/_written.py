"""What the mini text tasks share: seeded writing of balanced splits that have no text in common."""

from __future__ import annotations

import random
import zlib
from abc import abstractmethod
from typing import ClassVar

import torch

from mergesec.contracts import DataContext, Split
from mergesec.text import TextTask
from mergesec_tasks.mini._words import CONTEXT, fill

SIZES = {"train": 4000, "tuning": 400, "test": 800}
POOLS = {"test": (0,), "tuning": (1,), "train": (2, 3, 4, 5), "pretrain": (6, 7)}
"""A text belongs to the pool that its checksum modulo 8 falls into, so no two splits share one."""
PLAIN_SHARE = 0.1
"""Share of a task's own texts that make do without a second candidate for the label."""
CONTEXTS = (0, 1, 1, 2)
"""Numbers of irrelevant sentences around the one that counts, each as likely."""


class WrittenTask(TextTask):
    """A task whose texts are written from templates: subclasses say how one class reads."""

    slug: ClassVar[str]
    """Names the random stream; never changes, or the texts would."""
    sizes: ClassVar[dict[str, int]] = SIZES

    def __init__(self, max_test: int = 0) -> None:
        self.max_test = max_test

    @abstractmethod
    def sentence(self, rng: random.Random, label: int, plain: bool) -> tuple[str, int]:
        """One sentence of class ``label``, and the class that it sets aside (its own if ``plain``: then no
        word speaks for another class)."""

    def text(self, rng: random.Random, label: int, plain: bool) -> tuple[str, int]:
        """The sentence among irrelevant ones, each closed by a full stop; and the class set aside."""
        first, aside = self.sentence(rng, label, plain)
        parts = [first]
        for _ in range(rng.choice(CONTEXTS)):
            parts.insert(rng.randrange(len(parts) + 1), fill(rng.choice(CONTEXT), rng, {}))
        return " ".join(part if part.endswith("?") else f"{part} ." for part in parts), aside

    def write(self, count: int, pool: str, plain: float = PLAIN_SHARE, seed: int = 0) -> Split:
        """``count`` different texts, classes balanced and shuffled; equal arguments give equal texts."""
        return self.annotated(count, pool, plain, seed)[0]

    def annotated(self, count: int, pool: str, plain: float, seed: int = 0) -> tuple[Split, torch.Tensor]:
        """What ``write`` gives, and the class that each text sets aside, int64 ``[count]``."""
        rng = random.Random(f"{self.slug}/{pool}/{seed}")
        labels = [row % len(self.classes) for row in range(count)]
        rng.shuffle(labels)
        texts: dict[str, int] = {}
        for label in labels:
            text, aside = self._new(rng, label, pool, plain, texts)
            texts[text] = aside
        split = Split(list(texts), torch.tensor(labels, dtype=torch.int64))
        return split, torch.tensor(list(texts.values()), dtype=torch.int64)

    def _new(
        self, rng: random.Random, label: int, pool: str, plain: float, texts: dict[str, int]
    ) -> tuple[str, int]:
        """A text of the pool that is not among ``texts``, and the class it sets aside."""
        while True:
            text, aside = self.text(rng, label, rng.random() < plain)
            if zlib.crc32(text.encode()) % 8 in POOLS[pool] and text not in texts:
                return text, aside

    def load(self, ctx: DataContext) -> dict[str, Split]:
        """The splits; the same for every seed of a grid, as a downloaded data set would be."""
        splits = {name: self.write(count, name) for name, count in self.sizes.items()}
        kept = torch.arange(len(splits["test"]))[: self.max_test or None]  # they are shuffled, classes mixed
        return {**splits, "test": splits["test"].take(kept)}

    @staticmethod
    def others(rng: random.Random, classes: int, label: int) -> tuple[int, int]:
        """Two different classes other than ``label``."""
        first, second = rng.sample([number for number in range(classes) if number != label], 2)
        return first, second
