"""The points of a grid: every combination that makes sense, once. 100,000 take seconds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from mergesec.planning.cards import Parameter
from mergesec.planning.refs import NONE, Ref
from mergesec.planning.resolve import Grid
from mergesec.planning.seeds import draw_seed
from mergesec.threats import Company, Hook, Secrets, Threat, accomplices, in_company


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the grid. ``subject`` is the victim (protection) or adversary (backdoor) task."""

    threat: Threat
    merging: Ref
    attack: Ref
    defense: Ref
    subject: str
    target_class: int
    experts: tuple[str, ...]
    seed: int
    protected: int = 1
    """How many of the experts are protected (protection only): the victim and those after it."""
    secrets: Secrets = "own"
    """Whether each protected expert has its own secret or all share one."""
    adversaries: int = 1
    """How many contributors are malicious (backdoor only): the subject's and those after it."""
    target_task: str = ""
    """Off-task (backdoor only): the task that the target class belongs to; empty: the subject's own."""
    company: Company = "next"

    @property
    def aim(self) -> str:
        """The task on which a backdoor is meant to work."""
        return self.target_task or self.subject

    @property
    def crew(self) -> tuple[str, ...]:
        """The tasks of the malicious contributors, the subject first."""
        able = accomplices(self.experts, self.subject, self.target_task, self.company, self.seed)
        return able[: self.adversaries]

    @property
    def owners(self) -> tuple[str, ...]:
        """The tasks whose experts are protected, the victim first."""
        return in_company(self.experts, self.subject, self.company, self.seed)[: self.protected]


def why_not(grid: Grid, threat: str, merging: Ref, attack: Ref, defense: Ref, count: int = 0) -> str:
    """Why this combination makes no sense; empty if it does. Decided from cards alone."""
    catalog = grid.catalog
    modality = catalog.get("task", grid.tasks[0].name).card.modality
    for ref in (attack, defense):
        if ref is NONE:
            continue
        card = catalog.get(ref.kind, ref.name).card
        if threat == Threat.CLEAN:
            return f"clean grids take no {ref.kind}"
        if card.threat != threat:
            return f"{ref.kind} {ref.name} belongs to {card.threat}, not {threat}"
        if not card.takes(modality):
            return f"{ref.kind} {ref.name} does not work on {modality}"
    card = catalog.get("merging", merging.name).card
    if not card.takes(modality):
        return f"merging {merging.name} does not work on {modality}"
    fewest, most = card.experts
    if count and (count < fewest or (most and count > most)):
        span = f"{fewest}" if fewest == most else f"at least {fewest}" if not most else f"{fewest} to {most}"
        return f"merging {merging.name} takes {span} experts, not {count}"
    if defense is not NONE:
        repairer = catalog.get("defense", defense.name).card
        if Hook.REPAIR in repairer.hooks and card.output != "static" and not repairer.per_task:
            return f"{defense.name} repairs one network; {merging.name} keeps weights per task"
    return ""


def _companions(
    experts: int | str | tuple[str, ...], subject: str, names: list[str], company: Company, seed: int
) -> list[tuple[str, ...]]:
    """The merged tasks, in suite order, for one value of the experts axis."""
    if experts == "all":
        sets = [tuple(names)]
    elif experts == "pairs":
        sets = [(subject, other) for other in names if other != subject]
    elif isinstance(experts, int):
        sets = [in_company(names, subject, company, seed)[:experts]]
    else:
        sets = [tuple(dict.fromkeys((*((subject,) if subject else ()), *experts)))]
    return [tuple(sorted(s, key=names.index)) for s in sets]


def _subjects(grid: Grid, threat: str, seed: int) -> list[tuple[str, int]]:
    names = [t.name for t in grid.tasks]
    axes = grid.spec.axes
    if threat == Threat.PROTECTION:
        return [(n, 0) for n in (names if axes.victim == "all" else axes.victim)]
    if threat == Threat.BACKDOOR:
        tasks = names if axes.adversary == "all" else axes.adversary
        if axes.target_class == "drawn":
            classes = min(grid.catalog.get("task", n).card.classes for n in names)
            return [(n, draw_seed("target_class", n, seed) % classes) for n in tasks]
        return [(n, c) for n in tasks for c in axes.target_class]
    return [("", 0)]


def _matches(pattern: Mapping[str, Any], cell: Cell) -> bool:
    """Whether a rule is about a cell, whatever its seed."""
    for key, wanted in pattern.items():
        if key == "seed":
            continue
        value = getattr(cell, key)
        options = wanted if isinstance(wanted, (list, tuple)) else [wanted]
        if isinstance(value, Ref):
            names: tuple[Any, ...] = (value.name, value.label)
        else:
            names = (len(value),) if key == "experts" else (value,)
        if not any(n == o for n in names for o in options):
            return False
    return True


class Variant(NamedTuple):
    """How many experts are protected, with whose secrets, how many are malicious, at whose class they aim, and who
    they are."""

    protected: int = 1
    secrets: Secrets = "own"
    adversaries: int = 1
    target_task: str = ""
    company: Company = "next"


def _variants(grid: Grid, threat: str, attack: Ref) -> list[Variant]:
    """What a cell may differ in besides its methods. One protected expert has only its own secret; without an
    attack nobody is malicious."""
    axes = grid.spec.axes
    if threat == Threat.PROTECTION:
        pairs = itertools.product(axes.protected, axes.secrets)
        return list(
            dict.fromkeys(Variant(n, how if n > 1 else "own", company=axes.company) for n, how in pairs)
        )
    if threat == Threat.BACKDOOR and attack is not NONE:
        aims = itertools.product(axes.adversaries, axes.target_task)
        return list(dict.fromkeys(Variant(1, "own", n, aim, axes.company) for n, aim in aims))
    return [Variant()]


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
    reason = why_not(grid, cell.threat, cell.merging, cell.attack, cell.defense, len(cell.experts))
    return reason or _absent(grid, cell) or _coincidence(grid, cell)


def _absent(grid: Grid, cell: Cell) -> str:
    """Which parameter names a task that is not merged in this cell; empty if none does."""
    for outer in (cell.merging, cell.attack, cell.defense):
        for ref in (outer, *outer.inner):
            card = None if ref is NONE else grid.catalog.get(ref.kind, ref.name).card
            for name, value in ref.parameters:
                if card and card.parameters[name].type == "task" and value not in cell.experts:
                    return f"{ref.kind} {ref.name}: {name} {value!r} is not among the experts"
    return ""


def _coincidence(grid: Grid, cell: Cell) -> str:
    """Which parameter equals a secret of the other side that its card says it cannot know; empty if none does."""
    if cell.threat != Threat.BACKDOOR or cell.attack is NONE:
        return ""
    for ref in (cell.attack, cell.defense):
        if ref is NONE:
            continue
        card = grid.catalog.get(ref.kind, ref.name).card
        for name, value in ref.parameters:
            secret = card.parameters[name].secret
            if secret and _is_one(value, card.parameters[name], _secrets(grid, cell, secret)):
                told = f"{ref.kind} {ref.name}: {name} is {value}, which is the cell's {secret}"
                return f"{told}; it cannot know that"
    return ""


def _secrets(grid: Grid, cell: Cell, secret: str) -> set[Any]:
    """The values that a secret has in this cell."""
    if secret == "target_class":
        return {cell.target_class}
    whose, _, name = secret.partition(".")
    if whose == "rows":
        cards = (grid.catalog.get("task", task).card for task in cell.experts)
        return {card.images[name] for card in cards if name in card.images}
    ref = {"attack": cell.attack, "merging": cell.merging}[whose]
    parameter = grid.catalog.get(ref.kind, ref.name).card.parameters.get(name)
    value = dict(ref.parameters).get(name)
    if parameter is None or value is None:
        return set()
    return set(parameter.stands_for.get(value, ())) if isinstance(value, str) else {value}


def _is_one(value: Any, parameter: Parameter, secrets: set[Any]) -> bool:
    """Whether a value is one of the secrets; a whole number is what rounds to it."""
    return value in ({round(secret) for secret in secrets} if parameter.type == "int" else secrets)


class Contributed(NamedTuple):
    """What is merged, and whom the cell is about."""

    subject: str
    target_class: int
    tasks: tuple[str, ...]


def _merges(grid: Grid, threat: str, seed: int) -> list[Contributed]:
    """Every merge of a seed, once."""
    names = [t.name for t in grid.tasks]
    merges: list[Contributed] = []
    for experts in grid.spec.axes.experts:
        for subject, target in _subjects(grid, threat, seed):
            anchor = subject or names[0]
            if threat == Threat.CLEAN and experts == "pairs":
                sets: list[tuple[str, ...]] = list(itertools.combinations(names, 2))
            else:
                whose = anchor if isinstance(experts, int) else subject
                company = grid.spec.axes.company if subject else "next"
                sets = _companions(experts, whose, names, company, seed)
            merges += [Contributed(subject, target, s) for s in sets if len(s) > 1]
            if any(len(s) < 2 for s in sets):
                grid.left_out["one expert is nothing to merge"] += 1
    return list(dict.fromkeys(merges))


def _seeded_merges(grid: Grid, threat: str) -> list[tuple[Contributed, int]]:
    """Every merge with every seed; what is drawn differs between seeds."""
    spec = grid.spec
    if spec.axes.company == "drawn" or spec.axes.target_class == "drawn":
        return [(merge, seed) for seed in spec.seeds for merge in _merges(grid, threat, seed)]
    return list(itertools.product(_merges(grid, threat, spec.seeds[0]), spec.seeds))


def cells(grid: Grid) -> Iterator[Cell]:
    """Every cell that makes sense, once. What is left out is counted in ``grid.left_out``."""
    spec = grid.spec
    grid.left_out.clear()
    for threat in map(Threat, dict.fromkeys(spec.threats)):
        merges = _seeded_merges(grid, threat)
        for merging, attack, defense in itertools.product(grid.merging, grid.attacks, grid.defenses):
            variants = _variants(grid, threat, attack)
            reason = why_not(grid, threat, merging, attack, defense)
            if reason:
                grid.left_out[reason] += len(merges) * len(variants)
                continue
            known: dict[tuple[Any, ...], _Rules] = {}
            for (merge, seed), variant in itertools.product(merges, variants):
                cell = Cell(threat, merging, attack, defense, *merge, seed, **variant._asdict())
                place = (merge, variant)
                if place not in known:
                    known[place] = _Rules.of(grid, cell)
                reason = known[place].left_out(seed)
                if reason:
                    grid.left_out[reason] += 1
                else:
                    yield cell


class _Rules(NamedTuple):
    """What decides over the cells that differ in nothing but the seed."""

    reason: str
    """Why there are none; empty if there may be some."""
    include: list[Any]
    """Of each rule that takes them in, for which seeds; None for all."""
    exclude: list[Any]

    @classmethod
    def of(cls, grid: Grid, cell: Cell) -> _Rules:
        if reason := _no_cell(grid, cell):
            return cls(reason, [], [])
        everything: list[dict[str, Any]] = [{}]
        include, exclude = (
            [rule.get("seed") for rule in rules if _matches(rule, cell)]
            for rules in (grid.spec.include or everything, grid.spec.exclude)
        )
        return cls("", include, exclude)

    def left_out(self, seed: int) -> str:
        """Why the cell of this seed is left out; empty if it is not."""
        if self.reason:
            return self.reason
        if not any(_is_among(seed, seeds) for seeds in self.include):
            return "not in include"
        return "excluded" if any(_is_among(seed, seeds) for seeds in self.exclude) else ""


def _is_among(seed: int, seeds: Any) -> bool:
    return seeds is None or seed in (seeds if isinstance(seeds, (list, tuple)) else [seeds])
