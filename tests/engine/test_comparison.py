"""Two folders of records compared, and several joined: on shipped records, changed by hand."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mergesec.cli import main as cli
from mergesec.errors import UsageError
from mergesec.evidence import comparison
from mergesec.evidence.boards import make_boards
from mergesec.evidence.combining import combine, write_joined
from mergesec.evidence.comparison import Comparison, compare
from mergesec.evidence.estimates import Board
from mergesec.evidence.records import Count, count, read_record, read_records
from mergesec.evidence.sides import read_side

SHIPPED = Path(__file__).resolve().parents[2] / "results" / "records"
GRID = "mini"
METHODS = ("task_arithmetic", "ties", "simple_average")
Change = Callable[[dict[str, Any]], None]


def _folder(place: Path, seeds: tuple[int, ...] = (0, 1, 2), methods: tuple[str, ...] = METHODS) -> Path:
    """Results with those cells of the shipped grid."""
    home = place / "records" / GRID
    home.mkdir(parents=True)
    manifest = json.loads((SHIPPED / GRID / "grid.json").read_text())
    kept = []
    for cell in manifest["cells"]:
        record = json.loads((SHIPPED / GRID / f"{cell}.json").read_text())
        if record["merging"] in methods and record["seed"] in seeds:
            shutil.copy(SHIPPED / GRID / f"{cell}.json", home)
            kept.append(cell)
    spec = {**manifest["spec"], "seeds": list(seeds)}
    (home / "grid.json").write_text(json.dumps({**manifest, "cells": kept, "spec": spec}))
    return place


def _change(place: Path, change: Change, merging: str = "ties", seed: int = 0) -> str:
    """Change one record; its cell."""
    for path in (place / "records" / GRID).glob("clean-*.json"):
        record = json.loads(path.read_text())
        if (record["merging"], record["seed"]) == (merging, seed):
            change(record)
            path.write_text(json.dumps(record))
            return str(record["cell"])
    raise AssertionError(f"no {merging} of seed {seed}")


def _worse(record: dict[str, Any]) -> None:
    """Ten right answers less on each task of the merge."""
    for name, told in record["counts"].items():
        if name.startswith("acc/clean_merge/"):
            hits = Count(**told).arrays()[0].copy()
            hits[np.flatnonzero(hits)[:10]] = False
            record["counts"][name] = count(hits).model_dump()


Bench = Callable[[list[str]], int]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """``bench`` in this process; its exit code."""

    def run(words: list[str]) -> int:
        monkeypatch.setattr(sys, "argv", ["bench", *words])
        try:
            cli.main()
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    return run


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    return _folder(tmp_path / "a"), _folder(tmp_path / "b")


def _compared(sides: tuple[Path, Path], **options: Any) -> Comparison:
    return compare(read_side(str(sides[0])), read_side(str(sides[1])), **options)


# --------------------------------------------------------------------------- compare


def test_the_same_records_differ_in_nothing(sides: tuple[Path, Path]) -> None:
    found = _compared(sides)
    assert (found.pairs, found.alike) == (9, 9)
    assert not found.beyond(0) and not found.notes
    assert {r["measure"] for r in found.lines} == {"all"}


def test_a_difference_is_that_of_the_boards_with_a_paired_interval(sides: tuple[Path, Path]) -> None:
    cell = _change(sides[1], _worse)
    found = _compared(sides)
    assert found.alike == 8
    (row,) = [r for r in found.of("row") if r["measure"] == "accuracy"]
    frames = [make_boards(read_records(s / "records", GRID))[0].frame.set_index("method") for s in sides]
    assert [row["A"], row["B"]] == pytest.approx([f.loc["ties", "accuracy"] for f in frames])
    assert row["difference"] == pytest.approx(
        frames[1].loc["ties", "accuracy"] - frames[0].loc["ties", "accuracy"]
    )
    assert row["low"] < row["difference"] < row["high"] and row["seeds"] == 3
    (one,) = [r for r in found.of("cell") if r["measure"] == "accuracy"]
    assert one["cell"] == cell and one["difference"] == pytest.approx(3 * row["difference"])
    wide = frames[0].loc["ties", "accuracy_high"] - frames[0].loc["ties", "accuracy_low"]
    assert one["high"] - one["low"] < wide / 2  # what both have in common is not resampled apart
    assert one["high"] < 0
    controls = [r for r in found.lines if r.get("measure") in ("experts", "base")]
    assert controls and all(r["difference"] == r["low"] == r["high"] == 0 for r in controls)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda r: r["provenance"]["data"].update({"mini/cars": "x"}), "other data of mini/cars"),
        (
            lambda r: r["provenance"]["components"]["ties"].update(version="9"),
            "other version of ties: 9 against",
        ),
        (lambda r: r["provenance"]["recipe"].update(epochs=77), "other recipe"),
        (
            lambda r: r.update(components={"merging": {"name": "ties", "parameters": {"keep": 0.5}}}),
            'other parameters of merging: {"keep": 0.5} against {"keep": 0.2}',
        ),
        (lambda r: r.update(protocol="transductive"), "other protocol: transductive against inductive"),
        (
            lambda r: r["provenance"].update(partial={"mini/dtd": "half"}),
            "other part of mini/dtd: half against all",
        ),
    ],
)
def test_what_cannot_be_compared_is_told_with_the_reason(
    sides: tuple[Path, Path], change: Change, why: str
) -> None:
    _change(
        sides[1], lambda r: r.update(components={"merging": {"name": "ties", "parameters": {"keep": 0.2}}})
    )
    cell = _change(sides[0], change)
    found = _compared(sides)
    (line,) = found.of("incomparable")
    assert line["cell"] == cell and why in line["why"]
    assert found.pairs == 8


def test_numbers_that_are_no_rates_are_told_without_an_interval(
    sides: tuple[Path, Path], bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    _change(sides[0], lambda r: r.update(values={"distance/x": 1.0, "same": 2.0, "gone": 3.0}))
    cell = _change(sides[1], lambda r: r.update(values={"distance/x": 1.5, "same": 2.0 + 1e-9}))
    found = _compared(sides)
    assert found.alike == 9 and not found.beyond(0)
    told = {r["measure"]: (r["cell"], r["A"], r["B"]) for r in found.of("value")}
    assert told == {"distance/x": (cell, 1.0, 1.5), "gone": (cell, 3.0, None)}
    assert bench(["compare", *map(str, sides), "--tolerance", "0"]) == 0
    assert f"{cell}: gone 3, absent" in capsys.readouterr().out


def test_other_test_samples_are_no_pair(sides: tuple[Path, Path]) -> None:
    def fewer(record: dict[str, Any]) -> None:
        name = "acc/base/mini/cars"
        record["counts"][name] = count(Count(**record["counts"][name]).arrays()[0][:-1]).model_dump()

    _change(sides[1], fewer)
    assert "other test samples: acc/base/mini/cars" in _compared(sides).of("incomparable")[0]["why"]


def test_versions_are_compared_where_asked_and_machines_always(sides: tuple[Path, Path]) -> None:
    def newer(record: dict[str, Any]) -> None:
        record["provenance"]["components"]["ties"]["version"] = "9"
        record["provenance"]["versions"]["torch"] = "99"

    _change(sides[1], newer)
    assert _compared(sides).of("incomparable")
    found = _compared(sides, across_versions=True)
    assert not found.of("incomparable") and found.pairs == 9
    assert any(note.startswith("torch ") and "99 in B (1 cells)" in note for note in found.notes)


def test_records_that_do_not_tell_a_thing_do_not_disagree_in_it(sides: tuple[Path, Path]) -> None:
    """Records of before 0.1 tell neither parameters nor data."""
    _change(sides[0], lambda r: r.update(components={}, provenance={}))
    assert _compared(sides).pairs == 9


def test_what_is_missing_on_a_side_is_named(tmp_path: Path) -> None:
    a = _folder(tmp_path / "a", seeds=(0, 1))
    b = _folder(tmp_path / "b", seeds=(1, 2))
    gone = _change(
        b, lambda r: r.update(status="failed", reason="ValueError: no", counts={}, cost={}), seed=1
    )
    found = _compared((a, b))
    told = {line["cell"]: line["why"] for line in found.of("missing")}
    assert told[gone] == "failed in B: ValueError: no"
    assert sorted(told.values()).count("not in B") == sorted(told.values()).count("not in A") == 3
    assert found.pairs == 2


def test_tiers_that_changed_are_told(monkeypatch: pytest.MonkeyPatch, sides: tuple[Path, Path]) -> None:
    _change(sides[1], _worse)
    nan = float("nan")

    def boards(records: list[Any]) -> list[Board]:
        mine = [2.0, 2.0, nan, nan] if calls else [1.0, 2.0, nan, 4.0]
        calls.append(mine)
        frame = pd.DataFrame({"defense": ["a", "b", "c", "d"], "tier": mine})
        return [Board("x", "X", frame, ()), Board("untiered", "Y", frame[["defense"]], ())]

    calls: list[list[float]] = []
    monkeypatch.setattr(comparison, "make_boards", boards)
    told = [(r["board"], r["defense"], r["A"], str(r["B"])) for r in _compared(sides).of("tier")]
    assert told == [("x", "a", 1.0, "2.0"), ("x", "d", 4.0, "nan")]


def test_grids_of_other_names_are_compared_alone(tmp_path: Path) -> None:
    a, b = _folder(tmp_path / "a"), _folder(tmp_path / "b")
    (b / "records" / GRID).rename(b / "records" / "other")
    for path in (b / "records" / "other").glob("clean-*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "grid": "other"}))
    assert _compared((a, b)).pairs == 9
    shutil.copytree(SHIPPED / "mini-backdoor-many", a / "records" / "mini-backdoor-many")
    with pytest.raises(UsageError, match="no grid in common: mini, mini-backdoor-many in A, other in B"):
        _compared((a, b))


def test_bench_compare_prints_writes_and_fails_beyond_a_tolerance(
    bench: Bench, sides: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = map(str, sides)
    assert bench(["compare", a, b, "--tolerance", "0"]) == 0
    assert "9 cells compared: 9 the same in every sample, 0 not" in capsys.readouterr().out
    _change(sides[1], _worse)
    table = tmp_path / "all.csv"
    assert bench(["compare", a, b, "--csv", str(table)]) == 0
    out = capsys.readouterr().out
    assert "Rows that differ" in out and "method ties" in out
    frame = pd.read_csv(table)
    assert set(frame["kind"]) == {"row", "cell"}
    most = 100 * frame["difference"].abs().max()
    assert bench(["compare", a, b, "--tolerance", str(most + 0.01)]) == 0
    _change(sides[1], lambda r: r.update(protocol="transductive"), "task_arithmetic", 2)
    assert bench(["compare", a, b, "--tolerance", str(most - 0.01), "--allow-missing"]) == 1
    assert "beyond" in capsys.readouterr().err
    assert bench(["compare", a, b, "--tolerance", "99"]) == 1
    assert "1 cell of A cannot be compared with B (--allow-missing)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere"], "nowhere: holds no records"),
        (["{a}", "--grid", "minni"], "--grid: no records of 'minni' in"),
        (["{a}", "--tolerance", "nan"], "--tolerance: must be points"),
        (["{a}", "--csv", "{a}/records/mini/grid.json/x.csv"], "--csv: cannot write to"),
    ],
)
def test_wrong_words_are_told(
    bench: Bench, sides: tuple[Path, Path], words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word.format(a=sides[0]) for word in words]
    assert bench(["compare", str(sides[1]), *given]) == 2
    assert told in capsys.readouterr().err


def test_a_broken_record_is_named(
    bench: Bench, sides: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    cell = _change(sides[1], lambda r: r["counts"]["acc/base/mini/cars"].update(k=1))
    assert bench(["compare", *map(str, sides)]) == 2
    assert f"{cell}.json: not a record" in capsys.readouterr().err


# --------------------------------------------------------------------------- combine


def test_seeds_of_two_machines_become_the_boards_of_the_whole(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, c = _folder(tmp_path / "a", (0, 1)), _folder(tmp_path / "b", (1, 2)), tmp_path / "c"
    assert bench(["combine", str(a), str(b), "--out", str(c)]) == 0
    out = capsys.readouterr().out
    assert "mini: 9 of 9 cells done, 3 cells the same on several sides" in out
    whole = make_boards(read_records(_folder(tmp_path / "whole") / "records", GRID))[0].frame
    joined = make_boards(read_records(c / "records", GRID))[0].frame
    pd.testing.assert_frame_equal(joined, whole)
    assert (c / "leaderboards" / GRID / "clean.csv").is_file()
    assert json.loads((c / "records" / GRID / "grid.json").read_text())["spec"]["seeds"] == [0, 1, 2]
    assert bench(["board", GRID, "--results", str(c)]) == 0
    for path in (a / "records" / GRID).glob("clean-*.json"):
        assert read_record(c / "records" / GRID, path.stem) == read_record(path.parent, path.stem)


def test_what_one_machine_did_counts_where_the_other_failed(tmp_path: Path) -> None:
    a, b = _folder(tmp_path / "a"), _folder(tmp_path / "b")
    failed = {"status": "failed", "reason": "MemoryError", "counts": {}, "cost": {}}
    cell = _change(a, lambda r: r.update(failed))
    both = _change(a, lambda r: r.update(failed), "task_arithmetic", 1)
    _change(
        b, lambda r: r.update({**failed, "status": "missing", "reason": "not run yet"}), "task_arithmetic", 1
    )
    (joined,) = combine([read_side(str(a)), read_side(str(b))])
    status = {r.cell: (r.status, r.reason) for r in joined.records}
    assert status[cell] == ("done", "")
    assert status[both] == ("failed", "MemoryError")
    assert len(joined.records) == 9


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            _worse,
            "acc/clean_merge/mini/cars is [0-9]+ of [0-9]+ in .*a .mini., but [0-9]+ of [0-9]+ in .*b .mini.",
        ),
        (
            lambda r: r["provenance"]["data"].update({"mini/cars": "x"}),
            "data of mini/cars is .*these are two grids",
        ),
        (lambda r: r["provenance"]["recipe"].update(epochs=7), "recipe is "),
        (
            lambda r: r["provenance"]["components"]["ties"].update(digest="d"),
            "code of ties is built in in .* but d in",
        ),
        (lambda r: r.update(backbone="mini/other"), "backbone's name is mini/vit in "),
        (lambda r: r.update(values={"x": 1.0}), "x is in one|x"),
    ],
)
def test_contradictions_are_refused_by_name(
    sides: tuple[Path, Path], tmp_path: Path, change: Change, told: str
) -> None:
    _change(sides[1], change)
    if "x is in one" in told:
        _change(sides[0], lambda r: r.update(values={"x": 2.0}))
        told = "x is 2 in .*, but 1.0 in "
    with pytest.raises(UsageError, match=told):
        combine([read_side(str(side)) for side in sides])


def test_cells_of_two_recipes_do_not_stand_on_one_board(tmp_path: Path) -> None:
    a, b = _folder(tmp_path / "a", (0,)), _folder(tmp_path / "b", (1,))
    _change(b, lambda r: r["provenance"]["recipe"].update(epochs=7), seed=1)
    with pytest.raises(UsageError, match="combine: recipe is"):
        combine([read_side(str(a)), read_side(str(b))])


def test_grids_of_two_names_become_one_where_a_name_is_given(tmp_path: Path) -> None:
    a, b = _folder(tmp_path / "a", (0,)), _folder(tmp_path / "b", (1,))
    parts = combine([read_side(str(a)), read_side(str(b))], "joint")
    assert [(p.name, len(p.records), {r.grid for r in p.records}) for p in parts] == [("joint", 6, {"joint"})]
    write_joined(tmp_path / "c", parts)
    assert len(read_records(tmp_path / "c", "joint")) == 6


def test_a_folder_that_holds_records_is_left_alone(
    bench: Bench, sides: tuple[Path, Path], capsys: Any
) -> None:
    a, b = map(str, sides)
    before = sorted((sides[0] / "records" / GRID).iterdir())
    assert bench(["combine", a, b, "--out", a]) == 2
    assert "--out: " in capsys.readouterr().err
    assert sorted((sides[0] / "records" / GRID).iterdir()) == before
    assert bench(["combine", a, b, "--out", f"{a}/new", "--name", "../x"]) == 2


def test_boards_tell_of_records_that_the_grid_does_not_name(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = _folder(tmp_path / "a", (0,)), _folder(tmp_path / "b", (1,))
    for path in (b / "records" / GRID).glob("clean-*.json"):
        shutil.copy(path, a / "records" / GRID)
    assert bench(["board", GRID, "--results", str(a)]) == 0
    told = capsys.readouterr()
    assert "3 records lie beside the grid's" in told.err and "bench combine" in told.err
