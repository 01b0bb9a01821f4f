"""Paths of a grid: in its file relative to the file, on the command line to the working folder; known by content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mergesec.errors import UsageError
from mergesec.execution.session import open_session
from mergesec.planning.catalog import Catalog, load_catalog
from mergesec.planning.gridspec import GridSpec, load_grid, parse_grid
from mergesec.planning.places import placed
from mergesec.planning.plan import Plan

PLUGIN = '''
"""Components with places for parameters."""
from mergesec.contracts import MergeMethod

CARDS = [
    {"name": "reads", "class": "Reads", "kind": "merging", "version": "1", "title": "r", "summary": "r",
     "parameters": {"file": {"type": "path", "default": None}, "net": {"type": "model", "default": None},
                    "word": {"type": "str", "default": ""}}},
    {"name": "around", "class": "Around", "kind": "merging", "version": "1", "title": "a", "summary": "a",
     "wraps": "inner", "parameters": {"inner": {"type": "merging", "default": "simple_average"}}},
]


class Reads(MergeMethod):
    def __init__(self, file, net, word):
        self.file = file

    def merge(self, base, experts, ctx):
        raise ValueError


class Around(Reads):
    def __init__(self, inner):
        self.inner = inner
'''
COMMIT = "owner/net@" + "0" * 40


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a grid's folder, weights in it, and another folder to stand in."""
    monkeypatch.setenv("MERGESEC_CACHE", str(tmp_path / "store"))
    monkeypatch.delenv("MERGESEC_DATA", raising=False)
    (tmp_path / "plugin.py").write_text(PLUGIN)
    for folder, text in (("grids", "one"), ("elsewhere", "two")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "weights").write_text(text)
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def _grid(world: Path, *merging: Any, folder: str = "grids") -> str:
    fields = {
        "name": "g", "suite": {"backbone": "micro/vit", "tasks": ["micro/bars", "micro/blobs"]},
        "axes": {"merging": list(merging)}, "threats": ["clean"],
    }  # fmt: skip
    path = world / folder / "g.yaml"
    path.write_text(yaml.safe_dump(fields))
    return str(path)


def _plan(world: Path, micro: Path, source: str, *overrides: str) -> Plan:
    return open_session(source, overrides, [str(micro), str(world / "plugin.py")]).plan


def _file(plan: Plan, name: str = "file") -> Any:
    return dict(plan.grid.merging[0].parameters)[name]


def test_a_file_s_paths_start_at_the_file_and_the_command_line_s_at_the_working_folder(
    world: Path, micro: Path
) -> None:
    source = _grid(world, {"name": "reads", "file": "weights", "word": "weights"})
    own = _plan(world, micro, source)
    assert _file(own) == str(world / "grids" / "weights")
    assert _file(own, "word") == "weights"
    here = _plan(world, micro, source, "axes.merging=[{name: reads, file: weights}]")
    assert _file(here) == "weights"
    assert here.grid.merging[0].text != own.grid.merging[0].text
    # named from the folder above, as a shared grid often is
    assert _plan(world, micro, "../grids/g.yaml").steps == own.steps


def test_identity_is_the_content_wherever_the_grid_lies(world: Path, micro: Path) -> None:
    there = _plan(world, micro, _grid(world, {"name": "reads", "file": "weights"}))
    (world / "elsewhere" / "weights").write_text("one")
    here = _plan(world, micro, _grid(world, {"name": "reads", "file": "weights"}, folder="elsewhere"))
    assert list(there.steps) == list(here.steps)
    absolute = {"name": "reads", "file": str(world / "grids" / "weights")}
    assert list(_plan(world, micro, _grid(world, absolute)).steps) == list(here.steps)
    assert there.grid.merging[0].label == here.grid.merging[0].label == "reads(file=weights)"


def test_what_is_missing_is_told_with_the_place_that_was_looked_at(world: Path, micro: Path) -> None:
    (world / "elsewhere" / "only-here").write_text("")
    with pytest.raises(UsageError, match=r"axes\.merging\[0\]\.file: no file or folder '.*grids/only-here'"):
        _plan(world, micro, _grid(world, {"name": "reads", "file": "only-here"}))


@pytest.fixture
def catalog(world: Path, micro: Path) -> Catalog:
    return load_catalog([micro, world / "plugin.py"])


def _spec(merging: list[Any], **suite: Any) -> GridSpec:
    fixed = {"backbone": "micro/vit", "tasks": ["micro/bars"], **suite}
    return parse_grid({"name": "g", "suite": fixed, "axes": {"merging": merging}}, "g")


def test_lists_wrapped_methods_names_of_the_hub_and_experts(world: Path, catalog: Catalog) -> None:
    home = world / "grids"
    spec = _spec(
        [
            {"name": "reads", "file": ["weights", "/abs", "~/own"]},
            {"name": "around", "inner": {"name": "reads", "net": "weights"}},
            {"name": "reads", "net": [COMMIT, "sub/net"], "file": None},
            {"name": "unknown", "file": "weights"},
        ],
        experts={"micro/bars": "weights", "micro/blobs": COMMIT},
    )
    found = placed(spec, str(home / "g.yaml"), (), catalog)
    at = f"{home}/weights"
    assert found.axes.merging == (
        {"name": "reads", "file": [at, "/abs", "~/own"]},
        {"name": "around", "inner": {"name": "reads", "net": at}},
        {"name": "reads", "net": [COMMIT, f"{home}/sub/net"], "file": None},
        {"name": "unknown", "file": "weights"},
    )
    assert found.suite.experts == {"micro/bars": at, "micro/blobs": COMMIT}
    assert placed(spec, "quickstart", (), catalog) == spec


@pytest.mark.parametrize(
    ("override", "ours"),
    [
        ("suite.experts.micro/bars=weights", True),
        ("+suite.experts={micro/bars: weights}", True),
        ("suite.experts.micro/blobs=weights", False),
        ("suite=mini", False),
        ("seeds=[1]", False),
    ],
)
def test_what_the_command_line_sets_stays_as_it_is(
    world: Path, catalog: Catalog, override: str, ours: bool
) -> None:
    spec = _spec(["ties"], experts={"micro/bars": "weights"})
    found = placed(spec, str(world / "grids" / "g.yaml"), [override], catalog).suite.experts["micro/bars"]
    assert found == ("weights" if ours else str(world / "grids" / "weights"))


def test_a_suite_s_backbone(world: Path, micro: Path) -> None:
    source = world / "grids" / "b.yaml"
    source.write_text(
        "name: g\nsuite: {backbone: {name: hf-vit, path: weights}, tasks: [micro/bars]}\naxes: {merging: [ties]}\n"
    )
    spec = load_grid(str(source))
    found = placed(spec, str(source), (), load_catalog([micro]))
    assert found.suite.backbone == {"name": "hf-vit", "path": str(world / "grids" / "weights")}


def test_a_model_that_a_package_carries_lies_wherever_the_package_does(world: Path, micro: Path) -> None:
    named = {"name": "reads", "net": "mergesec_tasks:mini/weights/vit.safetensors"}
    plan = _plan(world, micro, _grid(world, named))
    place = _file(plan, "net")
    assert Path(place).is_absolute() and Path(place).is_file()
    absolute = _plan(world, micro, _grid(world, {"name": "reads", "net": place}))
    assert list(absolute.steps) == list(plan.steps)
    for lost, told in (
        ("mergesec_tasks:mini/absent", "has no 'mini/absent'"),
        ("nobody_s:net", "not installed"),
    ):
        with pytest.raises(UsageError, match=rf"axes\.merging\[0\]\.net: '{lost}'.*{told}"):
            _plan(world, micro, _grid(world, {"name": "reads", "net": lost}))
