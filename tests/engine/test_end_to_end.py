"""The main job from one command to boards, and the verbs around it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file


def _everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_leaves_records_csv_and_markdown(finished: Any) -> None:
    boards = finished.results / "leaderboards" / "whole"
    names = {p.name for p in boards.iterdir()}
    assert names == {
        "clean.csv", "protection.csv", "protection_cells.csv", "protection_distances.csv", "backdoor.csv",
        "backdoor_pareto.csv", "backdoor_defenses.csv", "backdoor_attacks.csv", "cost.csv", "cost_total.csv",
        "boards.md",
    }  # fmt: skip
    manifest = json.loads((finished.results / "records" / "whole" / "grid.json").read_text())
    assert len(manifest["cells"]) == 18
    out = (finished.home / "out.txt").read_text()
    assert "18 of 18 cells done, 61 steps run" in out
    assert str(boards / "clean.csv") in out
    # CSV keeps all digits: 128 test images make k/128, which needs more than the four that Markdown shows
    accuracy = pd.read_csv(boards / "clean.csv")["micro/bars"]
    assert ((accuracy * 128 - (accuracy * 128).round()).abs() < 1e-9).all()


def test_experts_are_the_measure_of_the_clean_board(finished: Any) -> None:
    frame = pd.read_csv(finished.results / "leaderboards" / "whole" / "clean.csv").set_index("method")
    assert frame.loc["(experts)", "normalised"] == pytest.approx(1.0)
    assert (frame["accuracy_low"] <= frame["accuracy"]).all()
    assert (frame["accuracy"] <= frame["accuracy_high"]).all()


def test_protection_keeps_the_function_and_realign_undoes_it(finished: Any) -> None:
    cells = pd.read_csv(finished.results / "leaderboards" / "whole" / "protection_cells.csv")
    protected = cells[cells["defense"] != "none"]
    assert len(protected) == 4
    assert (protected["max_abs_dlogit"] < 1e-3).all()
    assert (protected["UMP+"] == protected["UMP-"]).all()
    plain = protected[protected["attack"] == "none"]
    assert plain["recovery"].isna().all()  # no attack recovers nothing by definition


def test_an_identical_second_run_does_nothing_and_changes_nothing(copied: Any, whole: Any) -> None:
    before = _everything(copied.results)
    ran = copied.run(copied.grid("whole", **whole))
    assert ran.code == 0
    assert "18 of 18 cells done, 0 steps run" in ran.out
    assert _everything(copied.results) == before


def test_two_workers_make_the_same_boards_as_one(finished: Any, bench: Any, whole: Any) -> None:
    ran = bench.run(bench.grid("whole", **whole), "--jobs", "2")
    assert ran.code == 0, ran.err
    assert bench.boards("whole") == finished.boards("whole")


def test_boards_come_again_from_records_alone(copied: Any) -> None:
    before = _everything(copied.results)
    shutil.rmtree(copied.results / "leaderboards")
    shutil.rmtree(copied.store)
    ran = copied("board", "--grid", "whole", "--results", str(copied.results))
    assert ran.code == 0, ran.err
    assert _everything(copied.results) == before


def test_a_grid_that_shares_experts_trains_none(copied: Any, commits: Any) -> None:
    before = commits(copied.store)
    ran = copied.run(copied.grid("other", axes={"merging": [{"name": "task_arithmetic", "scaling": 0.4}]}))
    assert ran.code == 0, ran.err
    new = {name.split("/")[0] for name in commits(copied.store).keys() - before.keys()}
    assert new == {"merge", "evaluate"}


def test_status_plan_and_cache_report_what_is_there(copied: Any, whole: Any) -> None:
    grid = copied.grid("whole", **whole)
    status = copied("status", *copied.arguments(grid), "--results", str(copied.results))
    assert "cells: 18 of 18 computed; steps still to run: 0" in status.out
    plan = copied("plan", *copied.arguments(grid, "seeds=[0,1]"))
    assert plan.code == 0, plan.err
    assert "cells: 36 (4 clean, 16 protection, 16 backdoor)" in plan.out
    assert "belongs to backdoor, not protection" in plan.out
    shown = copied("cache", "show")
    assert "evaluate" in shown.out
    assert copied("cache", "verify").out.startswith("61 artifacts and checkpoints read, 0 corrupt")
    assert copied("cache", "clear", "--kind", "merge").code == 0
    again = copied("status", *copied.arguments(grid), "--results", str(copied.results))
    # evaluations are there, but records also tell what merges measured: those are made again, nothing else is
    assert "cells: 18 of 18 computed; steps still to run: 10" in again.out


def test_cache_verify_finds_and_removes_a_flipped_byte(copied: Any) -> None:
    victim = next((copied.store / "artifacts" / "merge").glob("*.safetensors"))
    flip(victim, -1)
    ran = copied("cache", "verify")
    assert ran.code == 1
    assert f"corrupt, removed: merge {victim.stem}" in ran.out
    assert not victim.exists()


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(bytes(data))


def test_info_and_doctor(bench: Any, micro: Path) -> None:
    info = bench("info", "ties")
    assert info.code == 0
    assert "merging" in info.out
    unknown = bench("info", "tiez")
    assert (unknown.code, unknown.err) == (2, "error: name: unknown 'tiez'; did you mean 'ties'?\n")
    doctor = bench("doctor")
    assert doctor.code == 0, doctor.out
    assert "components load" in doctor.out


LIGHT = [["--help"], ["--version"], ["list"], ["info", "ties"], ["run", "-h"]]


@pytest.mark.parametrize("arguments", LIGHT)
def test_light_verbs_load_neither_torch_nor_pandas(bench: Any, arguments: list[str]) -> None:
    spy = bench.home / "sitecustomize.py"
    spy.write_text(
        "import atexit, sys\n"
        "heavy = ('torch', 'pandas', 'hydra', 'transformers', 'sklearn')\n"
        "atexit.register(lambda: print('HEAVY', *[m for m in heavy if m in sys.modules], file=sys.stderr))\n"
    )
    bench.environment["PYTHONPATH"] = str(bench.home)
    ran = bench(*arguments)
    assert ran.code == 0, ran.err
    assert ran.err.splitlines()[-1] == "HEAVY"


def test_a_free_rider_who_asks_the_published_expert_gets_the_same_answers_whatever_its_topology(
    bench: Any,
) -> None:
    """Students of an expert with and without MergeBarrier, whose MLPs have other sizes, end in the same place."""
    axes = {
        "attacks": [{"name": "distill", "steps": 12, "lr": 1e-3}],
        "defenses": ["none", "mergebarrier"],
        "merging": ["simple_average"],
        "victim": ["micro/bars"],
    }
    ran = bench.run(bench.grid("asked", axes=axes, threats=["protection"]))
    assert ran.code == 0, ran.err
    students = [load_file(path) for path in (bench.store / "artifacts" / "recover").glob("*.safetensors")]
    (base,) = [load_file(path) for path in (bench.store / "artifacts" / "base").glob("*.safetensors")]
    assert len(students) == 2

    def flat(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([weights[n].double().flatten() for n in sorted(base) if base[n].is_floating_point()])

    one, other, start = flat(students[0]), flat(students[1]), flat(base)
    # float noise, which Adam's first steps enlarge: far less than the way that they went
    assert float((one - other).norm()) < 0.05 * float((one - start).norm())
