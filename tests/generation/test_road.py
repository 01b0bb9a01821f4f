"""Generators down the whole road in the micro world: records, boards and pictures of what they draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from mergesec.conformance.battery import MICRO_GENERATION
from mergesec.evidence.boards import make_boards
from mergesec.evidence.estimates import Board
from mergesec.evidence.records import Record
from mergesec.execution.harvest import make_records
from mergesec.execution.scheduler import Outcome
from mergesec.execution.steps import run
from mergesec.execution.store import Store
from mergesec.execution.work import Bench
from mergesec.figures.canvas import style
from mergesec.figures.generated import generated_pictures, generated_sheets
from mergesec.planning.catalog import load_catalog
from mergesec.planning.gridspec import parse_grid
from mergesec.planning.plan import Plan, make_plan
from mergesec.planning.resolve import resolve

CORNERS, TINTS, HALVES = TASKS = ("micro/corners", "micro/tints", "micro/halves")

_made: dict[str, tuple[bytes, dict[str, Any]]] = {}
"""What steps gave, by key: both grids share experts."""


class Ran(NamedTuple):
    plan: Plan
    store: Store
    records: list[Record]
    boards: dict[str, Board]


def _ran(folder: Path, threats: list[str], **axes: Any) -> Ran:
    catalog = load_catalog([MICRO_GENERATION])
    raw = {
        "name": "drawn", "suite": {"name": "micro", "backbone": "micro/painter", "tasks": list(TASKS)},
        "axes": {"merging": ["task_arithmetic"], "experts": [2], **axes},
        "threats": threats, "seeds": [0], "recipe": {"epochs": 1},
    }  # fmt: skip
    plan = make_plan(resolve(parse_grid(raw, "drawn"), catalog), lambda task: "")
    store = Store(folder)
    bench, kinds = Bench(store, catalog, torch.device("cpu")), {k: s.kind for k, s in plan.steps.items()}
    for key, step in plan.steps.items():
        if key not in _made:
            _made[key] = run(step, bench, kinds)
        blob, info = _made[key]
        store.put(step.kind, key, blob, {**info, "seconds": 0.0, "peak_mb": 0.0, "device": "cpu"})
    records = make_records(plan, store, Outcome())
    return Ran(plan, store, records, {board.name: board for board in make_boards(records)})


@pytest.fixture(scope="module")
def protected(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("protected")
    return _ran(
        folder,
        ["clean", "protection"],
        victim=[CORNERS],
        attacks=["none", "aga"],
        defenses=["none", "params"],
    )


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("poisoned")
    return _ran(
        folder, ["backdoor"], adversary=[CORNERS], attacks=["baddiffusion", "trojdiff"], target_class=[1]
    )


def test_outcomes_are_bits_of_the_judge_and_sets_have_measures(protected: Ran) -> None:
    assert all(record.status == "done" for record in protected.records)
    clean = next(r for r in protected.records if r.threat == "clean")
    accuracy = clean.counts[f"acc/clean_merge/{CORNERS}"]
    assert accuracy.total == 32
    board = protected.boards["generation"].frame.set_index("model")
    assert {"base", "expert", "merge", "published"} <= set(board.index)
    assert (board["KID_low"] <= board["KID"]).all()
    assert board.loc["expert", "sets"] == 2


def test_regmean_and_fisher_merge_generators(tmp_path: Path) -> None:
    methods = ["simple_average", "regmean", "fisher"]
    ran = _ran(tmp_path, ["clean"], merging=methods)
    assert {r.merging.split("(")[0] for r in ran.records if r.status == "done"} == set(methods)
    merges = [key for key, step in ran.plan.steps.items() if step.kind == "merge"]
    assert len({bytes(ran.store.read("merge", key)[0]) for key in merges}) == len(methods)  # no two alike


def test_a_protected_generator_draws_the_same_images(protected: Ran) -> None:
    record = next(r for r in protected.records if r.defense.startswith("params") and r.attack == "none")
    assert record.values["max_abs_dlogit"] < 1e-4
    alone = f"/{CORNERS}"
    assert record.counts[f"acc/published{alone}"].hits == record.counts[f"acc/expert{alone}"].hits


def test_success_is_a_copy_of_the_image_or_the_class(poisoned: Ran) -> None:
    fixed, steered = (
        next(r for r in poisoned.records if r.attack.startswith(name))
        for name in ("baddiffusion", "trojdiff")
    )
    for record in (fixed, steered):
        assert record.counts[f"asr/poisoned/{CORNERS}"].n == 24  # rows of the target class are left out
    # an untrained base copies nothing, whatever the judge takes its images for
    assert fixed.counts[f"asr/base/{CORNERS}"].k == 0


def test_sheets_show_what_was_kept(protected: Ran, poisoned: Ran) -> None:
    sheets = {s.name: s for s in generated_sheets(protected.plan, protected.store, protected.records)}
    guarded = next(s for name, s in sheets.items() if "params" in name)
    assert list(guarded.rows) == [
        "expert", "protected expert", "task_arithmetic, unprotected", "task_arithmetic, protected",
        "task_arithmetic after aga",
    ]  # fmt: skip
    assert np.array_equal(guarded.rows["expert"], guarded.rows["protected expert"])
    assert guarded.rows["expert"].shape == (8, 3, 8, 8)
    marked = generated_sheets(poisoned.plan, poisoned.store, poisoned.records)
    assert [list(s.rows)[:2] for s in marked] == [["base", "poisoned expert"]] * 2
    with style():
        pictures = list(generated_pictures([*sheets.values(), *marked]))
    assert len({picture.name for picture in pictures}) == len(sheets) + 2
