"""``bench cache``: counts, verifies and clears what the store wrote, by kind, age and size, and nothing else."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import typer
from safetensors.torch import save
from torch import zeros

from mergesec.cli.cache_verb import FAILURES, main
from mergesec.errors import UsageError
from mergesec.execution.failures import Failure, Failures
from mergesec.execution.store import CHECKPOINTS, Store

DAY = 86400
KEYS = {name: name * 40 for name in "abcd"}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Four artifacts of 1 MB, last used 40, 30, 20 and 0 days ago, a checkpoint and two failures."""
    monkeypatch.setenv("MERGESEC_CACHE", str(tmp_path))
    found = Store(tmp_path)
    for (name, key), days in zip(KEYS.items(), (40, 30, 20, 0), strict=True):
        kind = "merge" if name in "ab" else "expert"
        found.put(kind, key, save({"w": zeros(250_000)}), {})
        _age(tmp_path / "artifacts" / kind / f"{key}.json", days)
    found.keep("e" * 40, 0, b"half a training")
    for key, kind in (("1" * 40, "merge"), ("2" * 40, "expert")):
        Failures(tmp_path).note(Failure(key, kind, f"{kind} x", "ValueError: no"))
    return found


def _age(path: Path, days: float) -> None:
    then = time.time() - days * DAY
    os.utime(path, (then, then))


def _left(store: Store) -> str:
    names = {key: name for name, key in KEYS.items()}
    return "".join(sorted(names[key] for _, key, _ in store.artifacts()))


def _verified() -> int:
    with pytest.raises(typer.Exit) as ended:
        main("verify")
    return ended.value.exit_code


def test_show_counts_checkpoints_and_failures(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[3:]]
    assert [line for line in lines if line] == [
        ["expert", "2", "2.0"],
        ["merge", "2", "2.0"],
        ["checkpoints", "1", "0.0"],
        ["failures", "2"],
        ["all", "5", "4.0"],
    ]


def test_list_tells_each_with_its_age(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    main("list")
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line]
    assert [row[1] for row in rows if row[0] in ("merge", "expert")] == list(KEYS.values())
    assert next(row for row in rows if row[1] == KEYS["a"])[-1] == "960h00m"
    assert sum(row[0] == CHECKPOINTS for row in rows) == 1
    assert f"{'1' * 40} merge x" in out
    main("list", kind=FAILURES)
    assert KEYS["a"] not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "left", "checkpoints", "failures"),
    [
        ({}, "", 0, 0),
        ({"kind": "merge"}, "cd", 1, 1),
        ({"kind": CHECKPOINTS}, "abcd", 0, 2),
        ({"kind": FAILURES}, "abcd", 1, 0),
        ({"older_than": "25d"}, "cd", 1, 2),
        ({"older_than": "36h", "kind": "merge"}, "cd", 1, 2),
        ({"older_than": "0m"}, "", 0, 0),
        ({"keep_under": "3.1MB"}, "bcd", 1, 2),
        ({"keep_under": "2.1 MB"}, "cd", 1, 2),
        ({"keep_under": "1GiB"}, "abcd", 1, 2),
        ({"keep_under": "2.1MB", "kind": "expert"}, "ab", 1, 2),
        ({"keep_under": "0MB", "older_than": "25d"}, "cd", 1, 2),
    ],
    ids=str,
)
def test_clear_takes_what_is_asked_for_and_the_longest_unused_first(
    store: Store, options: dict[str, str], left: str, checkpoints: int, failures: int
) -> None:
    main("clear", **options)
    assert _left(store) == left
    assert sum(item.kind == CHECKPOINTS for item in store.contents()) == checkpoints
    assert len(list(Failures(store.root))) == failures


def test_clear_says_what_it_means_for_records(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    main("clear", kind="merge")
    out = capsys.readouterr().out
    assert out.startswith("removed 2 artifacts, 2.0 MB\n")
    assert "the next run of their grids computes again" in out
    assert "forgot 1 failure" in out


def test_what_a_run_reads_is_used_and_what_verify_reads_is_not(store: Store) -> None:
    store.read("merge", KEYS["a"])
    store.meta("merge", KEYS["b"])
    assert _verified() == 0
    main("clear", older_than="10d")
    assert _left(store) == "abd"


@pytest.mark.parametrize(
    ("action", "options", "said"),
    [
        ("clear", {"older_than": "30"}, "--older-than: '30' is no age; valid: a number and m, h, d or w"),
        ("clear", {"older_than": "-1d"}, "--older-than: '-1d' is no age"),
        (
            "clear",
            {"keep_under": "20"},
            "--keep-under: '20' is no size; valid: a number and one of KB, MB, GB",
        ),
        ("clear", {"keep_under": "9" * 400 + "TB"}, "is no size"),
        ("show", {"older_than": "30d"}, "--older-than: goes with clear, not with show"),
        ("verify", {"keep_under": "1GB"}, "--keep-under: goes with clear, not with verify"),
        ("clear", {"kind": "merg"}, "--kind: nothing stored of kind 'merg'; did you mean 'merge'?"),
        ("cleer", {}, "action: 'cleer'; did you mean 'clear'?"),
    ],
)
def test_a_wrong_word_is_named_and_removes_nothing(
    store: Store, action: str, options: dict[str, str], said: str
) -> None:
    with pytest.raises(UsageError) as caught:
        main(action, **options)
    assert said in str(caught.value)
    assert _left(store) == "abcd"


def test_verify_finds_a_damaged_artifact_and_a_damaged_checkpoint(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _verified() == 0
    assert "5 artifacts and checkpoints read, 0 corrupt" in capsys.readouterr().out
    (checkpoint,) = (store.root / CHECKPOINTS).iterdir()
    checkpoint.write_bytes(b"half a trainin")
    tensors = store.root / "artifacts" / "merge" / f"{KEYS['a']}.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    assert _verified() == 1
    out = capsys.readouterr().out
    assert f"corrupt, removed: merge {KEYS['a']}\n" in out
    assert f"corrupt, removed: checkpoints {checkpoint.name}\n" in out
    assert _left(store) == "bcd"
    assert not list((store.root / CHECKPOINTS).iterdir())


def _foreign(root: Path) -> dict[Path, str]:
    """Somebody's files under names near to the store's own; pipes, links and devices under its very names."""
    elsewhere = root / "elsewhere"
    elsewhere.mkdir()
    found = {
        elsewhere / f"{'f' * 40}.json": "{}", elsewhere / f"{'f' * 40}.0.{'0' * 32}.safetensors": "mine",
        root / "artifacts" / "photos" / "index.json": '{"a": 1}', root / "artifacts" / "notes.txt": "mine",
        root / CHECKPOINTS / "best.safetensors": "mine", root / CHECKPOINTS / ".tmp-mine": "mine",
        root / "failures" / "notes.json": "[1]", root / "failures" / "deep.json": "[" * 100_000,
    }  # fmt: skip
    for path, text in found.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        os.utime(path, (0, 0))
    (root / "artifacts" / "linked").symlink_to(elsewhere)
    merge = root / "artifacts" / "merge"
    (merge / f"{KEYS['a']}.safetensors").unlink()
    os.mkfifo(merge / f"{KEYS['a']}.safetensors")
    (merge / f"{KEYS['b']}.safetensors").unlink()
    (merge / f"{KEYS['b']}.safetensors").symlink_to("/dev/zero")
    for number, target in enumerate(("/dev/zero", str(elsewhere / f"{'f' * 40}.json"))):
        (merge / f"{number}{'a' * 39}.json").symlink_to(target)
        (root / CHECKPOINTS / f"{'a' * 40}.{number}.{'0' * 32}.safetensors").symlink_to(target)
        (root / "failures" / f"{number}{'a' * 39}.json").symlink_to(target)
    for folder in (merge, root / CHECKPOINTS, root / "failures"):
        os.mkfifo(folder / f"{'3' * 40}.json")
    os.mkfifo(merge / "other.json")
    (merge / "other.safetensors").write_text("mine")
    return {**found, merge / "other.safetensors": "mine"}


@pytest.mark.timeout(60)
def test_nothing_that_is_not_the_stores_own_plain_file_is_read_or_removed(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = _foreign(store.root)
    odd = [p for p in store.root.rglob("*") if p.is_symlink() or p.is_fifo()]
    main("show")
    main("list")
    assert _verified() == 1  # two artifacts whose tensors are a pipe and a link
    assert _left(store) == "cd"
    main("clear", older_than="10d")
    store.sweep()
    main("clear")
    assert _left(store) == ""
    assert all(path.read_text() == text for path, text in foreign.items())
    assert all(os.path.lexists(path) for path in odd)
    # and a step that is made again takes its place back
    store.put("merge", KEYS["a"], save({"w": zeros(3)}), {})
    assert store.read("merge", KEYS["a"])[1]["info"] == {}


def test_sweep_takes_old_checkpoints_and_those_of_finished_steps(store: Store) -> None:
    folder = store.root / CHECKPOINTS
    kept = next(folder.iterdir())
    store.keep(KEYS["c"], 0, b"left by a kill between the commit and this file's end")
    store.keep("9" * 40, 1, b"nobody goes on with it")
    _age(next(folder.glob(f"{'9' * 40}*")), 31)
    assert store.sweep() == 2
    assert list(folder.iterdir()) == [kept]
