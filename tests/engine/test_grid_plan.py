"""Grid files to cells to keyed steps: what is accepted, what is left out, and what decides a key."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mergesec.errors import UsageError
from mergesec.files import fingerprint
from mergesec.planning import plan as planning
from mergesec.planning.catalog import Catalog, load_catalog
from mergesec.planning.cells import Cell, cells
from mergesec.planning.gridspec import load_grid, parse_grid
from mergesec.planning.plan import KEY_VERSION, Plan, make_plan, needed_steps, read_facts, step_key
from mergesec.planning.presets import preset_names, presets_folder
from mergesec.planning.refs import NONE, make_ref
from mergesec.planning.resolve import Grid, resolve
from mergesec.planning.seeds import draw_seed, salt_digest

MICRO = Path(__file__).resolve().parents[2] / "benchmark" / "mergesec" / "conformance" / "micro.py"
TASKS = ("micro/bars", "micro/blobs", "micro/rings")
CATALOG = load_catalog([MICRO])


def _raw(**changes: Any) -> dict[str, Any]:
    axes = {"merging": ["simple_average"], **changes.pop("axes", {})}
    suite = {"backbone": "micro/vit", "tasks": list(TASKS), **changes.pop("suite", {})}
    return {"name": "g", "suite": suite, "axes": axes, **changes}


def _grid(catalog: Catalog = CATALOG, **changes: Any) -> Grid:
    return resolve(parse_grid(_raw(**changes), "grid g"), catalog)


def _plan(**changes: Any) -> Plan:
    return make_plan(_grid(**changes), lambda task: f"content of {task}")


def _refused(**changes: Any) -> str:
    with pytest.raises(UsageError) as caught:
        list(cells(_grid(**changes)))
    return str(caught.value)


# --------------------------------------------------------------------------- files and overrides


def _file(folder: Path, **changes: Any) -> str:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(_raw(**changes)))
    return str(path)


def test_overrides_change_what_the_file_says_and_add_what_it_lacks(tmp_path: Path) -> None:
    source = _file(tmp_path, seeds=[0])
    spec = load_grid(source, ["seeds=[3,4]", "axes.experts=[2]", "recipe.epochs=1", "protocol=transductive"])
    assert spec.seeds == (3, 4)
    assert spec.axes.experts == (2,)
    assert spec.recipe == {"epochs": 1}
    assert spec.protocol == "transductive"


def test_the_files_name_is_the_grids_unless_it_says_otherwise(tmp_path: Path) -> None:
    raw = _raw()
    del raw["name"]
    path = tmp_path / "called-so.yaml"
    path.write_text(yaml.safe_dump(raw))
    assert load_grid(str(path)).name == "called-so"


def test_a_missing_value_names_its_field(tmp_path: Path) -> None:
    source = _file(tmp_path, suite={"backbone": {"name": "micro/vit", "path": "???"}})
    with pytest.raises(UsageError, match=r"suite\.backbone\.path: needs a value; add suite\.backbone\.path="):
        load_grid(source)


@pytest.mark.parametrize("preset", preset_names())
def test_presets_resolve_and_have_cells_of_every_threat(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network's folder counts by its content alone: any will do here, where nobody looks into it."""
    for name in ("_inspect", "_inspect_tasks", "_inspect_answers"):
        monkeypatch.setattr(f"mergesec.planning.resolve.{name}", lambda *_: None)
    (tmp_path / "config.json").write_text("{}")
    source = presets_folder() / f"{preset}.yaml"
    local = "path:" in source.read_text(encoding="utf-8")
    spec = load_grid(preset, [f"suite.backbone.path={tmp_path}"] if local else [])
    try:
        found = list(cells(resolve(spec, load_catalog())))
    except UsageError as missing:
        if "pip install" not in str(missing):
            raise
        pytest.skip(str(missing))  # an extra
    assert {c.threat for c in found} == set(spec.threats)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seedz": [1]}, "grid g: seedz: unknown field; did you mean 'seeds'?"),
        ({"axes": {"defences": []}}, "axes.defences: unknown field; did you mean 'defenses'?"),
        ({"suite": {"task": []}}, "suite.task: unknown field; did you mean 'tasks'?"),
        ({"seeds": 0}, "grid g: seeds: Input should be a list, got 0"),
        ({"seeds": []}, "grid g: seeds"),
        ({"seeds": ["one"]}, "grid g: seeds.0"),
        ({"seeds": [1, 1]}, "seeds: 1 is named twice"),
        ({"name": "a/b"}, "grid g: name"),
        ({"threats": ["backdor"]}, "grid g: threats.0"),
        ({"protocol": "test"}, "grid g: protocol"),
        ({"axes": {"merging": []}}, "grid g: axes.merging"),
        ({"axes": {"merging": ["tiez"]}}, "axes.merging[0]: unknown merging 'tiez'; did you mean 'ties'?"),
        ({"axes": {"merging": ["ties", "ties"]}}, "axes.merging: ties is named twice"),
        ({"axes": {"merging": ["ties", {"name": "ties"}]}}, "axes.merging: ties is named twice"),
        ({"axes": {"merging": [{"scaling": 1}]}}, "axes.merging[0]: needs a name"),
        (
            {"axes": {"merging": [{"name": "task_arithmetic", "scalin": 1}]}},
            "axes.merging[0].scalin: task_arithmetic has no such parameter; did you mean 'scaling'?",
        ),
        (
            {"axes": {"merging": [{"name": "task_arithmetic", "scaling": [0.3, "x"]}]}},
            "axes.merging[0].scaling: expected float or 'tuned', got 'x'",
        ),
        ({"axes": {"attacks": ["badnet"]}}, "unknown attack 'badnet'; did you mean 'badnets'?"),
        ({"suite": {"tasks": ["bars"]}}, "suite.tasks[0]: unknown task 'bars'; did you mean 'micro/bars'?"),
        ({"suite": {"tasks": ["micro/bars", "micro/bars"]}}, "suite.tasks: micro/bars is named twice"),
        ({"axes": {"victim": ["micro/bar"]}}, "did you mean 'micro/bars'?"),
        ({"axes": {"adversary": ["none"]}}, "axes.adversary: 'none' is not a task of the suite"),
        ({"axes": {"target_class": [4]}}, "axes.target_class: 4 is outside [0, 3]"),
        ({"axes": {"experts": [1]}}, "axes.experts[0]: 1 is outside [2, 3]"),
        ({"axes": {"experts": [4]}}, "axes.experts[0]: 4 is outside [2, 3]"),
        ({"axes": {"experts": ["pair"]}}, "axes.experts[0]: 'pair'; did you mean 'pairs'?"),
        ({"axes": {"experts": [["micro/bars", "micro/ring"]]}}, "did you mean 'micro/rings'?"),
        ({"recipe": {"epoch": 3}}, "recipe.epoch: unknown; did you mean 'epochs'?"),
        ({"recipe": {"epochs": 1.5}}, "recipe.epochs: expected int, got 1.5"),
        ({"recipe": {"epochs": 0}}, "recipe.epochs: must be positive, got 0"),
        ({"recipe": {"optimizer": "adam"}}, "recipe.optimizer: 'adam'; did you mean 'adamw'?"),
        ({"exclude": [{"atack": "none"}]}, "exclude[0].atack: unknown; did you mean 'attack'?"),
        ({"exclude": [{"merging": "tiez"}]}, "exclude[0].merging: unknown 'tiez'; did you mean 'ties'?"),
        ({"include": [{"seed": "zero"}]}, "include[0].seed: expected a number, got 'zero'"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_grid_is_refused_by_field(changes: dict[str, Any], message: str) -> None:
    assert message in _refused(**changes)


# --------------------------------------------------------------------------- cells


def test_parameter_lists_become_a_product() -> None:
    grid = _grid(axes={"merging": [{"name": "ties", "scaling": [0.3, 1.0], "merge_func": ["sum", "mean"]}]})
    shown = [dict(r.parameters) for r in grid.merging]
    assert {(p["scaling"], p["merge_func"]) for p in shown} == set(
        itertools.product((0.3, 1.0), ("sum", "mean"))
    )


def test_labels_tell_every_row_of_a_board_apart() -> None:
    close = [0.3, 0.30000001]
    grid = _grid(axes={"merging": [{"name": "task_arithmetic", "scaling": close}]})
    assert len({r.label for r in grid.merging}) == 2


def test_numbers_of_experts_pairs_and_lists_of_tasks() -> None:
    def merged(experts: Any, threat: str = "protection") -> Counter[tuple[str, tuple[str, ...]]]:
        axes = {"experts": [experts], "defenses": ["none"]}
        return Counter((c.subject, c.experts) for c in cells(_grid(axes=axes, threats=[threat])))

    bars, blobs, rings = TASKS
    assert merged("all") == {(t, TASKS): 1 for t in TASKS}
    assert merged(3) == merged("all")
    # a number takes the subject and the tasks after it, in a ring, in suite order
    assert merged(2) == {(bars, (bars, blobs)): 1, (blobs, (blobs, rings)): 1, (rings, (bars, rings)): 1}
    assert merged("pairs") == {
        (s, tuple(t for t in TASKS if t in (s, o))): 1 for s in TASKS for o in TASKS if o != s
    }
    # a list is the companions: the subject joins them
    assert merged([bars, blobs]) == {(bars, (bars, blobs)): 1, (blobs, (bars, blobs)): 1, (rings, TASKS): 1}
    assert merged("pairs", "clean") == {("", p): 1 for p in itertools.combinations(TASKS, 2)}


def test_equal_expert_sets_are_one_cell() -> None:
    twice = list(cells(_grid(axes={"experts": [3, "all"]}, threats=["clean"])))
    assert len(twice) == 1


def test_what_makes_no_sense_is_left_out_and_counted() -> None:
    grid = _grid(
        axes={"attacks": ["none", "realign", "badnets"], "defenses": ["none", "params", "clp"]}, seeds=[0, 1]
    )
    found = Counter(c.threat for c in cells(grid))
    # per threat 9 combinations; clean keeps 1, the others none/own × none/own = 4, each for 3 subjects
    assert found == {"clean": 1 * 2, "protection": 4 * 3 * 2, "backdoor": 4 * 3 * 2}
    assert sum(grid.left_out.values()) == (8 * 1 + 5 * 3 + 5 * 3) * 2
    assert any("belongs to backdoor, not protection" in reason for reason in grid.left_out)


def test_include_and_exclude_match_names_labels_and_numbers() -> None:
    merging = [{"name": "task_arithmetic", "scaling": [0.2, 0.5]}, "ties"]
    grid = _grid(
        axes={"merging": merging, "experts": [2, 3]}, threats=["clean", "protection"], seeds=[0, 1],
        include=[{"threat": "clean"}, {"subject": "micro/bars", "merging": ["ties"]}],
        exclude=[{"merging": "task_arithmetic(scaling=0.5)"}, {"experts": 2, "seed": 1}],
    )  # fmt: skip
    kept = {(c.threat, c.merging.label, c.subject, len(c.experts), c.seed) for c in cells(grid)}
    expected = {
        ("clean", m, "", n, s)
        for m in ("task_arithmetic(scaling=0.2)", "ties")
        for n, s in ((2, 0), (3, 0), (3, 1))
    } | {("protection", "ties", "micro/bars", n, s) for n, s in ((2, 0), (3, 0), (3, 1))}
    assert kept == expected
    assert grid.left_out["not in include"] == 3 * 3 * 2 * 2 - 2 * 2  # protection, less ties on bars


POOL = {
    "merging": ["simple_average", "ties", "task_arithmetic"],
    "attacks": ["none", "realign", "badnets"],
    "defenses": ["none", "params", "clp", "wag"],
}
_subset = {k: st.lists(st.sampled_from(v), min_size=1, unique=True) for k, v in POOL.items()}


@settings(max_examples=60, deadline=None)
@given(
    axes=st.fixed_dictionaries(_subset),
    threats=st.lists(st.sampled_from(["clean", "protection", "backdoor"]), min_size=1, unique=True),
    seeds=st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True),
    excluded=st.one_of(st.none(), st.sampled_from(POOL["merging"])),
)
def test_cells_are_the_filtered_product(
    axes: dict[str, list[str]], threats: list[str], seeds: list[int], excluded: str | None
) -> None:
    exclude = [{"merging": excluded}] if excluded else []
    grid = _grid(axes=axes, threats=threats, seeds=seeds, exclude=exclude)
    model = {"none": None, "realign": "protection", "badnets": "backdoor", "params": "protection",
             "clp": "backdoor", "wag": "backdoor"}  # fmt: skip
    expected = set()
    for threat, merging, attack, defense, seed in itertools.product(
        threats, axes["merging"], axes["attacks"], axes["defenses"], seeds
    ):
        fits = all(model[name] in (None, threat) for name in (attack, defense))
        for subject in ("",) if threat == "clean" else TASKS:
            if fits and merging != excluded:
                expected.add((threat, merging, attack, defense, subject, seed))
    found = [
        (c.threat, c.merging.name, c.attack.name, c.defense.name, c.subject, c.seed) for c in cells(grid)
    ]
    assert len(found) == len(set(found))
    assert set(found) == expected
    subjects = sum(1 if t == "clean" else len(TASKS) for t in threats)
    whole = len(axes["merging"]) * len(axes["attacks"]) * len(axes["defenses"]) * len(seeds) * subjects
    assert len(found) + sum(grid.left_out.values()) == whole


# --------------------------------------------------------------------------- keys


def test_a_salt_changes_every_seed_and_is_told_by_its_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, told = draw_seed("protect", "micro/bars", 0), salt_digest()
    drawn = set()
    for salt in ("one", "two"):
        monkeypatch.setenv("MERGESEC_SALT", salt)
        drawn.add((draw_seed("protect", "micro/bars", 0), salt_digest()))
        assert salt not in salt_digest()
    assert told == "" and len({(plain, told), *drawn}) == 3
    monkeypatch.delenv("MERGESEC_SALT")
    assert draw_seed("protect", "micro/bars", 0) == plain


def test_the_key_algorithm_is_pinned() -> None:
    """A change here throws away every stored artifact: bump KEY_VERSION and say so in the changelog."""
    assert KEY_VERSION == 1
    key = step_key("merge", [("backbone", "aa"), ("merging", "bb")], [("base", "cc")], '{"seed":1}')
    assert key == "ba6fba9d7f4c84955784e97489c009454a74e5ac"
    assert draw_seed("expert", "micro/bars", 0, 0) == 6052179592041091430
    ref = make_ref(CATALOG.get("merging", "simple_average"), {}, "x", CATALOG)
    assert json.loads(ref.text) == {
        "kind": "merging", "name": "simple_average", "version": "2", "parameters": {},
    }  # fmt: skip
    assert ref.digest == "4c0d86827e5b5d835da5945f49160013"


WRAPPER = """
from mergesec.contracts import MergeMethod

CARD = {
    "name": "around", "kind": "merging", "class": "Around", "version": "1", "title": "Around",
    "summary": "hands on to another merge", "wraps": "base_method",
    "parameters": {"base_method": {"type": "merging", "default": "task_arithmetic"}},
}


class Around(MergeMethod):
    def __init__(self, base_method):
        self.base_method = base_method

    def merge(self, base, experts, ctx):
        return ctx.inner.merge(base, experts, ctx)
"""


def _wrapping(folder: Path, *methods: Any) -> Plan:
    (folder / "around.py").write_text(WRAPPER)
    grid = _grid(load_catalog([MICRO, folder / "around.py"]), axes={"merging": list(methods)}, seeds=[0, 1])
    return make_plan(grid, lambda task: task)


def test_a_wrapped_merge_is_part_of_its_wrappers_identity(tmp_path: Path) -> None:
    methods = [
        "around",
        *({"name": "around", "base_method": m} for m in ("ties", {"name": "ties", "keep": 0.5}, "dare")),
    ]
    plan = _wrapping(tmp_path, *methods)
    refs = plan.grid.merging
    assert [r.label for r in refs] == [
        "around", "around(base_method=ties)", "around(base_method=ties(keep=0.5))", "around(base_method=dare)",
    ]  # fmt: skip
    assert [r.inner[0].name for r in refs] == ["task_arithmetic", "ties", "ties", "dare"]
    assert len({r.digest for r in refs}) == 4
    # only the one around DARE draws, so only it has a merge per seed
    merges = Counter(dict(s.components)["merging"].label for s in plan.steps.values() if s.kind == "merge")
    assert merges == {r.label: 2 for r in refs}
    seeds = [json.loads(s.args).get("seed") for s in plan.steps.values() if s.kind == "merge"]
    assert sum(seed is not None for seed in seeds) == 2


@pytest.mark.parametrize(
    ("value", "message"),
    [("tise", "ties"), ({"name": "ties", "kep": 0.5}, "keep"), ("around", "one set of merged weights"),
     ({"name": "ties", "keep": [0.1, 0.2]}, "lists"), (3, "expected merging")],
)  # fmt: skip
def test_what_cannot_be_wrapped_is_refused(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        _wrapping(tmp_path, {"name": "around", "base_method": value})
    assert "base_method" in str(caught.value)


def test_every_part_enters_the_key() -> None:
    parts: tuple[Any, ...] = ("merge", [("a", "1"), ("b", "2")], [("c", "3")], "{}")
    others: list[tuple[Any, ...]] = [
        ("repair", *parts[1:]),
        (parts[0], [("b", "2"), ("a", "1")], *parts[2:]),
        (parts[0], [("a", "1")], [("b", "2"), ("c", "3")], "{}"),
        (parts[0], [("a", "1"), ("b", "2"), ("c", "3")], [], "{}"),
        (*parts[:3], '{"seed":1}'),
    ]
    keys = {step_key(*p) for p in (parts, *others)}
    assert len(keys) == 1 + len(others)


def test_the_key_version_enters_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = step_key("merge", [], [], "{}")
    monkeypatch.setattr(planning, "KEY_VERSION", KEY_VERSION + 1)
    assert step_key("merge", [], [], "{}") != before


def test_the_version_of_a_kind_of_step_enters_its_keys_once_it_is_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = {kind: step_key(kind, [], [], "{}") for kind in ("merge", "evaluate")}
    monkeypatch.setitem(planning.STEP_VERSIONS, "merge", 1)
    assert step_key("merge", [], [], "{}") == before["merge"]
    monkeypatch.setitem(planning.STEP_VERSIONS, "merge", 2)
    assert step_key("merge", [], [], "{}") != before["merge"]
    assert step_key("evaluate", [], [], "{}") == before["evaluate"]


def _experts(plan: Plan) -> set[str]:
    return {k for k, s in plan.steps.items() if s.kind == "expert"}


def test_experts_are_one_per_task_and_seed_whatever_the_axes() -> None:
    small = _plan(seeds=[0, 1], threats=["clean"])
    big = _plan(
        axes={"merging": ["ties", "simple_average"], "attacks": ["none", "realign", "badnets"],
              "defenses": ["none", "params", "clp"], "experts": [2, "all"]},
        seeds=[0, 1], name="other",
    )  # fmt: skip
    assert len(_experts(small)) == len(TASKS) * 2
    assert _experts(small) == _experts(big)


def test_comparisons_are_paired_the_same_expert_meets_every_defense_and_attack() -> None:
    plan = _plan(
        axes={"defenses": ["none", "params"], "attacks": ["none", "realign", "badnets"]}, seeds=[0, 1]
    )
    of: dict[tuple[str, int], set[str]] = {}
    for planned in plan.cells:
        for role, key in planned.roles:
            if role.startswith("expert:"):
                task = role.removeprefix("expert:")
                of.setdefault((task, planned.cell.seed), set()).add(key)
    assert all(len(keys) == 1 for keys in of.values())
    assert len(of) == len(TASKS) * 2


def test_poisoned_and_clean_training_differ_by_the_attack_alone() -> None:
    plan = _plan(axes={"attacks": ["badnets"], "adversary": ["micro/bars"]}, threats=["backdoor"])
    (bad,) = [json.loads(s.args) for s in plan.steps.values() if s.kind == "poison"]
    clean = [json.loads(s.args) for s in plan.steps.values() if s.kind == "expert"]
    (twin,) = [a for a in clean if a["task"] == "micro/bars"]
    assert (bad["seed"], bad["recipe"]) == (twin["seed"], twin["recipe"])


def test_what_decides_a_result_changes_its_key_and_nothing_else_does() -> None:
    here = _experts(_plan(threats=["clean"]))
    assert _experts(_plan(threats=["clean"], name="renamed", description="other")) == here
    assert not _experts(_plan(threats=["clean"], seeds=[1])) & here
    assert not _experts(_plan(threats=["clean"], recipe={"epochs": 5})) & here
    default = {"epochs": 4, "learning_rate": 0.002, "batch_size": 32}  # what the micro backbone's card says
    assert _experts(_plan(threats=["clean"], recipe=default)) == here


def test_unseeded_steps_are_shared_by_seeds_and_seeded_ones_are_not() -> None:
    def merges(method: str) -> int:
        plan = _plan(axes={"merging": [method], "defenses": ["params"]}, threats=["protection"], seeds=[0])
        return sum(s.kind == "merge" and "seed" in json.loads(s.args) for s in plan.steps.values())

    assert merges("simple_average") == 0
    assert merges("dare") > 0


def test_a_local_folder_enters_by_content_and_not_by_place(tmp_path: Path) -> None:
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "train.bin").write_bytes(b"same")
    assert fingerprint(tmp_path / "here") == fingerprint(tmp_path / "there")
    (tmp_path / "there" / "train.bin").write_bytes(b"diff")
    assert fingerprint(tmp_path / "here") != fingerprint(tmp_path / "there")
    (tmp_path / "there" / "train.bin").rename(tmp_path / "there" / "tests.bin")
    (tmp_path / "there" / "tests.bin").write_bytes(b"same")
    assert fingerprint(tmp_path / "here") != fingerprint(tmp_path / "there")


# --------------------------------------------------------------------------- plans


def test_steps_come_in_dependency_order_and_lead_nowhere_unknown() -> None:
    plan = _plan(axes={"attacks": POOL["attacks"], "defenses": POOL["defenses"], "experts": [2, "all"]})
    seen: set[str] = set()
    for key, step in plan.steps.items():
        assert {k for _, k in step.inputs} <= seen
        assert step.key == key
        seen.add(key)
    assert {k for c in plan.cells for _, k in c.roles} <= seen


PLAN = _plan(axes={"attacks": POOL["attacks"], "defenses": POOL["defenses"]})


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_needed_steps_are_closed_and_minimal(data: st.DataObject) -> None:
    keys = list(PLAN.steps)
    stored = set(data.draw(st.lists(st.sampled_from(keys), unique=True)))
    wanted = needed_steps(PLAN, stored.__contains__)
    roles = {k for c in PLAN.cells for _, k in c.roles} | read_facts(PLAN)
    assert not wanted.keys() & stored
    assert roles - stored <= wanted.keys()
    for step in wanted.values():
        assert {k for _, k in step.inputs} <= wanted.keys() | stored
    users = {k for s in wanted.values() for _, k in s.inputs}
    assert wanted.keys() <= roles | users  # nothing runs that nobody asked for
    assert list(wanted) == [k for k in keys if k in wanted]


def test_nothing_is_needed_when_all_evaluations_are_stored() -> None:
    roles = {k for c in PLAN.cells for _, k in c.roles}
    told = roles | read_facts(PLAN)
    assert needed_steps(PLAN, told.__contains__) == {}
    assert needed_steps(PLAN, roles.__contains__).keys() >= told - roles


@pytest.mark.slow
def test_a_hundred_thousand_cells_share_their_steps() -> None:
    scalings = [round(0.001 * i, 3) for i in range(1, 120)]
    plan = _plan(
        axes={"merging": [{"name": "task_arithmetic", "scaling": scalings}], "attacks": ["none", "realign", "badnets"],
              "defenses": ["none", "params", "clp"], "experts": [2, "all"]},
        seeds=list(range(18)),
    )  # fmt: skip
    assert len(plan.cells) == 119 * 18 * (2 + 4 * 3 * 2 + 4 * 3 * 2) > 100_000
    kinds = Counter(s.kind for s in plan.steps.values())
    assert kinds["expert"] == 3 * 18
    assert kinds["poison"] == 3 * 18
    assert kinds["data"] == 3
    assert kinds["base"] == 1
    assert len(plan.steps) < 4 * len(plan.cells)


def test_no_ref_is_a_ref_of_nothing() -> None:
    cell = next(iter(cells(_grid(threats=["clean"]))))
    assert isinstance(cell, Cell)
    assert (cell.attack, cell.defense) == (NONE, NONE)
    assert NONE.label == "none"
