"""A folder per class: what operating systems leave there, names, links, and what is no image."""

from __future__ import annotations

import io
import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mergesec.contracts import ContractError, DataContext
from mergesec.files import fingerprint
from mergesec_tasks.vision import _sources
from mergesec_tasks.vision._sources import from_class_folders
from mergesec_tasks.vision.folder import FolderTask


@pytest.fixture(autouse=True)
def _own_fingerprints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGESEC_CACHE", str(tmp_path / "cache"))


def encoded(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def write(
    folder: Path, classes: tuple[str, ...] = ("ant", "bee", "cat"), train: int = 40, test: int = 2
) -> Path:
    """An image of class i has the shade i."""
    for split, rows in (("train", train), ("test", test)):
        for label, name in enumerate(classes):
            place = folder / split / name
            place.mkdir(parents=True)
            for row in range(rows):
                (place / f"{row:02}.png").write_bytes(encoded(label))
    return folder


def load(folder: Path, **given: Any) -> tuple[FolderTask, dict[str, Any]]:
    task = FolderTask(8, 0, 0, "image", "label", **given)
    task.name = "own"
    return task, task.load(DataContext(torch.device("cpu"), 0, str(folder)))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        load(folder)


LEFT = [
    "train/.ipynb_checkpoints/", "test/__MACOSX/ant/._00.png", "train/.DS_Store", "train/ant/.DS_Store",
    "train/ant/._00.png", "train/bee/Thumbs.db", "test/cat/desktop.ini", "train/ant/.ipynb_checkpoints/00.png",
    "train/@eaDir/ant/00.png", "train/bee/__MACOSX/x.png", "train/README.md", "test/ant/GT-00000.csv",
]  # fmt: skip


def test_what_systems_and_people_leave_is_no_class_and_no_image(tmp_path: Path) -> None:
    _, clean = load(write(tmp_path / "clean"))
    folder = write(tmp_path / "used")
    for name in LEFT:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name.endswith("/") else path.write_bytes(b"not an image")
    task, used = load(folder)
    assert task.classes == ["ant", "bee", "cat"]
    for name, split in clean.items():
        assert torch.equal(used[name].inputs, split.inputs) and torch.equal(used[name].targets, split.targets)
        assert torch.equal(split.inputs[:, 0, 0, 0].long(), split.targets)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_missing_from_a_split_is_named(tmp_path: Path, split: str) -> None:
    folder = write(tmp_path / "own")
    (folder / split / "bee").rename(tmp_path / "away")
    refused(folder, rf"own/{split}: no folder for 1 of 3 classes: bee")
    (folder / split / "bee").mkdir()
    refused(folder, rf"{split}/bee: no image \(.*a class needs some in each split")


def test_a_split_missing_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "own")
    (folder / "test").rename(tmp_path / "away")
    refused(folder, "own: no folder 'test'")


def test_names_of_classes_json_without_a_folder_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "own")
    (folder / "classes.json").write_text(json.dumps({"classes": ["ant", "bee", "cat", "dog"]}))
    refused(folder, "no folder for 1 of 4 classes: dog")
    (folder / "classes.json").write_text(json.dumps({"classes": ["ant", "bees", "cat"]}))
    refused(folder, r"'bee' is not one of the 3 classes; did you mean 'bees'\?")


def test_a_class_of_two_spellings_is_refused_unless_both_are_meant(tmp_path: Path) -> None:
    folder = write(tmp_path / "own", ("ant", "bee"))
    (folder / "test" / "bee").rename(folder / "test" / "Bee")
    refused(folder, "classes 'Bee' and 'bee' differ by case only")
    letters = write(tmp_path / "letters", ("A", "a", "b"))
    refused(letters, "'A' and 'a' differ by case only")
    (letters / "classes.json").write_text(json.dumps(["A", "a", "b"]))
    assert load(letters)[0].classes == ["A", "a", "b"]


def test_composed_letters_are_one_name(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    folder = write(tmp_path / "own", ("ant", apart), train=60)
    (folder / "classes.json").write_text(json.dumps({"classes": ["ant", composed]}))
    task, splits = load(folder)  # macOS stores names apart, files have them composed
    assert task.classes == ["ant", composed]
    assert torch.equal(splits["test"].inputs[:, 0, 0, 0].long(), splits["test"].targets)
    (folder / "classes.json").unlink()
    (folder / "test" / apart).rename(folder / "test" / composed)
    refused(folder, "are both named")


def test_files_that_are_no_images_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "own")
    (folder / "train" / "ant" / "photo.heic").write_bytes(b"")
    refused(folder, r"ant/photo\.heic: neither an image \(\.jpg")
    (folder / "train" / "ant" / "photo.heic").rename(folder / "train" / "loose.png")
    refused(folder, r"train/loose\.png: an image outside of the folders of classes")
    (folder / "train" / "loose.png").rename(folder / "train" / "bee" / "40.png")
    refused(folder, r"train/bee/40\.png holds no readable image")


def test_links_fifos_and_devices_are_named_and_do_not_hang(tmp_path: Path) -> None:
    folder = write(tmp_path / "own")
    odd = folder / "train" / "ant" / "odd.png"
    os.mkfifo(odd)
    refused(folder, r"odd\.png: not a regular file")
    odd.unlink()
    for target in ("/dev/zero", "gone.png", "odd.png"):
        odd.symlink_to(target)
        refused(folder, r"odd\.png: not a regular file")
        odd.unlink()
    odd.symlink_to("00.png")  # a link to an image is an image
    assert sum(len(split) for split in load(folder)[1].values()) == 127
    odd.unlink()
    for place, target in (("train/dog", "ant"), ("train/ant/more", ".."), ("train/ant/more", "../bee")):
        (folder / place).symlink_to(target)
        refused(folder, rf"{place}: a link to a folder")
        (folder / place).unlink()
    (folder / "test").rename(tmp_path / "elsewhere")
    (folder / "test").symlink_to(tmp_path / "elsewhere")
    refused(folder, r"own/test: a link to a folder")


def test_a_link_to_the_whole_task_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "real")
    (tmp_path / "own").symlink_to(folder)
    assert load(tmp_path / "own")[0].classes == ["ant", "bee", "cat"]
    assert fingerprint(tmp_path / "own") == fingerprint(folder)


def test_folders_nested_without_end(tmp_path: Path) -> None:
    folder = write(tmp_path / "own")
    (folder / "train" / "ant" / "/".join(["a"] * 30)).mkdir(parents=True)
    assert load(folder)[0].classes == ["ant", "bee", "cat"]
    (folder / "train" / "ant" / "/".join(["a"] * 400)).mkdir(parents=True)
    refused(folder, "nested more than 32 deep")


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    folder = write(tmp_path / "own")
    os.rename(folder / "train" / "bee", os.fsencode(folder / "train") + b"/b\xe9e")
    refused(folder, "class 2 has a sign in its name that is no letter")


def test_an_image_whose_name_is_no_text_is_an_image(tmp_path: Path) -> None:
    folder = write(tmp_path / "own")
    before = fingerprint(folder)
    os.rename(folder / "test" / "bee" / "00.png", os.fsencode(folder / "test" / "bee") + b"/\xe9.png")
    assert fingerprint(folder) != before
    assert len(load(folder)[1]["test"]) == 6


def test_a_file_larger_than_any_image(tmp_path: Path) -> None:
    folder = write(tmp_path / "own")
    with (folder / "train" / "ant" / "00.png").open("r+b") as file:
        file.truncate(2**30 + 1)
    refused(folder, r"ant/00\.png: 1073741825 bytes")


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "own")
    read = Path.read_bytes

    def denied(path: Path) -> bytes:
        if path.name == "07.png":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(_sources.Path, "read_bytes", denied)
    refused(folder, r"07\.png: cannot be read \(Permission denied\)")


def test_tables_beside_folders_of_classes_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "own")
    (folder / "train.parquet").write_bytes(b"PAR1")
    refused(folder, r"own: train\.parquet and folders of classes; keep one")
    (folder / "train.parquet").unlink()
    assert from_class_folders(folder, None).classes == ["ant", "bee", "cat"]
