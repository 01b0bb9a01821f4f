"""Tasks from local folders: splits, formats, messages."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mergesec.contracts import ContractError, DataContext
from mergesec_tasks.vision.folder import CARDS, FolderTask, split_tuning, stratified

pandas = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")


def encoded(shade: int, mode: str = "RGB", side: int = 20, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (side, side), shade if mode == "L" else (shade, 0, 255 - shade)).save(stream, kind)
    return stream.getvalue()


def write_folder(folder: Path, train: int = 300, test: int = 40, classes: int = 4, **columns: Any) -> Path:
    """Row i has class i mod K, shade i mod 256, so that every image tells which row it was."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("test", test)):
        frame = {
            "image": [encoded(i % 256) for i in range(rows)],
            "label": [i % classes for i in range(rows)],
            "coarse_label": [i % 2 for i in range(rows)],
        }
        frame |= {key: make(rows) for key, make in columns.items()}
        pandas.DataFrame(frame).to_parquet(folder / f"{name}.parquet")
    names = {"classes": [f"class {i}" for i in range(classes)], "coarse_classes": ["even", "odd"]}
    (folder / "classes.json").write_text(json.dumps(names))
    return folder


def make_task(name: str = "dtd", **given: Any) -> FolderTask:
    defaults = {"size": 16, "max_train": 0, "max_test": 0, "image_column": "image", "label_column": "label"}
    task = FolderTask(**{**defaults, **given})
    task.name = name
    return task


def context(folder: Path | None) -> DataContext:
    return DataContext(torch.device("cpu"), 0, None if folder is None else str(folder))


def test_splits_are_disjoint_complete_and_stratified(tmp_path: Path) -> None:
    splits = make_task().load(context(write_folder(tmp_path / "dtd", train=240)))
    assert {n: len(s) for n, s in splits.items()} == {"train": 140, "tuning": 100, "test": 40}
    shades = {n: s.inputs[:, 0, 0, 0].tolist() for n, s in splits.items()}
    assert sorted(shades["train"] + shades["tuning"]) == list(range(240))
    assert torch.bincount(splits["tuning"].targets).tolist() == [25, 25, 25, 25]
    for split in splits.values():
        assert split.inputs.dtype == torch.uint8
        assert split.inputs.shape[1:] == (3, 16, 16)
        assert (split.inputs[:, 0, 0, 0].long() % 4 == split.targets).all()
    again = make_task().load(context(tmp_path / "dtd"))
    assert all(torch.equal(again[n].inputs, s.inputs) for n, s in splits.items())


def test_tuning_never_comes_from_test(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "dtd", train=200, test=60)
    frame = pandas.read_parquet(folder / "test.parquet")
    frame["image"] = [encoded(250) for _ in range(len(frame))]
    frame.to_parquet(folder / "test.parquet")
    splits = make_task().load(context(folder))
    assert (splits["test"].inputs[:, 0] == 250).all()
    assert not (splits["tuning"].inputs[:, 0, 0, 0] == 250).any()


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.integers(0, 90), st.integers(0, 3))
def test_stratified_keeps_every_share_to_within_a_row(labels: list[int], count: int, seed: int) -> None:
    targets = torch.tensor(labels)
    rows = stratified(targets, count, torch.Generator().manual_seed(seed))
    assert len(rows) == min(count, len(labels))
    assert rows.unique().tolist() == rows.tolist()
    for label in set(labels):
        exact = labels.count(label) * min(count, len(labels)) / len(labels)
        assert abs(int((targets[rows] == label).sum()) - exact) < 1


def test_tuning_size() -> None:
    for rows, wanted in ((4000, 400), (960, 100), (101, 100)):
        train, tuning = split_tuning(torch.arange(rows) % 5)
        assert (len(train), len(tuning)) == (rows - wanted, wanted)
        assert not set(train.tolist()) & set(tuning.tolist())
    with pytest.raises(ContractError, match="100 training rows"):
        split_tuning(torch.zeros(100, dtype=torch.int64))


def test_limits_keep_the_tuning_split(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "dtd")
    whole = make_task().load(context(folder))
    less = make_task(max_train=20, max_test=8).load(context(folder))
    assert (len(less["train"]), len(less["test"])) == (20, 8)
    assert torch.bincount(less["train"].targets).tolist() == [5, 5, 5, 5]
    assert torch.equal(less["tuning"].inputs, whole["tuning"].inputs)


def test_other_label_column_grey_images_and_image_structs(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path / "cars",
        image=lambda rows: [{"bytes": encoded(i % 256, "L", 16, "JPEG"), "path": None} for i in range(rows)],
    )
    task = make_task("stanford_cars", label_column="coarse_label")
    splits = task.load(context(folder))
    assert task.classes == ["even", "odd"]
    pixels = splits["test"].inputs
    assert torch.equal(pixels[:, 0], pixels[:, 1])
    assert (pixels[:, 0, 0, 0].long() - torch.arange(40)).abs().max() <= 3


def test_class_names_travel_with_the_stored_splits(tmp_path: Path) -> None:
    task = make_task()
    splits = task.load(context(write_folder(tmp_path / "dtd")))
    packed = task.pack(splits)
    assert all(isinstance(tensor, torch.Tensor) for tensor in packed.values())
    other = make_task()
    restored = other.unpack(packed)
    assert other.classes == task.classes == ["class 0", "class 1", "class 2", "class 3"]
    assert set(restored) == {"train", "tuning", "test"}
    assert torch.equal(restored["test"].inputs, splits["test"].inputs)


def test_partial_sets_are_told(tmp_path: Path) -> None:
    task = make_task("dtd")
    task.load(context(write_folder(tmp_path / "dtd")))
    assert task.partial == "4 of 47 classes, 340 of 5640 images"
    own = make_task("my-own")
    own.load(context(tmp_path / "dtd"))
    assert own.partial == ""


@pytest.mark.parametrize("missing", ["classes.json", "train.parquet", "test.parquet"])
def test_missing_files_are_named(tmp_path: Path, missing: str) -> None:
    folder = write_folder(tmp_path / "gtsrb")
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=rf"'gtsrb'.*{missing}.*train.parquet.*--data-root"):
        make_task("gtsrb").load(context(folder))


def test_no_data_root_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"'gtsrb'.*no data root is set.*MERGESEC_DATA"):
        make_task("gtsrb").load(context(None))


@pytest.mark.parametrize(
    ("given_parameters", "columns", "message"),
    [
        ({"image_column": "img"}, {}, "no column 'img'; has image, label"),
        ({"label_column": "fine_label"}, {}, "no list 'fine_classes'"),
        ({}, {"label": lambda rows: list(range(rows))}, r"label 4 .*not in 0\.\.3"),
        ({}, {"image": lambda rows: [b"nonsense"] * rows}, "row 0 holds no readable image"),
    ],
)
def test_wrong_contents_are_named(
    tmp_path: Path, given_parameters: dict[str, Any], columns: dict[str, Any], message: str
) -> None:
    folder = write_folder(tmp_path / "dtd", **columns)
    with pytest.raises(ContractError, match=message):
        make_task(**given_parameters).load(context(folder))


def test_cards_agree_on_their_parameters() -> None:
    assert len({card["name"] for card in CARDS}) == len(CARDS)
    for card in CARDS:
        assert card["local"] is True
        assert sum(card["images"].values()) > 0
        assert card["parameters"] == CARDS[0]["parameters"]
