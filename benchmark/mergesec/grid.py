"""GridSpec → every name bound → cells. No torch; 100,000 cells take seconds."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mergesec.cards import Card
from mergesec.catalog import Catalog, Entry
from mergesec.errors import UsageError, nearest
from mergesec.files import fingerprint
from mergesec.gridspec import GridSpec, Named

RECIPE_FIELDS: dict[str, type] = {
    "optimizer": str, "learning_rate": float, "weight_decay": float, "schedule": str, "warmup": float,
    "epochs": int, "batch_size": int, "gradient_clip": float, "precision": str, "max_train": int,
    "lora_rank": int, "lora_alpha": float, "steps": int, "augment": str,
}  # fmt: skip
RECIPE_LATER = {"steps": 0, "augment": "none"}
"""Fields added after results were stored, at their defaults: those are left out of the keys."""
RECIPE_CHOICES = {
    "optimizer": ("adamw", "sgd"), "schedule": ("cosine", "constant"),
    "precision": ("float32", "bfloat16", "float16"), "augment": ("none", "crop", "flip", "crop+flip"),
}  # fmt: skip


HUB_NAME = r"[\w.-]+/[\w.-]+(?:/[\w.-]+)?@[0-9a-f]{40}"
"""A model on the Hugging Face hub at a commit, perhaps one file of it."""


# --------------------------------------------------------------------------- resolving


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

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ref) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    @property
    def label(self) -> str:
        """Name with the parameters that differ from the defaults, as boards show it."""
        return f"{self.name}({self.shown})" if self.shown else self.name


NONE = Ref("none", "none", (), "", '"none"')


def make_ref(entry: Entry, given: Mapping[str, Any], where: str, catalog: Catalog) -> Ref:
    """Bind parameters and fix the identity: name, version, plugin digest, parameters, wrapped method."""
    card = entry.card
    bound = card.bind(where, given)
    inner: tuple[Ref, ...] = ()
    if card.wraps:
        inner = _inner(card, bound[card.wraps], f"{where}.{card.wraps}", catalog)
        labels = [ref.label for ref in inner]
        bound[card.wraps] = labels if card.parameters[card.wraps].type == "attacks" else labels[0]
    changed = {k: v for k, v in bound.items() if v != card.parameters[k].default}
    shown = ", ".join(f"{k}={_short(v)}" for k, v in sorted(changed.items()))
    readers = {"path": _path_content, "model": _model_content}
    content = {
        k: readers[card.parameters[k].type](f"{where}.{k}", v)
        for k, v in bound.items()
        if card.parameters[k].type in readers
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
    return Ref(card.kind, card.name, frozen, shown, text, digest, inner)


def trigger_ref(attack: Ref, catalog: Catalog) -> Ref:
    """The attack as its trigger knows it: the one named by ``trigger_of``, and parameters named by
    ``after_trigger`` at their defaults."""
    card = catalog.get("attack", attack.name).card
    if card.trigger_of:
        parent = catalog.get("attack", card.trigger_of, f"{card.name}: card.trigger_of")
        given = {k: v for k, v in attack.parameters if k not in card.after_trigger}
        return trigger_ref(make_ref(parent, given, f"{card.name}: card.trigger_of", catalog), catalog)
    if not card.after_trigger:
        return attack
    after = {name: card.parameters[name].default for name in card.after_trigger}
    identity = json.loads(attack.text)
    told = {k: v for k, v in identity["parameters"].items() if k not in after}
    identity["parameters"] = told | {k: v for k, v in after.items() if not card.parameters[k].later}
    bound = {k: list(v) if isinstance(v, tuple) else v for k, v in attack.parameters} | after
    frozen = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in sorted(bound.items()))
    changed = {k: v for k, v in bound.items() if v != card.parameters[k].default}
    shown = ", ".join(f"{k}={_short(v)}" for k, v in sorted(changed.items()))
    text = json.dumps(identity, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]
    return Ref(attack.kind, attack.name, frozen, shown, text, digest, attack.inner)


def _inner(card: Card, value: Any, where: str, catalog: Catalog) -> tuple[Ref, ...]:
    """What is wrapped: names, or ``{name: ..., parameter: value}``. One merge method with one set of weights,
    or attacks of the same hooks."""
    if card.parameters[card.wraps].type == "attacks":
        refs = tuple(_expand(value, "attack", where, catalog))
        for ref in refs:
            other = catalog.get("attack", ref.name).card if ref is not NONE else None
            if other is None or other.hooks != card.hooks or other.wraps:
                raise UsageError(
                    where, f"{card.name} cannot try {ref.name}; it tries attacks that {card.hooks[0]}"
                )
        return refs
    refs = tuple(_expand([value], "merging", where, catalog))
    if len(refs) != 1:
        raise UsageError(where, "wraps one merge method; lists of its parameters are not expanded here")
    wrapped = catalog.get("merging", refs[0].name).card
    if wrapped.wraps or wrapped.output != "static":
        raise UsageError(where, f"{card.name} cannot wrap {wrapped.name}: it needs one set of merged weights")
    outer = catalog.get("merging", card.name).load()
    if reason := outer.unfit_inner(catalog.get("merging", wrapped.name).load()):
        raise UsageError(where, f"{card.name} cannot wrap {wrapped.name}: {reason}")
    return refs


def _series(distribution: str) -> str:
    """What of a version may decide results: the major number; before 1.0, where minor releases break, both."""
    try:
        major, *rest = version(distribution).split(".")
    except PackageNotFoundError:
        return ""
    return f"{major}.{rest[0]}" if major == "0" and rest else major


def _path_content(where: str, value: Any) -> str | None:
    """What a path parameter contributes to identity: the content, never the place."""
    if value is None:
        return None
    if not Path(value).exists():
        raise UsageError(where, f"no file or folder {value!r}")
    return fingerprint(Path(value))


def _model_content(where: str, value: str) -> str:
    """A local file or folder counts by content; a name on the hub by its commit, which it must give."""
    if value and Path(value).expanduser().exists():
        return fingerprint(Path(value).expanduser())
    if not re.fullmatch(HUB_NAME, value):
        raise UsageError(
            where, f"no file or folder {value!r}; a model of the hub is named owner/name@commit (40 digits)"
        )
    return value


def _short(value: Any) -> str:
    if isinstance(value, str) and "/" in value:
        return Path(value.partition("@")[0] if re.fullmatch(HUB_NAME, value) else value).name
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return str(value)


def _expand(items: Iterable[Named], kind: str, where: str, catalog: Catalog) -> list[Ref]:
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
            for key, values in ((k, _values(entry, k, v)) for k, v in given.items())
        ]
        refs += [make_ref(entry, dict(combo), spot, catalog) for combo in itertools.product(*choices)]
    doubled = [r for r, n in Counter(refs).items() if n > 1]
    if doubled:
        raise UsageError(where, f"{doubled[0].label} is named twice")
    alike = [label for label, n in Counter(r.label for r in refs).items() if n > 1]
    if alike:  # boards tell rows apart by label alone
        raise UsageError(where, f"two entries would both be shown as {alike[0]}; rename a file or folder")
    return refs


def _values(entry: Entry, name: str, value: Any) -> list[Any]:
    parameter = entry.card.parameters.get(name)
    if not isinstance(value, list):
        return [value]
    takes_lists = parameter is not None and parameter.type in ("list", "attacks")
    single = takes_lists and not any(isinstance(v, list) for v in value)
    return [value] if single else value


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the grid. ``subject`` is the victim (protection) or adversary (backdoor) task."""

    threat: str
    merging: Ref
    attack: Ref
    defense: Ref
    subject: str
    target_class: int
    experts: tuple[str, ...]
    seed: int
    protected: int = 1
    """How many of the experts are protected (protection only): the victim and those after it."""
    secrets: str = "own"
    """Whether each protected expert has its own secret or all share one."""
    adversaries: int = 1
    """How many contributors are malicious (backdoor only): the subject's and those after it."""
    target_task: str = ""
    """Off-task (backdoor only): the task that the target class belongs to; empty: the subject's own."""

    @property
    def aim(self) -> str:
        """The task on which a backdoor is meant to work."""
        return self.target_task or self.subject

    @property
    def crew(self) -> tuple[str, ...]:
        """The tasks of the malicious contributors, the subject first."""
        return accomplices(self.experts, self.subject, self.target_task)[: self.adversaries]

    @property
    def owners(self) -> tuple[str, ...]:
        """The tasks whose experts are protected, the victim first, then in suite order around it."""
        place = self.experts.index(self.subject)
        return tuple(self.experts[(place + i) % len(self.experts)] for i in range(self.protected))


def accomplices(experts: Sequence[str], subject: str, target_task: str) -> tuple[str, ...]:
    """Tasks whose contributors can be malicious together: the subject, then in suite order around it. The task
    aimed at off-task is a victim and never among them."""
    place = list(experts).index(subject)
    ring = (experts[(place + i) % len(experts)] for i in range(len(experts)))
    return tuple(t for t in ring if t != target_task)


@dataclass(frozen=True)
class Grid:
    """A grid with every name resolved against the catalogue."""

    spec: GridSpec
    catalog: Catalog
    backbone: Ref
    tasks: tuple[Ref, ...]
    merging: tuple[Ref, ...]
    attacks: tuple[Ref, ...]
    defenses: tuple[Ref, ...]
    recipe: tuple[tuple[str, Any], ...]
    published: Mapping[str, Ref] = field(default_factory=dict)
    """Published experts by task; known by their content."""
    left_out: Counter[str] = field(default_factory=Counter)

    def task(self, name: str) -> Ref:
        return next(t for t in self.tasks if t.name == name)


def resolve(spec: GridSpec, catalog: Catalog) -> Grid:
    """Bind every name and parameter; UsageError names the field that does not fit."""
    (backbone,) = _expand([spec.suite.backbone], "backbone", "suite.backbone", catalog)
    tasks = _expand(spec.suite.tasks, "task", "suite.tasks", catalog)
    names = [t.name for t in tasks]
    modalities = catalog.get("backbone", backbone.name).card.modalities
    for i, task in enumerate(tasks):
        modality = catalog.get("task", task.name).card.modality
        if modality not in modalities:
            raise UsageError(
                f"suite.tasks[{i}]",
                f"{task.name} is {modality}; {backbone.name} takes {', '.join(modalities)}",
            )
    if len(set(names)) != len(names):
        raise UsageError("suite.tasks", "a task is named twice")
    axes = spec.axes
    for axis in ("victim", "adversary"):
        value = getattr(axes, axis)
        for name in value if value != "all" else ():
            if name not in names:
                raise UsageError(f"axes.{axis}", f"{name!r} is not a task of the suite{nearest(name, names)}")
    for i, name in enumerate(axes.target_task):
        if name and name not in names:
            hint = nearest(name, names)
            raise UsageError(f"axes.target_task[{i}]", f"{name!r} is not a task of the suite{hint}")
    for i, count in enumerate(axes.adversaries):
        if count > len(names):
            raise UsageError(f"axes.adversaries[{i}]", f"{count} is outside [1, {len(names)}]")
    for i, experts in enumerate(axes.experts):
        _check_experts(f"axes.experts[{i}]", experts, names)
    smallest = min((catalog.get("task", n).card.classes for n in names), default=0)
    for target in axes.target_class:
        if target < 0 or (smallest and target >= smallest):
            raise UsageError("axes.target_class", f"{target} is outside [0, {smallest - 1}]")
    fixed = dict(catalog.get("backbone", backbone.name).card.recipe)
    bound = {**fixed, **_check_recipe(spec.recipe)}
    recipe = tuple(sorted((k, v) for k, v in bound.items() if RECIPE_LATER.get(k) != v))
    grid = Grid(
        spec, catalog, backbone, tuple(tasks),
        tuple(_expand(axes.merging, "merging", "axes.merging", catalog)),
        tuple(_expand(axes.attacks, "attack", "axes.attacks", catalog)),
        tuple(_expand(axes.defenses, "defense", "axes.defenses", catalog)),
        recipe,
        _published(spec.suite.experts, names),
    )  # fmt: skip
    doubled = [seed for seed, n in Counter(spec.seeds).items() if n > 1]
    if doubled:
        raise UsageError("seeds", f"{doubled[0]} is named twice")
    for listname in ("include", "exclude"):
        for i, pattern in enumerate(getattr(spec, listname)):
            _check_pattern(f"{listname}[{i}]", pattern, catalog)
    return grid


def _published(experts: Mapping[str, str], names: list[str]) -> dict[str, Ref]:
    """What stands in for fine-tuning, by task: identity is the content, the place only a parameter."""
    found = {}
    for task, source in experts.items():
        where = f"suite.experts.{task}"
        if task not in names:
            raise UsageError(where, f"{task!r} is not a task of the suite{nearest(task, names)}")
        text = json.dumps({"kind": "published", "content": _model_content(where, source)}, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:32]
        found[task] = Ref("published", task, (("source", source),), _short(source), text, digest)
    return found


def _check_pattern(where: str, pattern: Mapping[str, Any], catalog: Catalog) -> None:
    """Keys and values that could match some grid: an override may have taken an axis's value away."""
    for key, wanted in pattern.items():
        if key not in _PATTERN_KEYS:
            raise UsageError(f"{where}.{key}", f"unknown{nearest(key, _PATTERN_KEYS)}")
        kind = {"subject": "task", "target_task": "task"}.get(key, key)
        known = ["none", *catalog.entries[kind]] if kind in catalog.entries else list(_THREATS)
        if key == "target_task":
            known.append("")
        for value in wanted if isinstance(wanted, (list, tuple)) else [wanted]:
            if key in ("target_class", "experts", "seed", "protected", "adversaries"):
                if type(value) is not int:
                    raise UsageError(f"{where}.{key}", f"expected a number, got {value!r}")
            elif str(value).partition("(")[0] not in known:
                raise UsageError(f"{where}.{key}", f"unknown {value!r}{nearest(value, known)}")


def _check_experts(where: str, experts: int | str | tuple[str, ...], names: list[str]) -> None:
    if isinstance(experts, bool) or (isinstance(experts, int) and not 2 <= experts <= len(names)):
        raise UsageError(where, f"{experts!r} is outside [2, {len(names)}]")
    if isinstance(experts, str) and experts not in ("all", "pairs"):
        raise UsageError(where, f"{experts!r}{nearest(experts, ('all', 'pairs'))}")
    for name in experts if isinstance(experts, tuple) else ():
        if name not in names:
            raise UsageError(where, f"{name!r} is not a task of the suite{nearest(name, names)}")


def _check_recipe(given: Mapping[str, Any]) -> dict[str, Any]:
    checked: dict[str, Any] = {}
    for key, value in given.items():
        if key not in RECIPE_FIELDS:
            raise UsageError(f"recipe.{key}", f"unknown{nearest(key, RECIPE_FIELDS)}")
        kind = RECIPE_FIELDS[key]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if (kind is float and not number) or (kind is not float and type(value) is not kind):
            raise UsageError(f"recipe.{key}", f"expected {kind.__name__}, got {value!r}")
        if key in RECIPE_CHOICES and value not in RECIPE_CHOICES[key]:
            raise UsageError(f"recipe.{key}", f"{value!r}{nearest(value, RECIPE_CHOICES[key])}")
        if number and (value < 0 or (value == 0 and key in ("epochs", "batch_size", "learning_rate"))):
            raise UsageError(f"recipe.{key}", f"must be positive, got {value!r}")
        checked[key] = kind(value)
    return checked


# --------------------------------------------------------------------------- cells

_THREATS = ("clean", "protection", "backdoor")
_PATTERN_KEYS = (
    "threat", "merging", "attack", "defense", "subject", "target_class", "experts", "seed", "protected", "secrets",
    "adversaries", "target_task",
)  # fmt: skip


def why_not(grid: Grid, threat: str, merging: Ref, attack: Ref, defense: Ref, count: int = 0) -> str:
    """Why this combination makes no sense; empty if it does. Decided from cards alone."""
    catalog = grid.catalog
    modality = catalog.get("task", grid.tasks[0].name).card.modality
    for ref in (attack, defense):
        if ref is NONE:
            continue
        card = catalog.get(ref.kind, ref.name).card
        if threat == "clean":
            return f"clean grids take no {ref.kind}"
        if card.threat != threat:
            return f"{ref.kind} {ref.name} belongs to {card.threat}, not {threat}"
        if modality not in card.modalities:
            return f"{ref.kind} {ref.name} does not work on {modality}"
    card = catalog.get("merging", merging.name).card
    if modality not in card.modalities:
        return f"merging {merging.name} does not work on {modality}"
    fewest, most = card.experts
    if count and (count < fewest or (most and count > most)):
        span = f"{fewest}" if fewest == most else f"at least {fewest}" if not most else f"{fewest} to {most}"
        return f"merging {merging.name} takes {span} experts, not {count}"
    if defense is not NONE:
        repairer = catalog.get("defense", defense.name).card
        if "repair" in repairer.hooks and card.output != "static" and not repairer.per_task:
            return f"{defense.name} repairs one network; {merging.name} keeps weights per task"
    return ""


def _companions(
    experts: int | str | tuple[str, ...], subject: str, names: list[str]
) -> list[tuple[str, ...]]:
    """The merged tasks, in suite order, for one value of the experts axis."""
    if experts == "all":
        sets = [tuple(names)]
    elif experts == "pairs":
        sets = [(subject, other) for other in names if other != subject]
    elif isinstance(experts, int):
        start = names.index(subject)
        sets = [tuple(names[(start + i) % len(names)] for i in range(experts))]
    else:
        sets = [tuple(dict.fromkeys((*((subject,) if subject else ()), *experts)))]
    return [tuple(sorted(s, key=names.index)) for s in sets]


def _subjects(grid: Grid, threat: str) -> list[tuple[str, int]]:
    names = [t.name for t in grid.tasks]
    axes = grid.spec.axes
    if threat == "protection":
        return [(n, 0) for n in (names if axes.victim == "all" else axes.victim)]
    if threat == "backdoor":
        tasks = names if axes.adversary == "all" else axes.adversary
        return [(n, c) for n in tasks for c in axes.target_class]
    return [("", 0)]


def _matches(pattern: Mapping[str, Any], cell: Cell) -> bool:
    for key, wanted in pattern.items():
        value = getattr(cell, key)
        options = wanted if isinstance(wanted, (list, tuple)) else [wanted]
        if isinstance(value, Ref):
            names: tuple[Any, ...] = (value.name, value.label)
        else:
            names = (len(value),) if key == "experts" else (value,)
        if not any(n == o for n in names for o in options):
            return False
    return True


def _variants(grid: Grid, threat: str, attack: Ref) -> list[tuple[int, str, int, str]]:
    """(protected, secrets, adversaries, target task): how many experts are protected, with whose secrets, and
    how many are malicious, at whose class they aim. One protected expert has only its own secret; without an
    attack nobody is malicious."""
    axes = grid.spec.axes
    if threat == "protection":
        return list(
            dict.fromkeys((n, how if n > 1 else "own", 1, "") for n in axes.protected for how in axes.secrets)
        )
    if threat == "backdoor" and attack is not NONE:
        return list(dict.fromkeys((1, "own", n, aim) for n in axes.adversaries for aim in axes.target_task))
    return [(1, "own", 1, "")]


def _no_cell(grid: Grid, cell: Cell) -> str:
    """Why a cell's own coordinates make no sense together; empty if they do."""
    if cell.protected > len(cell.experts):
        return "more protected experts than experts"
    if cell.target_task:
        if not grid.catalog.get("attack", cell.attack.name).card.off_task:
            return f"attack {cell.attack.name} has no off-task form"
        if cell.target_task == cell.subject:
            return "the target task is the adversary's own"
        if cell.target_task not in cell.experts:
            return "the target task is not among the experts"
    if cell.adversaries > 1:
        able = accomplices(cell.experts, cell.subject, cell.target_task)
        if cell.adversaries > len(able):
            return "more adversaries than experts"
    return why_not(grid, cell.threat, cell.merging, cell.attack, cell.defense, len(cell.experts))


def _merges(grid: Grid, threat: str) -> list[tuple[str, int, tuple[str, ...]]]:
    """(subject, target class, merged tasks) of every merge, once."""
    names = [t.name for t in grid.tasks]
    merges = []
    for experts in grid.spec.axes.experts:
        for subject, target in _subjects(grid, threat):
            anchor = subject or names[0]
            if threat == "clean" and experts == "pairs":
                sets: list[tuple[str, ...]] = list(itertools.combinations(names, 2))
            else:
                sets = _companions(experts, anchor if isinstance(experts, int) else subject, names)
            merges += [(subject, target, s) for s in sets if len(s) > 1]
    return list(dict.fromkeys(merges))


def cells(grid: Grid) -> Iterator[Cell]:
    """Every cell that makes sense, once. What is left out is counted in ``grid.left_out``."""
    spec = grid.spec
    grid.left_out.clear()
    for threat in dict.fromkeys(spec.threats):
        merges = _merges(grid, threat)
        for merging, attack, defense in itertools.product(grid.merging, grid.attacks, grid.defenses):
            variants = _variants(grid, threat, attack)
            reason = why_not(grid, threat, merging, attack, defense)
            if reason:
                grid.left_out[reason] += len(merges) * len(spec.seeds) * len(variants)
                continue
            for (subject, target, tasks), seed, variant in itertools.product(merges, spec.seeds, variants):
                cell = Cell(threat, merging, attack, defense, subject, target, tasks, seed, *variant)
                reason = _no_cell(grid, cell)
                if reason:
                    grid.left_out[reason] += 1
                elif spec.include and not any(_matches(p, cell) for p in spec.include):
                    grid.left_out["not in include"] += 1
                elif any(_matches(p, cell) for p in spec.exclude):
                    grid.left_out["excluded"] += 1
                else:
                    yield cell
