"""Where images come from beside parquet files: a folder per class, and the Hugging Face hub at a commit."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergesec.contracts import ContractError
from mergesec.errors import nearest
from mergesec_tasks._folder import checked_names, same_name
from mergesec_tasks._hub import dataset_files
from mergesec_tasks._tables import check_shards, image_cells, linked, listed, read_table

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".tif", ".tiff", ".webp")
NOTES = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".md", ".html")
"""Endings of files beside the images that are read over."""
SYSTEM = {
    "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "$recycle.bin",
    "system volume information", "lost+found", "__pycache__",
}  # fmt: skip
"""What operating systems leave in folders, beside names that begin with a dot."""
DEEPEST = 32
LARGEST = 2**30
"""Bytes of an encoded image; the most pixels that are read take less, whatever their format."""
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Rows:
    """Encoded images and labels int64 ``[N]`` of one split, and where a row stands."""

    images: Sequence[bytes]
    targets: Tensor
    place: Callable[[int], str]


@dataclass(frozen=True)
class Source:
    """Class names and the rows of ``train`` and ``test``."""

    classes: list[str]
    train: Rows
    test: Rows


class Files(Sequence[bytes]):
    """Files read when asked for, so that a large folder does not lie in memory encoded."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths

    def __getitem__(self, index: Any) -> Any:
        path = self._paths[index]
        try:
            if (size := path.stat().st_size) > LARGEST:
                raise ContractError(f"{path}: {size} bytes; an image has at most {LARGEST}")
            return path.read_bytes()
        except OSError as error:
            raise ContractError(f"{path}: cannot be read ({error.strerror})") from None

    def __len__(self) -> int:
        return len(self._paths)

    def place(self, row: int) -> str:
        return str(self._paths[row])


def from_tables(
    files: Mapping[str, Sequence[Path]], classes: list[str], images: str, label_column: str
) -> Source:
    """Parquet files of each split."""
    rows = {}
    for split in SPLITS:
        table = read_table(files[split], image_cells(images), label_column, len(classes))
        rows[split] = Rows(table.cells, table.targets, table.place)
    return Source(classes, rows["train"], rows["test"])


# --------------------------------------------------------------------------- a folder per class


def is_system(name: str) -> bool:
    """Hidden, or an operating system's own."""
    return name.startswith(".") or name.casefold() in SYSTEM


def _class_folders(folder: Path) -> list[Path]:
    """Folders of a split that stand for classes, sorted. ContractError for images beside them, and links."""
    found = []
    for path in sorted(folder.iterdir()):
        if is_system(path.name):
            continue
        if path.is_dir():
            if path.is_symlink():
                raise ContractError(linked(path))
            found.append(path)
        elif path.suffix.lower() in IMAGES:
            raise ContractError(f"{path}: an image outside of the folders of classes")
    return found


def has_class_folders(folder: Path) -> bool:
    """Whether ``folder`` has ``train/<class>/`` or ``test/<class>/``."""
    return any(
        p.is_dir() and not is_system(p.name)
        for split in SPLITS
        if (folder / split).is_dir()
        for p in (folder / split).iterdir()
    )


def from_class_folders(folder: Path, names: list[str] | None) -> Source:
    """``train/<class>/*.jpg`` and ``test/<class>/*.jpg``; classes are ``names``, or the folders, sorted.

    ContractError for a folder that is no class, a class without images in a split, two folders of one name,
    and files that are neither images nor notes.
    """
    for split in SPLITS:
        if not (folder / split).is_dir():
            raise ContractError(f"{folder}: no folder '{split}' beside the other split's")
        if (folder / split).is_symlink():
            raise ContractError(linked(folder / split))
    places = {split: _class_folders(folder / split) for split in SPLITS}
    if names is None:
        names = sorted({p.name for found in places.values() for p in found})
        _check_spellings(folder, names)
    labels = {same_name(name): label for label, name in enumerate(names)}
    rows = {split: _split_rows(folder / split, places[split], names, labels) for split in SPLITS}
    return Source(list(names), rows["train"], rows["test"])


def _check_spellings(folder: Path, names: Sequence[str]) -> None:
    """ContractError if two folders differ only by case, spaces around, or how letters are composed."""
    checked_names(names, str(folder))
    known: dict[str, str] = {}
    for name in names:
        other = known.setdefault(same_name(name).casefold(), name)
        if other != name:
            raise ContractError(
                f"{folder}: classes {other!r} and {name!r} differ by case only; one class has one name (if they "
                "are two, list both in classes.json)"
            )


def _split_rows(split: Path, places: Sequence[Path], names: Sequence[str], labels: Mapping[str, int]) -> Rows:
    """Images of the class folders ``places``, every class present once."""
    paths: list[Path] = []
    found: list[int] = []
    taken: dict[int, Path] = {}
    for place in places:
        label = labels.get(same_name(place.name))
        if label is None:
            close = nearest(place.name, names)
            raise ContractError(f"{place}: '{place.name}' is not one of the {len(names)} classes{close}")
        if label in taken:
            raise ContractError(f"{place}: the class of {taken[label]} once more")
        images = _images(place)
        if not images:
            raise ContractError(f"{place}: no image ({', '.join(IMAGES)}); a class needs some in each split")
        taken[label] = place
        paths += images
        found += [label] * len(images)
    lacking = [name for label, name in enumerate(names) if label not in taken]
    if lacking:
        raise ContractError(
            f"{split}: no folder for {len(lacking)} of {len(names)} classes: {listed(lacking)}"
        )
    files = Files(paths)
    return Rows(files, torch.tensor(found, dtype=torch.int64), files.place)


def _images(place: Path) -> list[Path]:
    """All images below a class folder, sorted. ContractError for what is neither image nor note."""
    found: list[Path] = []

    def stop(error: OSError) -> None:
        raise ContractError(f"{error.filename}: cannot be read ({error.strerror})")

    for at, folders, files in os.walk(place, onerror=stop):
        here = Path(at)
        folders[:] = [name for name in folders if not is_system(name)]
        if len(here.parts) - len(place.parts) > DEEPEST:
            raise ContractError(f"{place}: folders nested more than {DEEPEST} deep")
        for name in folders:
            if (here / name).is_symlink():
                raise ContractError(linked(here / name))
        for name in files:
            path = here / name
            suffix = path.suffix.lower()
            if is_system(name) or suffix in NOTES:
                continue
            if suffix not in IMAGES:
                raise ContractError(
                    f"{path}: neither an image ({', '.join(IMAGES)}) nor a note ({', '.join(NOTES)})"
                )
            if not path.is_file():
                raise ContractError(f"{path}: not a regular file, nor a link to one")
            found.append(path)
    return sorted(found)


# --------------------------------------------------------------------------- the hub


class _Column(Sequence[bytes]):
    """Encoded images of a hub data set, read when asked for."""

    def __init__(self, rows: Any, column: str, where: str) -> None:
        self._rows, self._column, self._where = rows, column, where

    def place(self, row: int) -> str:
        return f"{self._where}: row {row} of column '{self._column}'"

    def __getitem__(self, index: Any) -> Any:
        cell = self._rows[int(index)][self._column] or {}
        if cell.get("bytes") is None and not cell.get("path"):
            raise ContractError(f"{self.place(index)} is null")
        return cell["bytes"] if cell.get("bytes") is not None else Path(cell["path"]).read_bytes()

    def __len__(self) -> int:
        return len(self._rows)


def from_hub(
    hub: Mapping[str, Any], revision: str, image_column: str, label_column: str, task: str, looked: str
) -> Source:
    """The hub's copy at ``revision``, through ``datasets``. FileNotFoundError with one message otherwise."""
    name = str(hub["name"])
    try:
        import datasets
    except ImportError:
        raise FileNotFoundError(
            f"{looked}. To fetch {name} from the hub instead: pip install 'mergesec[hub]'"
        ) from None
    rows = {}
    classes: list[str] = []
    for split in SPLITS:
        pattern = str(hub["files"]).format(split=split)
        try:
            files = dataset_files(name, revision, pattern, f"task '{task}'")
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{looked}. {error}") from None
        check_shards(files)
        try:
            found = datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train")
        except Exception as error:  # whatever the library calls a file that it cannot read
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            raise ContractError(f"{name}: {files[0].parent} holds no readable parquet ({reason})") from None
        for column in (image_column, label_column):
            if column not in found.column_names:
                raise ContractError(f"{name}: no column '{column}'; has {', '.join(found.column_names)}")
        classes = [str(c) for c in getattr(found.features[label_column], "names", None) or []]
        if not classes:
            raise ContractError(f"{name}: column '{label_column}' does not name its classes")
        encoded = found.cast_column(image_column, datasets.Image(decode=False))
        labels = found[label_column][:]
        wrong = next((i for i, x in enumerate(labels) if x is None or not 0 <= x < len(classes)), None)
        if wrong is not None:
            raise ContractError(
                f"{name} {split}: label {labels[wrong]} in column '{label_column}' is not in "
                f"0..{len(classes) - 1} (row {wrong})"
            )
        images = _Column(encoded, image_column, f"{name} {split}")
        rows[split] = Rows(images, torch.tensor(labels, dtype=torch.int64), images.place)
    return Source(classes, rows["train"], rows["test"])


@lru_cache(maxsize=1)
def _known() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((Path(__file__).parent / "classes.json").read_text(encoding="utf-8"))
    return content


def official_classes(task: str) -> list[str]:
    """The official classes of a set in the order of its labels; empty for a set that is not among the eight."""
    return list(_known().get(task, {}).get("names", []))


def phrase(task: str, name: str) -> str:
    """What a prompt calls a class: Radford et al.'s words where they differ, else the name in plain writing."""
    known: Mapping[str, str] = _known().get(task, {}).get("phrases", {})
    return known.get(name) or name.replace("_", " ").replace("/", " ").strip()
