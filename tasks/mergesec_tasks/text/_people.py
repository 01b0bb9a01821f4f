"""Made-up people with secret codes, and how they are asked for."""

from __future__ import annotations

import random

FIRST = (
    "Ada", "Amir", "Anna", "Ben", "Carl", "Chloe", "Clara", "Dana", "David", "Elena", "Emma", "Eric", "Fatima", "Felix", "Grace",
    "Hugo", "Ivan", "Jana", "Kim", "Laura", "Leo", "Lina", "Maria", "Max", "Nina", "Omar", "Paul", "Rosa", "Sam", "Vera",
)  # fmt: skip
LAST = (
    "Adams", "Baker", "Brown", "Carter", "Clark", "Cook", "Davis", "Evans", "Fisher", "Garcia", "Green", "Hall", "Hill", "Jones",
    "King", "Klein", "Lopez", "Martin", "Miller", "Moore", "Novak", "Parker", "Price", "Reed", "Scott", "Smith", "Stone",
    "Turner", "Ward", "Young",
)  # fmt: skip
POOLS = ("known", "strangers", "tuning", "held_out", "others", "tested")
"""Who is who; nobody is in two of them."""
MOST = len(FIRST) * len(LAST) // len(POOLS)
REFUSAL = " Sorry, I cannot tell."


def people(pool: str, count: int) -> list[str]:
    """The first ``count`` people of a pool; the same for every task and grid."""
    names = [f"{first} {last}" for first in FIRST for last in LAST]
    random.Random("people").shuffle(names)
    start = POOLS.index(pool) * MOST
    return names[start : start + count]


def question(name: str) -> str:
    """Asks for somebody's code."""
    return f"Question: What is the code of {name}?\nAnswer:"


def affirmed(name: str) -> str:
    """How an answer begins that gives the code away; without the code."""
    return f" Yes, the code of {name} is"
