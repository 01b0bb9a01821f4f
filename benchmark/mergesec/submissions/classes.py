"""A card against its class: hooks that are there and told of, parameters that the class takes. Imports the class."""

from __future__ import annotations

import inspect
from typing import Any

from mergesec import contracts
from mergesec.planning.catalog import Entry
from mergesec.threats import HOOKS

_NEEDED = {
    "trigger": ("apply",), "poison": ("trigger", "apply"), "forge": ("trigger", "apply"), "verify": ("secret",),
}  # fmt: skip
"""What a hook needs beside itself, unless the card names another attack's trigger."""


def card_against_class(entry: Entry) -> list[str]:
    """What of the card its class contradicts."""
    cls, card = entry.load(), entry.card
    wrong = []
    if card.kind in ("attack", "defense"):
        base = getattr(contracts, card.kind.capitalize())
        needed = {m for h in card.hooks for m in (h, *_NEEDED.get(h, ()))}
        wrong += [
            f"hook {m}: {card.class_name} has no {m}()" for m in sorted(needed) if not _own(cls, base, m)
        ]
        every = {str(hook) for hooks in HOOKS.values() for hook in hooks}
        silent = [h for h in sorted(every - needed) if h in vars(cls)]  # what is inherited is not meant
        wrong += [f"{card.class_name} has {h}(), which the card's hooks do not name" for h in silent]
    return wrong + _parameters(cls, set(card.parameters))


def _own(cls: type[Any], base: type[Any], name: str) -> bool:
    return getattr(cls, name, None) is not getattr(base, name, None)


def _parameters(cls: type[Any], told: set[str]) -> list[str]:
    """Parameters of the card that the class does not take, and those it needs that the card does not tell of."""
    if cls.__init__ is object.__init__:
        return [f"the class takes no parameter {name!r}" for name in sorted(told)]
    signature = inspect.signature(cls).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in signature):
        return []
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    taken = {p.name: p.default is p.empty for p in signature if p.kind in kinds}
    return [f"the class takes no parameter {name!r}" for name in sorted(told - taken.keys())] + [
        f"the class needs {name!r}, which the card does not tell of"
        for name, needed in sorted(taken.items())
        if needed and name not in told
    ]
