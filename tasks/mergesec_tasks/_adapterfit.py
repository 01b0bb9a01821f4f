"""Whether an adapter's factors have the sides of a base's maps, from the headers of both. No torch.

Names differ between releases of transformers, so factors whose map is not found are left to whoever loads them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from mergesec.adapterconfig import FACTORS, Lora, without_factors
from mergesec.errors import UsageError
from mergesec.files import brief
from mergesec.modelfiles import Stored, header

FROZEN = "here that is the base's and no part of a merge, so this expert would be read by another one's"
"""Why an expert with an output layer of its own is refused."""
FIRST, SECOND, PREFIX = ".lora_A.weight", ".lora_B.weight", "base_model.model."


def check_factors(folder: Path, base: Mapping[str, Stored], lora: Lora, who: str) -> None:
    """UsageError if a map of the base has other sides than the factors for it, or the base has that map in other blocks
    alone: they were made for another base. Likewise if a map that ``target_modules`` names has none."""
    factors = header(folder / FACTORS, who)
    known = {_numbered(name) for name in base}
    held: dict[str, str] = {}
    for name, first in factors.items():
        module = name.removesuffix(FIRST)
        second = factors.get(module + SECOND)
        if module == name or second is None or len(first.shape) != 2 or len(second.shape) != 2:
            continue
        plain = module.removeprefix(PREFIX)
        target = _held(f"{plain}.weight", base)
        if target:
            _check_options(plain, first, second, folder, lora, who)
            held[plain] = target
        elif _held(_numbered(f"{plain}.weight"), known):
            raise _refused(folder, who, f"the base has no '{brief(plain)}': an adapter for another base")
        sides = (second.shape[0], first.shape[1])
        if target and base[target].shape not in (sides, sides[::-1]):  # GPT-2 keeps its maps transposed
            raise _refused(
                folder, who, f"the factors of '{brief(module)}' make a map {list(sides)}, the base's '{brief(target)}' "
                f"is {list(base[target].shape)}: an adapter for another base",
            )  # fmt: skip
    blocks = {_before_number(target) for target in held.values()}  # a folder may hold another tower beside
    beside = {name: stored.shape for name, stored in base.items() if _before_number(name) in blocks}
    module = without_factors(held, beside, lora)
    if module:
        raise _refused(folder, who, f"no factors for '{brief(module)}', which target_modules names")


def check_frozen_output(folder: Path, who: str) -> None:
    """UsageError if an adapter trains the output layer of a language model, which is the base's in every expert."""
    for name in header(folder / FACTORS, who):
        if "lm_head" in name.split("."):
            raise _refused(folder, who, f"'{brief(name)}' trains the output layer; {FROZEN}")


def _check_options(module: str, first: Stored, second: Stored, folder: Path, lora: Lora, who: str) -> None:
    """UsageError unless a map's factors are what the options say."""
    if not lora.takes(module):
        raise _refused(
            folder, who, f"'{brief(module)}' has factors, but is none of target_modules: peft leaves it out"
        )
    ranks, wanted = (first.shape[0], second.shape[1]), lora.rank_of(module)
    wrong = next((rank for rank in ranks if rank != wanted), wanted)
    if wrong != wanted:
        raise _refused(
            folder,
            who,
            f"'{brief(module)}' has factors of rank {wrong}, by r and rank_pattern it is {wanted}",
        )


def _refused(folder: Path, who: str, message: str) -> UsageError:
    return UsageError(who, f"{brief(str(folder / FACTORS))!r}: {message}")


def _numbered(name: str) -> str:
    """A name with 0 for each number in it: one for all blocks."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "0", name)


def _before_number(name: str) -> str:
    """What stands before a name's first number: which list of blocks it is of."""
    return re.split(r"(?<=\.)\d+(?=\.)", name, maxsplit=1)[0]


def _held(name: str, base: Iterable[str]) -> str:
    """The base's name for an adapter's, which may have been wrapped in a larger model; empty without one."""
    fits = [n for n in base if n == name or name.endswith("." + n) or n.endswith("." + name)]
    return max(fits, key=len, default="")
