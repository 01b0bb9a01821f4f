"""What protections leave to the best free-rider, beside the line that none can go below without another function."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mergesec.evidence.estimates import Reader
from mergesec.evidence.records import Record
from mergesec.evidence.statistics import Estimate, largest
from mergesec.figures.canvas import (
    GREY,
    PALETTE,
    Caption,
    Picture,
    handles_of,
    legend_row,
    put_legend,
    sheet,
)
from mergesec.threats import Role

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BOUND = "distill"
"""The attack that only calls the published expert: of equal functions it makes equal students."""
TALL = 0.22
"""Inches of one defense's line."""

Place = tuple[str, int, int, str]
"""Merge method, number of experts, number of protected ones, whose secrets."""


@dataclass(frozen=True)
class Standing:
    """One protection: accuracy lost alone, and of the merge as it is, after the best attack and after distilling."""

    defense: str
    lost: Estimate
    still: Estimate
    best: Estimate
    by: str
    distilled: Estimate


def standings(records: Sequence[Record], reader: Reader) -> dict[Place, list[Standing]]:
    """Per kind of merge, over the victims and seeds at which an unprotected expert was distilled; a protection that
    lacks one of these cells under an attack is not compared under it."""
    found: dict[Place, list[Standing]] = {}
    done = [r for r in records if r.status == "done"]
    for place in dict.fromkeys(_place(r) for r in done):
        here = [r for r in done if _place(r) == place]
        line = [r for r in here if r.defense == "none" and r.attack.partition("(")[0] == BOUND]
        cells = {(r.subject, r.seed) for r in line}
        mine = [r for r in here if (r.subject, r.seed) in cells]
        groups: dict[str, dict[str, list[Record]]] = {}
        for record in mine:
            groups.setdefault(record.defense, {}).setdefault(record.attack, []).append(record)
        for defense, attacks in groups.items():
            whole = {a: g for a, g in attacks.items() if {(r.subject, r.seed) for r in g} == cells}
            if cells and "none" in whole and any(a.partition("(")[0] == BOUND for a in whole):
                found.setdefault(place, []).append(_standing(defense, whole, reader))
    return found


def _place(record: Record) -> Place:
    return record.merging, len(record.experts), record.protected, record.secrets


def _standing(defense: str, attacks: dict[str, list[Record]], reader: Reader) -> Standing:
    def rate(records: Sequence[Record], role: str) -> Estimate:
        return reader.rate(records, "acc", role, "subject")

    plain, names = attacks["none"], list(attacks)
    best, at = largest([rate(attacks[name], Role.MERGE) for name in names])
    distilled = next(g for name, g in attacks.items() if name.partition("(")[0] == BOUND)
    return Standing(
        defense, rate(plain, Role.EXPERT) - rate(plain, Role.PUBLISHED), rate(plain, Role.PROTECTED_MERGE),
        best, names[at], rate(distilled, Role.MERGE),
    )  # fmt: skip


def frontier_pictures(records: Sequence[Record], reader: Reader, caption: Caption) -> Iterator[Picture]:
    """One picture per kind of merge in which an unprotected expert was distilled."""
    found = standings(records, reader)
    for number, (place, rows) in enumerate(found.items()):
        ordered = sorted(rows, key=lambda s: (s.defense != "none", s.best.value))
        name = "protection-frontier" + (f"-{number + 1}" if len(found) > 1 else "")
        yield Picture(name, _drawn(place, ordered, caption))


def _drawn(place: Place, rows: Sequence[Standing], caption: Caption) -> Figure:
    marks = (
        ("as published", "still", "o", "none"), ("after the best attack", "best", "s", "full"),
        ("after distilling", "distilled", "D", "full"),
    )  # fmt: skip
    columns, legend = legend_row(dict.fromkeys(label for label, *_ in marks), caption.width)
    note = (
        "Bars: 95 % intervals; the best of several attacks is biased upwards a little. In brackets the accuracy that "
        "the protection costs the expert alone, in points. Dashed: an unprotected expert, distilled into the base. "
        f"{caption.key([row.defense for row in rows] + [place[0]])}"
    )
    figure, panels = sheet(
        (caption.width, TALL * len(rows) + 0.6 + legend), (2, 1),
        f"What is left to the best free-rider: {caption.name(place[0])}, {place[1]} experts",
        caption, note, height_ratios=[TALL * len(rows) + 0.6, legend],
    )  # fmt: skip
    ax, heights = panels[0, 0], np.arange(len(rows))[::-1]
    for turn, (label, measure, marker, fill) in enumerate(marks):
        points = np.array([(e.value, *e.interval()) for e in (getattr(row, measure) for row in rows)]) * 100
        ax.errorbar(
            points[:, 0], heights + 0.2 * (1 - turn), xerr=np.abs(points[:, 1:] - points[:, :1]).T, label=label,
            color=PALETTE[turn], marker=marker, fillstyle=fill, linestyle="", elinewidth=0.6, markersize=3.5,
        )  # fmt: skip
    bound = next((row.distilled.value for row in rows if row.defense == "none"), None)
    if bound is not None:
        ax.axvline(100 * bound, color=GREY, linestyle="--", linewidth=0.8, zorder=0)
    ax.set(
        yticks=heights, xlabel="accuracy of the merge on the protected task, %",
        yticklabels=[f"{caption.name(row.defense)} ({100 * row.lost.value:.1f})" for row in rows],
    )  # fmt: skip
    put_legend(panels[1, 0], handles_of([ax]), columns)
    return figure
