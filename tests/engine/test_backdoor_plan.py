"""Backdoor coordinates: who is malicious, what they aim at, what a step's key depends on. No torch."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mergesec.errors import UsageError
from mergesec.execution.harvest import cell_name
from mergesec.planning.catalog import Catalog, load_catalog
from mergesec.planning.cells import Cell, cells
from mergesec.planning.gridspec import parse_grid
from mergesec.planning.plan import Plan, Step, make_plan
from mergesec.planning.refs import make_ref, trigger_ref
from mergesec.planning.resolve import Grid, resolve

MICRO = Path(__file__).resolve().parents[2] / "benchmark" / "mergesec" / "conformance" / "micro.py"
BARS, BLOBS, RINGS = TASKS = ("micro/bars", "micro/blobs", "micro/rings")

CARDS = """
CARDS = [
    {
        "name": "aimed", "kind": "attack", "class": "Aimed", "version": "1", "title": "Aimed", "summary": "x",
        "threat": "backdoor", "hooks": ["poison", "forge"], "seeded": True, "off_task": True, "adapts": True,
        "after_trigger": ["alpha", "sizes", "fresh"],
        "parameters": {
            "patch": {"type": "int", "default": 4}, "alpha": {"type": "float", "default": 5.0},
            "sizes": {"type": "list", "default": [1, 2]},
            "fresh": {"type": "int", "default": 0, "later": True},
        },
    },
    {
        "name": "follower", "kind": "attack", "class": "Aimed", "version": "1", "title": "Follower",
        "summary": "x", "threat": "backdoor", "hooks": ["forge"], "seeded": True,
        "trigger_of": "aimed", "after_trigger": ["factor"],
        "parameters": {"patch": {"type": "int", "default": 6}, "factor": {"type": "float", "default": 2.0}},
    },
    {
        "name": "masked", "kind": "merging", "class": "Masked", "version": "1", "title": "Masked",
        "summary": "x", "output": "per_task",
    },
    {
        "name": "mender", "kind": "defense", "class": "Mender", "version": "1", "title": "Mender",
        "summary": "x", "threat": "backdoor", "hooks": ["repair"], "per_task": True,
    },
]
"""


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    path = tmp_path_factory.mktemp("plugin") / "aimed.py"
    path.write_text(CARDS)
    return load_catalog([MICRO, path])


def _grid(catalog: Catalog, **axes: Any) -> Grid:
    raw = {
        "name": "g",
        "suite": {"backbone": "micro/vit", "tasks": list(TASKS)},
        "axes": {"merging": ["simple_average"], "attacks": ["aimed"], **axes},
        "threats": ["backdoor"],
    }
    return resolve(parse_grid(raw, "grid g"), catalog)


def _plan(catalog: Catalog, **axes: Any) -> Plan:
    return make_plan(_grid(catalog, **axes), lambda task: f"content of {task}")


def _steps(plan: Plan, kind: str) -> list[Step]:
    return [s for s in plan.steps.values() if s.kind == kind]


def _of(plan: Plan, kind: str) -> Step:
    (step,) = _steps(plan, kind)
    return step


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"adversaries": [0]}, "axes.adversaries.0: Input should be greater than or equal to 1, got 0"),
        ({"adversaries": []}, "axes.adversaries: "),
        ({"adversaries": [4]}, "axes.adversaries[0]: 4 is outside [1, 3]"),
        ({"target_task": []}, "axes.target_task: "),
        ({"target_task": ["micro/ring"]}, "axes.target_task[0]: 'micro/ring' is not a task of the suite; did you mean"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_coordinates_are_refused_by_field(catalog: Catalog, axes: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        list(cells(_grid(catalog, **axes)))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ('"adapts": 1', "card.adapts: expected true or false"),
        ('"off_task": True, "threat": "protection", "hooks": ["recover"]', "card.off_task: belongs to a backdoor attack"),
        ('"per_task": True', "card.per_task: belongs to a backdoor defense"),
        ('"after_trigger": ["alfa"], "parameters": {"alpha": {"type": "int", "default": 1}}', "did you mean 'alpha'?"),
        ('"after_trigger": "alpha"', "card.after_trigger: expected a list of strings"),
        ('"trigger_of": 1', "card.trigger_of: expected a string"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_card_is_refused_by_field(tmp_path: Path, field: str, message: str) -> None:
    path = tmp_path / "wrong.py"
    path.write_text(
        'CARD = {"name": "wrong", "kind": "attack", "class": "W", "version": "1", "title": "W", "summary": "w",'
        ' "threat": "backdoor", "hooks": ["poison"], ' + field + "}\n"
    )
    with pytest.raises(UsageError) as caught:
        load_catalog([MICRO, path])
    assert message in str(caught.value)


# --------------------------------------------------------------------------- cells


def test_malicious_contributors_follow_the_subject_around_the_suite(catalog: Catalog) -> None:
    grid = _grid(catalog, adversaries=[1, 2, 3])
    found = {(c.subject, c.adversaries): c.crew for c in cells(grid)}
    assert found[BARS, 1] == (BARS,)
    assert found[BLOBS, 2] == (BLOBS, RINGS)
    assert found[RINGS, 2] == (RINGS, BARS)
    assert found[BLOBS, 3] == (BLOBS, RINGS, BARS)
    assert len(found) == 9


def test_drawn_company_differs_between_seeds_and_is_nested(catalog: Catalog) -> None:
    """More experts or accomplices are the same ones and others, so that curves along their number are read alone."""
    grid = _grid(catalog, adversaries=[1, 2], experts=[2, 3], company="drawn")
    spec = grid.spec.model_copy(update={"seeds": tuple(range(20))})
    found = {(c.subject, c.seed, len(c.experts), c.adversaries): c for c in cells(replace(grid, spec=spec))}
    others = set()
    for seed in spec.seeds:
        few, many = found[BARS, seed, 2, 1], found[BARS, seed, 3, 2]
        assert set(few.experts) == set(many.crew) and few.crew == (BARS,)
        others.add(many.crew[1])
    assert others == {BLOBS, RINGS}


def test_a_drawn_target_class_is_one_for_each_adversary_and_seed(catalog: Catalog) -> None:
    grid = _grid(catalog, attacks=["none", "aimed"], target_class="drawn")
    spec = grid.spec.model_copy(update={"seeds": tuple(range(20))})
    found: dict[tuple[str, int], set[int]] = {}
    for cell in cells(replace(grid, spec=spec)):
        found.setdefault((cell.subject, cell.seed), set()).add(cell.target_class)
    assert len(found) == 60 and all(len(classes) == 1 for classes in found.values())
    fewest = min(catalog.get("task", task).card.classes for task in TASKS)
    assert set.union(*found.values()) == set(range(fewest))
    with pytest.raises(UsageError, match=r"axes.target_class"):
        _grid(catalog, target_class="any")


def test_the_task_aimed_at_is_never_malicious(catalog: Catalog) -> None:
    grid = _grid(catalog, adversary=[BARS], target_task=["", BLOBS], adversaries=[1, 2, 3])
    crews = {(c.target_task, c.adversaries): c.crew for c in cells(grid)}
    assert crews[BLOBS, 2] == (BARS, RINGS)
    assert (BLOBS, 3) not in crews
    assert grid.left_out == {"more adversaries than experts": 1}


def test_off_task_cells_that_make_no_sense_are_left_out_and_counted(catalog: Catalog) -> None:
    grid = _grid(catalog, attacks=["none", "aimed", "badnets"], target_task=[BLOBS], experts=[2])
    found = [(c.attack.name, c.subject, c.target_task) for c in cells(grid)]
    # bars merge with blobs, blobs with rings, rings with bars
    assert [f for f in found if f[0] != "none"] == [("aimed", BARS, BLOBS)]
    assert grid.left_out == {
        "attack badnets has no off-task form": 3,
        "the target task is the adversary's own": 1,
        "the target task is not among the experts": 1,
    }


def test_without_an_attack_nobody_is_malicious(catalog: Catalog) -> None:
    grid = _grid(catalog, attacks=["none"], adversaries=[2, 3], target_task=[BLOBS, RINGS])
    assert {(c.adversaries, c.target_task) for c in cells(grid)} == {(1, "")}
    assert len(list(cells(grid))) == len(TASKS)


def test_patterns_know_the_new_coordinates(catalog: Catalog) -> None:
    raw = parse_grid(
        {
            "name": "g", "suite": {"backbone": "micro/vit", "tasks": list(TASKS)}, "threats": ["backdoor"],
            "axes": {"merging": ["ties"], "attacks": ["aimed"], "adversary": [BARS], "adversaries": [1, 2],
                     "target_task": ["", BLOBS]},
            "exclude": [{"adversaries": 2, "target_task": ""}],
        }, "grid g",
    )  # fmt: skip
    found = {(c.adversaries, c.target_task) for c in cells(resolve(raw, catalog))}
    assert found == {(1, ""), (1, BLOBS), (2, BLOBS)}


def test_repairs_that_can_take_weights_per_task(catalog: Catalog) -> None:
    grid = _grid(catalog, attacks=["none"], merging=["masked"], defenses=["mender", "fine_pruning"])
    assert {c.defense.name for c in cells(grid)} == {"mender"}
    (reason,) = grid.left_out
    assert reason == "fine_pruning repairs one network; masked keeps weights per task"


def test_cells_that_differ_have_names_that_differ(catalog: Catalog) -> None:
    grid = _grid(catalog, adversary=[BARS], adversaries=[1, 2], target_task=["", BLOBS, RINGS])
    found = list(cells(grid))
    assert len({cell_name(c) for c in found}) == len(found) == 6


# --------------------------------------------------------------------------- steps and their keys


def test_steps_of_a_plain_backdoor_keep_their_keys() -> None:
    """Stored experts and evaluations are found by these: a change here throws all of them away."""
    suite = {"backbone": "mini/vit", "tasks": ["mini/gtsrb", "mini/eurosat"]}
    axes = {"merging": ["simple_average"], "attacks": ["badnets"], "adversary": ["mini/gtsrb"]}
    raw = {"name": "g", "suite": suite, "axes": axes, "threats": ["backdoor"]}
    plan = make_plan(resolve(parse_grid(raw, "grid g"), load_catalog()), lambda task: "")
    roles = dict(plan.cells[0].roles)
    found = {kind: _of(plan, kind).key[:12] for kind in ("trigger", "poison")}
    found |= {
        role: roles[role][:12] for role in ("merge", "poisoned", "merge+trigger", "clean_merge+trigger")
    }
    assert found == {
        "trigger": "7dc3db0bd606", "poison": "6720db8be74f", "merge": "58fef8ea8368", "poisoned": "13b61c72529d",
        "merge+trigger": "d697aa14d5b3", "clean_merge+trigger": "f73e81d050c8",
    }  # fmt: skip
    assert cell_name(plan.cells[0].cell) == "backdoor-simple_average-badnets-mini_gtsrb-s0-70ed076bc3"


def test_variants_that_differ_after_the_trigger_share_it(catalog: Catalog) -> None:
    variants = {"name": "aimed", "alpha": [1.0, 5.0], "sizes": [[1, 2], [3]], "fresh": [0, 1]}
    plan = _plan(catalog, attacks=[variants], adversary=[BARS])
    assert len(plan.cells) == 8
    assert len(_steps(plan, "trigger")) == len(_steps(plan, "visibility")) == 1
    assert len(_steps(plan, "poison")) == len(_steps(plan, "forge")) == 8
    controls = {dict(c.roles)["base+trigger"] for c in plan.cells}
    assert len(controls) == 1
    other = _plan(catalog, attacks=[{"name": "aimed", "patch": 5}], adversary=[BARS])
    assert not {s.key for s in _steps(other, "trigger")} & plan.steps.keys()


def test_the_trigger_of_the_defaults_is_the_attacks_own(catalog: Catalog) -> None:
    entry = catalog.get("attack", "aimed")
    plain = make_ref(entry, {}, "x", catalog)
    changed = make_ref(entry, {"alpha": 1.0, "sizes": [3], "fresh": 2, "patch": 6}, "x", catalog)
    assert trigger_ref(plain, catalog) == plain
    reduced = trigger_ref(changed, catalog)
    assert reduced == make_ref(entry, {"patch": 6}, "x", catalog)
    assert reduced.parameters == make_ref(entry, {"patch": 6}, "x", catalog).parameters
    assert (reduced.label, changed.label) == ("aimed(patch=6)", "aimed(alpha=1, fresh=2, patch=6, sizes=[3])")


def test_an_attack_that_takes_over_a_trigger_shares_it_and_its_controls(catalog: Catalog) -> None:
    follower = make_ref(catalog.get("attack", "follower"), {"factor": 3.0}, "x", catalog)
    assert trigger_ref(follower, catalog) == make_ref(
        catalog.get("attack", "aimed"), {"patch": 6}, "x", catalog
    )
    both = [{"name": "aimed", "patch": 6, "alpha": 2.0}, {"name": "follower", "factor": [2.0, 3.0]}]
    plan = _plan(catalog, attacks=both, adversary=[BARS])
    assert (len(plan.cells), len(_steps(plan, "trigger")), len(_steps(plan, "forge"))) == (3, 1, 3)
    assert len({dict(c.roles)["clean_merge+trigger"] for c in plan.cells}) == 1
    apart = _plan(catalog, attacks=["aimed", "follower"], adversary=[BARS])  # patches of 4 and of 6
    assert len(_steps(apart, "trigger")) == 2


def test_accomplices_use_the_subjects_trigger_and_run_their_own_training(catalog: Catalog) -> None:
    plan = _plan(catalog, adversary=[BARS], adversaries=[2])
    trigger = _of(plan, "trigger")
    assert json.loads(trigger.args)["task"] == BARS
    poisons = {json.loads(s.args)["task"]: s for s in _steps(plan, "poison")}
    assert poisons.keys() == {BARS, BLOBS}
    assert {dict(s.inputs)["trigger"] for s in poisons.values()} == {trigger.key}
    twins = {json.loads(s.args)["task"]: json.loads(s.args)["seed"] for s in _steps(plan, "expert")}
    assert all(json.loads(s.args)["seed"] == twins[task] for task, s in poisons.items())
    forged = {json.loads(s.args)["task"]: s.key for s in _steps(plan, "forge")}
    merge = plan.steps[dict(plan.steps[dict(plan.cells[0].roles)["merge"]].inputs)["model"]]
    inputs = dict(merge.inputs)
    assert (inputs[f"expert:{BARS}"], inputs[f"expert:{BLOBS}"]) == (forged[BARS], forged[BLOBS])
    assert inputs[f"expert:{RINGS}"] in {s.key for s in _steps(plan, "expert")}
    roles = dict(plan.cells[0].roles)
    assert {"poisoned", "poisoned+trigger", f"poisoned:{BLOBS}", f"poisoned:{BLOBS}+trigger"} <= roles.keys()
    alone = _plan(catalog, adversary=[BARS])
    assert {s.key for s in _steps(alone, "poison")} <= plan.steps.keys()  # the subject's expert is the same


def test_an_off_task_backdoor_knows_its_target_and_is_evaluated_there(catalog: Catalog) -> None:
    plan = _plan(catalog, adversary=[BARS], target_task=[RINGS])
    for kind in ("trigger", "poison", "forge"):
        step = _of(plan, kind)
        args = json.loads(step.args)
        assert (args["task"], args["target_task"]) == (BARS, RINGS)
        assert dict(step.components)["target"].name == RINGS
        assert dict(step.inputs)["target_data"] == dict(_of(plan, "visibility").inputs)["data"]
    drawn = {json.loads(_of(plan, kind).args)["reference"] for kind in ("trigger", "poison", "forge")}
    assert len(drawn) == 1  # every hook sees the same rows
    tasks = dict(plan.steps[dict(plan.cells[0].roles)["poisoned+trigger"]].components)
    assert f"task:{RINGS}" in tasks
    assert f"task:{BARS}" not in tasks
    on = _plan(catalog, adversary=[BARS])
    assert not {s.key for s in _steps(on, "poison")} & plan.steps.keys()
    assert "target_task" not in json.loads(_of(on, "poison").args)


def test_only_attacks_that_adapt_depend_on_the_defense(catalog: Catalog) -> None:
    defenses = ["none", "clp", {"name": "clp", "u": 2.0}]
    plan = _plan(catalog, attacks=["aimed", "badnets"], adversary=[BARS], defenses=defenses)
    seen = Counter(
        (s.kind, dict(s.components)["attack"].name, dict(s.components).get("defense", None) is not None)
        for s in plan.steps.values()
        if s.kind in ("trigger", "poison", "forge")
    )
    assert seen == {
        ("trigger", "aimed", False): 1, ("poison", "aimed", False): 1, ("poison", "aimed", True): 2,
        ("forge", "aimed", False): 1, ("forge", "aimed", True): 2,
        ("trigger", "badnets", False): 1, ("poison", "badnets", False): 1,
    }  # fmt: skip


def test_a_cell_says_where_its_backdoor_is_meant_to_work() -> None:
    known: dict[str, Any] = {
        "threat": "backdoor",
        "subject": BARS,
        "target_class": 0,
        "experts": TASKS,
        "seed": 0,
    }
    blank: Any = None
    assert Cell(merging=blank, attack=blank, defense=blank, **known).aim == BARS
    assert Cell(merging=blank, attack=blank, defense=blank, target_task=RINGS, **known).aim == RINGS


def test_siblings_share_no_row_with_contributors_where_each_has_a_half(catalog: Catalog) -> None:
    raw = {
        "name": "g", "suite": {"backbone": "micro/vit", "tasks": list(TASKS)}, "threats": ["backdoor"],
        "axes": {"merging": ["simple_average"], "attacks": ["badnets"], "defenses": ["wag"], "adversary": [BARS]},
    }  # fmt: skip

    def halves(**recipe: Any) -> Counter[tuple[str, str]]:
        plan = make_plan(resolve(parse_grid(raw | {"recipe": recipe}, "grid g"), catalog), str)
        siblings = {k for s in plan.steps.values() for role, k in s.inputs if role.startswith("sibling:")}
        return Counter(
            (
                "sibling" if key in siblings else step.kind,
                dict(json.loads(step.args)["recipe"]).get("half", ""),
            )
            for key, step in plan.steps.items()
            if "recipe" in json.loads(step.args)
        )

    first, second, whole = halves(half="first"), halves(half="second"), halves()
    assert set(first) == {
        ("expert", "first"),
        ("trigger", "first"),
        ("poison", "first"),
        ("sibling", "second"),
    }
    assert second[("sibling", "first")] == first[("sibling", "second")] == len(TASKS)
    assert {half for _, half in whole} == {""}
