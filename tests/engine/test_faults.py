"""Deaths, hangs, corruption, full disks, rogue plugins: failure stays local and nothing is lost."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

DEADLINE = 120.0
"""Seconds to wait for something that takes a few."""


def _wait(ready: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not ready():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def _wait_for_artifacts(process: subprocess.Popen[str], store: Path, count: int) -> None:
    folder = store / "artifacts"
    _wait(lambda: process.poll() is not None or sum(1 for _ in folder.glob("*/*.json")) >= count)


def _end(process: subprocess.Popen[str]) -> None:
    """Reap, and wait until its workers are gone too."""
    process.communicate()

    def gone() -> bool:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        return False

    _wait(gone)


def _start(bench: Any, grid: Path, *more: str) -> subprocess.Popen[str]:
    arguments = bench.arguments(grid, "--jobs", "1", *more)
    process: subprocess.Popen[str] = bench.start("run", *arguments, "--results", str(bench.results))
    return process


def test_kill_9_of_the_run_at_random_moments(bench: Any, finished: Any, whole: Any, commits: Any) -> None:
    rng = random.Random(11)
    grid = bench.grid("whole", **whole)
    committed: dict[str, int] = {}
    for count in sorted(rng.sample(range(1, 50), 3)):
        process = _start(bench, grid)
        _wait_for_artifacts(process, bench.store, count)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        _end(process)
        now = commits(bench.store)
        assert committed.items() <= now.items()  # nothing lost, nothing committed run again
        committed = now
    ran = bench.run(grid)
    assert ran.code == 0, ran.err
    assert committed.items() <= commits(bench.store).items()
    assert len(commits(bench.store)) == 61
    assert bench.boards("whole") == finished.boards("whole")


def _workers(parent: int) -> list[int]:
    """Process ids of the spawned workers of a run (not of multiprocessing's resource tracker)."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            pid = int(entry.name)
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            if int(fields[1]) == parent and b"spawn_main" in (entry / "cmdline").read_bytes():
                found.append(pid)
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the worker through /proc")
def test_kill_9_of_a_worker_costs_only_the_step_it_was_at(
    bench: Any, finished: Any, whole: Any, commits: Any
) -> None:
    process = _start(bench, bench.grid("whole", **whole))
    committed: dict[str, int] = {}
    for count in (0, 8):
        _wait_for_artifacts(process, bench.store, count)
        _wait(lambda: bool(_workers(process.pid)))
        (worker,) = _workers(process.pid)
        os.kill(worker, signal.SIGKILL)
        committed |= commits(bench.store)  # before another worker is there
        _wait(lambda worker=worker: worker not in _workers(process.pid))  # type: ignore[misc]
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, err
    assert committed.items() <= commits(bench.store).items()  # nothing lost, nothing committed run again
    assert len(commits(bench.store)) == 61
    done = re.search(r"18 of 18 cells done, (\d+) steps run", out)
    # a worker that dies between its commit and its report leaves a step to be found, not run
    assert done and 61 - 2 <= int(done[1]) <= 61, out
    assert bench.boards("whole") == finished.boards("whole")


def test_ctrl_c_drains_and_the_same_command_goes_on(
    bench: Any, finished: Any, whole: Any, commits: Any
) -> None:
    grid = bench.grid("whole", **whole)
    process = _start(bench, grid)
    _wait_for_artifacts(process, bench.store, 6)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130, err
    assert re.search(r"stopping: \d+ steps done and kept, (waiting for \w+|nothing is running)", err)
    assert err.endswith("interrupted; the same command goes on from here\n")
    assert "Traceback" not in err
    assert "incomplete" not in out  # no boards of what is not there
    committed = commits(bench.store)
    assert 6 <= len(committed) < 61
    ran = bench.run(grid)
    assert ran.code == 0, ran.err
    assert committed.items() <= commits(bench.store).items()
    assert bench.boards("whole") == finished.boards("whole")


def test_flipped_bytes_are_found_and_computed_again(
    copied: Any, finished: Any, whole: Any, commits: Any
) -> None:
    before = commits(copied.store)
    for kind, end in (("evaluate", "safetensors"), ("compare", "json"), ("expert", "safetensors")):
        for path in (copied.store / "artifacts" / kind).glob(f"*.{end}"):
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(bytes(data))
    record = next((copied.results / "records" / "whole").glob("clean-*.json"))
    record.write_bytes(b"\xff\x00" * 500)
    ran = copied.run(copied.grid("whole", **whole))
    assert ran.code == 0, ran.err
    assert copied.boards("whole") == finished.boards("whole")
    after = commits(copied.store)
    again = {name.split("/")[0] for name in before if after[name] != before[name]}
    assert again == {"evaluate", "compare", "expert"}
    assert copied("cache", "verify").code == 0
    assert record.read_bytes().startswith(b'{"adversaries"')


FULL = """
import errno, os
_replace, _left = os.replace, [12]
def replace(before, after):
    _left[0] -= 1
    if _left[0] < 0:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    _replace(before, after)
os.replace = replace
"""


def test_a_full_disk_is_one_message_and_nothing_is_lost(
    bench: Any, finished: Any, whole: Any, commits: Any
) -> None:
    grid = bench.grid("whole", **whole)
    (bench.home / "sitecustomize.py").write_text(FULL)
    bench.environment["PYTHONPATH"] = str(bench.home)
    ran = bench.run(grid)
    assert ran.code == 2
    assert "No space left on device" in ran.err.splitlines()[-1]
    assert ran.err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in ran.err
    assert not list(bench.store.glob("artifacts/*/.tmp-*"))
    committed = commits(bench.store)
    assert len(committed) >= 5
    bench.environment.clear()
    again = bench.run(grid)
    assert again.code == 0, again.err
    assert committed.items() <= commits(bench.store).items()
    assert bench.boards("whole") == finished.boards("whole")


# --------------------------------------------------------------------------- rogue plugins

ROGUES = '''
import os
import time
import torch
from mergesec.contracts import Attack, Merged, MergeMethod

_SHARED = {"kind": "merging", "version": "1", "title": "rogue", "summary": "rogue"}
CARDS = [
    %s
]


def _average(base, experts):
    return {
        k: torch.stack([e.weights[k] for e in experts]).mean(0) if v.is_floating_point() else v
        for k, v in base.items()
    }


class Raises(MergeMethod):
    def merge(self, base, experts, ctx):
        raise ValueError("I refuse")


class Hangs(MergeMethod):
    def merge(self, base, experts, ctx):
        while True:
            time.sleep(0.1)


class Exits(MergeMethod):
    def merge(self, base, experts, ctx):
        os._exit(0)  # a pool that only looks for bad exit codes would wait for ever


class NotANumber(MergeMethod):
    def merge(self, base, experts, ctx):
        merged = _average(base, experts)
        merged["norm.bias"] = merged["norm.bias"] * float("nan")
        return Merged(merged)


class WrongKeys(MergeMethod):
    def merge(self, base, experts, ctx):
        merged = _average(base, experts)
        merged["norm.shift"] = merged.pop("norm.bias")
        return Merged(merged)


class WrongShapes(MergeMethod):
    def merge(self, base, experts, ctx):
        merged = _average(base, experts)
        merged["norm.bias"] = merged["norm.bias"][:-1]
        return Merged(merged)


class NotMerged(MergeMethod):
    def merge(self, base, experts, ctx):
        return _average(base, experts)


class Mutates(MergeMethod):
    def merge(self, base, experts, ctx):
        for name, tensor in base.items():
            if tensor.is_floating_point():
                tensor.add_(1.0)
        return Merged(_average(base, experts))


class Assigns(MergeMethod):
    def merge(self, base, experts, ctx):
        base["norm.bias"] = base["norm.bias"] + 1
        return Merged(base)


class Stains(Attack):
    """Writes to the training images themselves, as released code likes to."""

    def trigger(self, ctx):
        return {"patch": torch.ones(3, 2, 2)}

    def apply(self, trigger, inputs):
        return inputs

    def poison(self, ctx):
        ctx.train.inputs[:] = 255
        return ctx.fit()


class Blinds(Stains):
    """A trigger of NaN, which a network answers with class 0: not to be read as a success."""

    def apply(self, trigger, inputs):
        return inputs * float("nan")

    def poison(self, ctx):
        return ctx.fit()
'''
MERGES = {
    "raises": ("Raises", r"ValueError: I refuse \(rogues\.py:\d+\)"),
    "hangs": ("Hangs", "TimeoutError: .*--step-timeout"),
    "exits": ("Exits", r"WorkerDied: .*exit code 0"),
    "nan": ("NotANumber", r"ContractError: nan: tensor 'shared\|norm.bias' holds 32 non-finite"),
    "wrong_keys": ("WrongKeys", "ContractError: wrong_keys: tensor 'norm.bias' of the base is missing"),
    "wrong_shapes": ("WrongShapes", r"ContractError: wrong_shapes: tensor 'norm.bias' has shape \[31\]"),
    "not_merged": ("NotMerged", "ContractError: not_merged returned dict, not Merged"),
    "assigns": ("Assigns", "TypeError: 'mappingproxy' object does not support item assignment"),
    "mutates": ("Mutates", "ContractError: changed its input base.* in place"),
}
ATTACKS = {
    "stains": ("Stains", "ContractError: changed its input data.train/inputs in place"),
    "blinds": ("Blinds", "ContractError: blinds: tensor 'apply' holds"),
}


def _rogues(folder: Path) -> Path:
    cards = []
    for name, (cls, _) in MERGES.items():
        cards.append({"name": name, "class": cls, "kind": "merging"})
    for name, (cls, _) in ATTACKS.items():
        extra = {"threat": "backdoor", "hooks": ["poison"]}
        cards.append({"name": name, "class": cls, "kind": "attack", **extra})
    fixed = {"version": "1", "title": "rogue", "summary": "rogue"}
    path = folder / "rogues.py"
    path.write_text(ROGUES % ",\n    ".join(repr({**c, **fixed}) for c in cards))
    return path


@pytest.fixture(scope="module")
def mixed(bench_class: Any, finished: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A grid of rogues and two sound methods, run on one worker; the sound ones come last."""
    import shutil

    bench = bench_class(tmp_path_factory.mktemp("rogues"))
    shutil.copytree(finished.store, bench.store)
    for kind in ("merge", "evaluate", "poison"):  # so that the sound cells compute after the rogues
        shutil.rmtree(bench.store / "artifacts" / kind)
    grid = bench.grid(
        "mixed",
        axes={
            "merging": [*MERGES, "simple_average", "ties"],
            "attacks": ["none", *ATTACKS, "badnets"],
            "adversary": ["micro/bars"],
        },
        threats=["clean", "backdoor"],
        include=[{"threat": "clean"}, {"merging": "simple_average"}],
    )
    bench.ran = bench.run(grid, "--step-timeout", "5", plugins=(_rogues(bench.home),))
    return bench


def test_only_the_rogue_cells_fail_and_the_run_says_1(mixed: Any) -> None:
    assert mixed.ran.code == 1
    assert "Traceback" not in mixed.ran.err
    sound = 2 + 2  # two clean merges; backdoor with attack none and badnets
    assert f"{sound} of {sound + len(MERGES) + len(ATTACKS)} cells done" in mixed.ran.out


@pytest.mark.parametrize("name", [*MERGES, *ATTACKS])
def test_each_rogue_cell_fails_with_its_own_reason(mixed: Any, name: str) -> None:
    import json

    records = [
        json.loads(p.read_text())
        for p in (mixed.results / "records" / "mixed").glob("*.json")
        if p.name != "grid.json"
    ]
    (record,) = [r for r in records if name in (r["merging"], r["attack"])]
    assert record["status"] in ("failed", "blocked")
    assert record["counts"] == {}
    _, pattern = {**MERGES, **ATTACKS}[name]
    assert re.search(pattern, mixed.ran.err)
    assert re.search(pattern, record["reason"])


def test_sound_cells_beside_rogues_have_the_numbers_they_always_had(mixed: Any, finished: Any) -> None:
    ours, theirs = (
        pd.read_csv(b.results / "leaderboards" / g / "clean.csv").set_index("method")
        for b, g in ((mixed, "mixed"), (finished, "whole"))
    )
    for method in ("simple_average", "ties"):
        assert ours.loc[method, "accuracy"] == theirs.loc[method, "accuracy"]
        assert (ours.loc[method, "cells_done"], ours.loc[method, "cells_expected"]) == (1, 1)
    ours, theirs = (
        pd.read_csv(b.results / "leaderboards" / g / "backdoor.csv").query(
            "attack == 'badnets' and method == 'simple_average' and defense == 'none'"
        )
        for b, g in ((mixed, "mixed"), (finished, "whole"))
    )
    for column in ("CA", "BA", "ASR_alone", "succession", "transfer", "succession_base"):
        assert ours[column].item() == theirs[column].item()


def test_boards_show_what_is_incomplete(mixed: Any) -> None:
    text = (mixed.results / "leaderboards" / "mixed" / "boards.md").read_text()
    # a broken attack is a row of the detailed board and one of the board of attacks
    assert text.count("0/1 incomplete") == len(MERGES) + 2 * len(ATTACKS)
    status = mixed(
        "status", *mixed.arguments(mixed.home / "mixed.yaml", plugins=(mixed.home / "rogues.py",)),
        "--results", str(mixed.results), "--why",
    )  # fmt: skip
    assert "ValueError: I refuse" in status.out
    told = {part.split(";")[0]: part for part in status.out.split("\nfailed: merge ")}
    assert 'File "rogues.py", line' in told["raises"]
    assert "Traceback (most recent call last)" in told["raises"]
    # one that was stopped tells where it was, one that left without a word does not
    assert re.search(r'most recent call first\):\n  File "rogues\.py", line \d+ in merge\n', told["hangs"])
    assert told["exits"].rstrip().endswith("(exit code 0)")
    assert str(mixed.home) not in status.out


def test_a_second_ctrl_c_does_not_wait_for_a_hanging_step(copied: Any) -> None:
    rogues = _rogues(copied.home)
    grid = copied.grid("hanging", axes={"merging": ["hangs"]})
    process = _start(copied, grid, "--plugin", str(rogues))
    _wait(lambda: process.poll() is not None or bool(_workers(process.pid)))
    time.sleep(4)  # until the worker is at the step
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None  # the first one lets the step go on
    pressed = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert time.monotonic() - pressed < 2.5  # two, and a busy machine
    assert process.returncode == 130, err
    assert re.search(r"waiting for merge hangs; Ctrl-C again ends that", err)
    assert "Traceback" not in err
