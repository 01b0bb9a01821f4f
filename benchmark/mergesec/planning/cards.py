"""Cards: what a component is and which parameters it takes. ``cardfiles`` reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mergesec.errors import UsageError, nearest
from mergesec.planning.conditions import is_broken, names_in

KINDS = ("task", "backbone", "merging", "attack", "defense")
PARAMETER_TYPES: dict[str, tuple[type, ...]] = {
    "float": (float, int), "int": (int,), "bool": (bool,), "str": (str,), "choice": (str,),
    "path": (str,), "model": (str,), "list": (list, tuple), "merging": (str, Mapping),
    "attacks": (list, tuple), "task": (str,),
}  # fmt: skip
"""``task``: one of the tasks that are merged."""


SECRETS = ("target_class", "attack.", "merging.", "rows.")
"""What a parameter of a backdoor's attack or defense may not know: the cell's target class, ``attack.NAME`` or
``merging.NAME`` (a parameter of the attack or the merge in the cell), ``rows.SPLIT`` (how many rows the split has)."""


def is_secret(name: str) -> bool:
    """Whether ``name`` names a secret."""
    place = next((s for s in SECRETS if name.startswith(s)), None)
    return place is not None and (len(name) > len(place)) == place.endswith(".")


def _finite(value: Any) -> bool:
    """Whether a value, if it is a number, is one that a float can hold."""
    try:
        return not isinstance(value, (int, float)) or math.isfinite(value)
    except OverflowError:
        return False


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
    shown: bool = False
    """Always part of the label, at its default too: what a row of a board cannot be read without."""
    secret: str = ""
    """The other side's secret that a value may not be by coincidence, one of ``SECRETS``: cells in which the two
    are equal are left out."""
    stands_for: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """The numbers that a literal of ``also`` stands for, by which it is compared with what may not equal it."""

    @property
    def interval(self) -> str:
        """What a number may be: ``[1, ∞)``."""
        least = "(-∞" if self.min is None else f"[{self.min}"
        return f"{least}, ∞)" if self.max is None else f"{least}, {self.max}]"

    def check(self, where: str, value: Any) -> Any:
        """``value``, normalised; UsageError naming ``where`` if type or range is wrong."""
        if value is None and self.default is None:
            return None
        if any(type(value) is type(a) and value == a for a in self.also):
            return value
        wrong = not isinstance(value, PARAMETER_TYPES[self.type])
        wrong |= isinstance(value, bool) and self.type != "bool"
        if wrong:
            also = f" or {', '.join(map(repr, self.also))}" if self.also else ""
            raise UsageError(where, f"expected {self.type}{also}, got {value!r}")
        if self.type == "choice" and value not in self.choices:
            raise UsageError(where, f"{value!r} is not a choice{nearest(value, self.choices)}")
        if self.type in ("float", "int"):
            low, high = self.min, self.max
            if not _finite(value) or (low is not None and value < low) or (high is not None and value > high):
                raise UsageError(where, f"{value!r} is outside {self.interval}")
        if self.type == "list":
            self._check_list(where, value)
        if self.type == "float":
            return float(value)
        return list(value) if self.type in ("list", "attacks") else value

    def _check_list(self, where: str, value: Any) -> None:
        """Finite; of a list with a range, or of numbers by default, only numbers in the range, and one at least unless
        there is none by default."""
        if not all(_finite(v) for v in value):
            raise UsageError(where, f"holds a number that is not finite: {value!r}")
        ranged = self.min is not None or self.max is not None
        if not ranged and not (self.default and all(type(v) in (int, float) for v in self.default)):
            return
        low = -math.inf if self.min is None else self.min
        high = math.inf if self.max is None else self.max
        bad = [v for v in value if type(v) not in (int, float) or not low <= v <= high]
        if bad or not (value or self.default == []):
            got = f"{bad[0]!r}" if bad else "an empty list"
            within = f" in {self.interval}" if ranged else ""
            raise UsageError(where, f"takes numbers{within}, got {got}")


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
    unlabelled: bool = False
    """Whether of the rows that ``data`` names only the inputs are looked at."""
    modalities: tuple[str, ...] = ("image", "text")
    modality: str = ""
    output: str = "static"
    """Of a merge: ``static`` (one set of weights) or ``per_task`` (weights, masks or adapters per task)."""
    experts: tuple[int, int] = (1, 0)
    """Fewest and most experts a merge takes; 0 = any number."""
    seeded: bool = False
    siblings: str = ""
    references: str = ""
    """Of a backdoor defense: the parameter that says how many malicious experts per task it makes for itself
    (``Defense.reference``) and is handed as ``ctx.references``."""
    after_reference: tuple[str, ...] = ()
    """Parameters that ``reference`` does not read: variants that differ in them share these experts."""
    after_examine: tuple[str, ...] = ()
    """Parameters that ``examine`` does not read: variants that differ in them share its findings."""
    wraps: str = ""
    """The parameter of type ``merging`` (of an attack: ``attacks``) naming what this one works around."""
    tries: bool = False
    """Whether an attack tries merges on the tuning split, and so depends on the merge method."""
    queries: bool = False
    """Whether an attack on a protection calls the published expert (``ctx.answers``) and not only reads its weights: it
    then depends on how the defense has it served."""
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
    inspect: str = ""
    """``module:function`` that looks at a backbone's folder and its experts', or at a task's parameters, when a grid is
    planned, without torch.
    Only this project's own are called: planning runs nobody else's code."""
    inspect_tasks: str = ""
    """Likewise of a backbone, with the classes of the grid's tasks (``labels``); for ``zero_shot`` with their prompts."""
    inspect_answers: str = ""
    """Likewise of a language model, with the rows (prompt, answer) of the grid's tasks of the modality ``answers``."""
    zero_shot: bool = False
    """Of a backbone: it makes heads from prompts, with a text tower."""
    templates: tuple[str, ...] = ()
    """Of a task: sentences with ``{}`` for the class, from which zero-shot heads are made."""
    hub: Mapping[str, Any] = field(default_factory=dict)
    """Of a task: where its data is on the Hugging Face hub, used when there is no local folder."""
    classes: int = 0
    labels: tuple[str, ...] = ()
    """Of a task: the names of its classes, where they do not hang on its data."""
    source: str = ""
    licence: str = ""
    images: Mapping[str, int] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    holds: tuple[str, ...] = ()
    """Conditions between parameters, such as ``low <= high``; ``conditions`` has their syntax."""

    def takes(self, modality: str) -> bool:
        """Whether it works on tasks of ``modality``. A method of images and text that looks at no data is one of
        weights alone, and works on all."""
        anything = self.data == "none" and {"image", "text"} <= set(self.modalities)
        return modality in self.modalities or (anything and self.kind != "backbone")

    def bind(self, where: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """All parameters with defaults filled in; UsageError for unknown names, bad values and values that
        contradict each other."""
        for name in given:
            if name not in self.parameters:
                hint = nearest(name, self.parameters) if self.parameters else "; it has none"
                raise UsageError(f"{where}.{name}", f"{self.name} has no such parameter{hint}")
        bound = {
            name: p.check(f"{where}.{name}", given[name]) if name in given else p.default
            for name, p in self.parameters.items()
        }
        for condition in self.holds:
            if is_broken(condition, bound):
                names = names_in(condition)
                first = next((n for n in names if n in given), names[0])
                beside = ", ".join(f"{n} {bound[n]!r}" for n in names if n != first)
                told = f"{bound[first]!r} does not go with {beside}" if beside else f"{bound[first]!r}"
                raise UsageError(f"{where}.{first}", f"{told}: {self.name} asks for {condition}")
        return bound
