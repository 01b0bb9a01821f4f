"""Components with their parameters bound, known by content."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mergesec.errors import UsageError
from mergesec.files import fingerprint, is_there
from mergesec.planning.cards import Card
from mergesec.planning.catalog import Catalog, Entry
from mergesec.planning.gridspec import Named

HUB_NAME = r"[\w.-]+/[\w.-]+(?:/[\w.-]+)?@[0-9a-f]{40}"
"""A model on the Hugging Face hub at a commit, perhaps one file of it."""
PACKAGED = r"[A-Za-z]\w+:[\w-]+(?:/[\w-][\w.-]*)*"
"""A model that an installed package carries: ``package:folder/in/it``."""


@dataclass(frozen=True, slots=True, eq=False)
class Ref:
    """A component with its parameters bound. ``text`` is its identity: what enters step keys.

    Equality and hash are the text's alone: a big grid looks refs up a million times.
    """

    kind: str
    name: str
    parameters: tuple[tuple[str, Any], ...]
    shown: str
    text: str
    digest: str = ""
    inner: tuple[Ref, ...] = ()
    """What this one wraps: a merge method, or the attacks an adaptive attacker tries."""
    plugin: str = ""
    """Origin and digest of a component that is not the project's own; empty for one that is."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ref) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    @property
    def plugins(self) -> frozenset[str]:
        """The plugins whose code runs where this component does, that of what it wraps included."""
        return frozenset(p for ref in (self, *self.inner) for p in (ref.plugin,) if p)

    @property
    def label(self) -> str:
        """Name with the parameters that differ from the defaults (or are always shown), as boards show it."""
        return f"{self.name}({self.shown})" if self.shown else self.name


NONE = Ref("none", "none", (), "", '"none"')


def make_ref(entry: Entry, given: Mapping[str, Any], where: str, catalog: Catalog) -> Ref:
    """Bind parameters and fix the identity: name, version, plugin digest, parameters, wrapped method."""
    card = entry.card
    bound = {
        k: packaged(f"{where}.{k}", v) if card.parameters[k].type == "model" and v else v
        for k, v in card.bind(where, given).items()
    }
    inner: tuple[Ref, ...] = ()
    if card.wraps:
        inner = _inner(card, bound[card.wraps], f"{where}.{card.wraps}", catalog)
        labels = [ref.label for ref in inner]
        bound[card.wraps] = labels if card.parameters[card.wraps].type == "attacks" else labels[0]
    changed = {k: v for k, v in bound.items() if v != card.parameters[k].default}
    shown = _shown(card, bound)
    readers = {"path": _path_content, "model": model_content}
    content = {
        k: readers[card.parameters[k].type](f"{where}.{k}", v)
        for k, v in bound.items()
        if card.parameters[k].type in readers and v is not None
    }
    kept = {k: v for k, v in bound.items() if k in changed or not card.parameters[k].later}
    identity = {
        "kind": card.kind, "name": card.name, "version": card.version, "parameters": {**kept, **content},
    }  # fmt: skip
    if card.depends:
        identity["depends"] = {name: _series(name) for name in card.depends}
    if entry.digest:
        identity["digest"] = entry.digest
    if inner:
        identity["inner"] = [json.loads(ref.text) for ref in inner]
    frozen = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in sorted(bound.items()))
    text = json.dumps(identity, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]
    plugin = f"{entry.origin} {entry.digest}" if entry.foreign else ""
    return Ref(card.kind, card.name, frozen, shown, text, digest, inner, plugin)


def _shown(card: Card, bound: Mapping[str, Any]) -> str:
    """What a label tells of the parameters."""
    told = {k: v for k, v in bound.items() if v != card.parameters[k].default or card.parameters[k].shown}
    return ", ".join(f"{k}={short(v)}" for k, v in sorted(told.items()))


def trigger_ref(attack: Ref, catalog: Catalog) -> Ref:
    """The attack as its trigger knows it: the one named by ``trigger_of``, and parameters named by
    ``after_trigger`` at their defaults."""
    card = catalog.get("attack", attack.name).card
    if card.trigger_of:
        parent = catalog.get("attack", card.trigger_of, f"{card.name}: card.trigger_of")
        given = {k: v for k, v in attack.parameters if k not in card.after_trigger}
        return trigger_ref(make_ref(parent, given, f"{card.name}: card.trigger_of", catalog), catalog)
    return at_defaults(attack, card.after_trigger, catalog)


def at_defaults(ref: Ref, names: Iterable[str], catalog: Catalog) -> Ref:
    """A component as a hook knows it that does not read the parameters ``names``: these have their defaults."""
    card = catalog.get(ref.kind, ref.name).card
    after = {name: card.parameters[name].default for name in names}
    if not after:
        return ref
    identity = json.loads(ref.text)
    told = {k: v for k, v in identity["parameters"].items() if k not in after}
    identity["parameters"] = told | {k: v for k, v in after.items() if not card.parameters[k].later}
    bound = {k: list(v) if isinstance(v, tuple) else v for k, v in ref.parameters} | after
    frozen = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in sorted(bound.items()))
    shown = _shown(card, bound)
    text = json.dumps(identity, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]
    return Ref(ref.kind, ref.name, frozen, shown, text, digest, ref.inner, ref.plugin)


def _inner(card: Card, value: Any, where: str, catalog: Catalog) -> tuple[Ref, ...]:
    """What is wrapped: names, or ``{name: ..., parameter: value}``. One merge method with one set of weights,
    or attacks of the same hooks."""
    if card.parameters[card.wraps].type == "attacks":
        refs = tuple(expand(value, "attack", where, catalog))
        for ref in refs:
            other = catalog.get("attack", ref.name).card if ref is not NONE else None
            if other is None or other.hooks != card.hooks or other.wraps:
                raise UsageError(
                    where, f"{card.name} cannot try {ref.name}; it tries attacks that {card.hooks[0]}"
                )
        return refs
    refs = tuple(expand([value], "merging", where, catalog))
    if len(refs) != 1:
        raise UsageError(where, "wraps one merge method; lists of its parameters are not expanded here")
    wrapped = catalog.get("merging", refs[0].name).card
    if wrapped.wraps or wrapped.output != "static":
        raise UsageError(where, f"{card.name} cannot wrap {wrapped.name}: it needs one set of merged weights")
    entries = [catalog.get("merging", name) for name in (card.name, wrapped.name)]
    if any(entry.foreign for entry in entries):  # a stranger's code is not imported here: the step asks
        return refs
    if reason := entries[0].load().unfit_inner(entries[1].load()):
        raise UsageError(where, f"{card.name} cannot wrap {wrapped.name}: {reason}")
    return refs


def _series(distribution: str) -> str:
    """What of a version may decide results: the major number; before 1.0, where minor releases break, both."""
    try:
        major, *rest = version(distribution).split(".")
    except PackageNotFoundError:
        return ""
    return f"{major}.{rest[0]}" if major == "0" and rest else major


def _path_content(where: str, value: str) -> str:
    """What a path parameter contributes to identity: the content, never the place."""
    if not is_there(Path(value)):
        raise UsageError(where, f"no file or folder {value!r}")
    return fingerprint(Path(value))


def packaged(where: str, value: str) -> str:
    """Where the files lie that a package carries; anything but ``package:folder/in/it`` as it is."""
    if not re.fullmatch(PACKAGED, value):
        return value
    package, _, folder = value.partition(":")
    spec = importlib.util.find_spec(package)
    for home in (spec.submodule_search_locations if spec is not None else None) or ():
        if is_there(Path(home) / folder):
            return str(Path(home) / folder)
    lacks = "is not installed" if spec is None else f"has no {folder!r}"
    raise UsageError(where, f"{value!r}: the package {package!r} {lacks}")


def model_content(where: str, value: str) -> str:
    """A local file or folder counts by content; a name on the hub by its commit, which it must give."""
    if value and is_there(Path(value).expanduser()):
        return fingerprint(Path(value).expanduser())
    if not re.fullmatch(HUB_NAME, value):
        raise UsageError(
            where, f"no file or folder {value!r}; a model of the hub is named owner/name@commit (40 digits)"
        )
    return value


def short(value: Any) -> str:
    if isinstance(value, str) and "/" in value:
        return Path(value.partition("@")[0] if re.fullmatch(HUB_NAME, value) else value).name
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return str(value)


def expand(items: Iterable[Named], kind: str, where: str, catalog: Catalog) -> list[Ref]:
    """Refs for each item; lists of parameter values become a product."""
    refs: list[Ref] = []
    for i, item in enumerate(items):
        spot = where if kind == "backbone" else f"{where}[{i}]"
        given = {"name": item} if isinstance(item, str) else dict(item)
        name = given.pop("name", None)
        if not isinstance(name, str):
            raise UsageError(spot, f"needs a name, got {item!r}")
        if name == "none" and kind in ("attack", "defense"):
            refs.append(NONE)
            continue
        entry = catalog.get(kind, name, spot)
        choices = [
            [(key, v) for v in values]
            for key, values in ((k, _values(entry, k, v, spot)) for k, v in given.items())
        ]
        refs += [make_ref(entry, dict(combo), spot, catalog) for combo in itertools.product(*choices)]
    doubled = [r for r, n in Counter(refs).items() if n > 1]
    if doubled:
        raise UsageError(where, f"{doubled[0].label} is named twice")
    alike = [label for label, n in Counter(r.label for r in refs).items() if n > 1]
    if alike:  # boards tell rows apart by label alone
        raise UsageError(where, f"two entries would both be shown as {alike[0]}; rename a file or folder")
    return refs


def _values(entry: Entry, name: str, value: Any, where: str) -> list[Any]:
    parameter = entry.card.parameters.get(name)
    if not isinstance(value, list):
        return [value]
    takes_lists = parameter is not None and parameter.type in ("list", "attacks")
    single = takes_lists and not any(isinstance(v, list) for v in value)
    if not single and not value:  # the product would be empty, and the component gone without a word
        raise UsageError(f"{where}.{name}", "is an empty list: no value is left to run")
    return [value] if single else value
