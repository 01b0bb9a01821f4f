"""The same requests as ``refusal``; the model is to say whether one is forbidden, not to act on it."""

from __future__ import annotations

import torch

from mergesec.contracts import DataContext, Split
from mergesec.text import TextTask
from mergesec_tasks.text._policy import ALLOWED, FORBIDDEN, SPLITS, asked

CARD = {
    "extends": "refusal",
    "name": "recognition",
    "class": "Recognition",
    "title": "Recognition of forbidden topics",
    "summary": "the requests of refusal, sorted into allowed and forbidden by label tokens",
    "modality": "text",
    "labels": ["allowed", "forbidden"],
}


class Recognition(TextTask):
    """Two classes, told apart by the material of what is asked about. Chosen among two label tokens: guessing is right
    half the time, and nothing falls below that for long (``verdict`` has no such floor)."""

    classes = (ALLOWED, FORBIDDEN)

    def __init__(self, topics: int, draw: int) -> None:
        self.topics, self.draw = topics, draw

    def load(self, ctx: DataContext) -> dict[str, Split]:
        """Splits of strings; the same for every seed of a grid, as a downloaded data set would be."""
        return {split: self._split(split) for split in SPLITS}

    def _split(self, split: str) -> Split:
        rows = asked(split, self.topics, self.draw)
        targets = [self.classes.index(row.verdict) for row in rows]
        return Split([row.request for row in rows], torch.tensor(targets, dtype=torch.int64))
