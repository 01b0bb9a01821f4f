"""The battery finds a component that knows more than its card says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mergesec.conformance.battery import (
    MICRO,
    Check,
    _grid,
    _own_steps,
    _world,
    check_file,
)
from mergesec.conformance.knowledge import (
    _Planned,
    blind_to_the_cell,
    blind_to_the_defender,
    says_its_secrets,
)
from mergesec.errors import UsageError
from mergesec.planning.catalog import Catalog, add_plugin, load_catalog
from mergesec.planning.cells import cells
from mergesec.planning.gridspec import parse_grid
from mergesec.planning.plan import make_plan, step_key
from mergesec.planning.resolve import resolve
from mergesec_methods.backdoor.attacks.badmerging import OFF_TASK, ON_TASK

HEAD = """import torch
from mergesec.contracts import Attack, Defense, Merged
CARD = {{
    "name": "curious", "kind": "defense", "class": "Curious", "version": "1", "title": "curious",
    "summary": "curious", "threat": "backdoor", "hooks": ["repair"], "modalities": ["image"], {card}
}}
class Curious(Defense):
    def __init__(self, **given):
        self.given = given
    def repair(self, merged, base, ctx):
        view = ctx.views["micro/bars"]
        change = float({change})
        return Merged({{n: t + change if t.is_floating_point() else t for n, t in merged.shared.items()}})
"""
ROWS = "rows that the card does not name change nothing"


def checked(folder: Path, card: str, change: str) -> dict[str, Check]:
    path = folder / "curious.py"
    path.write_text(HEAD.format(card=card, change=change))
    return {check.name: check for _, check in check_file(path, load_catalog([MICRO]))}


@pytest.mark.parametrize(
    ("card", "change", "told"),
    [
        ('"data": "none"', "view.tuning.inputs.float().mean()", "the card names no rows"),
        (
            '"data": "tuning", "unlabelled": True',
            "view.tuning.targets[:5].sum()",
            "the card names tuning inputs",
        ),
        ('"data": "tuning"', "view.tuning.targets[:5].sum()", ""),
        ('"data": "tuning", "unlabelled": True', "view.tuning.inputs.float().mean()", ""),
        ('"data": "none"', "view.head['weight'].sum()", ""),
    ],
)
def test_rows_that_a_card_does_not_name_are_found(card: str, change: str, told: str, tmp_path: Path) -> None:
    check = checked(tmp_path, card, change)[ROWS]
    assert check.passed is (told == "")
    assert told in check.message


def test_a_parameter_that_may_be_the_adversarys_target_has_to_say_so(tmp_path: Path) -> None:
    name = "what may equal a secret of the other side says so"
    parameter = '"parameters": {{"target": {{"type": "int", "default": 1{more}}}}}'
    silent = checked(tmp_path, parameter.format(more=""), "0.1")[name]
    assert silent.passed is False
    assert "card.parameters.target may equal a secret" in silent.message
    assert checked(tmp_path, parameter.format(more=', "secret": "target_class"'), "0.1")[name].passed


def test_a_step_that_depends_on_the_target_class_is_found() -> None:
    catalog = load_catalog([MICRO])
    entry = catalog.get("defense", "clp")
    raw = _grid(entry)
    grid = resolve(parse_grid(raw, "conformance"), catalog)
    steps = _own_steps(entry, make_plan(grid, lambda task: ""))
    tasks = _world(entry.card).tasks
    assert steps
    assert blind_to_the_cell(raw, steps, grid, tasks, "clp") is None
    told = [
        replace(s, args=json.dumps({**json.loads(s.args), "target": 0}), key=f"other {i}")
        for i, s in enumerate(steps)
    ]
    assert "depends on the cell's target class" in str(blind_to_the_cell(raw, told, grid, tasks, "clp"))


def test_a_step_that_depends_on_the_trigger_is_found() -> None:
    catalog = load_catalog([MICRO])
    entry = catalog.get("defense", "clp")
    raw = _grid(entry)
    raw["axes"]["attacks"] = ["badnets"]
    grid = resolve(parse_grid(raw, "conformance"), catalog)
    (attack,) = grid.attacks
    steps = [
        replace(s, components=(*s.components, ("attack", attack)))
        for s in _own_steps(entry, make_plan(grid, lambda task: ""))
    ]
    keyed = [
        replace(s, key=step_key(s.kind, [(role, ref.digest) for role, ref in s.components], s.inputs, s.args))
        for s in steps
    ]
    assert not _Planned([]).has(keyed)
    assert _Planned(keyed).has(keyed)
    assert blind_to_the_cell(raw, keyed, grid, _world(entry.card).tasks, "clp") is not None


@pytest.mark.parametrize("name", ["badnets", "badmerging_adaptive"])
def test_a_step_of_an_attack_that_depends_on_the_merge_is_found(name: str) -> None:
    catalog = load_catalog([MICRO])
    entry = catalog.get("attack", name)
    raw = _grid(entry)
    grid = resolve(parse_grid(raw, "conformance"), catalog)
    steps = _own_steps(entry, make_plan(grid, lambda task: ""))
    assert "poison" in {s.kind for s in steps}
    assert blind_to_the_defender(raw, steps, grid, name) is None
    told = [replace(s, key=f"other {i}") for i, s in enumerate(steps)]
    assert "merge or defense" in str(blind_to_the_defender(raw, told, grid, name))


# --------------------------------------------------------------------------- coincidences


GUESSING = """
CARDS = [
    {"name": "guess", "kind": "defense", "class": "Guess", "version": "1", "title": "g", "summary": "g",
     "threat": "backdoor", "hooks": ["repair"], "modalities": ["image"],
     "parameters": {"target": {"type": "int", "default": 0, "secret": "target_class"},
                    "patch": {"type": "float", "default": 4.0, "secret": "attack.patch"},
                    "factor": {"type": "float", "default": 0.5, "secret": "merging.scaling"},
                    "rows": {"type": "int", "default": 100, "secret": "rows.tuning"}}},
]
"""


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    path = tmp_path_factory.mktemp("guess") / "guess.py"
    path.write_text(GUESSING)
    found = load_catalog([MICRO])
    add_plugin(found, path)
    return found


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "target is 0, which is the cell's target_class"),
        ({"target": 1}, ""),
        ({"target": 1, "patch": 5.0}, "patch is 5.0, which is the cell's attack.patch"),
        ({"target": 1, "factor": 0.3}, "factor is 0.3, which is the cell's merging.scaling"),
        ({"target": 1, "rows": 64}, "rows is 64, which is the cell's rows.tuning"),
    ],
)
def test_a_cell_in_which_a_guess_is_the_secret_is_left_out(
    given: dict[str, float], told: str, catalog: Catalog
) -> None:
    raw = {
        "name": "g", "suite": {"backbone": "micro/vit", "tasks": ["micro/bars", "micro/blobs", "micro/rings"]},
        "threats": ["backdoor"],
        "axes": {
            "merging": [{"name": "task_arithmetic", "scaling": 0.3}], "attacks": ["none", "badnets"],
            "defenses": [{"name": "guess", **given}], "adversary": ["micro/bars"], "target_class": [0],
        },
    }  # fmt: skip
    grid = resolve(parse_grid(raw, "grid g"), catalog)
    attacks = [cell.attack.name for cell in cells(grid)]
    assert attacks == (["none"] if told else ["none", "badnets"])
    assert [told in reason for reason in grid.left_out] == ([True] if told else [])


@pytest.mark.parametrize(
    ("given", "left_out"),
    [({}, [3, 4]), ({"patch": 6.0}, [6]), ({"patch": 4.57}, [5]), ({"patch": 0.5}, [])],
)
def test_a_whole_patch_is_what_rounds_to_it_and_a_literal_what_it_stands_for(
    given: dict[str, float], left_out: list[int]
) -> None:
    catalog = load_catalog([MICRO])
    raw = {
        "name": "g", "suite": {"backbone": "micro/vit", "tasks": ["micro/bars", "micro/blobs"]},
        "threats": ["backdoor"],
        "axes": {
            "merging": ["simple_average"], "attacks": [{"name": "badmerging", **given}],
            "defenses": [{"name": "ibvs", "patch": [3, 4, 5, 6, 7]}], "adversary": ["micro/bars"],
        },
    }  # fmt: skip
    grid = resolve(parse_grid(raw, "grid g"), catalog)
    kept = [dict(cell.defense.parameters)["patch"] for cell in cells(grid)]
    assert kept == [side for side in (3, 4, 5, 6, 7) if side not in left_out]


def test_the_published_patch_is_what_its_card_says_it_stands_for() -> None:
    card = load_catalog([]).get("attack", "badmerging").card
    assert card.parameters["patch"].stands_for == {"published": (ON_TASK, OFF_TASK)}


def test_the_adaptive_attack_never_runs_with_the_mergers_own_coefficient() -> None:
    catalog = load_catalog([MICRO])
    card = catalog.get("attack", "badmerging_adaptive").card
    assert card.parameters["coefficient"].default == "drawn"
    raw = {
        "name": "g", "suite": {"backbone": "micro/vit", "tasks": ["micro/bars", "micro/blobs"]},
        "threats": ["backdoor"],
        "axes": {
            "merging": [{"name": "task_arithmetic", "scaling": [0.3, 0.4]}], "adversary": ["micro/bars"],
            "attacks": [{"name": "badmerging_adaptive", "coefficient": ["drawn", 0.3]}],
        },
    }  # fmt: skip
    grid = resolve(parse_grid(raw, "grid g"), catalog)
    assert len(list(cells(grid))) == 3
    assert sum(grid.left_out.values()) == 1


def test_every_built_in_of_a_backdoor_says_its_secrets() -> None:
    found = [entry.card for entry in load_catalog([MICRO]) if entry.card.threat == "backdoor"]
    assert len(found) > 20
    assert [told for told in map(says_its_secrets, found) if told] == []


@pytest.mark.parametrize("secret", ["x", "target_classes", "attack."])
def test_secrets_are_named_as_such(secret: str, tmp_path: Path) -> None:
    path = tmp_path / "guess.py"
    path.write_text(GUESSING.replace('"secret": "target_class"', f'"secret": "{secret}"'))
    with pytest.raises(UsageError, match=r"target_class, attack\.NAME, merging\.NAME or rows\.SPLIT"):
        load_catalog([path])
