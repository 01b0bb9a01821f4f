"""A plugin changes only its own cells and never meets a test label: each way to cheat, tried."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import save

from mergesec.contracts import ContractError
from mergesec.execution.guests import containment
from mergesec.execution.guests.checks import check
from mergesec.execution.guests.handing import HIDDEN, handed
from mergesec.execution.guests.wire import Ended, Garbled, copied, mapped, receive, send, sheet
from mergesec.execution.logs import KEPT, Log, read_log
from mergesec.execution.steps import run
from mergesec.execution.store import Store, digests_of
from mergesec.execution.work import Bench, Result, Work
from mergesec.planning.catalog import load_catalog
from mergesec.planning.gridspec import parse_grid
from mergesec.planning.plan import Plan, make_plan
from mergesec.planning.resolve import resolve

LABELS = 128
"""Test labels of a micro task."""
CHEATS = '''
import gc
import json
import os
import signal
import sys
import torch
from mergesec.contracts import DataContext, Merged, MergeMethod, Split, load_network

STORE = %r
CARDS = %s


def average(base, experts):
    return {
        k: torch.stack([e.weights[k] for e in experts]).mean(0) if v.is_floating_point() else v
        for k, v in base.items()
    }


class Average(MergeMethod):
    def merge(self, base, experts, ctx):
        return Merged(average(base, experts))


class Swaps(Average):
    """Whoever predicts in its process predicts what it likes; so does whoever trains or reads."""

    def merge(self, base, experts, ctx):
        import mergesec.execution.evaluation
        import mergesec.execution.store
        import mergesec.inference

        def right(task, model, head, split, *more):
            return split.targets.long()

        mergesec.inference.predict = mergesec.execution.evaluation.predict = right
        torch.argmax = torch.Tensor.argmax = lambda *a, **k: torch.zeros(1)
        return super().merge(base, experts, ctx)


class Writes(Average):
    def merge(self, base, experts, ctx):
        experts[0].weights["norm.bias"].data.fill_(9.0)
        return super().merge(base, experts, ctx)


class WritesArrays(Average):
    def merge(self, base, experts, ctx):
        experts[0].weights["norm.bias"].numpy()[:] = 9.0
        return super().merge(base, experts, ctx)


class Talks(Average):
    def merge(self, base, experts, ctx):
        for line in range(20_000):
            print("a line", line)
        os.write(2, b"the last words\\n")
        return super().merge(base, experts, ctx)


class Claims(Average):
    """Facts that only the worker may state."""

    def merge(self, base, experts, ctx):
        said = {"plugins": [], "contained": "very", "seconds": 0.0, "peak_mb": 0.0, "device": "abacus"}
        return Merged(average(base, experts), info=said)


class Kills(Average):
    def merge(self, base, experts, ctx):
        for number in {os.getppid(), 1}:
            if number:
                try:
                    os.kill(number, signal.SIGKILL) if number != 1 else None
                except OSError:
                    pass
        return super().merge(base, experts, ctx)


class Babbles(Average):
    def merge(self, base, experts, ctx):
        for number in range(3, 64):
            try:
                os.write(number, b"\\xff" * 64)
            except OSError:
                pass
        return super().merge(base, experts, ctx)


def is_loot(value):
    return (
        isinstance(value, torch.Tensor) and not value.is_floating_point() and value.shape == (%d,)
        and int(value.min()) >= 0 and int(value.max()) == 3
    )


def attempt(way, steal):
    print("tried", way)
    try:
        if any(is_loot(value) for value in steal()):
            print("stolen", way)
    except Exception as error:
        print("refused", way, type(error).__name__)


def by_frames():
    frame = sys._getframe()
    while frame is not None:
        for value in frame.f_locals.values():
            if isinstance(value, Split):
                yield value.targets
            if isinstance(value, dict):
                yield from value.values()
        frame = frame.f_back


def by_disk():
    from safetensors.torch import load_file

    for folder, _, files in os.walk(STORE):
        for name in files:
            if name.endswith(".safetensors"):
                yield from load_file(os.path.join(folder, name)).values()


class Thief(Average):
    def merge(self, base, experts, ctx):
        view = ctx.views["micro/bars"]
        work = ctx.views._work
        main, worker = sys.modules["__main__"], sys.modules.get("mergesec.execution.engines.worker")
        attempt("views", lambda: work._read("data:micro/bars")[0].values())
        attempt("splits", lambda: [s.targets for s in work.splits("data:micro/bars", view.task).values()])
        attempt("load", lambda: [s.targets for s in view.task.load(DataContext(ctx.device, 0)).values()])
        attempt("globals", lambda: [
            t for place in (main, worker) for bench in [getattr(place, "_BENCH", None)] if bench
            for held in bench._held.values() for t in held.tensors.values()
        ])
        attempt("memory", lambda: [o for o in gc.get_objects() if isinstance(o, torch.Tensor)])
        attempt("broker", lambda: [
            t for key in (*work.inputs.values(), "0" * 40) for t in work.bench.read("evaluate", key)[0].values()
        ])
        attempt("frames", by_frames)
        attempt("disk", by_disk)
        return super().merge(base, experts, ctx)

    def network(self, backbone, merged, task):
        attempt("frames of network", by_frames)
        attempt("memory of network", lambda: [o for o in gc.get_objects() if isinstance(o, torch.Tensor)])
        return load_network(backbone, merged.shared)
'''
CLASSES = {
    "average": "Average", "swaps": "Swaps", "writes": "Writes", "writes_arrays": "WritesArrays", "talks": "Talks",
    "claims": "Claims", "kills": "Kills", "babbles": "Babbles", "thief": "Thief",
}  # fmt: skip
SOUND = ("simple_average", "task_arithmetic")


def _plugin(folder: Path, store: Path) -> Path:
    cards = [
        {"name": n, "class": c, "kind": "merging", "version": "1", "title": n, "summary": n}
        for n, c in CLASSES.items()
    ]
    path = folder / "cheats.py"
    path.write_text(CHEATS % (str(store), "[\n    " + ",\n    ".join(map(repr, cards)) + "\n]", LABELS))
    return path


@pytest.fixture(scope="session")
def walls() -> None:
    """Skips where nothing can be contained."""
    if obstacle := containment.survey().obstacle:
        pytest.skip(f"this machine contains nothing: {obstacle}")


def _ready(bench: Any, finished: Any) -> Any:
    shutil.copytree(finished.store, bench.store)
    for kind in ("merge", "evaluate"):  # so that there is something to do beside the cheats, after them
        shutil.rmtree(bench.store / "artifacts" / kind)
    bench.plugin = _plugin(bench.home, bench.store)
    merging = [*CLASSES, *SOUND]
    bench.file = bench.grid("cheats", axes={"merging": merging}, threats=["clean"])
    return bench


@pytest.fixture(scope="module")
def cheated(bench_class: Any, finished: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of every cheat, on one worker, with sound methods after them; contained where the machine can."""
    bench = _ready(bench_class(tmp_path_factory.mktemp("cheats")), finished)
    bench.ran = bench.run(bench.file, plugins=(bench.plugin,))
    return bench


def _clean(bench: Any, grid: str) -> pd.DataFrame:
    return pd.read_csv(bench.results / "leaderboards" / grid / "clean.csv").set_index("method")


def _records(bench: Any) -> dict[str, dict[str, Any]]:
    found = (json.loads(p.read_text()) for p in (bench.results / "records" / "cheats").glob("clean-*.json"))
    return {r["merging"]: r for r in found}


def _printed(bench: Any) -> str:
    return "".join(p.read_text() for p in sorted((bench.store / "logs").glob("*.txt")))


# --------------------------------------------------------------------------- its own cells


def test_others_have_the_numbers_they_have_without_it(cheated: Any, finished: Any) -> None:
    ours, theirs = _clean(cheated, "cheats"), _clean(finished, "whole")
    assert ours.loc["simple_average", "accuracy"] == theirs.loc["simple_average", "accuracy"]


def test_a_swapped_ruler_measures_nothing(cheated: Any) -> None:
    board = _clean(cheated, "cheats")
    assert board.loc["swaps", "accuracy"] == board.loc["simple_average", "accuracy"] < 1


def test_a_later_run_without_the_plugin_finds_nothing_of_it(cheated: Any, finished: Any) -> None:
    grid = cheated.grid("after", axes={"merging": list(SOUND)}, threats=["clean"])
    after = cheated.run(grid)
    assert after.code == 0, after.err
    for method in SOUND:
        assert (
            _clean(cheated, "after").loc[method, "accuracy"]
            == _clean(cheated, "cheats").loc[method, "accuracy"]
        )


@pytest.mark.parametrize("name", ["writes", "writes_arrays"])
def test_who_writes_to_its_input_behind_torchs_back_fails(cheated: Any, name: str) -> None:
    record = _records(cheated)[name]
    assert record["status"] in ("failed", "blocked")
    assert "changed its input expert:micro/b" in record["reason"]


def test_the_rest_of_the_cheats_get_what_averaging_gets(cheated: Any) -> None:
    board = _clean(cheated, "cheats")
    for name in ("average", "talks", "claims", "thief"):
        assert board.loc[name, "accuracy"] == board.loc["simple_average", "accuracy"], name


def test_facts_of_the_worker_are_not_the_plugins_to_state(cheated: Any) -> None:
    cost = _records(cheated)["claims"]["cost"]["clean_merge"]
    assert cost["made_seconds"] > 0 and cost["made_peak_mb"] > 1
    provenance = _records(cheated)["claims"]["provenance"]
    assert provenance["devices"] == ["cpu"]
    facts = [
        json.loads(p.read_text())["info"] for p in (cheated.store / "artifacts" / "merge").glob("*.json")
    ]
    ours = [f for f in facts if "plugins" in f]
    assert ours and all(f["plugins"][0].startswith("cheats.py ") for f in ours)
    assert {type(f["contained"]) for f in ours} == {bool}


def test_who_kills_or_babbles_harms_at_most_itself(cheated: Any) -> None:
    records = _records(cheated)
    for name in ("kills", "babbles"):
        record = records[name]
        if record["status"] == "done":
            board = _clean(cheated, "cheats")
            assert board.loc[name, "accuracy"] == board.loc["simple_average", "accuracy"]
        else:
            assert any(told in record["reason"] for told in ("WorkerDied", "answers with", "ContractError"))
    assert all(records[name]["status"] == "done" for name in SOUND)


def test_what_a_plugin_prints_goes_to_the_log_of_its_step(cheated: Any) -> None:
    assert "a line" not in cheated.ran.out + cheated.ran.err
    (log,) = [t for p in (cheated.store / "logs").glob("*.txt") if "the last words" in (t := p.read_text())]
    assert log.startswith("a line 0\n") and "bytes left out" in log and len(log) < 3 * KEPT


# --------------------------------------------------------------------------- no labels

WAYS = ("views", "splits", "load", "globals", "memory", "broker", "frames")


@pytest.mark.parametrize("way", [*WAYS, "frames of network", "memory of network"])
def test_no_way_leads_to_the_labels(cheated: Any, way: str) -> None:
    printed = _printed(cheated)
    assert f"tried {way}\n" in printed
    assert f"stolen {way}\n" not in printed


@pytest.mark.usefixtures("walls")
def test_contained_the_disk_shows_nothing(cheated: Any) -> None:
    printed = _printed(cheated)
    assert "tried disk\n" in printed and "stolen disk\n" not in printed
    assert {r["contained"] for r in _records(cheated).values() if r["status"] == "done"} == {"yes"}


def test_not_contained_the_record_and_the_board_say_so(bench: Any, finished: Any) -> None:
    _ready(bench, finished)
    grid = bench.grid("cheats", axes={"merging": ["thief", "simple_average"]}, threats=["clean"])
    ran = bench.run(grid, "--not-contained", plugins=(bench.plugin,))
    assert ran.code == 0, ran.err
    assert "stolen disk\n" in _printed(bench)  # the disk is what walls are for
    assert not any(f"stolen {way}\n" in _printed(bench) for way in WAYS)
    records = _records(bench)
    assert (records["thief"]["contained"], records["simple_average"]["contained"]) == ("no", "yes")
    assert (
        "not contained: in 1 cells" in (bench.results / "leaderboards" / "cheats" / "boards.md").read_text()
    )
    assert "plugins were not contained" in ran.err


@pytest.mark.usefixtures("walls")
def test_where_walls_are_asked_for_what_was_made_without_does_not_count(bench: Any, finished: Any) -> None:
    _ready(bench, finished)
    grid = bench.grid("cheats", axes={"merging": ["average", "simple_average"]}, threats=["clean"])
    assert bench.run(grid, "--not-contained", plugins=(bench.plugin,)).code == 0
    again = bench.run(grid, "--contained", plugins=(bench.plugin,))
    assert "2 steps run" in again.out, again.out
    assert _records(bench)["average"]["contained"] == "yes"
    assert "0 steps run" in bench.run(grid, plugins=(bench.plugin,)).out


def test_the_thief_knows_its_trade(finished: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In one process with the labels, as every plugin once was, it finds them: the tests above can fail."""
    plugin = _plugin(tmp_path, finished.store)
    plan = _plan(plugin, ["thief"], {})
    step = next(s for s in plan.steps.values() if s.kind == "merge")
    kinds = {key: s.kind for key, s in plan.steps.items()}
    bench = Bench(Store(finished.store), load_catalog([_micro(), plugin]), torch.device("cpu"))
    run(step, bench, kinds)
    stolen = capfd.readouterr().out
    assert all(f"stolen {way}\n" in stolen for way in ("views", "splits", "load", "memory", "disk"))


# --------------------------------------------------------------------------- a stranger's task


def test_a_strangers_world_gives_the_numbers_of_ours(bench: Any, finished: Any) -> None:
    """The micro world from another place is a plugin: its steps run in guests, its labels stay outside."""
    shutil.copyfile(_micro(), bench.home / "world.py")
    grid = bench.grid("theirs", axes={"merging": ["simple_average"]}, threats=["clean"])
    ran = bench(
        "run", "--grid", str(grid), "--plugin", str(bench.home / "world.py"), "--jobs", "1",
        "--results", str(bench.results),
    )  # fmt: skip
    assert ran.code == 0, ran.err
    ours, theirs = _clean(finished, "whole"), _clean(bench, "theirs")
    assert theirs.loc["simple_average", "accuracy"] == ours.loc["simple_average", "accuracy"]


# --------------------------------------------------------------------------- what is handed over


def _micro() -> Path:
    return Path(containment.__file__).parents[2] / "conformance" / "micro.py"


def _plan(plugin: Path, merging: list[str], more: dict[str, Any]) -> Plan:
    fields = {
        "name": "g", "suite": {"name": "micro", "backbone": "micro/vit", "tasks": ["micro/bars", "micro/blobs"]},
        "axes": {"merging": merging, **more.pop("axes", {})}, "recipe": {"epochs": 1}, **more,
    }  # fmt: skip
    grid = resolve(parse_grid(fields, "g"), load_catalog([_micro(), plugin]))
    return make_plan(grid, lambda task: "")


def _work(plan: Plan, kind: str, store: Path) -> Work:
    step = next(s for s in plan.steps.values() if s.kind == kind)
    bench = Bench(Store(store), plan.grid.catalog, torch.device("cpu"))
    return Work(step, bench, {key: s.kind for key, s in plan.steps.items()})


def _splits(work: Work, role: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return {n: t for n, t in load(bytes(handed(work, role).blob)).items() if n.endswith("/targets")}


@pytest.mark.parametrize(
    ("kind", "protocol", "seen"),
    [("merge", "inductive", {"tuning"}), ("merge", "transductive", {"tuning", "test"}),
     ("evaluate", "inductive", {"test"}), ("expert", "inductive", {"train"})],
)  # fmt: skip
def test_each_side_gets_its_own_rows(
    finished: Any, tmp_path: Path, kind: str, protocol: str, seen: set[str]
) -> None:
    work = _work(
        _plan(_plugin(tmp_path, tmp_path), ["average"], {"protocol": protocol}), kind, finished.store
    )
    role = next(r for r in work.inputs if r.startswith("data"))
    found = _splits(work, role)
    assert {name.partition("/")[0] for name in found} == seen
    if "test" in seen:
        assert set(found["test/targets"].tolist()) == {HIDDEN}


def test_an_adversary_gets_ten_rows_of_the_task_it_aims_at(finished: Any, tmp_path: Path) -> None:
    more = {
        "threats": ["backdoor"], "protocol": "inductive",
        "axes": {"attacks": ["badmerging"], "target_task": ["micro/blobs"], "adversary": ["micro/bars"]},
    }  # fmt: skip
    plan = _plan(_plugin(tmp_path, tmp_path), ["simple_average"], more)
    work = _work(plan, "trigger", finished.store)
    rows = _splits(work, "target_data")["train/targets"]
    assert len(rows) == 10 and set(rows.tolist()) == {int(work.args["target"])}


# --------------------------------------------------------------------------- what comes back


def _merged_result(weights: dict[str, torch.Tensor]) -> Result:
    return Result({f"shared|{n}": t for n, t in weights.items()})


def test_what_comes_back_is_checked_by_kind(finished: Any, tmp_path: Path) -> None:
    plan = _plan(_plugin(tmp_path, tmp_path), ["average"], {})
    merge = _work(plan, "merge", finished.store)
    base = dict(merge.tensors("base"))
    check(merge, _merged_result(base))
    wrong = {
        "missing": {n: t for n, t in base.items() if n != "norm.bias"},
        "shape": {**base, "norm.bias": base["norm.bias"][:-1]},
        "non-finite": {**base, "norm.bias": base["norm.bias"] * float("nan")},
        "torch.int64": {**base, "norm.bias": base["norm.bias"].long()},
    }
    for told, weights in wrong.items():
        with pytest.raises(ContractError, match=told):
            check(merge, _merged_result(weights))
    for facts in ({"x": float("inf")}, {"x": "y" * (1 << 21)}, {"x": {1}}):
        with pytest.raises(ContractError, match="facts"):
            check(merge, _merged_result(base)._replace(facts=facts))


def test_labels_of_an_evaluation_are_the_workers(finished: Any, tmp_path: Path) -> None:
    work = _work(_plan(_plugin(tmp_path, tmp_path), ["average"], {}), "evaluate", finished.store)
    tasks = [r.removeprefix("task:") for r in work.refs if r.startswith("task:")]
    lies = {f"targets|{t}": torch.zeros(LABELS).int() for t in tasks}
    guesses = {f"predictions|{t}": torch.zeros(LABELS).int() for t in tasks}
    found = check(work, Result({**lies, **guesses})).tensors
    for task in tasks:
        assert torch.equal(found[f"targets|{task}"], (torch.arange(LABELS) % 4).int())
    with pytest.raises(ContractError, match="no prediction for each"):
        check(work, Result({**lies, **{n: t[:-1] for n, t in guesses.items()}}))


# --------------------------------------------------------------------------- the line


def test_a_line_carries_words_and_sealed_sheets() -> None:
    import socket

    ours, theirs = socket.socketpair()
    blob = save({"a": torch.arange(5)})
    file = sheet(blob)
    send(ours, {"read": "k"}, file)
    os.close(file)
    said, came = receive(theirs)
    assert said == {"read": "k"}
    if hasattr(os, "memfd_create"):
        with pytest.raises(OSError):
            os.pwrite(came, b"x", 0)
    private = mapped(came)
    assert private[:] == blob
    private[0] = 255  # one's own copy
    file = sheet(b"abc")
    assert copied(os.dup(file)) == b"abc"
    os.close(file)
    for garbage in (b"\xff" * 64, b"\x05\x00\x00\x00\x00\x00\x00\x00[1,2]", b"\x02" + b"\x00" * 7 + b"{]"):
        ours, theirs = socket.socketpair()
        ours.sendall(garbage)
        with pytest.raises(Garbled):
            receive(theirs)
    ours, theirs = socket.socketpair()
    ours.sendall(b"\x09" + b"\x00" * 7 + b"{")
    ours.close()
    with pytest.raises(Ended):
        receive(theirs)


def test_what_a_guest_says_of_its_failure_is_only_text() -> None:
    import socket
    from types import SimpleNamespace

    from mergesec.execution.guests.host import Fork, Guest, GuestFailed

    ours, theirs = socket.socketpair()
    reading, writing = os.pipe()
    step = SimpleNamespace(inputs=(), label="merge x", key="k")
    guest = Guest(Fork(0, ours, reading), SimpleNamespace(step=step), frozenset(), Log(Path(), "k"))  # type: ignore[arg-type]
    send(theirs, {"error": "Red: \x1b[31mtwo\nlines", "trace": "a\nb\x1b]0;title\x07"})
    with pytest.raises(GuestFailed) as failed:
        guest.hear()
    assert failed.value.reason == "Red: \\x1b[31mtwo lines"
    assert failed.value.trace == "a\nb\\x1b]0;title\\x07"
    os.close(reading)
    os.close(writing)


def test_tied_tensors_of_ones_own_are_handed_over(finished: Any, tmp_path: Path) -> None:
    work = _work(_plan(_plugin(tmp_path, tmp_path), ["average"], {}), "merge", finished.store)
    shared = torch.ones(3, requires_grad=True)
    key = work.bench.give({"a": shared, "b": shared})
    work.inputs["own"], work._kinds = key, {**work._kinds, key: "import"}
    assert len(digests_of(handed(work, "own").blob)) == 2


def test_a_log_keeps_beginning_and_end(tmp_path: Path) -> None:
    for size in (0, 10, KEPT, 2 * KEPT, 2 * KEPT + 1, 10 * KEPT):
        text = bytes(65 + i % 26 for i in range(size))
        with Log(tmp_path, "k") as log:
            for start in range(0, size, 1000):
                log.write(text[start : start + 1000])
        found = read_log(tmp_path, "k").encode()
        if size <= 2 * KEPT:
            assert found == text
        else:
            assert (
                found.startswith(text[:KEPT]) and found.endswith(text[-KEPT:]) and b"bytes left out" in found
            )


# --------------------------------------------------------------------------- walls

INSIDE = """
import json, os, socket, sys
from mergesec.execution.guests.containment import Walls, enter
enter(Walls(tuple(json.loads(sys.argv[1])), tuple(json.loads(sys.argv[2]))))
found = {"pid": os.getpid()}
def tried(name, do):
    try:
        found[name] = do()
    except OSError as error:
        found[name] = type(error).__name__
for path in json.loads(sys.argv[3]):
    tried(path, lambda: os.path.exists(path))
tried("write", lambda: open(os.path.join(sys.prefix, "x"), "w").close())
tried("scratch", lambda: open("/tmp/x", "w").close())
tried("network", lambda: socket.create_connection(("192.0.2.1", 9), timeout=2))
tried("kill", lambda: os.kill(int(sys.argv[4]), 0))
tried("root", lambda: os.chroot("/tmp"))
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
found["umount"] = libc.umount2(b"/tmp", 2)
found["namespace"] = libc.unshare(0x10000000)
print(json.dumps(found), flush=True)
"""


@pytest.mark.usefixtures("walls")
def test_walls_stand(tmp_path: Path) -> None:
    seen, hidden, beside = tmp_path / "seen", tmp_path / "seen" / "store", tmp_path / "beside"
    for folder in (seen, hidden, beside):
        folder.mkdir()
        (folder / "file").write_text("x")
    paths = [str(p / "file") for p in (seen, hidden, beside)]
    code = containment.survey().code
    ran = subprocess.run(
        [sys.executable, "-P", "-c", INSIDE, json.dumps([*code, str(seen)]), json.dumps([str(hidden)]),
         json.dumps(paths), str(os.getpid())],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert [found[p] for p in paths] == [True, False, False]
    assert found["pid"] == 1 and found["scratch"] is None
    assert (found["write"], found["kill"], found["root"]) == (
        "OSError",
        "ProcessLookupError",
        "PermissionError",
    )
    assert found["network"] == "OSError" and (found["umount"], found["namespace"]) == (-1, -1)


@pytest.mark.usefixtures("walls")
def test_who_waits_at_the_walls_ends_as_the_guest_did() -> None:
    program = "from mergesec.execution.guests.containment import *; enter(Walls({}));"
    code = tuple(containment.survey().code)
    for ending, wanted in (("os._exit(7)", 7), ("ctypes.string_at(0)", -11), ("pass", 0)):
        text = program.format(code) + " import os;" + ending
        assert subprocess.run([sys.executable, "-P", "-c", text], check=False).returncode == wanted


def test_walls_that_cannot_be_are_said_so(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergesec.errors import UsageError
    from mergesec.execution import session as sessions

    monkeypatch.setattr(sessions, "survey", lambda: containment.Ground("no user namespaces"))
    bench.home.joinpath("store").mkdir()
    monkeypatch.setenv("MERGESEC_CACHE", str(bench.store))
    opened = sessions.open_session(str(bench.grid()), (), [str(_micro())])
    with pytest.raises(UsageError, match=r"--contained: plugins cannot be contained .*no user namespaces"):
        sessions.run_session(opened, bench.results, None, contained=True)  # type: ignore[arg-type]
    assert sessions._walls(opened, bench.results, None) == (None, "")  # nobody's plugin takes part


# --------------------------------------------------------------------------- the code that was planned


def test_an_edit_within_a_second_is_another_plugin_and_one_meanwhile_is_refused(tmp_path: Path) -> None:
    from mergesec.errors import UsageError

    path = tmp_path / "edited.py"
    text = (
        'CARD = {"name": "edited", "kind": "merging", "class": "E", "version": "1", "title": "e", "summary": "e"}\n'
        "from mergesec.contracts import Merged, MergeMethod\n"
        "class E(MergeMethod):\n    value = 1\n    def merge(self, base, experts, ctx):\n        return Merged(base)\n"
    )
    for value in (1, 2, 3):  # same size, same second: Python's cache would not know them apart
        path.write_text(text.replace("value = 1", f"value = {value}"))
        os.utime(path, (1_700_000_000, 1_700_000_000))
        assert load_catalog([path]).get("merging", "edited").load().value == value
    catalog = load_catalog([path])
    path.write_text(text.replace("value = 1", "value = 4"))
    assert catalog.get("merging", "edited").load().value == 3  # loaded already
    fresh = load_catalog([path])
    path.write_text(text.replace("value = 1", "value = 5"))
    with pytest.raises(UsageError, match=r"edited\.py was changed meanwhile"):
        fresh.get("merging", "edited").load()
