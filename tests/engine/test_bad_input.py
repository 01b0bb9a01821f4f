"""Whatever a user gets wrong: one line that names the field and the nearest choice, exit code 2, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergesec.cli.main import main

Invoke = Callable[..., tuple[int, str]]


@pytest.fixture
def invoke(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], micro: Path
) -> Invoke:
    """``bench`` in this process: (exit code, standard error)."""
    monkeypatch.setenv("MERGESEC_CACHE", str(tmp_path / "store"))
    monkeypatch.delenv("MERGESEC_DATA", raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: Any) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), capsys.readouterr().err

    return run


GOOD = """\
name: g
suite: {backbone: micro/vit, tasks: [micro/bars, micro/blobs]}
axes: {merging: [ties]}
"""


def _one_line(code: int, err: str, *expected: str) -> None:
    assert code == 2
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    for part in expected:
        assert part in lines[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "suite"),
        ("name: [", "grid"),
        ("- a\n- b\n", "not a mapping"),
        ("just words\n", "not a mapping of fields"),
        ("name: g\n\tsuite: x\n", "grid"),
        (GOOD + "seed: [1]\n", "seed: unknown field; did you mean 'seeds'?"),
        (GOOD.replace("ties", "tiez"), "axes.merging[0]: unknown merging 'tiez'; did you mean 'ties'?"),
        (GOOD.replace("micro/vit", "micro/vitt"), "suite.backbone: unknown backbone 'micro/vitt'; did you mean"),
        (GOOD.replace("[ties]", "[{name: ties, scaling: high}]"), "axes.merging[0].scaling: expected float"),
        (GOOD.replace("[ties]", "[{name: ties, scaling: -1}]"), "axes.merging[0].scaling: -1 is outside"),
        (GOOD.replace("[ties]", "[{name: ties, merge_func: avg}]"), "'avg' is not a choice"),
        (GOOD.replace("[ties]", "ties"), "axes.merging"),
        (GOOD.replace("[ties]", "[safemerge]"), "axes.merging[0].safe: has to name a task of the suite: micro/bars, micro/blobs"),
        (GOOD.replace("[ties]", "[ties, {name: safemerge, safe: micro/bar}]"), "axes.merging[1].safe: 'micro/bar' is not a task of the suite; did you mean 'micro/bars'?"),
        (GOOD.replace("[ties]", "[{name: safemerge, safe: [micro/bars, 3]}]"), "axes.merging[0].safe: 3 is not a task of the suite"),
        (
            "threats: [clean]\n" + GOOD.replace("/blobs]", "/blobs, micro/rings]").replace("[ties]", "[{name: safemerge, safe: micro/rings}], experts: [[micro/bars, micro/blobs]]"),
            "merging safemerge: safe 'micro/rings' is not among the experts",
        ),
        (GOOD.replace("tasks: [", "tasks: ['${nowhere}', "), "nowhere"),
        (GOOD.replace("micro/vit", "'???'"), "suite.backbone: needs a value"),
        ("defaults: [{suite: nosuch}, _self_]\n" + GOOD, "suite/nosuch"),
        (GOOD.replace("[ties]", "[{name: weighted_task_arithmetic, coefficients: [a, b]}]"), "axes.merging[0].coefficients: takes numbers in [-10.0, 10.0], got 'a'"),
        (GOOD.replace("[ties]", "[{name: weighted_task_arithmetic, coefficients: [true, 1.0]}]"), "axes.merging[0].coefficients: takes numbers in [-10.0, 10.0], got True"),
        (GOOD.replace("[ties]", "[{name: task_arithmetic, grid: [low, high]}]"), "axes.merging[0].grid: takes numbers, got 'low'"),
        (GOOD.replace("[ties]", "[{name: task_arithmetic, grid: []}]"), "axes.merging[0].grid: takes numbers, got an empty list"),
        (GOOD + "recipe: {epochs: many}\n", "recipe.epochs: expected int, got 'many'"),
        (GOOD + "recipe: {lora_alpha: 0}\n", "recipe.lora_alpha: must be positive, got 0"),
        (GOOD + "recipe: {lora_rank: -1}\n", "recipe.lora_rank: must not be negative, got -1"),
        (GOOD + "recipe: {warmup: 10}\n", "recipe.warmup: is a share, at most 1, got 10"),
        (GOOD + "seeds: [true]\n", "seeds.0: Input should be a valid integer, got True"),
        (GOOD + "seeds: ['1']\n", "seeds.0: Input should be a valid integer, got '1'"),
        (GOOD.replace("[ties]", "[ties], target_class: [true]"), "axes.target_class.0: Input should be a valid integer, got True"),
        (GOOD.replace("[ties]", "[ties], experts: [2.0]"), "axes.experts.0: Input should be a valid integer, got 2.0"),
        (GOOD.replace("[ties]", "[ties], protected: [3]"), "axes.protected[0]: 3 is outside [1, 2]"),
        (GOOD.replace("[ties]", "[ties], attacks: []"), "axes.attacks: is an empty list"),
        ("threats: []\n" + GOOD, "threats: is an empty list"),
        (GOOD.replace("[ties]", "[ties], experts: [[]]"), "axes.experts[0]: is an empty list; list tasks of the suite: micro/bars, micro/blobs"),
        (GOOD.replace("[ties]", "[ties], experts: [[micro/bars, micro/bars]]"), "axes.experts[0]: 'micro/bars' is named twice"),
        (GOOD.replace("[ties]", "[ties, {name: task_arithmetic, scaling: []}]"), "axes.merging[1].scaling: is an empty list"),
        (GOOD.replace("micro/vit", "{name: hf-text, layers: [1, 2], path: '.'}").replace("micro/bars, micro/blobs", "mini/topic"), "suite.backbone.layers: [1, 2] makes 2 backbones, a grid has one"),
        (GOOD.replace("micro/bars, micro/blobs", "{name: image-folder, path: '.'}, micro/bars").replace("[ties]", "[ties], target_class: drawn"), "axes.target_class: 'drawn' needs the number of classes of every task, and that of image-folder lies in its data"),
        (GOOD.replace("micro/bars, micro/blobs", "{name: image-folder, path: '.'}, micro/bars").replace("[ties]", "[ties], target_class: [99]"), "axes.target_class: 99 is outside [0, 3]"),
        ("threats: [clean]\n" + GOOD.replace("[ties]", "[ties], experts: [[micro/bars]]"), "no cell is left to run (1× one expert is nothing to merge"),
        ("threats: [clean]\n" + GOOD.replace(", micro/blobs", ""), "no cell is left to run (1× one expert is nothing to merge"),
        (GOOD + "threats: [protection]\nexclude: [{threat: protection}]\n", "no cell is left to run"),
    ],
)  # fmt: skip
def test_a_malformed_grid(invoke: Invoke, micro: Path, tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "g.yaml"
    path.write_text(text)
    _one_line(*invoke("run", "--grid", path, "--plugin", micro), expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--grid", "quikstart"], "--grid: no preset 'quikstart'; did you mean 'quickstart'?"),
        (["--grid", "absent.yaml"], "--grid: no file 'absent.yaml'"),
        (["--grid", "g.yaml", "seedz=[1]"], "seedz: unknown field; did you mean 'seeds'?"),
        (["--grid", "g.yaml", "axes.merging=[tiez]"], "did you mean 'ties'?"),
        (["--grid", "g.yaml", "seeds=[1"], "cannot read 'seeds=[1'"),
        (["--grid", "g.yaml", "--jobs", "0"], "--jobs: must be at least 1, got 0"),
        (["--grid", "g.yaml", "--threads", "0"], "--threads: must be at least 1, got 0"),
        (["--grid", "g.yaml", "--step-timeout", "-1"], "--step-timeout: must not be negative"),
        (["--grid", "g.yaml", "--device", "gpu"], "--device: 'gpu'; valid: auto, cpu, cuda, cuda:0,1, mps"),
        (["--grid", "g.yaml", "--device", "cpu:1"], "--device: 'cpu:1'"),
        (["--grid", "g.yaml", "--plugin", "absent.py"], "--plugin: no file 'absent.py'"),
        (["--grid", "g.yaml", "--data-root", "absent"], "--data-root: no folder 'absent'"),
        (["--grid", "g.yaml", "--results", "g.yaml/below"], "--results: cannot write to 'g.yaml/below'"),
    ],
)  # fmt: skip
def test_wrong_arguments(
    invoke: Invoke, micro: Path, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    (tmp_path / "g.yaml").write_text(GOOD)
    _one_line(*invoke("run", "--plugin", micro, *arguments), expected)


def test_a_home_in_an_override_is_read(invoke: Invoke, micro: Path, tmp_path: Path) -> None:
    """No shell replaces it behind a dotted name."""
    (tmp_path / "g.yaml").write_text(GOOD.replace("micro/vit", "{name: hf-vit, path: x}"))
    found = invoke("plan", "--grid", "g.yaml", "--plugin", micro, "suite.backbone.path=~/not here")
    _one_line(*found, "suite.backbone.path: no file or folder", "not here")


def test_an_unwritable_store(
    invoke: Invoke, micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "g.yaml"
    path.write_text(GOOD)
    monkeypatch.setenv("MERGESEC_CACHE", str(path / "below"))
    for verb in ("run", "plan", "status"):
        _one_line(*invoke(verb, "--grid", path, "--plugin", micro), "MERGESEC_CACHE: cannot write to")


def test_a_cuda_device_that_is_not_there(
    invoke: Invoke, micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "g.yaml").write_text(GOOD)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for device in ("cuda", "cuda:3"):
        found = invoke("run", "--grid", "g.yaml", "--plugin", micro, "--device", device)
        _one_line(*found, "--device: ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1\n", "--plugin: p.py has no top-level CARD"),
        ("CARD = {\n    'name': f(),\n}\n", "p.py: CARD is not a plain literal"),
        ("CARD = {\n    'name': 'p',\n}\n", "p.py:1: card.class: missing or not a string"),
        ("CARD = {\n", "p.py, line 1: not valid Python"),
    ],
)
def test_a_broken_plugin(invoke: Invoke, tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "p.py").write_text(text)
    code, err = invoke("list", "--plugin", "p.py")
    assert code == 2
    assert f"error: {expected}" in err
    assert all(line.startswith("error: ") for line in err.splitlines())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["list", "defence"], "kind: 'defence'; did you mean 'defense'?"),
        (["info", "badnet"], "name: unknown 'badnet'; did you mean 'badnets'?"),
        (["cache", "cler"], "action: 'cler'; did you mean 'clear'?"),
        (["cache", "show", "--kind", "merge"], "--kind: nothing stored of kind 'merge'"),
        (["board", "--grid", "nope"], "grid: no records of 'nope'"),
        (["plan", "--grid", "quikstart"], "did you mean 'quickstart'?"),
    ],
)
def test_other_verbs_answer_alike(invoke: Invoke, arguments: list[str], expected: str) -> None:
    _one_line(*invoke(*arguments), expected)


def test_a_task_folder_that_is_missing_names_its_neighbour(
    invoke: Invoke, micro: Path, tmp_path: Path
) -> None:
    (tmp_path / "g.yaml").write_text(GOOD.replace("micro/bars, micro/blobs", "aid, mnist"))
    (tmp_path / "data" / "aidd").mkdir(parents=True)
    without = invoke("plan", "--grid", "g.yaml", "--plugin", micro)
    _one_line(*without, "--data-root: task aid reads a local folder")
    found = invoke("plan", "--grid", "g.yaml", "--plugin", micro, "--data-root", "data")
    _one_line(*found, "--data-root: no folder 'aid' in 'data'; did you mean 'aidd'?")


def test_an_unknown_verb(invoke: Invoke) -> None:
    code, err = invoke("runn")
    assert code == 2
    assert "Traceback" not in err
    assert "run" in err


LONG = "a" * 5000


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["plan", "mini", f"x={LONG}"], "x:"),
        (["plan", f"{LONG}.yaml"], "--grid:"),
        (["plan", "mini", "--plugin", f"{LONG}.py"], "--plugin:"),
        (["plan", "mini", f"--plugin={LONG}.py"], "--plugin:"),
        (["plan", "mini", "--data-root", LONG], "--data-root:"),
        (["board", "--grid", LONG], "grid:"),
        (["board", "mini", "--results", LONG], "--results:"),
        (["status", LONG], "GRID:"),
        (["compare", LONG, LONG], "argument:"),
        (["combine", LONG, LONG, "--out", LONG], "argument:"),
        (["figures", LONG], "grid:"),
        (["site", "--results", LONG, "--out", "site"], "--results:"),
        (["merge", "ties", "--base", LONG, "--expert", f"a={LONG}", "--out", "o.safetensors"], "--base:"),
        (["scan", LONG, "--base", LONG], "argument:"),
        (["submit", "check", LONG], "FOLDER:"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_name_that_no_file_can_have(invoke: Invoke, arguments: list[str], field: str) -> None:
    code, err = invoke(*arguments)
    _one_line(code, err, field)
    assert len(err) < 1500
