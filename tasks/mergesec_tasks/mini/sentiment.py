"""A reviewer's own verdict, among negated words and the verdicts of others."""

from __future__ import annotations

import random

from mergesec_tasks.mini._words import (
    BAD,
    GOOD,
    MIDDLING,
    UNDECIDED_COMPOSED,
    UNDECIDED_PLAIN,
    VERDICT_COMPOSED,
    VERDICT_PLAIN,
    fill,
)
from mergesec_tasks.mini._written import WrittenTask

CARD = {
    "name": "mini/sentiment",
    "kind": "task",
    "class": "Sentiment",
    "version": "1",
    "title": "Sentiment (mini)",
    "url": "",
    "summary": "the reviewer's verdict (negative, neutral, positive) beside negations and others' verdicts",
    "modality": "text",
    "classes": 3,
    "labels": ["negative", "neutral", "positive"],
    "source": "written from the project's templates and word lists",
    "licence": "the project's",
    "images": {"train": 4000, "tuning": 400, "test": 800},
    "parameters": {
        "max_test": {"type": "int", "default": 0, "min": 0, "later": True, "doc": "test rows kept; 0 = all"},
    },
}


class Sentiment(WrittenTask):
    """What the narrator thinks of the whole thing counts."""

    slug = "sentiment"
    classes = ("negative", "neutral", "positive")

    def sentence(self, rng: random.Random, label: int, plain: bool) -> tuple[str, int]:
        if label == 1:
            aside = rng.choice((0, 2))
            pattern = rng.choice(UNDECIDED_PLAIN if plain else UNDECIDED_COMPOSED)
        else:
            aside = 2 - label
            pattern = rng.choice(VERDICT_PLAIN if plain else VERDICT_COMPOSED)
        polar = {0: BAD, 2: GOOD}
        first = polar[aside if label == 1 else label]
        words = {"g": first, "o": polar[2] if first is BAD else polar[0], "m": MIDDLING}
        return fill(pattern, rng, words), label if plain else aside
