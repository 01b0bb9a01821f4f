"""What each kind of step does. Runs inside a worker; a short function each.

A function takes a ``Work`` (the step with its inputs behind verified, cached reads) and returns the
tensors and JSON facts that the store commits.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mergesec.contracts import (
    Adapted,
    Attack,
    ContractError,
    DataContext,
    Defense,
    Expert,
    Merged,
    MergeMethod,
    Model,
    ProtectContext,
    RecoverContext,
    Screened,
    Task,
    Weights,
    load_network,
)
from mergesec.execution.allocation import returned_blocks
from mergesec.execution.contexts import (
    PlainMerge,
    Views,
    contributed,
    fitting,
    merge_context,
    train_context,
    trial,
    view,
)
from mergesec.execution.evaluation import compare, evaluate, network_of, plain_producer, visibility
from mergesec.execution.store import Laid
from mergesec.execution.work import Bench, Result, Work, check_merged, check_weights, flatten, packed
from mergesec.planning.plan import Step
from mergesec.weights import check_finite, check_same_layout

# --------------------------------------------------------------------------- data, base, head


def data(work: Work) -> Result:
    """All splits of a task, as stored tensors."""
    task: Task = work.component("task")
    root = work.bench.data_root
    folder = str(root / task.name) if root is not None else None
    splits = task.load(DataContext(torch.device("cpu"), 0, folder))
    for name in ("train", "tuning", "test"):
        if name not in splits or not len(splits[name]):
            raise ContractError(f"{task.name}: split {name} is missing or empty")
    sizes = {n: len(s) for n, s in splits.items()}
    facts = {
        "sizes": sizes,
        "classes": list(task.classes),
        "partial": str(getattr(task, "partial", "") or ""),
    }
    return Result(task.pack(splits), facts)


def base(work: Work) -> Result:
    weights = dict(work.backbone.base_weights())
    check_finite(weights, "base")
    return Result(weights, {"parameters": sum(v.numel() for v in weights.values())})


def head(work: Work) -> Result:
    """The shipped head, or one from prompts, or one fitted on the base and training rows."""
    task: Task = work.component("task")
    shipped = work.backbone.head(task.name)
    if shipped is None and work.args.get("templates"):
        work.splits("data", task)  # brings the names of the classes that are there
        shipped = work.backbone.zero_shot(task.prompts(work.args["templates"]), work.device)
    found = dict(_fitted_head(work, task) if shipped is None else shipped)
    check_finite(found, f"head of {task.name}")  # the largest of NaN is the first class, and would be counted
    return Result(found, {"fitted": shipped is None})


def _fitted_head(work: Work, task: Task) -> Weights:
    model = Model(work.backbone, load_network(work.backbone, work.tensors("base")).to(work.device))
    return task.fit_head(model, work.splits("data", task)["train"], DataContext(work.device, work.seed))


# --------------------------------------------------------------------------- training-time hooks


def expert(work: Work) -> Result:
    ctx = train_context(work)
    return Result(dict(check_weights(ctx.fit(), ctx.base, "training")))


def published(work: Work) -> Result:
    """A published expert's weights, under the base's names; float32, as all weights here."""
    source = str(dict(work.refs["published"].parameters)["source"])
    base_weights = work.tensors("base")
    weights = dict(work.backbone.published(source))
    return Result(dict(check_weights(weights, base_weights, f"expert {Path(source).name}")))


def trigger(work: Work) -> Result:
    attack: Attack = work.component("attack")
    arrays = dict(attack.trigger(train_context(work)))
    check_finite(arrays, f"{attack.name}.trigger")
    return Result(arrays)


def poison(work: Work) -> Result:
    attack: Attack = work.component("attack")
    ctx = train_context(work)
    return Result(dict(check_weights(attack.poison(ctx), ctx.base, attack.name)))


def forge(work: Work) -> Result:
    attack: Attack = work.component("attack")
    ctx = train_context(work)
    return Result(dict(check_weights(attack.forge(work.tensors("weights"), ctx), ctx.base, attack.name)))


def guard(work: Work) -> Result:
    defense: Defense = work.component("defense")
    ctx = train_context(work)
    return Result(dict(check_weights(defense.train(ctx), ctx.base, defense.name)))


def reference(work: Work) -> Result:
    """A malicious expert that a defense makes for itself, knowing no cell's attack."""
    defense: Defense = work.component("defense")
    ctx = train_context(work)
    return Result(dict(check_weights(defense.reference(ctx), ctx.base, f"{defense.name}.reference")))


# --------------------------------------------------------------------------- weights hooks


def protect(work: Work) -> Result:
    defense: Defense = work.component("defense")
    owner = view(work, work.args["task"], "data", "head", "task")
    base_weights = work.tensors("base")
    secret = work.tensors("secret") if "secret" in work.inputs else {}
    ctx = ProtectContext(work.device, work.seed, work.backbone, base_weights, owner, secret)
    result = defense.protect(work.tensors("weights"), ctx)
    check_finite(result.weights, defense.name)
    if type(defense).network is Defense.network:  # a defense of its own topology answers for it itself
        check_weights(result.weights, base_weights, defense.name)
    return Result(dict(result.weights), {"report": dict(result.report)})


def secret(work: Work) -> Result:
    """What the owner keeps to prove ownership: made before publishing, never part of it."""
    defense: Defense = work.component("defense")
    owner = view(work, work.args["task"], "data", "head", "task")
    ctx = ProtectContext(work.device, work.seed, work.backbone, work.tensors("base"), owner)
    kept = dict(defense.secret(work.tensors("weights"), ctx))
    check_finite(kept, f"{defense.name}.secret")
    return Result(kept)


def verify(work: Work) -> Result:
    """The owner's test of a suspect network: one bit per query, and the decision."""
    defense: Defense = work.component("defense")
    task = work.args["task"]
    owner = view(work, task, f"data:{task}", f"head:{task}", f"task:{task}")
    ctx = ProtectContext(
        work.device, work.seed, work.backbone, work.tensors("base"), owner, work.tensors("secret")
    )
    producer = None
    if "producer" in work.refs:  # a plugin's that serves itself is looked at in a guest, step and all
        producer = plain_producer(work) if work.foreign("producer") else work.component("producer")
    found = defense.verify(network_of(work, "model", task, producer), ctx)
    hits = found.hits.flatten().bool()
    facts = {"detected": bool(found.detected), "statistic": float(found.statistic)}
    return Result({f"predictions|{task}": hits.int(), f"targets|{task}": torch.ones(len(hits)).int()}, facts)


def recover(work: Work) -> Result:
    attack: Attack = work.component("attack")
    victim, base_weights = work.args["task"], work.tensors("base")
    own = [r.removeprefix("expert:") for r in work.inputs if r.startswith("expert:")]
    experts = [Expert(t, work.tensors(f"expert:{t}")) for t in own]
    tries = "merging" in work.refs
    served = work.component("producer") if "producer" in work.refs else None
    views = Views(work, [*own, victim] if tries else own)
    ctx = RecoverContext(
        work.device, work.seed, work.backbone, base_weights, victim, experts, views,
        trial(work, experts) if tries else None,
        [work.bench.component(ref) for ref in work.refs["attack"].inner],
        (lambda: network_of(work, "published", victim, served)) if served else None,
    )  # fmt: skip
    recovered = attack.recover(fitting(work.tensors("published"), base_weights), ctx)
    return Result(dict(check_weights(recovered, base_weights, attack.name)))


def examine(work: Work) -> Result:
    """What a screen finds in one expert, as named tensors."""
    defense: Defense = work.component("defense")
    (expert,) = contributed(work)
    ctx = merge_context(work, PlainMerge(), work.seed)
    found = dict(defense.examine(work.tensors("base"), expert, ctx))
    if not found:
        raise ContractError(f"{defense.name}.examine gave nothing back")
    check_finite(found, f"{defense.name}.examine")
    return Result(found)


def screen(work: Work) -> Result:
    """Which experts may enter, those the defense edited (untouched ones are not stored again), and its report."""
    defense: Defense = work.component("defense")
    experts = contributed(work)
    base_weights = work.tensors("base")
    ctx = merge_context(work, PlainMerge(), work.seed)
    found = defense.screen(base_weights, experts, ctx)
    screened = found if isinstance(found, Screened) else Screened(found)
    kept = screened.experts
    if not kept:
        raise ContractError(f"{defense.name} kept no expert")
    given = {e.task: e.weights for e in experts}
    names = [e.task for e in kept]
    if len(set(names)) < len(names) or not set(names) <= given.keys():
        raise ContractError(f"{defense.name} kept {', '.join(names)} of {', '.join(given)}")
    edited = {e.task: e.weights for e in kept if e.weights is not given.get(e.task)}
    for weights in edited.values():
        check_weights(weights, base_weights, defense.name)
    facts: dict[str, Any] = {"kept": names}
    if screened.report:
        facts["report"] = _plain(screened.report, f"{defense.name}.screen")
    return Result(flatten(Merged({}, edited)), facts)


def _plain(report: Mapping[str, Any], who: str) -> dict[str, Any]:
    """A report as JSON gives it back; ContractError if JSON cannot hold it."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(report), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ContractError(f"{who}: its report is not plain JSON ({error})") from None
    return plain


def merge(work: Work) -> Result:
    method: MergeMethod = work.component("merging")
    experts, base_weights = contributed(work), work.tensors("base")
    for e in experts:
        check_same_layout(base_weights, e.weights, f"expert {e.task}")
    ctx = merge_context(work, method, work.seed)
    if ctx.inner is not None and (reason := method.unfit_inner(type(ctx.inner))):
        raise ContractError(f"{method.name} cannot wrap {ctx.inner.name}: {reason}")
    if "defense" in work.refs:
        defense: Defense = work.component("defense")
        merged, who = defense.merge(base_weights, experts, method, ctx), defense.name
    else:
        merged, who = method.merge(base_weights, experts, ctx), method.name
    check_merged(merged, base_weights, who)
    return Result(flatten(merged), dict(merged.info))


def repair(work: Work) -> Result:
    method: MergeMethod = work.component("merging")
    defense: Defense = work.component("defense")
    base_weights = work.tensors("base")
    ctx = merge_context(work, method, work.seed)
    repaired = defense.repair(work.merged("merged"), base_weights, ctx)
    check_merged(repaired, base_weights, defense.name)
    _check_served(repaired, method, work)
    return Result(flatten(repaired), dict(repaired.info))


def _check_served(repaired: Merged, method: MergeMethod, work: Work) -> None:
    """ContractError if the merge method's own networks do not hold what a repair put in for a task."""
    if type(method).network is MergeMethod.network:
        return
    for task, weights in repaired.per_task.items():
        network = method.network(work.backbone, repaired, task)
        held = (network.network if isinstance(network, Adapted) else network).state_dict()
        lost = [n for n, w in weights.items() if n not in held or not torch.equal(held[n].cpu(), w.cpu())]
        if lost:
            raise ContractError(f"{method.name} serves {task} without the repaired {lost[0]}")


# --------------------------------------------------------------------------- evaluation


KINDS: dict[str, Callable[[Work], Result]] = {
    "data": data, "base": base, "head": head, "expert": expert, "import": published, "trigger": trigger, "poison": poison,
    "forge": forge, "guard": guard, "reference": reference, "protect": protect, "recover": recover,
    "examine": examine, "screen": screen, "merge": merge, "repair": repair, "evaluate": evaluate, "compare": compare,
    "secret": secret, "verify": verify, "visibility": visibility,
}  # fmt: skip


TRAINED = ("expert", "trigger", "poison", "forge", "guard", "reference", "repair")
"""Kinds in which whole networks may be trained, beside copies of their weights."""


def _seed(key: str, device: torch.device) -> None:
    """A component that draws behind the context's back still gives the same numbers on any worker."""
    number = int(key[:15], 16)
    if device.type == "cpu":  # asking each kind of other devices takes longer than a tiny step
        torch.default_generator.manual_seed(number)
    else:
        torch.manual_seed(number)
    np.random.seed(int(key[:8], 16))
    random.seed(key)


def run(step: Step, bench: Bench, kinds: Mapping[str, str]) -> tuple[Laid, dict[str, Any]]:
    """Do a step: (safetensors file, JSON facts). ``kinds`` tells the kind of each input key."""
    work = Work(step, bench, kinds)
    _seed(step.key, bench.device)
    try:
        with returned_blocks(step.kind in TRAINED and work.heavy):
            tensors, info = KINDS[step.kind](work)
    finally:
        changed = work.changed()
    if changed:
        raise ContractError(f"changed its input {changed} in place")
    return packed(tensors), dict(info)
