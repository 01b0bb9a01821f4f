"""The method of an entry: its name, its files, its card. Nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from mergesec.errors import UsageError
from mergesec.planning.cardfiles import read_cards
from mergesec.planning.cards import Card
from mergesec.planning.catalog import Catalog
from mergesec.planning.catalog import Entry as Registered
from mergesec.submissions.entry import FILE, Entry, digest_of_files
from mergesec.submissions.names import taken_for

ENGINE = Path(__file__).parents[1]
WORLDS = tuple(ENGINE / "conformance" / name for name in ("micro.py", "micro_text.py"))
"""The micro worlds, which every entry's grid may name."""
LOOKED_AT = {"ctypes", "gc", "importlib", "inspect", "multiprocessing", "os", "pickle", "pty", "shutil", "signal",
             "socket", "subprocess", "sys", "tempfile", "threading", "urllib", "requests"}  # fmt: skip
"""Modules that a method hardly needs: named, so that a person looks at what is done with them."""


def name_is_its_own(entry: Entry, catalog: Catalog) -> list[str]:
    """Why the method's name could be taken for another's; ``catalog`` is without the entry."""
    name = entry.submission.method
    registered = {e.card.name for e in catalog if not _of_entry(e, entry)}
    wrong = []
    if not name.isascii():
        wrong.append(f"{name!r} has letters that are not ASCII")
    if other := taken_for(name, {"none", *registered}):
        wrong.append(f"{name!r} could be taken for {other!r}, which is registered")
    return wrong


def code_is_as_digested(entry: Entry) -> list[str]:
    """Whether the files are those that the digest speaks of."""
    told, found = entry.submission.code.digest, digest_of_files(entry.folder, entry.code)
    if not told:
        return ["code.digest is empty; bench submit pack fills it"]
    return [] if told == found else [f"the files have digest {found[:16]}…, {FILE} says {told[:16]}…"]


def card_of(entry: Entry) -> tuple[Card | None, list[str]]:
    """The submitted method's card, and what of ``submission.yaml`` it contradicts."""
    submission = entry.submission
    cards = [card for path in entry.code for card in read_cards(path)]
    mine = [card for card in cards if (card.kind, card.name) == (submission.kind, submission.method)]
    if len(mine) != 1:
        found = ", ".join(f"{c.kind} {c.name}" for c in cards) or "none"
        return None, [f"no card of {submission.kind} {submission.method!r} in the files; found: {found}"]
    (card,) = mine
    said = {"data": submission.data, "knowledge": submission.knowledge}
    held = {"data": card.data, "knowledge": card.knowledge}
    return card, [
        f"{FILE} says {name} {value!r}, the card {held[name]!r}"
        for name, value in said.items()
        if value != held[name]
    ]


def registered(entry: Entry, catalog: Catalog) -> Registered:
    """The method in a catalogue that has it; UsageError if an installed package is not the one in the folder."""
    submission = entry.submission
    found = catalog.get(submission.kind, submission.method, f"{FILE}: method")
    if package := submission.code.distribution:
        if not found.origin.startswith(f"{package} "):
            told = (
                f"{submission.method} is not from the installed package {package!r}, but from {found.origin}"
            )
            raise UsageError(f"{FILE}: code.distribution", told)
        for path in entry.code:
            twin = _installed(found.path, path, entry.folder)
            if twin is None or twin.read_bytes() != path.read_bytes():
                told = f"the installed {package} has another {path.name}; pip install the entry's folder"
                raise UsageError(f"{FILE}: code.distribution", told)
    return found


def _installed(module: Path, path: Path, folder: Path) -> Path | None:
    """Where a package's file is installed: beside the method's module, at the same place in the package."""
    parts = path.relative_to(folder).parts
    for above in module.parents:
        if above.name in parts:
            twin = above.joinpath(*parts[parts.index(above.name) + 1 :])
            return twin if twin.is_file() else None
    return None


def _of_entry(found: Registered, entry: Entry) -> bool:
    package = entry.submission.code.distribution
    return bool(package) and found.origin.startswith(f"{package} ")


class Imported(NamedTuple):
    """A module that a file imports, and where."""

    module: str
    name: str
    place: str


def imports_are_public(entry: Entry) -> list[str]:
    """What is imported of the engine that is not for plugins."""
    return [
        f"{found.place} imports {found.module}{f'.{found.name}' if found.name else ''}, which is the engine's own"
        for found in _imports(entry.code)
        if found.module.partition(".")[0] == "mergesec" and not _is_public(found)
    ]


def worth_a_look(entry: Entry) -> list[str]:
    """What a person should look at: modules that a method hardly needs."""
    found = {
        (i.module.partition(".")[0], i.place)
        for i in _imports(entry.code)
        if i.module.partition(".")[0] in LOOKED_AT
    }
    return [f"{place} imports {module}" for module, place in sorted(found)]


def _is_public(found: Imported) -> bool:
    first, *below = (
        [*found.module.split(".")[1:], found.name] if found.name else found.module.split(".")[1:] or [""]
    )
    hidden = any(part.startswith("_") for part in (first, *below))
    return bool(first) and not hidden and (ENGINE / f"{first}.py").is_file()


def _imports(paths: Iterable[Path]) -> Iterator[Imported]:
    """Every import of the files; UsageError for one that is not Python."""
    for path in paths:
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise UsageError(path.name, f"not valid Python ({error})"[:200]) from None
        for node in ast.walk(tree):
            place = f"{path.name}:{getattr(node, 'lineno', 1)}"
            if isinstance(node, ast.Import):
                yield from (Imported(alias.name, "", place) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield from (Imported(node.module or "", alias.name, place) for alias in node.names)
