"""Data and components of one's own, without installing anything: folders, tables, plugins named in a grid file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

import mergesec
from mergesec.contracts import ContractError, DataContext
from mergesec.errors import UsageError
from mergesec.execution.session import open_session
from mergesec.planning.catalog import load_catalog

WORDS = ["fine weather", "poor weather"]
PLUGIN = """
from mergesec.contracts import Merged, MergeMethod

CARD = {"name": "only_base", "kind": "merging", "class": "OnlyBase", "version": "1", "title": "The base",
        "summary": "the base itself", "data": "none", "modalities": ["image"], "seeded": False, "parameters": {}}


class OnlyBase(MergeMethod):
    def merge(self, base, experts, ctx):
        return Merged(dict(base))
"""


def images(home: Path) -> Path:
    """Two classes told apart by colour, 70 images each to train on."""
    from PIL import Image

    for split, count in (("train", 70), ("test", 6)):
        for label, colour in (("green", (20, 200, 20)), ("red", (200, 20, 20))):
            place = home / split / label
            place.mkdir(parents=True)
            for i in range(count):
                shade = tuple(min(255, c + i % 9) for c in colour)
                Image.new("RGB", (32, 32), shade).save(place / f"{i}.png")
    return home


def texts(home: Path) -> Path:
    home.mkdir()
    for split, count in (("train", 140), ("test", 8)):
        lines = [json.dumps({"text": f"{WORDS[i % 2]} {i}", "label": i % 2}) for i in range(count)]
        (home / f"{split}.jsonl").write_text("\n".join(lines))
    (home / "classes.json").write_text(json.dumps(["fine", "poor"]))
    return home


def loaded(name: str, path: Path) -> dict[str, int]:
    task = load_catalog().get("task", name).create({**defaults(name), "path": str(path)})
    splits = task.load(DataContext(torch.device("cpu"), 0, None))
    assert len(task.classes) == 2
    return {split: len(rows) for split, rows in splits.items()}


def defaults(name: str) -> dict[str, object]:
    return dict(load_catalog().get("task", name).card.bind(name, {}))


def test_a_folder_of_images_is_a_task(tmp_path: Path) -> None:
    assert loaded("image-folder", images(tmp_path / "mine")) == {"train": 40, "tuning": 100, "test": 12}


def test_a_table_of_texts_is_a_task(tmp_path: Path) -> None:
    assert loaded("text-table", texts(tmp_path / "mine")) == {"train": 40, "tuning": 100, "test": 8}


def test_without_a_path_it_says_so() -> None:
    for name in ("image-folder", "text-table"):
        task = load_catalog().get("task", name).create(defaults(name))
        task.name = name
        with pytest.raises(ContractError, match="needs a path"):
            task.load(DataContext(torch.device("cpu"), 0, None))


def grid(home: Path, **fields: object) -> Path:
    raw = {
        "name": "mine", "suite": {"backbone": "mini/vit", "tasks": [{"name": "image-folder", "path": "photos"}, "mini/mnist"]},
        "axes": {"merging": ["simple_average"]}, "threats": ["clean"],
    }  # fmt: skip
    path = home / "mine.yaml"
    path.write_text(yaml.safe_dump({**raw, **fields}))
    return path


def test_a_grid_names_a_folder_beside_itself_and_knows_it_by_content(tmp_path: Path) -> None:
    images(tmp_path / "photos")
    source = str(grid(tmp_path))
    first = open_session(source, store=tmp_path / "store").plan.steps.keys()
    assert open_session(source, store=tmp_path / "store").plan.steps.keys() == first
    (tmp_path / "photos" / "test" / "red" / "0.png").unlink()
    assert open_session(source, store=tmp_path / "store").plan.steps.keys() != first


def test_a_grid_brings_its_plugins(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN)
    images(tmp_path / "photos")
    source = grid(tmp_path, plugins=["mine.py"], axes={"merging": ["only_base"]})
    session = open_session(str(source), store=tmp_path / "store")
    assert session.plugins == (str(tmp_path / "mine.py"),)
    assert "only_base" in session.catalog.entries["merging"]
    again = open_session(str(source), plugins=[str(tmp_path / "mine.py")], store=tmp_path / "store")
    assert again.plugins == session.plugins
    assert mergesec.plan(source, store=tmp_path / "store").cells == 1


def test_a_plugin_that_is_not_there_is_named(tmp_path: Path) -> None:
    source = grid(tmp_path, plugins=["nobody.py"])
    with pytest.raises(UsageError, match=r"plugins: no file 'nobody\.py'"):
        open_session(str(source), store=tmp_path / "store")
