"""One look for every picture, heat maps and curves, and files that are the same bytes every time.

Colours are Okabe and Ito's, colour maps are safe for colour-blind eyes, and what a colour tells a marker
or a number tells too. matplotlib is imported when something is drawn.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mergesec.errors import UsageError
from mergesec.evidence.estimates import Board
from mergesec.evidence.labels import label_key, shortened
from mergesec.evidence.records import Record
from mergesec.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

T = TypeVar("T")
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
DASHES = ("-", "--", "-.", ":")
GREY = "#6b6b6b"
WIDTH = 6.8
"""Inches: the text of a page. Letters have their printed size, so that nothing need be scaled."""
TALLEST = 8.6
"""Inches of panels; what would be taller than a page is parted into several pictures."""
DPI = 200
ENDINGS = ("svg", "png")
SAID: dict[str, dict[str, None]] = {
    "svg": {"Date": None, "Creator": None}, "png": {"Software": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}  # fmt: skip
"""By kind of file: what would differ from run to run or tell of programs, and is left out."""

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans", "font.size": 7.5, "axes.titlesize": 8, "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#e4e4e4", "grid.linewidth": 0.6, "axes.edgecolor": "#8a8a8a", "xtick.color": "#3a3a3a",
    "ytick.color": "#3a3a3a", "legend.frameon": False, "legend.fontsize": 7, "lines.linewidth": 1.4,
    "lines.markersize": 4.0, "text.parse_math": False, "svg.fonttype": "path", "svg.hashsalt": "mergesec",
    "pdf.fonttype": 42, "xtick.labelsize": 7, "ytick.labelsize": 7, "axes.labelsize": 7.5,
}  # fmt: skip

Points = NDArray[np.float64]
"""``[..., 3]``: value, low and high end of its interval; NaN where nothing was measured."""


@dataclass(frozen=True)
class Picture:
    """A drawn picture and the stem of its files."""

    name: str
    figure: Figure


@dataclass(frozen=True)
class Scale:
    """How a heat map colours its numbers."""

    colours: str
    low: float
    high: float


ACCURACY = Scale("YlGnBu", 0.0, 1.0)
SHARE = Scale("YlOrBr", 0.0, 1.0)
EXCESS = Scale("PuOr_r", -1.0, 1.0)


@dataclass(frozen=True)
class Heat:
    """One panel of numbers: ``points`` is ``[rows, columns, 3]``."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    points: Points
    scale: Scale
    sides: tuple[str, str] = ("", "")
    """What rows and columns are."""
    widest: float = math.inf
    """An interval that is wider says nothing, and its cell is grey."""


@dataclass(frozen=True)
class Series:
    """One curve: ``points`` is ``[x, 3]``."""

    label: str
    x: Sequence[float]
    points: Points
    colour: str
    marker: str
    dash: str


@dataclass(frozen=True)
class Caption:
    """What a reader must know of the records behind a picture."""

    grid: str
    facts: str
    partial: str
    width: float = WIDTH
    """Inches of the pictures."""
    short: Mapping[str, str] = field(default_factory=dict)
    """Label → the name it has in pictures."""

    def name(self, label: str) -> str:
        """A label as pictures show it."""
        return self.short.get(label, label)

    def key(self, labels: Iterable[str]) -> str:
        """What the short names of these labels stand for."""
        told = label_key({label: self.name(label) for label in labels})
        return f"{'; '.join(told)}." if told else ""

    @classmethod
    def of(cls, records: Sequence[Record], width: float = WIDTH) -> Caption:
        done = [r for r in records if r.status == "done"]
        seeds = ", ".join(map(str, sorted({r.seed for r in done}))) or "none"
        suites = ", ".join(dict.fromkeys(f"{r.suite} on {r.backbone}" for r in records))
        protocols = ", ".join(sorted({r.protocol for r in records}))
        facts = [suites, f"seeds {seeds}", protocols]
        partial: dict[str, str] = {}
        for record in records:
            partial |= record.provenance.get("partial", {})
        if partial:
            facts.append("partial data")
        if len(done) < len(records):
            facts.append(f"{len(records) - len(done)} of {len(records)} cells missing")
        told = "; ".join(f"{task} ({how})" for task, how in sorted(partial.items()))
        labels = [label for r in records for label in (r.merging, r.attack, r.defense)]
        partly = f"Partial data: {told}." if told else ""
        return cls(records[0].grid, " · ".join(facts), partly, width, shortened(labels))


# --------------------------------------------------------------------------- setting


def require_matplotlib() -> None:
    """UsageError telling what to install, if matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UsageError(
            "figures", "drawing needs matplotlib; install it with: pip install 'mergesec[plots]'"
        ) from None


@contextmanager
def style() -> Iterator[None]:
    """The look of all pictures, whatever the user's own settings are."""
    require_matplotlib()
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        settings: Any = matplotlib.rcParams
        settings.update(_STYLE)
        yield


def sheet(
    size: tuple[float, float],
    shape: tuple[int, int],
    what: str,
    caption: Caption,
    note: str = "",
    **ratios: Any,
) -> tuple[Figure, NDArray[Any]]:
    """A figure of ``shape`` panels with title and footnote; the panels as an array of that shape."""
    figure = blank(size, what, caption, note)
    return figure, figure.subplots(*shape, squeeze=False, gridspec_kw=ratios or None)


def blank(size: tuple[float, float], what: str, caption: Caption, note: str = "") -> Figure:
    """A figure with title and footnote, and room of that size between them."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    width, height = size
    title = "\n".join(
        [
            *textwrap.wrap(what, int(width * 12)),
            *textwrap.wrap(f"{caption.grid} · {caption.facts}", int(width * 12)),
        ]
    )
    foot = "\n".join(textwrap.wrap(f"{note} {caption.partial}".strip(), int(width * 18.5)))
    extra = 0.35 + 0.15 * title.count("\n") + 0.115 * (foot.count("\n") + 1)
    figure = Figure(figsize=(width, height + extra), layout=ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.05))
    figure.suptitle(title, x=0.01, ha="left", fontsize=9)
    if foot:
        figure.supxlabel(foot, x=0.01, ha="left", fontsize=6.5, color=GREY)
    return figure


def look_of(place: int) -> tuple[str, str, str]:
    """Colour, marker and dash of the place-th category: no two of 28 are alike."""
    turn = place // len(PALETTE)
    return PALETTE[place % len(PALETTE)], MARKERS[place % len(MARKERS)], DASHES[turn % len(DASHES)]


def wrapped(text: str, letters: int) -> list[str]:
    """Lines of about so many letters; a label that is longer stays whole."""
    return [
        line for part in text.split("\n") for line in textwrap.wrap(part, letters, break_long_words=False)
    ]


def short_names(tasks: Sequence[str]) -> dict[str, str]:
    """Task names without the folder they share: ``mini/gtsrb`` → ``gtsrb``."""
    folders = {t.rpartition("/")[0] for t in tasks}
    return {t: t.rpartition("/")[2] if len(folders) == 1 else t for t in tasks}


Row = Mapping[str, Any]


def rows_of(board: Board) -> list[Row]:
    """A board's rows, column → value."""
    return [{str(column): value for column, value in row.items()} for row in board.frame.to_dict("records")]


def point(row: Row, measure: str) -> tuple[float, float, float]:
    """A board's number with its interval; NaN if the board lacks it."""
    value = row.get(measure, np.nan)
    return float(value), float(row.get(f"{measure}_low", np.nan)), float(row.get(f"{measure}_high", np.nan))


NOTHING = (float("nan"),) * 3


# --------------------------------------------------------------------------- heat maps

_ROW, _LEAST, _MOST = 0.28, 0.36, 0.75
"""Inches: a cell's height, the least width in which its numbers can be read, the most that it needs."""
_LETTER = 0.058
_BETWEEN = 0.12


def heat(ax: Axes, panel: Heat, labelled: bool = True) -> None:
    """Numbers in percent with their interval, on colours; a dash where there is none, grey where the interval is
    too wide to say anything."""
    import matplotlib

    values = panel.points[..., 0].copy()
    rows, columns = values.shape
    wide = panel.points[..., 2] - panel.points[..., 1] > panel.widest
    colours = matplotlib.colormaps[panel.scale.colours]
    ax.set_facecolor("#efefef")
    ax.pcolormesh(
        np.arange(columns + 1), np.arange(rows + 1), np.ma.masked_invalid(np.where(wide, np.nan, values)),
        cmap=colours, vmin=panel.scale.low, vmax=panel.scale.high, edgecolors="white", linewidth=1.0,
    )  # fmt: skip
    ax.set(xlim=(0, columns), ylim=(rows, 0), title="\n".join(_title(panel)))
    ax.set_xticks(np.arange(columns) + 0.5, panel.columns, rotation=40, ha="right", rotation_mode="anchor")
    ax.set_yticks(np.arange(rows) + 0.5, panel.rows)
    ax.set_ylabel(panel.sides[0] if labelled else "", color=GREY)
    ax.set_xlabel(panel.sides[1], color=GREY)
    ax.tick_params(length=0, labelleft=labelled)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    span = panel.scale.high - panel.scale.low
    for i, j in np.ndindex(rows, columns):
        value, low, high = panel.points[i, j]
        red, green, blue, _ = colours(float(np.clip((value - panel.scale.low) / span, 0, 1)))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 and not np.isnan(value) and not wide[i, j]
        ink = "#8a8a8a" if wide[i, j] else "white" if dark else "#1a1a1a"
        known = not np.isnan([value, low, high]).any()
        ax.text(
            j + 0.5, i + (0.36 if known else 0.5), "–" if np.isnan(value) else f"{100 * value:z.1f}",
            ha="center", va="center", fontsize=6.5, color=ink,
        )  # fmt: skip
        if known:
            text = f"{100 * low:z.0f}…{100 * high:z.0f}"
            ax.text(j + 0.5, i + 0.76, text, ha="center", va="center", fontsize=5.2, color=ink)


def _title(panel: Heat) -> list[str]:
    """The title in lines that are no wider than the widest cells: layouts leave no room beside them."""
    return wrapped(panel.title, max(18, int(_MOST * len(panel.columns) / 0.075)))


def _labels_wide(panel: Heat) -> float:
    return _LETTER * max(map(len, panel.rows), default=0) + (0.3 if panel.sides[0] else 0.12)


def _height(panel: Heat) -> float:
    below = _LETTER * 0.66 * max((len(c) for c in panel.columns), default=0) + (
        0.2 if panel.sides[1] else 0.0
    )
    return _ROW * len(panel.rows) + below + 0.2 + 0.13 * len(_title(panel))


def _line_wide(line: Sequence[Heat], cell: float) -> float:
    """Inches of panels side by side; those with the same rows share their names."""
    named = [p for i, p in enumerate(line) if i == 0 or list(p.rows) != list(line[0].rows)]
    return sum(len(p.columns) for p in line) * cell + sum(map(_labels_wide, named)) + _BETWEEN * len(line)


def side_by_side(
    title: str, rows: Sequence[str], columns: Sequence[str], table: Sequence[Sequence[Row]],
    measures: Sequence[tuple[str, str, Scale, float]], sides: tuple[str, str],
) -> list[Heat]:  # fmt: skip
    """One panel for each (what, measure, scale, widest interval that says something) of the same boards' rows; an
    empty row is a cell that is not there."""
    return [
        Heat(
            f"{title}\n{what}", rows, columns, np.array([[point(cell, measure) for cell in line] for line in table]),
            scale, sides, widest,
        )
        for what, measure, scale, widest in measures
    ]  # fmt: skip


def _fit(line: Sequence[Heat], width: float) -> Iterator[list[Heat]]:
    """Lines of panels that are no wider than ``width``: side by side, else below each other, else in parts."""
    if _line_wide(line, _LEAST) <= width:
        yield list(line)
        return
    for panel in line:
        most = max(1, int((width - _labels_wide(panel) - _BETWEEN) / _LEAST))
        count = math.ceil(len(panel.columns) / most)
        size = math.ceil(len(panel.columns) / count) if count else 1
        for start in range(0, len(panel.columns), size):
            some = slice(start, start + size)
            yield [replace(panel, columns=panel.columns[some], points=panel.points[:, some])]


def _pages_of_rows(line: Sequence[Heat]) -> Iterator[list[Heat]]:
    """A line in parts of rows that fit on a page."""
    tall = max(_height(p) - _ROW * len(p.rows) for p in line)
    most = max(1, int((TALLEST - tall) / _ROW))
    rows = max(len(p.rows) for p in line)
    size = math.ceil(rows / math.ceil(rows / most))
    for start in range(0, rows, size):
        some = slice(start, start + size)
        yield [replace(p, rows=p.rows[some], points=p.points[some]) for p in line]


def heat_sheets(
    name: str, what: str, lines: Sequence[Sequence[Heat]], caption: Caption, note: str
) -> Iterator[Picture]:
    """Lines of panels, each line side by side if there is room and below each other if not; parted if too tall."""
    fitted = [
        part
        for line in lines
        if line
        for whole in _fit(line, caption.width)
        for part in _pages_of_rows(whole)
    ]
    if not fitted:
        return
    pages = part(fitted, lambda line: max(map(_height, line)))
    note = f"Percent; small numbers: 95 % interval. {note}"
    for page, chunk in enumerate(pages):
        heights = [max(map(_height, line)) for line in chunk]
        width = min(caption.width, max(4.6, *(_line_wide(line, _MOST) for line in chunk)))
        figure = blank((width, sum(heights)), what, caption, note)
        outer = figure.add_gridspec(len(chunk), 1, height_ratios=heights)
        for place, line in enumerate(chunk):
            inner = outer[place].subgridspec(1, len(line), width_ratios=[len(p.columns) for p in line])
            for i, panel in enumerate(line):
                own_names = i == 0 or list(panel.rows) != list(line[0].rows)
                heat(figure.add_subplot(inner[i]), panel, own_names)
        yield Picture(numbered(name, page, len(pages)), figure)


def part(lines: Sequence[T], height: Any) -> list[list[T]]:
    """Lines in order, in pages of at most ``TALLEST`` inches."""
    pages: list[list[T]] = []
    used = 0.0
    for line in lines:
        if not pages or used + height(line) > TALLEST:
            pages.append([])
            used = 0.0
        pages[-1].append(line)
        used += height(line)
    return pages


def numbered(name: str, page: int, pages: int) -> str:
    """The file name of one of ``pages`` sheets, counted from 1 in the name."""
    return name if pages == 1 else f"{name}-{page + 1}"


# --------------------------------------------------------------------------- curves


def curve(ax: Axes, series: Series) -> None:
    """A line in percent with markers, its intervals as a band."""
    percent = 100 * series.points
    ax.plot(
        series.x, percent[:, 0], color=series.colour, marker=series.marker, linestyle=series.dash,
        label=series.label,
    )  # fmt: skip
    ax.fill_between(series.x, percent[:, 1], percent[:, 2], color=series.colour, alpha=0.15, linewidth=0)


def legend_row(handles: Mapping[str, Any], width: float) -> tuple[int, float]:
    """Columns of a legend of these labels below the panels, and the inches that it needs."""
    widest = 0.5 + 0.055 * max(map(len, handles), default=0)
    columns = max(1, int(width / widest))
    return columns, 0.1 + 0.16 * math.ceil(len(handles) / columns)


def put_legend(ax: Axes, handles: Mapping[str, Any], columns: int) -> None:
    """A legend that is all there is on its panel."""
    ax.set_axis_off()
    ax.legend(
        list(handles.values()), list(handles), loc="center left", ncols=columns, borderpad=0, borderaxespad=0
    )


def handles_of(panels: Iterable[Axes]) -> dict[str, Any]:
    """What a legend for all these panels tells, each label once."""
    shown: dict[str, Any] = {}
    for ax in panels:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    return shown


def limits(
    numbers: Iterable[Any], least: float = 10.0, ends: tuple[float, float] = (-2.0, 102.0)
) -> tuple[float, float]:
    """Where an axis in percent begins and ends: what is drawn with some room, at least ``least`` points, within
    ``ends`` unless something lies beyond."""
    flat = np.concatenate([np.ravel(n).astype(float) for n in numbers] or [np.zeros(1)])
    flat = flat[np.isfinite(flat)]
    low, high = (float(flat.min()), float(flat.max())) if len(flat) else (0.0, 100.0)
    spare = max(0.06 * (high - low), (least - (high - low)) / 2, 0.5)
    return max(low - spare, min(ends[0], low - 0.5)), min(high + spare, max(ends[1], high + 0.5))


@dataclass(frozen=True)
class Curves:
    """One panel of curves."""

    title: str
    x: str
    y: str
    series: Sequence[Series]


def curve_sheets(
    name: str, what: str, lines: Sequence[Sequence[Curves]], caption: Caption, note: str
) -> Iterator[Picture]:
    """Lines of panels of curves with one legend below; parted if too tall. The axes of a line are those of its data."""
    tall = 2.1
    pages = part(lines, lambda line: tall)
    for page, chunk in enumerate(pages):
        most = max(map(len, chunk))
        labels: dict[str, Any] = {s.label: None for line in chunk for panel in line for s in panel.series}
        columns, legend = legend_row(labels, caption.width)
        figure = blank(
            (caption.width, tall * len(chunk) + legend), what, caption, f"Bands: 95 % intervals. {note}"
        )
        grid = figure.add_gridspec(len(chunk) + 1, most, height_ratios=[tall] * len(chunk) + [legend])
        panels = []
        for i, line in enumerate(chunk):
            for j, panel in enumerate(line):
                panels.append(figure.add_subplot(grid[i, j]))
                _curve_panel(panels[-1], panel, int(caption.width / most * 14.5))
        put_legend(figure.add_subplot(grid[-1, :]), handles_of(panels), columns)
        yield Picture(numbered(name, page, len(pages)), figure)


def _curve_panel(ax: Axes, panel: Curves, letters: int) -> None:
    for series in panel.series:
        curve(ax, series)
    ends = limits(100 * series.points for series in panel.series)
    title, below = ("\n".join(wrapped(text, letters)) for text in (panel.title, panel.x))
    ax.set(title=title, xlabel=below, ylabel=panel.y, ylim=ends)
    if all(float(x).is_integer() for series in panel.series for x in series.x):
        ax.locator_params(axis="x", integer=True)  # half an expert is none


# --------------------------------------------------------------------------- files


def gap(width: int) -> int:
    """Pixels between two images of this width."""
    return max(1, width // 16)


def strip(ax: Axes, images: NDArray[Any]) -> None:
    """Images ``[n, 3, H, W]`` in [0, 1] side by side with white gaps."""
    count, _, height, width = images.shape
    step = width + gap(width)
    pixels = np.ones((height, count * step - gap(width), 3))
    for i, image in enumerate(images):
        pixels[:, i * step : i * step + width] = image.transpose(1, 2, 0)
    ax.imshow(pixels, interpolation="nearest", vmin=0.0, vmax=1.0)
    bare(ax)


def bare(ax: Axes) -> None:
    """No ticks, no grid, no frame."""
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(False)
    ax.spines[:].set_visible(False)


def file_stem(text: str) -> str:
    """``text`` as part of a file name."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", text).strip("_")


def write_picture(
    folder: Path, picture: Picture, dpi: float = DPI, endings: Sequence[str] = ENDINGS
) -> list[Path]:
    """``<name>.svg``, ``.png`` or ``.pdf`` without date or program names; the paths."""
    paths = []
    picture.figure.draw_without_rendering()
    picture.figure.set_layout_engine("none")  # else the second file would be laid out once more
    for ending in endings:
        with io.BytesIO() as buffer:
            picture.figure.savefig(buffer, format=ending, dpi=dpi, metadata=SAID[ending])
            paths.append(folder / f"{picture.name}.{ending}")
            write_atomic(paths[-1], buffer.getvalue())
    return paths
