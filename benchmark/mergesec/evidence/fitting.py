"""A board on a terminal: the columns that matter first, as many as fit, or the columns that were asked for."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from mergesec.errors import UsageError, nearest
from mergesec.evidence.estimates import Board
from mergesec.evidence.labels import shortened
from mergesec.evidence.protection import STANDARD
from mergesec.evidence.tables import cell_text, few_seeds
from mergesec.files import plain

NAMES = (
    "kind", "name", "attack", "defense", "method", "experts", "adversaries", "target_task", "protected", "secrets",
)  # fmt: skip
"""Columns that say what a row is about."""
LABELS = ("name", "attack", "defense", "method")
BETWEEN = 2
"""Blanks between two columns."""

_FIRST: dict[str, tuple[str, ...]] = {
    "clean": ("accuracy", "normalised", "tier"),
    "protection": ("stand_alone_loss", "MMP-", "MMP+", "worst_recovery", f"recovery_{STANDARD}", "tier"),
    "protection_cells": ("MMP-", "MMP+", "MMP_attacked", "recovery", "UMP+"),
    "protection_distances": ("to_expert/all", "to_base/all", "max_abs_dlogit", "condition"),
    "ownership": ("verified/published", "verified/merge", "verified/clean_merge", "mark/merge"),
    "backdoor": ("BA", "succession", "backdoor", "tier", "transfer", "CA"),
    "backdoor_pareto": ("BA", "succession", "front", "tier", "front_share"),
    "backdoor_defenses": ("worst_backdoor", "accuracy_cost", "tier", "worst_by", "mean_backdoor"),
    "backdoor_attacks": ("BA", "succession", "backdoor", "best_defense", "best_ASR", "tier"),
    "transfer": ("succession_base", "succession", "relative_transfer", "ASR_alone", "acc_merge"),
    "cost": ("runs", "seconds", "peak_mb", "rows"),
    "cost_total": ("minutes", "steps", "peak_mb"),
}  # fmt: skip
"""What each board says first, in order of weight."""
_MARKS = ("verified", "contained", "external", "external_by")
"""Where a number comes from: shown unless every row was run here, inside walls, and is the worst known."""
_EXPECTED = {"re-run", "yes", "nan", ""}


class Fitted(NamedTuple):
    """What of a board is shown, as text. ``told`` are lines for under it."""

    header: list[str]
    rows: list[list[str]]
    told: list[str]
    blocks: bool = False
    """Too wide for a table: one block a row."""


def fitted(
    board: Board, width: int, short: Mapping[str, str], chosen: Sequence[str] = (), wide: bool = False
) -> Fitted:
    """A board for ``width`` letters. Of itself it shows what matters first, under ``short`` names, and tells which
    columns are left out; ``chosen`` columns, or all (``wide``, under full names), are all shown, one block a row
    where they do not fit."""
    frame = board.frame
    names = [c for c in NAMES if c in frame]
    everything = [c for c in frame.columns if c not in _hidden(board) and c not in names]
    told = _incomplete(frame)
    if wide:
        shown = [*names, *everything]
        table = [_texts(board, c) for c in shown]
        return _rows(shown, table, told, blocks=_width(shown, table) > width)
    varying, fixed = _split(frame, names)
    notes = [f"{name}: {text}" for name, text in fixed]
    if chosen:
        shown = [*varying, *(c for c in chosen if c in everything)]
        table = [_renamed_all(_texts(board, c), short) for c in shown]
        return _rows(shown, table, [*notes, *told], blocks=_width(shown, table) > width)
    first = [c for c in (*_marks(frame), *_FIRST.get(board.name, everything)) if c in everything]
    table = [_texts(board, c, short) for c in varying]
    shown = list(varying)
    for column in first:
        texts = _texts(board, column, short)
        if any(t not in ("", "–") for t in texts) and _width([*shown, column], [*table, texts]) <= width:
            shown.append(column)
            table.append(texts)
    if len(shown) == len(varying) and first:  # nothing but names would fit
        shown, table = [*varying, *first], [*table, *(_texts(board, c, short) for c in first)]
    if left := [c for c in everything if c not in shown]:
        notes.append(f"more columns (--columns, --wide): {', '.join(left)}")
    return _rows(shown, table, [*notes, *told], blocks=_width(shown, table) > width)


def short_names(boards: Iterable[Board]) -> dict[str, str]:
    """Label → short name, the same on all these boards."""
    return shortened(str(v) for b in boards for c in LABELS if c in b.frame for v in b.frame[c])


def check_columns(boards: Iterable[Board], chosen: Sequence[str]) -> None:
    """UsageError for a column that none of these boards has."""
    known = {c: None for b in boards for c in b.frame.columns if c not in _hidden(b)}
    for column in chosen:
        if column not in known:
            raise UsageError("--columns", f"no board has {column!r}{nearest(column, known)}")


def header_lines(name: str, room: int) -> list[str]:
    """A column's name in lines of about ``room`` letters, parted where its words meet."""
    lines = [""]
    for part in re.findall(r"[^_/ ]+[_/ ]?", name) or [name]:
        if lines[-1] and len(lines[-1]) + len(part) > room:
            lines.append("")
        lines[-1] += part
    return lines


def _hidden(board: Board) -> set[str]:
    ends = {f"{m}{end}" for m in board.measures for end in ("_low", "_high", "_seeds")}
    return ends | {"cells_done", "cells_expected", "seeds", "reason"}


def _marks(frame: pd.DataFrame) -> list[str]:
    return [c for c in _MARKS if c in frame and not set(frame[c].astype(str)) <= _EXPECTED]


def _split(frame: pd.DataFrame, names: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The naming columns that differ between rows, and those that do not with what they say."""
    alike = [c for c in names if len(frame) > 1 and frame[c].astype(str).nunique() == 1]
    varying = [c for c in names if c not in alike] or list(names[:1])
    fixed = [(c, plain(str(frame[c].iloc[0]))) for c in alike if c not in varying]
    return varying, [(c, text) for c, text in fixed if text not in ("none", "own", "1", "")]


def _texts(board: Board, column: str, short: Mapping[str, str] | None = None) -> list[str]:
    rows = [row for _, row in board.frame.iterrows()]
    if column == "tier":
        return ["" if not row["tier"] or math.isnan(row["tier"]) else f"{row['tier']:.0f}" for row in rows]
    if short is not None and column in board.measures:
        return [_brief(row, column) for row in rows]
    return _renamed_all([cell_text(row, column, board.measures) for row in rows], short or {})


def _renamed_all(texts: Sequence[str], short: Mapping[str, str]) -> list[str]:
    return [_renamed(text, short) for text in texts]


def _renamed(text: str, short: Mapping[str, str]) -> str:
    """A label, or several of them joined, under their short names."""
    if text in short:
        return plain(short[text])
    for joint in (" or ", " + "):
        if joint in text:
            return joint.join(_renamed(part, short) for part in text.split(joint))
    return text


def _brief(row: Any, column: str) -> str:
    """``65.1 [60, 70]``: the ends of the interval without decimals."""
    value = row[column]
    if pd.isna(value):
        return "–"
    left, right = "()" if few_seeds(row, column) else "[]"
    low, high = (f"{100 * row[column + end]:z.0f}" for end in ("_low", "_high"))
    return f"{100 * value:z.1f} {left}{low}, {high}{right}"


def _incomplete(frame: pd.DataFrame) -> list[str]:
    """A line for each row that lacks cells, with the reason."""
    if "cells_done" not in frame:
        return []
    told = []
    for _, row in frame.iterrows():
        if row["cells_done"] < row["cells_expected"]:
            named = " + ".join(str(row[c]) for c in LABELS if c in frame and row[c] != "none")
            reason = row.get("reason")
            why = f": {reason}" if isinstance(reason, str) and reason else ""
            told.append(
                plain(f"incomplete: {named}, {row['cells_done']} of {row['cells_expected']} cells done{why}")
            )
    return told


def _width(header: Sequence[str], columns: Sequence[Sequence[str]]) -> int:
    return sum(_column_width(h, c) for h, c in zip(header, columns, strict=True)) + BETWEEN * (
        len(header) - 1
    )


def _column_width(name: str, texts: Sequence[str]) -> int:
    room = max(map(len, texts), default=0)
    return max(room, *map(len, header_lines(name, max(room, 8))))


def _rows(header: list[str], columns: Sequence[Sequence[str]], told: list[str], blocks: bool) -> Fitted:
    return Fitted(header, [list(row) for row in zip(*columns, strict=True)], told, blocks)
