"""Boards as text: Markdown and terminal tables rounded, CSV with all digits."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mergesec.evidence.estimates import Board
from mergesec.evidence.protection import STANDARD
from mergesec.evidence.records import Record, is_claimed
from mergesec.files import brief, plain, write_changed

_SHOWN: dict[str, tuple[str, ...]] = {
    "protection": ("defense", "stand_alone_loss", "MMP-", "MMP+", f"recovery_{STANDARD}", "worst_recovery",
                   "recovered_by", "worst_merged", "max_abs_dlogit", "cells_compared"),
    "protection_cells": ("defense", "attack", "method", "experts", "protected", "secrets", "UMP-", "UMP+",
                         "UMP_attacked", "MMP-", "MMP+", "MMP_attacked", "free_rider+", "recovery"),
    "protection_victims": ("victim", "defense", "attack", "method", "experts", "protected", "secrets", "UMP-", "UMP+",
                           "MMP-", "MMP+", "MMP_attacked", "free_rider_attacked", "recovery"),
    "protection_distances": ("defense", "attack", "to_expert/all", "to_base/all", "to_base/query",
                             "to_base/value", "to_base/up", "condition", "max_abs_dlogit"),
    "ownership": ("defense", "attack", "method", "experts", "verified/published", "verified/protected_merge",
                  "verified/merge", "verified/clean_merge", "mark/published", "mark/protected_merge",
                  "mark/merge", "mark/clean_merge", "stand_alone_loss"),
    "backdoor": ("attack", "method", "defense", "experts", "adversaries", "target_task", "CA", "BA", "ASR_alone",
                 "succession", "succession_clean_merge", "succession_base", "backdoor", "transfer",
                 "transfer_clean_merge", "transfer_harm", "target_recall", "RA", "DER"),
    "backdoor_adversaries": ("adversary", "attack", "method", "defense", "experts", "adversaries", "target_task", "BA",
                             "succession", "succession_control", "backdoor", "target_recall"),
    "transfer": ("attack", "method", "defense", "experts", "adversaries", "target_task", "acc_base", "acc_merge",
                 "succession_base", "ASR_alone", "succession", "relative_transfer_alone", "relative_transfer"),
    "backdoor_pareto": ("attack", "experts", "adversaries", "target_task", "method", "defense", "BA", "succession",
                        "backdoor", "front", "front_share", "dominated_by", "cells_compared"),
    "backdoor_defenses": ("defense", "worst_backdoor", "worst_by", "worst_ASR", "mean_backdoor", "accuracy_cost",
                          "worst_accuracy_cost", "target_recall_cost", "worst_target_recall_cost", "RA", "DER",
                          "caught", "false_alarms", "defense_rows", "cells_compared"),
    "backdoor_attacks": ("attack", "experts", "adversaries", "target_task", "CA", "BA", "ASR_alone", "succession",
                         "succession_clean_merge", "succession_base", "backdoor", "transfer", "backdoor_transfer",
                         "transfer_harm", "best_defense", "best_ASR", "best_cost", "best_target_recall_cost", "best_pair", "best_pair_ASR", "visibility/area",
                         "visibility/l2", "visibility/ssim"),
}  # fmt: skip


_WHOLE = (
    "KID",
    "perplexity",
)
"""Measures that are no shares."""
_PLAIN = (
    "coefficient",
    "coefficient_others",
    "coefficient_control",
    "max_abs_dlogit",
    "minutes",
    "peak_mb",
    "DER",
    "condition",
    "visibility/l2",
    "visibility/ssim",
    "visibility/tokens",
    "FID",
)

ORIGIN = ("verified", "contained", "external", "external_by")
"""Where numbers come from: in every CSV, and shown where some row is not as it should be."""
_EXPECTED = {"re-run", "yes", "nan", ""}


def _is_told(column: pd.Series) -> bool:
    return not {str(value) for value in column} <= _EXPECTED


def display(board: Board) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text: percentages with half-widths of intervals, incomplete rows marked."""
    frame = board.frame
    hidden = {f"{m}{end}" for m in board.measures for end in ("_low", "_high", "_seeds")}
    hidden |= {"cells_done", "cells_expected", "seeds", "tier", "reason", *ORIGIN}
    columns = [
        c for c in _SHOWN.get(board.name, tuple(frame.columns)) if c in frame.columns and c not in hidden
    ]
    columns += [c for c in ORIGIN if c in frame.columns and _is_told(frame[c])]
    extra = [c for c in ("tier", "cells") if (c == "cells" and "cells_done" in frame) or c in frame.columns]
    rows = []
    for _, row in frame.iterrows():
        texts = [cell_text(row, c, board.measures) for c in columns]
        for c in extra:
            if c == "tier":
                texts.append("" if pd.isna(row["tier"]) or row["tier"] == 0 else str(int(row["tier"])))
            else:
                done, expected = int(row["cells_done"]), int(row["cells_expected"])
                texts.append(f"{done}/{expected}" + ("" if done == expected else _why(row)))
        rows.append(texts)
    return [*columns, *extra], rows


def _why(row: Any) -> str:
    """What stands beside the cells of a row that lacks some."""
    reason = row.get("reason")
    return f" incomplete ({brief(reason)})" if isinstance(reason, str) and reason else " incomplete"


def cell_text(row: Any, column: str, measures: Sequence[str]) -> str:
    value = row[column]
    if isinstance(value, str):
        return plain(value)
    if value is None or pd.isna(value):
        return "–"
    if column in _PLAIN or column.startswith("to_") or column.endswith("seconds"):
        return _three_digits(value)
    if column.endswith("rows"):
        return f"{value:.0f}"
    if column in measures:
        scale = 1 if column in _WHOLE else 100
        low, high = scale * row[f"{column}_low"], scale * row[f"{column}_high"]
        left, right = "()" if few_seeds(row, column) else "[]"
        return f"{scale * value:.1f} {left}{low:.1f}, {high:.1f}{right}"
    if isinstance(value, float):
        return f"{100 * value:.1f}"
    return str(value)


def _three_digits(value: float) -> str:
    """As the site writes them: 2540, not 2.54e+03; from a million on with an exponent."""
    text = f"{value:.3g}"
    return f"{float(text):.0f}" if 1000 <= abs(float(text)) < 1e6 else text


def few_seeds(row: Any, column: str) -> bool:
    """Whether a number rests on one seed (its own, else the row's): its interval speaks of test samples alone."""
    own = row.get(f"{column}_seeds", math.nan)
    return float(row.get("seeds", 2) if pd.isna(own) else own) <= 1


_MARKUP = re.compile(r"[\\|`<>*&]|\](?=[(\[])|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|://")


def escaped(text: str) -> str:
    """Text as one cell of a Markdown table: no markup, links or HTML of its own."""
    if re.fullmatch(r"[\d.–-]+(?: [\[(][\d.-]+, [\d.-]+[\])])?", text):  # a number with its interval
        return text
    return _MARKUP.sub(lambda m: "".join(f"&#{ord(c)};" for c in m[0]), plain(text))


def _no_formula(value: Any) -> Any:
    """A text that a spreadsheet would compute gets an apostrophe before it."""
    if not isinstance(value, str):
        return value
    value = plain(value)
    return f"'{value}" if value.startswith(("=", "+", "-", "@")) else value


def csv_bytes(frame: pd.DataFrame) -> bytes:
    """A frame as CSV with all digits, safe to open in a spreadsheet."""
    return frame.map(_no_formula).to_csv(index=False).encode()


def markdown(board: Board) -> str:
    """A board as a section of Markdown, rounded."""
    header, rows = display(board)
    lines = [f"## {board.title}", ""]
    if board.note:
        lines += [board.note, ""]
    lines += ["| " + " | ".join(map(escaped, header)) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(map(escaped, r)) + " |" for r in rows]
    return "\n".join(lines) + "\n"


def marks(records: Sequence[Record]) -> list[str]:
    """What a reader must know before comparing: partial data, the transductive protocol, plugins that could see
    more than they should."""
    partial: dict[str, str] = {}
    for record in records:
        partial |= record.provenance.get("partial", {})
    notes = [f"partial data: {task} ({how})" for task, how in sorted(partial.items())]
    if any(r.protocol == "transductive" for r in records):
        notes.append("transductive: methods that adapt saw the test inputs, without labels")
    open_cells = sum(r.contained == "no" for r in records)
    if open_cells:
        notes.append(
            f"not contained: in {open_cells} cells a plugin could have seen test labels (docs/trust.md)"
        )
    if claimed := sum(map(is_claimed, records)):
        notes.append(
            f"claimed: {claimed} cells are a submission's that was not run again (docs/submitting.md)"
        )
    return notes


_EXPLAINED = (
    "Percent with 95 % intervals: [over seeds and test samples]; (some cell has one seed, whose spread over seeds is "
    "unknown and left out). Equal tiers are not separable. verified, contained and external are shown where not every "
    "row was run here, inside walls, and is the worst that is known; the CSV always tells."
)


def write_boards(folder: Path, boards: Sequence[Board], title: str, notes: Sequence[str] = ()) -> list[Path]:
    """``<name>.csv`` with all digits for each board, and one ``boards.md``; the paths written."""
    paths = []
    for old in folder.glob("*.csv"):  # a board this grid no longer has must not look current
        if old.stem not in {b.name for b in boards}:
            old.unlink()
    for board in boards:
        path = folder / f"{board.name}.csv"
        write_changed(path, csv_bytes(board.frame))
        paths.append(path)
    head = "\n".join([f"# {title}", "", _EXPLAINED, *(f"\n* {n}" for n in notes), "", ""])
    path = folder / "boards.md"
    write_changed(path, (head + "\n".join(markdown(b) for b in boards)).encode())
    return [*paths, path]
