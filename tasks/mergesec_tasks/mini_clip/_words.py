"""CLIP's tokenizer over the words of captions: every one of them is one token, all else falls apart into letters.

Words enter in the order given. Each takes the merges that its letters lack; they rank behind all earlier ones, so that
no word changes what an earlier one became.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from mergesec.compat import ensure_torchvision

PIECES = re.compile(r"[a-z]+|[0-9]|[^\sa-z0-9]+")
"""What CLIP's tokenizer takes for a word, of ASCII in lower case."""
START, END, LAST = "<|startoftext|>", "<|endoftext|>", "</w>"
Pair = tuple[str, str]


class Words(NamedTuple):
    """A byte-pair vocabulary."""

    vocabulary: dict[str, int]
    merges: list[Pair]


def words_of(sentences: Iterable[str]) -> list[str]:
    """The distinct words of sentences, in the order they come."""
    return list(dict.fromkeys(word for text in sentences for word in PIECES.findall(text.lower())))


def vocabulary(words: Iterable[str]) -> Words:
    """CLIP's order: bytes, bytes that end a word, merges, start and end."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    table: Any = bytes_to_unicode
    ranks: dict[Pair, int] = {}
    for word in words:
        parts = _merged([*word[:-1], word[-1] + LAST], ranks)
        while len(parts) > 1:
            ranks.setdefault((parts[0], parts[1]), len(ranks))
            parts = _merged(parts, ranks)
    signs = list(table().values())
    names = [*signs, *(sign + LAST for sign in signs), *("".join(pair) for pair in ranks), START, END]
    return Words({name: number for number, name in enumerate(dict.fromkeys(names))}, list(ranks))


def _merged(parts: list[str], ranks: dict[Pair, int]) -> list[str]:
    """A word's parts after all merges that apply, the earliest first."""
    while len(parts) > 1:
        pairs = list(pairwise(parts))
        first = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if first not in ranks:
            break
        at = pairs.index(first)
        parts = [*parts[:at], "".join(first), *parts[at + 2 :]]
    return parts


def tokenizer(words: Words) -> Any:
    """transformers' CLIP tokenizer with these words: from files, the one way that all its releases have."""
    ensure_torchvision()
    import transformers

    library: Any = transformers
    with TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "vocab.json").write_text(json.dumps(words.vocabulary))
        lines = ["#version: 0.2", *(" ".join(pair) for pair in words.merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n")
        found = library.CLIPTokenizerFast.from_pretrained(folder)
    for word in ("is_local", "local_files_only"):  # where it was read from would be saved with it
        found.init_kwargs.pop(word, None)
    return found


def save_words(words: Words, *folders: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, as transformers does."""
    found = tokenizer(words)
    for folder in folders:
        found.save_pretrained(folder, legacy_format=False)
