"""Fills what pages take from the boards: tables and numbers between markers. ``make docs`` runs it.

A table, with a column renamed and rows chosen (``*`` stands for any text, ``;`` between alternatives, since a
bar would end a table's cell)::

    <!-- board: mini-backdoor/backdoor columns="attack,succession:ASR" method=ties attack=badnets;sig* -->
    <!-- /board -->

``across=COLUMN value=COLUMN`` makes a column for each value of the first; ``sort=COLUMN`` (``-COLUMN``) sorts,
``first=N`` cuts, ``intervals=no`` leaves them out, ``settings=no`` what the rows of a
component share. A number in a sentence, of the one row that fits::

    <!-- n: mini-backdoor/backdoor attack=badnets method=ties column=succession -->6.4<!-- /n -->

``take=min|max|mean|count`` speaks of all rows that fit, ``minus=COLUMN`` subtracts, ``interval=yes`` adds the interval.
``<!-- claims: SECTION -->`` holds the claims of ``docs/claims.py``, ``<!-- verdict: ID -->`` what became of one, ``<!-- scan: BACKBONE -->`` how often ``bench scan``
is wrong by the table of that base, ``<!-- costs: all -->`` what each grid took, ``<!-- plan: GRID;GRID victims=8 ... workers=100 -->`` what a grid of that size
would take at the costs of measured ones.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pandas as pd

from mergesec.errors import UsageError, nearest
from mergesec.evidence.tables import cell_text
from mergesec.scanning.reference import Reference, read_reference, shipped

ROOT = Path(__file__).resolve().parents[1]
BOARDS = ROOT / "results" / "leaderboards"
MARKER = re.compile(
    r"^ *```.*?^ *```|<!--\s*(board|n|claims|verdict|scan|plan|costs):\s(.*?)-->(.*?)<!--\s*/\1\s*-->",
    re.DOTALL | re.MULTILINE,
)
"""A block of code, which is left alone, or a marker: its kind, its words, what it holds."""
INTERVAL = re.compile(r" [\[(]-?\d+\.\d, -?\d+\.\d[\])]$")
_OPTIONS = {
    "board": {"columns", "across", "value", "sort", "first", "intervals", "settings"},
    "n": {"column", "take", "minus", "interval"},
    "claims": set[str](),
    "verdict": set[str](),
    "scan": set[str](),
    "costs": set[str](),
    "plan": {"victims", "seeds", "defenses", "attacks", "merges", "workers"},
}


class Marker(NamedTuple):
    """One marker of a page: which board, which rows, and how they are shown."""

    kind: str
    board: str
    options: dict[str, str]
    rows: dict[str, str]

    def __str__(self) -> str:
        said = {**self.options, **self.rows}
        return " ".join([f"{self.kind}: {self.board}", *(f"{key}={value}" for key, value in said.items())])


def pages() -> list[Path]:
    """The pages that may hold markers."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "results").glob("*.md")])


def filled(text: str) -> str:
    """A page with the content of every marker made from its board."""
    return MARKER.sub(_refilled, text)


def differences(text: str) -> Iterator[str]:
    """Where a page's markers hold something else than their boards: the marker and its first differing cell."""
    for match in MARKER.finditer(text):
        if match[1] is None:
            continue
        marker, held = read(match[1], match[2]), match[3]
        wanted = content(marker)
        if held == wanted:
            continue
        for at, (have, want) in enumerate(_aligned(held, wanted), 1):
            if have != want:
                yield f"{marker}: cell {at} holds {have!r}, the board {want!r}"
                break
        else:
            yield f"{marker}: same cells, spaced differently"


def _aligned(held: str, wanted: str) -> Iterator[tuple[str, str]]:
    have, want = _cells(held), _cells(wanted)
    width = max(len(have), len(want))
    return zip(*(cells + ["(nothing)"] * (width - len(cells)) for cells in (have, want)), strict=True)


def _cells(text: str) -> list[str]:
    return [cell for line in text.splitlines() for cell in (part.strip() for part in line.split("|")) if cell]


def _refilled(match: re.Match[str]) -> str:
    if match[1] is None:
        return match[0]
    opening, closing = match[0][: match.start(3) - match.start()], match[0][match.end(3) - match.start() :]
    return opening + content(read(match[1], match[2])) + closing


def read(kind: str, said: str) -> Marker:
    """A marker from its words."""
    board, *words = shlex.split(said)
    odd = next((word for word in words if "=" not in word), "")
    if odd:
        raise UsageError(board, f"{odd!r} is no column=value; quote a value that holds spaces")
    pairs = dict(word.split("=", 1) for word in words)
    options = {key: pairs.pop(key) for key in list(pairs) if key in _OPTIONS[kind]}
    return Marker(kind, board, options, pairs)


def content(marker: Marker) -> str:
    """What belongs between a marker and its end."""
    if marker.kind == "scan":
        return f"\n\n{error_rates(marker.board)}\n\n"
    if marker.kind == "plan":
        sizes = {name: int(number) for name, number in marker.options.items()}
        return f"\n\n{script('sizes').content(marker.board.split(';'), sizes)}\n\n"
    if marker.kind == "claims":
        return f"\n\n{script('claims').content(marker.board, rows)}\n\n"
    if marker.kind == "costs":
        return f"\n\n{_costs(marker.board)}\n\n"
    if marker.kind == "verdict":
        return str(script("claims").became(marker.board, rows))
    frame = _chosen(marker)
    return _number(marker, frame) if marker.kind == "n" else f"\n\n{_table(marker, frame)}\n\n"


def _costs(which: str) -> str:
    """What the grids took whose names begin with ``which`` (``all``: every grid), from their boards of totals."""
    begin = "" if which == "all" else which
    boards = sorted(BOARDS.glob(f"{begin}*/cost_total.csv"))
    if not boards:
        raise UsageError(f"costs: {which}", "no grid with a board cost_total begins so")
    frames = {path.parent.name: pd.read_csv(path).set_index("name") for path in boards}
    shares = [name for name in max(frames.values(), key=len).index if name != "all"]
    head = ["grid", "cells", *(f"{share}, min" for share in shares), "all, hours", "MiB at the peak"]
    lines = [_line(head), "|---" * len(head) + "|"]
    for grid, frame in frames.items():
        minutes = frame["minutes"].to_dict()
        told = [f"{minutes[share]:.0f}" if share in minutes else "–" for share in shares]
        whole = frame.loc["all"]
        lines.append(
            _line([f"[`{grid}`](results/{grid}.md)", str(_cells_of(grid)), *told,
                   f"{whole['minutes'] / 60:.1f}", f"{whole['peak_mb']:,.0f}"])
        )  # fmt: skip
    return "\n".join(lines)


def _cells_of(grid: str) -> int:
    """How many cells of a grid have a record."""
    return sum(path.name != "grid.json" for path in (ROOT / "results" / "records" / grid).glob("*.json"))


def error_rates(backbone: str) -> str:
    """How many known experts each test of a scan flags, by what they are."""
    found = [table for table in map(read_reference, shipped()) if table.backbone == backbone]
    if not found:
        raise UsageError(f"scan: {backbone}", "no reference table of this base")
    tests = list(found[0].rates)
    rows = [
        "| experts | of them | " + " | ".join(f"`{t}`" for t in tests) + " |",
        "|---" * (2 + len(tests)) + "|",
    ]
    for kind, maker in found[0].rates[tests[0]]:
        cells = [str(found[0].rates[t].get((kind, maker), "not measured")) for t in tests]
        rows.append(f"| {kind} | {maker or 'fine-tuned'} | {' | '.join(cells)} |")
    return "\n".join([*rows, "", *_rates_by_task(found[0])])


def _rates_by_task(table: Reference) -> list[str]:
    """Flagged of honest and of poisoned experts, task by task: a test that flags both knows the task, not the attack."""
    rows = ["| task | `unlike`: honest | poisoned | `trigger`: honest | poisoned |", "|---|---|---|---|---|"]
    hits = {test: table.judged(test) for test in ("unlike", "trigger")}
    for task in sorted({s.task for s in table.specimens}):
        cells = []
        for test in hits:
            for kind in ("honest", "poisoned"):
                own = [hit for s, hit in hits[test] if (s.kind, s.task) == (kind, task)]
                cells.append(f"{sum(own)} of {len(own)}" if own else "none there")
        rows.append(f"| {task} | {' | '.join(cells)} |")
    return rows


@cache
def script(name: str) -> ModuleType:
    """A script beside this one, which like it is in no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(board: str, chosen: Mapping[str, str]) -> pd.DataFrame:
    """The rows of a board that fit a filter; UsageError where none does."""
    return _chosen(Marker("claims", board, {}, dict(chosen)))


@cache
def _board(name: str) -> pd.DataFrame:
    path = BOARDS / f"{name}.csv"
    if not path.is_file():
        raise UsageError(name, "no such board under results/leaderboards")
    return pd.read_csv(path)


def _chosen(marker: Marker) -> pd.DataFrame:
    frame = _board(marker.board)
    for column, pattern in marker.rows.items():
        fits = re.compile("|".join(re.escape(part).replace(r"\*", ".*") for part in pattern.split(";")))
        known = frame[_known(marker, column)]
        frame = frame[
            known.map(lambda value, fits=fits: fits.fullmatch(_plain(value)) is not None).astype(bool)
        ]
    if frame.empty:
        raise UsageError(str(marker), "no row fits")
    return frame


def _plain(value: object) -> str:
    """A cell as a filter compares it: whole numbers without a point, nothing for an empty cell."""
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:g}"
    return str(value)


def _known(marker: Marker, column: str) -> str:
    columns = list(_board(marker.board).columns)
    if column not in columns and column != "cells":
        raise UsageError(str(marker), f"the board has no column {column!r}{nearest(column, columns)}")
    return column


def _text(row: pd.Series, column: str, intervals: bool) -> str:
    if column == "cells":
        done, expected = int(row["cells_done"]), int(row["cells_expected"])
        return f"{done}" if done == expected else f"{done} of {expected}"
    if column in ("tier", "experts", "cells_compared", "seeds", "adversaries") and not pd.isna(row[column]):
        return str(row[column]).removesuffix(".0")
    text = cell_text(row, column, [column] if f"{column}_low" in row else [])
    return text if intervals else INTERVAL.sub("", text)


def _number(marker: Marker, frame: pd.DataFrame) -> str:
    column, take = _known(marker, marker.options["column"]), marker.options.get("take")
    if take == "count":
        return str(len(frame))
    if take is None and len(frame) != 1:
        raise UsageError(str(marker), f"{len(frame)} rows fit; name one, or say take=min, max, mean or count")
    if "minus" in marker.options:
        frame = frame.assign(**{column: frame[column] - frame[_known(marker, marker.options["minus"])]})
    row = frame.iloc[0].copy()
    if take is not None:
        row[column] = {"min": frame[column].min, "max": frame[column].max, "mean": frame[column].mean}[take]()
    whole = marker.options.get("interval") == "yes" and take is None and "minus" not in marker.options
    return _text(row, column, whole)


def _table(marker: Marker, frame: pd.DataFrame) -> str:
    asked = [part.strip().partition(":") for part in marker.options["columns"].split(",")]
    columns = {_known(marker, name): title or name for name, _, title in asked}
    if (key := marker.options.get("sort")) is not None:
        frame = frame.sort_values(_known(marker, key.lstrip("-")), ascending=key[0] != "-", kind="stable")
    frame = frame.head(int(marker.options.get("first", len(frame))))
    intervals = marker.options.get("intervals") != "no"
    rows = [[_text(row, column, intervals) for column in columns] for _, row in frame.iterrows()]
    head = list(columns.values())
    if (across := marker.options.get("across")) is not None:
        value = _known(marker, marker.options["value"])
        seen = [_text(row, _known(marker, across), False) for _, row in frame.iterrows()]
        cells = [_text(row, value, intervals) for _, row in frame.iterrows()]
        head, rows = _spread(head, rows, seen, cells)
    notes: list[str] = []
    for at, name in enumerate(columns):
        if name != "cells" and frame[name].map(lambda cell: isinstance(cell, str)).any():
            short, shared = shortened([row[at] for row in rows])
            rows = [[*row[:at], text, *row[at + 1 :]] for row, text in zip(rows, short, strict=True)]
            notes += shared
    lines = [_line(head), "|" + "---|" * len(head), *map(_line, rows)]
    settings = (
        ["", *_wrapped("Settings: " + "; ".join(notes) + ".")]
        if notes and marker.options.get("settings") != "no"
        else []
    )
    return "\n".join([*lines, *settings])


def _spread(
    head: list[str], rows: list[list[str]], seen: list[str], cells: list[str]
) -> tuple[list[str], list[list[str]]]:
    """One row for rows with the same beginning, and a column for each value seen; numbers from the least on."""
    values = list(dict.fromkeys(seen))
    if all(value.isdecimal() for value in values):
        values.sort(key=int)
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for row, value, cell in zip(rows, seen, cells, strict=True):
        found.setdefault(tuple(row), {})[value] = cell
    return [*head, *values], [[*key, *(got.get(v, "–") for v in values)] for key, got in found.items()]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _wrapped(text: str, width: int = 100) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        if len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".lstrip()
    return lines


def shortened(labels: Sequence[str]) -> tuple[list[str], list[str]]:
    """Labels without the settings that all rows of a component share, and those settings as notes."""
    parts = [_parted(label) for label in labels]
    notes: list[str] = []
    shared: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for name, _ in parts):
        variants = [settings for other, settings in parts if other == name]
        shared[name] = [s for s in variants[0] if all(s in other for other in variants)]
        if shared[name]:
            notes.append(f"`{name}` {', '.join(shared[name])}")
    short = []
    for name, settings in parts:
        own = [s for s in settings if s not in shared[name]]
        short.append(f"{name}({', '.join(own)})" if own else name)
    return short, notes


def _parted(label: str) -> tuple[str, list[str]]:
    """Name and settings of a label such as ``badmerging(patch=6, steps=300)``."""
    match = re.fullmatch(r"([^(]+)\((.*)\)", label)
    if match is None or " + " in label:
        return label, []
    return match[1], re.split(r", (?=\w+=)", match[2])


def main(argv: Sequence[str] | None = None) -> int:
    """Fill all pages; with ``--check`` write nothing, list differences and exit with 1 if there are any."""
    parser = argparse.ArgumentParser(description="Fill tables and numbers of the pages from the boards.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; list where pages and boards differ"
    )
    check = parser.parse_args(argv).check
    differing, refused = 0, 0
    for page in pages():
        text, name = page.read_text(encoding="utf-8"), page.relative_to(ROOT)
        try:
            found = list(differences(text))
        except UsageError as error:
            print(f"{name}: {error}", file=sys.stderr)
            refused += 1
            continue
        differing += len(found)
        if check:
            print("".join(f"{name}: {line}\n" for line in found), end="")
        elif found:
            page.write_text(filled(text), encoding="utf-8")
            print(f"{name}: {len(found)} filled")
    return 2 if refused else int(check and differing > 0)


if __name__ == "__main__":
    sys.exit(main())
