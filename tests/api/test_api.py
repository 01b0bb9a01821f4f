"""``import mergesec``: the command line's numbers in five lines, single models with the grids' own steps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

import mergesec
from mergesec.api.grids import as_words, with_overrides
from mergesec.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
MICRO = ROOT / "benchmark" / "mergesec" / "conformance" / "micro.py"
SUITE = {"backbone": "micro/vit", "tasks": ["micro/bars", "micro/blobs"]}
GRID = {
    "name": "tiny", "suite": SUITE, "recipe": {"epochs": 1}, "axes": {"merging": ["ties"], "victim": ["micro/bars"]},
    "threats": ["clean"],
}  # fmt: skip


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A store that the tests of this module share."""
    return {"store": tmp_path_factory.mktemp("api") / "store", "plugins": [MICRO]}


@pytest.fixture(scope="module")
def done(desk: dict[str, Any]) -> Any:
    return mergesec.run(GRID, results=desk["store"].parent / "results", jobs=1, progress=False, **desk)


def test_importing_and_reading_load_no_torch() -> None:
    program = (
        "import sys, mergesec\n"
        "dir(mergesec)\n"
        f"mergesec.load_board('mini-ownership', 'ownership', {str(ROOT / 'results')!r})\n"
        f"mergesec.records('mini-ownership', {str(ROOT / 'results')!r})\n"
        "mergesec.catalogue('attack')\n"
        "mergesec.plan('quickstart')\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_every_name_is_there_and_no_other() -> None:
    assert set(mergesec.__all__) <= set(dir(mergesec))
    for name in mergesec.__all__:
        assert getattr(mergesec, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'runs'"):
        _ = mergesec.runs


@pytest.mark.parametrize("module", ["steps", "grid", "checkpoints", "catalog"])
def test_a_module_of_the_old_layout_says_where_it_went(module: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=rf"mergesec\.{module} has moved: .*mergesec\."):
        __import__(f"mergesec.{module}")


def test_a_run_is_that_of_the_command_line(done: Any, desk: dict[str, Any], bench: Any) -> None:
    assert (done.done, done.cells, dict(done.failed)) == (1, 1, {})
    ran = bench.run(
        bench.grid("tiny", threats=["clean"], axes={"merging": ["ties"], "victim": ["micro/bars"]})
    )
    assert ran.code == 0, ran.err
    theirs = pd.read_csv(bench.results / "leaderboards" / "tiny" / "clean.csv")
    pd.testing.assert_frame_equal(done.boards["clean"].reset_index(drop=True), theirs)
    again = mergesec.load_board("tiny", "clean", desk["store"].parent / "results")
    pd.testing.assert_frame_equal(again, theirs)
    assert [r.cell for r in mergesec.records("tiny", desk["store"].parent / "results")] == [
        r.cell for r in done.records
    ]


def test_a_plan_says_what_is_left(done: Any, desk: dict[str, Any]) -> None:
    assert mergesec.plan(GRID, **desk).steps == mergesec.plan(GRID, **desk).cached
    more = mergesec.plan(GRID, seeds=[0, 1], **desk)
    assert more.cells == 2 and more.cached < more.steps and more.seconds > 0
    named = mergesec.plan("quickstart", store=desk["store"], seeds=[3])
    assert named.cells and named.name == "quickstart"


def test_overrides_change_a_mapping_field_by_field() -> None:
    changed = with_overrides({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 5}, "e.f": [1]})
    assert changed == {"a": {"b": 5, "c": 2}, "d": 3, "e": {"f": [1]}}
    words, rest = as_words(
        {"seeds": np.arange(2), "axes": {"merging": [{"name": "ties", "scaling": np.float64(0.5)}]}, "suite": "mini",
         "suite.experts": {"mini/mnist": "x"}}
    )  # fmt: skip
    assert words == ["seeds=[0,1]", 'axes.merging=[{name:"ties",scaling:0.5}]', 'suite="mini"']
    assert rest == {"suite": {"experts": {"mini/mnist": "x"}}}


def test_a_suite_may_be_named_in_a_mapping_too(desk: dict[str, Any]) -> None:
    grid = {"name": "named", "suite": "mini", "axes": {"merging": ["ties"]}, "threats": ["clean"]}
    assert (
        mergesec.plan(grid, store=desk["store"]).cells == mergesec.plan(grid, suite="mini", **desk).cells == 1
    )
    assert mergesec.plan(GRID, store=desk["store"], plugins=MICRO).cells == 1


def test_single_models_are_the_grids(done: Any, desk: dict[str, Any]) -> None:
    expert = mergesec.expert("micro/bars", suite=SUITE, recipe={"epochs": 1}, **desk)
    record = done.records[0]
    found = mergesec.evaluate(expert, "micro/bars", suite=SUITE, **desk)
    board = record.counts["acc/expert/micro/bars"]
    assert (found.hits, found.n) == (board.k, board.n)
    assert found.low <= found.rate <= found.high


def test_weights_of_ones_own_go_through_protection_and_back(done: Any, desk: dict[str, Any]) -> None:
    mine = mergesec.expert("micro/bars", suite=SUITE, recipe={"epochs": 1}, **desk)
    given = {name: tensor.clone() for name, tensor in mine.weights.items()}
    published = mergesec.protect("micro/bars", "params", weights=given, suite=SUITE, **desk)
    assert any(not torch.equal(published.weights[n], t) for n, t in given.items())
    assert published.report["condition"] > 1
    same = mergesec.protect("micro/bars", "params", suite=SUITE, recipe={"epochs": 1}, **desk)
    for name, tensor in same.weights.items():  # one secret per task and seed: the grid's own protection
        assert torch.equal(tensor, published.weights[name])
    back = mergesec.recover("micro/bars", "coupled", weights=published, suite=SUITE, **desk)
    gap = max(float((back.weights[n] - t).abs().max()) for n, t in given.items() if t.is_floating_point())
    moved = max(
        float((published.weights[n] - t).abs().max()) for n, t in given.items() if t.is_floating_point()
    )
    assert gap < 0.01 * moved


def test_a_defense_that_trains_takes_no_weights(done: Any, desk: dict[str, Any]) -> None:
    start = mergesec.base(suite=SUITE, **desk)
    with pytest.raises(UsageError, match="trap2 trains the expert itself"):
        mergesec.protect("micro/bars", "trap2", weights=start, suite=SUITE, **desk)


def test_models_are_merged_as_they_come(done: Any, desk: dict[str, Any]) -> None:
    start = mergesec.base(suite=SUITE, **desk)
    experts = [
        mergesec.expert(t, suite=SUITE, recipe={"epochs": 1}, **desk) for t in ("micro/bars", "micro/blobs")
    ]
    merged = mergesec.merge(start, experts, "task_arithmetic", scaling=0.5)
    name = next(n for n, t in merged.items() if t.is_floating_point() and t.ndim > 1)
    moved = sum(e.weights[name].double() - start.weights[name].double() for e in experts)
    assert torch.allclose(merged[name].double(), start.weights[name].double() + 0.5 * moved, atol=1e-6)


def test_a_backdoored_expert_comes_with_its_trigger(done: Any, desk: dict[str, Any]) -> None:
    kept = {"suite": SUITE, **desk}
    bad = mergesec.attack("micro/bars", "badnets", target_class=1, recipe={"epochs": 1}, **kept)
    hit = mergesec.evaluate(bad, "micro/bars", triggered=bad, target_class=1, **kept)
    clean = mergesec.evaluate(bad, "micro/bars", **kept)
    assert bad.trigger and 0 < hit.n < clean.n
    assert mergesec.evaluate(bad, "micro/bars", triggered=bad, **kept) == hit  # the class it aims at is known
    plain = mergesec.Model(bad.weights, "micro/bars")
    with pytest.raises(UsageError, match="has no trigger"):
        mergesec.evaluate(bad, "micro/bars", triggered=plain, **kept)


def test_merging_files_is_merging_tensors(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base, one, two = (
        {"w": torch.randn(6, 4, generator=generator), "b": torch.randn(4, generator=generator)}
        for _ in range(3)
    )
    for name, weights in {"base": base, "one": one, "two": two}.items():
        save_file(weights, tmp_path / f"{name}.safetensors")
    here = mergesec.merge(base, {"one": one, "two": two}, "ties", scaling=0.5)
    paths = [tmp_path / "one.safetensors", str(tmp_path / "two.safetensors")]
    mergesec.merge(
        tmp_path / "base.safetensors", paths, "ties", scaling=0.5, out=tmp_path / "out.safetensors"
    )
    from safetensors.torch import load_file

    written = load_file(tmp_path / "out.safetensors")
    assert here.keys() == written.keys()
    assert all(torch.equal(here[name], written[name]) for name in here)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("load_board", {"grid": "mini-ownership", "board": "ownershp", "results": ROOT / "results"}, "did you mean 'ownership'?"),
    ("load_board", {"grid": "../results", "board": "x", "results": ROOT / "results"}, "not a grid's name"),
    ("catalogue", {"kind": "atack"}, "did you mean 'attack'?"),
    ("run", {"grid": "quickstrat"}, "did you mean 'quickstart'?"),
    ("plan", {"grid": {**GRID, "seedz": [1]}}, "did you mean 'seeds'?"),
    ("plan", {"grid": "quickstart", "seeds": object()}, "seeds: object cannot stand in a grid"),
    ("merge", {"base": {}, "experts": [], "method": "tise"}, "did you mean 'ties'?"),
    ("merge", {"base": {}, "experts": [{}], "method": "emr"}, "makes more than one set of weights"),
    ("merge", {"base": {}, "experts": [{}], "method": "ties", "scaling": "tuned"}, "needs data to score on"),
    ("merge", {"base": 3, "experts": [{}]}, "base: expected named tensors or a path, got int"),
    ("merge", {"base": {"w": torch.ones(2)}, "experts": [{}]}, "tensor 'w' of the base is missing"),
    ("protect", {"task": "mini/mnist", "defense": "parms"}, "did you mean 'params'?"),
    ("protect", {"task": "mini/mnits"}, "did you mean 'mini/mnist'?"),
    ("protect", {"task": "mini/mnist", "defense": "clp"}, "belongs to backdoor, not protection"),
    ("evaluate", {"weights": {"a": torch.ones(1)}, "task": "mini/mnist"}, "of the base is missing"),
    ("protect", {"task": "mini/mnist", "defense": "trap2", "weights": {}}, "of the base is missing"),
    ("attack", {"task": "mini/mnist", "target_class": 99}, "99 is outside [0, 9] of mini/mnist"),
    ("plan", {"grid": "quickstart", "name": "a${b}"}, "would be interpolated"),
    ("expert", {"task": "mini/mnist", "suite": "mni"}, "did you mean 'mini'?"),
    ("expert", {"task": "mini/mnist", "stroe": "x"}, "did you mean 'store'?"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "given", "message"), WRONG, ids=[m for _, _, m in WRONG])
def test_wrong_input_is_told_by_field(
    function: str, given: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGESEC_CACHE", str(tmp_path))
    with pytest.raises(UsageError) as caught:
        getattr(mergesec, function)(**given)
    assert message in str(caught.value)


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "examples").glob("*.py")))
def test_examples_run(script: str, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "MERGESEC_CACHE": str(tmp_path),
        "TMPDIR": str(tmp_path),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    ran = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script)], cwd=tmp_path, env=environment, timeout=240,
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert len(ran.stdout.splitlines()) >= 3
