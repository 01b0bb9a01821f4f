"""Tables: parquet in shards, CSV, JSON lines; what is wrong is named by file, row and column."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extras import needs

from mergesec.contracts import ContractError, DataContext, Split
from mergesec.text import pack_strings
from mergesec_tasks._folder import class_names
from mergesec_tasks._pages import Chunk, unpacked
from mergesec_tasks._tables import check_shards, image_cells, pages, read_table, split_files, text_cells
from mergesec_tasks.text.emotion import FolderText

pa = needs("pyarrow")
parquet = needs("pyarrow.parquet")

CLASSES = 4


def rows(count: int, start: int = 0) -> dict[str, Any]:
    """Row i is the text ``row i`` and has the label i mod 4."""
    return {
        "text": [f"row {i}" for i in range(start, start + count)],
        "label": [i % CLASSES for i in range(count)],
    }


def write(path: Path, columns: dict[str, Any], **types: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: pa.array(values, types.get(name)) for name, values in columns.items()}
    parquet.write_table(pa.table(arrays), path)
    return path


def read(*paths: Path, classes: int = CLASSES) -> tuple[list[Any], list[int]]:
    table = read_table(paths, text_cells("text"), "label", classes)
    return table.cells, table.targets.tolist()


def refused(path: Path, message: str, classes: int = CLASSES) -> None:
    with pytest.raises(ContractError, match=message) as caught:
        read(path, classes=classes)
    assert str(path) in str(caught.value)


def load(folder: Path) -> tuple[FolderText, dict[str, Split]]:
    task = FolderText(0, 0, "text", "label")
    task.name = "own"
    return task, task.load(DataContext(torch.device("cpu"), 0, str(folder)))


def named(folder: Path, names: Any = ("a", "b", "c", "d")) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes.json").write_text(json.dumps({"classes": list(names)}))
    return folder


# --------------------------------------------------------------------------- shards


@pytest.mark.parametrize("home", [".", "data"])
@pytest.mark.parametrize("tail", ["", "-b42a775f407cee45"])
def test_shards_are_read_in_order(tmp_path: Path, home: str, tail: str) -> None:
    whole = named(tmp_path / "whole")
    write(whole / "train.parquet", rows(140))
    write(whole / "test.parquet", rows(12))
    parted = named(tmp_path / "parted")
    for part in (10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9):
        write(
            parted / home / f"train-{part:05}-of-00011{tail}.parquet",
            rows(12, part * 12) if part < 10 else rows(20, 120),
        )
    write(parted / home / f"test-00000-of-00001{tail}.parquet", rows(12))
    (task, one), (_, other) = load(whole), load(parted)
    for name, split in one.items():
        assert other[name].inputs == split.inputs and torch.equal(other[name].targets, split.targets)
    assert task.partial == ""


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train-00000-of-00002"], "shard 1 of 2 is missing"),
        (["train-00001-of-00002"], "shard 0 of 2 is missing"),
        (["train-00000-of-00003", "train-00002-of-00003"], "shard 1 of 3 is missing"),
        (["train-00000-of-00001", "train-00000-of-00002"], "another number of shards"),
        (["train-00000-of-00001", "train-00000-of-00001-abcdef0123456789"], "shard 0 is there twice"),
        (["train-00000-of-00001", "train"], "split 'train' is there twice"),
        (["train-00000-of-00001", "data/train-00000-of-00001"], "split 'train' is there twice"),
        (["train-00000-of-00000"], "no shard 0 of 0"),
        (["train-00000-of-00001", "train-00001-of-00001"], "no shard 1 of 1"),
    ],
)
def test_shards_that_are_no_set_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    (tmp_path / "data").mkdir()
    for name in names:
        (tmp_path / f"{name}.parquet").write_bytes(b"")
    with pytest.raises(ContractError, match=message):
        split_files(tmp_path, "train", ("parquet",))


def test_shards_of_a_cut_off_download_are_refused() -> None:
    whole = [Path(f"x/train-0000{i}-of-00003.parquet") for i in range(3)]
    check_shards(whole)
    with pytest.raises(ContractError, match="shard 2 of 3 is missing"):
        check_shards(whole[:2])


def test_a_row_is_told_by_its_own_file(tmp_path: Path) -> None:
    first = write(tmp_path / "train-00000-of-00002.parquet", rows(10))
    second = write(tmp_path / "train-00001-of-00002.parquet", rows(10))
    table = read_table([first, second], text_cells("text"), "label", CLASSES)
    assert table.place(9) == f"{first}: row 9 of column 'text'"
    assert table.place(13) == f"{second}: row 3 of column 'text'"


def test_a_split_in_two_formats_is_refused(tmp_path: Path) -> None:
    folder = named(tmp_path / "own")
    write(folder / "train.parquet", rows(140))
    (folder / "train.csv").write_text("text,label\n")
    with pytest.raises(
        ContractError, match=r"split 'train' is there twice: .*train\.parquet and .*train\.csv"
    ):
        load(folder)


# --------------------------------------------------------------------------- names of classes


def told(path: Path, names: list[str], count: int = 140) -> None:
    """As ``datasets`` writes a column of classes."""
    features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    table = pa.table(rows(count)).replace_schema_metadata({"huggingface": json.dumps(features)})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path)


def test_names_that_parquet_files_tell_are_used_and_compared(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    told(folder / "data" / "train-00000-of-00001.parquet", ["a", "b", "c", "d"])
    told(folder / "data" / "test-00000-of-00001.parquet", ["a", "b", "c", "d"], 8)
    assert load(folder)[0].classes == ["a", "b", "c", "d"]
    named(folder, ["A", "B", "C", "D"])  # other words for the same classes
    assert load(folder)[0].classes == ["A", "B", "C", "D"]
    for other in (["b", "a", "c", "d"], ["a", "b", "c", "d", "e"]):
        named(folder, other)
        with pytest.raises(ContractError, match=r"classes\.json: . classes, where the parquet files name 4"):
            load(folder)
    (folder / "classes.json").unlink()
    told(folder / "data" / "test-00000-of-00001.parquet", ["b", "a", "c", "d"], 8)
    with pytest.raises(ContractError, match=r"test-00000-of-00001\.parquet: names other classes"):
        load(folder)


@pytest.mark.parametrize(
    "text",
    ['{"classes": ["a", "b"]}', '\ufeff{"classes": ["a", "b"], "more": 1}', '["a", "b"]', '\ufeff["a", "b"]'],
)
def test_class_names_are_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "classes.json"
    path.write_text(text, encoding="utf-8")
    assert class_names(path, "classes") == ["a", "b"]


def test_numbers_are_names(tmp_path: Path) -> None:
    path = tmp_path / "classes.json"
    path.write_text("[0, 1, 10]")
    assert class_names(path, "classes") == ["0", "1", "10"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"classes": ["a", "b", "a"]}', "classes 0 and 2 are both named 'a'"),
        (b'{"classes": ["a", " a"]}', "classes 0 and 1 are both named"),
        ('{"classes": ["caf\u00e9", "cafe\u0301"]}'.encode(), "are both named"),
        (b'{"classes": ["1", 1]}', "are both named '1'"),
        (b'{"classes": ["a", null]}', "class 1 is None, not a name"),
        (b'{"classes": ["a", true]}', "class 1 is True, not a name"),
        (b'{"classes": ["a", 0.5]}', r"class 1 is 0\.5, not a name"),
        (b'{"classes": ["a", ["b"]]}', r"class 1 is \['b'\], not a name"),
        (b'{"classes": ["a", ""]}', "class 1 has a name of 0 letters"),
        (b'{"classes": ["a", "%s"]}' % (b"x" * 300), "class 1 has a name of 300 letters"),
        (b'{"classes": ["a", "b\\n| c"]}', "no letter"),
        (b'{"classes": ["a", "\\ud800"]}', "no letter"),
        (b'{"classes": ["a", %s]}' % (b"9" * 5000), "not JSON"),
        (b'{"classes": []}', "no list 'classes'; has classes"),
        (b'{"classes": "ab"}', "no list 'classes'; has classes"),
        (b'{"names": ["a"]}', "no list 'classes'; has names"),
        (b'{"classes": ["a"], "classes": ["b"]}', "'classes' is there twice"),
        (b'"a"', "str, not {'classes'"),
        (b"null", "NoneType, not {'classes'"),
        (b"[" * 100_000, "not JSON"),
        (b"", "not JSON"),
        (b'{"classes": ["\xe9"]}', "not UTF-8 text at byte 14"),
        ('{"classes": ["a"]}'.encode("utf-16"), "begins as UTF-16"),
    ],
)
def test_what_is_no_list_of_names_is_refused_by_file(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "classes.json"
    path.write_bytes(text)
    with pytest.raises(ContractError, match=message) as caught:
        class_names(path, "classes")
    assert str(path) in str(caught.value) and len(str(caught.value)) < 600


# --------------------------------------------------------------------------- parquet


@pytest.mark.parametrize("kind", ["int8", "uint8", "int32", "uint64", "dictionary"])
def test_labels_of_any_width_are_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "train.parquet"
    columns: dict[str, Any] = {"text": pa.array(["a", "b", "a"]), "label": pa.array([3, 0, 3])}
    if kind == "dictionary":  # pandas' categories
        columns = {name: array.dictionary_encode() for name, array in columns.items()}
    else:
        columns["label"] = columns["label"].cast(kind)
    parquet.write_table(pa.table(columns), path)
    assert read(path) == (["a", "b", "a"], [3, 0, 3])


@pytest.mark.parametrize(
    ("columns", "types", "classes", "message"),
    [
        ({"label": [0, None, 1]}, {}, 4, "row 1 of column 'label' has no label"),
        (
            {"label": [0.0, None, 1.0]},
            {},
            4,
            "column 'label' is double, not whole numbers: row 1 has no label",
        ),
        ({"label": [0.0, 1.0, 2.0]}, {}, 4, "column 'label' is double, not whole numbers$"),
        ({"label": [None] * 3}, {}, 4, "column 'label' is null, not whole numbers: row 0"),
        ({"label": ["0", "1", "2"]}, {}, 4, "column 'label' is string, not whole numbers"),
        ({"label": [True, False, True]}, {}, 4, "column 'label' is bool, not whole numbers"),
        ({"label": [[0], [1], [2]]}, {}, 4, "column 'label' is list"),
        ({"label": [0, 1, 4]}, {}, 4, r"label 4 in column 'label' is not in 0\.\.3 \(row 2\)"),
        ({"label": [0, -1, 2]}, {}, 4, r"label -1 in column 'label' is not in 0\.\.3 \(row 1\)"),
        ({"label": [2**63, 0, 0]}, {"label": "uint64"}, 4, "label 9223372036854775808 in column"),
        ({"label": [200 - 256, 0, 1]}, {"label": "int8"}, 128, "label -56"),
        ({"label": [0, 1, 2]}, {"label": "uint8"}, 257, r"uint8, which cannot hold 0\.\.256"),
        ({"label": [0, 1, 2]}, {"label": "int8"}, 129, r"int8, which cannot hold 0\.\.128"),
        ({"text": ["a", None, "c"]}, {}, 4, "row 1 of column 'text' is null"),
        ({"text": [b"a", b"b", b"c"]}, {}, 4, "column 'text' is binary, not text"),
        ({"text": [["a"], ["b"], ["c"]]}, {}, 4, "column 'text' is list"),
    ],
)
def test_wrong_cells_are_told_by_row_and_column(
    tmp_path: Path, columns: dict[str, Any], types: dict[str, str], classes: int, message: str
) -> None:
    given = {"text": ["a", "b", "c"], "label": [0, 1, 2], **columns}
    refused(write(tmp_path / "train.parquet", given, **types), message, classes)


def test_widths_that_just_hold_the_labels(tmp_path: Path) -> None:
    for kind, classes in (("int8", 128), ("uint8", 256)):
        path = write(tmp_path / f"{kind}.parquet", {"text": ["a"], "label": [classes - 1]}, label=kind)
        assert read(path, classes=classes)[1] == [classes - 1]


def test_columns_that_are_missing_or_doubled(tmp_path: Path) -> None:
    path = write(tmp_path / "train.parquet", {"text": ["a"], "sentiment": [0]})
    refused(path, "no column 'label'; has text, sentiment")
    table = pa.Table.from_arrays(
        [pa.array(["a"]), pa.array([0]), pa.array([1])], names=["text", "label", "label"]
    )
    parquet.write_table(table, path)
    refused(path, "2 columns are named 'label'")
    refused(write(path, {"text": [], "label": []}, text="string", label="int64"), "no rows")


def test_text_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    broken = pa.StringArray.from_buffers(
        2, pa.py_buffer(b"\x00\x00\x00\x00\x01\x00\x00\x00\x02\x00\x00\x00"), pa.py_buffer(b"a\xff")
    )
    path = tmp_path / "train.parquet"
    parquet.write_table(pa.table({"text": broken, "label": pa.array([0, 1])}), path)
    refused(path, "not a readable parquet file")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"", lambda data: data[:-1], lambda data: data[: len(data) // 2], lambda data: b"PAR1" * 8,
        lambda data: data[:40] + bytes(40) + data[80:], lambda data: b"text,label\na,0\n",
    ],
)  # fmt: skip
def test_damaged_parquet_is_refused_by_name(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = write(tmp_path / "train.parquet", rows(400))
    path.write_bytes(damage(path.read_bytes()))
    refused(path, "not a readable parquet file")


def _many_rows(path: Path) -> None:
    labels = pa.array(np.zeros(10_000_000, np.int8))
    parquet.write_table(pa.table({"text": pa.array(labels.cast("string")), "label": labels}), path)


def _one_long_text(path: Path) -> None:
    parquet.write_table(pa.table({"text": ["x" * 100_000_000], "label": [0]}), path, compression="zstd")


def _one_text_many_times(path: Path, store_schema: bool = False) -> None:
    texts = pa.DictionaryArray.from_arrays(pa.array(np.zeros(4000, np.int32)), pa.array(["x" * 1_000_000]))
    table = pa.table({"text": texts, "label": pa.array(np.zeros(4000, np.int64))})
    parquet.write_table(table, path, compression="zstd", store_schema=store_schema)


def _one_text_by_number(path: Path) -> None:
    _one_text_many_times(path, store_schema=True)


def _zigzag(number: int, length: int = 1) -> bytes:
    """A number as Thrift writes it, at least ``length`` bytes long."""
    found, rest = bytearray(), number << 1
    while rest > 127:
        found.append(rest & 127 | 128)
        rest >>= 7
    found.append(rest)
    while len(found) < length:
        found[-1] |= 128
        found.append(0)
    return bytes(found)


def _one_long_text_that_is_denied(path: Path) -> None:
    """The summary says 1000 bytes; the page says what it is."""
    _one_long_text(path)
    group = parquet.read_metadata(path).row_group(0)
    data = bytearray(path.read_bytes())
    summary = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    for size in {group.total_byte_size, *(group.column(c).total_uncompressed_size for c in range(2))}:
        told = _zigzag(size)
        place = data.find(told, summary) if size > 2**20 else -1
        while place >= 0:
            data[place : place + len(told)] = _zigzag(1000, len(told))
            place = data.find(told, summary)
    path.write_bytes(data)
    assert parquet.read_metadata(path).row_group(0).column(0).total_uncompressed_size == 1000


READER = """
import resource, sys
from pathlib import Path
import pyarrow.parquet
from mergesec_tasks._tables import read_table, text_cells
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_table([Path(sys.argv[1])], text_cells("text"), "label", 4)
except ValueError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [_many_rows, _one_long_text, _one_long_text_that_is_denied, _one_text_many_times, _one_text_by_number],
)
def test_a_small_file_that_unpacks_to_hundreds_of_megabytes(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    path = tmp_path / "train.parquet"
    make(path)
    assert path.stat().st_size < 100_000
    ran = subprocess.run(
        [sys.executable, "-c", READER, str(path)], check=True, capture_output=True, text=True, timeout=120
    )
    message, megabytes = ran.stdout.splitlines()
    assert re.search(r"train\.parquet: \d+ rows unpack to \d+ MiB or more from \d+ bytes; at most", message)
    assert int(megabytes) < 350, megabytes


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("extras", [True, False])
def test_pages_say_what_the_summary_says(
    tmp_path: Path, compression: str, version: str, extras: bool
) -> None:
    """But for their headers, which the summary counts."""
    path = tmp_path / "train.parquet"
    parquet.write_table(
        pa.table(rows(20_000)), path, compression=compression, data_page_version=version, data_page_size=4096,
        write_statistics=extras, write_page_index=extras, use_dictionary=extras, row_group_size=6_000,
    )  # fmt: skip
    told = parquet.read_metadata(path)
    chunks = [
        told.row_group(g).column(c) for g in range(told.num_row_groups) for c in range(told.num_columns)
    ]
    summary = sum(chunk.total_uncompressed_size for chunk in chunks)
    assert 0.98 * summary < unpacked(path, [pages(chunk) for chunk in chunks]) < summary


def test_pages_of_damaged_files_are_walked_once(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for data in (b"", bytes(5_000), b"\xff" * 5_000, b"\x1c" * 5_000, b"\x19\xf9" * 5_000):
        path.write_bytes(data)
        assert unpacked(path, [Chunk(0, 2**60)] * 100_000) == 0
    assert unpacked(path, [Chunk(-5, 3), Chunk(2**60, 2**61)]) == 0


def test_many_texts_of_one_kind_are_no_bomb(tmp_path: Path) -> None:
    path = write(tmp_path / "train.parquet", {"text": ["the same text"] * 200_000, "label": [0] * 200_000})
    assert len(read(path)[0]) == 200_000


def test_class_names_and_rows_of_images(tmp_path: Path) -> None:
    """A struct as ``datasets`` writes it; a null inside of it is found."""
    cells = pa.array([{"bytes": b"a", "path": None}, {"bytes": None, "path": "b.png"}])
    path = tmp_path / "train.parquet"
    parquet.write_table(pa.table({"image": cells, "label": pa.array([0, 1])}), path)
    with pytest.raises(ContractError, match="row 1 of column 'image' is null"):
        read_table([path], image_cells("image"), "label", CLASSES)
    parquet.write_table(pa.table({"image": pa.array(["a", "b"]), "label": pa.array([0, 1])}), path)
    with pytest.raises(ContractError, match=r"column 'image' is string, not encoded images"):
        read_table([path], image_cells("image"), "label", CLASSES)
    for cell in ({"url": b"a"}, {"bytes": {"bytes": b"a"}}, {"bytes": "a"}):
        parquet.write_table(pa.table({"image": pa.array([cell]), "label": pa.array([0])}), path)
        with pytest.raises(ContractError, match=r"column 'image' is struct"):
            read_table([path], image_cells("image"), "label", CLASSES)
    for kind in ("binary", "large_binary", pa.binary(1)):
        parquet.write_table(pa.table({"image": pa.array([b"a"], kind), "label": pa.array([0])}), path)
        assert read_table([path], image_cells("image"), "label", CLASSES).cells == [b"a"]


# --------------------------------------------------------------------------- CSV and JSON lines


TEXTS = [
    "plain",
    "with, comma",
    'a "quoted" word',
    "two\nlines",
    "\u00e9\u2028\U0001f600",
    " spaces ",
    "\ttab",
]


def as_csv(path: Path, texts: Sequence[str] = TEXTS, mark: str = "") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(mark)
        csv.writer(file).writerows(
            [("id", "label", "text"), *((i, i % CLASSES, t) for i, t in enumerate(texts))]
        )
    return path


def as_lines(path: Path, texts: Sequence[str] = TEXTS, mark: str = "", ascii_only: bool = False) -> Path:
    lines = [
        json.dumps({"label": i % CLASSES, "text": t}, ensure_ascii=ascii_only) for i, t in enumerate(texts)
    ]
    path.write_text(mark + "\n".join(lines) + "\n\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_csv_and_json_lines_are_read_as_parquet_is(tmp_path: Path, mark: str) -> None:
    wanted = (TEXTS, [i % CLASSES for i in range(len(TEXTS))])
    assert read(write(tmp_path / "train.parquet", {"text": wanted[0], "label": wanted[1]})) == wanted
    assert read(as_csv(tmp_path / "train.csv", mark=mark)) == wanted
    assert read(as_lines(tmp_path / "train.jsonl", mark=mark)) == wanted
    assert read(as_lines(tmp_path / "train.jsonl", mark=mark, ascii_only=True)) == wanted
    windows = (tmp_path / "train.jsonl").read_bytes().replace(b"\n", b"\r\n")
    (tmp_path / "train.jsonl").write_bytes(windows)
    assert read(tmp_path / "train.jsonl") == wanted


@pytest.mark.parametrize(("kind", "make"), [("csv", as_csv), ("jsonl", as_lines)])
def test_a_task_of_text_files_is_the_task_of_parquet(
    tmp_path: Path, kind: str, make: Callable[[Path, Sequence[str]], Path]
) -> None:
    one, other = named(tmp_path / "parquet"), named(tmp_path / kind)
    for split, count in (("train", 140), ("test", 12)):
        write(one / f"{split}.parquet", rows(count))
        make(other / f"{split}.{kind}", rows(count)["text"])
    packed, other_packed = (task.pack(splits) for task, splits in (load(one), load(other)))
    assert packed.keys() == other_packed.keys()
    assert all(torch.equal(packed[name], other_packed[name]) for name in packed)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no column 'text'; has $"),
        (b"text,label\n", "no rows"),
        (b"text;label\na;0\n", "columns are parted by ';' in line 1"),
        (b"text\tlabel\na\t0\n", "columns are parted by '.t' in line 1"),
        (b"words,label\na,0\n", "no column 'text'; has words, label"),
        (b"text,label,label\na,0,0\n", "2 columns are named 'label'"),
        (b"text,label\na,0\nb\n", "line 3 has 1 cells, line 1 has 2"),
        (b"text,label\na, b,0\n", "line 2 has 3 cells"),
        (b"text,label\na,\n", "line 2 of column 'label' has no label"),
        (b"text,label\n,0\n", "line 2 of column 'text' is empty"),
        (b"text,label\na,1.0\n", "line 2: label '1.0' in column 'label' is not a whole number"),
        (b"text,label\na,joy\n", "label 'joy' in column 'label' is not a whole number"),
        ("text,label\na,\u0661\n".encode(), "is not a whole number"),
        (b"text,label\na," + b"9" * 6000 + b"\n", "is not a whole number"),
        (b'text,label\n"two\nlines",0\nb,4\n', r"line 4: label 4 in column 'label' is not in 0\.\.3"),
        (b"text,label\na,-1\n", "line 2: label -1"),
        (b'text,label\n"a,0\n', "line 2: unexpected end of data"),
        (b'text,label\n"a"b,0\n', "line 2: ',' expected after '\"'"),
        (b"text,label\n" + b"x" * 200_000 + b",0\n", "line 2: field larger than field limit"),
        (b"text,label\ncaf\xe9,0\n", "not UTF-8 text at byte 14; save it as UTF-8"),
        ("text,label\na,0\n".encode("utf-16"), "begins as UTF-16 does"),
    ],
)
def test_wrong_csv_is_told_by_line_and_column(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes(data)
    refused(path, message)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\n \n", "no rows"),
        (b'[{"text": "a", "label": 0}]', "line 1 is list, not an object"),
        (b'{"text": "a", "label": 0}\n\n{"text": "b"', "line 3 is not JSON"),
        (b'{"text": "a", "label": 0}\n{"text": "b"}', "line 2 has no column 'label'; has text"),
        (b'{"text": "a", "label": 0, "label": 1}', "line 1 is not JSON .'label' is there twice"),
        (b'{"text": "a", "label": null}', "line 1 of column 'label' has no label"),
        (b'{"text": null, "label": 0}', "line 1 of column 'text' is empty"),
        (b'{"text": 7, "label": 0}', "line 1: 7 in column 'text' is not text"),
        (b'{"text": "a", "label": "0"}', "label '0' in column 'label' is not a whole number"),
        (b'{"text": "a", "label": true}', "label True in column 'label' is not a whole number"),
        (b'{"text": "a", "label": 1.0}', r"label 1\.0 in column 'label' is not a whole number"),
        (b'{"text": "a", "label": 1e400}', "label inf"),
        (b'{"text": "a", "label": {"n": [1, 2]}}', "is not a whole number"),
        (b'{"text": "a", "label": 4}', r"line 1: label 4 in column 'label' is not in 0\.\.3"),
        (b'{"text": "a", "label": ' + b"9" * 5000 + b"}", "line 1 is not JSON"),
        (b'{"text": "a", "label": ' + b"9" * 4000 + b"}", r"label 9{57}\.\.\. in column"),
        (b'{"text": "\\ud800", "label": 0}', "half a character"),
        (b'{"text": "a", "label": ' + b"[" * 100_000 + b"}", "line 1 is not JSON"),
        (b'{"text": "\xff", "label": 0}', "not UTF-8 text at byte 10"),
    ],
)
def test_wrong_json_lines_are_told_by_line_and_column(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(data)
    refused(path, message)


def test_half_a_character_is_not_stored() -> None:
    with pytest.raises(ContractError, match=r"text 1 of 2 holds half a character"):
        pack_strings(["a", "b\ud800"])


# --------------------------------------------------------------------------- partial sets, real sets


def test_classes_without_rows_are_told(tmp_path: Path) -> None:
    folder = named(tmp_path / "own", "abcdef")
    write(folder / "train.parquet", rows(140))
    write(folder / "test.parquet", rows(3))
    task, _ = load(folder)
    assert task.partial == "2 of 6 classes without a row in train, 3 of 6 classes without a row in test"
