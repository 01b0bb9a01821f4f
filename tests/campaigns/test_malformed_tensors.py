"""Mutated safetensors files, indexes and folders: read as safetensors itself reads them, or refused in one message.

Seeded and bounded: ``MERGESEC_CAMPAIGN`` files for the reader, an eighth as many merges (120 by default).
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from mergesec.cli.main import main
from mergesec.errors import UsageError
from mergesec.streaming.mapped import read_file
from mergesec.weights import DTYPES

BUDGET = int(os.environ.get("MERGESEC_CAMPAIGN", "120"))
SECONDS = 20.0
INDEX = "model.safetensors.index.json"
NAMES = (
    "",
    "a\x00b",
    "line\nbreak",
    "\x1b[31mred",
    "n" * 300,
    "n" * 5000,
    "../up",
    "a|b",
    "\u202ereversed",
    "0",
    "weight",
)
NUMBERS = (
    -1, 0, 1, 2, 3, 4, 7, 8, 16, 24, 63, 100, 2**31, 2**32, 2**40, 2**53 + 1, 2**62, 2**63, 2**64 - 1, 2**64, 10**30, 0.5, 1e300,
    None, True, "8", [], [0], [0, 8], [8, 0], {},
)  # fmt: skip
KINDS = (*DTYPES, "F4", "F6_E2M3", "F8_E8M0", "C64", "f32", "F128", "", None, 7)
Tensors = dict[str, torch.Tensor]


def _network(seed: int) -> Tensors:
    """Small tensors of several types, with whatever a checkpoint may hold."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "embed": torch.randn(3, 4, generator=generator),
        "layers.0.weight": torch.randn(4, 5, generator=generator).to(torch.bfloat16),
        "layers.0.bias": torch.randn(5, generator=generator).to(torch.float16),
        "scale": torch.randn((), generator=generator),
        "none": torch.empty(0, 4),
        "wide": torch.randn(7, generator=generator).double(),
        "position_ids": torch.arange(5),
        "mask": torch.tensor([True, False, True]),
    }


# --------------------------------------------------------------------------- mutations of one file


def _parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _packed(header: bytes, body: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + body


def _flipped(rng: random.Random, data: bytes) -> bytes:
    """Bytes flipped, dropped, doubled or put in, most of them in the header."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        place = min(rng.randrange(rng.choice([8, 300, 900, len(data)])), len(found))
        how = rng.randrange(4)
        if how == 0 and place < len(found):
            found[place] = rng.randrange(256)
        elif how == 1:
            del found[place : place + rng.randint(1, 9)]
        elif how == 2:
            found[place:place] = found[place : place + rng.randint(1, 40)]
        else:
            found[place:place] = rng.choice(
                [b'"', b"\\ud800", b"\\u0000", b"{", b"}", b"0", b"-", b",", b"\xff", b" ", b"e9"]
            )
    return bytes(found)


def _resized(rng: random.Random, data: bytes) -> bytes:
    """Cut, prolonged, or with a header said to be of another length."""
    how = rng.randrange(5)
    if how == 0:
        return data[: rng.randrange(len(data))]
    if how == 1:
        return data + bytes(rng.randrange(1, 64))
    length = int.from_bytes(data[:8], "little")
    said = rng.choice(
        [0, 1, length - 1, length + 1, length + 8, len(data), 10**8 + 1, 1 << 30, 1 << 40, (1 << 64) - 1]
    )
    if how == 2:
        return said.to_bytes(8, "little") + data[8:]
    padding = rng.choice([b" ", b"\n", b"\t", b"\x00", b"\xa0"]) * rng.randint(1, 9)
    header, body = data[8 : 8 + length], data[8 + length :]
    return _packed(header + padding, body) if how == 3 else _packed(padding + header, body)


SHAPES: tuple[Any, ...] = ([], [0], [1] * 70, [2**62, 0], [0, 2**40, 2**40], [2**32, 2**32], *NUMBERS)
METADATA: tuple[Any, ...] = (None, {}, [], {"a": 1}, {"a": None}, {"a": "\x00"}, "text", {"format": "pt"})


def _change_entry(rng: random.Random, entry: dict[str, Any], other: dict[str, Any]) -> None:
    """A tensor's type, shape or offsets changed, or made those of another."""
    how = rng.randrange(8)
    if how == 0:
        entry["dtype"] = rng.choice(KINDS)
    elif how == 1 and isinstance(entry.get("shape"), list):
        entry["shape"].append(rng.choice([1, 1, 0, *NUMBERS]))
    elif how == 2:
        entry["shape"] = copy.deepcopy(rng.choice(SHAPES))
    elif how == 3 and isinstance(entry.get("shape"), list):
        entry["shape"].reverse()
    elif how == 4 and entry.get("data_offsets"):
        entry["data_offsets"] = [rng.choice([place, *NUMBERS]) for place in entry["data_offsets"]]
    elif how == 5:
        entry["data_offsets"] = other.get("data_offsets")
    elif how == 6:
        entry["data_offsets"], other["data_offsets"] = other.get("data_offsets"), entry.get("data_offsets")
    else:
        entry.pop(rng.choice(["dtype", "shape", "data_offsets"]), None)
        entry.update({} if rng.random() < 0.7 else {"more": 1})


def _redescribed(rng: random.Random, data: bytes) -> bytes:
    """Names, types, shapes and offsets of the header changed; overlaps, holes, zeros and huge sizes among them."""
    header, body = _parts(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        names = [name for name in header if name != "__metadata__"]
        how = rng.randrange(11)
        if how == 0 and names:
            header[rng.choice(NAMES)] = header.pop(rng.choice(names))
        elif how == 1:
            place = rng.choice([0, 8, len(body)])
            header["twin"] = {"dtype": "F32", "shape": [0], "data_offsets": [place, place]}
        elif how == 2:
            header["__metadata__"] = rng.choice(METADATA)
        elif names:
            _change_entry(rng, header[rng.choice(names)], header[rng.choice(names)])
    text = json.dumps(header, ensure_ascii=rng.random() < 0.5)
    if header and rng.random() < 0.15:  # a name given twice
        first, *_, last = [json.dumps(value) for value in header.values()] * 2
        text = f'{text[:-1]}, "twice": {first}, "twice": {last}}}'
    return _packed(text.encode("utf-8", "surrogatepass"), body)


def _reordered(rng: random.Random, data: bytes) -> bytes:
    """The same tensors in a header in another order and spacing: still a good file."""
    header, body = _parts(data)
    names = list(header)
    rng.shuffle(names)
    spaced = rng.choice([(",", ":"), (", ", ": "), (" ,\n", "\t: ")])
    return _packed(json.dumps({n: header[n] for n in names}, separators=spaced).encode(), body)


MUTATIONS: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    _flipped,
    _resized,
    _redescribed,
    _redescribed,
    _reordered,
)


def _good(folder: Path) -> list[bytes]:
    """Whole files to start from."""
    sources: list[tuple[Tensors, dict[str, str] | None]] = [
        (_network(0), {"format": "pt"}), (_network(1), None), ({"a": torch.ones(2)}, None), ({"a": torch.empty(0)}, None),
        ({n: torch.ones(2, 2).to(d) for n, d in DTYPES.items()}, {"format": "pt"}), ({}, None),
    ]  # fmt: skip
    for number, (tensors, metadata) in enumerate(sources):
        save_file(tensors, folder / f"good{number}", metadata=metadata)
    return [(folder / f"good{number}").read_bytes() for number in range(len(sources))]


# --------------------------------------------------------------------------- the reader against safetensors' own

Content = dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]


def _content(name: str, tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), bytes(raw.numpy().data) if raw.numel() else b""


def _theirs(path: Path) -> Content | None:
    """What safetensors reads, None if it refuses, or if a type is none that we merge."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if any(file.get_slice(name).get_dtype() not in DTYPES for name in names):
                return None
            return {name: _content(name, file.get_tensor(name)) for name in names}
    except (SafetensorError, RuntimeError, TypeError, ValueError, OSError):
        return None


def _ours(path: Path) -> Content | None:
    try:
        found = read_file(path, "file")
    except UsageError:
        return None
    return {name: _content(name, found[name]) for name in found}


def test_the_reader_agrees_with_safetensors(tmp_path: Path) -> None:
    """A file is read if and only if safetensors reads it, and then bit for bit alike."""
    rng = random.Random(30)
    good = _good(tmp_path)
    path = tmp_path / "mutated.safetensors"
    counts: Counter[str] = Counter()
    for number in range(BUDGET):
        mutate = MUTATIONS[number % len(MUTATIONS)]
        path.write_bytes(mutate(rng, rng.choice(good)))
        wanted, found = _theirs(path), _ours(path)
        assert found == wanted, f"input {number} ({mutate.__name__}): {wanted} is read as {found}"
        counts["refused" if wanted is None else "read"] += 1
    print(dict(counts))
    assert min(counts["read"], counts["refused"]) > BUDGET // 8, counts


# --------------------------------------------------------------------------- the verb


def _shards(folder: Path, tensors: Tensors) -> None:
    """The tensors in two shards and an index."""
    folder.mkdir()
    names = list(tensors)
    files = {f"model-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, folder / file, metadata={"format": "pt"})
    listed = {name: file for file, held in files.items() for name in held}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": listed}))


ODD_SHARDS: tuple[Any, ...] = (
    "s" * 300, "s" * 300 + ".safetensors", "../base.safetensors", "/etc/passwd", "", ".", INDEX, "a\x00.safetensors",
    "a\n.safetensors", "\x1b[2J.safetensors", "\ud800.safetensors", None, 3, ["a"], {"a": "b"}, "sub/a.safetensors",
    "pipe.safetensors", "endless.safetensors", "loop.safetensors", "folder.safetensors", "config.json",
)  # fmt: skip


def _odd_index(rng: random.Random, folder: Path) -> None:
    """Names of shards that are none, of files that never end, of tensors that lie elsewhere."""
    index = json.loads((folder / INDEX).read_text())
    listed = index["weight_map"]
    name = rng.choice(list(listed))
    how = rng.randrange(6)
    if how <= 2:
        listed[name] = rng.choice(ODD_SHARDS)
    elif how == 3:
        listed[rng.choice(NAMES)] = listed.pop(name)
    elif how == 4:
        index["weight_map"] = rng.choice([None, [], {}, 3, "text", [listed]])
    text = json.dumps(index)
    if how == 5:
        text = rng.choice(
            [
                "",
                "[]",
                "[" * 100_000,
                text[:-9],
                text.replace("{", '{"weight_map": 1, ', 1),
                "\ufeff" + text,
                "NaN",
                "1" * 9000,
            ]
        )
    (folder / INDEX).write_bytes(
        text.encode("utf-8", "surrogatepass") + (b"\xff" if rng.random() < 0.05 else b"")
    )


def _odd_files(rng: random.Random, folder: Path) -> None:
    """What no weights file is: a pipe, a link to an endless device or to itself, a folder; or a strange config."""
    name = rng.choice(
        ["model.safetensors", INDEX, "config.json", "adapter_config.json", "model-00001-of-00002.safetensors"]
    )
    place = folder / name
    place.unlink(missing_ok=True)
    how = rng.randrange(6)
    if how == 0:
        os.mkfifo(place)
    elif how == 1:
        place.symlink_to("/dev/zero")
    elif how == 2:
        place.symlink_to(name)
    elif how == 3:
        place.mkdir()
    elif how == 4:
        with place.open("wb") as file:
            file.truncate(1 << 40)  # takes no room
    else:
        kinds = (
            "{",
            "[1]",
            '{"quantization_config": {"quant_method": "gptq"}}',
            '{"transformers_weights": "../x"}',
            "\xff",
            "{}",
        )
        place.write_bytes(rng.choice(kinds).encode("latin-1"))


CONFIGURED: dict[str, Any] = {
    "model_type": "vit", "num_attention_heads": 2, "hidden_act": "gelu", "id2label": {"0": "a"}, "parts": {"model_type": "x"},
    "layer_norm_eps": 1e-6, "quantization_config": None,
}  # fmt: skip


def _odd_configs(rng: random.Random, folder: Path, home: Path) -> None:
    """Two configs of one network, in one of which a field is odd."""
    (folder / "config.json").write_text(json.dumps(CONFIGURED))
    odd = {
        **CONFIGURED,
        rng.choice([*CONFIGURED, "transformers_weights", "\x1b[31m"]): rng.choice([*NUMBERS, *ODD_SHARDS]),
    }
    nested = "[" * rng.choice([30, 900, 100_000])
    text = json.dumps(odd) if rng.random() < 0.8 else f'{{"hidden_act": {nested}{"]" * len(nested)}}}'
    (home / "config.json").write_bytes(_flipped(rng, text.encode()) if rng.random() < 0.3 else text.encode())


def _mutated(rng: random.Random, folder: Path) -> str:
    """A mutated input in ``folder``; its path there."""
    (folder / "sub").mkdir()
    if rng.random() < 0.5:
        path = folder / "mutated.safetensors"
        path.write_bytes(rng.choice(MUTATIONS)(rng, (folder / "b.safetensors").read_bytes()))
        return path.name
    home = folder / "home"
    _shards(home, _network(rng.randrange(3)))
    os.mkfifo(home / "pipe.safetensors")
    (home / "endless.safetensors").symlink_to("/dev/zero")
    (home / "loop.safetensors").symlink_to("loop.safetensors")
    (home / "folder.safetensors").mkdir()
    if rng.random() < 0.3:
        _odd_files(rng, home)
    elif rng.random() < 0.3:
        _odd_configs(rng, folder, home)
    elif rng.random() < 0.6:
        _odd_index(rng, home)
    else:
        shard = home / "model-00002-of-00002.safetensors"
        shard.write_bytes(rng.choice(MUTATIONS)(rng, shard.read_bytes()))
    return rng.choice(["home", "home", f"home/{INDEX}"])


def _contents(folder: Path) -> dict[str, bytes]:
    files = (
        p for p in folder.rglob("*") if p.is_file() and not p.is_symlink() and p.stat().st_size < 1 << 20
    )
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def _bench(*arguments: str) -> tuple[int, str]:
    """Exit code and standard error of ``bench`` in this process."""
    said, error = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["bench", *arguments]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(error):
            main()
    except SystemExit as ended:
        return int(ended.code or 0), error.getvalue()
    finally:
        sys.argv = before
    return 0, error.getvalue()


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_mutated_inputs_are_merged_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 0 and whole, finite tensors, or 2, one short message, and everything as it was."""
    rng = random.Random(31)
    codes: Counter[int] = Counter()
    for number in range(max(BUDGET // 8, 1)):
        folder = tmp_path / f"case{number}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        for seed, name in enumerate(("base", "a", "b")):
            save_file(_network(seed), f"{name}.safetensors", metadata={"format": "pt"})
        Path("out.safetensors").write_bytes(b"earlier")
        roles = {"base": "base.safetensors", "a": "a.safetensors", "b": "b.safetensors"}
        roles[rng.choice(list(roles))] = _mutated(rng, folder)
        before = _contents(folder)
        method = rng.choice(["simple_average", "task_arithmetic", "ties", "dare", "slerp", "tsv_m"])
        started = time.perf_counter()
        inputs = ["--base", roles["base"], "--expert", f"a={roles['a']}", "--expert", f"b={roles['b']}"]
        code, error = _bench("merge", method, *inputs, "--out", "out.safetensors", "--force")
        what = f"input {number} ({method}, {roles}): code {code}\n{error[:2000]}"
        assert time.perf_counter() - started < SECONDS, what
        assert code in (0, 2), what
        assert "Traceback" not in error and "\x1b" not in error and len(error) < 3000, what
        after = _contents(folder)
        if code:
            assert error.startswith("error: ") and after == before, what
        else:
            assert {**after, "out.safetensors": b"earlier"} == before, what
            assert all(bool(torch.isfinite(t).all()) for t in load_file("out.safetensors").values()), what
        codes[code] += 1
        shutil.rmtree(folder)
    print(dict(codes))
    assert codes[2]
