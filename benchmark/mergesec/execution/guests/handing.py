"""What a step's side may see of each input: decided here, in the worker, before anything is handed to a guest.

Labels of the test split are never handed over; its inputs only where the step serves or adapts on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergesec.contracts import Task, Weights
from mergesec.execution.contexts import half_of, reference_rows
from mergesec.execution.store import Laid, digests_of
from mergesec.execution.work import Work
from mergesec.execution.work import packed as as_file

SPLITS = ("train", "tuning", "test")
TRAINS = ("head", "expert", "trigger", "poison", "forge", "guard", "reference")
"""Steps whose side has training rows of its task; all others have tuning rows."""
MEASURES = ("evaluate", "compare", "visibility")
"""Steps that compute on test inputs."""
HIDDEN = -1
"""Stands where a test label was."""


class Handed(NamedTuple):
    """An input as a guest gets it: a safetensors file and the metadata beside it."""

    blob: Laid
    meta: dict[str, Any]


def handed(work: Work, role: str) -> Handed:
    """An input of the step, with what its side must not know left out."""
    key = work.inputs[role]
    kind = work.kind_of(role)
    packed, info = work.bench.read(kind, key)
    if kind != "data":
        return Handed(as_file(packed), {"info": info, "digests": dict(work.bench.digests(key))})
    kept = {n: t for n, t in packed.items() if _split(n) in visible_splits(work) or _split(n) not in SPLITS}
    if role == "target_data":
        kept = _few(work, packed, kept)
    if _is_halved(work, role):
        kept, info = {**kept, **_half(work, role, packed)}, {**info, "rows": work.args["rows"]}
    if "test/targets" in kept:
        kept["test/targets"] = torch.full_like(kept["test/targets"], HIDDEN)
    blob = as_file(kept)
    return Handed(blob, {"info": info, "digests": digests_of(blob)})


def visible_splits(work: Work) -> tuple[str, ...]:
    """The splits of a task that the step's side sees."""
    if work.step.kind in MEASURES:
        return ("test",)
    if work.step.kind in TRAINS:
        return ("train",)
    return ("tuning", "test") if work.args.get("protocol") == "transductive" else ("tuning",)


def _few(work: Work, packed: Weights, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the task that a backdoor aims at: the few training rows of the target class that the adversary has.
    All training rows if the task is a plugin's own, whose packing only the plugin knows."""
    if work.foreign("target"):
        return dict(kept)
    task: Task = work.component("target")
    train = task.unpack(packed)["train"]
    rows = reference_rows(train.targets, int(work.args["target"]), int(work.args["reference"]))
    few = task.pack({"train": train.take(rows)})
    return {**kept, **few}


def _is_halved(work: Work, role: str) -> bool:
    """Whether of these rows the step's side has a half. Of a plugin's own task, whose packing only the plugin knows, it
    is handed all and cuts them itself."""
    mine = role in ("data", f"data:{work.args['task']}") if "rows" in work.args else False
    return mine and not work.foreign(role.replace("data", "task", 1))


def _half(work: Work, role: str, packed: Weights) -> Weights:
    """The tuning rows that the step's side has."""
    task: Task = work.component(role.replace("data", "task", 1))
    return dict(task.pack({"tuning": half_of(task.unpack(packed)["tuning"], work.args["rows"])}))


def _split(name: str) -> str:
    return name.partition("/")[0]
