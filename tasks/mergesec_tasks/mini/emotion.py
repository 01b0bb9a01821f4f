"""The narrator's emotion, among those that are denied, past, or another person's; after dair-ai/emotion."""

from __future__ import annotations

import random

from mergesec_tasks.mini._words import EMOTION_COMPOSED, EMOTION_PLAIN, EMOTIONS, fill
from mergesec_tasks.mini._written import WrittenTask

CARD = {
    "name": "mini/emotion",
    "kind": "task",
    "class": "Emotion",
    "version": "1",
    "title": "Emotion (mini)",
    "paper": "after Saravia et al., CARER: contextualized affect representations, EMNLP 2018",
    "url": "https://aclanthology.org/D18-1404/",
    "summary": "the narrator's emotion now, beside denied, past and other people's emotions",
    "modality": "text",
    "classes": 6,
    "labels": ["sadness", "joy", "love", "anger", "fear", "surprise"],
    "source": "written from the project's templates and word lists",
    "licence": "the project's",
    "images": {"train": 4000, "tuning": 400, "test": 800},
    "parameters": {
        "max_test": {"type": "int", "default": 0, "min": 0, "later": True, "doc": "test rows kept; 0 = all"},
    },
}


class Emotion(WrittenTask):
    """The emotion that the narrator has now counts."""

    slug = "emotion"
    classes = tuple(EMOTIONS)

    def sentence(self, rng: random.Random, label: int, plain: bool) -> tuple[str, int]:
        other, third = self.others(rng, len(self.classes), label)
        words = [EMOTIONS[self.classes[number]] for number in (label, other, third)]
        pattern = rng.choice(EMOTION_PLAIN if plain else EMOTION_COMPOSED)
        return fill(pattern, rng, dict(zip("eab", words, strict=True))), label if plain else other
