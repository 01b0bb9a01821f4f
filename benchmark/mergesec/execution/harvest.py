"""From plan and store to records: what the committed steps of each cell came to."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mergesec.errors import UsageError
from mergesec.evidence.records import (
    APART,
    SCHEMA,
    Component,
    Count,
    Record,
    Status,
    count,
    grid_folder,
    read_record,
    readable_name,
)
from mergesec.execution.scheduler import Outcome
from mergesec.execution.store import CorruptArtifact, Store, parse_safetensors
from mergesec.files import write_changed
from mergesec.planning.cells import Cell
from mergesec.planning.plan import CellPlan, Plan, back, behind, data_steps, findings, siblings
from mergesec.planning.refs import HUB_NAME, NONE, PACKAGED, Ref
from mergesec.planning.resolve import Grid
from mergesec.planning.seeds import salt_digest
from mergesec.threats import TRIGGERED, Hook, Role, Threat

Evaluation = dict[str, NDArray[np.int32]]


def read_evaluation(store: Store, kind: str, key: str) -> tuple[Evaluation, dict[str, Any]]:
    """Predictions, targets and copies of an evaluate step, as numpy, verified; no torch."""
    blob, meta = store.read(kind, key)
    raw = parse_safetensors(blob)
    arrays = {n: np.frombuffer(r.data, np.int32) for n, r in raw.items() if not n.startswith("kept|")}
    return arrays, meta["info"]


def cell_name(cell: Cell) -> str:
    """A readable, unique file name."""
    text = "|".join(
        [cell.threat, cell.merging.text, cell.attack.text, cell.defense.text, cell.subject,
         str(cell.target_class), ",".join(cell.experts), str(cell.seed),
         *([str(cell.protected), cell.secrets] if cell.protected > 1 else []),
         *([f"adversaries {cell.adversaries}"] if cell.adversaries > 1 else []),
         *([f"aim {cell.target_task}"] if cell.target_task else []),
         *([f"company {cell.company}"] if cell.company != "next" else [])]
    )  # fmt: skip
    shown = readable_name(
        cell.threat, cell.merging.name, cell.attack.name, cell.defense.name, cell.subject, cell.seed
    )
    return f"{shown}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def _status(plan: CellPlan, has: Mapping[str, Any], outcome: Outcome) -> tuple[Status, str]:
    for _, key in plan.roles:
        if key in outcome.failed:
            return "failed", outcome.failed[key]
        if key in outcome.blocked:
            return "blocked", outcome.blocked[key]
    if all(key in has for _, key in plan.roles):
        return "done", ""
    return "missing", "not run yet"


def _counts(cell: Cell, role: str, found: Evaluation) -> dict[str, Count]:
    """Accuracy for a clean evaluation; ASR (non-target samples only) and RA for a triggered one."""
    name, _, triggered = role.partition(TRIGGERED[0])
    kind, _, suspect = name.partition(":")
    metric, name = ("mark", suspect) if kind == Role.VERIFY else ("acc", kind)
    counts: dict[str, Count] = {}
    for key in found:
        if not key.startswith("predictions|"):
            continue
        task = key.removeprefix("predictions|")
        predicted, target = found[key], found[f"targets|{task}"]
        if not triggered:
            counts[f"{metric}/{name}/{task}"] = count(predicted == target)
        else:
            outside = target != cell.target_class
            copied = found.get(f"copies|{task}")
            won = predicted == cell.target_class if copied is None else copied == 1
            counts[f"asr/{name}/{task}"] = count(won, outside)
            counts[f"ra/{name}/{task}"] = count(predicted == target, outside)
    return counts


def make_records(plan: Plan, store: Store, outcome: Outcome) -> list[Record]:
    """One record per cell, from committed evaluations only. CorruptArtifact if one does not verify."""
    kinds = {key: plan.steps[key].kind for c in plan.cells for _, key in c.roles}
    present = store.keys()
    found = {k: read_evaluation(store, kind, k) for k, kind in kinds.items() if k in present}
    shared = {**_shared_provenance(plan.grid), **_data(plan, store)}
    records = []
    road = Road(plan, store)
    for planned in plan.cells:
        status, reason = _status(planned, found, outcome)
        if status == "done" and (lost := road.lost(planned)):
            status, reason = "missing", f"what {lost} measured is gone from the store; run the grid again"
        counts: dict[str, Count] = {}
        values: dict[str, float] = {}
        facts: dict[str, Any] = {}
        if status == "done":
            for role, key in planned.roles:
                arrays, info = found[key]
                counts |= _counts(planned.cell, role, arrays)
                _note(role, info, values, facts)
            if planned.cell.threat == Threat.BACKDOOR:
                _note_defended(planned, road, values, facts)
                _note_coefficients(planned, road, values)
        cost = _cost(road, planned, found) if status == "done" else {}
        if status == "done" and planned.cell.threat == Threat.BACKDOOR:
            cost |= _sides(planned, road)
        inside = status != "done" or all(
            road.facts(k).get("contained") is True for k in plan.foreign(planned)
        )
        records.append(
            _record(plan, planned, status, reason, counts, values, facts, cost, found, shared, inside)
        )
    return records


def _note(role: str, info: Mapping[str, Any], values: dict[str, float], facts: dict[str, Any]) -> None:
    """Numbers and facts of comparisons and verifications, and what tasks measure beside predictions."""
    kind, triggered = role.partition(":")[0], role.endswith(TRIGGERED)
    for task, measures in ({} if triggered else info.get("measures", {})).items():
        for name, (value, low, high) in measures.items():
            where = f"{kind}/{task}"
            values |= {f"{name}/{where}": value, f"{name}_low/{where}": low, f"{name}_high/{where}": high}
    if role in (Role.LOGITS, Role.GAP):
        suffix = "" if role == Role.LOGITS else "_recovered"
        values[f"max_abs_dlogit{suffix}"] = float(info["max_abs_dlogit"])
        for which in ("to_base", "to_expert", "expert_to_base"):
            values |= {f"distance{suffix}/{which}/{k}": float(v) for k, v in info.get(which, {}).items()}
        if role == Role.LOGITS:
            facts["protection"] = info.get("report", {})
    elif role == Role.VISIBILITY:
        values |= {f"visibility/{name}": float(v) for name, v in info["visibility"].items()}
    elif role.startswith(Role.VERIFY.of("")):
        suspect = role.partition(":")[2]
        values[f"detected/{suspect}"] = float(info["detected"])
        values[f"statistic/{suspect}"] = float(info["statistic"])


MEASURED = ("seconds", "peak_mb", "device", "plugins", "contained")
"""Facts that the worker adds to a step's own."""


@dataclass
class Road:
    """The steps behind a cell's evaluations, and their facts, each read once."""

    plan: Plan
    store: Store
    _facts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def facts(self, key: str) -> dict[str, Any]:
        """A step's facts, verified; CorruptArtifact if they are gone: nothing stands in for what was measured."""
        if key not in self._facts:
            self._facts[key] = self.store.facts(self.plan.steps[key].kind, key)
        return self._facts[key]

    def inputs(self, key: str) -> dict[str, str]:
        return dict(self.plan.steps[key].inputs)

    def lost(self, planned: CellPlan) -> str:
        """The label of the first step whose facts a record would need and the store lacks; empty if none."""
        for key in sorted({*behind(self.plan, planned), *(self.data[t] for t in planned.cell.experts)}):
            try:
                self.facts(key)
            except CorruptArtifact:
                return self.plan.steps[key].label
        return ""

    def rows(self, tasks: Iterable[str], split: str) -> int:
        """Rows of a split, summed over tasks."""
        return sum(int(self.facts(self.data[task])["sizes"][split]) for task in tasks)

    @cached_property
    def data(self) -> dict[str, str]:
        """Keys of the data steps by task."""
        return data_steps(self.plan)


def _note_defended(planned: CellPlan, road: Road, values: dict[str, float], facts: dict[str, Any]) -> None:
    """What the defended merge says of itself, and whom a screen let in."""
    cell, roles = planned.cell, dict(planned.roles)
    if cell.defense is NONE:
        return
    told: dict[str, Any] = {}
    for key in reversed(back(road.plan, roles[Role.MERGE])):
        info = road.facts(key)
        if road.plan.steps[key].kind == "screen":
            if cell.attack is not NONE:
                benign = [t for t in cell.experts if t not in cell.crew]
                kept = info["kept"]
                values["screen/caught"] = sum(t not in kept for t in cell.crew) / len(cell.crew)
                if benign:
                    values["screen/false"] = sum(t not in kept for t in benign) / len(benign)
            facts["screen"] = {k: v for k, v in info.items() if k not in MEASURED}
        else:
            told |= {k: v for k, v in info.items() if k not in MEASURED}
    facts["merge"] = told


def _note_coefficients(planned: CellPlan, road: Road, values: dict[str, float]) -> None:
    """Of a merge that learns or is told a coefficient per expert: that of the malicious ones, of the others, and of
    the malicious ones' tasks where all experts are clean. Means."""
    cell, roles = planned.cell, dict(planned.roles)
    if cell.attack is NONE:
        return
    control = Role.CLEAN_MERGE if cell.defense is NONE else Role.DEFENDED_CLEAN_MERGE
    honest = tuple(t for t in cell.experts if t not in cell.crew)
    for name, role, tasks in (
        ("malicious", Role.MERGE, cell.crew), ("others", Role.MERGE, honest), ("control", control, cell.crew),
    ):  # fmt: skip
        found = road.facts(road.inputs(roles[role])["model"]).get("coefficients")
        if isinstance(found, Mapping) and tasks and all(t in found for t in tasks):
            values[f"coefficient/{name}"] = sum(float(found[t]) for t in tasks) / len(tasks)


def _sides(planned: CellPlan, road: Road) -> dict[str, dict[str, float]]:
    """Seconds, peak MiB and rows of data of a backdoor cell's attack and defense, over all their steps."""
    cell, roles = planned.cell, dict(planned.roles)
    sides: dict[str, dict[str, float]] = {}
    grid = road.plan.grid
    if cell.attack is not NONE:
        made = [
            k
            for k in back(road.plan, roles[Role.POISONED])
            if road.plan.steps[k].kind in (Hook.POISON, Hook.FORGE)
        ]
        trigger = [road.inputs(roles[Role.MERGE.triggered])["trigger"]]
        card = grid.catalog.entries["attack"][cell.attack.name].card
        rows = 0
        if card.data == "train":
            rows = _trained_on(road, trigger)
        elif card.data == "tuning":
            rows = road.rows([cell.subject], "tuning")
        side = {"rows": float(rows)}
        side |= {"trigger_seconds": _summed(road, trigger), "poison_seconds": _summed(road, made)}
        side["seconds"] = side["trigger_seconds"] + side["poison_seconds"]
        sides["attack"] = side | {"peak_mb": _peak(road, trigger + made)}
        sides |= _apart(road, trigger + made)
    if cell.defense is not NONE:
        made = [
            k
            for k in back(road.plan, roles[Role.MERGE])
            if any(role == "defense" for role, _ in road.plan.steps[k].components)
        ]
        card = grid.catalog.entries["defense"][cell.defense.name].card
        split = "test" if grid.spec.protocol == "transductive" else "tuning"
        rows = road.rows(cell.experts, split) if card.data == "tuning" else 0
        reported = road.facts(made[0]).get("repair_rows") if made else None
        if isinstance(reported, Mapping):
            rows = sum(reported.values())
        further = siblings(road.plan, made)
        rows += _trained_on(road, further)
        every = [*made, *further, *findings(road.plan, made)]
        side = {"rows": float(rows), "seconds": _summed(road, every)}
        sides["defense"] = side | {"peak_mb": _peak(road, every)}
        sides |= _apart(road, every)
    return sides


def _apart(road: Road, steps: Iterable[str]) -> dict[str, dict[str, float]]:
    """What each step of a side took, under a name that no other step has: cells share many of them."""
    found = {f"{road.plan.steps[key].kind}{APART}{key[:16]}": road.facts(key) for key in steps}
    return {name: {"seconds": facts["seconds"], "peak_mb": facts["peak_mb"]} for name, facts in found.items()}


def _trained_on(road: Road, steps: Iterable[str]) -> int:
    """Training rows that these steps had: somebody labelled them, whoever they belong to."""
    return sum(_train_rows(road, json.loads(road.plan.steps[key].args)) for key in steps)


def _train_rows(road: Road, args: Mapping[str, Any]) -> int:
    rows, recipe = road.rows([args["task"]], "train"), dict(args["recipe"])
    if half := recipe.get("half"):
        rows = (rows + 1) // 2 if half == "first" else rows // 2
    most = int(recipe.get("max_train", 0))
    return min(most, rows) if most else rows


def _summed(road: Road, keys: Iterable[str]) -> float:
    return float(sum(road.facts(k)["seconds"] for k in keys))


def _peak(road: Road, keys: Iterable[str]) -> float:
    return float(max((road.facts(k)["peak_mb"] for k in keys), default=0.0))


def _data(plan: Plan, store: Store) -> dict[str, dict[str, str]]:
    """Fingerprints of the tasks' data as loaded, and the tasks that have fewer than their card says; of data
    that was not loaded (yet) nothing."""
    prints, partial = {}, {}
    for task, key in data_steps(plan).items():
        try:
            meta = store.meta("data", key)
        except CorruptArtifact:
            continue
        digests = json.dumps(meta["digests"], sort_keys=True)
        prints[task] = hashlib.sha256(digests.encode()).hexdigest()[:32]
        if how := str(meta["info"].get("partial") or ""):
            partial[task] = how
    return {"data": prints, "partial": partial}


def _cost(road: Road, planned: CellPlan, found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Per role: seconds and peak MiB of the evaluation, and of the step that made the model."""
    cost: dict[str, dict[str, float]] = {}
    for role, key in planned.roles:
        cost[role] = {n: float(found[key][1][n]) for n in ("seconds", "peak_mb")}
        model = road.inputs(key).get("model")
        if model is not None:
            made = road.facts(model)
            cost[role] |= {f"made_{n}": float(made[n]) for n in ("seconds", "peak_mb")}
    return cost


def _record(
    plan: Plan, planned: CellPlan, status: Status, reason: str, counts: dict[str, Count],
    values: dict[str, float], facts: dict[str, Any], cost: dict[str, dict[str, float]],
    found: Mapping[str, Any], shared: dict[str, Any], inside: bool,
) -> Record:  # fmt: skip
    cell, spec = planned.cell, plan.grid.spec
    devices = sorted({found[k][1]["device"] for _, k in planned.roles if k in found})
    used = [r.name for r in (cell.merging, cell.attack, cell.defense) if r is not NONE]
    components = {name: shared["components"][name] for name in used}
    return Record(
        cell=cell_name(cell), grid=spec.name, suite=spec.suite.name, backbone=plan.grid.backbone.label,
        protocol=spec.protocol, threat=cell.threat, merging=cell.merging.label, attack=cell.attack.label,
        defense=cell.defense.label, components=_components(cell), subject=cell.subject, target_class=cell.target_class,
        experts=list(cell.experts), seed=cell.seed, protected=cell.protected, secrets=cell.secrets,
        adversaries=cell.adversaries, target_task=cell.target_task, company=cell.company, drawn=_drawn(plan.grid), status=status, reason=reason,
        contained="yes" if inside else "no", counts=counts,
        values=values, facts=facts, steps=dict(planned.roles), cost=cost,
        provenance={**shared, "components": components, "devices": devices},
    )  # fmt: skip


def _drawn(grid: Grid) -> list[Any]:
    """Axes whose values the planner drew by subject and seed."""
    axes = grid.spec.axes
    company = axes.company == "drawn" and any(isinstance(value, int) for value in axes.experts)
    return [
        *(["target_class"] if axes.target_class == "drawn" else []), *(["experts"] if company else []),
    ]  # fmt: skip


def _components(cell: Cell) -> dict[str, Component]:
    """The cell's methods with their parameters; places shrink to their last part."""
    refs = {"merging": cell.merging, "attack": cell.attack, "defense": cell.defense}
    return {
        kind: Component(
            name=ref.name, parameters=_without_place(json.loads(json.dumps(dict(ref.parameters))))
        )
        for kind, ref in refs.items()
        if ref is not NONE
    }


def _shared_provenance(grid: Grid) -> dict[str, Any]:
    packages = {"python": platform.python_version(), "mergesec": version("mergesec")}
    for name in ("torch", "numpy", "scipy", "transformers"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    refs: list[Ref] = [*grid.merging, *grid.attacks, *grid.defenses]
    components = {r.name: _component(grid, r) for r in refs if r is not NONE}
    return {
        "versions": packages,
        **({"salt": salt} if (salt := salt_digest()) else {}),
        "backbone": json.loads(grid.backbone.text),
        "tasks": {t.name: json.loads(t.text) for t in grid.tasks},
        "recipe": dict(grid.recipe),
        "components": components,
    }


def _component(grid: Grid, ref: Ref) -> dict[str, str]:
    entry = grid.catalog.get(ref.kind, ref.name)
    found = {"version": entry.card.version, "origin": entry.origin}
    return {**found, "digest": entry.digest} if entry.digest else found


class Standing(NamedTuple):
    """The records of a grid as they stand after writing."""

    records: list[Record]
    older: list[str]
    """Cells whose done record of an earlier run was kept, because this run did not get to them."""


def write_records(folder: Path, records: list[Record], grid: Grid) -> Standing:
    """One file per cell under ``folder/<grid>/`` and a manifest naming the cells that were asked for.

    A done record is only ever replaced by a done one of the same cell: what a run did not finish leaves the
    earlier result where it is.
    """
    home = grid_folder(folder, grid.spec.name)
    standing, older = [], []
    for record in records:
        path = home / f"{record.cell}.json"
        before = _done_before(path) if record.status != "done" else None
        if before is not None:
            older.append(record.cell)
            standing.append(before)
            continue
        standing.append(record)
        data = (json.dumps(record.model_dump(mode="json"), sort_keys=True) + "\n").encode()
        write_changed(path, data)
    manifest = {
        "schema_version": SCHEMA,
        "spec": json.loads(grid.spec.model_dump_json(), object_hook=_without_place),
        "cells": [r.cell for r in records],
    }
    write_changed(home / "grid.json", (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())
    return Standing(standing, older)


def _done_before(path: Path) -> Record | None:
    """The sound and done record at a path; None if there is none."""
    try:
        record = read_record(path.parent, path.stem)
    except UsageError:
        return None
    return record if record.status == "done" else None


def _without_place(fields: dict[str, Any]) -> dict[str, Any]:
    """A path given to a component shrinks to its last part: where it lies is nobody's business."""

    def place(name: str, value: Any) -> bool:
        if not isinstance(value, str) or re.fullmatch(f"{HUB_NAME}|{PACKAGED}", value):
            return False
        return name in ("path", "model") or Path(value).is_absolute() or value.startswith("~")

    return {k: Path(v).name if place(k, v) else v for k, v in fields.items()}
