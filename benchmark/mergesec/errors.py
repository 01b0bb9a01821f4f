"""Errors a user can mend. The command line prints them as one message and exits with 2."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

SHOWN = 100
"""Choices that a message lists: more than there are merge methods."""


class UsageError(ValueError):
    """Bad input: names the field, the value, and what would have been valid."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field, self.message = field, message


def nearest(value: Any, choices: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for the closest choice, else the list of choices, as a message tail."""
    import difflib  # most runs never get here

    options = sorted(map(str, choices))
    close = difflib.get_close_matches(str(value), options, n=1, cutoff=0.5)
    if not close:  # "mnist" should still find "mini/mnist"
        close = [o for o in options if str(value).lower() in o.lower()][:1]
    if close:
        return f"; did you mean {close[0]!r}?"
    shown = ", ".join(options[:SHOWN]) + (
        f", and {len(options) - SHOWN} more" if len(options) > SHOWN else ""
    )
    return f"; valid: {shown or 'none'}"
