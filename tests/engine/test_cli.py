"""The verbs as somebody at a terminal meets them, in this process: help, completion, which grid is meant, status."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from mergesec import __version__
from mergesec.cli import show
from mergesec.cli.app import VERBS
from mergesec.cli.main import main
from mergesec.cli.options import asked_for, run_name
from mergesec.cli.progress import Progress
from mergesec.errors import UsageError
from mergesec.execution.engines import worker
from mergesec.execution.engines.worker import Answer, Slot, Workplace
from mergesec.execution.scheduler import Reached
from mergesec.planning.plan import Step


class Ran(NamedTuple):
    code: int
    out: str
    err: str


ROOT = Path(__file__).resolve().parents[2]
Invoke = Callable[..., Ran]


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Invoke:
    """``bench`` in this process, in an empty folder, with an empty store and home."""
    monkeypatch.setenv("MERGESEC_CACHE", str(tmp_path / "store"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("MERGESEC_DATA", raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: Any) -> Ran:
        monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
        code: Any = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        return Ran(code, *capsys.readouterr())

    return run


# --------------------------------------------------------------------------- help and version


def test_the_version(invoke: Invoke) -> None:
    assert invoke("--version") == Ran(0, f"mergesec {__version__}\n", "")


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(invoke: Invoke, verb: str, flag: str) -> None:
    ran = invoke(verb, flag)
    assert ran.code == 0
    assert f"Usage: bench {verb}" in ran.out
    assert VERBS[verb].split(":")[0] in ran.out
    assert "-h" in ran.out


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_lists_every_verb(invoke: Invoke, arguments: list[str]) -> None:
    ran = invoke(*arguments)
    shown = ran.out + ran.err
    for verb in VERBS:
        assert re.search(rf"^\W*{verb}\b", shown, re.MULTILINE), verb


# --------------------------------------------------------------------------- completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_written_for_a_shell(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shell: str
) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    shown = invoke("--show-completion", shell)
    assert shown.code == 0
    assert "_BENCH_COMPLETE" in shown.out
    installed = invoke("--install-completion", shell)
    assert installed.code == 0, installed.err
    home = [p.read_text() for p in (tmp_path / "home").rglob("*") if p.is_file()]
    assert any("_BENCH_COMPLETE" in text for text in home)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("ru", "run"),
        ("--ver", "--version"),
        ("run quick", "quickstart"),
        ("run --grid quick", "quickstart"),
        ("run mygrid", "mygrid.yaml"),
        ("run sub/m", "sub/more.yaml"),
        ("run --step", "--step-timeout"),
        ("board ol", "old-run"),
        ("info badne", "badnets"),
        ("merge simple", "simple_average"),
        ("list def", "defense"),
        ("cache ver", "verify"),
        ("nothing x", ""),
    ],
)
def test_a_shell_completes_words(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, found: str
) -> None:
    for name in ("mygrid.yaml", "sub/more.yaml", "results/records/old-run/grid.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.setenv("_BENCH_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"bench {words}")
    monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
    ran = invoke()
    assert ran.code == 0
    assert ran.out.split() == found.split()


# --------------------------------------------------------------------------- which grid


def test_the_grid_is_a_word_or_an_option() -> None:
    wanted = ("mini", ("seeds=[0]", "~recipe.epochs"))
    assert asked_for(["mini", *wanted[1]], None) == wanted
    assert asked_for(wanted[1], "mini") == wanted
    assert asked_for([*wanted[1], "mini"], "mini") == wanted


@pytest.mark.parametrize(
    ("words", "option", "said"),
    [
        (["a"], "b", "--grid: 'b', but GRID is 'a'; give one of them"),
        (["a", "b"], None, "GRID: one at a time, got 'a' and 'b'"),
        (["seeds=[1]"], None, "GRID: is needed: a YAML file or a name; bench list grid shows"),
        (None, None, "GRID: is needed"),
    ],
)
def test_one_grid_and_no_doubt(words: list[str] | None, option: str | None, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        asked_for(words, option)
    assert said in str(caught.value)


@pytest.mark.parametrize("verb", ["run", "plan", "status", "board", "figures"])
def test_every_verb_of_a_grid_asks_for_one(invoke: Invoke, verb: str) -> None:
    assert invoke(verb).err.startswith("error: GRID: is needed")
    assert (
        invoke(verb, "one", "--grid", "two").err
        == "error: --grid: 'two', but GRID is 'one'; give one of them\n"
    )


def test_a_file_with_an_equals_sign_is_a_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b.yaml").write_text("")
    assert asked_for(["a=b.yaml"], None) == ("a=b.yaml", ())


@pytest.mark.parametrize(
    ("text", "name"),
    [("name: called # so\n", "called"), ("suite: {name: x}\n", "g"), ('name: "quoted"\n', "quoted")],
)
def test_the_name_that_a_file_s_records_have(tmp_path: Path, text: str, name: str) -> None:
    path = tmp_path / "g.yaml"
    path.write_text(text)
    assert run_name(str(path)) == name
    assert run_name("mini") == "mini"


# --------------------------------------------------------------------------- a run with a failure

ROGUE = """
from mergesec.contracts import Merged, MergeMethod; import os

CARD = {"name": "raises", "class": "Raises", "kind": "merging", "version": "1", "title": "r", "summary": "r"}


class Raises(MergeMethod):
    def merge(self, base, experts, ctx):
        if "ENOUGH" not in os.environ: raise ValueError("I [/refuse] " + str(len(experts)))
        return Merged(dict(experts[0].weights))
"""
GRID = """\
name: tiny
suite: {name: micro, backbone: micro/vit, tasks: [micro/bars, micro/blobs]}
axes: {merging: [simple_average, raises]}
threats: [clean]
recipe: {epochs: 1, max_train: 64}
"""


class Here:
    """Runs steps in this process."""

    def __init__(self, slots: list[Slot], place: Workplace, timeout: float | None) -> None:
        self.slots = slots
        worker._POST = worker.Post(slots[0], place, 2)

    def submit(self, slot: int, step: Step, kinds: Mapping[str, str]) -> Future[Answer]:
        future: Future[Answer] = Future()
        with tempfile.TemporaryFile() as printed:
            future.set_result(worker._work(step, dict(kinds), printed.fileno()))
        return future

    def note(self, slot: int) -> str:
        return ""

    def close(self, now: bool = False) -> None:
        return None


@pytest.fixture
def ran(invoke: Invoke, tmp_path: Path, micro: Path, monkeypatch: pytest.MonkeyPatch) -> Ran:
    """A run of two merges, of which one fails."""
    monkeypatch.setattr("mergesec.execution.engines.engine.LocalExecutor", Here)
    monkeypatch.setattr(worker, "_BENCH", None)
    monkeypatch.setattr(worker, "_POST", None)
    for name in ("set_num_threads", "use_deterministic_algorithms"):
        monkeypatch.setattr(torch, name, lambda *a, **k: None)
    (tmp_path / "rogue.py").write_text(ROGUE)
    (tmp_path / "g.yaml").write_text(GRID)
    return invoke("run", "g.yaml", *_world(micro), "--device", "cpu", "--jobs", "1")


def _world(micro: Path) -> list[str]:
    return ["--plugin", str(micro), "--plugin", "rogue.py"]


REASON = "ValueError: I [/refuse] 2 (rogue.py:9)"


def test_status_by_file_and_by_name_tells_why(ran: Ran, invoke: Invoke, micro: Path, tmp_path: Path) -> None:
    assert ran.code == 1, ran.err
    assert f"failed (1 cell): needs merge raises, which failed: {REASON}" in ran.err
    assert "bench status tiny --why" in ran.err
    plain = invoke("status", "g.yaml", *_world(micro))
    assert plain.out.startswith("cells: 1 of 2 computed; steps still to run: 2\n")
    assert "1 step failed; --why shows why in full" in plain.out
    by_name = invoke("status", "--grid", "tiny")
    assert by_name.out.startswith("cells: 1 of 2 done in results")
    cell = next(p.stem for p in (tmp_path / "results/records/tiny").glob("clean-raises-*.json"))
    for found in (plain, by_name):
        assert found.code == 0
        assert REASON in found.out
        assert "Traceback" not in found.out
    for arguments in (["g.yaml", *_world(micro)], ["tiny"]):
        why = invoke("status", *arguments, "--why")
        assert why.code == 0, why.err
        told = why.out.partition("failed: merge raises; waiting for it: 1 cell\n")[2]
        assert told.startswith(f"  {cell}\nTraceback (most recent call last):\n")
        assert (
            '  File "rogue.py", line 9, in merge\n    if "ENOUGH" not in os.environ: raise ValueError('
            in told
        )
        assert 'File "mergesec/execution/steps.py"' in told
        assert str(tmp_path) not in told
        assert sys.prefix not in told
    record = json.loads((tmp_path / f"results/records/tiny/{cell}.json").read_text())
    assert record["reason"] == f"needs merge raises, which failed: {REASON}"


def test_a_failure_goes_when_the_step_succeeds_or_the_store_is_cleared(
    ran: Ran, invoke: Invoke, micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "store" / "failures"
    assert len(list(folder.glob("*.json"))) == 1
    monkeypatch.setenv("ENOUGH", "memory")  # what failed for want of it goes well now
    monkeypatch.setattr(worker, "_BENCH", None)
    again = invoke("run", "g.yaml", *_world(micro), "--device", "cpu", "--jobs", "1")
    assert again.code == 0, again.err
    assert not list(folder.glob("*.json"))
    assert "no failure is kept" in invoke("status", "g.yaml", *_world(micro), "--why").out
    (folder / "k.json").write_text(
        '{"key": "k", "kind": "merge", "label": "merge x", "reason": "r", "trace": ""}'
    )
    invoke("cache", "clear", "--kind", "evaluate")
    assert (folder / "k.json").exists()
    invoke("cache", "clear", "--kind", "merge")
    assert not (folder / "k.json").exists()


def test_boards_by_file_and_status_of_nothing(ran: Ran, invoke: Invoke) -> None:
    assert invoke("board", "g.yaml").out == invoke("board", "--grid", "tiny").out != ""
    wrong = invoke("status", "tinny")
    assert wrong == Ran(
        2, "", "error: GRID: no preset 'tinny', and no run of that name in results; did you mean 'tiny'?\n"
    )
    for more in (["seeds=[1]"], ["--plugin", "rogue.py"], ["--data-root", "."]):
        wrong = invoke("status", "tiny", *more)
        assert wrong.code == 2
        assert "known from its records alone" in wrong.err


# --------------------------------------------------------------------------- checking a plugin

MISTAKES = """
CARDS = [
    {"name": "a", "class": "A", "kind": "merging", "version": "1", "title": "r", "sumary": "r"},
    {
        "name": "b", "class": "B", "kind": "merging", "version": "1", "title": "r", "summary": "r",
        "parameters": {
            "x": {"type": "float", "default": 2.0},
            "y": {"type": "floot", "default": 2.0},
        },
    },
]
"""


def test_all_mistakes_of_a_file_s_cards_are_told_with_their_lines(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(MISTAKES)
    checked = invoke("plugin", "check", "bad.py")
    assert (checked.code, checked.out) == (2, "")
    assert [line.split(": ", 3)[1:3] for line in checked.err.splitlines()] == [
        ["bad.py:3", "card.sumary"],
        ["bad.py:3", "card.summary"],
        ["bad.py:8", "card.parameters.y.type"],
    ]
    assert all(line.startswith("error: ") for line in checked.err.splitlines())


FAULTY = """
from mergesec.contracts import Merged, MergeMethod

CARDS = [
    {"name": "leaves", "class": "Leaves", "kind": "merging", "version": "1", "title": "r", "summary": "r"},
    {"name": "absent", "class": "Absent", "kind": "merging", "version": "1", "title": "r", "summary": "r"},
    {"name": "draws", "class": "Draws", "kind": "merging", "version": "1", "title": "r", "summary": "r",
     "seeded": True},
]


class Leaves(MergeMethod):
    def merge(self, base, experts, ctx):
        return self.deeper(base)

    def deeper(self, base):
        raise SystemExit(3)


class Draws(MergeMethod):
    def merge(self, base, experts, ctx):
        return Merged(dict(base))
"""


def test_failing_checks_say_where_to_look(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FAULTY)
    checked = invoke("plugin", "check", "mine.py")
    assert checked.code == 1
    failed = [line for line in checked.out.splitlines() if " FAIL " in line]
    assert len(failed) == 3
    assert failed[0].endswith("SystemExit: 3 (mine.py:17)")
    assert failed[1].endswith("has no class Absent derived from MergeMethod (mine.py:1)")
    assert failed[2].endswith("but another seed changes nothing (mine.py:20)")
    assert "Traceback" not in checked.out
    why = invoke("plugin", "check", "mine.py", "--why").out
    assert 'File "mine.py", line 14, in merge' in why


LOCAL = """
import torch
from pathlib import Path
from mergesec.conformance.micro import Bars
from mergesec.contracts import Split

CARD = {"name": "mine/rows", "class": "Rows", "kind": "task", "version": "1", "title": "r", "summary": "r",
        "modality": "image", "classes": 4, "local": True}


class Rows(Bars):
    def load(self, ctx):
        assert (Path(ctx.folder) / "rows").read_text() == "here"
        return super().load(ctx)
"""


def test_a_task_of_a_local_folder_is_checked_on_it(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "local.py").write_text(LOCAL)
    (tmp_path / "data" / "mine" / "rows").mkdir(parents=True)
    (tmp_path / "data" / "mine" / "rows" / "rows").write_text("here")
    without = invoke("plugin", "check", "local.py")
    assert "give --data-root DIR with DIR/mine/rows/ in it" in without.out
    (tmp_path / "empty").mkdir()
    assert (
        "--data-root has no mine/rows/ in it"
        in invoke("plugin", "check", "local.py", "--data-root", "empty").out
    )
    for arguments, folder in ((["--data-root", "data"], ""), ([], "data")):
        monkeypatch.setenv("MERGESEC_DATA", folder)
        checked = invoke("plugin", "check", "local.py", *arguments)
        assert "splits are there, sized and labelled as the card says" in checked.out
        assert "skip" not in checked.out
    assert "no folder 'absent'" in invoke("plugin", "check", "local.py", "--data-root", "absent").err


# --------------------------------------------------------------------------- on a terminal


def test_brackets_are_shown_as_they_are_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    show.table("", ["why"], [["ValueError: [/refuse] [red]x"]])
    progress = Progress()
    progress.start(1, 0, Reached(0, 1, None))
    progress.running(["merge x [/epoch] [bold]"])
    step = Step("k", "merge", (), (), '{"task": "[/t]"}')
    progress.finished(step, Answer("error", "no [/such] [i]thing"), Reached(0, 1, None))
    progress.stop()
    shown = capsys.readouterr()
    assert "ValueError: [/refuse] [red]x" in shown.out
    assert "failed merge [/t]: no [/such] [i]thing" in shown.err


def test_escape_codes_of_others_do_not_reach_the_terminal(invoke: Invoke, tmp_path: Path) -> None:
    shipped = ROOT / "results" / "records" / "mini-ownership"
    source = next(p for p in sorted(shipped.glob("*-*.json")))
    home = tmp_path / "records" / "mini-ownership"
    home.mkdir(parents=True)
    (home / "grid.json").write_text(json.dumps({"cells": [source.stem]}))
    hostile = {**json.loads(source.read_text()), "attack": "\x1b[2J\x1b[31mgone"}
    (home / source.name).write_text(json.dumps(hostile))
    ran = invoke("board", "mini-ownership", "--results", str(tmp_path))
    assert ran.code == 2
    assert "\x1b" not in ran.err and "\ufffd[2J" in ran.err


def test_a_file_that_is_not_utf8_is_no_traceback(invoke: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "g.yaml"
    path.write_bytes(b"name: caf\xe9\n")
    for verb in ("board", "status", "plan", "run"):
        ran = invoke(verb, str(path), *(["--results", str(tmp_path)] if verb != "plan" else []))
        assert ran.code == 2, verb
        assert ran.err.startswith("error: "), verb


# --------------------------------------------------------------------------- what a terminal can show


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252:strict"])
@pytest.mark.parametrize(
    "arguments", [["info", "params"], ["list"], ["list", "grid"], ["run", "-h"], ["info", "né"]]
)
def test_a_terminal_that_knows_fewer_letters_is_no_error(
    tmp_path: Path, encoding: str, arguments: list[str]
) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "MERGESEC_CACHE": str(tmp_path)}
    program = [sys.executable, "-c", "from mergesec.cli.main import main; main()", *arguments]
    ran = subprocess.run(program, env=environment, capture_output=True, check=False, timeout=120)
    assert ran.returncode == (2 if "né" in arguments else 0), ran.stderr
    assert b"Traceback" not in ran.stderr
    assert ran.stdout or ran.stderr.startswith(b"error: name: unknown")
