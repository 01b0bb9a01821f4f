"""A screen that looks at experts one by one: each is looked at once, whoever stands beside it and in how many cells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mergesec.conformance.battery import MICRO, check_file, run_here
from mergesec.contracts import ContractError
from mergesec.execution.harvest import make_records
from mergesec.execution.scheduler import Outcome
from mergesec.execution.store import Store
from mergesec.execution.work import Bench
from mergesec.planning.catalog import Catalog, load_catalog
from mergesec.planning.gridspec import parse_grid
from mergesec.planning.plan import Plan, Step, back, make_plan
from mergesec.planning.resolve import resolve

BARS, BLOBS, RINGS = TASKS = ("micro/bars", "micro/blobs", "micro/rings")

SCREEN = """
import torch
from mergesec.contracts import Defense, Screened

CARD = {
    "name": "lookers", "kind": "defense", "class": "Lookers", "version": "1", "title": "Lookers", "summary": "x",
    "threat": "backdoor", "hooks": ["examine", "screen"], "data": "tuning", "modalities": ["image"],
    "knowledge": "tuning rows", "after_examine": ["most"],
    "parameters": {
        "most": {"type": "float", "default": 100.0, "max": 100.0},
        "scale": {"type": "float", "default": 1.0},
    },
}


class Lookers(Defense):
    def __init__(self, most, scale):
        self.most, self.scale = most, scale

    def examine(self, base, expert, ctx):
        assert list(ctx.views) == [expert.task], "the views of others are no part of it"
        assert ctx.views[expert.task].tuning is not None
        BODY

    def screen(self, base, experts, ctx):
        away = {e.task: float(e.findings["away"]) for e in experts}
        kept = [e for e in experts if away[e.task] <= self.most]
        return Screened(kept or experts[:1], {"away": away})
"""
AWAY = (
    "return {'away': self.scale * sum((expert.weights[n] - base[n]).norm() for n in base if 'weight' in n)}"
)


def _catalog(folder: Path, body: str = AWAY) -> Catalog:
    path = folder / "lookers.py"
    path.write_text(SCREEN.replace("BODY", body))
    return load_catalog([MICRO, path])


def _plan(catalog: Catalog, **axes: Any) -> Plan:
    raw = {
        "name": "g", "suite": {"backbone": "micro/vit", "tasks": list(TASKS)}, "threats": ["backdoor"],
        "axes": {"merging": ["simple_average"], "adversary": [BARS], **axes}, "recipe": {"epochs": 1, "max_train": 64},
    }  # fmt: skip
    return make_plan(resolve(parse_grid(raw, "grid g"), catalog), lambda task: "")


def _of(plan: Plan, kind: str) -> list[Step]:
    return [s for s in plan.steps.values() if s.kind == kind]


def test_an_expert_is_looked_at_once_for_all_cells_that_it_is_part_of(tmp_path: Path) -> None:
    catalog = _catalog(tmp_path)
    plan = _plan(
        catalog, attacks=["none", "badnets", "blended"], defenses=["none", "lookers", {"name": "lookers", "most": 1.0}],
        experts=["all", [BARS, BLOBS]], merging=["simple_average", "task_arithmetic"],
    )  # fmt: skip
    looks = _of(plan, "examine")
    seen = [dict(s.inputs)[f"expert:{json.loads(s.args)['task']}"] for s in looks]
    assert len(seen) == len(set(seen)) == 3 + 2  # the clean experts, and one of each attack
    screens = _of(plan, "screen")
    assert len(screens) == 2 * 2 * 3  # each limit, company and adversary (or nobody)
    for step in screens:
        inputs = dict(step.inputs)
        experts = {r.removeprefix("expert:"): k for r, k in inputs.items() if r.startswith("expert:")}
        for task, expert in experts.items():
            look = plan.steps[inputs[f"finding:{task}"]]
            assert look.kind == "examine" and dict(look.inputs)[f"expert:{task}"] == expert
    other = _plan(catalog, attacks=["badnets"], defenses=[{"name": "lookers", "scale": 2.0}])
    assert not {s.key for s in _of(other, "examine")} & {s.key for s in looks}  # that one it does read


def test_what_was_found_reaches_the_screen_and_its_time_the_record(tmp_path: Path) -> None:
    plan = _plan(_catalog(tmp_path), attacks=["badnets"], defenses=["lookers"])
    bench = Bench(Store(tmp_path / "store"), plan.grid.catalog, torch.device("cpu"))
    run_here(plan, bench)
    for step in plan.steps.values():  # in this process no worker adds what it measured
        blob, meta = bench.store.read(step.kind, step.key)
        measured = {**meta["info"], "seconds": 1.0, "peak_mb": 2.0, "device": "cpu"}
        bench.store.put(step.kind, step.key, bytes(blob), measured)
    (record,) = make_records(plan, bench.store, Outcome())
    (cell,) = plan.cells
    base = bench.read("base", _of(plan, "base")[0].key)[0]
    expected = {}
    for role, key in plan.steps[back(plan, dict(cell.roles)["merge"])[-1]].inputs:
        if role.startswith("expert:"):
            weights = bench.read(plan.steps[key].kind, key)[0]
            away = sum(float((weights[n] - base[n]).norm()) for n in base if "weight" in n)
            expected[role.removeprefix("expert:")] = away
    assert record.facts["screen"]["report"]["away"] == pytest.approx(expected)
    assert record.cost["defense"]["seconds"] == 1.0 + len(TASKS)  # the screening, and a look at each
    apart = [name.partition("@")[0] for name in record.cost if "@" in name]
    assert sorted(apart) == [*["examine"] * len(TASKS), "poison", "screen", "trigger"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [("return {}", "lookers.examine gave nothing back"), ("return {'away': torch.tensor(float('nan'))}", "'away' holds 1 non-finite")],
    ids=["nothing", "not a number"],
)  # fmt: skip
def test_a_look_that_finds_nothing_is_no_finding(body: str, expected: str, tmp_path: Path) -> None:
    plan = _plan(_catalog(tmp_path, body), attacks=["none"], defenses=["lookers"])
    bench = Bench(Store(tmp_path / "store"), plan.grid.catalog, torch.device("cpu"))
    with pytest.raises(ContractError, match=expected):
        run_here(plan, bench)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "said"),
    [
        (AWAY, ""),
        ("return {}", "lookers.examine gave nothing back"),
        ("return {'away': torch.tensor(float('inf'))}", "'away' holds 1 non-finite"),
        ("return {'away': ctx.views[expert.task].tuning.targets.float().std() * len(ctx.views)}", ""),
    ],
    ids=["sound", "nothing", "infinite", "of its rows"],
)
def test_a_strangers_look_is_checked_outside_its_process(
    body: str, said: str, tmp_path: Path, bench: Any
) -> None:
    plugin = tmp_path / "lookers.py"
    plugin.write_text(SCREEN.replace("BODY", body))
    axes = {"merging": ["simple_average"], "attacks": ["none"], "defenses": ["none", "lookers"]}
    grid = bench.grid(axes=axes, threats=["backdoor"])
    done = bench.run(grid, plugins=(plugin,))
    assert done.code == bool(said)
    assert said in done.out + done.err
    assert ("4 of 4 cells done" in done.out) == (not said)
    assert ("2 of 4 cells done" in done.out) == bool(said)  # the others are not touched by it


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "expected"), [(AWAY, ""), ("return {'away': torch.tensor(self.most)}", "what examine gives depends on most")]
)  # fmt: skip
def test_the_battery_finds_a_look_that_depends_on_what_comes_after(
    body: str, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "lookers.py"
    path.write_text(SCREEN.replace("BODY", body))
    wrong = [c.message for _, c in check_file(path, load_catalog()) if c.passed is False]
    assert len(wrong) == bool(expected), wrong
    assert all(expected in w for w in wrong), wrong
