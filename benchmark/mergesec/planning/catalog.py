"""Names → lazy cards → classes. Registration is strict: a clash is an error, never an override."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.machinery import SourceFileLoader
from importlib.metadata import Distribution, EntryPoint, entry_points
from pathlib import Path
from types import CodeType
from typing import Any

from mergesec.errors import UsageError, nearest
from mergesec.files import is_file
from mergesec.planning.cardfiles import digest_of, file_digest, read_cards
from mergesec.planning.cards import KINDS, Card

GROUPS = {
    "mergesec.tasks": "task",
    "mergesec.backbones": "backbone",
    "mergesec.merging": "merging",
    "mergesec.attacks": "attack",
    "mergesec.defenses": "defense",
}
_BASES = {
    "task": "Task", "backbone": "Backbone", "merging": "MergeMethod", "attack": "Attack",
    "defense": "Defense",
}  # fmt: skip


_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Entry:
    """A registered component: its card and where its class is."""

    card: Card
    module: str
    path: Path
    origin: str
    """``distribution version`` or the plugin file's name."""
    digest: str = ""
    """Content digest of a ``--plugin`` file; part of the step keys, so an edited plugin runs anew."""

    @property
    def foreign(self) -> bool:
        """Whether its code is somebody else's, not a part of this package or its distribution."""
        return bool(self.digest) and not self.path.is_relative_to(_PACKAGE)

    def load(self) -> type[Any]:
        """Import the class; UsageError if it is missing or not of its kind."""
        from mergesec import contracts

        module = _import(self.module, self.path)
        cls = getattr(module, self.card.class_name, None)
        base = getattr(contracts, _BASES[self.card.kind])
        if not isinstance(cls, type) or not issubclass(cls, base):
            raise UsageError(
                f"{self.card.kind} {self.card.name}",
                f"{self.module} has no class {self.card.class_name} derived from {base.__name__}",
            )
        return cls

    def create(self, parameters: Mapping[str, Any]) -> Any:
        """An instance with validated ``parameters``."""
        instance = self.load()(**parameters)
        instance.name = self.card.name
        return instance


class _AsPlanned(SourceFileLoader):
    """Loads a ``--plugin`` file as it was when the grid was planned, or not at all. Python's own cache of compiled
    code goes by size and second: an edit within that second would run as what it was before."""

    def get_code(self, fullname: str) -> CodeType:
        source = Path(self.path).read_bytes()
        if digest_of(source) != fullname.rpartition("_")[2]:
            raise UsageError(
                "--plugin", f"{Path(self.path).name} was changed meanwhile; run the command again"
            )
        code: CodeType = self.source_to_code(source, self.path)
        return code


def _import(name: str, path: Path) -> Any:
    if not name.startswith("mergesec_plugin_"):
        return importlib.import_module(name)
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path, loader=_AsPlanned(name, str(path)))
        if spec is None or spec.loader is None:
            raise UsageError("--plugin", f"{path.name} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


@dataclass
class Catalog:
    """Everything registered, by kind and name."""

    entries: dict[str, dict[str, Entry]] = field(default_factory=lambda: {k: {} for k in KINDS})
    absent: dict[tuple[str, str], str] = field(default_factory=dict)
    """(kind, name) of what an optional package is missing for → what to ``pip install``."""

    def add(self, entry: Entry) -> None:
        """Register; UsageError if the name is taken."""
        names = self.entries[entry.card.kind]
        taken = names.get(entry.card.name)
        if taken is not None:
            raise UsageError(
                f"{entry.card.kind} {entry.card.name}",
                f"registered twice, by {taken.origin} and by {entry.origin}; rename one",
            )
        if entry.card.name == "none":
            raise UsageError(f"{entry.card.kind} none", f"{entry.origin}: the name 'none' is reserved")
        names[entry.card.name] = entry

    def get(self, kind: str, name: str, where: str = "") -> Entry:
        """The entry; UsageError with the nearest name, or with what to install, if there is none."""
        try:
            return self.entries[kind][name]
        except KeyError:
            if (kind, name) in self.absent:
                raise UsageError(where or kind, _install(name, self.absent[kind, name])) from None
            known = self.entries[kind]
            raise UsageError(where or kind, f"unknown {kind} {name!r}{nearest(name, known)}") from None

    def __iter__(self) -> Iterator[Entry]:
        for kind in KINDS:
            yield from (self.entries[kind][n] for n in sorted(self.entries[kind]))


def _wanting(card: Card) -> str:
    """What to install before this component can run; empty if all is there. Imports nothing."""
    missing = {package for module, package in card.requires.items() if not importable(module)}
    return "' '".join(sorted(missing))


def importable(module: str) -> bool:
    """Whether a top-level module is installed."""
    if module in sys.modules:  # a lazy package may lack the __spec__ that find_spec asks for
        return sys.modules[module] is not None
    return importlib.util.find_spec(module) is not None


def _install(name: str, packages: str) -> str:
    return f"{name} needs a package that is not installed: pip install '{packages}'"


def _modules(value: str) -> list[tuple[str, Path]]:
    """(module name, file) of a module, or of every public module in a package; nothing is imported."""
    spec = importlib.util.find_spec(value)
    if spec is None or spec.origin is None:
        raise UsageError(f"entry point {value}", "no such module")
    found = [(value, Path(spec.origin))]
    for folder in spec.submodule_search_locations or ():
        found += [
            (f"{value}.{file.stem}", file)
            for file in sorted(Path(folder).glob("*.py"))
            if not file.stem.startswith("_")
        ]
    return found


def load_catalog(plugins: Iterable[str | Path] = ()) -> Catalog:
    """All installed components and those of the given plugin files.

    An installed plugin that is broken does not take the others down: it is reported on standard
    error and left out. A ``--plugin`` file that is broken is an error, since it was asked for.
    """
    catalog = Catalog()
    read = lru_cache(maxsize=None)(read_cards)  # a module may be named for several kinds
    seen: set[tuple[str, str]] = set()
    points = entry_points()  # one look through what is installed, not one a group
    for group, kind in GROUPS.items():
        for point in points.select(group=group):
            try:
                _add_point(catalog, point, kind, seen, read)
            except UsageError as error:
                if (point.dist.name if point.dist else "") == "mergesec" or "registered twice" in str(error):
                    raise
                print(f"warning: plugin left out: {error}", file=sys.stderr)
    for plugin in plugins:
        add_plugin(catalog, Path(plugin))
    return catalog


def _add_point(
    catalog: Catalog, point: EntryPoint, kind: str, seen: set[tuple[str, str]],
    read: Callable[[Path], Iterable[Card]],
) -> None:  # fmt: skip
    name, version = _name_and_version(point.dist) if point.dist else ("", "")
    origin = f"{name} {version}" if name else point.value
    external = name != "mergesec"
    for module, path in _modules(point.value):
        for card in read(path):
            if card.kind == kind and (module, card.name) not in seen:
                seen.add((module, card.name))
                if wanting := _wanting(card):
                    catalog.absent[kind, card.name] = wanting
                    continue
                digest = file_digest(path) if external else ""
                catalog.add(Entry(card, module, path, origin, digest))


@lru_cache(maxsize=64)
def _name_and_version(dist: Distribution) -> tuple[str, str]:
    """Of a distribution; its metadata are parsed at every access."""
    facts = dist.metadata
    return facts["Name"], facts["Version"]


def add_plugin(catalog: Catalog, path: Path) -> list[Entry]:
    """Register the cards of one file; UsageError if it is missing or carries none."""
    if not is_file(path):
        raise UsageError("--plugin", f"no file {str(path)!r}")
    cards = read_cards(path)
    if not cards:
        raise UsageError("--plugin", f"{path.name} has no top-level CARD literal (see docs/plugins.md)")
    for card in cards:
        if wanting := _wanting(card):
            raise UsageError(f"--plugin {path.name}", _install(card.name, wanting))
    digest = file_digest(path)
    module = f"mergesec_plugin_{path.stem}_{digest}"
    added = [Entry(card, module, path.resolve(), path.name, digest) for card in cards]
    for entry in added:
        catalog.add(entry)
    return added
