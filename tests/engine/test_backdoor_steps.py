"""What backdoor hooks are handed, down the real road in the micro world; repairs of merges with masks; the battery."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mergesec.conformance.battery import MICRO, check_file, run_here
from mergesec.contracts import ContractError
from mergesec.evidence.boards import make_boards
from mergesec.evidence.records import Record
from mergesec.execution.harvest import make_records
from mergesec.execution.scheduler import Outcome
from mergesec.execution.store import Store
from mergesec.execution.work import Bench
from mergesec.planning.catalog import Catalog, load_catalog
from mergesec.planning.gridspec import parse_grid
from mergesec.planning.plan import Plan, Step, back, make_plan
from mergesec.planning.resolve import resolve

BARS, BLOBS, RINGS = TASKS = ("micro/bars", "micro/blobs", "micro/rings")

SPY = """
import torch
from mergesec.contracts import Attack, Defense, MergeMethod, Merged, Screened

CARDS = [
    {
        "name": "spy", "kind": "attack", "class": "Spy", "version": "1", "title": "Spy", "summary": "x",
        "threat": "backdoor", "hooks": ["poison"], "modalities": ["image"], "data": "train",
        "off_task": True, "adapts": True, "after_trigger": ["alpha"],
        "parameters": {"alpha": {"type": "float", "default": 5.0}},
    },
    {
        "name": "damper", "kind": "defense", "class": "Damper", "version": "1", "title": "Damper", "summary": "x",
        "threat": "backdoor", "hooks": ["screen", "repair"], "data": "tuning", "per_task": True,
        "parameters": {"drop": {"type": "str", "default": ""}, "shift": {"type": "float", "default": 0.5}},
    },
    {
        "name": "masked", "kind": "merging", "class": "Masked", "version": "1", "title": "Masked", "summary": "x",
        "output": "per_task",
    },
    {
        "name": "deaf", "kind": "merging", "class": "Deaf", "version": "1", "title": "Deaf", "summary": "x",
        "output": "per_task",
    },
]


class Spy(Attack):
    def __init__(self, alpha):
        self.alpha = alpha

    def trigger(self, ctx):
        # reports what it saw
        found = {"patch": torch.ones(3, 4, 4), "alpha": torch.tensor(self.alpha)}
        if ctx.reference is not None:
            found |= {"inputs": ctx.reference.inputs, "targets": ctx.reference.targets}
        return found

    def apply(self, trigger, inputs):
        corner = torch.zeros_like(inputs)
        corner[:, :, :4, :4] = trigger["patch"]
        return torch.where(corner > 0, corner, inputs)

    def poison(self, ctx):
        seen = float(ctx.trigger["patch"].sum()) / 48 + 10 * (ctx.defense is not None)
        seen += 100 * len(ctx.target_task) + (len(ctx.reference) if ctx.reference is not None else 0)
        return {**ctx.base, "stem.bias": torch.full_like(ctx.base["stem.bias"], seen)}


class Damper(Defense):
    def __init__(self, drop, shift):
        self.drop, self.shift = drop, shift

    def screen(self, base, experts, ctx):
        return Screened([e for e in experts if e.task != self.drop], {"dropped": (self.drop,)})

    def repair(self, merged, base, ctx):
        per_task = {}
        for task in ctx.views:
            network = ctx.networks(merged, task)
            assert not network.training
            state = network.state_dict()
            per_task[task] = {"stem.bias": state["stem.bias"] + self.shift}
        return Merged(merged.shared, per_task, merged.extra, {"repair_rows": {t: 7 for t in ctx.views}})


class Masked(MergeMethod):
    # shared weights of the base; each task has its own bias in extra

    def merge(self, base, experts, ctx):
        return Merged(base, extra={e.task: e.weights["stem.bias"] for e in experts})

    def network(self, backbone, merged, task):
        own = {"stem.bias": merged.extra[task]} if task in merged.extra else {}
        network = backbone.build()
        network.load_state_dict({**merged.shared, **own, **merged.per_task.get(task, {})})
        return network.eval()


class Deaf(Masked):
    def network(self, backbone, merged, task):
        network = backbone.build()
        network.load_state_dict(dict(merged.shared))
        return network.eval()
"""


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    path = tmp_path_factory.mktemp("plugin") / "spy.py"
    path.write_text(SPY)
    return load_catalog([MICRO, path])


def _plan(catalog: Catalog, **axes: Any) -> Plan:
    raw = {
        "name": "g",
        "suite": {"backbone": "micro/vit", "tasks": list(TASKS)},
        "axes": {"merging": ["simple_average"], "attacks": ["spy"], "adversary": [BARS], **axes},
        "threats": ["backdoor"],
        "recipe": {"epochs": 1, "max_train": 64},
    }
    return make_plan(resolve(parse_grid(raw, "grid g"), catalog), lambda task: "")


def _bench(folder: Path, catalog: Catalog) -> Bench:
    return Bench(Store(folder), catalog, torch.device("cpu"))


def _of(plan: Plan, kind: str) -> list[Step]:
    return [s for s in plan.steps.values() if s.kind == kind]


def _records(plan: Plan, bench: Bench) -> list[Record]:
    """Records of a plan run in this process, where no worker adds what it measured."""
    for step in plan.steps.values():
        blob = (bench.store.root / "artifacts" / step.kind / f"{step.key}.safetensors").read_bytes()
        info = {
            **bench.store.meta(step.kind, step.key)["info"],
            "seconds": 1.0,
            "peak_mb": 2.0,
            "device": "cpu",
        }
        bench.store.put(step.kind, step.key, blob, info)
    return make_records(plan, bench.store, Outcome())


@pytest.mark.slow
def test_what_hooks_of_an_attack_are_handed(catalog: Catalog, tmp_path: Path) -> None:
    plan = _plan(
        catalog, attacks=[{"name": "spy", "alpha": [1.0, 5.0]}], defenses=["none", {"name": "damper", "drop": BLOBS}],
        target_task=["", RINGS], target_class=[2], adversaries=[1, 2],
    )  # fmt: skip
    bench = _bench(tmp_path, catalog)
    run_here(plan, bench)
    rows = {}
    for step in _of(plan, "trigger"):
        arrays, _ = bench.read("trigger", step.key)
        assert arrays["alpha"] == 5.0  # the trigger sees the default of what comes after it
        rows[json.loads(step.args).get("target_task", "")] = arrays
    assert rows.keys() == {"", RINGS}
    assert "inputs" not in rows[""]
    assert rows[RINGS]["targets"].tolist() == [2] * 10
    data = next(s for s in _of(plan, "data") if json.loads(s.args)["task"] == RINGS)
    train = bench.component(dict(data.components)["task"]).unpack(bench.read("data", data.key)[0])["train"]
    known = {row.numpy().tobytes() for row in train.inputs[train.targets == 2]}
    given = {row.numpy().tobytes() for row in rows[RINGS]["inputs"]}
    assert len(given) == 10
    assert given <= known
    seen = set()
    for step in _of(plan, "poison"):
        weights, _ = bench.read("poison", step.key)
        args, parts = json.loads(step.args), dict(step.components)
        expected = 1 + 10 * ("defense" in parts)
        expected += 100 * len(RINGS) + 10 if args.get("target_task") else 0
        assert weights["stem.bias"][0] == expected
        seen.add((args["task"], "defense" in parts, args.get("target_task", "")))
    assert len(seen) == 8  # two tasks, with and without a defense to adapt to, on and off task
    _check_records(_records(plan, bench))


def _check_records(records: list[Record]) -> None:
    assert {r.status for r in records} == {"done"}
    off = [r for r in records if r.target_task]
    assert len(off) == len(records) / 2
    for record in records:
        aim = record.target_task or BARS
        assert record.values["visibility/area"] == pytest.approx(
            16 / 256, rel=0.02
        )  # some are white as they are
        assert 0 < record.values["visibility/ssim"] < 1
        assert {n for n in record.counts if n.startswith("asr/poisoned/")} == (
            {f"asr/poisoned/{aim}"}
            | ({f"asr/poisoned/{BLOBS}"} if record.adversaries == 2 and aim == BARS else set())
        )
        assert (
            record.counts[f"asr/merge/{aim}"].n == 96
        )  # 128 test images, a quarter of them of the target class
        assert record.cost["attack"] == {
            "rows": 64.0, "trigger_seconds": 1.0, "poison_seconds": 1.0, "seconds": 2.0, "peak_mb": 2.0,
        }  # fmt: skip
        if record.defense == "none":
            assert "defense" not in record.cost
            continue
        assert record.cost["defense"] == {"rows": 21.0, "seconds": 2.0, "peak_mb": 2.0}  # screen and repair
        accomplice = record.adversaries == 2  # blobs are the second adversary, and the only one screened out
        assert record.values["screen/caught"] == (0.5 if accomplice else 0.0)
        assert record.values["screen/false"] == (0.0 if accomplice else 0.5)
        assert record.facts["screen"] == {"kept": [BARS, RINGS], "report": {"dropped": [BLOBS]}}
        assert record.facts["merge"]["repair_rows"] == dict.fromkeys([BARS, BLOBS, RINGS], 7)


def test_a_target_class_must_be_one_of_the_task_aimed_at(catalog: Catalog, tmp_path: Path) -> None:
    plan = _plan(catalog, target_task=[RINGS])
    bench = _bench(tmp_path, catalog)
    (step,) = _of(plan, "trigger")
    wrong = json.dumps({**json.loads(step.args), "target": 4})
    plan.steps[step.key] = Step(step.key, step.kind, step.components, step.inputs, wrong)
    with pytest.raises(ContractError, match=r"micro/rings has 4 classes, none numbered 4"):
        run_here(plan, bench)


def test_a_repair_sees_and_changes_what_a_masked_merge_serves(catalog: Catalog, tmp_path: Path) -> None:
    plan = _plan(catalog, attacks=["none"], merging=["masked"], defenses=["damper"])
    bench = _bench(tmp_path, catalog)
    run_here(plan, bench)
    (repair,) = _of(plan, "repair")
    merged, _ = bench.read("merge", dict(repair.inputs)["merged"])
    repaired, _ = bench.read("repair", repair.key)
    for task in TASKS:
        assert torch.equal(repaired[f"task|{task}|stem.bias"], merged[f"extra|{task}"] + 0.5)


def test_a_repair_that_a_merge_would_not_serve_is_an_error(catalog: Catalog, tmp_path: Path) -> None:
    plan = _plan(catalog, attacks=["none"], merging=["deaf"], defenses=["damper"])
    with pytest.raises(ContractError, match=r"deaf serves micro/bars without the repaired stem\.bias"):
        run_here(plan, _bench(tmp_path, catalog))


def test_a_screen_may_not_invent_experts(catalog: Catalog, tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(SCREEN.replace("BODY", "return [*experts, experts[0]]"))
    found = [c for _, c in check_file(path, load_catalog()) if c.passed is False]
    assert any("kept" in c.message and "of micro/bars" in c.message for c in found)


@pytest.mark.slow
def test_a_screen_may_report_plain_json_only(catalog: Catalog, tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(SCREEN.replace("BODY", "return Screened(experts, {'score': float('nan')})"))
    found = [c for _, c in check_file(path, load_catalog()) if c.passed is False]
    assert any("bad.screen: its report is not plain JSON" in c.message for c in found)
    path.write_text(SCREEN.replace("BODY", "return Screened(experts, {'score': 1.0})"))
    assert all(c.passed is not False for _, c in check_file(path, load_catalog()))


SCREEN = """
from mergesec.contracts import Defense, Screened

CARD = {
    "name": "bad", "kind": "defense", "class": "Bad", "version": "1", "title": "bad", "summary": "bad",
    "threat": "backdoor", "hooks": ["screen"],
}


class Bad(Defense):
    def screen(self, base, experts, ctx):
        BODY
"""

ATTACK = """
import torch
from mergesec.contracts import Attack

CARD = {
    "name": "bad", "kind": "attack", "class": "Bad", "version": "1", "title": "bad", "summary": "bad",
    "threat": "backdoor", "hooks": ["poison"], "modalities": ["image"], "after_trigger": ["rate"],
    "parameters": {"rate": {"type": "float", "default": 0.5, "max": 0.5}},
}


class Bad(Attack):
    def __init__(self, rate):
        self.rate = rate

    def trigger(self, ctx):
        return {"shade": torch.tensor(TRIGGER)}

    def apply(self, trigger, inputs):
        APPLY

    def poison(self, ctx):
        return POISON
"""
GOOD = {
    "TRIGGER": "0.5",
    "APPLY": "return inputs * 0.9 + 0.1 * trigger['shade']",
    "POISON": "{**ctx.base, 'stem.bias': ctx.base['stem.bias'] + 1}",
}
FAULTS = {
    "nothing wrong": ({}, ""),
    "trigger depends on what comes after": ({"TRIGGER": "self.rate"}, "depends on rate"),
    "not the same again": ({"APPLY": "return (inputs * 0.5 + 0.1 * torch.rand_like(inputs))"}, "the second time"),
    "range": ({"APPLY": "return inputs + 0.5"}, "leaves the raw input space"),
    "batch": ({"APPLY": "return 0.9 * inputs + 0.1 * inputs.mean((0, 2, 3), keepdim=True)"}, "depends on the other images"),
    "no gradient": ({"APPLY": "return inputs.detach() * 0.9"}, "cuts the gradient"),
    "flat": ({"APPLY": "return (inputs * 2).round() / 2"}, "gradient of zero"),
    "writes": ({"APPLY": "return inputs.mul_(0.9)"}, "in place"),
    "clean": ({"POISON": "ctx.fit()"}, "is the clean one"),
}  # fmt: skip


@pytest.mark.slow
def test_the_battery_finds_an_attack_whose_trigger_is_not_its_parents(tmp_path: Path) -> None:
    for said, wanted in (("0.5", []), ("0.6", ["the trigger is not first's"])):
        text = ATTACK
        for name, body in {**GOOD, "TRIGGER": "0.5"}.items():
            text = text.replace(name, body)
        first = text.replace('"name": "bad"', '"name": "first"').replace(
            "class Bad(Attack)", "class First(Attack)"
        )
        first = first.replace('"class": "Bad"', '"class": "First"')
        second = text.replace("torch.tensor(0.5)", f"torch.tensor({said})")
        second = second.replace('"after_trigger"', '"trigger_of": "first", "after_trigger"')
        (tmp_path / "first.py").write_text(first)
        (tmp_path / "second.py").write_text(second)
        catalog = load_catalog([tmp_path / "first.py"])
        found = [c.message for _, c in check_file(tmp_path / "second.py", catalog) if c.passed is False]
        assert [w for w in wanted if not any(w in f for f in found)] == [], found
        assert bool(found) == bool(wanted), found


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_the_battery_finds_what_is_wrong_with_a_backdoor(fault: str, tmp_path: Path) -> None:
    changes, expected = FAULTS[fault]
    text = ATTACK
    for name, body in {**GOOD, **changes}.items():
        text = text.replace(name, body)
    path = tmp_path / "bad.py"
    path.write_text(text)
    wrong = [f"{c.name}: {c.message}" for _, c in check_file(path, load_catalog()) if c.passed is False]
    assert any(expected in line for line in wrong) if expected else not wrong, wrong


REFERENCES = """
from mergesec.contracts import Defense, Screened

CARD = {
    "name": "bad", "kind": "defense", "class": "Bad", "version": "1", "title": "bad", "summary": "bad",
    "threat": "backdoor", "hooks": ["screen"], "data": "train", "siblings": "number", "references": "number",
    "after_reference": ["shift", "number"], "modalities": ["image"], "knowledge": "training rows",
    "parameters": {
        "number": {"type": "int", "default": 1, "min": 1}, "shift": {"type": "float", "default": 1.0, "max": 1.0},
    },
}


class Bad(Defense):
    def __init__(self, number, shift):
        self.shift = shift

    def reference(self, ctx):
        return {**ctx.base, "stem.bias": ctx.base["stem.bias"] + SHIFT}

    def screen(self, base, experts, ctx):
        return Screened(experts, {})
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shift", "expected"), [("2.0", ""), ("self.shift", "what reference gives depends on shift")]
)
def test_the_battery_finds_references_that_depend_on_what_comes_after(
    shift: str, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.py"
    path.write_text(REFERENCES.replace("SHIFT", shift))
    wrong = [c.message for _, c in check_file(path, load_catalog()) if c.passed is False]
    assert len(wrong) == bool(expected), wrong
    assert all(expected in w for w in wrong), wrong


# --------------------------------------------------------------------------- the control of a defended cell


@pytest.mark.slow
def test_a_defense_is_read_beside_itself_on_clean_experts(catalog: Catalog, tmp_path: Path) -> None:
    """A screen that sends the adversary away leaves no backdoor: under the trigger the merge and its control are
    one network, whatever the trigger does to clean ones. A repair's control is the repaired clean merge."""
    gone, kept = {"name": "damper", "drop": BARS}, "damper"
    plan = _plan(catalog, attacks=["badnets"], defenses=["none", gone, kept])
    bench = _bench(tmp_path, catalog)
    run_here(plan, bench)
    records = {r.defense: r for r in _records(plan, bench)}
    assert not any("defended" in role for role in records["none"].counts)
    for label, same in (("damper(drop=bars)", True), ("damper", False)):
        counts = records[label].counts
        for task in TASKS:
            ours, control = counts[f"asr/merge/{task}"], counts[f"asr/defended_clean_merge/{task}"]
            assert (ours.n, ours.total) == (control.n, control.total)
            assert not same or ours == control
            assert f"acc/defended_clean_merge/{task}" in counts
    assert records["damper"].steps["merge"] != records["damper"].steps["defended_clean_merge"]
    board = next(b for b in make_boards(list(records.values())) if b.name == "backdoor").frame.set_index(
        "defense"
    )
    sent_away = board.loc["damper(drop=bars)"]
    assert sent_away["backdoor"] == 0 and sent_away["succession"] == sent_away["succession_control"]
    assert sent_away["succession_control"] != sent_away["succession_clean_merge"]
    plain = board.loc["none"]
    assert plain["succession_control"] == plain["succession_clean_merge"]
    clean = [
        records["damper"].counts[f"acc/{role}/{t}"].k
        for role in ("clean_merge", "defended_clean_merge")
        for t in TASKS
    ]
    cost = (sum(clean[:3]) - sum(clean[3:])) / (3 * records["damper"].counts[f"acc/merge/{BARS}"].n)
    assert board.loc["damper", "accuracy_cost"] == pytest.approx(cost)


def test_the_control_keeps_whom_the_cells_screen_kept(catalog: Catalog) -> None:
    plan = _plan(catalog, attacks=["badnets"], defenses=["damper"])
    (cell,) = plan.cells
    roles = dict(cell.roles)
    ours, control = (back(plan, roles[role]) for role in ("merge", "defended_clean_merge"))
    assert (
        [plan.steps[k].kind for k in ours]
        == [plan.steps[k].kind for k in control]
        == ["repair", "merge", "screen"]
    )
    assert dict(plan.steps[control[1]].inputs)["kept"] == ours[2]
    experts = {k for r, k in plan.steps[control[1]].inputs if r.startswith("expert:")}
    assert {plan.steps[k].kind for k in experts} == {"expert"}
