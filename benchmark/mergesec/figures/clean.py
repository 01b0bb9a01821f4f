"""Pictures of merges without attack or defense."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mergesec.evidence.estimates import Board, Reader
from mergesec.evidence.records import Record
from mergesec.figures.canvas import (
    ACCURACY,
    GREY,
    NOTHING,
    Caption,
    Curves,
    Heat,
    Picture,
    Row,
    Series,
    curve_sheets,
    heat_sheets,
    look_of,
    numbered,
    part,
    point,
    rows_of,
    sheet,
    short_names,
)
from mergesec.figures.sweeps import Methods, axis_title, find_sweeps, methods_of
from mergesec.threats import Role, Threat

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CONTROLS = ("(experts)", "(base)")


def clean_pictures(
    records: Sequence[Record], boards: Mapping[str, Board], reader: Reader
) -> Iterator[Picture]:
    """Accuracy per method, per method and task, and along a method's coefficient."""
    if "clean" not in boards:
        return
    rows: list[Row] = rows_of(boards["clean"])
    mine = [r for r in records if r.threat == Threat.CLEAN]
    caption = Caption.of(mine)
    yield from _dots(rows, caption)
    yield from _tasks(rows, mine, reader, caption)
    yield from _sweeps(rows, caption, methods_of(mine))


def _name(row: Row, rows: Sequence[Row]) -> str:
    """The method, with the number of experts where the grid merges several numbers of them."""
    sizes = {r["experts"] for r in rows if r["method"] not in CONTROLS}
    alone = len(sizes) < 2 or row["method"] in CONTROLS
    return str(row["method"]) if alone else f"{row['method']}, {row['experts']} experts"


def _dots(rows: Sequence[Row], caption: Caption) -> Iterator[Picture]:
    measured = [r for r in rows if r["method"] not in CONTROLS and not math.isnan(r["accuracy"])]
    controls = {r["method"]: r for r in rows if r["method"] in CONTROLS}
    pages = part(measured, lambda row: 0.2)
    for page, chunk in enumerate(pages):
        names = [_name(row, rows) for row in chunk]
        width = 7.2 + 0.068 * max(map(len, names))
        figure, panels = sheet(
            (width, 0.2 * len(chunk) + 1.2), (1, 2), "Accuracy of merges", caption,
            "Bars: 95 % intervals. Normalised: mean over tasks of merge / expert.",
        )  # fmt: skip
        for ax, measure in zip(panels[0], ("accuracy", "normalised"), strict=True):
            _dot_panel(
                ax, [point(r, measure) for r in chunk], {n: point(r, measure) for n, r in controls.items()}
            )
            ax.set(title=f"{measure}, mean over tasks", xlabel="%")
        panels[0, 0].set_yticks(range(len(names)), names)
        panels[0, 1].set_yticks(range(len(names)), [""] * len(names))
        yield Picture(numbered("clean-accuracy", page, len(pages)), figure)


def _dot_panel(
    ax: Axes, points: Sequence[tuple[float, ...]], controls: Mapping[str, tuple[float, ...]]
) -> None:
    found = 100 * np.array(points)
    ends = np.abs(found[:, 1:] - found[:, :1]).T
    ax.errorbar(
        found[:, 0], range(len(found)), xerr=ends, fmt="o", color="#0072B2", elinewidth=1.2, capsize=2
    )
    for value, low, high in controls.values():
        ax.axvline(100 * value, color=GREY, linestyle="--", linewidth=1)
        ax.axvspan(100 * low, 100 * high, color=GREY, alpha=0.12, linewidth=0)
    top = ax.secondary_xaxis("top")  # inside the panel the names would lie on dots
    top.set_xticks([100 * c[0] for c in controls.values()], [name.strip("()") for name in controls])
    top.tick_params(length=0, pad=1, labelsize=7, labelcolor=GREY)
    top.spines[:].set_visible(False)
    ax.set_ylim(len(found) - 0.4, -0.6)
    ax.margins(x=0.04)


def _tasks(
    rows: Sequence[Row], records: Sequence[Record], reader: Reader, caption: Caption
) -> Iterator[Picture]:
    tasks = list(dict.fromkeys(t for r in records for t in r.experts))
    done = [r for r in records if r.status == "done"]
    cells = []
    for row in rows:
        if row["method"] in CONTROLS:
            role, group = row["method"].strip("()").removesuffix("s"), done
        else:
            role = Role.CLEAN_MERGE
            group = [r for r in done if (r.merging, len(r.experts)) == (row["method"], row["experts"])]
        found = [reader.task(group, role, t) for t in tasks]
        cells.append([(e.value, *e.interval()) for e in found])
    short = short_names(tasks)
    lines = []
    names = [_name(row, rows) for row in rows]
    size = math.ceil(len(rows) / math.ceil(len(rows) / 36))  # pages of one height
    for start in range(0, len(rows), size):
        some = slice(start, start + size)
        lines.append(
            [Heat("", names[some], [short[t] for t in tasks], np.array(cells[some]), ACCURACY)],
        )
    yield from heat_sheets("clean-tasks", "Accuracy of merges, task by task", lines, caption, "")


def _sweeps(rows: Sequence[Row], caption: Caption, methods: Methods) -> Iterator[Picture]:
    by_parameter: dict[tuple[str, int], list[Series]] = {}
    for sweep in find_sweeps(methods):
        for size in sorted({r["experts"] for r in rows if r["method"] in sweep.values}):
            found = {r["method"]: r for r in rows if r["experts"] == size}
            xs = [v for label, v in sweep.values.items() if label in found]
            points = [point(found[label], "accuracy") for label in sweep.values if label in found]
            mine = by_parameter.setdefault((sweep.parameter, size), [])
            mine.append(Series(sweep.title, xs, np.array(points), *look_of(len(mine))))
    controls = {r["method"]: point(r, "accuracy") for r in rows if r["method"] in CONTROLS}
    lines = []
    for (parameter, size), series in by_parameter.items():
        ends = [min(min(s.x) for s in series), max(max(s.x) for s in series)]
        around = [
            Series(name.strip("()"), ends, np.array([controls.get(name, NOTHING)] * 2), GREY, "", dash)
            for name, dash in zip(CONTROLS, ("--", ":"), strict=True)
        ]
        title = f"{size} experts"
        lines.append(
            [Curves(title, axis_title(parameter), "accuracy, mean over tasks, %", [*series, *around])]
        )
    if lines:
        yield from curve_sheets("clean-coefficient", "Accuracy along the coefficient", lines, caption, "")
