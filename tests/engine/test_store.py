"""Artifacts: committed whole or not at all, verified when read, never trusted when damaged."""

from __future__ import annotations

import errno
import json
import mmap
import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from mergesec.contracts import Merged
from mergesec.errors import UsageError
from mergesec.execution.store import ORDER, CorruptArtifact, Store, digests_of
from mergesec.execution.work import flatten, packed, unflatten, unpacked
from mergesec.files import Full, check_writable, fingerprint, write_atomic
from mergesec.weights import DTYPES

TENSORS = {"w": torch.arange(6, dtype=torch.float32).view(2, 3), "n": torch.tensor(7)}
INFO = {"seconds": 0.25, "device": "cpu", "report": {"condition": 1e6}}


def _stored(folder: Path) -> Store:
    store = Store(folder)
    store.put("merge", "k", save(TENSORS), INFO)
    return store


def test_what_was_put_is_read(tmp_path: Path) -> None:
    blob, meta = _stored(tmp_path).read("merge", "k")
    found = load(blob)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype
    assert meta["info"] == INFO


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]
)
def test_every_type_survives_bit_by_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.tensor([0, 1, 3, 100]).to(dtype)
    store = Store(tmp_path)
    store.put("data", "k", save({"x": tensor, "empty": torch.zeros(0, 3)}), {})
    found = load(store.read("data", "k")[0])
    assert found["x"].dtype == dtype
    assert torch.equal(found["x"], tensor)
    assert found["empty"].shape == (0, 3)


def test_a_file_in_parts_is_the_librarys_file_byte_for_byte(tmp_path: Path) -> None:
    assert set(ORDER) == set(DTYPES)
    tensors = {f'{name} é"\n': torch.tensor([0, 1, 3]).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {
        "none": torch.zeros(0, 3),
        "one": torch.tensor(2.0),
        "b": torch.ones(2, 5),
        "a": torch.ones(3),
    }
    parts = packed(tensors)
    assert bytes(parts) == save(tensors)
    assert len(parts) == len(save(tensors))
    assert digests_of(parts) == digests_of(save(tensors))
    store = Store(tmp_path)
    store.put("data", "k", parts, {})
    found = unpacked(store.read("data", "k")[0])
    assert found.keys() == tensors.keys()
    assert digests_of(packed(found)) == digests_of(parts)


def test_what_is_packed_lies_where_it_was_and_what_is_unpacked_does_not(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    tied = packed({"w": whole, "same": whole, "turned": whole.T})
    whole[0, 0] = 7.0
    assert load(bytes(tied))["w"][0, 0] == load(bytes(tied))["same"][0, 0] == 7.0
    assert torch.equal(load(bytes(tied))["turned"], torch.arange(12.0).view(3, 4).T)
    blob = bytearray(bytes(tied))
    (tmp_path / "f").write_bytes(blob)
    with (tmp_path / "f").open("r+b") as file:
        opened = mmap.mmap(file.fileno(), 0)
        found = unpacked(opened)
        opened[-4:] = b"\0\0\0\0"
    assert torch.equal(found["w"], load(bytes(tied))["w"])


def test_files_are_readable_by_whom_the_umask_allows(tmp_path: Path) -> None:
    write_atomic(tmp_path / "board.csv", b"a")
    (tmp_path / "plain").write_bytes(b"a")
    assert (tmp_path / "board.csv").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert sorted(p.name for p in tmp_path.iterdir()) == ["board.csv", "plain"]


@pytest.mark.parametrize("end", ["json", "safetensors"])
def test_any_flipped_byte_is_found_or_harmless(tmp_path: Path, end: str) -> None:
    store = _stored(tmp_path)
    (path,) = tmp_path.glob(f"artifacts/merge/*.{end}")
    kept = {p: p.read_bytes() for p in path.parent.iterdir()}
    found = 0
    for position in range(len(kept[path])):
        for bit in (0x01, 0x20):
            damaged = bytearray(kept[path])
            damaged[position] ^= bit
            path.write_bytes(bytes(damaged))
            try:
                blob, meta = store.read("merge", "k")
            except CorruptArtifact:
                found += 1
                assert not store.has("merge", "k")
                assert not list(path.parent.iterdir())
                for file, data in kept.items():
                    file.write_bytes(data)
            else:  # padding: the content is what it was
                assert meta["info"] == INFO
                assert all(torch.equal(load(blob)[n], t) for n, t in TENSORS.items())
    assert found > 0.9 * 2 * len(kept[path])


@pytest.mark.parametrize("end", ["json", "safetensors"])
def test_any_truncation_is_found(tmp_path: Path, end: str) -> None:
    store = _stored(tmp_path)
    (path,) = tmp_path.glob(f"artifacts/merge/*.{end}")
    kept = {p: p.read_bytes() for p in path.parent.iterdir()}
    for size in range(0, len(kept[path]), 7):
        path.write_bytes(kept[path][:size])
        with pytest.raises(CorruptArtifact):
            store.read("merge", "k")
        for file, data in kept.items():
            file.write_bytes(data)


def test_swapped_artifacts_are_found(tmp_path: Path) -> None:
    store = _stored(tmp_path)
    store.put("merge", "other", save(TENSORS), {})
    folder = tmp_path / "artifacts" / "merge"
    (folder / "k.json").write_bytes((folder / "other.json").read_bytes())
    with pytest.raises(CorruptArtifact):
        store.read("merge", "k")


def test_without_its_json_an_artifact_does_not_exist(tmp_path: Path) -> None:
    store = _stored(tmp_path)
    folder = tmp_path / "artifacts" / "merge"
    (folder / "k.json").unlink()
    assert not store.has("merge", "k")
    assert store.keys() == set()
    with pytest.raises(CorruptArtifact):
        store.read("merge", "k")
    # the tensors may be another worker's, half-way through its commit
    assert (folder / "k.safetensors").exists()


@pytest.mark.parametrize("report", [{i: float(i) for i in range(12)}, {"shape": (1, 2)}, {"x": float("nan")}])
def test_facts_of_any_json_shape_verify(tmp_path: Path, report: Any) -> None:
    store = Store(tmp_path)
    store.put("protect", "k", save(TENSORS), {"report": report})
    assert store.read("protect", "k")[1]["info"].keys() == {"report"}


def test_facts_that_are_not_json_are_refused_before_anything_counts(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(TypeError, match="Tensor is not JSON serializable"):
        store.put("merge", "k", save(TENSORS), {"x": torch.zeros(1)})
    assert not store.has("merge", "k")


def test_a_failed_write_leaves_the_old_file_and_no_crumbs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    write_atomic(path, b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Full, match=r"x\.json: No space left"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_sweep_removes_old_orphans_and_leaves_the_rest(tmp_path: Path) -> None:
    store = _stored(tmp_path)
    folder = tmp_path / "artifacts" / "merge"
    old, new = time.time() - 7200, time.time()
    for name, when in (
        (f".tmp-{'a' * 16}", old),
        (f".tmp-{'b' * 16}", new),
        (f"{'a' * 40}.safetensors", old),
        (f"{'b' * 40}.safetensors", new),
    ):
        (folder / name).write_bytes(b"x")
        os.utime(folder / name, (when, when))
    for path in (folder / "k.json", folder / "k.safetensors"):
        os.utime(path, (old, old))
    assert store.sweep() == 2
    assert {p.name for p in folder.iterdir()} == {
        "k.json", "k.safetensors", f".tmp-{'b' * 16}", f"{'b' * 40}.safetensors",
    }  # fmt: skip


def test_artifacts_and_remove(tmp_path: Path) -> None:
    store = _stored(tmp_path)
    ((kind, key, size),) = store.artifacts()
    assert (kind, key) == ("merge", "k")
    assert size == sum(p.stat().st_size for p in (tmp_path / "artifacts" / "merge").iterdir())
    assert store.meta("merge", "k")["info"] == INFO
    store.remove("merge", "k")
    with pytest.raises(CorruptArtifact):
        store.meta("merge", "k")
    assert list(store.artifacts()) == []


def test_an_unwritable_folder_is_named_with_its_field(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match=r"--results: cannot write to .*file/below"):
        check_writable(tmp_path / "file" / "below", "--results")


# --------------------------------------------------------------------------- fingerprints


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGESEC_CACHE", str(tmp_path_factory.mktemp("cache")))


names = st.text("abc", min_size=1, max_size=3)


@settings(max_examples=25, deadline=None)
@given(files=st.dictionaries(names, st.binary(max_size=20), min_size=1, max_size=4))
def test_a_fingerprint_depends_on_names_and_bytes_alone(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]
) -> None:
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for name, data in files.items():
        (one / name).write_bytes(data)
    for name, data in reversed(files.items()):
        (two / name).write_bytes(data)
    assert fingerprint(one) == fingerprint(two)
    (two / next(iter(files))).write_bytes(b"another " * 4)
    assert fingerprint(one) != fingerprint(two)


def test_a_damaged_memory_of_fingerprints_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1")
    first = fingerprint(tmp_path)
    cache = Path(os.environ["MERGESEC_CACHE"]) / "fingerprints.json"
    assert json.loads(cache.read_text())
    for damage in ("{", "[]", '{"a": 1}'):
        cache.write_text(damage)
        assert fingerprint(tmp_path) == first


# --------------------------------------------------------------------------- merged artifacts

tensor_names = st.text("ab.|/", min_size=1, max_size=6)
weights = st.dictionaries(
    tensor_names, st.integers(-9, 9).map(lambda n: torch.tensor([float(n)])), max_size=3
)
task_names = st.text("xy/_-", min_size=1, max_size=5)


@settings(max_examples=100, deadline=None)
@given(
    shared=weights,
    per_task=st.dictionaries(task_names, weights.filter(bool), max_size=3),
    extra=weights,
    info=st.dictionaries(st.text(max_size=4), st.integers()),
)
def test_merged_artifacts_round_trip(
    shared: dict[str, Tensor], per_task: dict[str, dict[str, Tensor]], extra: dict[str, Tensor], info: Any
) -> None:
    flat = flatten(Merged(shared, per_task, extra, info))
    assert len(flat) == len(shared) + len(extra) + sum(map(len, per_task.values()))
    again = unflatten(load(save(flat)) if flat else flat, info)
    assert dict(again.shared) == shared
    assert {t: dict(w) for t, w in again.per_task.items()} == per_task
    assert dict(again.extra) == extra
    assert again.info == info


def test_what_the_store_did_not_write_is_left_alone(tmp_path: Path) -> None:
    """A folder of somebody's that has an ``artifacts`` of its own; links, pipes and devices in the store."""
    store = _stored(tmp_path)
    folder = tmp_path / "artifacts"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    foreign = {
        folder / "photos" / "index.json": '{"a": 1}', folder / "photos" / "deep.json": "[" * 100_000,
        elsewhere / f"{'a' * 40}.json": "{}", folder / "merge" / "notes.txt": "mine",
    }  # fmt: skip
    for path, text in foreign.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        os.utime(path, (0, 0))
    (folder / "linked").symlink_to(elsewhere)
    (folder / "merge" / f"{'b' * 40}.json").symlink_to("/dev/zero")
    os.mkfifo(folder / "merge" / f"{'c' * 40}.json")
    assert [(kind, key) for kind, key, _ in store.artifacts()] == [("merge", "k")]
    assert store.sweep() == 0
    assert all(path.read_text() == text for path, text in foreign.items())


def test_a_link_in_the_place_of_an_artifact_is_missing_and_heals(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (tmp_path / "artifacts" / "merge").mkdir(parents=True)
    (tmp_path / "artifacts" / "merge" / "k.json").symlink_to("/dev/zero")
    assert not store.has("merge", "k")
    assert store.keys() == set()
    with pytest.raises(CorruptArtifact):
        store.read("merge", "k")
    store.put("merge", "k", save({"w": torch.ones(2)}), {})
    assert store.meta("merge", "k")["info"] == {}
    assert store.keys() == {"k"}


def test_a_file_is_flushed_before_its_name_appears_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        sync(handle)

    def named(before: Path, after: Path) -> None:
        done.append("name")
        replace(before, after)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", named)
    write_atomic(tmp_path / "x", b"1")
    assert done == ["file", "name", "folder"]


@pytest.mark.parametrize(("seconds", "flushed"), [(0.2, 0), (60.0, 4)])
def test_what_is_made_again_in_no_time_is_not_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, flushed: int
) -> None:
    """What a power loss may then do to it is found when it is read, as every torn file is."""
    done: list[int] = []
    monkeypatch.setattr(os, "fsync", done.append)
    store = Store(tmp_path)
    store.put("merge", "k", save({"w": torch.ones(2)}), {"seconds": seconds})
    assert len(done) == flushed
    path = tmp_path / "artifacts" / "merge" / "k.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(CorruptArtifact):
        store.read("merge", "k")
    assert not store.has("merge", "k")
