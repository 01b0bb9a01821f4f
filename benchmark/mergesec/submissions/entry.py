"""An entry is one folder: ``submission.yaml``, the plugin's files, a grid, records. Read here, nothing of it is run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mergesec.errors import UsageError, nearest
from mergesec.files import brief, is_file, is_folder
from mergesec.planning.yamlguard import check_yaml

FILE = "submission.yaml"
RECORDS = "records"
KINDS = ("defense", "attack", "merging", "task")
"""What can be submitted."""
MOST_FILES, MOST_CODE, MOST_RECORDS, MOST_RECORD = 100, 1 << 20, 20_000, 1 << 26
"""Files of code and their bytes, records and theirs: what is looked at is bounded before it is read."""
Row = dict[str, str | int | float]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _is_link(value: str) -> str:
    if value and not re.fullmatch(r"https?://[!-~]{1,500}", value):
        raise ValueError("an address begins with https:// and has no spaces")
    return value


class Paper(_Strict):
    """Where the method is described."""

    title: str = Field(min_length=1, max_length=300)
    url: str = ""

    _link = field_validator("url")(_is_link)


class Code(_Strict):
    """The plugin's files, or the folder of a package, and the digest of all of them."""

    files: list[str] = Field(min_length=1, max_length=MOST_FILES)
    digest: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    distribution: str = Field(default="", max_length=100)
    """Of a package: the name under which it is installed."""


class Claim(_Strict):
    """One number of a board: the row that these columns name, a column, its value (a share, not percent)."""

    board: str = Field(max_length=100)
    row: Row = Field(max_length=20)
    column: str = Field(max_length=100)
    value: float | None = None


class Submission(_Strict):
    """``submission.yaml``. ``data`` and ``knowledge`` are the card's."""

    schema_version: Literal[1] = 1
    method: str = Field(min_length=1, max_length=80)
    kind: Literal["defense", "attack", "merging", "task"]
    paper: Paper
    contact: str = Field(default="", max_length=200)
    licence: str = Field(min_length=1, max_length=100)
    data: Literal["none", "tuning", "train"] = "none"
    knowledge: str = Field(default="", max_length=1000)
    code: Code
    grid: str = "grid.yaml"
    against: str = Field(default="", max_length=100)
    """A preset whose tasks, seeds and opponents the grid holds entirely; empty: a grid of one's own."""
    records: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    """Digest of the records."""
    claims: list[Claim] = Field(default=[], max_length=100)


class Entry(NamedTuple):
    """A folder that holds a submission, every file of it looked at."""

    folder: Path
    submission: Submission
    code: tuple[Path, ...]
    grid: Path

    @property
    def plugins(self) -> tuple[Path, ...]:
        """The files that are loaded as plugins; those of an installed package are found by its entry points."""
        return () if self.submission.code.distribution else self.code


def read_entry(folder: Path) -> Entry:
    """The entry in a folder; UsageError names file, field and what is wrong."""
    if not is_folder(folder):
        raise UsageError("FOLDER", f"no folder {brief(str(folder))!r}")
    submission = read_submission(_inside(folder, FILE, "FOLDER"))
    grid = _inside(folder, submission.grid, f"{FILE}: grid")
    for path in sorted({grid, *folder.rglob("*.yaml"), *folder.rglob("*.yml")})[: MOST_FILES + 1]:
        if path.name != FILE:
            _check_grid_file(path)
    return Entry(folder, submission, tuple(_code_files(folder, submission.code)), grid)


def read_submission(path: Path) -> Submission:
    """A submission file; UsageError names the first field that is wrong, and the nearest valid one."""
    import yaml

    check_yaml(path, FILE)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_once_each())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(FILE, f"not YAML: {' '.join(str(error).split())}"[:300]) from None
    try:
        return Submission.model_validate(raw)
    except ValidationError as error:
        raise UsageError(*_told(error)) from None


def _once_each() -> Any:
    """A safe loader that refuses a key that is given twice: a reader sees the first, a parser the last."""
    import yaml

    class OnceEach(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if len(set(names)) != len(names):
                raise yaml.YAMLError(f"a field is given twice in line {node.start_mark.line + 1}")
            return super().construct_mapping(node, deep)

    return OnceEach


_MODELS: Mapping[str, type[BaseModel]] = {"code": Code, "paper": Paper, "claims": Claim}


def _told(error: ValidationError) -> tuple[str, str]:
    """Field and message of the first mistake; a field that nobody knows before one that is missing: it may be that one."""
    first = min(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    place = [str(part) for part in first["loc"]]
    where = f"{FILE}: {'.'.join(brief(part, 60) for part in place) or 'file'}"
    if first["type"] == "extra_forbidden":
        model = _MODELS.get(place[0], Submission) if len(place) > 1 else Submission
        return where, f"unknown field{nearest(place[-1], model.model_fields)}"
    if first["type"] == "missing":
        return where, "is needed"
    return where, f"{first['msg']}, got {brief(repr(first['input']))}"


# --------------------------------------------------------------------------- files


def _inside(folder: Path, name: str, where: str) -> Path:
    """A plain file below the folder; UsageError for links, other places and names that no file can have."""
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name:
        raise UsageError(where, f"{brief(name)!r} does not lie in the entry's folder")
    path = folder.joinpath(*parts)
    if any(p.is_symlink() for p in (path, *list(path.parents)[: len(parts) - 1])):
        raise UsageError(where, f"{brief(name)!r} is a link; an entry holds its files itself")
    if not is_file(path):
        raise UsageError(where, f"no file {brief(name)!r} in the entry")
    return path


def _code_files(folder: Path, code: Code) -> Iterable[Path]:
    """The plugin files, in the order given; of a package all its Python files."""
    found: dict[Path, None] = {}
    for i, name in enumerate(code.files):
        where = f"{FILE}: code.files.{i}"
        place = folder / name
        if code.distribution and ".." not in PurePosixPath(name).parts and is_folder(place):
            below = sorted(p.relative_to(folder).as_posix() for p in place.rglob("*.py"))[: MOST_FILES + 1]
            found |= dict.fromkeys(_inside(folder, name, where) for name in below)
        else:
            found[_inside(folder, name, where)] = None
    if not found or len(found) > MOST_FILES:
        raise UsageError(f"{FILE}: code.files", f"{len(found)} files; an entry has 1 to {MOST_FILES}")
    for path in found:
        if path.suffix != ".py" or path.stat().st_size > MOST_CODE:
            raise UsageError(f"{FILE}: code.files", f"{path.name} is not Python, or above {MOST_CODE} bytes")
    return found


def _check_grid_file(path: Path) -> None:
    """A stranger's grid is composed by Hydra, which can read the environment and other folders: not here."""
    import yaml

    check_yaml(path, path.name)
    text = path.read_text(encoding="utf-8")
    if "${" in text or re.search(r"^\s*(-\s*)?(override\s+)?[\"']?/?hydra\b", text, re.MULTILINE):
        raise UsageError(path.name, "an entry's grid has no ${...} and no settings of hydra")
    for value in _texts(yaml.safe_load(text)):
        if value.startswith(("/", "~")) or ".." in PurePosixPath(value).parts:
            raise UsageError(path.name, f"{brief(value)!r} does not lie in the entry's folder")


def _texts(value: Any) -> Iterable[str]:
    """All texts in what a YAML file holds."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def digest_of_files(folder: Path, files: Iterable[Path]) -> str:
    """SHA-256 over names and contents, in the order of the names."""
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda p: p.relative_to(folder).as_posix()):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()}\n{content}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def record_files(folder: Path) -> list[Path]:
    """Everything that lies among an entry's records; UsageError for links, other kinds of file, and too much."""
    home = folder / RECORDS
    if not is_folder(home) or home.is_symlink():
        return []
    found = []
    for path in sorted(home.rglob("*")):
        if path.is_symlink() or not (path.is_dir() or (path.is_file() and path.suffix == ".json")):
            raise UsageError(RECORDS, f"{brief(path.name)!r} is not a record")
        if path.is_file():
            found.append(path)
            if len(found) > MOST_RECORDS or path.stat().st_size > MOST_RECORD:
                raise UsageError(RECORDS, f"more than {MOST_RECORDS} records or {MOST_RECORD} bytes in one")
    return found
