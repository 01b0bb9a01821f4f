"""Image classification tasks from local folders: ``<root>/<task>/{train,test}.parquet`` + ``classes.json``.

Columns: an image column with encoded bytes (JPEG, PNG) and an integer label column. A folder per class
(``train/<class>/*.jpg``) works too. Without a local folder the eight sets come from the Hugging Face hub
at a commit. No data ships with the project.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergesec.contracts import ContractError, DataContext, Split
from mergesec.images import ImageTask
from mergesec_tasks._folder import (
    FolderSplits,
    bare,
    capped,
    split_tuning,
)
from mergesec_tasks.vision._pixels import Refused, picture, strictly
from mergesec_tasks.vision._sources import (
    Rows,
    Source,
    from_class_folders,
    from_hub,
    from_tables,
    has_class_folders,
    phrase,
)

if TYPE_CHECKING:
    from PIL.Image import Image

CARDS: list[dict[str, Any]] = [
    {
        "name": "_folder",
        "kind": "task",
        "class": "FolderTask",
        "version": "1",
        "title": "A folder of images",
        "summary": "images and labels in a folder of your own",
        "modality": "image",
        "source": "local folder, else the Hugging Face hub",
        "local": True,
        "parameters": {
            "size": {"type": "int", "default": 64, "min": 8, "max": 1024, "doc": "stored image side, pixels"},
            "max_train": {"type": "int", "default": 0, "min": 0, "doc": "training rows kept; 0 = all"},
            "max_test": {"type": "int", "default": 0, "min": 0, "doc": "test rows kept; 0 = all"},
            "image_column": {"type": "str", "default": "image", "doc": "column of encoded images"},
            "label_column": {"type": "str", "default": "label", "doc": "column of integer labels"},
            "fit": {"type": "choice", "default": "squash", "choices": ["squash", "crop"], "later": True, "doc": "images that are not square: squash them, or scale the shorter side and cut out the centre"},
            "revision": {"type": "str", "default": "", "later": True, "doc": "commit of the hub's copy, where there is no local folder; empty = the card's"},
        },
    },
    {
        "extends": "_folder",
        "name": "image-folder",
        "class": "ImageFolder",
        "title": "A folder of images of your own",
        "summary": "train/<class>/*.jpg and test/<class>/*.jpg, or parquet files, at path; no code",
        "source": "the folder at path",
        "licence": "yours",
        "local": False,
        "parameters": {
            "path": {"type": "path", "default": None, "doc": "the folder; it counts by content"},
            "revision": None,
        },
    },
    {
        "extends": "_folder",
        "name": "mnist",
        "title": "MNIST",
        "paper": "LeCun et al., Gradient-based learning applied to document recognition, 1998",
        "url": "http://yann.lecun.com/exdb/mnist/",
        "summary": "handwritten digits",
        "classes": 10,
        "hub": {"name": "ylecun/mnist", "revision": "77f3279092a1c1579b2250db8eafed0ad422088c", "files": "mnist/{split}-*.parquet"},
        "templates": ['a photo of the number: "{}".'],
        "licence": "CC BY-SA 3.0",
        "images": {"train": 60000, "test": 10000},
    },
    {
        "extends": "_folder",
        "name": "gtsrb",
        "title": "GTSRB",
        "paper": "Stallkamp et al., The German traffic sign recognition benchmark, IJCNN 2011",
        "url": "https://benchmark.ini.rub.de/gtsrb_dataset.html",
        "summary": "German traffic signs",
        "classes": 43,
        "hub": {"name": "tanganke/gtsrb", "revision": "ea889fff70dda7b09e94a4b207dded438deca549", "files": "data/{split}-*.parquet", "images": {"train": 26640, "test": 12630}},
        "templates": ['a zoomed in photo of a "{}" traffic sign.', 'a centered photo of a "{}" traffic sign.', 'a close up photo of a "{}" traffic sign.'],
        "licence": "research benchmark, no licence text",
        "images": {"train": 39209, "test": 12630},
    },
    {
        "extends": "_folder",
        "name": "sun397",
        "title": "SUN397",
        "paper": "Xiao et al., SUN database, CVPR 2010",
        "url": "https://vision.princeton.edu/projects/2010/SUN/",
        "summary": "scenes",
        "classes": 397,
        "hub": {"name": "tanganke/sun397", "revision": "9c4afd6174afa3974f209a0ef099dbbe244dfd27", "files": "data/{split}-*.parquet"},
        "templates": ["a photo of a {}.", "a photo of the {}."],
        "licence": "research use",
        "images": {"train": 19850, "test": 19850},
    },
    {
        "extends": "_folder",
        "name": "stanford_cars",
        "title": "Stanford Cars",
        "paper": "Krause et al., 3D object representations for fine-grained categorization, 3dRR 2013",
        "url": "https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
        "summary": "car models; label_column coarse_label for body types",
        "classes": 196,
        "hub": {"name": "tanganke/stanford_cars", "revision": "9abf6cf7d6dfa7b95152a0d6e791ea9435b47a40", "files": "data/{split}-*.parquet"},
        "templates": ["a photo of a {}.", "a photo of the {}.", "a photo of my {}.", "i love my {}!", "a photo of my dirty {}.", "a photo of my clean {}.", "a photo of my new {}.", "a photo of my old {}."],
        "licence": "non-commercial research",
        "images": {"train": 8144, "test": 8041},
    },
    {
        "extends": "_folder",
        "name": "resisc45",
        "title": "RESISC45",
        "paper": "Cheng et al., Remote sensing image scene classification, Proc. IEEE 2017",
        "url": "https://gcheng-nwpu.github.io/",
        "summary": "aerial scenes",
        "classes": 45,
        "hub": {"name": "tanganke/resisc45", "revision": "5c484982a196dcb501b8e79c6cf4680dc6f2ccdf", "files": "data/{split}-*.parquet", "images": {"train": 18900, "test": 6300}},
        "templates": ["satellite imagery of {}.", "aerial imagery of {}.", "satellite photo of {}.", "aerial photo of {}.", "satellite view of {}.", "aerial view of {}.", "satellite imagery of a {}.", "aerial imagery of a {}.", "satellite photo of a {}.", "aerial photo of a {}.", "satellite view of a {}.", "aerial view of a {}.", "satellite imagery of the {}.", "aerial imagery of the {}.", "satellite photo of the {}.", "aerial photo of the {}.", "satellite view of the {}.", "aerial view of the {}."],
        "licence": "research use",
        "images": {"total": 31500},
    },
    {
        "extends": "_folder",
        "name": "eurosat",
        "title": "EuroSAT",
        "paper": "Helber et al., EuroSAT, JSTARS 2019",
        "url": "https://github.com/phelber/EuroSAT",
        "summary": "Sentinel-2 land use",
        "classes": 10,
        "hub": {"name": "tanganke/eurosat", "revision": "43750fc422c7fbd4289e2df3f7473617a5937acc", "files": "data/{split}-*.parquet", "images": {"train": 21600, "test": 2700}},
        "templates": ["a centered satellite photo of {}.", "a centered satellite photo of a {}.", "a centered satellite photo of the {}."],
        "licence": "MIT",
        "images": {"total": 27000},
    },
    {
        "extends": "_folder",
        "name": "svhn",
        "title": "SVHN",
        "paper": "Netzer et al., Reading digits in natural images, 2011",
        "url": "http://ufldl.stanford.edu/housenumbers/",
        "summary": "house numbers",
        "classes": 10,
        "hub": {"name": "ufldl-stanford/svhn", "revision": "f9e1717d73324ebbc1ece84267ccd80d0aca0690", "files": "cropped_digits/{split}-*.parquet"},
        "templates": ['a photo of the number: "{}".'],
        "licence": "non-commercial",
        "images": {"train": 73257, "test": 26032},
    },
    {
        "extends": "_folder",
        "name": "dtd",
        "title": "DTD",
        "paper": "Cimpoi et al., Describing textures in the wild, CVPR 2014",
        "url": "https://www.robots.ox.ac.uk/~vgg/data/dtd/",
        "summary": "textures",
        "classes": 47,
        "hub": {"name": "tanganke/dtd", "revision": "d2afa97d9f335b1a6b3b09c637aef667f98f966e", "files": "data/{split}-*.parquet"},
        "templates": ["a photo of a {} texture.", "a photo of a {} pattern.", "a photo of a {} thing.", "a photo of a {} object.", "a photo of the {} texture.", "a photo of the {} pattern.", "a photo of the {} thing.", "a photo of the {} object."],
        "licence": "research use",
        "images": {"train": 3760, "test": 1880},
    },
    {
        "extends": "_folder",
        "name": "aid",
        "title": "AID",
        "paper": "Xia et al., AID: a benchmark data set for aerial scene classification, TGRS 2017",
        "url": "https://captain-whu.github.io/AID/",
        "summary": "aerial scenes",
        "classes": 30,
        "source": "local folder",
        "licence": "not stated",
        "images": {"total": 10000},
    },
    {
        "extends": "_folder",
        "name": "rsscn7",
        "title": "RSSCN7",
        "paper": "Zou et al., Deep learning based feature selection, GRSL 2015",
        "url": "https://github.com/palewithout/RSSCN7",
        "summary": "satellite scenes",
        "classes": 7,
        "source": "local folder",
        "licence": "research use",
        "images": {"total": 2800},
    },
    {
        "extends": "_folder",
        "name": "chars74k",
        "title": "Chars74K (natural images)",
        "paper": "de Campos et al., Character recognition in natural images, VISAPP 2009",
        "url": "http://www.ee.surrey.ac.uk/CVSSP/demos/chars74k/",
        "summary": "street-view characters; label_column label62 for all 62 classes",
        "classes": 36,
        "source": "local folder",
        "licence": "cite the paper",
        "images": {"total": 7705},
    },
]  # fmt: skip

LAYOUT = (
    "expected <data root>/<task>/train.parquet, test.parquet (or shards) and classes.json, "
    "or train/<class>/ and test/<class>/"
)


def decode(
    images: Sequence[bytes], rows: Sequence[int], size: int, where: Callable[[int], str], fit: str = "squash"
) -> Tensor:
    """Encoded images ``rows`` as uint8 ``[N, 3, size, size]``; other sizes are resized (bicubic).

    ``fit``: ``squash`` changes the aspect; ``crop`` scales the shorter side and cuts out the centre, as CLIP does.
    ContractError begins with what ``where`` calls the row.
    """
    import numpy as np

    pixels = np.empty((len(rows), 3, size, size), dtype=np.uint8)
    with strictly():
        for place, row in enumerate(rows):
            try:
                pixels[place] = np.asarray(_fitted(picture(images[row]), size, fit)).transpose(2, 0, 1)
            except Refused as error:
                raise ContractError(f"{where(row)} {error}") from None
    return torch.from_numpy(pixels)


def _fitted(image: Image, size: int, fit: str) -> Image:
    from PIL.Image import Resampling

    if image.size == (size, size):
        return image
    box = None
    if fit == "crop":
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
    return image.resize((size, size), Resampling.BICUBIC, box=box)


class FolderTask(FolderSplits, ImageTask):
    """One task read from its own folder. ``partial`` tells a subset of the official set after ``load``."""

    page = "docs/methods/real-data.md"
    layout = LAYOUT

    def __init__(
        self,
        size: int,
        max_train: int,
        max_test: int,
        image_column: str,
        label_column: str,
        fit: str = "squash",
        revision: str = "",
    ) -> None:
        self.size = size
        self.max_train = max_train
        self.max_test = max_test
        self.image_column = image_column
        self.label_column = label_column
        self.fit = fit
        self.revision = revision
        self.classes: list[str] = []
        self.partial: str = ""

    # ---- reading

    def _source(self, folder: str | None) -> Source:
        """A local folder first (parquet files, or a folder per class), then the hub at a commit."""
        card = self._card()
        home = Path(folder) if folder is not None and Path(folder).is_dir() else None
        if home is None and card.get("hub"):
            looked = f"task '{self.name}': " + (f"no folder '{folder}'" if folder else "no data root is set")
            looked += f" ({LAYOUT}; set --data-root or MERGESEC_DATA)"
            revision = self.revision or card["hub"]["revision"]
            return from_hub(card["hub"], revision, self.image_column, self.label_column, self.name, looked)
        tables = self._tables(folder)
        key = self.label_column.replace("label", "classes")
        if home is not None and has_class_folders(home):
            if found := [file for files in tables.values() for file in files]:
                raise ContractError(f"{home}: {found[0].name} and folders of classes; keep one of them")
            named = (home / "classes.json").exists()
            names = self._class_names(folder, key, self.label_column, {}) if named else None
            return from_class_folders(home, names)
        classes = self._class_names(folder, key, self.label_column, tables)
        self._check_present(folder, tables)
        return from_tables(tables, classes, self.image_column, self.label_column)

    def _split(self, source: Rows, rows: Tensor) -> Split:
        pixels = decode(source.images, rows.tolist(), self.size, source.place, self.fit)
        return Split(pixels, source.targets[rows])

    def load(self, ctx: DataContext) -> dict[str, Split]:
        """Splits as uint8 ``[N, 3, size, size]``. Tuning is cut from train before ``max_train`` applies.

        FileNotFoundError if a file is missing; ContractError for a wrong column, label or image.
        """
        source = self._source(ctx.folder)
        self.classes = source.classes
        self.partial = self._missing(source, ctx.folder)
        train, tuning = split_tuning(source.train.targets)
        train = train[capped(source.train.targets[train], self.max_train)]
        return {
            "train": self._split(source.train, train),
            "tuning": self._split(source.train, tuning),
            "test": self._split(source.test, capped(source.test.targets, self.max_test)),
        }

    def _card(self) -> dict[str, Any]:
        return next((card for card in CARDS if card["name"] == self.name), {})

    def _missing(self, source: Source, folder: str | None) -> str:
        """What the source lacks: rows of a class, and what the official set of the card has; "" if nothing.

        The hub's copies that merging papers use have splits of their own; they are measured by those.
        """
        lacking = bare(self.classes, {"train": source.train.targets, "test": source.test.targets})
        card = self._card()
        if "classes" not in card:
            return ", ".join(lacking)
        if self.label_column == "label" and len(self.classes) < card["classes"]:
            lacking.append(f"{len(self.classes)} of {card['classes']} classes")
        local = folder is not None and Path(folder).is_dir()
        counts = card["images"] if local else card.get("hub", {}).get("images", card["images"])
        images, total = len(source.train.targets) + len(source.test.targets), sum(counts.values())
        if images < total:
            lacking.append(f"{images} of {total} images")
        return ", ".join(lacking)

    def prompts(self, templates: Sequence[str]) -> list[list[str]]:
        """Sentences per class, with the words that CLIP's prompts use for it."""
        return [[t.format(phrase(self.name, name)) for t in templates] for name in self.classes]


class ImageFolder(FolderTask):
    """A folder named in the grid file instead of one under the data root."""

    def __init__(self, path: str | None, **parameters: Any) -> None:
        super().__init__(**parameters)
        self.path = path

    def load(self, ctx: DataContext) -> dict[str, Split]:
        """As of a folder under the data root; ContractError without a path."""
        if self.path is None:
            raise ContractError(f"{self.name}: needs a path, {{name: {self.name}, path: FOLDER}}")
        return super().load(DataContext(ctx.device, ctx.seed, self.path))
