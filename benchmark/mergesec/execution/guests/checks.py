"""What a guest gave back for a step, checked in the worker: names, shapes, types, finite numbers, plain facts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mergesec.contracts import ContractError
from mergesec.execution.work import Result, Work, check_merged, check_weights, unflatten
from mergesec.weights import check_finite

LONGEST_FACTS = 1 << 20
"""Bytes of JSON that a step may say of itself."""


def check(work: Work, result: Result) -> Result:
    """The result with its tensors checked; evaluations get their labels here. ContractError for what a step of
    this kind cannot give."""
    who = _who(work)
    try:
        text = json.dumps(dict(result.facts), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ContractError(f"{who}: its facts are not plain JSON ({error})") from None
    if len(text) > LONGEST_FACTS:
        raise ContractError(f"{who}: {len(text)} bytes of facts; at most {LONGEST_FACTS}")
    return _CHECKS.get(work.step.kind, _finite)(work, result, who)


def _who(work: Work) -> str:
    """The component that acts in the step, as errors name it."""
    for role in ("defense", "attack", "merging", "published", "task", "backbone"):
        if role in work.refs and (role != "defense" or work.step.kind not in ("poison", "forge", "trigger")):
            return work.refs[role].name
    return work.step.kind


def _finite(work: Work, result: Result, who: str) -> Result:
    check_finite(result.tensors, who)
    return result


def _weights(work: Work, result: Result, who: str) -> Result:
    check_weights(result.tensors, work.tensors("base"), who)
    return result


def _merged(work: Work, result: Result, who: str) -> Result:
    check_merged(unflatten(result.tensors, result.facts), work.tensors("base"), who)
    return result


def _examined(work: Work, result: Result, who: str) -> Result:
    if not result.tensors:
        raise ContractError(f"{who}.examine gave nothing back")
    return _finite(work, result, who)


def _screened(work: Work, result: Result, who: str) -> Result:
    given = [r.removeprefix("expert:") for r in work.inputs if r.startswith("expert:")]
    kept = result.facts.get("kept")
    if (
        not isinstance(kept, list)
        or not kept
        or len(set(map(str, kept))) < len(kept)
        or not {*kept} <= {*given}
    ):
        raise ContractError(f"{who} kept {kept} of {', '.join(given)}")
    edited = unflatten(result.tensors, {})
    if edited.shared or edited.extra or not edited.per_task.keys() <= {*kept}:
        raise ContractError(f"{who}: a screen gives back experts that it kept, nothing else")
    for weights in edited.per_task.values():
        check_weights(weights, work.tensors("base"), who)
    return result


def _verified(work: Work, result: Result, who: str) -> Result:
    task = work.args["task"]
    hits = result.tensors.get(f"predictions|{task}")
    if hits is None or hits.ndim != 1 or not len(hits) or not bool(((hits == 0) | (hits == 1)).all()):
        raise ContractError(f"{who}: verify gives one bit per query")
    statistic = result.facts.get("statistic")
    if isinstance(statistic, bool) or not isinstance(statistic, int | float):
        raise ContractError(f"{who}: verify's statistic is {statistic!r}, not a number")
    facts = {"detected": result.facts.get("detected") is True, "statistic": float(statistic)}
    return Result({f"predictions|{task}": hits.int(), f"targets|{task}": torch.ones(len(hits)).int()}, facts)


def _evaluated(work: Work, result: Result, who: str) -> Result:
    """Predictions are the guest's; labels come from the worker's own copy of the data."""
    found: dict[str, Tensor] = {}
    for role in work.refs:
        if role.startswith("task:"):
            name = role.removeprefix("task:")
            targets = work.tensors(f"data:{name}")["test/targets"]
            predicted = result.tensors.get(f"predictions|{name}")
            if predicted is None or predicted.shape != targets.shape or predicted.is_floating_point():
                raise ContractError(
                    f"{who}: no prediction for each of the {len(targets)} test rows of {name}"
                )
            found |= {f"predictions|{name}": predicted.int(), f"targets|{name}": targets.int()}
    return Result(found)


def _loaded(work: Work, result: Result, who: str) -> Result:
    """A task's rows. Labels lie where they can be kept from those who must not have them."""
    sizes: Mapping[str, Any] = result.facts.get("sizes", {})
    for split in ("train", "tuning", "test"):
        targets = result.tensors.get(f"{split}/targets")
        if (
            targets is None
            or targets.dtype != torch.int64
            or targets.ndim != 1
            or len(targets) != sizes.get(split)
        ):
            raise ContractError(f"{who}: pack() must hold '{split}/targets', int64 [N], for its N rows")
    return result


_CHECKS: dict[str, Callable[[Work, Result, str], Result]] = {
    **dict.fromkeys(("expert", "import", "poison", "forge", "guard", "reference", "recover"), _weights),
    **dict.fromkeys(("merge", "repair"), _merged),
    "examine": _examined, "screen": _screened, "verify": _verified, "evaluate": _evaluated, "data": _loaded,
}  # fmt: skip
