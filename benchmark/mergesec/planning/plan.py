"""Cells → a DAG of steps, one per distinct work, keyed by content.

A step is a frozen value. Its key hashes what decides its result: the components (name, version,
parameters, plugin digest), its inputs' keys, its arguments and the seed drawn from its
coordinates. Where and how it runs never enters.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, wraps
from typing import Any, NamedTuple, TypeVar, cast

from mergesec.files import uncollected
from mergesec.planning.cards import Card
from mergesec.planning.cells import Cell, cells
from mergesec.planning.refs import NONE, Ref, at_defaults, trigger_ref
from mergesec.planning.resolve import Grid
from mergesec.planning.seeds import draw_seed
from mergesec.recipes import other_half
from mergesec.threats import TRIGGERED, Hook, Role, Threat

KEY_VERSION = 1
"""Version of the key algorithm; a golden test pins it."""
STEP_VERSIONS: dict[str, int] = {}
"""What a kind of step does besides calling its components (training, evaluation, ...), by kind: raised when that
changes results, so that old artifacts are not taken for new ones. 1 where it is not named, and then not in the key."""

TRAINED = ("expert", "poison", "guard", "forge", "reference")
"""Kinds of step that train, or work on training data, and so always carry a seed."""
_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class Step:
    """One unit of work. ``components`` and ``inputs`` are (role, value) pairs; ``args`` is JSON."""

    key: str
    kind: str
    components: tuple[tuple[str, Ref], ...]
    inputs: tuple[tuple[str, str], ...]
    args: str

    @property
    def plugins(self) -> frozenset[str]:
        """The plugins whose components take part."""
        return frozenset(p for _, ref in self.components for p in ref.plugins)

    @property
    def label(self) -> str:
        """What a person reads in progress lines and errors."""
        args = json.loads(self.args)
        detail = [args[k] for k in ("task",) if k in args]
        for role, ref in self.components:
            if role in ("merging", "attack", "defense"):
                detail.append(ref.label)
        return f"{self.kind} {' '.join(detail)}".strip()


def step_key(
    kind: str, components: Iterable[tuple[str, str]], inputs: Iterable[tuple[str, str]], args: str
) -> str:
    """SHA-256 (first 40 hex digits) of everything that decides the result.

    ``components`` are (role, digest of identity), ``inputs`` (role, key), ``args`` canonical JSON.
    Roles, digests and keys hold neither newline nor tab, so the text below is unambiguous.
    """
    version = STEP_VERSIONS.get(kind, 1)
    known = kind if version == 1 else f"{kind}\t{version}"
    rows = [f"{KEY_VERSION}\t{known}", *map("\t".join, components), "", *map("\t".join, inputs), "", args]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:40]


@dataclass(frozen=True, slots=True)
class CellPlan:
    """A cell and the evaluation (or comparison) steps its metrics are read from, by role."""

    cell: Cell
    roles: tuple[tuple[str, str], ...]


@dataclass
class Plan:
    """All steps in an order that respects dependencies, and all cells."""

    grid: Grid
    steps: dict[str, Step]
    cells: list[CellPlan]
    left_out: Counter[str]
    _behind: dict[str, frozenset[str]] = field(default_factory=dict)

    @cached_property
    def plugins(self) -> frozenset[str]:
        """The plugins that take part in the grid."""
        grid = self.grid
        refs = (*grid.tasks, grid.backbone, *grid.merging, *grid.attacks, *grid.defenses)
        return frozenset(p for ref in refs for p in ref.plugins)

    def foreign(self, cell: CellPlan) -> set[str]:
        """The steps behind a cell in which plugins' code ran."""
        if not self.plugins:
            return set()
        return {key for _, role in cell.roles for key in self._foreign_behind(role)}

    def _foreign_behind(self, key: str) -> frozenset[str]:
        """The step itself and those it rests on, of which plugins are a part."""
        found = self._behind.get(key)
        if found is None:
            step = self.steps[key]
            before = (self._foreign_behind(k) for _, k in step.inputs)
            found = self._behind[key] = frozenset({key} if step.plugins else ()).union(*before)
        return found


class Controls(NamedTuple):
    """What every cell of these experts and this merge is read beside."""

    experts: tuple[tuple[str, str], ...]
    """(task, key of its clean expert)"""
    merge: str
    """Key of the clean merge."""
    roles: tuple[tuple[str, str], ...]


F = TypeVar("F", bound=Callable[..., Any])


def once(build: F) -> F:
    """A planner's method whose answer is remembered by its arguments: nothing is planned twice."""
    name = build.__name__

    @wraps(build)
    def remembered(self: Planner, *args: Any, **named: Any) -> Any:
        memo = (name, *args, *named.items()) if named else (name, *args)
        found = self._memo.get(memo)
        if found is None:
            found = self._memo[memo] = build(self, *args, **named)
        return found

    return cast(F, remembered)


@dataclass
class Planner:
    """Builds steps on demand and never twice."""

    grid: Grid
    fingerprint: Callable[[str], str]
    """Content digest of a local task's folder, by task name."""
    steps: dict[str, Step] = field(default_factory=dict)
    _memo: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    # ----- the steps, in the order of the road

    @once
    def data(self, task: str) -> str:
        ref, card = self.grid.task(task), self._card("task", task)
        source = self.fingerprint(task) if card.local else ""
        return self._add("data", [("task", ref)], [], task=task, source=source)

    @once
    def base(self) -> str:
        return self._add("base", [self._backbone], [])

    @once
    def head(self, task: str) -> str:
        told: dict[str, Any] = {}
        if self._card("backbone", self.grid.backbone.name).zero_shot:
            told["templates"] = list(self._card("task", task).templates)
        return self._add(
            "head", [("task", self.grid.task(task)), self._backbone],
            [("data", self.data(task)), ("base", self.base())],
            task=task, seed=draw_seed("head", task), **told,
        )  # fmt: skip

    def _train(self, kind: str, task: str, components: Any, extra: Any, **args: Any) -> str:
        return self._add(
            kind, [("task", self.grid.task(task)), self._backbone, *components],
            [("data", self.data(task)), ("base", self.base()), ("head", self.head(task)), *extra],
            task=task, **{"recipe": self.grid.recipe, **args},
        )  # fmt: skip

    @once
    def expert(self, task: str, seed: int, replica: int = 0) -> str:
        published = self.grid.published.get(task)
        if published is not None and not replica:  # one for all seeds; siblings are trained here
            parts = [self._backbone, ("published", published)]
            return self._add("import", parts, [("base", self.base())], task=task)
        recipe = other_half(self.grid.recipe) if replica else self.grid.recipe
        return self._train(
            "expert", task, [], [], recipe=recipe, seed=draw_seed("expert", task, seed, replica)
        )

    def trigger(self, attack: Ref, task: str, target: int, seed: int, aim: str = "") -> str:
        """``aim``: off-task, the task that ``target`` belongs to. Variants of one attack share triggers."""
        return self._trigger(self.trigger_of(attack), task, target, seed, aim)

    @once
    def _trigger(self, attack: Ref, task: str, target: int, seed: int, aim: str) -> str:
        drawn = self._seed(attack, "trigger", task, target, seed)
        components, extra, told = self._aimed(aim, target, seed)
        return self._train(
            "trigger", task, [("attack", attack), *components], extra, target=target, **drawn, **told
        )

    @once
    def trigger_of(self, attack: Ref) -> Ref:
        """The attack without what matters neither to its trigger nor to applying it."""
        return trigger_ref(attack, self.grid.catalog)

    def _aimed(self, aim: str, target: int, seed: int) -> tuple[Any, Any, dict[str, Any]]:
        """Components, inputs and arguments that say what an off-task backdoor aims at; nothing on-task."""
        if not aim:
            return [], [], {}
        told = {"target_task": aim, "reference": draw_seed("reference", aim, target, seed)}
        return [("target", self.grid.task(aim))], [("target_data", self.data(aim))], told

    def poisoned(
        self, attack: Ref, task: str, target: int, seed: int, leader: str = "", aim: str = "",
        defense: Ref = NONE,
    ) -> str:  # fmt: skip
        """The malicious expert of ``task``, with the trigger of ``leader`` (its own if that is empty).
        ``defense`` matters only to an attack that adapts to it. Of an attack that makes a trigger and nothing
        else, the clean expert."""
        if not self._card("attack", attack.name).adapts:
            defense = NONE
        return self._poisoned(attack, task, target, seed, leader or task, aim, defense)

    @once
    def _poisoned(
        self, attack: Ref, task: str, target: int, seed: int, leader: str, aim: str, defense: Ref
    ) -> str:
        hooks = self._card("attack", attack.name).hooks
        components, inputs, told = self._aimed(aim, target, seed)
        components = [("attack", attack), *components]
        if defense is not NONE:
            components.append(("defense", defense))
        inputs = [("trigger", self.trigger(attack, leader, target, seed, aim)), *inputs]
        result = self.expert(task, seed)
        # the same seed as the clean expert: clean and poisoned training differ by the attack alone
        told |= {"target": target, "seed": draw_seed("expert", task, seed, 0)}
        if Hook.POISON in hooks:
            result = self._train("poison", task, components, inputs, **told)
        if Hook.FORGE in hooks:
            inputs += [("weights", result), ("benign", self.expert(task, seed))]
            result = self._train("forge", task, components, inputs, **told)
        return result

    @once
    def published(self, defense: Ref, task: str, seed: int, secrets: str = "own") -> str:
        result = self.expert(task, seed)
        if defense is NONE:
            return result
        hooks = self._card("defense", defense.name).hooks
        if Hook.TRAIN in hooks:
            drawn = draw_seed("expert", task, seed, 0)
            result = self._train("guard", task, [("defense", defense)], [], seed=drawn)
        if Hook.PROTECT in hooks:
            extra = [("weights", result), *self._marks(defense, task, seed, secrets)]
            drawn_args = self._seed(defense, "protect", *_whose(task, secrets), seed)
            rows = self._owners_rows(defense)
            result = self._train("protect", task, [("defense", defense)], extra, **drawn_args, **rows)
        return result

    def _owners_rows(self, defense: Ref) -> dict[str, str]:
        """An owner who looks at tuning rows has the first half of them; a free-rider who does gets the other."""
        looks = defense is not NONE and self._card("defense", defense.name).data != "none"
        return {"rows": "first"} if looks else {}

    @once
    def reference(self, defense: Ref, task: str, seed: int, replica: int) -> str:
        """A malicious expert of the defense's own making, on the rows of its siblings; no cell's attack is in the key,
        nor what only later hooks read of the defense's parameters."""
        maker = at_defaults(defense, self._card("defense", defense.name).after_reference, self.grid.catalog)
        return self._train(
            "reference", task, [("defense", maker)], [], recipe=other_half(self.grid.recipe),
            seed=draw_seed(defense.name, "reference", task, seed, replica),
        )  # fmt: skip

    @once
    def finding(self, defense: Ref, task: str, expert: str, seed: int) -> str:
        """What a screen finds in one expert, whoever stands beside it; nothing of its parameters in the key that only
        the decision reads."""
        looker = at_defaults(defense, self._card("defense", defense.name).after_examine, self.grid.catalog)
        inputs = [("base", self.base()), (f"expert:{task}", expert), *self._views((task,))]
        return self._add(
            "examine", [*self._parties((task,)), ("defense", looker)], inputs, task=task,
            **self._seed(defense, "examine", task, seed), protocol=self.grid.spec.protocol,
        )  # fmt: skip

    def _marks(self, defense: Ref, task: str, seed: int, secrets: str) -> list[tuple[str, str]]:
        """The owner's secret, as an input, if the defense has marks to verify."""
        if Hook.VERIFY not in self._card("defense", defense.name).hooks:
            return []
        return [("secret", self.secret(defense, task, seed, secrets))]

    @once
    def secret(self, defense: Ref, task: str, seed: int, secrets: str) -> str:
        drawn = draw_seed(defense.name, "secret", *_whose(task, secrets), seed)
        extra = [("weights", self.expert(task, seed))]
        rows = self._owners_rows(defense)
        return self._train("secret", task, [("defense", defense)], extra, seed=drawn, **rows)

    def recovered(
        self, attack: Ref, defense: Ref, task: str, experts: tuple[str, ...], seed: int,
        secrets: str = "own", merging: Ref = NONE,
    ) -> str:  # fmt: skip
        """``merging`` matters only to an attack that tries merges."""
        if attack is NONE or not self._card("attack", attack.name).tries:
            merging = NONE
        return self._recovered(attack, defense, task, experts, seed, secrets, merging)

    @once
    def _recovered(
        self, attack: Ref, defense: Ref, task: str, experts: tuple[str, ...], seed: int, secrets: str,
        merging: Ref,
    ) -> str:  # fmt: skip
        published = self.published(defense, task, seed, secrets)
        if attack is NONE:
            return published
        inputs = [("base", self.base()), ("published", published)]
        components = [self._backbone, ("attack", attack)]
        # only an attack that uses the free-rider's own experts or data depends on who they are
        told: dict[str, str] = {}
        if self._card("attack", attack.name).data != "none":
            for other in experts:
                if other != task:
                    inputs += [(f"expert:{other}", self.expert(other, seed)), *self._views((other,))]
                    components.append((f"task:{other}", self.grid.task(other)))
            told["protocol"] = self.grid.spec.protocol
        if merging is not NONE:
            inputs += self._views((task,))
            components += [(f"task:{task}", self.grid.task(task)), ("merging", merging)]
            told["order"] = ",".join(experts)
            if self._owners_rows(defense):
                told["rows"] = "second"
        asked = any(self._card("attack", ref.name).queries for ref in (attack, *attack.inner))
        if (
            asked and defense is not NONE and not defense.plugins
        ):  # a stranger's code is not let near an attack
            components.append(("producer", defense))
        drawn = self._seed(attack, "recover", task, seed)
        return self._add("recover", components, inputs, task=task, **drawn, **told)

    @once
    def merged(
        self, merging: Ref, contributed: tuple[tuple[str, str], ...], defense: Ref, seed: int, kept: str = ""
    ) -> str:  # fmt: skip
        """``kept``: of the experts that a screen lets in, only those that this other screening let in."""
        tasks = tuple(t for t, _ in contributed)
        card = None if defense is NONE else self._card("defense", defense.name)
        hooks = card.hooks if card is not None and card.threat == Threat.BACKDOOR else ()
        inputs = [("base", self.base()), *((f"expert:{t}", k) for t, k in contributed)]
        inputs += self._views(tasks)
        components = self._parties(tasks)
        extra = self._siblings(card, defense, tasks, seed) if card is not None and hooks else []
        drawn = self._seed(defense, "defend", seed) if hooks else {}
        protocol = {"protocol": self.grid.spec.protocol}
        if Hook.SCREEN in hooks:
            each = contributed if Hook.EXAMINE in hooks else ()
            findings = [(f"finding:{t}", self.finding(defense, t, k, seed)) for t, k in each]
            key = self._add(
                "screen",
                [*components, ("defense", defense)],
                [*inputs, *extra, *findings],
                **drawn,
                **protocol,
            )
            inputs += [("screened", key), *([("kept", kept)] if kept else [])]
        around = [("defense", defense)] if Hook.MERGE in hooks else []
        seeded = self._seed(merging, "merge", seed)
        key = self._add(
            "merge", [*components, ("merging", merging), *around],
            [*inputs, *(extra if around else [])], **seeded, **({"defend": drawn} if around else {}),
            **protocol,
        )  # fmt: skip
        if Hook.REPAIR in hooks:
            repair_inputs = [("base", self.base()), ("merged", key), *self._views(tasks), *extra]
            repair_parts = [*components, ("merging", merging), ("defense", defense)]
            key = self._add("repair", repair_parts, repair_inputs, **drawn, **protocol)
        return key

    @once
    def evaluation(
        self, model: str, tasks: tuple[str, ...], producer: Ref = NONE,
        trigger: tuple[Ref, str] | None = None, cast: str = "",
    ) -> str:  # fmt: skip
        """``cast``: a floating type the weights are rounded to first."""
        components = list(self._parties(tasks))
        inputs = [("model", model), *self._views(tasks)]
        if producer is not NONE:
            components.append(("producer", producer))
        if trigger is not None:
            components.append(("attack", trigger[0]))
            inputs.append(("trigger", trigger[1]))
        return self._add("evaluate", components, inputs, **({"cast": cast} if cast else {}))

    @once
    def comparison(self, first: str, second: str, task: str, producer: Ref) -> str:
        components = [self._backbone, (f"task:{task}", self.grid.task(task))]
        if producer is not NONE:
            components.append(("producer", producer))
        inputs = [("first", first), ("second", second), ("base", self.base()), *self._views((task,))]
        return self._add("compare", components, inputs, task=task)

    @once
    def verification(
        self, model: str, task: str, defense: Ref, seed: int, secrets: str, producer: Ref
    ) -> str:
        """The owner of ``task`` looks for its mark in ``model``."""
        components = [self._backbone, (f"task:{task}", self.grid.task(task)), ("defense", defense)]
        if producer is not NONE:
            components.append(("producer", producer))
        inputs = [
            ("model", model), ("base", self.base()), ("secret", self.secret(defense, task, seed, secrets)),
            *self._views((task,)),
        ]  # fmt: skip
        drawn = draw_seed(defense.name, "secret", *_whose(task, secrets), seed)
        return self._add("verify", components, inputs, task=task, seed=drawn, **self._owners_rows(defense))

    # ----- cells

    def cell(self, cell: Cell) -> CellPlan:
        """The evaluations a cell's metrics are read from."""
        controls = self._controls(cell.merging, cell.experts, cell.seed)
        roles = list(controls.roles)
        if cell.threat == Threat.PROTECTION:
            roles += self._protection(cell, dict(controls.experts))
        elif cell.threat == Threat.BACKDOOR:
            roles += self._backdoor(cell, dict(controls.experts), controls.merge)
        return CellPlan(cell, tuple(roles))

    @once
    def _controls(self, merging: Ref, experts: tuple[str, ...], seed: int) -> Controls:
        """Clean experts, their merge, and the evaluations every cell on them is read beside."""
        roles: list[tuple[str, str]] = [
            (Role.BASE, self.evaluation(self.base(), tuple(t.name for t in self.grid.tasks)))
        ]
        clean = tuple((t, self.expert(t, seed)) for t in experts)
        roles += [(Role.EXPERT.of(t), self.evaluation(k, (t,))) for t, k in clean]
        merge = self.merged(merging, clean, NONE, seed)
        roles.append((Role.CLEAN_MERGE, self.evaluation(merge, experts, merging)))
        return Controls(clean, merge, tuple(roles))

    def _protection(self, cell: Cell, clean: dict[str, str]) -> list[tuple[str, str]]:
        victim, seed, defense, own = cell.subject, cell.seed, cell.defense, cell.secrets
        published = {t: self.published(defense, t, seed, own) for t in cell.owners}
        recovered = {
            t: self.recovered(cell.attack, defense, t, cell.experts, seed, own, cell.merging)
            for t in cell.owners
        }
        roles: list[tuple[str, str]] = [
            (Role.PUBLISHED, self.evaluation(published[victim], (victim,), defense))
        ]
        # an attack may hand back the plain topology, so its result is read as a plain network
        producer = defense if cell.attack is NONE else NONE
        roles.append((Role.RECOVERED, self.evaluation(recovered[victim], (victim,), producer)))
        merges: dict[str, str] = {}
        for role, models in ((Role.PROTECTED_MERGE, published), (Role.MERGE, recovered)):
            contributed = tuple({**clean, **models}.items())
            merges[role] = self.merged(cell.merging, contributed, NONE, seed)
            roles.append((role, self.evaluation(merges[role], cell.experts, cell.merging)))
        if defense is NONE:
            return roles
        expert = self.expert(victim, seed)
        roles.append((Role.LOGITS, self.comparison(expert, published[victim], victim, defense)))
        if cell.attack is not NONE:
            roles.append((Role.GAP, self.comparison(expert, recovered[victim], victim, NONE)))
        cast = self.evaluation(published[victim], (victim,), defense, cast="bfloat16")
        roles.append((Role.PUBLISHED_BF16, cast))
        if Hook.VERIFY in self._card("defense", defense.name).hooks:
            suspects = [
                (Role.PUBLISHED, published[victim], defense), (Role.RECOVERED, recovered[victim], producer),
                (Role.PROTECTED_MERGE, merges[Role.PROTECTED_MERGE], cell.merging),
                (Role.MERGE, merges[Role.MERGE], cell.merging), (Role.EXPERT, expert, NONE), (Role.BASE, self.base(), NONE),
                (Role.CLEAN_MERGE, self.merged(cell.merging, tuple(clean.items()), NONE, seed), cell.merging),
            ]  # fmt: skip
            roles += [
                (Role.VERIFY.of(role), self.verification(model, victim, defense, seed, own, maker))
                for role, model, maker in suspects
            ]
        return roles

    def _backdoor(self, cell: Cell, clean: dict[str, str], merge: str) -> list[tuple[str, str]]:
        attack, target, seed, aim = cell.attack, cell.target_class, cell.seed, cell.target_task
        bad: dict[str, str] = {}
        if attack is not NONE:
            bad = {
                t: self.poisoned(attack, t, target, seed, cell.subject, aim, cell.defense) for t in cell.crew
            }
        final = self.merged(cell.merging, tuple({**clean, **bad}.items()), cell.defense, seed)
        roles: list[tuple[str, str]] = [(Role.MERGE, self.evaluation(final, cell.experts, cell.merging))]
        if attack is NONE:
            return roles
        trigger = (self.trigger_of(attack), self.trigger(attack, cell.subject, target, seed, aim))
        models = [
            (Role.MERGE, final, cell.merging), (Role.CLEAN_MERGE, merge, cell.merging), (Role.BASE, self.base(), NONE),
        ]  # fmt: skip
        if cell.defense is not NONE:
            kept = self._screening(final)
            control = self.merged(cell.merging, tuple(clean.items()), cell.defense, seed, kept)
            models.append((Role.DEFENDED_CLEAN_MERGE, control, cell.merging))
            measured = self.evaluation(control, cell.experts, cell.merging)
            roles.append((Role.DEFENDED_CLEAN_MERGE, measured))
        for task, model in bad.items():
            role = Role.POISONED if task == cell.subject else Role.POISONED.of(task)
            roles.append((role, self.evaluation(model, (task,))))
            if not aim or task == cell.subject:  # off-task all aim at one task: the subject's speaks for them
                roles.append((f"{role}{TRIGGERED}", self.evaluation(model, (aim or task,), NONE, trigger)))
        for role, model, producer in models:
            roles.append((f"{role}{TRIGGERED}", self.evaluation(model, cell.experts, producer, trigger)))
        roles.append((Role.VISIBILITY, self.visibility(*trigger, cell.aim)))
        return roles

    def _screening(self, merged: str) -> str:
        """The screening that a merge, repaired or not, rests on; empty if there was none."""
        inputs = dict(self.steps[merged].inputs)
        return self._screening(inputs["merged"]) if "merged" in inputs else inputs.get("screened", "")

    @once
    def visibility(self, attack: Ref, trigger: str, task: str) -> str:
        """How much the trigger changes test inputs of ``task``."""
        components = [("task", self.grid.task(task)), ("attack", attack)]
        return self._add(
            "visibility", components, [("data", self.data(task)), ("trigger", trigger)], task=task
        )

    # ----- helpers

    @property
    def _backbone(self) -> tuple[str, Ref]:
        return ("backbone", self.grid.backbone)

    def _card(self, kind: str, name: str) -> Card:
        return self.grid.catalog.entries[kind][name].card

    def _seed(self, ref: Ref, *coordinates: str | int) -> dict[str, int]:
        """A seed argument, only if the component draws at all: what does not draw is shared by seeds."""
        if not any(self._card(part.kind, part.name).seeded for part in (ref, *ref.inner)):
            return {}
        return {"seed": draw_seed(ref.name, *coordinates)}

    @once
    def _views(self, tasks: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
        """Data and heads of the tasks, as inputs."""
        return tuple(p for t in tasks for p in ((f"data:{t}", self.data(t)), (f"head:{t}", self.head(t))))

    @once
    def _parties(self, tasks: tuple[str, ...]) -> tuple[tuple[str, Ref], ...]:
        """Backbone and tasks, as components."""
        return (self._backbone, *((f"task:{t}", self.grid.task(t)) for t in tasks))

    def _siblings(self, card: Card, defense: Ref, tasks: tuple[str, ...], seed: int) -> list[tuple[str, str]]:
        """Further experts that a defense is handed: clean ones, and malicious ones of its own making."""
        given = dict(defense.parameters)
        clean, malicious = (int(given[n]) if n else 0 for n in (card.siblings, card.references))
        found = [(f"sibling:{t}:{i}", self.expert(t, seed, i)) for t in tasks for i in range(1, clean + 1)]
        made = [(t, i) for t in tasks for i in range(1, malicious + 1)]
        return found + [(f"reference:{t}:{i}", self.reference(defense, t, seed, i)) for t, i in made]

    def _add(
        self, kind: str, components: Iterable[tuple[str, Ref]], inputs: Iterable[tuple[str, str]], **args: Any
    ) -> str:
        components, inputs = tuple(components), tuple(inputs)
        text = _canonical(args) if args else "{}"
        key = step_key(kind, [(role, ref.digest) for role, ref in components], inputs, text)
        if key not in self.steps:
            self.steps[key] = Step(key, kind, components, inputs, text)
        return key


def _whose(task: str, secrets: str) -> tuple[str, ...]:
    """Seed coordinates of an owner: its task, or nothing where all share one secret."""
    return (task,) if secrets == "own" else ("shared",)


@uncollected()
def make_plan(grid: Grid, fingerprint: Callable[[str], str]) -> Plan:
    """Plan every cell of the grid. Steps come out in dependency order."""
    planner = Planner(grid, fingerprint)
    planned = [planner.cell(cell) for cell in cells(grid)]
    return Plan(grid, planner.steps, planned, Counter(grid.left_out))


_SAME_SIDE = {"repair": "merged", "merge": "screened", "forge": "weights"}
"""By kind of step, the input that the same side made just before: merge, screen, poison."""


def back(plan: Plan, evaluation: str) -> list[str]:
    """The step that made an evaluated model and those of the same side before it, the last one first:
    repair, merge, screen, or forge, poison."""
    keys = [dict(plan.steps[evaluation].inputs)["model"]]
    while True:
        step = plan.steps[keys[-1]]
        before = dict(step.inputs).get(_SAME_SIDE.get(step.kind, ""))
        if before is None:
            return keys
        keys.append(before)


def siblings(plan: Plan, made: Iterable[str]) -> list[str]:
    """Further experts that these steps were handed: clean ones, and malicious ones of the defense's own making."""
    kinds = ("sibling:", "reference:")
    return sorted({k for key in made for role, k in plan.steps[key].inputs if role.startswith(kinds)})


def findings(plan: Plan, made: Iterable[str]) -> list[str]:
    """What the screens among these steps had found in each expert."""
    return sorted({k for key in made for role, k in plan.steps[key].inputs if role.startswith("finding:")})


def data_steps(plan: Plan) -> dict[str, str]:
    """Keys of the data steps by task."""
    return {json.loads(s.args)["task"]: k for k, s in plan.steps.items() if s.kind == "data"}


def behind(plan: Plan, cell: CellPlan) -> set[str]:
    """The steps whose facts a cell's record tells of, besides its evaluations and the data: what made each
    model, the sides of a backdoor, and those of plugins, which say whether they were contained."""
    keys: set[str] = plan.foreign(cell)
    roles = dict(cell.roles)
    for key in roles.values():
        keys |= {k for role, k in plan.steps[key].inputs if role == "model"}
    if cell.cell.threat == Threat.BACKDOOR:
        defended = back(plan, roles[Role.MERGE])
        keys |= {*defended, *siblings(plan, defended), *findings(plan, defended)}
        if cell.cell.attack is not NONE:
            keys |= set(back(plan, roles[Role.POISONED]))
            keys.add(dict(plan.steps[roles[Role.MERGE.triggered]].inputs)["trigger"])
    return keys


def read_facts(plan: Plan) -> set[str]:
    """All steps whose facts records tell of, besides evaluations."""
    return {*data_steps(plan).values(), *(key for cell in plan.cells for key in behind(plan, cell))}


@uncollected()
def needed_steps(
    plan: Plan, has: Callable[[str], bool], told: Callable[[str], bool] | None = None
) -> dict[str, Step]:
    """The steps to run: those whose result is missing and wanted, directly or through another. Wanted are the
    evaluations, and what else the records tell of, unless its facts are ``told`` without it."""
    wanted: dict[str, Step] = {}
    stack = [key for cell in plan.cells for _, key in cell.roles]
    stack += [key for key in read_facts(plan) if told is None or not told(key)]
    seen: set[str] = set()
    while stack:
        key = stack.pop()
        if key in seen:
            continue
        seen.add(key)
        if has(key):
            continue
        step = plan.steps[key]
        wanted[key] = step
        stack += [k for _, k in step.inputs]
    return {k: s for k, s in plan.steps.items() if k in wanted}  # dependency order
