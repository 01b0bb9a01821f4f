"""What a reader of the start page must know, in three sentences made from boards."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from mergesec.evidence.tables import cell_text
from mergesec.site.boards import Sheet
from mergesec.site.names import cells_link, link

RUINED = 0.10
"""Accuracy that a protection costs a merge, from which on it is worth the name."""
UNDONE = 0.90
"""Recovery from which on a protection is undone."""
Row = dict[str, Any]


class Finding(NamedTuple):
    """A sentence, what it rests on, and where."""

    title: str
    text: str
    rests: str
    links: tuple[tuple[str, str], ...]


class Candidate(NamedTuple):
    """A finding and how much it rests on: first whether it is more than a trial, then how many cells or rows."""

    weight: tuple[int, ...]
    finding: Finding


def findings(candidates: Iterable[tuple[str, Candidate]]) -> list[Finding]:
    """Of each kind the one that rests on most."""
    best: dict[str, Candidate] = {}
    for kind, found in candidates:
        if kind not in best or found.weight > best[kind].weight:
            best[kind] = found
    return [best[kind].finding for kind in KINDS if kind in best][:3]


def candidates(sheet: Sheet) -> list[tuple[str, Candidate]]:
    """What the boards of a sheet can say."""
    makers = {"protection": _protections, "backdoor_attacks": _attacks, "backdoor_defenses": _defenses,
              "clean": _merges}  # fmt: skip
    found = []
    for board in sheet.boards:
        if board.name in makers:
            rows: list[Row] = [{str(k): v for k, v in r.items()} for r in board.frame.to_dict("records")]
            made = makers[board.name](rows, sheet)
            if made is not None:
                found.append((board.name, made))
    return found


KINDS = ("protection", "backdoor_attacks", "backdoor_defenses", "clean")
"""Kinds of findings, the most telling first."""


def _text(row: Row, column: str) -> str:
    return cell_text(row, column, (column,))


def _known(row: Row, *columns: str) -> bool:
    return all(isinstance(row.get(c), float | int) and not math.isnan(row[c]) for c in columns)


def _finding(title: str, text: str, row: Row, sheet: Sheet, links: tuple[tuple[str, str], ...]) -> Finding:
    """A finding of a row; one seed is a trial, and its title says so."""
    seeds = int(row.get("seeds", 0) or 0)
    rests = f"{sheet.grid}, {seeds} seed{'' if seeds == 1 else 's'}" + (" (a trial)" if seeds < 2 else "")
    return Finding(title if seeds > 1 else f"A trial: {title[0].lower()}{title[1:]}", text, rests, links)


def _links(sheet: Sheet, board: str, **chosen: str) -> tuple[tuple[str, str], ...]:
    narrowed = {f"f__{name}": value for name, value in chosen.items()}
    return (
        ("board", link(f"boards/{sheet.slug}.html", board=board, **narrowed)),
        ("cells", cells_link(sheet.grid, chosen)),
    )


def _bare(label: str) -> str:
    """Names without their parameters, of a method or of an attack on a merge: the link tells the rest."""
    return re.sub(r"\([^()]*(?:\([^()]*\)[^()]*)*\)", "", label)


def _protections(rows: Sequence[Row], sheet: Sheet) -> Candidate | None:
    """How many protections that ruin a merge outlast the strongest attack on them."""
    mine = [
        r for r in rows
        if r["defense"] != "none" and _known(r, "worst_recovery", "MMP-", "MMP+") and r["MMP-"] - r["MMP+"] >= RUINED
    ]  # fmt: skip
    if not mine:
        return None
    undone = [r for r in mine if r["worst_recovery"] >= UNDONE]
    best = min(mine, key=lambda r: r["worst_recovery"])
    title = (
        "No protection that ruins a merge survives its worst attack"
        if len(undone) == len(mine)
        else f"{len(mine) - len(undone)} of {len(mine)} protections that ruin a merge survive their worst attack"
    )
    text = (
        f"{len(mine)} protections cost the merge at least {100 * RUINED:.0f} points on the protected task. The "
        f"strongest attack brings back at least {100 * UNDONE:.0f} % of that loss for {len(undone)} of them. The one "
        f"that holds best is {_bare(best['defense'])}: {_bare(best['recovered_by'])} brings back {_text(best, 'worst_recovery')} %."
    )
    links = _links(sheet, "protection", defense=best["defense"])
    return Candidate(_weight(sheet), _finding(title, text, best, sheet, links))


def _weight(sheet: Sheet) -> tuple[int, int]:
    return int(len({r.seed for r in sheet.records}) > 1), len(sheet.records)


def _seeds(rows: Sequence[Row]) -> int:
    return max(int(r.get("seeds", 0) or 0) for r in rows)


def _attacks(rows: Sequence[Row], sheet: Sheet) -> Candidate | None:
    """The attack of which most is left after merging, beside its control and its accuracy."""
    mine = [
        r for r in rows
        if r["attack"] != "none" and _known(r, "backdoor", "succession", "succession_clean_merge", "BA", "CA")
    ]  # fmt: skip
    if not mine:
        return None
    most = _seeds(mine)
    worst = max((r for r in mine if int(r.get("seeds", 0)) == most), key=lambda r: r["backdoor"])
    hidden = worst["CA"] - worst["BA"] <= 0.02
    title = (
        "A backdoor survives merging" + (", and accuracy does not give it away" if hidden else "")
        if worst["backdoor"] >= 0.2
        else "Little of any backdoor survives merging"
    )
    text = (
        f"Of one contributor's {_bare(worst['attack'])}, {_text(worst, 'succession')} % of the non-target samples with its "
        f"trigger go to the target class after merging, mean over merge methods; on the merge of clean experts the "
        f"same trigger reaches {_text(worst, 'succession_clean_merge')} %, which is no backdoor. Accuracy is "
        f"{_text(worst, 'BA')} %, and {_text(worst, 'CA')} % without the attack."
    )
    links = _links(sheet, "backdoor_attacks", attack=worst["attack"])
    return Candidate(_weight(sheet), _finding(title, text, worst, sheet, links))


def _defenses(rows: Sequence[Row], sheet: Sheet) -> Candidate | None:
    """What the best of several defenses leaves of the attack it does worst against, and at what price."""
    mine = [
        r
        for r in rows
        if r["defense"] != "none" and _known(r, "worst_backdoor", "worst_ASR", "accuracy_cost")
    ]
    if not mine:
        return None
    best = min(mine, key=lambda r: r["worst_backdoor"])
    kept = sum(r["worst_ASR"] >= 0.5 for r in mine)
    left = any(_known(r, "worst_backdoor_low") and r["worst_backdoor_low"] <= 0 for r in mine)
    title = (
        f"{kept} of {len(mine)} defenses leave a backdoor that works"
        if kept
        else "A defense leaves no backdoor that can be told from its control"
        if left
        else "No defense compared takes every backdoor away whole"
    )
    text = (
        f"Of {len(mine)} defenses compared, {kept} leave the attack they do worst against at least half of its "
        f"samples. Least is left by {_bare(best['defense'])}: {_text(best, 'worst_backdoor')} points beyond the "
        f"control ({_bare(best['worst_by'])}), for {_text(best, 'accuracy_cost')} points of accuracy."
    )
    links = _links(sheet, "backdoor_defenses", defense=best["defense"])
    # several seeds, then many defenses, make the better comparison
    return Candidate(
        (int(_seeds(mine) > 1), len(mine), len(sheet.records)), _finding(title, text, best, sheet, links)
    )


def _merges(rows: Sequence[Row], sheet: Sheet) -> Candidate | None:
    """What the best merge keeps of its experts."""
    mine = [r for r in rows if not str(r["method"]).startswith("(") and _known(r, "accuracy", "normalised")]
    if not mine:
        return None
    best = max(mine, key=lambda r: (int(r["experts"]), r["normalised"]))
    title = (
        f"The best merge of {best['experts']} keeps {100 * best['normalised']:.0f} % of its experts' accuracy"
    )
    text = (
        f"{_bare(best['method'])} reaches {_text(best, 'accuracy')} % on average over the tasks, "
        f"{_text(best, 'normalised')} % of what the experts reach alone."
    )
    links = _links(sheet, "clean", method=best["method"])
    return Candidate(_weight(sheet), _finding(title, text, best, sheet, links))
