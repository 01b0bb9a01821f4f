"""Devices: which GPUs there are by CUDA's own rules, what ``--device`` may name, how a death is told."""

from __future__ import annotations

import json
import stat
from collections import Counter
from pathlib import Path

import pytest

from mergesec.api.grids import _reporter
from mergesec.errors import UsageError
from mergesec.execution import session as sessions
from mergesec.execution.engines.engine import Assignment
from mergesec.execution.engines.local import LocalExecutor, make_slots, parse_visible, visible_gpus
from mergesec.execution.engines.worker import Slot, Workplace, ending
from mergesec.execution.scheduler import Outcome
from mergesec.execution.session import open_session
from mergesec.execution.store import CorruptArtifact, Store

UUIDS = ["GPU-0a0a-11", "GPU-0b0b-22", "GPU-0b0c-33", "MIG-aaaa", "MIG-bbbb"]
PRESENT = ["0", "1", "2", *UUIDS]


@pytest.mark.parametrize(
    ("listed", "shown"),
    [
        ("", []),
        (" ", []),
        ("-1", []),
        ("none", []),
        ("NoDevFiles", []),
        ("0", ["0"]),
        ("0, 1", ["0", "1"]),
        (" 2 ,0", ["2", "0"]),
        ("1,-1,0", ["1"]),
        ("1,,0", ["1"]),
        ("0,7,1", ["0"]),
        ("7", []),
        ("01", ["1"]),
        ("+1", ["1"]),
        ("1gpu2,2ampere", ["1", "2"]),
        ("0,1,0", []),
        ("0,-1,0", ["0"]),
        ("0,GPU-0a0a-11", ["0"]),
        ("GPU-0a0a-11", ["GPU-0a0a-11"]),
        ("GPU-0a, GPU-0b0c", ["GPU-0a", "GPU-0b0c"]),
        ("GPU-0a,GPU-0b,GPU-0b0c", ["GPU-0a"]),  # the second could be either of two
        ("GPU-0a,1", ["GPU-0a"]),
        ("GPU-9", []),
        ("GPU-", []),
        ("GPU-0a,GPU-0a", []),
        ("MIG-bbbb,MIG-aaaa", ["MIG-bbbb", "MIG-aaaa"]),
        ("MIG-bbbb,GPU-0a", ["MIG-bbbb"]),
    ],
)
def test_what_is_visible_follows_cudas_rules(listed: str, shown: list[str]) -> None:
    assert parse_visible(listed, PRESENT) == shown


@pytest.mark.parametrize(
    "listed", ["", "-1", "0,1", " 1, 0", "1,-1", "0,0", "3x,4", "GPU-a,GPU-b", "GPU-a,0", "MIG-a,MIG-a"]
)
def test_torch_reads_the_same(listed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.cuda import _parse_visible_devices

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert parse_visible(listed, None) == list(map(str, _parse_visible_devices()))


SMI = """#!/bin/sh
echo "GPU 0: NVIDIA A100 (UUID: GPU-0a0a-11)"
echo "  MIG 1g.5gb     Device  0: (UUID: MIG-aaaa)"
echo "GPU 1: NVIDIA A100 (UUID: GPU-0b0b-22)"
exit {code}
"""


def _driver(folder: Path, monkeypatch: pytest.MonkeyPatch, code: int = 0) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text(SMI.replace("{code}", str(code)))
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.fixture(autouse=True)
def _no_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_without_a_list_all_are_visible_and_with_one_those_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _driver(tmp_path, monkeypatch)
    assert visible_gpus() == ["0", "1"]
    for listed, shown in (("1, 0", ["1", "0"]), ("1,2,0", ["1"]), ("MIG-aaaa", ["MIG-aaaa"]), ("-1", [])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
        assert visible_gpus() == shown


def test_where_the_driver_cannot_tell_a_list_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _driver(tmp_path, monkeypatch, code=9)
    assert visible_gpus() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, 6")
    assert visible_gpus() == ["5", "6"]


def test_devices_are_named_with_or_without_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0, 1,3")
    wanted = [Slot("cuda", "0"), Slot("cuda", "3")]
    for device in ("cuda:0,3", "cuda:0, 3", " cuda: 0 ,3 ", "cuda:0,3,"):
        assert make_slots(device, None) == wanted
    assert make_slots("auto", 2) == [Slot("cuda", g) for g in "001133"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a")
    assert make_slots("cuda:GPU-a", None) == [Slot("cuda", "GPU-a")]


@pytest.mark.parametrize(
    ("listed", "device", "said"),
    [
        ("0,1", "cuda:2", "no GPU 2; found 0, 1"),
        ("0,1", "cuda:0,0", "GPU 0 is named twice; --per-gpu"),
        ("0,1", "cuda:-1", "no GPU -1; found 0, 1"),
        ("0,1", "cuda:0,,1", "no GPU ''"),
        ("-1", "cuda", "but with CUDA_VISIBLE_DEVICES='-1' no GPU is visible; try --device cpu"),
        ("-1", "cuda:0", "no GPU 0; found none (with CUDA_VISIBLE_DEVICES='-1' no GPU is visible)"),
    ],
)
def test_a_device_that_is_not_there(
    listed: str, device: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    with pytest.raises(UsageError) as caught:
        make_slots(device, None)
    assert said in str(caught.value)


def test_minus_one_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert make_slots("auto", 3) == [Slot("cpu")] * 3


CRASHES = """
import ctypes
from mergesec.contracts import MergeMethod

CARD = {"name": "crashes", "class": "Crashes", "kind": "merging", "version": "1", "title": "c", "summary": "c"}


class Crashes(MergeMethod):
    def merge(self, base, experts, ctx):
        ctypes.string_at(0)
"""


@pytest.mark.slow
def test_a_worker_that_crashes_in_c_tells_where_it_was(tmp_path: Path, micro: Path) -> None:
    (tmp_path / "crashes.py").write_text(CRASHES)
    plugins = (str(micro), str(tmp_path / "crashes.py"))
    raw = {
        "name": "g", "suite": {"backbone": "micro/vit", "tasks": ["micro/bars", "micro/blobs"]},
        "axes": {"merging": ["crashes"]}, "threats": ["clean"], "recipe": {"epochs": 1, "max_train": 16},
    }  # fmt: skip
    (tmp_path / "g.yaml").write_text(json.dumps(raw))
    plan = open_session(str(tmp_path / "g.yaml"), (), plugins, store=tmp_path / "store").plan
    kinds = {key: step.kind for key, step in plan.steps.items()}
    engine = LocalExecutor([Slot("cpu")], Workplace(str(tmp_path / "store"), plugins, None, 1), None)
    try:
        for step in plan.steps.values():
            answer = engine.submit(0, step, kinds).result()
            if step.kind == "merge":
                break
            assert answer.status == "ok", answer
    finally:
        engine.close()
    assert answer.status == "died"
    assert answer.message.endswith("(exit code -11, SIGSEGV)")
    assert answer.trace.startswith("Fatal Python error: Segmentation fault")
    assert 'File "crashes.py", line 10 in merge' in answer.trace
    assert str(tmp_path) not in answer.trace


def test_a_death_by_signal_is_named() -> None:
    assert ending(0) == "exit code 0"
    assert ending(None) == "exit code None"
    assert ending(-11) == "exit code -11, SIGSEGV"
    assert ending(-9) == "exit code -9, SIGKILL; perhaps out of memory"
    assert ending(-250) == "exit code -250, a signal"


def test_what_a_round_verified_is_not_read_again_for_the_next(
    tmp_path: Path, micro: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what a round made is; a result that proves corrupt is made again."""
    raw = {
        "name": "g", "suite": {"backbone": "micro/vit", "tasks": ["micro/bars", "micro/blobs"]},
        "axes": {"merging": ["simple_average"]}, "threats": ["clean"],
    }  # fmt: skip
    (tmp_path / "g.yaml").write_text(json.dumps(raw))
    opened = open_session(str(tmp_path / "g.yaml"), (), (str(micro),), store=tmp_path / "store")
    evaluations = {key for cell in opened.plan.cells for _, key in cell.roles}
    there, read, spoilt = set(list(evaluations)[1:]), list[str](), set[str]()

    class All:
        def run(self, work: Assignment) -> Outcome:
            there.update(work.wanted)
            return Outcome(done=len(work.wanted))

        def close(self) -> None:
            return None

    def reading(store: Store, kind: str, key: str) -> None:
        read.append(key)
        if key in spoilt:
            spoilt.discard(key)
            there.discard(key)
            raise CorruptArtifact(key)

    monkeypatch.setattr(sessions, "completed", lambda store, steps, spent=False: there.__contains__)
    monkeypatch.setattr(sessions, "read_evaluation", reading)
    monkeypatch.setattr(Store, "facts", lambda self, kind, key: {})
    made = evaluations - there
    spoilt |= made
    place = Workplace(str(tmp_path / "store"), (str(micro),), None, 1)
    sessions._run(opened, All(), place, _reporter(False), None)
    assert there >= evaluations
    assert Counter(read) == Counter(evaluations) + Counter(made)  # those made are spoilt once, and read again
