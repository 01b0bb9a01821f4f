"""Reading cards from modules without importing them.

A card is a literal named ``CARD`` (or a list named ``CARDS``) at the top level of the component's module, so
that ``bench list`` needs neither torch nor the component's own dependencies. A card may extend another one of
the same file, or of the module of that name beside it.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from mergesec.errors import UsageError, nearest
from mergesec.planning.cards import KINDS, PARAMETER_TYPES, Card, Parameter, is_secret
from mergesec.planning.conditions import names_in
from mergesec.recipes import check_recipe
from mergesec.threats import HOOKS, Hook, Threat

Raw = dict[str, Any]
_NAMED = re.compile(r"^(?:CARD|CARDS)\b", re.MULTILINE)
_LITERAL = re.compile(r"^(?:CARD|CARDS)\b[^=\n]*= *(\{.*?^\}|\[.*?^\])", re.MULTILINE | re.DOTALL)
_NAME = re.compile(r"(?=.{1,80}$)[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)*", re.ASCII)
_REQUIRED = ("name", "kind", "class", "version", "title", "summary")
_FIELDS = {"class" if f.name == "class_name" else f.name: str(f.type) for f in fields(Card)}
_PARAMETER = {f.name for f in fields(Parameter)}
TEMPLATE = "_"
"""A card whose name begins so is there to be extended, and is not registered."""


class Mistake(NamedTuple):
    """One thing that is wrong with a card: where (``card.parameters.rate``) and what."""

    field: str
    message: str


class CardError(UsageError):
    """Everything that is wrong with a card, a line each."""

    def __init__(self, told: Sequence[Mistake]) -> None:
        super().__init__(*told[0])
        self.mistakes = tuple(told)
        self.args = ("\n".join(f"{m.field}: {m.message}" for m in told),)


def read_cards(path: Path) -> list[Card]:
    """The cards in one module, read as literals; empty if it has none. Nothing is executed.

    CardError names file, line and field of all that is wrong with them.
    """
    raws = _raws(path)
    cards, told = [], list[Mistake]()
    for place, raw in enumerate(raws):
        whole = _extended(raw, raws, path)
        mistakes = list(_mistakes(whole))
        told += _placed(mistakes, path, place) if mistakes else []
        if not mistakes and not whole["name"].startswith(TEMPLATE):
            cards.append(_card(whole))
    if told:
        raise CardError(told)
    return cards


def digest_of(source: bytes) -> str:
    """First 16 hex digits of the SHA-256."""
    return hashlib.sha256(source).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """That of a file."""
    return digest_of(path.read_bytes())


# --------------------------------------------------------------------------- literals


@lru_cache(maxsize=256)
def _literals(path: Path, stamp: tuple[int, int]) -> Any:
    """The literal in a file, None if it has none. ``stamp``: its size and time, so that edits are seen."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError(path.name, "not UTF-8 text") from None
    if not _NAMED.search(text):
        return None
    match = _LITERAL.search(text)
    try:
        return ast.literal_eval(match[1]) if match else _parsed(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return _parsed_or_refused(text, path.name)


def _raws(path: Path) -> list[Raw]:
    stat = path.stat()
    value = _literals(path, (stat.st_size, stat.st_mtime_ns))
    raws = value if isinstance(value, list) else [] if value is None else [value]
    for raw in raws:
        if not isinstance(raw, dict):
            raise UsageError(path.name, f"a card is a dictionary, got {raw!r}"[:200])
    return raws


def _node(text: str) -> ast.expr | None:
    """The expression that is assigned to CARD or CARDS."""
    for node in ast.parse(text).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(t, ast.Name) and t.id in ("CARD", "CARDS") for t in targets):
            value: ast.expr | None = getattr(node, "value", None)
            return value
    return None


def _parsed(text: str) -> Any:
    """The card by the full parser, for layouts the quick pattern does not cover; None if absent."""
    node = _node(text)
    return None if node is None else ast.literal_eval(node)


def _parsed_or_refused(text: str, where: str) -> Any:
    try:
        return _parsed(text)
    except SyntaxError as error:
        raise UsageError(f"{where}, line {error.lineno}", f"not valid Python ({error.msg})") from None
    except (RecursionError, MemoryError):
        raise UsageError(where, "CARD is nested too deeply") from None
    except ValueError as error:
        raise UsageError(where, f"CARD is not a plain literal ({error})") from None


def _placed(mistakes: Sequence[Mistake], path: Path, place: int) -> list[Mistake]:
    """The mistakes with ``file:line`` before each; the line of the nearest key that the card itself holds."""
    try:
        node = _node(path.read_text(encoding="utf-8"))
    except SyntaxError:  # the card is a literal, what follows it is not Python: then without finer lines
        node = None
    if isinstance(node, ast.List):
        node = node.elts[place]
    return [Mistake(f"{path.name}:{_line(node, m.field)}: {m.field}", m.message) for m in mistakes]


def _line(node: ast.expr | None, spot: str) -> int:
    line = node.lineno if node is not None else 1
    for part in spot.split(".")[1:]:
        if not isinstance(node, ast.Dict):
            break
        found = [
            (k, v)
            for k, v in zip(node.keys, node.values, strict=True)
            if isinstance(k, ast.Constant) and k.value == part
        ]
        if not found:
            break
        (key, node) = found[-1]
        line = key.lineno
    return line


# --------------------------------------------------------------------------- extending


def _extended(raw: Raw, beside: Sequence[Raw], path: Path, seen: tuple[str, ...] = ()) -> Raw:
    """A card with what it takes over: its own fields win, parameters and their fields one by one; a parameter
    that is None is left out. UsageError for a parent that is not there, or a circle."""
    if "extends" not in raw:
        return raw
    name = raw["extends"]
    where = f"{path.name}: card.extends"
    if not isinstance(name, str) or name in seen:
        raise UsageError(where, f"expected another card's name, got {name!r}"[:200])
    home, others = path, beside
    if not any(other.get("name") == name for other in beside if other is not raw):
        home = path.with_name(f"{name}.py")
        if not home.is_file():
            known = [str(o.get("name")) for o in beside if o is not raw]
            known += [
                p.stem
                for p in path.parent.glob("*.py")
                if p != path and _NAMED.search(p.read_text(encoding="utf-8", errors="replace"))
            ]
            raise UsageError(where, f"no card {name!r} here or in {name}.py beside it{nearest(name, known)}")
        others = _raws(home)
    parent = next((o for o in others if o is not raw and o.get("name") == name), None)
    if parent is None:
        raise UsageError(where, f"{home.name} has no card {name!r}")
    parent = _extended(parent, others, home, (*seen, name))
    own = {k: v for k, v in raw.items() if k != "extends"}
    mine, theirs = own.get("parameters", {}), parent.get("parameters", {})
    if not isinstance(mine, dict) or not isinstance(theirs, dict):
        return {**parent, **own}
    both = {k: _over(theirs.get(k), v) for k, v in {**theirs, **mine}.items() if v is not None}
    return {**parent, **own, "parameters": both} if both else {**parent, **own}


def _over(below: Any, above: Any) -> Any:
    return {**below, **above} if isinstance(below, dict) and isinstance(above, dict) else above


# --------------------------------------------------------------------------- checking


def _card(raw: Raw) -> Card:
    """A card from a mapping without mistakes."""
    given: Raw = {("class_name" if k == "class" else k): v for k, v in raw.items()}
    given = {k: tuple(v) if _FIELDS.get(k, "").startswith("tuple") else v for k, v in given.items()}
    given["parameters"] = {n: _parameter(p) for n, p in raw.get("parameters", {}).items()}
    return Card(**given)


def _parameter(raw: Mapping[str, Any]) -> Parameter:
    given: Raw = {k: tuple(v) if k in ("choices", "also") else v for k, v in raw.items()}
    if "stands_for" in given:
        given["stands_for"] = {name: tuple(numbers) for name, numbers in given["stands_for"].items()}
    return Parameter(**given)


def _mistakes(raw: Raw) -> Iterator[Mistake]:
    """All that is wrong with a card: unknown and missing fields, types, then what does not go together."""
    plain = list(_plain_mistakes(raw))
    yield from plain
    if not plain:
        yield from _threat_mistakes(raw)
        strange = list(_reference_mistakes(raw))
        yield from strange
        yield from _backdoor_mistakes(raw)
        if not strange:
            yield from _trial_mistakes(raw)


def _plain_mistakes(raw: Raw) -> Iterator[Mistake]:
    for key in raw:
        if key not in _FIELDS:
            yield Mistake(f"card.{key}", f"unknown field {key!r}{nearest(key, _FIELDS)}")
    for key in _REQUIRED:
        if not isinstance(raw.get(key), str) or not raw[key]:
            yield Mistake(f"card.{key}", f"missing or not a string{_got(raw, key)}")
    if isinstance(raw.get("name"), str) and raw["name"] and not _NAME.fullmatch(raw["name"]):
        told = "letters, digits, '_', '.', '-' and '/', 80 at most"
        yield Mistake("card.name", f"{raw['name'][:100]!r} cannot be a name: {told}")
    for key, value in raw.items():
        wanted = _wanted(key, value) if key in _FIELDS and key not in _REQUIRED else ""
        if wanted:
            yield Mistake(f"card.{key}", f"expected {wanted}, got {value!r}"[:200])
    if isinstance(raw.get("parameters"), dict):
        for name, parameter in raw["parameters"].items():
            yield from _parameter_mistakes(f"card.parameters.{name}", parameter)


def _got(raw: Raw, key: str) -> str:
    return f", got {raw[key]!r}"[:200] if key in raw else ""


def _strings(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)


def _counts(value: Any) -> bool:
    return all(type(v) is int and v >= 0 for v in value)


def _wanted(key: str, value: Any) -> str:
    """What a field should have been; empty if it is that."""
    kind = _FIELDS[key]
    if key == "experts":
        fits = isinstance(value, (list, tuple)) and len(value) == 2 and _counts(value)
        return "" if fits else "[fewest, most] experts"
    if kind.startswith("tuple"):
        return "" if _strings(value) else "a list of strings"
    if key in ("images", "requires"):
        inside = isinstance(value, dict) and _strings(list(value))
        fits = inside and (_counts(value.values()) if key == "images" else _strings(list(value.values())))
        told = "split → number of rows" if key == "images" else "module → package to install"
        return "" if fits else told
    if kind.startswith("Mapping"):
        return "" if isinstance(value, dict) else "a dictionary"
    if kind == "int":
        return "" if _counts([value]) else "a whole number"
    if kind == "bool":
        return "" if type(value) is bool else "true or false"
    return "" if isinstance(value, str) else "a string"


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _bound(value: Any) -> bool:
    return value is None or _number(value)


def _stands(value: Any) -> bool:
    known = isinstance(value, dict) and _strings(list(value))
    return known and all(isinstance(v, (list, tuple)) and v and all(map(_number, v)) for v in value.values())


_PARAMETER_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "doc": ("a string", lambda v: isinstance(v, str)), "min": ("a number", _bound), "max": ("a number", _bound),
    "choices": ("a list of strings", _strings), "also": ("a list", lambda v: isinstance(v, (list, tuple))),
    "later": ("true or false", lambda v: type(v) is bool), "shown": ("true or false", lambda v: type(v) is bool),
    "stands_for": ("a literal of 'also' → the numbers that it stands for", _stands),
    "secret": ("target_class, attack.NAME, merging.NAME or rows.SPLIT", lambda v: isinstance(v, str) and is_secret(v)),
}  # fmt: skip


def _parameter_mistakes(where: str, raw: Any) -> Iterator[Mistake]:
    """What is wrong with a parameter; its default must fit its own type and range."""
    if not isinstance(raw, dict) or "type" not in raw or "default" not in raw:
        yield Mistake(where, f"needs at least 'type' and 'default', got {raw!r}"[:200])
        return
    wrong = [
        Mistake(f"{where}.{k}", f"unknown field {k!r}{nearest(k, _PARAMETER)}")
        for k in raw
        if k not in _PARAMETER
    ]
    if not isinstance(raw["type"], str) or raw["type"] not in PARAMETER_TYPES:
        wrong.append(Mistake(f"{where}.type", f"type {raw['type']!r}{nearest(raw['type'], PARAMETER_TYPES)}"))
    for key, (wanted, fits) in _PARAMETER_FIELDS.items():
        if key in raw and not fits(raw[key]):
            wrong.append(Mistake(f"{where}.{key}", f"expected {wanted}, got {raw[key]!r}"[:200]))
    yield from wrong
    if not wrong:
        try:
            _parameter(raw).check(f"{where}.default", raw["default"])
        except UsageError as error:
            yield Mistake(error.field, error.message)


def _threat_mistakes(raw: Raw) -> Iterator[Mistake]:
    if raw["kind"] not in KINDS:
        yield Mistake("card.kind", f"{raw['kind']!r}{nearest(raw['kind'], KINDS)}")
    if raw["kind"] in ("attack", "defense"):
        allowed = HOOKS.get((raw["kind"], raw.get("threat", "")))
        if allowed is None:
            yield Mistake("card.threat", f"{raw.get('threat')!r}; valid: backdoor, protection")
            return
        for hook in raw.get("hooks") or [""]:
            if hook not in allowed:
                yield Mistake("card.hooks", f"{hook!r}{nearest(hook, allowed)}")
        hooks = raw.get("hooks") or ()
        if Hook.EXAMINE in hooks and Hook.SCREEN not in hooks:
            yield Mistake("card.hooks", "'examine' goes with 'screen', which decides by what it found")


@dataclass(frozen=True)
class _Belongs:
    """A field that only components of one threat, kind and perhaps hook have."""

    kind: str
    hook: str = ""


_BACKDOOR = {
    "adapts": _Belongs("attack"), "off_task": _Belongs("attack"), "after_trigger": _Belongs("attack"),
    "trigger_of": _Belongs("attack"), "references": _Belongs("defense"),
    "after_reference": _Belongs("defense"), "after_examine": _Belongs("defense", Hook.EXAMINE), "per_task": _Belongs("defense", Hook.REPAIR),
}  # fmt: skip


def _backdoor_mistakes(raw: Raw) -> Iterator[Mistake]:
    """Fields that only backdoor attacks (or repairs) have."""
    for key, home in _BACKDOOR.items():
        if not raw.get(key):
            continue
        if raw.get("threat") != Threat.BACKDOOR or raw["kind"] != home.kind:
            yield Mistake(f"card.{key}", f"belongs to a backdoor {home.kind}")
        elif home.hook and home.hook not in raw.get("hooks", ()):
            yield Mistake(f"card.{key}", f"belongs to a defense with the hook {home.hook}")


def _reference_mistakes(raw: Raw) -> Iterator[Mistake]:
    """Fields that name parameters."""
    given = raw.get("parameters", {})
    for key in ("siblings", "references", "wraps"):
        if raw.get(key) and raw[key] not in given:
            yield Mistake(f"card.{key}", f"{raw[key]!r}{nearest(raw[key], given)}")
    for key in ("after_trigger", "after_reference", "after_examine"):
        for name in raw.get(key, ()):
            if name not in given or name == raw.get("wraps"):
                yield Mistake(f"card.{key}", f"{name!r}{nearest(name, given)}")
    for condition in raw.get("holds", ()):
        try:
            strange = [n for n in names_in(condition) if n not in given]
        except ValueError as error:
            yield Mistake("card.holds", f"{condition!r}: {error}")
        else:
            for name in strange:
                yield Mistake("card.holds", f"{condition!r}: {name!r}{nearest(name, given)}")


def _trial_mistakes(raw: Raw) -> Iterator[Mistake]:
    """Values that a card itself gives: of its parameters, and of the recipe."""
    try:
        check_recipe("card.recipe", raw.get("recipe", {}))
        card = _card(raw)
        card.bind("card.trial", card.trial)
    except UsageError as error:
        yield Mistake(error.field, error.message)
