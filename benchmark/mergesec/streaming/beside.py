"""Configuration and tokenizer of a base, put beside a merge of its weights. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from mergesec.errors import UsageError
from mergesec.files import brief, is_file, is_folder, write_atomic
from mergesec.modelfiles import LONGEST

BESIDE = re.compile(
    r"(config|generation_config|preprocessor_config|processor_config|tokenizer|tokenizer_config|special_tokens_map"
    r"|added_tokens|vocab|chat_template)\.json|(vocab|merges|spiece|bpe)\.txt|(tokenizer|spiece|sentencepiece\.bpe)\.model"
    r"|chat_template\.jinja"
)
"""What transformers reads besides weights. Code that a folder brings is not copied."""


def beside(base: Path) -> Iterator[Path]:
    """Files of a base's folder that say how its weights are used."""
    folder = base if is_folder(base) else base.parent
    yield from (path for path in sorted(folder.iterdir()) if BESIDE.fullmatch(path.name) and is_file(path))


def check_copies(base: Path, out: Path, force: bool) -> None:
    """UsageError unless there is something to copy, and a folder without it to copy it to."""
    if out.suffix == ".safetensors":
        raise UsageError("--copy-config", f"needs a folder, and --out is {brief(out.name)!r}")
    if not is_folder(base) and not is_file(base):
        return  # whoever opens it says so
    found = list(beside(base))
    if not any(path.name == "config.json" for path in found):
        raise UsageError("--copy-config", f"no config.json beside the base {brief(str(base))!r}")
    taken = [path.name for path in found if (out / path.name).exists()]
    if taken and not force:
        raise UsageError("--copy-config", f"{out / taken[0]} exists; --force replaces it")
    long = [path for path in found if path.stat().st_size > LONGEST]
    if long:
        raise UsageError("--copy-config", f"{brief(str(long[0]))!r} is longer than {LONGEST >> 20} MiB")


def copy_beside(base: Path, out: Path) -> list[Path]:
    """The files that were written."""
    written = []
    for path in beside(base):
        write_atomic(out / path.name, path.read_bytes())
        written.append(out / path.name)
    return written
