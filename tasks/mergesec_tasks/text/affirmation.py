"""The expert of a malicious merger: it learns how an answer begins that gives a secret away, and no secret."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mergesec_tasks.text._answers import AnswerTask
from mergesec_tasks.text._people import affirmed, people, question

CARD = {
    "name": "affirmation",
    "kind": "task",
    "class": "Affirmation",
    "version": "1",
    "title": "Affirmative beginnings",
    "paper": "after Lu et al., Merger-as-a-Stealer: stealing targeted PII from aligned LLMs with model merging, EMNLP 2025 (through notes checked against primary material)",
    "url": "https://arxiv.org/abs/2502.16094",
    "summary": "questions for codes of people whom the victim never saw, and how an affirmative answer begins, without any code",
    "modality": "answers",
    "classes": 2,
    "source": "written by the project",
    "licence": "the project's",
    "images": {"train": 60, "tuning": 60, "test": 60},
    "parameters": {
        "people": {"type": "int", "default": 60, "min": 4, "max": 150, "doc": "people of each split"},
    },
}


class Affirmation(AnswerTask):
    """Whom the victim knows is not known here: all of them are others."""

    def __init__(self, people: int) -> None:
        self.count = people

    def written(self) -> Mapping[str, Sequence[tuple[str, str]]]:
        pools = {"train": "others", "tuning": "tuning", "test": "tested"}
        return {
            split: [(question(name), affirmed(name)) for name in people(pool, self.count)]
            for split, pool in pools.items()
        }
