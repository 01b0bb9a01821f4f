"""What tasks read from a local folder share, whatever their modality: rows, splits, class names that are stored."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergesec.contracts import ContractError, Split, Task, Weights
from mergesec_tasks._tables import (
    listed,
    once_only,
    parquet_class_names,
    read_text,
    shown,
    split_files,
)

TUNING_SHARE, TUNING_LEAST, TUNING_SEED = 0.1, 100, 0
CLASSES_KEY = "meta/classes"
LONGEST_NAME = 200


def stratified(targets: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` row numbers in ascending order, each class in its share (largest remainders first).

    Every class keeps its proportion to within one row; all rows if ``count`` is at least their number.
    """
    if count >= len(targets):
        return torch.arange(len(targets))
    order = torch.randperm(len(targets), generator=generator)
    sizes = torch.bincount(targets, minlength=1)
    exact = sizes.double() * count / len(targets)
    quota = exact.floor().long()
    spare = torch.argsort(exact - quota, descending=True, stable=True)[: count - int(quota.sum())]
    quota[spare] += 1
    chosen = [order[targets[order] == label][:share] for label, share in enumerate(quota.tolist())]
    return torch.cat(chosen).sort().values


def capped(targets: Tensor, limit: int) -> Tensor:
    """Which rows stay under a limit (0 = none): stratified, the same every time."""
    return stratified(targets, limit or len(targets), torch.Generator().manual_seed(TUNING_SEED))


def split_tuning(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (train, tuning): a tenth of the training rows, at least 100, stratified, the same every time."""
    count = max(round(TUNING_SHARE * len(targets)), TUNING_LEAST)
    if count >= len(targets):
        raise ContractError(f"{len(targets)} training rows leave none after {count} for tuning")
    tuning = stratified(targets, count, torch.Generator().manual_seed(TUNING_SEED))
    keep = torch.ones(len(targets), dtype=torch.bool)
    keep[tuning] = False
    return torch.nonzero(keep).flatten(), tuning


def bare(classes: Sequence[str], targets: Mapping[str, Tensor]) -> list[str]:
    """Per split, how many classes have no row in it, in words; nothing if none."""
    found = []
    for split, labels in targets.items():
        if lacking := int((torch.bincount(labels, minlength=len(classes)) == 0).sum()):
            found.append(f"{lacking} of {len(classes)} classes without a row in {split}")
    return found


def class_names(path: Path, key: str) -> list[str]:
    """The list ``key`` of a ``classes.json``; a list by itself is its "classes".

    ContractError unless it is a list of different names.
    """
    try:
        content = json.loads(read_text(path), object_pairs_hook=once_only)
    except (ValueError, RecursionError) as error:
        if isinstance(error, ContractError):
            raise
        raise ContractError(f"{path}: not JSON ({str(error)[:100]})") from None
    if isinstance(content, list):
        content = {"classes": content}
    if not isinstance(content, dict):
        raise ContractError(f"{path}: {type(content).__name__}, not {{{key!r}: [names]}}")
    names = content.get(key)
    if not isinstance(names, list) or not names:
        raise ContractError(f"{path}: no list '{key}'; has {listed(list(content))}")
    return checked_names(names, f"{path}: '{key}'")


def checked_names(names: Sequence[Any], where: str) -> list[str]:
    """Names of classes as text. ContractError for what is no name, and for one that is there twice."""
    known: dict[str, int] = {}
    for label, name in enumerate(names):
        if not isinstance(name, str | int) or isinstance(name, bool):
            raise ContractError(f"{where}: class {label} is {shown(name)}, not a name")
        text = name if isinstance(name, str) else shown(name)
        if not text.strip() or len(text) > LONGEST_NAME:
            raise ContractError(f"{where}: class {label} has a name of {len(text.strip())} letters")
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in text):
            raise ContractError(
                f"{where}: class {label} has a sign in its name that is no letter: {shown(text)}"
            )
        other = known.setdefault(same_name(text), label)
        if other != label:
            raise ContractError(f"{where}: classes {other} and {label} are both named {shown(text)}")
    return [name if isinstance(name, str) else shown(name) for name in names]


def _told_names(files: Sequence[Path], label_column: str) -> list[str]:
    """The names of classes that parquet files tell themselves; none if none does."""
    told: list[str] = []
    for file in files:
        if file.suffix != ".parquet" or not (own := parquet_class_names(file, label_column)):
            continue
        names = checked_names(own, f"{file}: column '{label_column}'")
        if told and told != names:
            raise ContractError(
                f"{file}: names other classes ({listed(names)}) than {files[0]} ({listed(told)})"
            )
        told = names
    return told


def same_name(name: str) -> str:
    """What two spellings of a name share: composed letters, no spaces around."""
    return unicodedata.normalize("NFC", name).strip()


class FolderSplits(Task):
    """A task whose files lie in a folder of the user's. To be named before the task's modality among the bases.

    Class names travel with the stored tensors, so that a cached split knows its head's size.
    """

    layout: ClassVar[str] = "expected <data root>/<task>/train.parquet, test.parquet and classes.json"
    page: ClassVar[str]
    """Where the layout is written down."""
    kinds: ClassVar[tuple[str, ...]] = ("parquet",)
    """Endings of the tables that it reads."""
    classes: Sequence[str] = ()

    def _file(self, folder: str | None, name: str) -> Path:
        if folder is None:
            raise FileNotFoundError(
                f"task '{self.name}' is read from a local folder and no data root is set; {self.layout}. "
                "Set --data-root or MERGESEC_DATA"
            )
        path = Path(folder) / name
        if not path.is_file():
            there = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
            has = f" (there: {listed(there)})" if there else ""
            raise FileNotFoundError(
                f"task '{self.name}': no file '{path}'{has}; {self.layout}. The project ships no real data: "
                f"convert the official release to this layout ({self.page}), then set --data-root"
            )
        return path

    def _tables(self, folder: str | None) -> dict[str, list[Path]]:
        """The files of ``train`` and ``test``; none where a split has none."""
        home = Path(folder) if folder is not None else None
        there = home is not None and home.is_dir()
        return {
            split: split_files(home, split, self.kinds) if home and there else []
            for split in ("train", "test")
        }

    def _check_present(self, folder: str | None, tables: Mapping[str, Sequence[Path]]) -> None:
        """FileNotFoundError if a split has no file."""
        for split, files in tables.items():
            if not files:
                self._file(folder, f"{split}.{self.kinds[0]}")

    def _class_names(
        self, folder: str | None, key: str, label_column: str, tables: Mapping[str, Sequence[Path]]
    ) -> list[str]:
        """Names from ``classes.json``, else those that ``datasets`` wrote into the parquet files.

        ContractError if files tell different orders of the same names.
        """
        told = _told_names([file for files in tables.values() for file in files], label_column)
        if told and folder is not None and not (Path(folder) / "classes.json").exists():
            return told
        path = self._file(folder, "classes.json")
        names = class_names(path, key)
        if told and told != names and (len(told) != len(names) or sorted(told) == sorted(names)):
            raise ContractError(
                f"{path}: {len(names)} classes, where the parquet files name {len(told)} in another order "
                f"({listed(told)})"
            )
        return names

    def pack(self, splits: Mapping[str, Split]) -> dict[str, Tensor]:
        names = bytearray(json.dumps(list(self.classes)).encode())
        return {**super().pack(splits), CLASSES_KEY: torch.frombuffer(names, dtype=torch.uint8)}

    def unpack(self, tensors: Weights) -> dict[str, Split]:
        self.classes = list(json.loads(bytes(tensors[CLASSES_KEY].tolist())))
        return super().unpack({n: t for n, t in tensors.items() if n != CLASSES_KEY})
