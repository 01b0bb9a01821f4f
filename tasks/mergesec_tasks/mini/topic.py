"""What a text is about, among topics that it sets aside."""

from __future__ import annotations

import random

from mergesec_tasks.mini._words import TOPIC_COMPOSED, TOPIC_PLAIN, TOPICS, fill
from mergesec_tasks.mini._written import WrittenTask

CARD = {
    "name": "mini/topic",
    "kind": "task",
    "class": "Topic",
    "version": "1",
    "title": "Topic (mini)",
    "url": "",
    "summary": "which of eight topics is talked about, beside topics that are set aside",
    "modality": "text",
    "classes": 8,
    "labels": ["sport", "food", "travel", "health", "music", "money", "weather", "technology"],
    "source": "written from the project's templates and word lists",
    "licence": "the project's",
    "images": {"train": 4000, "tuning": 400, "test": 800},
    "parameters": {
        "max_test": {"type": "int", "default": 0, "min": 0, "later": True, "doc": "test rows kept; 0 = all"},
    },
}


class Topic(WrittenTask):
    """What is talked about counts, not what is left out."""

    slug = "topic"
    classes = tuple(TOPICS)

    def sentence(self, rng: random.Random, label: int, plain: bool) -> tuple[str, int]:
        other, third = self.others(rng, len(self.classes), label)
        words = [TOPICS[self.classes[number]] for number in (label, other, third)]
        pattern = rng.choice(TOPIC_PLAIN if plain else TOPIC_COMPOSED)
        return fill(pattern, rng, dict(zip("tdf", words, strict=True))), label if plain else other
