"""Tables that tasks read: parquet, CSV and JSON lines, whole or in shards; a column of cells and one of labels.

What is read is what is meant, or a ContractError names file, row and column. How much a file unpacks to is
looked at before and while it is unpacked.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergesec.contracts import ContractError
from mergesec_tasks._pages import Chunk, unpacked

ROOM, RATIO = 2**26, 200
"""A table may unpack to 64 MiB, and to this many times the file's size: texts reach 20, images hardly 2."""
BATCH = 4096
ROW = 12
"""Bytes of memory that a row takes at least: a label and an offset."""
SHARD = re.compile(r"(?P<split>[a-z]+)-(?P<part>\d+)-of-(?P<parts>\d+)(-[0-9a-f]{8,64})?\.(?P<kind>[a-z]+)")
WHOLE = re.compile(r"-?[0-9]{1,18}")


class Column(NamedTuple):
    """A column of cells: its name, which Arrow types it may have, and that in words."""

    name: str
    fits: Callable[[Any], bool]
    what: str


class Table(NamedTuple):
    """Cells and labels int64 ``[N]`` of a split, and where a row stands."""

    cells: list[Any]
    targets: Tensor
    place: Callable[[int], str]


def text_cells(name: str) -> Column:
    return Column(name, lambda kind: str(kind) in ("string", "large_string", "string_view"), "text")


def image_cells(name: str) -> Column:
    """Bytes, or the Hugging Face struct with ``bytes``."""

    def fits(kind: Any) -> bool:
        place = kind.get_field_index("bytes") if str(kind).startswith("struct") else None
        stored = str(kind if place is None else kind.field(place).type if place >= 0 else "")
        return re.fullmatch(r"(large_)?binary(_view)?|fixed_size_binary\[\d+\]", stored) is not None

    return Column(name, fits, "encoded images (binary, or a struct with 'bytes')")


# --------------------------------------------------------------------------- which files


def split_files(folder: Path, split: str, kinds: Sequence[str]) -> list[Path]:
    """The files of a split in order: ``<split>.<kind>``, or all ``<split>-00000-of-00002.<kind>``, in ``folder``
    or its ``data``; none if there is no such file.

    ContractError if a shard is missing or the split is there in two forms.
    """
    forms: list[list[Path]] = []
    for home in (folder, folder / "data"):
        names = sorted(p.name for p in home.iterdir()) if home.is_dir() else []
        for kind in kinds:
            whole = [home / name for name in names if name == f"{split}.{kind}"]
            parts = [(home / m[0], m) for m in map(SHARD.fullmatch, names) if m and m["split"] == split]
            shards = _in_order([(path, m) for path, m in parts if m["kind"] == kind])
            forms += [form for form in (whole, shards) if form]
    if len(forms) > 1:
        raise ContractError(f"split '{split}' is there twice: {forms[0][0]} and {forms[1][0]}; keep one")
    found = forms[0] if forms else []
    for path in found:
        if path.parent.is_symlink() and path.parent != folder:
            raise ContractError(linked(path.parent))
        if not path.is_file():
            raise ContractError(f"{path}: not a regular file")
    return found


def _in_order(shards: list[tuple[Path, re.Match[str]]]) -> list[Path]:
    """ContractError unless each of the shards' number is there once."""
    if not shards:
        return []
    parts = sorted((int(m["part"]), path) for path, m in shards)
    totals = {int(m["parts"]) for _, m in shards}
    first = parts[0][1]
    if len(totals) > 1:
        raise ContractError(
            f"{first}: beside shards of another number of shards ({sorted(totals)[:4]}); keep one set"
        )
    total = totals.pop()
    for number, (part, path) in enumerate(parts):
        if part < number:
            raise ContractError(f"{path}: shard {part} is there twice")
        if part > number or part >= total:
            wrong = (
                f"shard {number} of {total} is missing" if number < total else f"no shard {part} of {total}"
            )
            raise ContractError(f"{path.parent}: {wrong} (beside {path.name})")
    if len(parts) < total:
        raise ContractError(f"{first.parent}: shard {len(parts)} of {total} is missing (beside {first.name})")
    return [path for _, path in parts]


def check_shards(files: Sequence[Path]) -> None:
    """ContractError unless files that are named as shards are complete."""
    found = [(file, m) for file in files if (m := SHARD.fullmatch(file.name))]
    _in_order(found)


def linked(path: Path) -> str:
    return (
        f"{path}: a link to a folder; a change behind it would not be seen. Put the folder itself there, link "
        "its files, or link the folder of the whole task"
    )


# --------------------------------------------------------------------------- reading


def read_table(files: Sequence[Path], cells: Column, label_column: str, classes: int) -> Table:
    """All rows of ``files`` in order. ContractError names file, row and column of what is wrong."""
    readers = {".parquet": _parquet, ".csv": _csv, ".jsonl": _json_lines}
    found: list[Any] = []
    labels: list[Tensor] = []
    starts: list[tuple[int, Path]] = []
    for path in files:
        starts.append((len(found), path))
        part = readers[path.suffix](path, cells, label_column, classes)
        found += part[0]
        labels.append(part[1])
    if not found:
        raise ContractError(f"{files[0]}: no rows")

    def place(row: int) -> str:
        first, path = max(start for start in starts if start[0] <= row)
        return f"{path}: row {row - first} of column '{cells.name}'"

    return Table(found, torch.cat(labels), place)


def shown(value: Any) -> str:
    """A value for a message, at most 60 letters of it."""
    try:
        text = repr(value)
    except ValueError:  # whole numbers of thousands of digits have no text
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def listed(names: Sequence[str]) -> str:
    """Names for a message: twelve of them, forty letters of each."""
    return ", ".join(str(name)[:40] for name in names[:12]) + (", ..." if len(names) > 12 else "")


def _check_label(label: Any, where: str, column: str, classes: int) -> int:
    """ContractError unless a label is a whole number in 0..``classes`` - 1."""
    if label is None or label == "":
        raise ContractError(f"{where} of column '{column}' has no label")
    if not isinstance(label, int) or isinstance(label, bool):
        raise ContractError(f"{where}: label {shown(label)} in column '{column}' is not a whole number")
    if not 0 <= label < classes:
        raise ContractError(f"{where}: label {shown(label)} in column '{column}' is not in 0..{classes - 1}")
    return label


def _check_columns(path: Path, names: Sequence[str], wanted: Sequence[str]) -> None:
    for name in wanted:
        if name not in names:
            raise ContractError(f"{path}: no column '{name}'; has {listed(names)}")
        if list(names).count(name) > 1:
            raise ContractError(f"{path}: {list(names).count(name)} columns are named '{name}'")


# --------------------------------------------------------------------------- parquet


@contextmanager
def _as_parquet(path: Path) -> Iterator[Any]:
    """The open file. Whatever pyarrow stumbles over in it is a ContractError."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ContractError(f"{path}: parquet files need pyarrow: pip install 'mergesec[real]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except ContractError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0][:200] if str(error) else ""
        raise ContractError(
            f"{path}: not a readable parquet file ({type(error).__name__}: {reason})"
        ) from None


def parquet_class_names(path: Path, label_column: str) -> list[Any]:
    """The names of classes that ``datasets`` wrote into a parquet file; none if there are none."""
    with _as_parquet(path) as file:
        told = (file.schema_arrow.metadata or {}).get(b"huggingface")
    try:
        names = json.loads(told or b"{}")["info"]["features"][label_column]["names"]
    except (KeyError, TypeError, IndexError, ValueError, RecursionError):
        return []
    return names if isinstance(names, list) else []


def _parquet(path: Path, cells: Column, label_column: str, classes: int) -> tuple[list[Any], Tensor]:
    with _as_parquet(path) as file:
        schema = file.schema_arrow
        _check_columns(path, schema.names, (cells.name, label_column))
        kind = _plain_type(schema.field(cells.name).type)
        if not cells.fits(kind):
            raise ContractError(f"{path}: column '{cells.name}' is {str(kind)[:60]}, not {cells.what}")
        _check_label_type(path, file, label_column, classes)
        found: list[Any] = []
        labels: list[Tensor] = []
        for batch in _batches(path, file, [cells.name, label_column]):
            labels.append(_labels(path, batch.column(label_column), label_column, len(found), classes))
            found += _cells(path, batch.column(cells.name), cells.name, len(found))
        return found, torch.cat(labels) if labels else torch.zeros(0, dtype=torch.int64)


def _plain_type(kind: Any) -> Any:
    """The type of the values, for columns that store them by number (pandas' categories)."""
    return kind.value_type if str(kind).startswith("dictionary") else kind


def _check_label_type(path: Path, file: Any, column: str, classes: int) -> None:
    kind = str(_plain_type(file.schema_arrow.field(column).type))
    match = re.fullmatch(r"(u?)int(8|16|32|64)", kind)
    if match is None:
        lack = _first_null(path, file, column) if kind in ("double", "float", "halffloat", "null") else None
        why = "" if lack is None else f": row {lack} has no label"
        raise ContractError(f"{path}: column '{column}' is {kind[:60]}, not whole numbers{why}")
    most = 2 ** (int(match[2]) - (0 if match[1] else 1)) - 1
    if most < classes - 1:
        raise ContractError(
            f"{path}: column '{column}' is {kind}, which cannot hold 0..{classes - 1}: larger labels are lost; "
            "write int64"
        )


def _first_null(path: Path, file: Any, column: str) -> int | None:
    row = 0
    for batch in _batches(path, file, [column]):
        if batch.column(0).null_count:
            return row + int(batch.column(0).is_null().index(True).as_py())
        row += batch.num_rows
    return None


def _batches(path: Path, file: Any, columns: list[str]) -> Iterator[Any]:
    """Rows, some at a time, so that none unpacks far beyond what the file may; ContractError once it did."""
    size = path.stat().st_size
    allowed = ROOM + RATIO * size
    told = file.metadata
    chunks = [
        told.row_group(g).column(c) for g in range(told.num_row_groups) for c in range(told.num_columns)
    ]
    wanted = [
        chunk
        for chunk in chunks
        if any(
            chunk.path_in_schema == name or chunk.path_in_schema.startswith(f"{name}.") for name in columns
        )
    ]
    claimed = max(sum(c.total_uncompressed_size for c in wanted), unpacked(path, [pages(c) for c in wanted]))
    needed = max(claimed, told.num_rows * ROW)
    if needed > allowed:
        raise ContractError(_bomb(path, told.num_rows, needed, size))
    rows, read = 0, 0
    batch_rows = min(max(allowed // max(claimed, 1), 1), BATCH)
    for batch in file.iter_batches(batch_rows, columns=columns, use_threads=False):
        batch.validate(full=True)
        batch = _decoded(batch)
        rows, read = rows + batch.num_rows, read + batch.nbytes
        if read > allowed:
            raise ContractError(_bomb(path, told.num_rows, read, size))
        yield batch
    if rows != told.num_rows:
        raise ContractError(f"{path}: {rows} rows where the file promises {told.num_rows}")


def pages(chunk: Any) -> Chunk:
    """Where a column's pages lie in the file, its dictionary first."""
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset is not None:
        start = min(start, chunk.dictionary_page_offset)
    return Chunk(start, start + chunk.total_compressed_size)


def _bomb(path: Path, rows: int, needed: int, size: int) -> str:
    return (
        f"{path}: {rows} rows unpack to {needed / 2**20:.0f} MiB or more from {size} bytes; at most {RATIO} times "
        f"the file's size and {ROOM // 2**20} MiB are read"
    )


def _decoded(batch: Any) -> Any:
    """Columns as values, where they are stored by number: what they take is counted."""
    import pyarrow

    columns = [c.dictionary_decode() if str(c.type).startswith("dictionary") else c for c in batch.columns]
    return pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _check_nulls(path: Path, column: Any, name: str, first: int, what: str) -> None:
    if column.null_count:
        row = first + column.is_null().index(True).as_py()
        raise ContractError(f"{path}: row {row} of column '{name}' {what}")


def _labels(path: Path, column: Any, name: str, first: int, classes: int) -> Tensor:
    _check_nulls(path, column, name, first, "has no label")
    numbers = column.to_numpy(zero_copy_only=False)
    wrong = (numbers < 0) | (numbers >= classes)
    if wrong.any():
        row = int(wrong.argmax())
        raise ContractError(
            f"{path}: label {int(numbers[row])} in column '{name}' is not in 0..{classes - 1} (row {first + row})"
        )
    return torch.from_numpy(numbers.astype("int64"))


def _cells(path: Path, column: Any, name: str, first: int) -> list[Any]:
    _check_nulls(path, column, name, first, "is null")
    if str(column.type).startswith("struct"):
        column = column.field("bytes")
        _check_nulls(path, column, name, first, "is null")
    found: list[Any] = column.to_pylist()
    return found


# --------------------------------------------------------------------------- CSV and JSON lines


def read_text(path: Path) -> str:
    """A file's text: UTF-8, with or without a byte-order mark. ContractError names the first wrong byte."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ContractError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        known = " (it begins as UTF-16 does)" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise ContractError(
            f"{path}: not UTF-8 text at byte {error.start}{known}; save it as UTF-8"
        ) from None


def _rows(
    path: Path, rows: Iterator[tuple[int, Any, Any]], cells: Column, label_column: str, classes: int
) -> tuple[list[Any], Tensor]:
    """Checked texts and labels of (line, text, label)."""
    found: list[str] = []
    labels: list[int] = []
    for line, text, label in rows:
        where = f"{path}: line {line}"
        labels.append(_check_label(label, where, label_column, classes))
        if text is None or text == "":
            raise ContractError(f"{where} of column '{cells.name}' is empty")
        if not isinstance(text, str):
            raise ContractError(f"{where}: {shown(text)} in column '{cells.name}' is not text")
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ContractError(f"{where} of column '{cells.name}' holds half a character (a lone surrogate)")
        found.append(text)
    return found, torch.tensor(labels, dtype=torch.int64)


def _number(text: str) -> int | str:
    """What a cell of digits says."""
    return int(text) if WHOLE.fullmatch(text.strip()) else text


def _csv(path: Path, cells: Column, label_column: str, classes: int) -> tuple[list[Any], Tensor]:
    """Commas, quotes doubled inside quotes, names of the columns in the first line."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)

    def lines() -> Iterator[tuple[int, list[str]]]:
        begins = 1
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:
                raise ContractError(f"{path}: line {begins}: {error}") from None
            if row is None:
                return
            if row:
                yield begins, row
            begins = reader.line_num + 1

    rows = lines()
    _, header = next(rows, (1, []))
    wanted = (cells.name, label_column)
    if len(header) == 1 and (sign := next((s for s in ";\t|" if s in header[0]), None)):
        raise ContractError(f"{path}: columns are parted by {sign!r} in line 1, not by commas")
    _check_columns(path, header, wanted)
    text, label = (header.index(name) for name in wanted)

    def parted() -> Iterator[tuple[int, Any, Any]]:
        for line, row in rows:
            if len(row) != len(header):
                raise ContractError(f"{path}: line {line} has {len(row)} cells, line 1 has {len(header)}")
            yield line, row[text], _number(row[label])

    return _rows(path, parted(), cells, label_column, classes)


def once_only(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``json.loads``: an object whose fields have different names. ValueError otherwise."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{next(n for n in names if names.count(n) > 1)[:40]}' is there twice")
    return found


def _json_lines(path: Path, cells: Column, label_column: str, classes: int) -> tuple[list[Any], Tensor]:
    """An object per line."""

    def lines() -> Iterator[tuple[int, Any, Any]]:
        for line, text in enumerate(read_text(path).split("\n"), 1):
            if not text.strip():
                continue
            try:
                row = json.loads(text, object_pairs_hook=once_only)
            except (ValueError, RecursionError) as error:
                raise ContractError(f"{path}: line {line} is not JSON ({str(error)[:100]})") from None
            if not isinstance(row, dict):
                raise ContractError(f"{path}: line {line} is {type(row).__name__}, not an object of columns")
            for name in (cells.name, label_column):
                if name not in row:
                    raise ContractError(
                        f"{path}: line {line} has no column '{name}'; has {listed(list(row))}"
                    )
            yield line, row[cells.name], row[label_column]

    return _rows(path, lines(), cells, label_column, classes)
