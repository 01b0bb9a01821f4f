"""Tasks from local folders: splits, formats, messages."""

from __future__ import annotations

import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from extras import needs
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mergesec.contracts import ContractError, DataContext
from mergesec_tasks._folder import split_tuning, stratified
from mergesec_tasks.vision._sources import official_classes, phrase
from mergesec_tasks.vision.folder import CARDS, FolderTask

pandas = pytest.importorskip("pandas")
needs("pyarrow")


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
    with pytest.raises(FileNotFoundError, match=r"'aid'.*no data root is set.*MERGESEC_DATA"):
        make_task("aid").load(context(None))


@pytest.mark.parametrize(
    ("given_parameters", "columns", "message"),
    [
        ({"image_column": "img"}, {}, "no column 'img'; has image, label"),
        ({"label_column": "fine_label"}, {}, "no list 'fine_classes'"),
        ({}, {"label": lambda rows: list(range(rows))}, r"label 4 .*not in 0\.\.3"),
        ({}, {"image": lambda rows: [b"nonsense"] * rows}, "row 0 of column .image. holds no readable image"),
    ],
)
def test_wrong_contents_are_named(
    tmp_path: Path, given_parameters: dict[str, Any], columns: dict[str, Any], message: str
) -> None:
    folder = write_folder(tmp_path / "dtd", **columns)
    with pytest.raises(ContractError, match=message):
        make_task(**given_parameters).load(context(folder))


def test_cards_extend_one_template_and_say_only_what_is_their_own() -> None:
    template, *cards = CARDS
    assert len({card["name"] for card in CARDS}) == len(CARDS)
    assert all(card["extends"] == template["name"] for card in cards)
    for card in (
        card for card in cards if card["name"] != "image-folder"
    ):  # that one is of the user's own making
        assert not card.keys() & {"parameters", "local", "class"}
        assert sum(card["images"].values()) > 0


# --------------------------------------------------------------------------- class folders and the hub


def write_class_folders(folder: Path, classes: int = 3, train: int = 180, test: int = 9) -> Path:
    for split, rows in (("train", train), ("test", test)):
        for row in range(rows):
            place = folder / split / f"kind_{row % classes}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{row:03}.png").write_bytes(encoded(row))
    return folder


def test_class_folders_work_as_parquet_does(tmp_path: Path) -> None:
    task = make_task("my-own")
    splits = task.load(context(write_class_folders(tmp_path / "my-own")))
    assert task.classes == ["kind_0", "kind_1", "kind_2"]
    assert {n: len(s) for n, s in splits.items()} == {"train": 80, "tuning": 100, "test": 9}
    shades = splits["train"].inputs[:, 0, 0, 0].tolist() + splits["tuning"].inputs[:, 0, 0, 0].tolist()
    assert sorted(shades) == list(range(180))
    for split in splits.values():
        assert (split.inputs[:, 0, 0, 0].long() % 3 == split.targets).all()


def test_classes_json_orders_class_folders(tmp_path: Path) -> None:
    folder = write_class_folders(tmp_path / "my-own")
    (folder / "classes.json").write_text(json.dumps({"classes": ["kind_2", "kind_0", "kind_1"]}))
    test = make_task("my-own").load(context(folder))["test"]
    assert ((test.inputs[:, 0, 0, 0].long() + 1) % 3 == test.targets).all()
    (folder / "train" / "stranger").mkdir()
    with pytest.raises(ContractError, match="'stranger' is not one of the 3 classes"):
        make_task("my-own").load(context(folder))


def test_crop_keeps_the_middle_and_squash_everything(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    stream = io.BytesIO()
    wide = Image.new("RGB", (60, 20), (0, 0, 0))
    wide.paste((200, 0, 0), (20, 0, 40, 20))
    wide.save(stream, "PNG")
    for split, rows in (("train", 102), ("test", 1)):
        (folder / split / "a").mkdir(parents=True)
        for row in range(rows):
            (folder / split / "a" / f"{row}.png").write_bytes(stream.getvalue())
    squashed = make_task("own").load(context(folder))["test"].inputs[0, 0]
    cropped = make_task("own", fit="crop").load(context(folder))["test"].inputs[0, 0]
    assert int(cropped.min()) > 190
    assert int(squashed[:, 0].max()) < 10
    assert int(squashed[:, 8].min()) > 190


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Any, ...]]:
    """A stand-in for the network only: files as ``datasets`` writes them, where a download would put them."""
    datasets = needs("datasets")
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    asked: list[tuple[Any, ...]] = []
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["banded", "polka-dotted"])}
    )

    def fetch(
        name: str, repo_type: str, revision: str, allow_patterns: list[str], local_files_only: bool, **_: Any
    ) -> str:
        if local_files_only:
            raise FileNotFoundError(name)
        (pattern,) = allow_patterns
        asked.append((name, repo_type, revision, pattern))
        file = tmp_path / "hub" / pattern.replace("*", "00000-of-00001")
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = 130 if "train" in pattern else 20
        table = {
            "image": [{"bytes": encoded(i % 256), "path": None} for i in range(rows)],
            "label": [i % 2 for i in range(rows)],
        }
        datasets.Dataset.from_dict(table, features=features).to_parquet(file)
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    return asked


def test_the_hub_is_asked_at_the_cards_commit(hub: list[tuple[Any, ...]], tmp_path: Path) -> None:
    task = make_task("dtd")
    splits = task.load(context(tmp_path / "dtd"))  # no such folder
    commit = next(c for c in CARDS if c["name"] == "dtd")["hub"]["revision"]
    assert hub == [("tanganke/dtd", "dataset", commit, f"data/{s}-*.parquet") for s in ("train", "test")]
    assert task.classes == ["banded", "polka-dotted"]
    assert (splits["test"].inputs[:, 0, 0, 0].long() % 2 == splits["test"].targets).all()
    assert task.partial == "2 of 47 classes, 150 of 5640 images"


def test_a_local_folder_comes_before_the_hub(hub: list[tuple[Any, ...]], tmp_path: Path) -> None:
    make_task("dtd").load(context(write_folder(tmp_path / "dtd")))
    assert hub == []


def test_the_grids_commit_wins(hub: list[tuple[Any, ...]]) -> None:
    make_task("svhn", revision="a" * 40).load(context(None))
    assert hub[0] == ("ufldl-stanford/svhn", "dataset", "a" * 40, "cropped_digits/train-*.parquet")


@pytest.mark.parametrize(
    ("name", "label", "message"),
    [
        ("train-00000-of-00002.parquet", 0, r"shard 1 of 2 is missing"),
        ("train-00000-of-00001.parquet", -1, r"tanganke/dtd train: label -1 .* \(row 3\)"),
        ("train-00000-of-00001.parquet", None, r"tanganke/dtd train: label None .* \(row 3\)"),
        ("train-00000-of-00001.parquet", "damaged", r"tanganke/dtd: .* holds no readable parquet"),
    ],
)
def test_a_wrong_copy_of_the_hub_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, label: Any, message: str
) -> None:
    """A download cut off between shards, labels that are none, a damaged file."""
    datasets = needs("datasets")
    import huggingface_hub

    file = tmp_path / "hub" / "data" / name
    file.parent.mkdir(parents=True)
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["banded", "dotted"])}
    labels = [0, 1, 0, 1 if label == "damaged" else label]
    cells = [{"bytes": encoded(0), "path": None}] * len(labels)
    rows = datasets.Dataset.from_dict({"image": cells, "label": labels}, features=datasets.Features(kinds))
    rows.to_parquet(file)
    if label == "damaged":
        file.write_bytes(file.read_bytes()[:-9])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "hub"))
    with pytest.raises(ContractError, match=message):
        make_task("dtd").load(context(tmp_path / "dtd"))


def test_without_network_one_message_says_it_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    needs("datasets")
    import huggingface_hub

    def nothing(*_: object, **__: object) -> Any:
        raise ConnectionError("no network here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing)
    parts = ("'dtd': no folder '.*dtd' \\(expected .*classes.json", "--data-root", "tanganke/dtd at d2afa97d9f33",
             "hf download")  # fmt: skip
    with pytest.raises(FileNotFoundError, match=".*".join(parts)):
        make_task("dtd").load(context(tmp_path / "dtd"))


# --------------------------------------------------------------------------- names and prompts

EIGHT = ("sun397", "stanford_cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")


@pytest.mark.parametrize("name", EIGHT)
def test_the_eight_sets_have_names_templates_and_a_hub_copy(name: str) -> None:
    card = next(c for c in CARDS if c["name"] == name)
    names = official_classes(name)
    assert len(names) == len(set(names)) == card["classes"]
    assert card["templates"]
    assert all(t.count("{}") == 1 for t in card["templates"])
    assert re.fullmatch(r"[\w-]+/[\w-]+", card["hub"]["name"])
    assert re.fullmatch(r"[0-9a-f]{40}", card["hub"]["revision"])


def test_prompts_use_the_words_of_clip() -> None:
    signs, land, places = make_task("gtsrb"), make_task("eurosat"), make_task("sun397")
    signs.classes, land.classes = ["speed limit 20", "stop"], ["AnnualCrop", "SeaLake"]
    places.classes = ["apartment_building/outdoor"]
    quote = 'a close up photo of a "{}" traffic sign.'
    assert signs.prompts([quote]) == [
        ['a close up photo of a "red and white circle 20 kph speed limit" traffic sign.'],
        ['a close up photo of a "stop" traffic sign.'],
    ]
    assert land.prompts(["{}"]) == [["annual crop land"], ["lake or sea"]]
    assert places.prompts(["a {}."]) == [["a apartment building outdoor."]]


def test_prompt_words_change_only_with_the_cards_version() -> None:
    """Zero-shot heads are stored under keys that hold the version, not the words."""
    words = {name: [phrase(name, c) for c in official_classes(name)] for name in EIGHT}
    digest = hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()[:16]
    assert (digest, {c["version"] for c in CARDS if "version" in c}) == ("62c1c16eb2ec8ad5", {"1"})


SETS = ("aid", "chars74k", "dtd", "gtsrb", "mnist", "resisc45", "rsscn7", "stanford_cars", "sun397")


@pytest.mark.shared
@pytest.mark.parametrize("name", SETS)
def test_real_sets_are_what_pillow_and_pandas_read(shared: Path, name: str) -> None:
    """Nothing that is looked for in odd files changes well-formed ones."""
    folder = shared / "data" / name
    test = make_task(name, size=48).load(context(folder))["test"]
    frame = pandas.read_parquet(folder / "test.parquet")
    assert test.targets.tolist() == frame["label"].tolist()
    for row, data in enumerate(frame["image"]):
        image = Image.open(io.BytesIO(data)).convert("RGB")
        if image.size != (48, 48):
            image = image.resize((48, 48), Image.Resampling.BICUBIC)
        assert torch.equal(test.inputs[row], torch.from_numpy(numpy.array(image)).permute(2, 0, 1)), row
