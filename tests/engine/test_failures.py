"""Why a step failed: one line, the whole traceback without places of a machine, kept until the step succeeds."""

from __future__ import annotations

import ast
import json
import pickle
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from mergesec.execution.engines import worker
from mergesec.execution.engines.worker import Answer, Slot, Workplace
from mergesec.execution.failures import Failure, Failures, explain, portable, shown_file
from mergesec.execution.scheduler import History, Reached, Scheduler
from mergesec.execution.store import Store
from mergesec.planning.plan import Step


class Silent(Exception):
    """Its text cannot be made."""

    def __str__(self) -> str:
        raise SystemExit("no words")


class Slippery(str):
    """A text that no other process can read back."""

    def __reduce__(self) -> Any:
        raise RuntimeError("stays here")


class Worded(Exception):
    def __str__(self) -> str:
        return Slippery("worded")


def _raised(act: Callable[[], Any]) -> BaseException:
    with pytest.raises(BaseException) as caught:
        act()
    return caught.value


def _raise(error: BaseException) -> None:
    raise error


def _chain() -> None:
    try:
        _raise(KeyError("deep"))
    except KeyError as error:
        raise ValueError("I refuse\nfor two reasons") from error


def test_a_reason_is_one_line_and_the_trace_holds_every_frame_and_cause() -> None:
    reason, trace = explain(_raised(_chain))
    line = _chain.__code__.co_firstlineno + 4
    assert reason == f"ValueError: I refuse for two reasons (test_failures.py:{line})"
    for said in ("KeyError: 'deep'", "direct cause of", "in _raise", "in _chain", "for two reasons"):
        assert said in trace


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Silent(), "Silent: <exception str() failed>"),
        (Worded(), "Worded: worded"),
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt: "),
        (ValueError("\udc80 \x1b[31m\r\n\x00"), r"ValueError: \udc80 \x1b[31m \x00"),
        (ExceptionGroup("both", [ValueError("one"), Silent()]), "ExceptionGroup: both"),
    ],
)
def test_whatever_is_raised_is_told_so_that_any_process_and_file_takes_it(
    error: BaseException, said: str
) -> None:
    reason, trace = explain(_raised(lambda: _raise(error)))
    assert reason.startswith(said)
    assert type(error).__name__ in trace
    assert pickle.loads(pickle.dumps((reason, trace))) == (reason, trace)
    assert (reason + trace).encode().decode() == reason + trace


def test_no_place_of_this_machine_is_told(tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text("import torch\ndef ask(x):\n    torch.nn.Linear(2, 2)(x)\n")
    space: dict[str, Any] = {}
    exec(compile(plugin.read_text(), str(plugin), "exec"), space)
    reason, trace = explain(_raised(lambda: space["ask"](torch.zeros(1, 3))))
    assert 'File "mine.py", line 3, in ask' in trace
    assert 'File "torch/nn/modules/' in trace
    assert str(tmp_path) not in trace + reason
    assert sys.prefix not in trace + reason
    broken = _raised(lambda: ast.parse("def", filename=str(plugin)))
    assert str(tmp_path) not in explain(broken)[1]


def test_files_are_named_as_modules_are_found() -> None:
    assert shown_file(torch.nn.Linear.forward.__code__.co_filename) == "torch/nn/modules/linear.py"
    assert shown_file(worker.__file__) == "mergesec/execution/engines/worker.py"
    assert shown_file("<string>") == "<string>"
    assert shown_file("/nowhere/else/a.py") == "a.py"
    assert portable(f"no {Path.home()}/data and {Path.cwd()}/x\t/") == "no ~/data and x\t/"


# --------------------------------------------------------------------------- in a worker


def _step(key: str, *needs: str) -> Step:
    return Step(key, "merge", (), tuple((need, need) for need in needs), json.dumps({"task": key}))


def test_a_worker_answers_in_words_whatever_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    post = worker.Post(Slot("cpu"), Workplace(str(tmp_path), (), None, 1), 2)
    monkeypatch.setattr(worker, "_POST", post)
    monkeypatch.setattr(worker, "_BENCH", None)
    monkeypatch.setattr("mergesec.execution.perform.run", lambda *_: _raise(Silent()))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *a, **k: None)
    with tempfile.TemporaryFile() as printed:
        answer = worker._work(_step("a"), {}, printed.fileno())
    assert answer.status == "error"
    assert answer.message.startswith("Silent: <exception str() failed> (test_failures.py:")
    assert "in _raise" in answer.trace


# --------------------------------------------------------------------------- kept


@dataclass
class _Scripted:
    """An executor that answers as it is told."""

    answers: dict[str, Answer]
    slots: list[Any] = field(default_factory=lambda: [None])

    def submit(self, slot: int, step: Step, kinds: Mapping[str, str]) -> Future[Answer]:
        future: Future[Answer] = Future()
        future.set_result(self.answers[step.key])
        return future

    def note(self, slot: int) -> str:
        return ""

    def close(self, now: bool = False) -> None:
        return None


class _Quiet:
    def start(self, total: int, cached: int, reached: Reached) -> None:
        return None

    def running(self, labels: Any) -> None:
        list(labels)

    def finished(self, step: Step, answer: Answer, reached: Reached) -> None:
        return None


def _run(root: Path, answers: dict[str, Answer]) -> Any:
    steps = {s.key: s for s in (_step("a"), _step("b", "a"), _step("c"))}
    scheduler = Scheduler(steps, Store(root), _Scripted(answers), History(root), _Quiet())
    return scheduler.run(steps, 0)


def test_a_failure_is_kept_until_the_step_succeeds(tmp_path: Path) -> None:
    good, kept = Answer("ok"), Failures(tmp_path)
    outcome = _run(tmp_path, {"a": Answer("error", "E: no (x.py:1)", "Traceback ..."), "c": good})
    assert [f.key for f in kept] == ["a"]
    failure = Failure("a", "merge", "merge a", "E: no (x.py:1)", "Traceback ...")
    assert kept.read("a") == failure
    assert outcome.failed == {"a": failure.reason}
    assert outcome.blocked == {"b": failure.blocks}
    _run(tmp_path, {"a": Answer("died", "WorkerDied: (exit code 1)"), "c": good})
    assert kept.read("a") == Failure("a", "merge", "merge a", "WorkerDied: (exit code 1)")
    _run(tmp_path, {"a": good, "b": good, "c": good})
    assert not list(kept)


def test_an_unreadable_failure_is_none(tmp_path: Path) -> None:
    kept = Failures(tmp_path)
    for kind in ("merge", "repair"):
        kept.note(Failure(kind, kind, kind, "r"))
    (tmp_path / "failures" / "torn.json").write_text('{"key": "to')
    (tmp_path / "failures" / "other.json").write_text('{"key": 1}')
    assert [f.key for f in kept] == ["merge", "repair"]
    kept.clear("merge")
    assert [f.key for f in kept] == ["repair"]
    kept.clear()
    assert not list(kept)
