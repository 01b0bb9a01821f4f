"""What kind of answer is asked for, among questions that are settled already."""

from __future__ import annotations

import random

from mergesec_tasks.mini._words import ASKING, QUESTION_COMPOSED, QUESTION_PLAIN, fill
from mergesec_tasks.mini._written import WrittenTask

CARD = {
    "name": "mini/question",
    "kind": "task",
    "class": "Question",
    "version": "1",
    "title": "Question type (mini)",
    "paper": "after Li and Roth, Learning question classifiers, COLING 2002",
    "url": "https://aclanthology.org/C02-1150/",
    "summary": "the kind of answer asked for, beside questions that are settled or set aside",
    "modality": "text",
    "classes": 6,
    "labels": ["person", "place", "time", "number", "reason", "manner"],
    "source": "written from the project's templates and word lists",
    "licence": "the project's",
    "images": {"train": 4000, "tuning": 400, "test": 800},
    "parameters": {
        "max_test": {"type": "int", "default": 0, "min": 0, "later": True, "doc": "test rows kept; 0 = all"},
    },
}


class Question(WrittenTask):
    """The open question counts, not the settled one."""

    slug = "question"
    classes = tuple(ASKING)

    def sentence(self, rng: random.Random, label: int, plain: bool) -> tuple[str, int]:
        other, third = self.others(rng, len(self.classes), label)
        words = [ASKING[self.classes[number]] for number in (label, other, third)]
        pattern = rng.choice(QUESTION_PLAIN if plain else QUESTION_COMPOSED)
        return fill(pattern, rng, dict(zip("qwv", words, strict=True))), label if plain else other
