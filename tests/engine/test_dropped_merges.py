"""``--drop-merges``: merges leave the store as soon as nothing of the run needs them; results and facts stay."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from engine_runs import comparable
from safetensors.torch import save
from torch import zeros

from mergesec.execution.store import SPENT, CorruptArtifact, Store

KEY = "a" * 40
SLURM = ("--engine", "slurm", "--workers", "2", "--slurm", "cluster=local")
AXES = {"defenses": ["none", "clp"], "attacks": ["none", "badnets"], "adversary": ["micro/bars"]}


def _artifacts(bench: Any, kind: str, end: str) -> set[str]:
    folder = bench.store / "artifacts" / kind
    return {path.stem for path in folder.glob(f"*{end}")} if folder.is_dir() else set()


def _same(bench: Any, kept: Any) -> bool:
    """Whether all records say the same but for what was measured of the machine."""
    here, there = (comparable(of.results / "records" / "dropping") for of in (bench, kept))
    return len(here) == 11 and here == there  # ten cells and the grid


# --------------------------------------------------------------------------- the store


def test_facts_outlive_tensors_and_the_artifact_is_missing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put("merge", KEY, save({"w": zeros(1000)}), {"seconds": 2.0})
    store.spend("merge", KEY)
    assert not store.has("merge", KEY)
    assert store.keys() == set()
    assert store.keys(spent=True) == {KEY}
    assert store.facts("merge", KEY) == {"seconds": 2.0}
    with pytest.raises(CorruptArtifact):
        store.read("merge", KEY)
    assert [path.name for path in (tmp_path / "artifacts" / "merge").iterdir()] == [KEY + SPENT]


def test_what_is_made_again_is_whole_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for seconds in (2.0, 3.0):
        store.put("merge", KEY, save({"w": zeros(10)}), {"seconds": seconds})
        assert store.facts("merge", KEY) == {"seconds": seconds}
        assert len(store.read("merge", KEY)[0]) > 40
        assert _names(tmp_path) == {f"{KEY}.json", f"{KEY}.safetensors"}
        store.spend("merge", KEY)
    store.spend("merge", KEY)  # nothing is left to let go of
    store.remove("merge", KEY)
    assert _names(tmp_path) == set()


def test_damaged_facts_are_found_and_removed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put("merge", KEY, save({"w": zeros(10)}), {"seconds": 2.0})
    store.spend("merge", KEY)
    path = tmp_path / "artifacts" / "merge" / (KEY + SPENT)
    path.write_bytes(path.read_bytes().replace(b"2.0", b"9.0"))
    with pytest.raises(CorruptArtifact):
        store.facts("merge", KEY)
    assert store.keys(spent=True) == set()


def test_the_cache_counts_verifies_and_clears_what_is_left(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put("merge", KEY, save({"w": zeros(100_000)}), {"seconds": 2.0})
    store.spend("merge", KEY)
    (found,) = store.contents()
    assert (found.kind, found.key) == ("merge", KEY)
    assert found.bytes < 1000
    assert store.verify(found)
    path = tmp_path / "artifacts" / "merge" / (KEY + SPENT)
    path.write_bytes(path.read_bytes()[:-9])
    assert not store.verify(found)
    assert store.contents() == []


def _names(root: Path) -> set[str]:
    return set(os.listdir(root / "artifacts" / "merge"))


# --------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def kept(bench_class: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A grid run as always."""
    bench = bench_class(tmp_path_factory.mktemp("kept"))
    assert bench.run(_grid(bench)).code == 0
    return bench


def _grid(bench: Any, **axes: Any) -> Path:
    made: Path = bench.grid("dropping", threats=["clean", "backdoor"], axes={**AXES, **axes})
    return made


def test_nothing_but_room_changes(bench: Any, kept: Any) -> None:
    ran = bench.run(_grid(bench), "--drop-merges")
    assert ran.code == 0, ran.err
    assert bench.boards("dropping") == kept.boards("dropping")
    assert _same(bench, kept)
    for kind in ("merge", "repair"):
        assert _artifacts(bench, kind, ".safetensors") == set()
        assert _artifacts(bench, kind, SPENT) == _artifacts(kept, kind, ".json") != set()
    assert _artifacts(bench, "expert", ".safetensors") == _artifacts(kept, "expert", ".safetensors")


def test_a_second_run_has_nothing_to_do_and_a_wider_one_makes_again_what_it_needs(bench: Any) -> None:
    assert bench.run(_grid(bench), "--drop-merges").code == 0
    assert ", 0 steps run," in bench.run(_grid(bench)).out
    merged = _artifacts(bench, "merge", SPENT)
    wider = bench.run(_grid(bench, attacks=["none", "badnets", "badvit"]), "--drop-merges")
    assert wider.code == 0, wider.err
    assert _artifacts(bench, "merge", ".safetensors") == set()
    assert _artifacts(bench, "merge", SPENT) > merged


def test_merges_of_an_earlier_run_go_too(bench: Any, kept: Any) -> None:
    shutil.copytree(kept.store, bench.store)
    assert ", 0 steps run," in bench.run(_grid(bench), "--drop-merges").out
    assert _artifacts(bench, "merge", ".safetensors") == set()
    assert _artifacts(bench, "merge", SPENT) == _artifacts(kept, "merge", ".json")
    assert _same(bench, kept)


def test_no_more_merges_lie_there_than_steps_run_at_once(bench: Any) -> None:
    """Merges are made one by one, each read and let go of before the next: counted as every step ends."""
    counted = bench.home / "counted.txt"
    (bench.home / "sitecustomize.py").write_text(COUNTING.format(str(counted), str(bench.store)))
    bench.environment["PYTHONPATH"] = str(bench.home)
    assert bench.run(_grid(bench), "--drop-merges").code == 0
    numbers = [int(line) for line in counted.read_text().split()]
    assert max(numbers) <= 2, numbers  # a repaired merge beside the one it was made from
    assert numbers.count(1) > 3


COUNTING = """
import pathlib
from mergesec.execution import scheduler
released = scheduler.Scheduler._release
def counting(self, key):
    found = pathlib.Path({1!r}).glob("artifacts/*/*.safetensors")
    number = sum(path.parent.name in scheduler.MERGED for path in found)
    with open({0!r}, "a") as file:
        print(number, file=file)
    released(self, key)
scheduler.Scheduler._release = counting
"""


def test_a_merge_whose_evaluation_failed_stays_for_the_next_run(bench: Any, tmp_path: Path) -> None:
    plugin = tmp_path / "fails.py"
    plugin.write_text(FAILING)
    grid = bench.grid(
        "failing", threats=["backdoor"],
        axes={"merging": ["simple_average"], "attacks": ["badnets"], "adversary": ["micro/bars"], "defenses": ["fails"]},
    )  # fmt: skip
    assert bench.run(grid, "--drop-merges", plugins=(plugin,)).code == 1
    assert len(_artifacts(bench, "merge", ".safetensors")) == 2  # poisoned and clean, neither was repaired


FAILING = """
from mergesec.contracts import Defense
CARD = {
    "name": "fails", "kind": "defense", "class": "Fails", "version": "1", "title": "Fails", "paper": "none",
    "summary": "fails", "threat": "backdoor", "hooks": ["repair"], "knowledge": "the merge", "seeded": False,
    "parameters": {},
}
class Fails(Defense):
    def repair(self, merged, ctx):
        raise ValueError("always")
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", [("--engine", "ray", "--workers", "2"), SLURM, ("--jobs", "2")])
def test_several_workers_of_any_engine_leave_the_same(bench: Any, kept: Any, engine: tuple[str, ...]) -> None:
    pytest.importorskip({"ray": "ray", "slurm": "submitit"}.get(engine[1], "torch"))
    ran = bench.run(_grid(bench), "--drop-merges", *engine, *(() if "--jobs" in engine else ("--jobs", "1")))
    assert ran.code == 0, ran.err
    assert _same(bench, kept)
    assert _artifacts(bench, "merge", ".safetensors") == set()
    assert _artifacts(bench, "merge", SPENT) == _artifacts(kept, "merge", ".json")


def test_a_plan_tells_how_much_of_the_disk_are_merges(bench: Any) -> None:
    assert (
        "are merges, which bench run --drop-merges lets go of"
        in bench("plan", *bench.arguments(_grid(bench))).out
    )
