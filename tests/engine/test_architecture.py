"""The house: which room may import which, held by reading every module's syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ROOT / "benchmark" / "mergesec"
CATALOGUES = {
    "mergesec_tasks": ROOT / "tasks" / "mergesec_tasks",
    "mergesec_methods": ROOT / "methods" / "mergesec_methods",
}
PUBLIC = (
    "errors", "threats", "recipes", "files", "modelfiles", "adapterconfig", "compat", "parts", "denoisers", "anatomy",
    "contracts", "adapters", "weights", "kernels", "tensorwise",
    "inference", "classification", "images", "text", "judging", "generation", "training", "surgery",
)  # fmt: skip
"""Modules directly under ``mergesec``: what a plugin may import, from the ground up."""
PACKAGES = (
    "evidence", "planning", "streaming", "execution", "figures", "site", "conformance", "scanning", "submissions",
    "api", "cli",
)  # fmt: skip
"""The engine's own, from the ground up; each stands above all public modules."""
ORDER = (*PUBLIC, *PACKAGES)
"""A room imports only rooms named before it."""
FAMILIES = ("merging", "fusionbench", "backdoor", "protection")
"""Each family of methods imports itself and helpers of ``merging``; what all may use lies beside them."""
LIGHT = ("errors", "threats", "recipes", "files", "planning", "evidence", "site", "execution/store", "execution/scheduler",
         "execution/harvest", "execution/session", "execution/engines", "api", "cli/main", "cli/app")  # fmt: skip
"""Rooms that list, plan and read boards: they load no torch."""


class Import(NamedTuple):
    """One name that a file imports; ``top``: when the file itself is imported."""

    module: str
    name: str
    top: bool


@cache
def _imports(path: Path) -> tuple[Import, ...]:
    """Every import of a file, those under TYPE_CHECKING left out."""
    return tuple(_read(path))


def _read(path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, "", id(node) in top)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                yield Import(node.module or "", alias.name, id(node) in top)


@cache
def _files(place: Path) -> tuple[Path, ...]:
    found = tuple(sorted(place.rglob("*.py"))) if place.is_dir() else (place.with_suffix(".py"),)
    assert found and all(path.is_file() for path in found)
    return found


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _room(path: Path) -> str:
    return path.relative_to(ENGINE).parts[0].removesuffix(".py")


def _engine_room(found: Import) -> str:
    parts = found.module.split(".")
    if parts[0] != "mergesec":
        return ""
    return parts[1] if len(parts) > 1 else found.name


def _engine_files() -> list[Path]:
    return [p for p in _files(ENGINE) if _room(p) not in ("__init__", "conf")]


def test_a_module_at_the_root_is_public_and_a_package_is_the_engines() -> None:
    """The one rule of the house; ``conf`` holds data."""
    found = {p.name for p in ENGINE.iterdir() if p.is_dir() and (p / "__init__.py").is_file()}
    assert found == {*PACKAGES, "conf"}
    assert {p.stem for p in ENGINE.glob("*.py")} == {*PUBLIC, "__init__"}


def test_a_room_imports_only_rooms_before_it() -> None:
    wrong = []
    for path in _engine_files():
        own = _room(path)
        for found in _imports(path):
            room = _engine_room(found)
            # inside functions the catalogue loads the contracts when a class is first needed
            if room in ("", own, "__version__") or (not found.top and own == "planning" and room in PUBLIC):
                continue
            if ORDER.index(room) >= ORDER.index(own):
                wrong.append(f"{_name(path)} imports {room}")
    assert not wrong


def test_the_engine_knows_no_catalogue() -> None:
    wrong = [
        f"{_name(path)}: {found.module}"
        for path in _files(ENGINE)
        for found in _imports(path)
        if found.module.split(".")[0] in CATALOGUES
    ]
    assert not wrong


@pytest.mark.parametrize("own", CATALOGUES)
def test_a_catalogue_uses_public_modules_of_the_engine_and_nothing_of_the_other(own: str) -> None:
    wrong = []
    for path in _files(CATALOGUES[own]):
        for found in _imports(path):
            first = found.module.split(".")[0]
            hidden = any(part.startswith("_") for part in (*found.module.split(".")[1:], found.name))
            if first == "mergesec" and (_engine_room(found) not in PUBLIC or hidden):
                wrong.append(f"{_name(path)}: {found.module}.{found.name} is not public")
            if first in CATALOGUES and first != own:
                wrong.append(f"{_name(path)}: {found.module} is another catalogue's")
    assert not wrong


def test_examples_use_public_modules_only() -> None:
    wrong = [
        f"{_name(path)}: {found.module}"
        for path in _files(ROOT / "examples")
        for found in _imports(path)
        if found.module.startswith("mergesec.") and _engine_room(found) not in PUBLIC
    ]
    assert not wrong


def test_families_of_methods_lean_on_merging_and_on_helpers_only() -> None:
    wrong = []
    folder = CATALOGUES["mergesec_methods"]
    for path in _files(folder):
        own = path.relative_to(folder).parts[0]
        for found in _imports(path):
            first, family, *rest = (*found.module.split("."), "", "")
            if first != "mergesec_methods" or family not in FAMILIES or family == own:
                continue
            if own not in FAMILIES or family != "merging":
                wrong.append(f"{_name(path)} imports {found.module}")
            elif not (rest[0] or found.name).startswith("_"):
                wrong.append(f"{_name(path)}: {found.module} is a method; share what is needed of it")
    assert not wrong


@pytest.mark.parametrize("folder", [*CATALOGUES.values(), ENGINE], ids=lambda p: p.name)
def test_no_modules_import_each_other_in_a_circle(folder: Path) -> None:
    places = {".".join(p.relative_to(folder.parent).with_suffix("").parts): p for p in _files(folder)}
    found = {
        module: {m for i in _imports(path) if i.top for m in (i.module, f"{i.module}.{i.name}")}
        & places.keys() - {module}
        for module, path in places.items()
    }
    assert any(found.values())
    TopologicalSorter(found).prepare()  # raises CycleError, which names the circle


def test_rooms_that_list_plan_and_read_boards_stay_free_of_torch() -> None:
    heavy = {"torch", "safetensors", "transformers", "open_clip", "sklearn"}
    wrong = [
        f"{_name(file)}: {found.module}"
        for room in LIGHT
        for file in _files(ENGINE / room)
        for found in _imports(file)
        if found.top and found.module.split(".")[0] in heavy
    ]
    assert not wrong
