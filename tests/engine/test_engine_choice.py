"""Which engine runs a grid: what may be asked for, what is said of what may not, and that it is no part of a result."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

import mergesec
from mergesec.cli.run_verb import _pairs
from mergesec.errors import UsageError
from mergesec.execution.engines.engine import LocalEngine, Ways, make_engine
from mergesec.execution.session import open_session
from mergesec.planning.engines import EngineSpec, engine_spec, seconds_of
from mergesec.planning.gridspec import parse_grid

GRID: dict[str, Any] = {
    "name": "g",
    "suite": {"backbone": "micro/vit", "tasks": ["micro/bars", "micro/blobs"]},
    "axes": {"merging": ["ties"]},
}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"name": "slrum"}, "--engine: no engine 'slrum'; did you mean 'slurm'?"),
        ({"name": "kubernetes"}, "--engine: no engine 'kubernetes'; valid: local, ray, slurm"),
        ({"address": "host:1"}, "--address: is for --engine ray, and this is local"),
        ({"name": "ray", "time_limit": "4h"}, "--time-limit: is for --engine slurm, and this is ray"),
        ({"name": "slurm", "address": "host:1"}, "--address: is for --engine ray, and this is slurm"),
        ({"workers": 3}, "--workers: is for --engine ray and slurm, and this is local"),
        ({"name": "ray", "workers": 0}, "--workers: Input should be greater than or equal to 1, got 0"),
        ({"name": "ray", "gpus": -1.0}, "--gpus: Input should be greater than or equal to 0, got -1.0"),
        (
            {"name": "slurm", "time_limit": "soon"},
            "--time-limit: 'soon' is no time; write 90s, 30m, 4h or 2d",
        ),
        ({"name": "slurm", "time_limit": "0h"}, "--time-limit: '0h' is no time"),
    ],
)
def test_what_cannot_be_is_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        engine_spec(None, given)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ("rey", "grid: engine.name: no engine 'rey'; did you mean 'ray'?"),
        ({"name": "slurm", "wokers": 1}, "grid: engine.wokers: unknown field; did you mean 'workers'?"),
        ({"name": "slurm", "time_limit": "4"}, "grid: engine.time_limit: '4' is no time"),
        (3, "grid: engine: "),
    ],
)
def test_in_a_grid_too(engine: Any, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_grid({**GRID, "engine": engine}, "grid")
    assert str(caught.value).startswith(said)


def test_the_command_line_comes_before_the_grid() -> None:
    grid = EngineSpec(name="slurm", workers=8, slurm={"partition": "gpu"})
    assert engine_spec(grid, {}) == grid
    assert engine_spec(grid, {"workers": 2, "name": None, "slurm": {}}) == grid.model_copy(
        update={"workers": 2}
    )
    assert engine_spec(grid, {"name": "ray"}) == EngineSpec(name="ray")
    assert engine_spec(None, {}) == EngineSpec()


def test_times_are_read() -> None:
    assert [seconds_of(t) for t in ("90s", "30m", "4h", "2d", "1.5h", " 2 h")] == [
        90,
        1800,
        14400,
        172800,
        5400,
        7200,
    ]
    assert not any(seconds_of(t) for t in ("", "4", "h", "-1h", "1h30m", "1e3s", "4 hours"))


def test_pairs_of_the_command_line() -> None:
    assert _pairs(["partition=gpu", "constraint=a=b"]) == {"partition": "gpu", "constraint": "a=b"}
    for word in ("gpu", "=gpu"):
        with pytest.raises(UsageError, match=f"--slurm: '{word}' must be KEY=VALUE"):
            _pairs([word])


@pytest.mark.parametrize(("name", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_without_the_extra_the_command_that_brings_it_is_said(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == package else found(n, *a))
    with pytest.raises(UsageError) as caught:
        make_engine(EngineSpec(name=name), Ways())
    told = f"--engine: {name} needs {package}, which is not installed: pip install 'mergesec[{name}]'"
    assert str(caught.value) == told


def test_local_is_the_engine_if_nobody_says() -> None:
    assert isinstance(make_engine(EngineSpec(), Ways("cpu", 1)), LocalEngine)


def test_python_names_engines_as_the_command_line_does(tmp_path: Path, micro: Path) -> None:
    for engine in ("rey", {"name": "rey"}):
        with pytest.raises(UsageError, match="no engine 'rey'; did you mean 'ray'"):
            mergesec.run(GRID, plugins=micro, store=tmp_path / "s", results=tmp_path / "r", engine=engine)


def test_an_engine_is_no_part_of_steps_or_of_what_is_written_of_a_grid(tmp_path: Path, micro: Path) -> None:
    plans = []
    for name, more in (("plain", {}), ("ray", {"engine": {"name": "ray", "workers": 3}})):
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps({**GRID, **more}))
        session = open_session(str(path), (), (str(micro),), store=tmp_path / "store")
        plans.append((list(session.plan.steps), session.grid.spec.model_dump_json()))
    assert plans[0] == plans[1]
    assert session.grid.spec.engine == EngineSpec(name="ray", workers=3)
