"""Text as a modality: strings as tensors, the folder task, messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from extras import needs
from hypothesis import given, settings
from hypothesis import strategies as st

from mergesec.contracts import ContractError, DataContext, Split
from mergesec.text import pack_strings, unpack_strings
from mergesec_tasks.text.emotion import FolderText

pandas = pytest.importorskip("pandas")
needs("pyarrow")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=20), max_size=12))
def test_strings_survive_being_stored(texts: list[str]) -> None:
    data, offsets = pack_strings(texts)
    assert data.dtype == torch.uint8 and len(offsets) == len(texts) + 1
    assert unpack_strings(data, offsets) == texts


def test_offsets_that_do_not_fit_the_bytes_are_refused() -> None:
    data, offsets = pack_strings(["ab", "c"])
    with pytest.raises(ContractError, match="4"):
        unpack_strings(data, offsets + 1)
    with pytest.raises(ContractError, match="3 bytes"):
        unpack_strings(data, offsets[:-1])


def write_folder(folder: Path, train: int = 240, test: int = 40, **columns: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("test", test)):
        frame = {"text": [f"{name} row {i} é" for i in range(rows)], "label": [i % 4 for i in range(rows)]}
        frame |= {key: make(rows) for key, make in columns.items()}
        pandas.DataFrame(frame).to_parquet(folder / f"{name}.parquet")
    (folder / "classes.json").write_text(json.dumps({"classes": [f"class {i}" for i in range(4)]}))
    return folder


def make_task(name: str = "emotion", **given: Any) -> FolderText:
    task = FolderText(
        **{"max_train": 0, "max_test": 0, "text_column": "text", "label_column": "label", **given}
    )
    task.name = name
    return task


def context(folder: Path | None) -> DataContext:
    return DataContext(torch.device("cpu"), 0, None if folder is None else str(folder))


def test_splits_are_disjoint_complete_and_stored_with_their_class_names(tmp_path: Path) -> None:
    task = make_task()
    splits = task.load(context(write_folder(tmp_path / "emotion")))
    assert {n: len(s) for n, s in splits.items()} == {"train": 140, "tuning": 100, "test": 40}
    assert sorted(splits["train"].inputs + splits["tuning"].inputs) == sorted(
        f"train row {i} é" for i in range(240)
    )
    for split in splits.values():
        numbers = torch.tensor([int(text.split()[2]) for text in split.inputs])
        assert torch.equal(numbers % 4, split.targets)
    assert task.partial == "4 of 6 classes, 280 of 18000 texts"
    other = make_task()
    restored = other.unpack(task.pack(splits))
    assert other.classes == task.classes == [f"class {i}" for i in range(4)]
    for name, split in splits.items():
        assert restored[name].inputs == split.inputs and torch.equal(restored[name].targets, split.targets)


def test_limits_keep_the_tuning_split(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "emotion")
    whole = make_task().load(context(folder))
    less = make_task(max_train=20, max_test=8).load(context(folder))
    assert torch.bincount(less["train"].targets).tolist() == [5] * 4 and len(less["test"]) == 8
    assert less["tuning"].inputs == whole["tuning"].inputs


def test_a_batch_is_a_list_of_strings(tmp_path: Path) -> None:
    split = Split(["a", "b", "c"], torch.tensor([0, 1, 2]))
    batch = make_task().batch(split, torch.tensor([2, 0]), torch.device("cpu"))
    assert batch.inputs == ["c", "a"] and batch.targets.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": lambda rows: [7] * rows}, r"label 7 .* not in 0\.\.3"),
        ({"text": lambda rows: [1] * rows}, "column .text. is int64, not text"),
    ],
)
def test_wrong_cells_are_named(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        make_task().load(context(write_folder(tmp_path / "emotion", **columns)))


def test_missing_data_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"'emotion' .*no data root.*--data-root"):
        make_task().load(context(None))
    folder = write_folder(tmp_path / "emotion")
    (folder / "test.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"test\.parquet.*classes\.json"):
        make_task().load(context(folder))
    with pytest.raises(ContractError, match="no column 'words'; has text, label"):
        make_task(text_column="words").load(context(write_folder(tmp_path / "emotion")))


@pytest.mark.shared
def test_real_emotion_is_complete(shared: Path) -> None:
    task = make_task(max_train=600, max_test=60)
    splits = task.load(context(shared / "data" / "emotion"))
    assert task.classes == ["sadness", "joy", "love", "anger", "fear", "surprise"] and task.partial == ""
    assert {n: len(s) for n, s in splits.items()} == {"train": 600, "tuning": 1600, "test": 60}
