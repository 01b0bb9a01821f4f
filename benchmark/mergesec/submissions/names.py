"""Names that could be taken for another method's."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

_ALIKE = {
    "0": "o", "1": "l", "i": "l", "|": "l", "5": "s", "2": "z", "8": "b",
    # letters of other scripts that look like Latin ones
    "а": "a", "в": "b", "с": "c", "е": "e", "һ": "h", "і": "l", "ј": "j", "к": "k", "м": "m", "о": "o", "р": "p",
    "ѕ": "s", "т": "t", "у": "y", "х": "x", "ӏ": "l", "α": "a", "ε": "e", "ι": "l", "κ": "k", "ν": "v", "ο": "o",
    "ρ": "p", "τ": "t", "υ": "u", "χ": "x", "ı": "l",
}  # fmt: skip
_PAIRS = (("rn", "m"), ("vv", "w"))


def skeleton(name: str) -> str:
    """What is left of a name at a glance: without case, accents, separators, and with one letter for those that look
    alike."""
    plain = unicodedata.normalize("NFKD", name.casefold())
    letters = "".join(_ALIKE.get(c, c) for c in plain if not unicodedata.combining(c))
    for pair, letter in _PAIRS:
        letters = letters.replace(pair, letter)
    return re.sub(r"[\W_]", "", letters)


def taken_for(name: str, known: Iterable[str]) -> str:
    """The known name that this one is, or could be taken for; empty if there is none."""
    mine = skeleton(name)
    return next((other for other in sorted(known) if skeleton(other) == mine), "")
