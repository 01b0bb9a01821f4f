"""Image classification tasks from local folders: ``<root>/<task>/{train,test}.parquet`` + ``classes.json``.

Columns: an image column with encoded bytes (JPEG, PNG) and an integer label column. Nothing is
downloaded and no data ships with the project.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergesec.classification import ClassificationTask
from mergesec.contracts import ContractError, DataContext, Split, Weights

CARDS: list[dict[str, Any]] = [
    {
        "name": "mnist",
        "kind": "task",
        "class": "FolderTask",
        "version": "1",
        "title": "MNIST",
        "paper": "LeCun et al., Gradient-based learning applied to document recognition, 1998",
        "url": "http://yann.lecun.com/exdb/mnist/",
        "summary": "handwritten digits",
        "modality": "image",
        "classes": 10,
        "source": "local folder",
        "licence": "CC BY-SA 3.0",
        "local": True,
        "images": {"train": 60000, "test": 10000},
        "parameters": {
            "size": {"type": "int", "default": 64, "min": 8, "max": 1024, "doc": "stored image side, pixels"},
            "max_train": {"type": "int", "default": 0, "min": 0, "doc": "training rows kept; 0 = all"},
            "max_test": {"type": "int", "default": 0, "min": 0, "doc": "test rows kept; 0 = all"},
            "image_column": {"type": "str", "default": "image", "doc": "column of encoded images"},
            "label_column": {"type": "str", "default": "label", "doc": "column of integer labels"},
        },
    },
    {
        "name": "gtsrb",
        "kind": "task",
        "class": "FolderTask",
        "version": "1",
        "title": "GTSRB",
        "paper": "Stallkamp et al., The German traffic sign recognition benchmark, IJCNN 2011",
        "url": "https://benchmark.ini.rub.de/gtsrb_dataset.html",
        "summary": "German traffic signs",
        "modality": "image",
        "classes": 43,
        "source": "local folder",
        "licence": "research benchmark, no licence text",
        "local": True,
        "images": {"train": 39209, "test": 12630},
        "parameters": {
            "size": {"type": "int", "default": 64, "min": 8, "max": 1024, "doc": "stored image side, pixels"},
            "max_train": {"type": "int", "default": 0, "min": 0, "doc": "training rows kept; 0 = all"},
            "max_test": {"type": "int", "default": 0, "min": 0, "doc": "test rows kept; 0 = all"},
            "image_column": {"type": "str", "default": "image", "doc": "column of encoded images"},
            "label_column": {"type": "str", "default": "label", "doc": "column of integer labels"},
        },
    },
    {
        "name": "sun397",
        "kind": "task",
        "class": "FolderTask",
        "version": "1",
        "title": "SUN397",
        "paper": "Xiao et al., SUN database, CVPR 2010",
        "url": "https://vision.princeton.edu/projects/2010/SUN/",
        "summary": "scenes",
        "modality": "image",
        "classes": 397,
        "source": "local folder",
        "licence": "research use",
        "local": True,
        "images": {"train": 19850, "test": 19850},
        "parameters": {
            "size": {"type": "int", "default": 64, "min": 8, "max": 1024, "doc": "stored image side, pixels"},
            "max_train": {"type": "int", "default": 0, "min": 0, "doc": "training rows kept; 0 = all"},
            "max_test": {"type": "int", "default": 0, "min": 0, "doc": "test rows kept; 0 = all"},
            "image_column": {"type": "str", "default": "image", "doc": "column of encoded images"},
            "label_column": {"type": "str", "default": "label", "doc": "column of integer labels"},
        },
    },
    {
        "name": "stanford_cars",
        "kind": "task",
        "class": "FolderTask",
        "version": "1",
        "title": "Stanford Cars",
        "paper": "Krause et al., 3D object representations for fine-grained categorization, 3dRR 2013",
        "url": "https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
        "summary": "car models; label_column coarse_label for body types",
        "modality": "image",
        "classes": 196,
        "source": "local folder",
        "licence": "non-commercial research",
        "local": True,
        "images": {"train": 8144, "test": 8041},
        "parameters": {
            "size": {"type": "int", "default": 64, "min": 8, "max": 1024, "doc": "stored image side, pixels"},
            "max_train": {"type": "int", "default": 0, "min": 0, "doc": "training rows kept; 0 = all"},
            "max_test": {"type": "int", "default": 0, "min": 0, "doc": "test rows kept; 0 = all"},
            "image_column": {"type": "str", "default": "image", "doc": "column of encoded images"},
            "label_column": {"type": "str", "default": "label", "doc": "column of integer labels"},
        },
    },
    {
        "name": "resisc45",
        "kind": "task",
        "class": "FolderTask",
        "version": "1",
        "title": "RESISC45",
        "paper": "Cheng et al., Remote sensing image scene classification, Proc. IEEE 2017",
        "url": "https://gcheng-nwpu.github.io/",
        "summary": "aerial scenes",
        "modality": "image",
        "classes": 45,
        "source": "local folder",
        "licence": "research use",
        "local": True,
        "images": {"total": 31500},
        "parameters": {
            "size": {"type": "int", "default": 64, "min": 8, "max": 1024, "doc": "stored image side, pixels"},
            "max_train": {"type": "int", "default": 0, "min": 0, "doc": "training rows kept; 0 = all"},
            "max_test": {"type": "int", "default": 0, "min": 0, "doc": "test rows kept; 0 = all"},
            "image_column": {"type": "str", "default": "image", "doc": "column of encoded images"},
            "label_column": {"type": "str", "default": "label", "doc": "column of integer labels"},
        },
    },
    {
        "name": "eurosat",
        "kind": "task",
        "class": "FolderTask",
        "version": "1",
        "title": "EuroSAT",
        "paper": "Helber et al., EuroSAT, JSTARS 2019",
        "url": "https://github.com/phelber/EuroSAT",
        "summary": "Sentinel-2 land use",
        "modality": "image",
        "classes": 10,
        "source": "local folder",
        "licence": "MIT",
        "local": True,
        "images": {"total": 27000},
        "parameters": {
            "size": {"type": "int", "default": 64, "min": 8, "max": 1024, "doc": "stored image side, pixels"},
            "max_train": {"type": "int", "default": 0, "min": 0, "doc": "training rows kept; 0 = all"},
            "max_test": {"type": "int", "default": 0, "min": 0, "doc": "test rows kept; 0 = all"},
            "image_column": {"type": "str", "default": "image", "doc": "column of encoded images"},
            "label_column": {"type": "str", "default": "label", "doc": "column of integer labels"},
        },
    },
    {
        "name": "svhn",
        "kind": "task",
        "class": "FolderTask",
        "version": "1",
        "title": "SVHN",
        "paper": "Netzer et al., Reading digits in natural images, 2011",
        "url": "http://ufldl.stanford.edu/housenumbers/",
        "summary": "house numbers",
        "modality": "image",
        "classes": 10,
        "source": "local folder",
        "licence": "non-commercial",
        "local": True,
        "images": {"train": 73257, "test": 26032},
        "parameters": {
            "size": {"type": "int", "default": 64, "min": 8, "max": 1024, "doc": "stored image side, pixels"},
            "max_train": {"type": "int", "default": 0, "min": 0, "doc": "training rows kept; 0 = all"},
            "max_test": {"type": "int", "default": 0, "min": 0, "doc": "test rows kept; 0 = all"},
            "image_column": {"type": "str", "default": "image", "doc": "column of encoded images"},
            "label_column": {"type": "str", "default": "label", "doc": "column of integer labels"},
        },
    },
    {
        "name": "dtd",
        "kind": "task",
        "class": "FolderTask",
        "version": "1",
        "title": "DTD",
        "paper": "Cimpoi et al., Describing textures in the wild, CVPR 2014",
        "url": "https://www.robots.ox.ac.uk/~vgg/data/dtd/",
        "summary": "textures",
        "modality": "image",
        "classes": 47,
        "source": "local folder",
        "licence": "research use",
        "local": True,
        "images": {"train": 3760, "test": 1880},
        "parameters": {
            "size": {"type": "int", "default": 64, "min": 8, "max": 1024, "doc": "stored image side, pixels"},
            "max_train": {"type": "int", "default": 0, "min": 0, "doc": "training rows kept; 0 = all"},
            "max_test": {"type": "int", "default": 0, "min": 0, "doc": "test rows kept; 0 = all"},
            "image_column": {"type": "str", "default": "image", "doc": "column of encoded images"},
            "label_column": {"type": "str", "default": "label", "doc": "column of integer labels"},
        },
    },
    {
        "name": "aid",
        "kind": "task",
        "class": "FolderTask",
        "version": "1",
        "title": "AID",
        "paper": "Xia et al., AID: a benchmark data set for aerial scene classification, TGRS 2017",
        "url": "https://captain-whu.github.io/AID/",
        "summary": "aerial scenes",
        "modality": "image",
        "classes": 30,
        "source": "local folder",
        "licence": "not stated",
        "local": True,
        "images": {"total": 10000},
        "parameters": {
            "size": {"type": "int", "default": 64, "min": 8, "max": 1024, "doc": "stored image side, pixels"},
            "max_train": {"type": "int", "default": 0, "min": 0, "doc": "training rows kept; 0 = all"},
            "max_test": {"type": "int", "default": 0, "min": 0, "doc": "test rows kept; 0 = all"},
            "image_column": {"type": "str", "default": "image", "doc": "column of encoded images"},
            "label_column": {"type": "str", "default": "label", "doc": "column of integer labels"},
        },
    },
    {
        "name": "rsscn7",
        "kind": "task",
        "class": "FolderTask",
        "version": "1",
        "title": "RSSCN7",
        "paper": "Zou et al., Deep learning based feature selection, GRSL 2015",
        "url": "https://github.com/palewithout/RSSCN7",
        "summary": "satellite scenes",
        "modality": "image",
        "classes": 7,
        "source": "local folder",
        "licence": "research use",
        "local": True,
        "images": {"total": 2800},
        "parameters": {
            "size": {"type": "int", "default": 64, "min": 8, "max": 1024, "doc": "stored image side, pixels"},
            "max_train": {"type": "int", "default": 0, "min": 0, "doc": "training rows kept; 0 = all"},
            "max_test": {"type": "int", "default": 0, "min": 0, "doc": "test rows kept; 0 = all"},
            "image_column": {"type": "str", "default": "image", "doc": "column of encoded images"},
            "label_column": {"type": "str", "default": "label", "doc": "column of integer labels"},
        },
    },
    {
        "name": "chars74k",
        "kind": "task",
        "class": "FolderTask",
        "version": "1",
        "title": "Chars74K (natural images)",
        "paper": "de Campos et al., Character recognition in natural images, VISAPP 2009",
        "url": "http://www.ee.surrey.ac.uk/CVSSP/demos/chars74k/",
        "summary": "street-view characters; label_column label62 for all 62 classes",
        "modality": "image",
        "classes": 36,
        "source": "local folder",
        "licence": "cite the paper",
        "local": True,
        "images": {"total": 7705},
        "parameters": {
            "size": {"type": "int", "default": 64, "min": 8, "max": 1024, "doc": "stored image side, pixels"},
            "max_train": {"type": "int", "default": 0, "min": 0, "doc": "training rows kept; 0 = all"},
            "max_test": {"type": "int", "default": 0, "min": 0, "doc": "test rows kept; 0 = all"},
            "image_column": {"type": "str", "default": "image", "doc": "column of encoded images"},
            "label_column": {"type": "str", "default": "label", "doc": "column of integer labels"},
        },
    },
]

TUNING_SHARE, TUNING_LEAST, TUNING_SEED = 0.1, 100, 0
CLASSES_KEY = "meta/classes"


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


def split_tuning(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (train, tuning): a tenth of the training rows, at least 100, stratified, the same every time."""
    count = max(round(TUNING_SHARE * len(targets)), TUNING_LEAST)
    if count >= len(targets):
        raise ContractError(f"{len(targets)} training rows leave none after {count} for tuning")
    tuning = stratified(targets, count, torch.Generator().manual_seed(TUNING_SEED))
    keep = torch.ones(len(targets), dtype=torch.bool)
    keep[tuning] = False
    return torch.nonzero(keep).flatten(), tuning


def decode(images: list[bytes], size: int, where: str) -> Tensor:
    """Encoded images as uint8 ``[N, 3, size, size]``; grey becomes RGB, other sizes are resized (bicubic)."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    pixels = np.empty((len(images), size, size, 3), dtype=np.uint8)
    for row, encoded in enumerate(images):
        try:
            with Image.open(io.BytesIO(encoded)) as image:
                picture = image.convert("RGB")
        except (UnidentifiedImageError, OSError, TypeError) as error:
            raise ContractError(f"{where}: row {row} holds no readable image ({error})") from None
        if picture.size != (size, size):
            picture = picture.resize((size, size), Image.Resampling.BICUBIC)
        pixels[row] = np.asarray(picture)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


class FolderTask(ClassificationTask):
    """One task read from its own folder. ``partial`` tells a subset of the official set after ``load``."""

    def __init__(
        self, size: int, max_train: int, max_test: int, image_column: str, label_column: str
    ) -> None:
        self.size = size
        self.max_train = max_train
        self.max_test = max_test
        self.image_column = image_column
        self.label_column = label_column
        self.classes: list[str] = []
        self.partial: str = ""

    # ---- reading

    def _file(self, folder: str | None, name: str) -> Path:
        layout = "expected <data root>/<task>/train.parquet, test.parquet and classes.json"
        if folder is None:
            raise FileNotFoundError(
                f"task '{self.name}' is read from a local folder and no data root is set; {layout}. "
                "Set --data-root or MERGESEC_DATA"
            )
        path = Path(folder) / name
        if not path.is_file():
            raise FileNotFoundError(
                f"task '{self.name}': no file '{path}'; {layout}. The project ships no real data: convert "
                "the official release to this layout (docs/methods/real-data.md), then set --data-root"
            )
        return path

    def _read_classes(self, folder: str | None) -> list[str]:
        """Class names from ``classes.json``: ``label`` -> "classes", ``coarse_label`` -> "coarse_classes"."""
        path = self._file(folder, "classes.json")
        key = self.label_column.replace("label", "classes")
        content = json.loads(path.read_text(encoding="utf-8"))
        names = content.get(key)
        if not isinstance(names, list) or not names:
            raise ContractError(
                f"{path}: no list '{key}' (label column '{self.label_column}'); has {list(content)}"
            )
        return [str(name) for name in names]

    def _read_rows(self, path: Path, classes: int) -> tuple[list[bytes], Tensor]:
        """Encoded images and labels int64 ``[N]`` of one file; only the two columns needed are read."""
        import pyarrow.parquet as parquet

        present = parquet.read_schema(path).names
        for column in (self.image_column, self.label_column):
            if column not in present:
                raise ContractError(f"{path}: no column '{column}'; has {', '.join(present)}")
        table = parquet.read_table(path, columns=[self.image_column, self.label_column])
        cells = table.column(self.image_column).to_pylist()
        # The Hugging Face image type stores {"bytes": ..., "path": ...}.
        images = [cell["bytes"] if isinstance(cell, dict) else cell for cell in cells]
        labels = table.column(self.label_column).to_pylist()
        wrong = [label for label in labels if not isinstance(label, int) or not 0 <= label < classes]
        if wrong:
            raise ContractError(
                f"{path}: label {wrong[0]!r} in column '{self.label_column}' is not in 0..{classes - 1}"
            )
        return images, torch.tensor(labels, dtype=torch.int64)

    def _split(self, images: list[bytes], targets: Tensor, rows: Tensor, where: str) -> Split:
        return Split(decode([images[i] for i in rows.tolist()], self.size, where), targets[rows])

    def load(self, ctx: DataContext) -> dict[str, Split]:
        """Splits as uint8 ``[N, 3, size, size]``. Tuning is cut from train before ``max_train`` applies.

        FileNotFoundError if a file is missing; ContractError for a wrong column, label or image.
        """
        self.classes = self._read_classes(ctx.folder)
        train_file = self._file(ctx.folder, "train.parquet")
        test_file = self._file(ctx.folder, "test.parquet")
        images, targets = self._read_rows(train_file, len(self.classes))
        test_images, test_targets = self._read_rows(test_file, len(self.classes))
        self.partial = self._missing(len(images) + len(test_images))
        train, tuning = split_tuning(targets)
        train = train[self._capped(targets[train], self.max_train)]
        test = self._capped(test_targets, self.max_test)
        return {
            "train": self._split(images, targets, train, str(train_file)),
            "tuning": self._split(images, targets, tuning, str(train_file)),
            "test": self._split(test_images, test_targets, test, str(test_file)),
        }

    @staticmethod
    def _capped(targets: Tensor, limit: int) -> Tensor:
        """Which rows stay under a limit (0 = none): stratified, the same every time."""
        count = limit or len(targets)
        return stratified(targets, count, torch.Generator().manual_seed(TUNING_SEED))

    def _missing(self, images: int) -> str:
        """What the folder lacks beside the official set of the card, or "" if nothing."""
        card: dict[str, Any] = next((card for card in CARDS if card["name"] == self.name), {})
        if not card:
            return ""
        lacking = []
        if self.label_column == "label" and len(self.classes) < card["classes"]:
            lacking.append(f"{len(self.classes)} of {card['classes']} classes")
        total = sum(card["images"].values())
        if images < total:
            lacking.append(f"{images} of {total} images")
        return ", ".join(lacking)

    # ---- storing: class names travel with the tensors, so that a cached split knows its head's size

    def pack(self, splits: Mapping[str, Split]) -> dict[str, Tensor]:
        names = json.dumps(list(self.classes)).encode()
        return {**super().pack(splits), CLASSES_KEY: torch.frombuffer(bytearray(names), dtype=torch.uint8)}

    def unpack(self, tensors: Weights) -> dict[str, Split]:
        names: Any = json.loads(bytes(tensors[CLASSES_KEY].tolist()))
        self.classes = names
        return super().unpack({n: t for n, t in tensors.items() if n != CLASSES_KEY})
