"""Single models from Python: merge, attack, protect, recover, evaluate, with the components that grids use.

Each function plans the steps that a grid would plan and does what the store lacks in this process, so that a
number from here is the number of the same cell on a board. Weights of one's own take the expert's place.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mergesec.api.grids import plugin_files, suite_fields
from mergesec.errors import UsageError, nearest
from mergesec.threats import Hook

if TYPE_CHECKING:
    from torch import Tensor

    from mergesec.execution.guests.host import Hosts
    from mergesec.execution.session import Desk
    from mergesec.planning.cards import Card
    from mergesec.planning.plan import Planner, Step
    from mergesec.planning.refs import Ref

    Weights = Mapping[str, Tensor]
    WeightsLike: TypeAlias = "Weights | Model | str | Path"
    """Named tensors, a ``Model``, or a safetensors file or folder."""

SuiteLike = str | Mapping[str, Any]
"""A preset suite's name (``mini``, ``mini-text``), or ``{"backbone": ..., "tasks": [...]}``."""


@dataclass(frozen=True)
class Model:
    """A network's weights, for one task of a suite."""

    weights: Weights
    """Named tensors, read-only, on the CPU."""
    task: str
    report: Mapping[str, Any] = field(default_factory=dict)
    """What a protection says of itself, e.g. condition numbers."""
    trigger: Weights = field(default_factory=dict)
    """Of a backdoored expert: its trigger's arrays, in raw input space."""
    made_by: Any = None
    """The component that names the network's topology, where it is not the base's."""
    attack: Any = None
    """Of a backdoored expert: the attack that puts the trigger on inputs."""
    target_class: int = 0
    """Of a backdoored expert: the class it aims at."""


@dataclass(frozen=True)
class Evaluated:
    """``hits`` of ``n`` test samples, and the 95 % interval of the rate (shares in [0, 1])."""

    hits: int
    n: int
    low: float
    high: float

    @property
    def rate(self) -> float:
        """Accuracy, or with a trigger the attack success rate."""
        return self.hits / self.n


# --------------------------------------------------------------------------- merging


def merge(
    base: WeightsLike, experts: Mapping[str, WeightsLike] | Sequence[WeightsLike],
    method: str = "task_arithmetic", *, out: str | Path | None = None, seed: int = 0, force: bool = False,
    plugins: Iterable[str | Path] = (), **parameters: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """One set of merged weights, from named tensors or safetensors files (or folders of them).

    ``experts`` by name, or in order. Files are read tensor by tensor. With ``out`` the merge is written there, in
    the memory of a few tensors, and the result is empty; ``force`` replaces what is there. ``parameters`` are the
    method's own (``bench info METHOD``). UsageError for a method that needs data or keeps weights per task, for a
    wrong parameter, and for inputs that do not fit the base.
    """
    from mergesec.contracts import ContractError, Expert
    from mergesec.planning.catalog import load_catalog
    from mergesec.streaming.mapped import LazyWeights
    from mergesec.streaming.merging import context, fitted, merge_files, unfit
    from mergesec.weights import check_same_layout

    catalog = load_catalog(plugin_files(plugins))
    entry = catalog.get("merging", method, "method")
    bound = entry.card.bind(method, parameters)
    _check_merge(entry.card, bound)
    named = experts if isinstance(experts, Mapping) else {f"expert{i}": e for i, e in enumerate(experts)}
    fewest, most = entry.card.experts
    if len(named) < fewest or (most and len(named) > most):
        raise UsageError(
            "experts", f"{method} takes at least {fewest} and at most {most or 'any'}, got {len(named)}"
        )
    start = _opened(base, "base")
    members = {name: _opened(e, f"experts.{name}") for name, e in named.items()}
    component = entry.create(bound)
    try:
        if out is not None:
            if reason := unfit(entry.load(), entry.card.output, entry.card.wraps):
                raise UsageError("method", f"{method} {reason}; leave out= away")
            files = _all_files(start, members)
            merge_files(component, files.pop("base"), files, Path(out), seed=seed, force=force)
            return {}
        for name, weights in members.items():
            if isinstance(start, LazyWeights) and isinstance(weights, LazyWeights):
                members[name] = fitted(start, weights, f"experts.{name}")[0]
            else:
                check_same_layout(start, weights, f"experts.{name}")
        merged = component.merge(start, [Expert(n, w) for n, w in members.items()], context(method, seed))
    except ContractError as error:
        raise UsageError("merge", str(error)) from None
    return dict(merged.shared)


def _check_merge(card: Card, bound: Mapping[str, Any]) -> None:
    if card.output != "static" or card.wraps:
        raise UsageError("method", f"{card.name} makes more than one set of weights; run it in a grid")
    if bound.get("scaling") == "tuned":
        raise UsageError(f"{card.name}.scaling", "'tuned' needs data to score on; give a number")


def _opened(given: Any, where: str) -> Any:
    """Named tensors; of files they are read when asked for."""
    if isinstance(given, Model):
        return given.weights
    if isinstance(given, (str, Path)):
        from mergesec.streaming.reading import open_weights

        return open_weights(Path(given), where)
    if not isinstance(given, Mapping):
        raise UsageError(where, f"expected named tensors or a path, got {type(given).__name__}")
    return given


def _all_files(base: Any, members: Mapping[str, Any]) -> dict[str, Any]:
    from mergesec.streaming.mapped import LazyWeights

    files = {"base": base, **members}
    loose = [name for name, weights in files.items() if not isinstance(weights, LazyWeights)]
    if loose:
        raise UsageError("out", f"writes a merge of files; {loose[0]} is not one")
    return files


# --------------------------------------------------------------------------- single steps


def base(*, suite: SuiteLike = "mini", **desk: Any) -> Model:
    """The suite's shared pretrained base: what a merge starts from."""
    at = _Table.laid(suite, None, None, None, desk)
    return Model(at.done(at.planner.base())[0], "")


def expert(
    task: str,
    *,
    suite: SuiteLike = "mini",
    seed: int = 0,
    recipe: Mapping[str, Any] | None = None,
    **desk: Any,
) -> Model:
    """The clean expert of a task, fine-tuned by the suite's recipe (minutes, once; then from the store).

    ``desk`` (here and below): ``store=``, ``plugins=``, ``data_root=``, as for ``run``.
    """
    at = _Table.laid(suite, task, recipe, None, desk)
    return at.model(at.planner.expert(task, seed))


def protect(
    task: str, defense: str = "params", *, weights: WeightsLike | None = None, suite: SuiteLike = "mini",
    seed: int = 0, recipe: Mapping[str, Any] | None = None, parameters: Mapping[str, Any] | None = None, **desk: Any,
) -> Model:  # fmt: skip
    """The expert of ``task``, or ``weights`` of one's own, as its owner publishes it after ``defense``."""
    at = _Table.laid(suite, task, recipe, weights, desk)
    ref = at.ref("defense", defense, parameters, "protection")
    if weights is not None and Hook.TRAIN in at.desk.catalog.get("defense", defense).card.hooks:
        raise UsageError("weights", f"{defense} trains the expert itself; leave weights away")
    return at.model(at.planner.published(ref, task, seed), ref)


def recover(
    task: str, attack: str = "aga", *, weights: WeightsLike, experts: Sequence[str] | None = None,
    suite: SuiteLike = "mini", seed: int = 0, recipe: Mapping[str, Any] | None = None,
    parameters: Mapping[str, Any] | None = None, **desk: Any,
) -> Model:  # fmt: skip
    """What a free-rider makes of published ``weights`` of ``task``: base and, where the attack needs them, the
    experts and tuning rows of the tasks ``experts`` (default: all of the suite) are his."""
    at = _Table.laid(suite, task, recipe, weights, desk)
    ref = at.ref("attack", attack, parameters, "protection")
    if at.desk.catalog.get("attack", attack).card.tries:
        raise UsageError("attack", f"{attack} tries merges; run it in a grid, with a merge method")
    names = tuple(t.name for t in at.planner.grid.tasks)
    merged = names if experts is None else tuple(n for n in names if n in {task, *experts})
    from mergesec.planning.refs import NONE

    return at.model(at.planner.recovered(ref, NONE, task, merged, seed))


def attack(
    task: str, attack: str = "badnets", *, target_class: int = 0, suite: SuiteLike = "mini", seed: int = 0,
    recipe: Mapping[str, Any] | None = None, parameters: Mapping[str, Any] | None = None, **desk: Any,
) -> Model:  # fmt: skip
    """The malicious expert of ``task`` and its trigger, as a contributor publishes it."""
    at = _Table.laid(suite, task, recipe, None, desk)
    ref = at.ref("attack", attack, parameters, "backdoor")
    at.check_class(task, target_class)
    made = at.model(at.planner.poisoned(ref, task, target_class, seed))
    trigger = at.done(at.planner.trigger(ref, task, target_class, seed))
    return Model(
        made.weights,
        task,
        made.report,
        trigger[0],
        attack=at.planner.trigger_of(ref),
        target_class=target_class,
    )


def evaluate(
    weights: WeightsLike, task: str, *, suite: SuiteLike = "mini", triggered: Model | None = None,
    target_class: int | None = None, **desk: Any,
) -> Evaluated:  # fmt: skip
    """Test accuracy of a network on a task of the suite, under the task's frozen head.

    ``triggered``: an attacked expert; its trigger goes on every input, and what counts are the samples of other
    classes that are taken for ``target_class`` (ASR; default: the class that ``triggered`` aims at).
    """
    import numpy as np

    from mergesec.evidence.records import count
    from mergesec.evidence.statistics import Bootstrap
    from mergesec.execution.logs import Log
    from mergesec.execution.perform import perform
    from mergesec.execution.store import parse_safetensors
    from mergesec.planning.plan import Step

    at = _Table.laid(suite, task, None, None, desk)
    model = weights if isinstance(weights, Model) else Model(_opened(weights, "weights"), task)
    if model.made_by is None:
        at.check(model.weights)
    data, head = at.planner.data(task), at.planner.head(task)
    at.done(data), at.done(head)
    components = [("backbone", at.planner.grid.backbone), (f"task:{task}", at.planner.grid.task(task))]
    inputs = [("model", at.bench.give(model.weights)), (f"data:{task}", data), (f"head:{task}", head)]
    if model.made_by is not None:
        components.append(("producer", model.made_by))
    if triggered is not None:
        if triggered.attack is None:
            raise UsageError("triggered", "has no trigger; give what attack() returned")
        aim = triggered.target_class if target_class is None else target_class
        at.check_class(task, aim)
        components.append(("attack", triggered.attack))
        inputs.append(("trigger", at.bench.give(triggered.trigger)))
    kinds = {key: role.partition(":")[0] for role, key in inputs}
    step = Step("0" * 40, "evaluate", tuple(components), tuple(inputs), "{}")
    with _as_a_worker(), Log(at.desk.store.root, step.key) as log:
        found = parse_safetensors(perform(step, at.bench, kinds, log).blob)
    predicted, targets = (
        np.frombuffer(found[f"{name}|{task}"].data, np.int32) for name in ("predictions", "targets")
    )
    if triggered is None:
        counted = count(predicted == targets)
    else:
        counted = count(predicted == aim, targets != aim)
    low, high = Bootstrap().rate(task, {0: counted}).interval()
    return Evaluated(counted.k, counted.n, low, high)


# --------------------------------------------------------------------------- one planner, one store


@dataclass(frozen=True)
class _Table:
    """A planner of a suite's steps, and this process's place to do them."""

    desk: Desk
    planner: Planner
    bench: Any

    @classmethod
    def laid(
        cls,
        suite: SuiteLike,
        task: str | None,
        recipe: Mapping[str, Any] | None,
        weights: Any,
        given: Mapping[str, Any],
    ) -> _Table:
        """``weights``: stand in for the task's own fine-tuning."""
        import torch

        from mergesec.execution.session import open_desk, task_fingerprints
        from mergesec.execution.work import Bench
        from mergesec.planning.gridspec import parse_grid
        from mergesec.planning.plan import Planner
        from mergesec.planning.resolve import resolve

        wrong = sorted(given.keys() - {"store", "plugins", "data_root"})
        if wrong:
            raise UsageError(wrong[0], f"unknown{nearest(wrong[0], ('store', 'plugins', 'data_root'))}")
        store = given.get("store")
        root = given.get("data_root")
        desk = open_desk(
            plugin_files(given.get("plugins", ())), None if root is None else str(root),
            None if store is None else Path(store),
        )  # fmt: skip
        fields: dict[str, Any] = {
            "name": "python",
            "suite": suite_fields(suite),
            "axes": {"merging": ["simple_average"]},
        }
        if recipe is not None:
            fields["recipe"] = dict(recipe)
        grid = resolve(parse_grid(fields, "suite"), desk.catalog)
        known = [t.name for t in grid.tasks]
        if task is not None and task not in known:
            raise UsageError("task", f"{task!r} is not a task of the suite{nearest(task, known)}")
        bench = Bench(
            desk.store, desk.catalog, torch.device("cpu"), desk.data_root, guests=plugin_hosts(desk)
        )
        planner = Planner(grid, task_fingerprints(desk.data_root, desk.catalog))
        table = cls(desk, planner, bench)
        return table if weights is None or task is None else table._with(task, weights)

    def _with(self, task: str, weights: Any) -> _Table:
        """The same table, where somebody's own weights are the expert of ``task``; known by their content."""
        from dataclasses import replace

        from safetensors.torch import save

        from mergesec.execution.store import digests_of
        from mergesec.planning.plan import Planner
        from mergesec.planning.refs import Ref

        given = _opened(weights, "weights")
        self.check(given)
        blob = save({n: t.detach().cpu().contiguous().clone() for n, t in given.items()})
        text = json.dumps({"kind": "given", "content": digests_of(blob)}, sort_keys=True)
        ref = Ref("published", task, (), "given", text, _hash(text))
        grid = replace(self.planner.grid, published={task: ref})
        planner = Planner(grid, self.planner.fingerprint)
        key = planner.expert(task, 0)
        if not self.desk.store.has("import", key):
            self.desk.store.put("import", key, blob, {})
        return _Table(self.desk, planner, self.bench)

    def check_class(self, task: str, label: int) -> None:
        """UsageError unless the task has a class of this number."""
        classes = self.desk.catalog.get("task", task).card.classes
        if type(label) is not int or label < 0 or (classes and label >= classes):
            raise UsageError("target_class", f"{label!r} is outside [0, {classes - 1}] of {task}")

    def check(self, weights: Any) -> None:
        """UsageError unless these are finite tensors with the base's names, shapes and types."""
        from mergesec.contracts import ContractError
        from mergesec.execution.work import check_weights

        base = self.done(self.planner.base())[0]
        try:
            check_weights(weights, base, "weights")
        except ContractError as error:
            raise UsageError("weights", str(error)) from None

    def ref(self, kind: str, name: str, parameters: Mapping[str, Any] | None, threat: str) -> Ref:
        from mergesec.planning.refs import make_ref

        entry = self.desk.catalog.get(kind, name, kind)
        if entry.card.threat != threat:
            raise UsageError(kind, f"{name} belongs to {entry.card.threat}, not {threat}")
        return make_ref(entry, dict(parameters or {}), kind, self.desk.catalog)

    def done(self, key: str) -> tuple[Weights, dict[str, Any]]:
        """Tensors and facts of a step, computed here with what it needs if the store lacks them."""
        import time

        from mergesec.contracts import ContractError
        from mergesec.execution.engines.worker import device_name, peak_mb
        from mergesec.execution.guests.host import GuestDied, GuestFailed
        from mergesec.execution.logs import Log
        from mergesec.execution.perform import perform

        steps = self.planner.steps
        kinds = {k: s.kind for k, s in steps.items()}
        with _as_a_worker():
            for step in _closure(steps, key, self.desk.store.has):
                started = time.perf_counter()
                try:
                    with Log(self.desk.store.root, step.key) as log:
                        blob, info, guest_mb = perform(step, self.bench, kinds, log)
                except (ContractError, GuestDied) as error:
                    raise UsageError(step.label, str(error)) from None
                except GuestFailed as error:
                    raise UsageError(step.label, f"{error.reason}\n{error.trace}".rstrip()) from None
                seconds, peak = time.perf_counter() - started, max(guest_mb, peak_mb(self.bench))
                told = {"seconds": seconds, "peak_mb": peak, "device": device_name(self.bench)}
                self.desk.store.put(step.kind, step.key, blob, {**info, **told})
        found: tuple[Weights, dict[str, Any]] = self.bench.read(steps[key].kind, key)
        return found

    def model(self, key: str, made_by: Ref | None = None) -> Model:
        weights, facts = self.done(key)
        task = json.loads(self.planner.steps[key].args)["task"]
        return Model(weights, task, facts.get("report", {}), made_by=made_by)


def plugin_hosts(desk: Desk) -> Hosts:
    """Where plugins' code runs for a caller of its own: as in a grid, contained where the machine can."""
    from mergesec.execution.guests.host import Hosts, Setting
    from mergesec.execution.session import walls_of

    walls = walls_of(desk.catalog, [desk.store.root, desk.data_root])[0] if desk.plugins else None
    root = str(desk.data_root.resolve()) if desk.data_root else None
    return Hosts(desk.store, Setting(desk.plugins, "cpu", 1, root, walls, 2))


@contextlib.contextmanager
def _as_a_worker() -> Iterator[None]:
    """One thread and deterministic algorithms, as in a grid's workers: the same numbers."""
    import torch

    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)


def _closure(steps: Mapping[str, Step], key: str, has: Any) -> list[Step]:
    """What is missing for a step, in the order in which it can be done."""
    order: list[Step] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        if name in seen or has(steps[name].kind, name):
            return
        seen.add(name)
        for _, needed in steps[name].inputs:
            visit(needed)
        order.append(steps[name])

    visit(key)
    return order


def _hash(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()[:32]
