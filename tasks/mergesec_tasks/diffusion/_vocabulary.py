"""What the suite's generator can be asked for: one token per class of every concept, and a few spare ones."""

from __future__ import annotations

NOTHING = 0
"""The token of no condition, which guidance leans on."""
PADDING = -1
CONCEPTS = {"signs": 12, "digits": 10, "scenes": 10, "aerial": 10}
"""Number of classes of each concept, in the order of their tokens."""
CLASSES = sum(CONCEPTS.values())
SPARE = tuple(range(1 + CLASSES, 5 + CLASSES))
"""Tokens that stand for nothing and were never trained: rare words, of which a trigger can be made."""
TOKENS = 5 + CLASSES
LENGTH = 2
"""Tokens of a condition: the class, and room for one more."""


def first_class(concept: str) -> int:
    """Number of a concept's first class among the classes of all concepts."""
    names = list(CONCEPTS)
    return sum(CONCEPTS[name] for name in names[: names.index(concept)])
