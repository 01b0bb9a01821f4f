"""A grid's boards as data for its pages: every digit, how each column is shown, and what a reader filters by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from mergesec.evidence.boards import make_boards
from mergesec.evidence.estimates import Board
from mergesec.evidence.records import Record
from mergesec.evidence.tables import ORIGIN, cell_text, display
from mergesec.figures.sweeps import axis_title, find_sweeps, methods_of
from mergesec.planning.cards import Card
from mergesec.site.names import slug
from mergesec.threats import Threat

Cards = Mapping[tuple[str, str], Card]
"""Cards by kind and name."""

PREFIX: Mapping[str, Threat] = {
    "clean": Threat.CLEAN, "protection": Threat.PROTECTION, "ownership": Threat.PROTECTION,
    "backdoor": Threat.BACKDOOR, "transfer": Threat.BACKDOOR,
}  # fmt: skip
"""What a board's name begins with, and its threat model; others belong to none."""
KEYS: Mapping[str, Callable[[Record], Any]] = {
    "attack": lambda r: r.attack,
    "method": lambda r: r.merging,
    "defense": lambda r: r.defense,
    "experts": lambda r: len(r.experts),
    "adversaries": lambda r: r.adversaries,
    "target_task": lambda r: r.target_task,
    "protected": lambda r: r.protected,
    "secrets": lambda r: r.secrets if r.protected > 1 else "own",
}
"""Columns that say which cells a row is about."""
_COUNTS = {"tier", "seeds", "experts", "adversaries", "protected", "runs", "sets"}


@dataclass(frozen=True)
class Sheet:
    """The boards of one grid under one threat model."""

    grid: str
    threat: Threat
    boards: tuple[Board, ...]
    records: tuple[Record, ...]

    @property
    def slug(self) -> str:
        """The name of its pages."""
        return f"{slug(self.grid)}-{self.threat}"


def sheets(grid: str, boards: Sequence[Board], records: Sequence[Record]) -> list[Sheet]:
    """A grid's boards by threat model. A board that speaks of several, such as that of costs, is made again for
    each, from its own records."""
    by_threat = {threat: tuple(r for r in records if r.threat == threat) for threat in Threat}
    several = sum(map(bool, by_threat.values())) > 1
    found = []
    for threat, mine in by_threat.items():
        if mine:
            own = [b for b in boards if _threat_of(b) == threat]
            own += [b for b in (make_boards(mine) if several else boards) if _threat_of(b) is None]
            found.append(Sheet(grid, threat, tuple(own), mine))
    return found


def _threat_of(board: Board) -> Threat | None:
    return PREFIX.get(board.name.partition("_")[0])


def payload(sheet: Sheet, cards: Cards) -> dict[str, Any]:
    """What the pages of a sheet show."""
    sweeps = [
        {
            "title": s.title,
            "parameter": s.parameter,
            "axis": axis_title(s.parameter),
            "values": dict(s.values),
        }
        for s in find_sweeps(methods_of(sheet.records))
    ]
    boards = [_board(board, sheet, cards) for board in sheet.boards]
    return {"grid": sheet.grid, "threat": str(sheet.threat), "boards": boards, "sweeps": sweeps}


def _board(board: Board, sheet: Sheet, cards: Cards) -> dict[str, Any]:
    frame = board.frame
    origin = [name for name in ORIGIN if name in frame.columns]
    sample = (
        frame.drop_duplicates(origin) if origin else frame.head(0)
    )  # where numbers come from decides the columns
    short = display(replace(board, frame=sample))[0]
    columns: dict[str, list[Any]] = {
        str(name): [None if _missing(v) else v for v in frame[name].astype(object)] for name in frame.columns
    }
    told = {name: values for name, values in _told(board, sheet, cards).items() if name not in columns}
    return {
        "name": board.name,
        "title": board.title,
        "note": board.note,
        "measures": list(board.measures),
        "short": [name for name in short if name in columns or name == "cells"],
        "units": {name: unit(name, values, board.measures) for name, values in columns.items()},
        "columns": columns,
        "told": told,
    }


def _missing(value: Any) -> bool:
    return value is None or bool(pd.isna(value))


def unit(column: str, values: Iterable[Any], measures: Sequence[str]) -> str:
    """How the numbers of a column are shown: ``rate`` (percent with an interval), ``percent``, ``count``,
    ``number`` (three digits); ``text`` if there are none. Asks what Markdown and the terminal go by."""
    known = [v for v in values if v is not None]
    if not known or any(isinstance(v, str | bool) for v in known):
        return "text"
    if column in measures:
        probe = {column: 0.1234, f"{column}_low": 0.1, f"{column}_high": 0.2}
        return "rate" if "10.0, 20.0" in cell_text(probe, column, measures) else "number"
    if column in _COUNTS or column.startswith("cells_") or column.endswith("_seeds"):
        return "count"
    if all(isinstance(v, int) for v in known):
        return "count"
    return {"12.3": "percent", "0": "count"}.get(cell_text({column: 0.1234}, column, ()), "number")


# --------------------------------------------------------------------------- what readers filter by


def _told(board: Board, sheet: Sheet, cards: Cards) -> dict[str, list[str]]:
    """Columns that a board lacks and readers filter by: protocol, containment, what each side knows and sees."""
    frame = board.frame
    keys = [name for name in KEYS if name in frame.columns]
    told: dict[str, list[str]] = {}
    if keys:
        marks = _marks(sheet.records, keys)
        rows = list(zip(*(frame[name] for name in keys), strict=True))
        for at, name in enumerate(("protocol", "contained")):
            told[name] = [marks.get(tuple(row), ("", ""))[at] for row in rows]
    for side, kind in (("attack", "attack"), ("defense", "defense"), ("method", "merging")):
        if side in frame.columns:
            mine = [cards.get((kind, str(label).partition("(")[0])) for label in frame[side]]
            told[f"{side} data"] = [data_of(card) for card in mine]
            if kind != "merging":
                told[f"{side} knowledge"] = [card.knowledge if card else "" for card in mine]
    return {name: values for name, values in told.items() if any(values)}


def _marks(records: Iterable[Record], keys: Sequence[str]) -> dict[tuple[Any, ...], tuple[str, str]]:
    """(protocols, contained or not) of the cells behind each row."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(KEYS[key](record) for key in keys), []).append(record)
    return {
        row: (
            " and ".join(sorted({r.protocol for r in mine})),
            "no" if any(r.contained == "no" for r in mine) else "yes",
        )
        for row, mine in groups.items()
    }


def data_of(card: Card | None) -> str:
    """The rows of data that a component looks at, as readers say it; empty if nobody knows."""
    if card is None:
        return ""
    return f"{card.data}, inputs only" if card.unlabelled and card.data != "none" else card.data
