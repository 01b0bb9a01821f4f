"""Short names for the labels of methods, and what they stand for: columns and axes hold no lists of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

MOST = 28
"""Letters from which on a short name is a number instead of parameters."""


def shortened(labels: Iterable[str], most: int = MOST) -> dict[str, str]:
    """Label → short name, no two alike: the method's name with the fewest parameters that tell it from the others of
    that name, or with a number where those are longer than ``most``."""
    named: dict[str, list[str]] = {}
    for label in dict.fromkeys(labels):
        named.setdefault(label.partition("(")[0], []).append(label)
    return {label: short for name, mine in named.items() for label, short in _told_apart(name, mine, most)}


def label_key(short: Mapping[str, str]) -> list[str]:
    """``short = label`` for each label that was shortened."""
    return [f"{brief} = {label}" for label, brief in short.items() if brief != label]


def _told_apart(name: str, labels: Sequence[str], most: int) -> list[tuple[str, str]]:
    given = {
        label: _parameters(label) for label in sorted(labels)
    }  # the same names in whatever order they come
    keys = _deciding(list(given.values()))
    found = []
    for number, (label, parameters) in enumerate(given.items(), 1):
        alone = len(keys) == 1 and parameters.get(keys[0]) not in ("True", "False")
        told = ", ".join(v if alone else f"{k}={v}" for k, v in parameters.items() if k in keys)
        text = f"{name}({told})" if told else name
        found.append((label, text if len(text) <= most or len(labels) == 1 else f"{name} #{number}"))
    return found


def _deciding(given: Sequence[Mapping[str, str]]) -> list[str]:
    """The parameters that are needed to tell all of them apart; any may be left out that is not."""
    keys = list(dict.fromkeys(key for parameters in given for key in parameters))
    for key in list(keys):
        rest = [k for k in keys if k != key]
        if len({tuple((k, p[k]) for k in rest if k in p) for p in given}) == len(given):
            keys = rest
    return keys


def _parameters(label: str) -> dict[str, str]:
    """The parameters that a label shows, as text; commas inside brackets part nothing."""
    inside = label.partition("(")[2].removesuffix(")")
    parts, depth = [""], 0
    for letter in inside:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    split = [part.strip().partition("=") for part in parts if part.strip()]
    return {key: value for key, _, value in split}
