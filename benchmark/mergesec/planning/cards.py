"""Cards: what a component is and which parameters it takes, read without importing it.

A card is a literal named ``CARD`` (or a list named ``CARDS``) at the top level of the component's
module, so that ``bench list`` needs neither torch nor the component's own dependencies.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mergesec.errors import UsageError, nearest
from mergesec.threats import HOOKS, Hook, Threat

KINDS = ("task", "backbone", "merging", "attack", "defense")
_TYPES: dict[str, tuple[type, ...]] = {
    "float": (float, int), "int": (int,), "bool": (bool,), "str": (str,), "choice": (str,),
    "path": (str,), "model": (str,), "list": (list, tuple), "merging": (str, Mapping),
    "attacks": (list, tuple),
}  # fmt: skip
_NAMED = re.compile(r"^(?:CARD|CARDS)\b", re.MULTILINE)
_LITERAL = re.compile(r"^(?:CARD|CARDS)\b[^=\n]*= *(\{.*?^\}|\[.*?^\])", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Parameter:
    """One parameter: type, published default, range."""

    type: str
    default: Any
    doc: str = ""
    min: float | None = None
    max: float | None = None
    choices: tuple[str, ...] = ()
    also: tuple[Any, ...] = ()
    later: bool = False
    """Added after results were stored: at its default it is left out of the identity, so they stay valid."""

    def check(self, where: str, value: Any) -> Any:
        """``value``, normalised; UsageError naming ``where`` if type or range is wrong."""
        if value is None and self.default is None:
            return None
        if any(type(value) is type(a) and value == a for a in self.also):
            return value
        wrong = not isinstance(value, _TYPES[self.type])
        wrong |= isinstance(value, bool) and self.type != "bool"
        if wrong:
            also = f" or {', '.join(map(repr, self.also))}" if self.also else ""
            raise UsageError(where, f"expected {self.type}{also}, got {value!r}")
        if self.type == "choice" and value not in self.choices:
            raise UsageError(where, f"{value!r} is not a choice{nearest(value, self.choices)}")
        if self.type in ("float", "int"):
            low, high = self.min, self.max
            if value != value or (low is not None and value < low) or (high is not None and value > high):
                raise UsageError(where, f"{value!r} is outside [{low}, {high}]")
        if self.type == "float":
            return float(value)
        return list(value) if self.type in ("list", "attacks") else value


@dataclass(frozen=True)
class Card:
    """Everything the engine and ``bench info`` know of a component before importing it."""

    name: str
    kind: str
    class_name: str
    version: str
    title: str
    summary: str
    paper: str = ""
    url: str = ""
    threat: str = ""
    hooks: tuple[str, ...] = ()
    knowledge: str = ""
    data: str = "none"
    modalities: tuple[str, ...] = ("image", "text")
    modality: str = ""
    output: str = "static"
    """Of a merge: ``static`` (one set of weights) or ``per_task`` (weights, masks or adapters per task)."""
    experts: tuple[int, int] = (1, 0)
    """Fewest and most experts a merge takes; 0 = any number."""
    seeded: bool = False
    siblings: str = ""
    wraps: str = ""
    """The parameter of type ``merging`` (of an attack: ``attacks``) naming what this one works around."""
    tries: bool = False
    """Whether an attack tries merges on the tuning split, and so depends on the merge method."""
    adapts: bool = False
    """Whether a backdoor's ``poison`` and ``forge`` look at the cell's defense (``ctx.defense``)."""
    off_task: bool = False
    """Whether a backdoor can aim at a class of a task that is not the adversary's (``ctx.target_task``)."""
    after_trigger: tuple[str, ...] = ()
    """Parameters that neither ``trigger`` nor ``apply`` reads: variants that differ in them share one trigger."""
    trigger_of: str = ""
    """The attack whose ``trigger`` and ``apply`` this one has unchanged; it must know every parameter that
    ``after_trigger`` does not name. With equal ones both share triggers and controls."""
    per_task: bool = False
    """Whether a repair also takes merges that keep weights per task."""
    local: bool = False
    depends: tuple[str, ...] = ()
    """Distributions whose version decides results (e.g. one that names the tensors): the major number, before
    1.0 also the minor."""
    requires: Mapping[str, str] = field(default_factory=dict)
    """Modules it cannot run without → what to ``pip install``; while one is missing it is not listed."""
    trial: Mapping[str, Any] = field(default_factory=dict)
    """Parameter values that make a run short; the conformance battery tries the component with them."""
    pretrain: str = ""
    """``module:function`` that makes a backbone's weights, for ``bench pretrain``."""
    zero_shot: bool = False
    """Of a backbone: it makes heads from prompts, with a text tower."""
    templates: tuple[str, ...] = ()
    """Of a task: sentences with ``{}`` for the class, from which zero-shot heads are made."""
    hub: Mapping[str, Any] = field(default_factory=dict)
    """Of a task: where its data is on the Hugging Face hub, used when there is no local folder."""
    classes: int = 0
    source: str = ""
    licence: str = ""
    images: Mapping[str, int] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, Parameter] = field(default_factory=dict)

    def bind(self, where: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """All parameters with defaults filled in; UsageError for unknown names and bad values."""
        for name in given:
            if name not in self.parameters:
                hint = nearest(name, self.parameters) if self.parameters else "; it has none"
                raise UsageError(f"{where}.{name}", f"{self.name} has no such parameter{hint}")
        return {
            name: p.check(f"{where}.{name}", given[name]) if name in given else p.default
            for name, p in self.parameters.items()
        }


def _parameter(where: str, raw: Any) -> Parameter:
    """A parameter whose default fits its own type and range; UsageError naming ``where``."""
    if not isinstance(raw, Mapping) or "type" not in raw or "default" not in raw:
        raise UsageError(where, f"needs at least 'type' and 'default', got {raw!r}")
    known = [f.name for f in fields(Parameter)]
    for key in raw:
        if key not in known:
            raise UsageError(where, f"unknown field {key!r}{nearest(key, known)}")
    if raw["type"] not in _TYPES:
        raise UsageError(where, f"type {raw['type']!r}{nearest(raw['type'], _TYPES)}")
    given: dict[str, Any] = {k: tuple(v) if k in ("choices", "also") else v for k, v in raw.items()}
    parameter = Parameter(**given)
    parameter.check(f"{where}.default", parameter.default)
    return parameter


def _build(raw: Any, where: str) -> Card:
    if not isinstance(raw, dict):
        raise UsageError(where, f"a card is a dictionary, got {raw!r}"[:200])
    raw = dict(raw)
    if "class" not in raw:
        raise UsageError(where, "the card lacks 'class'")
    raw["class_name"] = raw.pop("class")
    known = {f.name for f in fields(Card)}
    required = ("name", "kind", "class_name", "version", "title", "summary")
    for key in raw:
        if key not in known:
            raise UsageError(f"{where}: card", f"unknown field {key!r}{nearest(key, known)}")
    for key in required:
        if not isinstance(raw.get(key), str) or not raw[key]:
            raise UsageError(f"{where}: card.{key.removesuffix('_name')}", "missing or not a string")
    if raw["kind"] not in KINDS:
        raise UsageError(f"{where}: card.kind", f"{raw['kind']!r}{nearest(raw['kind'], KINDS)}")
    if raw["kind"] in ("attack", "defense"):
        allowed = HOOKS.get((raw["kind"], raw.get("threat", "")))
        if allowed is None:
            raise UsageError(f"{where}: card.threat", f"{raw.get('threat')!r}; valid: backdoor, protection")
        for hook in raw.get("hooks") or [""]:
            if hook not in allowed:
                raise UsageError(f"{where}: card.hooks", f"{hook!r}{nearest(hook, allowed)}")
    given = raw.get("parameters", {})
    if not isinstance(given, dict):
        raise UsageError(f"{where}: card.parameters", f"expected a dictionary, got {given!r}"[:200])
    raw["parameters"] = {n: _parameter(f"{where}: card.parameters.{n}", p) for n, p in given.items()}
    needed = raw.get("requires", {})
    if not isinstance(needed, dict) or not all(isinstance(v, str) for kv in needed.items() for v in kv):
        raise UsageError(
            f"{where}: card.requires", f"expected module → package to install, got {needed!r}"[:200]
        )
    for key in ("siblings", "wraps"):
        if raw.get(key) and raw[key] not in given:
            raise UsageError(f"{where}: card.{key}", f"{raw[key]!r}{nearest(raw[key], given)}")
    _check_backdoor_fields(raw, given, where)
    for key in ("hooks", "modalities", "depends", "experts", "templates", "after_trigger"):
        if key in raw:
            raw[key] = tuple(raw[key])
    card = Card(**raw)
    card.bind(f"{where}: card.trial", card.trial)
    return card


def _check_backdoor_fields(raw: Mapping[str, Any], given: Mapping[str, Any], where: str) -> None:
    """Fields that only backdoor attacks (or repairs) have, of the right type."""
    backdoor = raw.get("threat") == Threat.BACKDOOR
    for key, kind in (("adapts", "attack"), ("off_task", "attack"), ("per_task", "defense")):
        if key in raw and type(raw[key]) is not bool:
            raise UsageError(f"{where}: card.{key}", f"expected true or false, got {raw[key]!r}"[:200])
        if raw.get(key) and not (backdoor and raw["kind"] == kind):
            raise UsageError(f"{where}: card.{key}", f"belongs to a backdoor {kind}")
    if raw.get("per_task") and Hook.REPAIR not in raw.get("hooks", ()):
        raise UsageError(f"{where}: card.per_task", "belongs to a defense with the hook repair")
    later = raw.get("after_trigger", ())
    if not isinstance(later, (list, tuple)) or (later and not (backdoor and raw["kind"] == "attack")):
        raise UsageError(f"{where}: card.after_trigger", "a list of parameters of a backdoor attack")
    parent = raw.get("trigger_of", "")
    if not isinstance(parent, str) or (parent and not (backdoor and raw["kind"] == "attack")):
        raise UsageError(f"{where}: card.trigger_of", "the name of another attack, of a backdoor attack")
    for name in later:
        if name not in given or name == raw.get("wraps"):
            raise UsageError(f"{where}: card.after_trigger", f"{name!r}{nearest(name, given)}")


def read_cards(path: Path) -> list[Card]:
    """The cards in one module, read as literals; empty if it has none. Nothing is executed."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError(path.name, "not UTF-8 text") from None
    if not _NAMED.search(text):
        return []
    match = _LITERAL.search(text)
    try:
        value = ast.literal_eval(match[1]) if match else _parsed(text)
    except (ValueError, SyntaxError):
        value = _parsed_or_refused(text, path.name)
    if value is None:
        return []
    raws = value if isinstance(value, list) else [value]
    return [_build(raw, path.name) for raw in raws]


def _parsed(text: str) -> Any:
    """The card by the full parser, for layouts the quick pattern does not cover; None if absent."""
    for node in ast.parse(text).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(t, ast.Name) and t.id in ("CARD", "CARDS") for t in targets):
            value = getattr(node, "value", None)
            return ast.literal_eval(value) if value is not None else None
    return None


def _parsed_or_refused(text: str, where: str) -> Any:
    try:
        return _parsed(text)
    except SyntaxError as error:
        raise UsageError(f"{where}, line {error.lineno}", f"not valid Python ({error.msg})") from None
    except ValueError as error:
        raise UsageError(where, f"CARD is not a plain literal ({error})") from None


def file_digest(path: Path) -> str:
    """First 16 hex digits of the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
