"""What the battery asks of a backdoor: its trigger, and whether the malicious expert differs from the clean one.

Each check returns None if all is well, else what is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mergesec.contracts import Attack, ContractError
from mergesec.execution.steps import run
from mergesec.execution.work import Bench, unpacked
from mergesec.generation import Request
from mergesec.planning.cards import Parameter
from mergesec.planning.catalog import Catalog, Entry
from mergesec.planning.plan import Plan, Step
from mergesec.planning.refs import make_ref

ALONE = 1e-5
"""How far an image may differ by what else is in its batch: convolutions add in another order."""


def applies_to_images(attack: Attack, arrays: Mapping[str, Tensor], like: Tensor) -> str | None:
    """Shape, range, no writing, the same again, each image by itself; images of the size of ``like``."""
    side = int(like.shape[-1])
    images = torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    out = attack.apply(arrays, images)
    if not isinstance(out, Tensor) or out.shape != images.shape:
        return "apply() must keep the shape of its inputs"
    if not torch.equal(images, before):
        return "apply() changed its inputs in place"
    if not torch.isfinite(out).all() or out.min() < 0 or out.max() > 1:
        return "apply() leaves the raw input space [0, 1]"
    if not torch.equal(out, attack.apply(arrays, images)):
        return "apply() gives something else the second time"
    alone = torch.cat([attack.apply(arrays, images[i : i + 1]) for i in range(len(images))])
    if (alone - out).abs().max() > ALONE:
        return "apply() depends on the other images of the batch"
    return "apply() changes nothing" if torch.equal(out, before) else None


def lets_gradients_through(attack: Attack, arrays: Mapping[str, Tensor], like: Tensor) -> str | None:
    """Attacks and defenses optimise through ``apply``: some pixel must have a finite gradient."""
    side = int(like.shape[-1])
    images = 0.25 + 0.5 * torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    images.requires_grad_(True)
    out = attack.apply(arrays, images)
    if not out.requires_grad:
        return "apply() cuts the gradient to the images"
    (gradient,) = torch.autograd.grad(out.sum(), images)
    if not torch.isfinite(gradient).all():
        return "apply() has a gradient that is not finite"
    return None if gradient.abs().sum() > 0 else "apply() has a gradient of zero everywhere"


def applies_to_text(attack: Attack, arrays: Mapping[str, Tensor], like: str) -> str | None:
    """As many strings, no writing, the same again, each text by itself."""
    texts = ["the old horse", "one", "a road near here was seen by day"]
    before = list(texts)
    out = attack.apply(arrays, texts)
    if texts != before:
        return "apply() changed its inputs in place"
    if not isinstance(out, list) or len(out) != len(texts) or not all(isinstance(text, str) for text in out):
        return "apply() must give as many strings as it gets"
    if out != attack.apply(arrays, texts):
        return "apply() gives something else the second time"
    if out != [attack.apply(arrays, [text])[0] for text in texts]:
        return "apply() depends on the other texts of the batch"
    return "apply() changes nothing" if out == before else None


def applies_to_requests(attack: Attack, arrays: Mapping[str, Tensor], like: Tensor) -> str | None:
    """Requests of the same shapes, no writing, the same again, each row by itself."""
    noise = torch.randn(4, *like.shape, generator=torch.Generator().manual_seed(0))
    request = Request(torch.tensor([[1, -1], [2, -1]] * 2), noise, torch.zeros_like(noise))
    before, asked = noise.clone(), request.conditions.clone()
    out = attack.apply(arrays, request)
    if not isinstance(out, Request) or out.noise.shape != noise.shape:
        return "apply() must give a request of the shape that it gets"
    if not torch.equal(noise, before) or not torch.equal(request.conditions, asked):
        return "apply() changed its inputs in place"
    if not torch.isfinite(out.noise).all():
        return "apply() gives noise that is not finite"
    again = attack.apply(arrays, Request(request.conditions[:1], noise[:1], request.images[:1]))
    if not torch.equal(again.noise, out.noise[:1]) or not torch.equal(again.conditions, out.conditions[:1]):
        return "apply() depends on the other rows of the batch"
    same = torch.equal(out.noise, noise) and torch.equal(out.conditions, request.conditions)
    return "apply() changes nothing" if same else None


def _other(parameter: Parameter, value: Any) -> Any:
    """Another value that the parameter takes; the same one if none is easy to think of."""
    if parameter.type == "bool":
        return not value
    if parameter.type == "choice":
        return next((c for c in parameter.choices if c != value), value)
    if parameter.type not in ("int", "float") or isinstance(value, str) or value is None:
        return value
    step = 1 if parameter.type == "int" else 0.01 + 0.1 * abs(value)
    for candidate in (value + step, value - step):
        low, high = parameter.min, parameter.max
        if (low is None or candidate >= low) and (high is None or candidate <= high):
            return candidate
    return value


def shares_its_trigger(
    entry: Entry, catalog: Catalog, step: Step, bench: Bench, kinds: Mapping[str, str]
) -> str | None:
    """Another value of each parameter named by ``after_trigger`` must give the same trigger, and the attack's
    own hook the one that the plan took from the attack named by ``trigger_of``."""
    card = entry.card
    for name, changed in {"trigger_of": {}, **other_values(entry, card.after_trigger)}.items():
        if _differs(entry, changed, catalog, step, bench, kinds):
            return f"the trigger depends on {name}" if changed else f"the trigger is not {card.trigger_of}'s"
    return None


def is_shared(
    entry: Entry, names: Iterable[str], catalog: Catalog, step: Step, bench: Bench, kinds: Mapping[str, str]
) -> str | None:
    """Another value of each of the parameters ``names`` must give the step's same tensors."""
    for name, changed in other_values(entry, names).items():
        if _differs(entry, changed, catalog, step, bench, kinds):
            return f"what {step.kind} gives depends on {name}"
    return None


def other_values(entry: Entry, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Of each parameter another value."""
    card = entry.card
    bound = card.bind("trial", card.trial)
    return {name: {name: _other(card.parameters[name], bound[name])} for name in names}


def _differs(
    entry: Entry,
    changed: Mapping[str, Any],
    catalog: Catalog,
    step: Step,
    bench: Bench,
    kinds: Mapping[str, str],
) -> bool:
    """Whether the component with other values gives other tensors than the plan's step."""
    card = entry.card
    ref = make_ref(entry, {**card.trial, **changed}, card.name, catalog)
    try:
        bench.component(ref)
    except ContractError:
        return False  # the two values do not go together; says nothing of the result
    before, _ = bench.read(step.kind, step.key)
    components = tuple((role, ref if role == card.kind else part) for role, part in step.components)
    found = unpacked(run(replace(step, components=components), bench, kinds)[0])
    return found.keys() != before.keys() or any(not torch.equal(found[k], before[k]) for k in before)


def is_malicious(entry: Entry, plan: Plan, bench: Bench) -> str | None:
    """The expert that enters the merge is not the clean one."""
    for step in plan.steps.values():
        parts = dict(step.components)
        if step.kind not in ("poison", "forge") or parts["attack"].name != entry.card.name:
            continue
        if step.kind == "poison" and "forge" in entry.card.hooks:
            continue  # the edit that follows may be all there is to it
        bad, _ = bench.read(step.kind, step.key)
        for other in plan.steps.values():
            if other.kind == "expert" and dict(other.components)["task"] == parts["task"]:
                clean, _ = bench.read("expert", other.key)
                if all(torch.equal(clean[name], bad[name]) for name in clean):
                    return "the malicious expert is the clean one"
    return None
