"""What a terminal shows: boards that fit it, short names with a key, how far a run is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from mergesec.cli import progress as told
from mergesec.cli import show, status_verb
from mergesec.cli.progress import Progress
from mergesec.cli.run_verb import print_boards
from mergesec.errors import UsageError, nearest
from mergesec.evidence.estimates import Board
from mergesec.evidence.fitting import fitted, header_lines, short_names
from mergesec.evidence.labels import label_key, shortened
from mergesec.execution import session
from mergesec.execution.claims import Claims
from mergesec.execution.engines.worker import Answer
from mergesec.execution.scheduler import History, Reached
from mergesec.execution.store import Store
from mergesec.planning.plan import Step

ROOT = Path(__file__).resolve().parents[2]
LONG = "badmerging(batch=32, patch=6, position=centre, restarts=1, steps=300)"


def _board(rows: int = 3, **columns: Any) -> Board:
    def rate(x: float) -> dict[str, float]:
        return {"BA": x, "BA_low": x - 0.1, "BA_high": x + 0.1}

    frame = pd.DataFrame(
        [
            {"attack": LONG, "method": "ta", "defense": f"d{i}", "experts": 8, "cells_done": 1, "cells_expected": 1,
             "seeds": 5, **rate(0.5 + i / 10), "extra": "x" * 70, "tier": float(i + 1)}
            | {k: v[i] for k, v in columns.items()}
            for i in range(rows)
        ]
    )  # fmt: skip
    return Board("backdoor", "Backdoor", frame, ("BA",), "A note of several words. " * 8)


def _on_a_terminal(monkeypatch: pytest.MonkeyPatch, width: int = 80) -> None:
    """From here on: pytest puts other streams in place when a test's body begins."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)


# --------------------------------------------------------------------------- names


def test_short_names_tell_labels_apart_and_the_key_says_what_they_stand_for() -> None:
    labels = [
        "none",
        LONG,
        "ta",
        "ta(scaling=0.5)",
        "dam(a=1, masks=two)",
        "dam(a=1)",
        "ml(permute=True)",
        "ml",
    ]
    short = shortened(labels)
    assert short == {
        "none": "none", LONG: "badmerging", "ta": "ta", "ta(scaling=0.5)": "ta(0.5)", "dam(a=1, masks=two)": "dam(two)",
        "dam(a=1)": "dam", "ml(permute=True)": "ml(permute=True)", "ml": "ml",
    }  # fmt: skip
    assert f"badmerging = {LONG}" in label_key(short)
    assert all(line[-5:] != " = ta" for line in label_key(short))


def test_names_that_would_stay_long_are_numbers_and_brackets_hold_together() -> None:
    labels = [f"m(first=[1, {i}], second={'y' * 30}{i}, third={i})" for i in range(2)]
    assert list(shortened(labels).values()) == ["m(0)", "m(1)"]
    labels = [f"m(x=1, base=ties(a={'z' * 30}, b={i}))" for i in range(2)]
    assert list(shortened(labels).values()) == ["m #1", "m #2"]


# --------------------------------------------------------------------------- boards


def test_a_board_shows_what_fits_and_names_the_rest() -> None:
    board = _board()
    found = fitted(board, 80, short_names([board]))
    assert found.header == ["defense", "BA", "tier"]
    assert found.rows[0] == ["d0", "50.0 [40, 60]", "1"]
    assert not found.blocks
    assert "attack: " + LONG in found.told and "method: ta" in found.told
    assert "more columns (--columns, --wide): extra" in found.told


def test_chosen_columns_are_all_there_one_block_a_row_if_need_be() -> None:
    board = _board()
    names = short_names([board])
    found = fitted(board, 80, names, ["extra"])
    assert found.header == ["defense", "extra"] and not found.blocks
    assert fitted(board, 60, names, ["extra"]).blocks
    wide = fitted(board, 80, names, wide=True)
    assert wide.blocks and {"extra", "BA", "attack"} <= set(wide.header)
    assert LONG in wide.rows[0]


def test_no_line_of_a_shipped_board_is_wider_than_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mergesec.evidence.boards import make_boards
    from mergesec.evidence.records import read_records

    monkeypatch.setenv("TERM", "dumb")  # no bold letters
    boards = make_boards(read_records(ROOT / "results" / "records", "mini-backdoor-many"))
    for width in (40, 80, 140):
        _on_a_terminal(monkeypatch, width)
        print_boards(boards, None, wide=False)
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= width
        assert "succession" in shown and "badnets" in shown


def test_notes_wrap_between_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _on_a_terminal(monkeypatch)
    show.prose("word " * 60)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 3 and all(len(line) <= 80 and set(line.split()) == {"word"} for line in lines)


def test_an_unknown_column_is_named_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="--columns: no board has 'extr'; did you mean 'extra'"):
        print_boards([_board()], "BA,extr", wide=False)
    print_boards([_board()], " BA , extra", wide=False)
    assert "xxx" in capsys.readouterr().out


def test_a_row_says_why_its_cells_are_missing() -> None:
    board = _board(cells_done=[1, 0, 1], reason=[float("nan"), "1 failed: ValueError: no", float("nan")])
    found = fitted(board, 80, short_names([board]))
    assert [t for t in found.told if t.startswith("incomplete")] == [
        f"incomplete: {LONG} + d1 + ta, 0 of 1 cells done: 1 failed: ValueError: no"
    ]
    assert "reason" not in found.header


def test_headers_part_where_their_words_meet() -> None:
    assert header_lines("succession_clean_merge", 11) == ["succession_", "clean_merge"]
    assert header_lines("to_base/all", 20) == ["to_base/all"]


def test_all_merge_methods_fit_into_an_error() -> None:
    names = [f"m{i:02}" for i in range(60)] + ["ties"]
    assert nearest("???", names).endswith("m59, ties")
    assert nearest("???", [f"m{i:04}" for i in range(2000)]).endswith("and 1900 more")


# --------------------------------------------------------------------------- progress


def _step(kind: str = "merge", backbone: str = "") -> Step:
    return Step("k", kind, (), (), '{"task": "t"}')


def test_a_bar_tells_steps_cells_and_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _on_a_terminal(monkeypatch)
    monkeypatch.setattr(told, "time", SimpleNamespace(monotonic=lambda: 100.0))
    progress = Progress()
    progress.start(4, 2, Reached(1, 3, None))
    assert progress._told() == "0/4 steps, 1/3 cells, 0.0s"
    progress.finished(_step(), Answer("ok", seconds=9.0), Reached(2, 3, 90.2))
    progress.running(["merge a [bold]", "merge b"])
    assert progress._told() == "1/4 steps, 2/3 cells, 0.0s, about 1m30s left"
    progress.stop()
    assert "merge a [bold] | merge b" in capsys.readouterr().err


def test_no_estimate_before_there_is_history(tmp_path: Path) -> None:
    history = History(tmp_path)
    training, merging = _step("expert"), _step("merge")
    assert history.left([(training, 10), (merging, 10)]) is None
    history.add(merging, Answer("ok", seconds=2.0))
    assert history.left([(training, 10), (merging, 10)]) is None  # trainings are most of it, and unknown
    history.add(training, Answer("ok", seconds=30.0))
    assert history.left([(training, 10), (merging, 10)]) == pytest.approx(320)
    assert history.left([(training, 10)], pace=1.5) == pytest.approx(450)
    assert history.left([]) == 0


def test_status_tells_what_runs_how_fast_and_how_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [
        session.Pace([("expert a", 200.0), ("merge b", 1.0)], 12, 90.0),
        session.Pace([("expert a", 3.0)], 0, None),
        session.Pace([], 0, 90.0),
    ]
    monkeypatch.setattr(session, "pace_of", lambda *_: found.pop(0))
    opened: Any = None
    for _ in range(3):
        status_verb._pace(opened, {})
    assert capsys.readouterr().out.splitlines() == [
        "running: 2 steps at once; 12 steps in the last 10 minutes; about 1m30s left",
        "  expert a, for 3m20s",
        "  merge b, for 1.0s",
        "running: 1 step at once; 0 steps in the last 10 minutes; too little is measured to say how long",
        "  expert a, for 3.0s",
        "no run is at it now; about 1m30s left, one step at a time",
    ]


def test_steps_of_other_runs_and_recent_ones_are_known_from_the_store_alone(tmp_path: Path) -> None:
    mine, other = Claims(tmp_path), Claims(tmp_path)
    running, killed = "a" * 40, "b" * 40
    assert other.take(running)
    lease = (tmp_path / "claims" / f"{running}.lease").read_text()
    (tmp_path / "claims" / f"{killed}.lease").write_text(json.dumps({**json.loads(lease), "born": "before"}))
    found = mine.elsewhere()
    assert list(found) == [running] and found[running] < 60
    assert not other.elsewhere()
    other.release_all()
    assert not mine.elsewhere()
    store = Store(tmp_path)
    for kind in ("merge", "data"):
        (tmp_path / "artifacts" / kind).mkdir(parents=True)
        (tmp_path / "artifacts" / kind / "k.json").touch()
    os.utime(tmp_path / "artifacts" / "data" / "k.json", (1.0, 1.0))
    assert store.made_since([("merge", "k"), ("data", "k"), ("merge", "absent")], 600) == 1


@pytest.mark.skipif(shutil.which("script") is None, reason="util-linux's script makes the terminal")
def test_a_real_terminal_of_80_columns(tmp_path: Path) -> None:
    shutil.copytree(
        ROOT / "results" / "records" / "mini-backdoor-many", tmp_path / "records" / "mini-backdoor-many"
    )
    bench = f"{sys.executable} -c 'from mergesec.cli.main import main; main()'"
    words = f"stty cols 80; {bench} board mini-backdoor-many --results {tmp_path}"
    told = {k: v for k, v in os.environ.items() if k != "COLUMNS"} | {"TERM": "dumb", "SHELL": "/bin/sh"}
    ran = subprocess.run(
        ["script", "-q", "-e", "-c", words, "/dev/null"], env=told, capture_output=True, check=False, timeout=100,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout
    lines = ran.stdout.decode().replace("\r", "").splitlines()
    table = [line for line in lines if not line.startswith(str(tmp_path))]
    assert max(map(len, table)) <= 80
    assert any(line.split()[:3] == ["attack", "method", "experts"] for line in lines)
