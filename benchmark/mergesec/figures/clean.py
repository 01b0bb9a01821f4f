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
    from matplotlib.figure import Figure

CONTROLS = ("(experts)", "(base)")


def clean_pictures(
    records: Sequence[Record], boards: Mapping[str, Board], reader: Reader, width: float
) -> Iterator[Picture]:
    """Accuracy per method, per method and task, and along a method's coefficient."""
    if "clean" not in boards:
        return
    rows: list[Row] = rows_of(boards["clean"])
    mine = [r for r in records if r.threat == Threat.CLEAN]
    caption = Caption.of(mine, width)
    yield from _dots(rows, caption, per_task_methods(mine))
    yield from _tasks(rows, mine, reader, caption)
    yield from _sweeps(rows, caption, methods_of(mine))


def per_task_methods(records: Sequence[Record]) -> set[str]:
    """Labels of the methods that keep weights, masks or modules per task: they need to know an input's task, so
    their accuracy is no rival of one set of weights. Their cards say so; of a method that is not installed nothing
    is known."""
    from mergesec.planning.catalog import load_catalog

    cards = {name: entry.card for name, entry in load_catalog().entries["merging"].items()}
    names = {
        r.merging: r.components["merging"].name if "merging" in r.components else r.merging for r in records
    }
    kept = {label: cards.get(name.partition("(")[0]) for label, name in names.items()}
    return {label for label, card in kept.items() if card is not None and card.output == "per_task"}


def _name(row: Row, rows: Sequence[Row], caption: Caption) -> str:
    """The method, with the number of experts where the grid merges several numbers of them."""
    sizes = {r["experts"] for r in rows if r["method"] not in CONTROLS}
    alone = len(sizes) < 2 or row["method"] in CONTROLS
    name = caption.name(str(row["method"]))
    return name if alone else f"{name}, {row['experts']} experts"


def _dots(rows: Sequence[Row], caption: Caption, per_task: set[str]) -> Iterator[Picture]:
    measured = [r for r in rows if r["method"] not in CONTROLS and not math.isnan(r["accuracy"])]
    controls = {r["method"]: r for r in rows if r["method"] in CONTROLS}
    for name, what, mine in (
        ("clean-accuracy", "Accuracy of merges", [r for r in measured if r["method"] not in per_task]),
        ("clean-accuracy-per-task", "Accuracy of merges that keep weights per task",
         [r for r in measured if r["method"] in per_task]),
    ):  # fmt: skip
        pages = part(mine, lambda row: 0.155)
        for page, chunk in enumerate(pages):
            figure = _dot_sheet(chunk, what, rows, controls, caption)
            yield Picture(numbered(name, page, len(pages)), figure)


def _dot_sheet(
    chunk: Sequence[Row], what: str, rows: Sequence[Row], controls: Mapping[str, Row], caption: Caption
) -> Figure:
    names = [_name(row, rows, caption) for row in chunk]
    figure, panels = sheet(
        (caption.width, 0.155 * len(chunk) + 0.7), (1, 2), what, caption,
        "Bars: 95 % intervals. Normalised: mean over tasks of merge / expert. Methods that keep weights per task need "
        f"to know an input's task and have a picture of their own. {caption.key([row['method'] for row in chunk])}",
    )  # fmt: skip
    for ax, measure in zip(panels[0], ("accuracy", "normalised"), strict=True):
        _dot_panel(
            ax, [point(r, measure) for r in chunk], {n: point(r, measure) for n, r in controls.items()}
        )
        ax.set(title=f"{measure}, mean over tasks", xlabel="%")
    panels[0, 0].set_yticks(range(len(names)), names, fontsize=6.5)
    panels[0, 1].set_yticks(range(len(names)), [""] * len(names))
    return figure


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
    names = [_name(row, rows, caption) for row in rows]
    panel = Heat("", names, [short[t] for t in tasks], np.array(cells), ACCURACY)
    key = caption.key([r["method"] for r in rows])
    yield from heat_sheets("clean-tasks", "Accuracy of merges, task by task", [[panel]], caption, key)


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
