"""GridSpec → a Grid with every name bound and every field checked."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from mergesec.errors import UsageError, nearest
from mergesec.planning.cards import Card
from mergesec.planning.catalog import Catalog
from mergesec.planning.gridspec import GridSpec, Named
from mergesec.planning.refs import Ref, expand, model_content, packaged, short
from mergesec.recipes import check_recipe, recipe_identity
from mergesec.threats import Company, Secrets, Threat

_PATTERN_KEYS = (
    "threat", "merging", "attack", "defense", "subject", "target_class", "experts", "seed", "protected", "secrets",
    "adversaries", "target_task", "company",
)  # fmt: skip


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
    backbone = _one_backbone(spec.suite.backbone, catalog)
    tasks = expand(spec.suite.tasks, "task", "suite.tasks", catalog)
    names = [t.name for t in tasks]
    modalities = catalog.get("backbone", backbone.name).card.modalities
    for i, task in enumerate(tasks):
        modality = catalog.get("task", task.name).card.modality
        if modality not in modalities:
            raise UsageError(
                f"suite.tasks[{i}]",
                f"{task.name} is {modality}; {backbone.name} takes {', '.join(modalities)}",
            )
        _inspect_task(f"suite.tasks[{i}]", task, catalog)
    if len(set(names)) != len(names):
        raise UsageError("suite.tasks", "a task is named twice")
    _inspect_tasks(backbone, {n: catalog.get("task", n).card for n in names}, catalog)
    _inspect_answers(backbone, tasks, catalog)
    axes = spec.axes
    _check_filled(spec)
    for axis in ("victim", "adversary"):
        value = getattr(axes, axis)
        for name in value if value != "all" else ():
            if name not in names:
                raise UsageError(f"axes.{axis}", f"{name!r} is not a task of the suite{nearest(name, names)}")
    for i, name in enumerate(axes.target_task):
        if name and name not in names:
            hint = nearest(name, names)
            raise UsageError(f"axes.target_task[{i}]", f"{name!r} is not a task of the suite{hint}")
    for axis in ("adversaries", "protected"):
        for i, count in enumerate(getattr(axes, axis)):
            if count > len(names):
                raise UsageError(f"axes.{axis}[{i}]", f"{count} is outside [1, {len(names)}]")
    for i, experts in enumerate(axes.experts):
        _check_experts(f"axes.experts[{i}]", experts, names)
    _check_targets(spec, {n: catalog.get("task", n).card.classes for n in names})
    fixed = dict(catalog.get("backbone", backbone.name).card.recipe)
    bound = {**fixed, **check_recipe("recipe", spec.recipe)}
    recipe = recipe_identity(bound)
    for axis, kind in (("merging", "merging"), ("attacks", "attack"), ("defenses", "defense")):
        for i, item in enumerate(getattr(axes, axis)):
            _check_tasks(f"axes.{axis}[{i}]", item, kind, names, catalog)
    grid = Grid(
        spec, catalog, backbone, tuple(tasks),
        tuple(expand(axes.merging, "merging", "axes.merging", catalog)),
        tuple(expand(axes.attacks, "attack", "axes.attacks", catalog)),
        tuple(expand(axes.defenses, "defense", "axes.defenses", catalog)),
        recipe,
        _published(spec.suite.experts, names, backbone, catalog),
    )  # fmt: skip
    doubled = [seed for seed, n in Counter(spec.seeds).items() if n > 1]
    if doubled:
        raise UsageError("seeds", f"{doubled[0]} is named twice")
    for listname in ("include", "exclude"):
        for i, pattern in enumerate(getattr(spec, listname)):
            _check_pattern(f"{listname}[{i}]", pattern, catalog)
    return grid


def _one_backbone(given: Named, catalog: Catalog) -> Ref:
    """A list of a parameter's values is an axis elsewhere; of backbones a grid has one."""
    found = expand([given], "backbone", "suite.backbone", catalog)
    if len(found) > 1 and isinstance(given, dict):
        name = next(name for name, value in given.items() if isinstance(value, list))
        raise UsageError(
            f"suite.backbone.{name}",
            f"{given[name]!r} makes {len(found)} backbones, a grid has one; run it once for each",
        )
    return found[0]


def _check_filled(spec: GridSpec) -> None:
    """An empty list crosses with nothing: no cell would be left, and nobody told why."""
    lists = {f"axes.{name}": getattr(spec.axes, name) for name in type(spec.axes).model_fields}
    for field_name, values in {"threats": spec.threats, **lists}.items():
        if values == ():
            raise UsageError(field_name, "is an empty list; leave the field out for its default")


def _check_targets(spec: GridSpec, classes: Mapping[str, int]) -> None:
    """UsageError for a target that is not a class of every task, as far as their cards tell how many they have."""
    targets, untold = spec.axes.target_class, [n for n, count in classes.items() if not count]
    if targets == "drawn":
        if untold and Threat.BACKDOOR in spec.threats:
            raise UsageError(
                "axes.target_class", f"'drawn' needs the number of classes of every task, and that of {untold[0]} lies "
                "in its data; list the target classes instead",
            )  # fmt: skip
        return
    smallest = min((count for count in classes.values() if count), default=0)
    for target in targets:
        if target < 0 or (smallest and target >= smallest):
            most = str(smallest - 1) if smallest else "..."
            raise UsageError("axes.target_class", f"{target} is outside [0, {most}]")


def _published(
    experts: Mapping[str, str], names: list[str], backbone: Ref, catalog: Catalog
) -> dict[str, Ref]:
    """What stands in for fine-tuning, by task: identity is the content, the place only a parameter."""
    for task in experts:
        if task not in names:
            raise UsageError(
                f"suite.experts.{task}", f"{task!r} is not a task of the suite{nearest(task, names)}"
            )
    experts = {task: packaged(f"suite.experts.{task}", source) for task, source in experts.items()}
    _inspect(backbone, {f"suite.experts.{task}": source for task, source in experts.items()}, catalog)
    found = {}
    for task, source in experts.items():
        where = f"suite.experts.{task}"
        text = json.dumps({"kind": "published", "content": model_content(where, source)}, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:32]
        found[task] = Ref("published", task, (("source", source),), short(source), text, digest)
    return found


def _inspect(backbone: Ref, experts: Mapping[str, str], catalog: Catalog) -> None:
    """UsageError for a base, or an expert, that the backbone would refuse later."""
    entry = catalog.get("backbone", backbone.name)
    if entry.card.inspect and not entry.digest:
        module, _, function = entry.card.inspect.partition(":")
        inspect = getattr(importlib.import_module(module), function)
        inspect(backbone.name, dict(backbone.parameters), "suite.backbone", experts)


def _inspect_tasks(backbone: Ref, cards: Mapping[str, Card], catalog: Catalog) -> None:
    """UsageError for tasks whose classes the backbone cannot tell apart, or whose prompts it cannot read, as far as
    their cards name them."""
    entry = catalog.get("backbone", backbone.name)
    if entry.card.inspect_tasks and not entry.digest:
        module, _, function = entry.card.inspect_tasks.partition(":")
        inspect = getattr(importlib.import_module(module), function)
        texts = {name: _texts(card, entry.card.zero_shot) for name, card in cards.items()}
        inspect(dict(backbone.parameters), "suite.backbone", {n: told for n, told in texts.items() if told})


def _inspect_answers(backbone: Ref, tasks: Sequence[Ref], catalog: Catalog) -> None:
    """UsageError for prompts whose answers do not fit behind them. Such tasks write their rows themselves."""
    entry = catalog.get("backbone", backbone.name)
    if not entry.card.inspect_answers or entry.digest:
        return
    rows: dict[str, list[tuple[str, str]]] = {}
    for task in tasks:
        found = catalog.get("task", task.name)
        if found.card.modality == "answers" and not found.digest:
            component = found.load()(**dict(task.parameters))
            every = (*component.written().values(), *component.others().values())
            rows[task.name] = [row for some in every for row in some]
    if rows:
        module, _, function = entry.card.inspect_answers.partition(":")
        inspect = getattr(importlib.import_module(module), function)
        inspect(dict(backbone.parameters), "suite.backbone", rows)


def _texts(card: Card, prompts: bool) -> list[str]:
    """The names of a task's classes, or its prompts with them; without any name where the card tells none."""
    if prompts:
        return [template.format(name) for template in card.templates for name in card.labels or ("",)]
    return list(card.labels)


def _inspect_task(where: str, task: Ref, catalog: Catalog) -> None:
    """UsageError for parameters of a task that it would refuse later."""
    entry = catalog.get("task", task.name)
    if entry.card.inspect and not entry.digest:
        module, _, function = entry.card.inspect.partition(":")
        getattr(importlib.import_module(module), function)(task.name, dict(task.parameters), where)


def _check_pattern(where: str, pattern: Mapping[str, Any], catalog: Catalog) -> None:
    """Keys and values that could match some grid: an override may have taken an axis's value away."""
    for key, wanted in pattern.items():
        if key not in _PATTERN_KEYS:
            raise UsageError(f"{where}.{key}", f"unknown{nearest(key, _PATTERN_KEYS)}")
        kind = {"subject": "task", "target_task": "task"}.get(key, key)
        known = ["none", *catalog.entries[kind]] if kind in catalog.entries else _words(key)
        if key == "target_task":
            known.append("")
        for value in wanted if isinstance(wanted, (list, tuple)) else [wanted]:
            if key in ("target_class", "experts", "seed", "protected", "adversaries"):
                if type(value) is not int:
                    raise UsageError(f"{where}.{key}", f"expected a number, got {value!r}")
            elif str(value).partition("(")[0] not in known:
                raise UsageError(f"{where}.{key}", f"unknown {value!r}{nearest(value, known)}")


def _words(key: str) -> list[str]:
    """The values of a coordinate that is one of a few words."""
    words = {"secrets": get_args(Secrets), "company": get_args(Company)}
    return list(words.get(key, [str(t) for t in Threat]))


def _check_tasks(where: str, item: Named, kind: str, names: list[str], catalog: Catalog) -> None:
    """A parameter that names one of the merged tasks, names one of the suite's."""
    given = {"name": item} if isinstance(item, str) else item
    if given.get("name") == "none" or not isinstance(given.get("name"), str):
        return
    for key, parameter in catalog.get(kind, given["name"], where).card.parameters.items():
        value = given.get(key, parameter.default)
        for name in (value if isinstance(value, list) else [value]) if parameter.type == "task" else ():
            if not name:
                raise UsageError(f"{where}.{key}", f"has to name a task of the suite: {', '.join(names)}")
            if name not in names:
                raise UsageError(
                    f"{where}.{key}", f"{name!r} is not a task of the suite{nearest(name, names)}"
                )


def _check_experts(where: str, experts: int | str | tuple[str, ...], names: list[str]) -> None:
    if isinstance(experts, bool) or (isinstance(experts, int) and not 2 <= experts <= len(names)):
        raise UsageError(where, f"{experts!r} is outside [2, {len(names)}]")
    if isinstance(experts, str) and experts not in ("all", "pairs"):
        raise UsageError(where, f"{experts!r}{nearest(experts, ('all', 'pairs'))}")
    if experts == ():
        raise UsageError(where, f"is an empty list; list tasks of the suite: {', '.join(names)}")
    for name in experts if isinstance(experts, tuple) else ():
        if name not in names:
            raise UsageError(where, f"{name!r} is not a task of the suite{nearest(name, names)}")
        if isinstance(experts, tuple) and experts.count(name) > 1:
            raise UsageError(where, f"{name!r} is named twice")
