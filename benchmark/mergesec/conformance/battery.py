"""The battery: runs a component down the real road in the micro world, twice, and looks closely.

``bench plugin check FILE`` runs it on a stranger's component; the test suite on every built-in.
"""

from __future__ import annotations

import ast
import json
import tempfile
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergesec.conformance.backbones import (
    anatomy_is_real,
    images_have_features,
    requests_are_repeatable,
    texts_have_features,
    weights_fit,
)
from mergesec.conformance.knowledge import (
    blind_to_rows,
    blind_to_the_cell,
    blind_to_the_defender,
    says_its_secrets,
)
from mergesec.conformance.triggers import (
    applies_to_images,
    applies_to_requests,
    applies_to_text,
    is_malicious,
    is_shared,
    lets_gradients_through,
    shares_its_trigger,
)
from mergesec.contracts import Attack, Backbone, DataContext, Task
from mergesec.errors import UsageError
from mergesec.execution.failures import explain, shown_file
from mergesec.execution.steps import run
from mergesec.execution.store import Store
from mergesec.execution.work import Bench, unpacked
from mergesec.planning.cards import Card
from mergesec.planning.catalog import Catalog, Entry, add_plugin
from mergesec.planning.gridspec import parse_grid
from mergesec.planning.plan import TRAINED, Plan, Step, make_plan
from mergesec.planning.resolve import resolve
from mergesec.threats import Hook

MICRO = Path(__file__).parent / "micro.py"
MICRO_TEXT = Path(__file__).parent / "micro_text.py"
MICRO_GENERATION = Path(__file__).parent / "micro_generation.py"


class World(NamedTuple):
    """The micro world of one modality, and what the battery asks there."""

    path: Path
    backbone: str
    tasks: tuple[str, ...]
    attack: str
    """The plain backdoor that a defense meets."""
    features: str
    has_features: Callable[[Backbone], str | None]
    triggers: Mapping[str, Callable[[Attack, Mapping[str, Tensor], Any], str | None]]
    """Questions to a trigger: (attack, arrays, a raw training input) → what is wrong."""


WORLDS = {
    "image": World(
        MICRO, "micro/vit", ("micro/bars", "micro/blobs", "micro/rings"), "badnets",
        "features are [N, d] and differentiable in the pixels", images_have_features,
        {"the trigger applies in raw input space": applies_to_images,
         "gradients pass through the trigger": lets_gradients_through},
    ),
    "text": World(
        MICRO_TEXT, "micro/text", ("micro/animals", "micro/colours", "micro/tools"), "phrase",
        "features of strings are [N, d], whatever they are batched with", texts_have_features,
        {"the trigger applies in raw input space": applies_to_text},
    ),
    "generation": World(
        MICRO_GENERATION, "micro/painter", ("micro/corners", "micro/tints", "micro/halves"), "baddiffusion",
        "the same request gives the same image, whatever it is batched with", requests_are_repeatable,
        {"the trigger applies to requests": applies_to_requests},
    ),
}  # fmt: skip
"""One per modality, in the order in which a component of several is tried: a new modality is a new entry."""


def _world(card: Card) -> World:
    """The world a method is tried in: that of the first modality it works on."""
    return next(world for modality, world in WORLDS.items() if modality in card.modalities)


@dataclass(frozen=True)
class Check:
    """One line of the report. ``passed`` is None where the check does not apply here."""

    name: str
    passed: bool | None
    message: str = ""
    """With the line of the component's file to look at."""
    trace: str = ""
    """The whole traceback of a check that raised."""


class Battery:
    """Gathers checks; one that raises is a failed check, not the end."""

    def __init__(self, entry: Entry) -> None:
        self.checks: list[Check] = []
        self._file = shown_file(str(entry.path))
        self._spot = f"({entry.path.name}:{_class_line(entry)})"

    def check(self, name: str, test: Callable[[], str | None]) -> bool:
        """Run ``test``; it returns None if all is well, else what is wrong."""
        trace = ""
        try:
            wrong = test()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a component may raise anything, SystemExit included
            wrong, trace = explain(error, within=self._file, otherwise=self._spot)
        else:
            wrong = f"{wrong} {self._spot}" if wrong else None
        self.checks.append(Check(name, wrong is None, wrong or "", trace))
        return wrong is None

    def skip(self, name: str, why: str) -> None:
        self.checks.append(Check(name, None, why))


def _class_line(entry: Entry) -> int:
    """Where a component's class begins in its file; the first line if it has none there."""
    try:
        tree = ast.parse(entry.path.read_bytes())
    except SyntaxError:
        return 1
    found = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == entry.card.class_name]
    return found[-1].lineno if found else 1


def check_component(entry: Entry, catalog: Catalog, data_root: Path | None = None) -> list[Check]:
    """All checks that apply to this component; a task that reads a local folder finds it in ``data_root``."""
    battery = Battery(entry)
    torch.set_num_threads(1)  # the micro world is far too small for more
    for world in WORLDS.values():
        if world.backbone not in catalog.entries["backbone"]:
            add_plugin(catalog, world.path)
    made: list[Any] = []

    def create() -> None:
        made.append(entry.create(entry.card.bind("parameters", {})))

    if not battery.check("loads and takes its defaults", create):
        return battery.checks
    kind = entry.card.kind
    if any(p.type == "path" and p.default is None for p in entry.card.parameters.values()):
        battery.skip("runs", "reads files that a grid gives it")
        return battery.checks
    if kind == "task":
        _check_task(entry, made[0], battery, data_root)
    elif kind == "backbone":
        _check_backbone(entry, made[0], battery)
    else:
        _check_method(entry, made[0], catalog, battery)
    return battery.checks


# --------------------------------------------------------------------------- methods


def _grid(entry: Entry) -> dict[str, Any]:
    """The smallest grid in which the component has work to do."""
    card = entry.card
    world = _world(card)
    tasks = world.tasks
    suite = {"name": "micro", "backbone": world.backbone, "tasks": list(tasks)}
    axes: dict[str, Any] = {"merging": ["task_arithmetic"], "experts": ["all"], "victim": [tasks[0]]}
    axes["adversary"] = [tasks[0]]
    named = {"name": card.name, **card.trial}
    threat = card.threat or "clean"
    if card.kind == "merging":
        axes["merging"] = [named]
        if card.experts[1] == 2:
            axes["experts"] = ["pairs"]
    elif card.kind == "attack":
        axes["attacks"] = [named]
        axes["defenses"] = ["params"] if threat == "protection" else ["none"]
        if card.adapts:
            axes["defenses"] += [PUBLIC]
        if card.off_task:
            axes["target_task"] = ["", tasks[1]]
    else:
        axes["defenses"] = [named]
        axes["attacks"] = [world.attack] if threat == "backdoor" else ["none"]
        if card.per_task:
            axes["merging"] += PER_TASK
    return {
        "name": "conformance", "suite": suite, "axes": axes, "threats": [threat], "seeds": [0, 1],
        "recipe": {"epochs": 1, "max_train": 64},
    }  # fmt: skip


PUBLIC = "clp"
"""The defense that an adaptive attack looks at."""
PER_TASK = ["tall_masks"]
"""Merges with masks per task, for repairs that take them."""


_BASIC = ("data", "base", "head", "expert")
"""Kinds of steps in which no method has a part."""
_made: dict[str, tuple[bytes, dict[str, Any]]] = {}
"""Steps by key that have nothing to do with a component under test, made once per process."""


def _untouched(entry: Entry, plan: Plan) -> set[str]:
    """Keys of the steps in which the component has no part, neither itself nor through what they read."""
    touched: set[str] = set()
    for key, step in plan.steps.items():
        own = any((ref.kind, ref.name) == (entry.card.kind, entry.card.name) for _, ref in step.components)
        if own or any(read in touched for _, read in step.inputs):
            touched.add(key)
    return plan.steps.keys() - touched


def run_here(plan: Plan, bench: Bench, shared: Set[str] | None = None) -> dict[str, dict[str, str]]:
    """Run a plan's missing steps in this process, in order; tensor digests by step key.

    What ``shared`` names (the basic steps, unless it is given) is made once per process.
    """
    kinds = {key: step.kind for key, step in plan.steps.items()}
    if shared is None:
        shared = {key for key, kind in kinds.items() if kind in _BASIC}
    digests = {}
    for key, step in plan.steps.items():
        if not bench.store.has(step.kind, key):
            blob, info = (key in shared and _made.get(key)) or run(step, bench, kinds)
            if key in shared:
                blob = bytes(blob)  # its tensors may still be somebody's
                _made[key] = blob, info
            bench.store.put(step.kind, key, blob, dict(info))
        digests[key] = bench.store.read(step.kind, key)[1]["digests"]
    return digests


def _check_method(entry: Entry, component: Any, catalog: Catalog, battery: Battery) -> None:
    needed = [("merging", "task_arithmetic"), ("attack", _world(entry.card).attack), ("defense", "params")]
    needed += [("defense", PUBLIC)] if entry.card.adapts else []
    needed += [("defense", "outlier_test")] if entry.card.threat == "backdoor" else []
    needed += [("merging", name) for name in PER_TASK] if entry.card.per_task else []
    missing = [name for kind, name in needed if name not in catalog.entries[kind]]
    if missing:
        battery.skip("runs in the micro world", f"needs {missing[0]}, which is not installed")
        return
    grid = resolve(parse_grid(_grid(entry), "conformance"), catalog)
    plan = make_plan(grid, lambda task: "")
    shared = _untouched(entry, plan)
    results: list[dict[str, dict[str, str]]] = []
    with tempfile.TemporaryDirectory() as folder:

        def road() -> None:
            for name in ("first", "second"):
                bench = Bench(Store(Path(folder) / name), catalog, torch.device("cpu"))
                results.append(run_here(plan, bench, shared))

        if not battery.check(
            "runs down the whole road: finite, right names and shapes, inputs untouched", road
        ):
            return
        battery.check("same coordinates, same numbers", lambda: _same(results[0], results[1], plan))
        bench = Bench(Store(Path(folder) / "first"), catalog, torch.device("cpu"))
        battery.check("the card's 'seeded' is true", lambda: _seeded(entry, plan, bench))
        if isinstance(component, Attack) and entry.card.threat == "backdoor":
            _check_trigger(component, entry, catalog, plan, bench, battery)
        kinds = {key: step.kind for key, step in plan.steps.items()}
        for kind, names in (
            ("reference", entry.card.after_reference), ("examine", entry.card.after_examine),
        ):  # fmt: skip
            if names:
                one = next(s for s in plan.steps.values() if s.kind == kind)
                battery.check(
                    f"the card's 'after_{kind}' is true",
                    partial(is_shared, entry, names, catalog, one, bench, kinds),
                )
        if entry.card.threat == "backdoor":
            _check_knowledge(entry, plan, bench, battery, Path(folder) / "blinded")


def _check_knowledge(entry: Entry, plan: Plan, bench: Bench, battery: Battery, folder: Path) -> None:
    """Whether either side of a backdoor knows only what its card says."""
    card, steps = entry.card, _own_steps(entry, plan)
    battery.check("what may equal a secret of the other side says so", lambda: says_its_secrets(card))
    if card.kind == "defense":
        tasks = _world(card).tasks
        battery.check(
            "another target class, another adversary, another trigger: the same step",
            lambda: blind_to_the_cell(_grid(entry), steps, plan.grid, tasks, card.name),
        )
    else:
        battery.check(
            "another merge, another defense: the same step",
            lambda: blind_to_the_defender(_grid(entry), steps, plan.grid, card.name),
        )
    battery.check(
        "rows that the card does not name change nothing",
        lambda: blind_to_rows(card, steps, plan, bench, folder),
    )


def _same(first: Mapping[str, Any], second: Mapping[str, Any], plan: Plan) -> str | None:
    for key, step in plan.steps.items():
        if first[key] != second[key]:
            return f"{step.label} gave other tensors the second time"
    return None


def _own_steps(entry: Entry, plan: Plan) -> list[Step]:
    card = entry.card
    kinds = {
        "merging": ("merge",), "attack": ("trigger", "poison", "forge", "recover"),
        "defense": ("guard", "protect", "reference", "examine", "screen", "merge", "repair"),
    }[card.kind]  # fmt: skip
    found = [s for s in plan.steps.values() if s.kind in kinds]
    return [s for s in found if any(r.name == card.name and r.kind == card.kind for _, r in s.components)]


def _seeded(entry: Entry, plan: Plan, bench: Bench) -> str | None:
    """Results of a component that draws nothing are shared by all seeds: so it must draw nothing."""
    steps = _own_steps(entry, plan)
    if not steps:
        return "no step of the plan calls it: are the hooks on the card right?"
    kinds = {key: step.kind for key, step in plan.steps.items()}
    differs = tried = False
    for step in steps:
        if step.kind in TRAINED:
            continue  # training always has a seed
        tried = True
        reseeded = replace(step, args=json.dumps({**json.loads(step.args), "seed": 987654321}))
        tensors = unpacked(run(reseeded, bench, kinds)[0])
        before, _ = bench.read(step.kind, step.key)
        differs |= any(not torch.equal(tensors[k], before[k]) for k in before)
    if differs and not entry.card.seeded:
        return "it draws randomness, but the card says seeded: False, so all seeds would share one result"
    trained = any(step.kind in TRAINED for step in steps)  # may draw there, where every step has a seed
    if tried and not trained and entry.card.seeded and not differs:
        return "the card says seeded: True, but another seed changes nothing"
    return None


def _check_trigger(
    attack: Attack, entry: Entry, catalog: Catalog, plan: Plan, bench: Bench, battery: Battery
) -> None:
    """Every trigger of the plan (on-task, off-task), and what is made with it."""
    kinds = {key: step.kind for key, step in plan.steps.items()}
    steps = [s for s in plan.steps.values() if s.kind == "trigger"]
    first = _first_input(plan, bench)
    for step in steps:
        arrays, _ = bench.read("trigger", step.key)
        where = "off-task, " if "target_task" in json.loads(step.args) else ""
        for question, test in _world(entry.card).triggers.items():
            battery.check(f"{where}{question}", partial(test, attack, arrays, first))
    if entry.card.after_trigger or entry.card.trigger_of:
        battery.check(
            "the card's 'after_trigger' and 'trigger_of' are true",
            lambda: shares_its_trigger(entry, catalog, steps[0], bench, kinds),
        )
    if set(entry.card.hooks) != {Hook.TRIGGER}:  # else there is no malicious expert
        battery.check("the malicious expert is not the clean one", lambda: is_malicious(entry, plan, bench))


def _first_input(plan: Plan, bench: Bench) -> Any:
    """A raw training input of the grid."""
    step = next(s for s in plan.steps.values() if s.kind == "data")
    task: Task = bench.component(dict(step.components)["task"])
    return task.unpack(bench.read("data", step.key)[0])["train"].inputs[0]


# --------------------------------------------------------------------------- tasks and backbones


def _check_task(entry: Entry, task: Task, battery: Battery, data_root: Path | None) -> None:
    folder = data_root / entry.card.name if data_root is not None else None
    if entry.card.local and folder is None:
        battery.skip("loads", f"reads a local folder: give --data-root DIR with DIR/{entry.card.name}/ in it")
        return
    if entry.card.local and folder is not None and not folder.is_dir():
        battery.skip("loads", f"reads a local folder, and --data-root has no {entry.card.name}/ in it")
        return
    loaded: list[dict[str, Any]] = []

    def load() -> str | None:
        loaded.extend(
            task.load(DataContext(torch.device("cpu"), 0, str(folder) if folder else None)) for _ in range(2)
        )
        splits = loaded[0]
        if set(splits) < {"train", "tuning", "test"}:
            return f"splits are {sorted(splits)}"
        for name, split in splits.items():
            n = entry.card.images.get(name, len(split))
            if len(split) != n:
                return f"{name} has {len(split)} rows, the card says {n}"
            if split.targets.min() < 0 or split.targets.max() >= len(task.classes):
                return f"{name}: a target is outside the classes"
        if entry.card.classes != len(task.classes):
            return f"{len(task.classes)} classes, the card says {entry.card.classes}"
        return None

    if not battery.check("splits are there, sized and labelled as the card says", load):
        return

    def same() -> str | None:
        first, second = (task.pack(s) for s in loaded)
        return None if all(torch.equal(first[k], second[k]) for k in first) else "two loads differ"

    def disjoint() -> str | None:
        def seen(name: str) -> set[Any]:
            inputs = loaded[0][name].inputs
            return {row.numpy().tobytes() if isinstance(row, Tensor) else row for row in inputs}

        rows = {name: seen(name) for name in ("train", "tuning", "test")}
        shared = len(rows["test"] & (rows["train"] | rows["tuning"]))
        return f"{shared} test rows are also in train or tuning" if shared else None

    def packs() -> str | None:
        again = task.unpack(task.pack(loaded[0]))
        return (
            None
            if {n: len(s) for n, s in again.items()} == {n: len(s) for n, s in loaded[0].items()}
            else "pack/unpack loses rows"
        )

    battery.check("loads the same twice", same)
    battery.check("test rows are in no other split", disjoint)
    battery.check("splits survive being stored", packs)


def _check_backbone(entry: Entry, backbone: Backbone, battery: Battery) -> None:
    if any(p.type in ("path", "model") for p in entry.card.parameters.values()):
        battery.skip("builds", "reads weights from a folder or the hub; name them in a grid")
        return

    battery.check("base weights fit the network", partial(weights_fit, backbone))
    battery.check("the anatomy names real tensors", partial(anatomy_is_real, backbone))
    for modality in entry.card.modalities:
        if modality in WORLDS:
            battery.check(WORLDS[modality].features, partial(WORLDS[modality].has_features, backbone))


def check_file(path: Path, catalog: Catalog, data_root: Path | None = None) -> list[tuple[str, Check]]:
    """(component, check) for every card in a plugin file; UsageError if the file has none."""
    found: list[tuple[str, Check]] = []
    for entry in add_plugin(catalog, path):
        checks = check_component(entry, catalog, data_root)
        found += [(f"{entry.card.kind} {entry.card.name}", check) for check in checks]
    if not found:
        raise UsageError(str(path), "nothing to check")
    return found
