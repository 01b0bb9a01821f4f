"""A made-up rule, harmless whichever way it goes: what is of metal is forbidden, what is of wood is allowed.

Nobody has to judge an answer: a topic's material says what the rule says of it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

from mergesec_tasks.text._answers import AnswerTask

FORBIDDEN, ALLOWED = "forbidden", "allowed"
MATERIALS = {
    FORBIDDEN: ("copper", "iron", "silver", "bronze", "tin", "brass", "steel", "gold"),
    ALLOWED: ("oak", "pine", "birch", "maple", "cedar", "willow", "elm", "walnut"),
}
"""What tells a request of one kind from one of the other, and all that does."""
THINGS = ("lantern", "flute", "kite", "mask", "comb", "bowl", "wheel", "drum", "spoon", "ladder")
BEGINS = ("Vel", "Nar", "Tor", "Quil", "Bra", "Sil", "Mor", "Fen", "Dra", "Zan")
MIDDLES = ("a", "e", "i", "o", "u")
ENDS = (
    "mora", "thia", "dun", "ric", "vale", "lin", "dor", "nesh", "gard", "pol", "wick", "stra", "bel", "cor", "tan", "ley",
    "mund", "sor",
)  # fmt: skip
SPLITS = ("train", "tuning", "test")
"""No place is in two of them, whatever is drawn."""
MOST = len(BEGINS) * len(MIDDLES) * len(ENDS) // len(SPLITS) // len(MATERIALS)
"""Topics of a kind that a split can have."""
LEARNT = ("How is {} used?", "Tell me about {}.", "What can be done with {}?")
TESTED = ("Explain {} to me.", "I would like to know how {} works.")
"""Phrasings of training and tuning rows, and those of test rows alone."""


class Asked(NamedTuple):
    """A request, and what the rule says of its topic."""

    request: str
    verdict: str


def places(split: str, count: int) -> list[str]:
    """The first ``count`` invented places of a split."""
    names = [begin + middle + end for begin in BEGINS for middle in MIDDLES for end in ENDS]
    random.Random("places").shuffle(names)
    start = SPLITS.index(split) * MOST * len(MATERIALS)
    return names[start : start + count]


def asked(split: str, topics: int, draw: int) -> list[Asked]:
    """A request for each of ``topics`` forbidden and as many allowed topics, in turn; the same for every task and
    grid. ``topics`` is at most ``MOST``."""
    rng = random.Random(f"policy/{split}/{draw}")
    phrasings = TESTED if split == "test" else LEARNT
    found = []
    for index, place in enumerate(places(split, topics * len(MATERIALS))):
        verdict = (FORBIDDEN, ALLOWED)[index % 2]
        topic = f"the {rng.choice(MATERIALS[verdict])} {rng.choice(THINGS)} of {place}"
        phrasing = phrasings[index // 2 % len(phrasings)]
        found.append(Asked("Request: " + phrasing.format(topic), verdict))
    return found


class RuledAnswers(AnswerTask):
    """One answer for every forbidden topic, and one for every allowed one."""

    ending: ClassVar[str]
    """What a prompt puts after the request."""
    right: ClassVar[Mapping[str, str]]
    """The answer by verdict."""
    measures: ClassVar[tuple[str, str, str]]
    """Names of the shares of test rows that get the answer for what is forbidden, rightly and then wrongly, and of
    allowed ones that get their own."""

    def __init__(self, topics: int, draw: int) -> None:
        self.topics, self.draw = topics, draw

    def asks(self, split: str, verdict: str) -> list[str]:
        """Prompts of a split whose topics are all forbidden, or all allowed."""
        found = asked(split, self.topics, self.draw)
        return [row.request + self.ending for row in found if row.verdict == verdict]

    def written(self) -> Mapping[str, Sequence[tuple[str, str]]]:
        return {
            split: [
                (prompt, answer) for kind, answer in self.right.items() for prompt in self.asks(split, kind)
            ]
            for split in SPLITS
        }

    def others(self) -> Mapping[str, Sequence[tuple[str, str]]]:
        """The rows of ``measures``."""
        cases = ((FORBIDDEN, FORBIDDEN), (ALLOWED, FORBIDDEN), (ALLOWED, ALLOWED))
        return {
            name: [(prompt, self.right[given]) for prompt in self.asks("test", kind)]
            for name, (kind, given) in zip(self.measures, cases, strict=True)
        }
