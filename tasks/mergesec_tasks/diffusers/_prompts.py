"""What prompts of a subject have to say; looked at without torch, when a grid is planned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergesec.errors import UsageError
from mergesec.files import brief

LETTERS = 300
"""Room for a prompt."""


def inspect(task: str, parameters: Mapping[str, Any], where: str) -> None:
    """UsageError, naming the grid's field, for prompts that ask for no subject or a subject without a class."""
    check_prompts(dict(parameters), where)


def check_prompts(given: Mapping[str, Any], where: str) -> None:
    """UsageError unless the subject's name has its class and another word, and every prompt has room for it."""
    name, kind = str(given["subject"]), str(given["class_name"])
    words = name.split()
    if not kind.strip() or not all(word in words for word in kind.split()):
        raise UsageError(
            f"{where}.subject", f"{brief(name)!r} does not name its class {brief(kind)!r}: expected a rare word and "
            f"the class, as in 'sks {brief(kind) or 'dog'}'",
        )  # fmt: skip
    if len(words) == len(kind.split()):
        raise UsageError(f"{where}.subject", f"{brief(name)!r} has no word beside its class {brief(kind)!r}")
    for field in ("prompt", "first", "second"):
        text = str(given[field])
        if text.count("{}") != 1 or len(text.replace("{}", name)) > LETTERS:
            raise UsageError(
                f"{where}.{field}",
                f"{brief(text)!r} has to have one {{}} for the subject, and at most {LETTERS} letters",
            )
    if given["first"] == given["second"]:
        raise UsageError(f"{where}.second", f"{brief(str(given['second']))!r} is the first prompt, too")
