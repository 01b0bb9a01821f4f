"""Mutated grids, records and cards: each is read, or refused by a UsageError that fits on a screen, in seconds.

Seeded and bounded: ``MERGESEC_CAMPAIGN`` inputs of each kind (120 by default, thousands on demand).
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergesec.conformance.battery import MICRO
from mergesec.errors import UsageError
from mergesec.evidence.boards import make_boards
from mergesec.evidence.records import read_record
from mergesec.evidence.tables import markdown
from mergesec.planning.cardfiles import read_cards
from mergesec.planning.catalog import load_catalog
from mergesec.planning.gridspec import load_grid
from mergesec.planning.plan import make_plan
from mergesec.planning.presets import presets_folder
from mergesec.planning.resolve import resolve

ROOT = Path(__file__).resolve().parents[2]
BUDGET = int(os.environ.get("MERGESEC_CAMPAIGN", "120"))
SECONDS = 20.0
"""What one input may take: a planner's time for a large grid, with room for a busy machine."""
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 10**30, 1e308, float("nan"), float("inf"), "", " ", "none", "x" * 300, "\x00", "| a | b |",
    "=cmd|1", "\x1b[31m", "${oc.env:HOME}", "${a}", [], {}, [[[]]], {"name": None}, [None], {"name": ["a"]}, "mini/mnist",
)  # fmt: skip


def _bytes(rng: random.Random, data: bytes) -> bytes:
    """A few bytes flipped, dropped, doubled or put in."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 12)):
        place = rng.randrange(len(found)) if found else 0
        how = rng.randrange(4)
        if how == 0 and found:
            found[place] = rng.randrange(256)
        elif how == 1 and found:
            del found[place : place + rng.randint(1, 40)]
        elif how == 2:
            found[place:place] = found[place : place + rng.randint(1, 200)]
        else:
            found[place:place] = bytes(rng.choice(b"{}[]:,-&*!|>'\"\n\t #%@0aZ\xff") for _ in range(3))
    return bytes(found)


def _spots(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a nested value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _spots(inner)


def _values(rng: random.Random, value: Any) -> Any:
    """A few values replaced by odd ones, dropped, or put under another name."""
    changed = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3)):
        spots = list(_spots(changed))
        if not spots:
            break
        container, key = rng.choice(spots)
        how = rng.randrange(4)
        if how == 0:
            del container[key]
        elif how == 1 and isinstance(container, dict):
            container[rng.choice([f"{key}x", "name", "\u202e", "a.b", ""])] = container.pop(key)
        else:
            container[key] = rng.choice(ODD)
    return changed


def _tried(what: str, read: Callable[[], Any]) -> str:
    """What is wrong with how an input was met; empty if it was read, or refused as it should be."""
    started = time.perf_counter()
    try:
        read()
    except UsageError as error:
        text = str(error)
        if len(text) > 3000 or "Traceback" in text:
            return f"{what}: a message of {len(text)} characters"
    except Exception as error:
        return f"{what}: {type(error).__name__}: {str(error)[:200]}"
    spent = time.perf_counter() - started
    return f"{what}: {spent:.0f} s" if spent > SECONDS else ""


def _report(found: list[str]) -> None:
    wrong = [text for text in found if text]
    assert not wrong, f"{len(wrong)} of {len(found)}\n" + "\n".join(wrong[:10])


def _grids() -> list[Path]:
    return [*sorted(presets_folder().glob("mini*.yaml")), *sorted((ROOT / "examples").glob("*.yaml"))]


@pytest.mark.filterwarnings("ignore:In 'g")  # Hydra's advice on defaults lists
def test_mutated_grids_are_read_or_refused(tmp_path: Path) -> None:
    rng = random.Random(20)
    catalog = load_catalog([MICRO])
    grids = _grids()
    found = []
    for number in range(BUDGET):
        data = rng.choice(grids).read_bytes()
        if number % 2:
            data = _bytes(rng, data)
        else:
            data = yaml.safe_dump(_values(rng, yaml.safe_load(data))).encode()
        path = tmp_path / f"g{number}.yaml"
        path.write_bytes(data)

        def plan(path: Path = path) -> None:
            make_plan(resolve(load_grid(str(path)), catalog), lambda task: "")

        found.append(_tried(path.name, plan))
    _report(found)


def test_mutated_records_are_read_or_refused(tmp_path: Path) -> None:
    rng = random.Random(21)
    shipped = ROOT / "results" / "records"
    home = tmp_path / "mini-ownership"
    home.mkdir()
    places = [Path(shutil.copy(p, home)) for p in sorted((shipped / home.name).glob("*-*.json"))[::4]]
    for grid in ("mini-backdoor-dam", "mini-merging"):  # records of other threats, under this grid's name
        for path in sorted((shipped / grid).glob("*-*.json"))[::20]:
            places.append(home / path.name)
            places[-1].write_text(json.dumps({**json.loads(path.read_text()), "grid": home.name}))
    found = []
    for number in range(BUDGET):
        place = rng.choice(places)
        before = place.read_bytes()
        data = _bytes(rng, before) if number % 2 else json.dumps(_values(rng, json.loads(before))).encode()
        place.write_bytes(data)

        def boards(place: Path = place) -> None:
            for board in make_boards([read_record(home, place.stem)]):
                markdown(board)

        found.append(_tried(f"{place.name}, input {number}", boards))
        place.write_bytes(before)
    _report(found)


def test_mutated_cards_are_read_or_refused(tmp_path: Path) -> None:
    rng = random.Random(22)
    sources = [p for top in ("methods", "tasks") for p in (ROOT / top).rglob("*.py") if _carded(p)]
    found = []
    for number in range(BUDGET):
        path = tmp_path / f"card{number}.py"
        path.write_bytes(_bytes(rng, rng.choice(sources).read_bytes()))
        found.append(_tried(path.name, lambda path=path: read_cards(path)))
    _report(found)


def _carded(path: Path) -> bool:
    return re.search(r"^CARDS?\b", path.read_text(encoding="utf-8"), re.MULTILINE) is not None


@pytest.mark.parametrize("text", ["a: &a [1]\nb: *a\n", "a: 1\n"])
def test_small_aliases_are_no_bomb(tmp_path: Path, text: str) -> None:
    path = tmp_path / "g.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match="suite"):  # read, and then found to be no grid
        load_grid(str(path))


BOMB = "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (("a: &a [x, x, x, x, x, x, x, x, x]\n" + BOMB).encode(), "more than 100000 values"),
        (b"a: &a [*a]\n", "alias *a of what is not complete"),
        (b"a: " + b"[" * 60 + b"]" * 60 + b"\n", "nested more than 40 levels deep"),
        (b"a: 1\n" * 300_000, "a grid has at most"),
        (b"name: \xe9\n", "not UTF-8 text (byte 6)"),
        (b"- a\n", "not a mapping of fields"),
        (b"a: [\n", "not YAML"),
        (b"", "not a mapping of fields"),
    ],
)
def test_a_file_is_looked_at_before_it_is_composed(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "g.yaml"
    path.write_bytes(data)
    with pytest.raises(UsageError) as caught:
        load_grid(str(path))
    assert message in str(caught.value)
