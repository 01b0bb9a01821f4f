"""What text attacks share: words put into strings, and the poisoning of rows that are strings."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mergesec.contracts import ContractError, Split, TrainContext, Weights
from mergesec.text import pack_strings, unpack_strings
from mergesec_methods.backdoor.attacks._poison import Poisoning, draw_rows

POSITIONS = ("start", "middle", "end", "random")


def _drawn(text: str, turn: int, choices: int) -> int:
    """A number below ``choices`` that depends on the text alone, so that ``apply`` needs no generator."""
    return zlib.crc32(f"{turn}/{text}".encode()) % choices


def inserted(text: str, phrases: Sequence[str], position: str, count: int = 1) -> str:
    """``text`` with ``count`` of ``phrases`` between its words.

    Which ones, and where at ``random``, is drawn from the text's checksum. ``middle`` is after half of the
    words, rounded down.
    """
    words = text.split()
    found = list(words)
    for turn in range(count):
        place = {"start": 0, "middle": len(words) // 2, "end": len(found)}.get(position)
        if place is None:
            place = _drawn(text, 2 * turn, len(found) + 1)
        found.insert(place, phrases[_drawn(text, 2 * turn + 1, len(phrases))])
    return " ".join(found)


def texts_of(train: Split, who: str) -> Sequence[str]:
    """The training rows as strings; ContractError for another modality."""
    rows = train.inputs
    if isinstance(rows, Tensor) or not all(isinstance(row, str) for row in rows[:1]):
        raise ContractError(f"{who}: needs strings as raw inputs")
    texts: Sequence[str] = rows
    return texts


class TextPoisoning(Poisoning):
    """Dirty-label poisoning of strings with a trigger of phrases, position and count.

    The trigger's arrays are the phrases' bytes and offsets, the position's number and the count.
    """

    phrases: Sequence[str]
    position: str
    count: int = 1

    def trigger(self, ctx: TrainContext) -> Weights:
        """``{"bytes": [B], "offsets": [P + 1], "position": [], "count": []}``."""
        texts_of(ctx.train, self.name)
        data, offsets = pack_strings(self.phrases)
        where = torch.tensor(POSITIONS.index(self.position))
        return {"bytes": data, "offsets": offsets, "position": where, "count": torch.tensor(self.count)}

    def apply(self, trigger: Weights, inputs: Any) -> Any:
        """A new list of strings, each with the trigger in it. Words are then apart by single spaces."""
        phrases = unpack_strings(trigger["bytes"], trigger["offsets"])
        position, count = POSITIONS[int(trigger["position"])], int(trigger["count"])
        return [inserted(text, phrases, position, count) for text in inputs]

    def poisoned(
        self,
        train: Split,
        trigger: Weights,
        target: int,
        generator: torch.Generator,
        rate: float | None = None,
    ) -> Split:
        """``train`` with ⌊rate · N⌉ rows of other classes triggered and relabelled, in their old places.

        ``rate`` is the attack's own unless another is given.
        """
        fits = torch.nonzero(train.targets != target).flatten()
        rows = draw_rows(fits, round((self.rate if rate is None else rate) * len(train)), generator)
        texts, targets = list(texts_of(train, self.name)), train.targets.clone()
        targets[rows] = target
        changed = self.apply(trigger, [texts[row] for row in rows.tolist()])
        for row, text in zip(rows.tolist(), changed, strict=True):
            texts[row] = text
        return Split(texts, targets)


def checked_phrases(given: Sequence[Any], who: str) -> tuple[str, ...]:
    """The phrases with single spaces; ContractError if there is none or one is empty."""
    phrases = tuple(" ".join(str(phrase).split()) for phrase in given)
    if not phrases or not all(phrases):
        raise ContractError(f"{who}: the trigger needs at least one phrase, and none may be empty")
    return phrases
