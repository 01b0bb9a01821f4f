"""Mutated images, folders, parquet and text files: each is read, or refused by one message that names the file.

Seeded and bounded: ``MERGESEC_CAMPAIGN`` inputs of each kind (120 by default, thousands on demand).
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import resource
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extras import needs
from PIL import Image

from mergesec.contracts import ContractError, DataContext, Split, Task
from mergesec.errors import UsageError
from mergesec_tasks.text.emotion import FolderText
from mergesec_tasks.vision.folder import FolderTask, decode

BUDGET = int(os.environ.get("MERGESEC_CAMPAIGN", "120"))
SECONDS = 20.0
MEGABYTES = 1500
"""What all inputs of a kind may add to the most memory that the process ever took."""
LONGEST = 1500
"""Letters of a message, which may hold two long paths."""
ODD_NAMES = (
    ".hidden", "._00.png", ".ipynb_checkpoints", "__MACOSX", "Thumbs.db", "ANT", "ant ", "caf\u00e9", "cafe\u0301", "x" * 200,
    "a|b", "=cmd", "\x1b[31m", "new\nline", "\u202e", "00.png", "classes.json", "data", "train", "stranger", "0",
)  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 3, 10**30, 1e308, 0.5, "", " ", "0", "x" * 300, "\x00", "\ud800", "a\nb", [], {}, [[[]]], {"a": None},
)  # fmt: skip


def _bytes(rng: random.Random, data: bytes, tail: bool = False) -> bytes:
    """A few bytes changed, dropped, doubled or put in; often where a file has its lengths and offsets."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 12))):
        if not found:
            break
        near = rng.randrange(min(len(found), 80)) if rng.random() < 0.5 else rng.randrange(len(found))
        place = len(found) - 1 - near if tail else near
        how = rng.randrange(6)
        if how < 2:
            found[place] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        elif how == 2:
            del found[place : place + rng.randint(1, 40)]
        elif how == 3:
            found[place:place] = found[place : place + rng.randint(1, 200)]
        elif how == 4:
            found[place : place + 4] = rng.choice(
                (b"\xff\xff\xff\x7f", b"\x7f\xff\xff\xff", bytes(4), b"\xff" * 4)
            )
        else:
            del found[rng.randrange(len(found)) :]
    return bytes(found)


def _met(what: str, folder: Path, read: Callable[[], object]) -> str:
    """What is wrong with how an input was met; empty if it was read, or refused as it should be."""
    started = time.perf_counter()
    try:
        read()
    except (ContractError, FileNotFoundError, UsageError) as error:
        text = str(error)
        if len(text) > LONGEST or "Traceback" in text:
            return f"{what}: a message of {len(text)} characters: {text[:200]}"
        if str(folder) not in text and "leave none" not in text:
            return f"{what}: a message that names no file: {text[:200]}"
    except Exception as error:
        return f"{what}: {type(error).__name__}: {str(error)[:200]}"
    spent = time.perf_counter() - started
    return f"{what}: {spent:.0f} s" if spent > SECONDS else ""


def _all_met(inputs: Callable[[int], str]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = [inputs(number) for number in range(BUDGET)]
    wrong = [text for text in found if text]
    assert not wrong, f"{len(wrong)} of {len(found)}\n" + "\n".join(wrong[:10])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    assert grown < MEGABYTES, f"{grown} MB"


def _load(task: Task, folder: Path) -> dict[str, Split]:
    """Splits of a task, and that they are what their contract says."""
    task.name = "own"
    splits = task.load(DataContext(torch.device("cpu"), 0, str(folder)))
    for split in splits.values():
        assert len(split.inputs) == len(split.targets)
        assert bool(((split.targets >= 0) & (split.targets < len(task.classes))).all())
    task.pack(splits)
    return splits


# --------------------------------------------------------------------------- images


def _images() -> list[bytes]:
    """Small images of every format and depth, with tags, palettes, alpha, frames."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 4), dtype=np.uint8)
    colour, alpha = Image.fromarray(noise[..., :3]), Image.fromarray(noise)
    deep = Image.fromarray(np.random.default_rng(1).integers(0, 65536, (6, 8), dtype=np.uint16))
    tags = Image.Exif()
    tags[0x0112] = 6
    found = []

    def keep(image: Image.Image, kind: str, **options: Any) -> None:
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        found.append(stream.getvalue())

    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        keep(colour, kind, exif=tags.tobytes())
    for kind in ("BMP", "GIF", "PPM"):
        keep(colour, kind)
    for compression in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits"):
        keep(colour, "TIFF", compression=compression)
    for kind in ("PNG", "WEBP", "TIFF"):
        keep(alpha, kind)
        keep(colour, kind, save_all=True, append_images=[colour.rotate(90)])
    keep(colour.quantize(16), "PNG", transparency=3)
    keep(colour.quantize(16), "GIF", transparency=3)
    keep(colour, "GIF", save_all=True, append_images=[colour.rotate(90)])
    keep(colour, "JPEG", progressive=True)
    keep(colour, "MPO", save_all=True, append_images=[colour.resize((8, 6))])
    keep(colour.convert("CMYK"), "JPEG")
    keep(colour.convert("L"), "BMP")
    keep(colour.convert("1"), "TIFF", compression="group4")
    for kind in ("PNG", "TIFF", "PPM"):
        keep(deep, kind)
    return found


def _with_sums(data: bytes) -> bytes:
    """A PNG whose chunks have the right checksums again, so that what is in them is looked at."""
    found, place = bytearray(data), 8
    while place + 12 <= len(found):
        end = place + 8 + int.from_bytes(found[place : place + 4], "big")
        if end + 4 > len(found):
            break
        found[end : end + 4] = zlib.crc32(found[place + 4 : end]).to_bytes(4, "big")
        place = end + 4
    return bytes(found)


def test_mutated_images_are_read_or_refused(tmp_path: Path) -> None:
    rng = random.Random(30)
    seeds = _images()

    def one(number: int) -> str:
        data = _bytes(rng, rng.choice(seeds))
        if data.startswith(b"\x89PNG") and rng.random() < 0.7:
            data = _with_sums(data)

        def read() -> None:
            assert decode([data], [0], 8, lambda row: f"{tmp_path}/x.png").shape == (1, 3, 8, 8)

        return _met(f"image {number}", tmp_path, read)

    _all_met(one)


# --------------------------------------------------------------------------- folders of classes


def _class_folders(folder: Path, seeds: list[bytes]) -> None:
    """Three classes of few images each."""
    for split, rows in (("train", 35), ("test", 2)):
        for label, name in enumerate(("ant", "bee", "caf\u00e9")):
            (folder / split / name).mkdir(parents=True)
            for row in range(rows):
                (folder / split / name / f"{row:02}.png").write_bytes(seeds[(row + label) % len(seeds)])


def _spot(rng: random.Random, folder: Path) -> Path:
    return rng.choice(sorted(folder.rglob("*")))


def _changed_folder(rng: random.Random, folder: Path) -> None:
    """A few entries dropped, renamed, damaged, or joined by what is none."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        spot = _spot(rng, folder)
        home = spot if spot.is_dir() and not spot.is_symlink() else spot.parent
        other = home / rng.choice(ODD_NAMES)
        how = rng.randrange(9)
        if how == 0:
            shutil.rmtree(spot) if spot.is_dir() and not spot.is_symlink() else spot.unlink()
        elif how == 1 and not os.path.lexists(spot.parent / other.name):
            spot.rename(spot.parent / other.name)
        elif how == 2 and not os.path.lexists(other):
            other.mkdir()
        elif how == 3 and not os.path.lexists(other):
            other.symlink_to(rng.choice(("..", ".", "/dev/zero", "gone", "00.png", str(folder), other.name)))
        elif how == 4 and not os.path.lexists(other.with_suffix(".png")):
            os.mkfifo(other.with_suffix(".png"))
        elif how == 5 and spot.is_file():
            data = _bytes(rng, spot.read_bytes())
            spot.unlink()  # a link to what other inputs read, too
            spot.write_bytes(data)
        elif how == 6 and not other.is_dir():
            other.unlink(missing_ok=True)
            other.write_bytes(rng.choice((b"", b"PAR1", b"{}", b"\xff\xfe")))
        elif how == 7:
            names: list[Any] = ["ant", "bee", "caf\u00e9"]
            for _ in range(rng.randrange(3)):
                names[rng.randrange(len(names))] = rng.choice(ODD)
            content = rng.choice((names, {"classes": names}, {"classes": rng.choice(ODD)}, rng.choice(ODD)))
            path = folder / "classes.json"
            if not path.is_dir():
                path.unlink(missing_ok=True)
                path.write_bytes(json.dumps(content).encode())
        elif how == 8 and spot.is_file():
            shutil.copy(spot, home / f"{rng.randrange(99)}.PNG")


def test_mutated_folders_are_read_or_refused(tmp_path: Path) -> None:
    rng = random.Random(31)
    seeds = [data for data in _images() if data.startswith(b"\x89PNG") and b"acTL" not in data]
    good = tmp_path / "good"
    _class_folders(good, seeds)
    assert len(_load(FolderTask(8, 0, 0, "image", "label"), good)["test"]) == 6

    def one(number: int) -> str:
        folder = tmp_path / f"own{number}"
        shutil.copytree(good, folder, copy_function=os.link)
        _changed_folder(rng, folder)
        wrong = _met(folder.name, folder, lambda: _load(FolderTask(8, 0, 0, "image", "label"), folder))
        shutil.rmtree(folder)
        return wrong

    _all_met(one)


# --------------------------------------------------------------------------- parquet


def _columns(rng: random.Random, count: int) -> dict[str, Any]:
    """Two columns, now and then of another type, width or name, or with gaps."""
    import pyarrow as pa

    labels: Any = [i % 3 for i in range(count)]
    texts: Any = [f"row {i} {'x' * rng.randrange(20)}" for i in range(count)]
    if rng.random() < 0.3:
        labels[rng.randrange(count)] = rng.choice((None, -1, 3, 200, 2**40))
    if rng.random() < 0.2:
        texts[rng.randrange(count)] = rng.choice((None, "", "\x00", "x" * 10_000))
    kind = rng.choice(
        ("int64", "int64", "int32", "int8", "uint8", "uint64", "float64", "string", "bool", "int16")
    )
    try:
        label = pa.array(labels).cast(kind)
    except pa.ArrowInvalid:
        label = pa.array(labels)
    text = pa.array(texts)
    how = rng.randrange(8)
    if how == 0:
        text = text.cast(rng.choice(("large_string", "binary")))
    elif how == 1:
        text, label = text.dictionary_encode(), label.dictionary_encode()
    elif how == 2:
        text = pa.array([[value] for value in texts])
    columns = {"text": text, "label": label}
    if rng.random() < 0.1:
        columns[rng.choice(ODD_NAMES)] = columns.pop(rng.choice(("text", "label")))
    return columns


def test_mutated_parquet_files_are_read_or_refused(tmp_path: Path) -> None:
    needs("pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as parquet

    rng = random.Random(32)
    images = _images()[1:2]

    def write(path: Path, count: int, image: bool) -> None:
        columns = _columns(rng, count)
        if image:
            cell: Any = rng.choice((images[0], {"bytes": images[0], "path": None}))
            columns = {
                "image": pa.array([cell] * count),
                "label": columns.get("label", pa.array([0] * count)),
            }
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(
            pa.table(columns), path, compression=rng.choice(("none", "snappy", "zstd", "gzip", "brotli")),
            row_group_size=rng.choice((50, 1000)), store_schema=rng.random() < 0.5,
            use_dictionary=rng.random() < 0.5, data_page_version=rng.choice(("1.0", "2.0")),
        )  # fmt: skip

    def one(number: int) -> str:
        folder = tmp_path / f"own{number}"
        folder.mkdir()
        image = number % 3 == 0
        (folder / "classes.json").write_text('{"classes": ["a", "b", "c"]}')
        parts = rng.choice((1, 1, 1, 2, 3))
        named = "train.parquet" if parts == 1 else "train-{:05}-of-{:05}.parquet"
        homes = rng.choice((("",), ("data",), ("", "data")))
        files = [folder / rng.choice(homes) / named.format(part, parts) for part in range(parts)]
        files.append(folder / "test.parquet")
        for path in files:
            write(path, 110, image)
        if number % 2:
            path = rng.choice(files)
            path.write_bytes(_bytes(rng, path.read_bytes(), tail=rng.random() < 0.6))
        if rng.random() < 0.1:
            rng.choice(files).unlink()
        task: Task = FolderTask(8, 0, 0, "image", "label") if image else FolderText(0, 0, "text", "label")
        wrong = _met(folder.name, folder, lambda: _load(task, folder))
        if not wrong:
            shutil.rmtree(folder)
        return wrong

    _all_met(one)


# --------------------------------------------------------------------------- text


def _as_csv(rng: random.Random, rows: list[tuple[Any, Any]]) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator=rng.choice(("\n", "\r\n")), quoting=rng.choice((0, 1)))
    writer.writerows([("text", "label"), *rows])
    return stream.getvalue().encode("utf-8", "surrogatepass")


def _as_lines(rng: random.Random, rows: list[tuple[Any, Any]]) -> bytes:
    escaped = rng.random() < 0.5
    lines = [json.dumps({"text": text, "label": label}, ensure_ascii=escaped) for text, label in rows]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def test_mutated_text_files_are_read_or_refused(tmp_path: Path) -> None:
    rng = random.Random(33)

    def one(number: int) -> str:
        folder = tmp_path / f"own{number}"
        folder.mkdir()
        names = b'{"classes": ["a", "b", "c"]}'
        (folder / "classes.json").write_bytes(_bytes(rng, names) if number % 5 == 0 else names)
        for split in ("train", "test"):
            rows: list[tuple[Any, Any]] = [(f'row "{i}", caf\u00e9', i % 3) for i in range(110)]
            if number % 2:
                rows[rng.randrange(110)] = rng.choice(((rng.choice(ODD), 0), ("a", rng.choice(ODD))))
            kind, make = rng.choice((("csv", _as_csv), ("jsonl", _as_lines)))
            data = rng.choice((b"", b"", b"\xef\xbb\xbf")) + make(rng, rows)
            if rng.random() < 0.05:
                data = data.decode("utf-8", "replace").encode(rng.choice(("utf-16", "latin-1")), "replace")
            if rng.random() < 0.4:
                data = _bytes(rng, data, tail=rng.random() < 0.3)
            (folder / f"{split}.{kind}").write_bytes(data)
        wrong = _met(folder.name, folder, lambda: _load(FolderText(0, 0, "text", "label"), folder))
        if not wrong:
            shutil.rmtree(folder)
        return wrong

    _all_met(one)


def test_a_message_without_a_file_or_a_raw_error_is_noticed(tmp_path: Path) -> None:
    def fails(error: Exception) -> Callable[[], None]:
        def read() -> None:
            raise error

        return read

    assert "KeyError" in _met("x", tmp_path, fails(KeyError("a")))
    assert "names no file" in _met("x", tmp_path, fails(ContractError("a")))
    assert "characters" in _met("x", tmp_path, fails(ContractError(f"{tmp_path} {'a' * 2000}")))
    assert _met("x", tmp_path, fails(ContractError(f"{tmp_path}: a"))) == ""


@pytest.mark.parametrize("kind", [_as_csv, _as_lines])
def test_what_is_not_mutated_is_read(tmp_path: Path, kind: Callable[[random.Random, Any], bytes]) -> None:
    suffix = "csv" if kind is _as_csv else "jsonl"
    (tmp_path / "classes.json").write_text('["a", "b", "c"]')
    for split in ("train", "test"):
        (tmp_path / f"{split}.{suffix}").write_bytes(
            kind(random.Random(0), [(f"row {i}", i % 3) for i in range(110)])
        )
    assert len(_load(FolderText(0, 0, "text", "label"), tmp_path)["test"]) == 110
