"""One look for every picture, heat maps and curves, and files that are the same bytes every time.

Colours are Okabe and Ito's, colour maps are safe for colour-blind eyes, and what a colour tells a marker
or a number tells too. matplotlib is imported when something is drawn.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mergesec.errors import UsageError
from mergesec.evidence.estimates import Board
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
TALLEST = 15.0
"""Inches; what would be taller is parted into several pictures."""

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans", "font.size": 8, "axes.titlesize": 8.5, "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#e4e4e4", "grid.linewidth": 0.6, "axes.edgecolor": "#8a8a8a", "xtick.color": "#3a3a3a",
    "ytick.color": "#3a3a3a", "legend.frameon": False, "legend.fontsize": 7.5, "lines.linewidth": 1.4,
    "lines.markersize": 4.0, "text.parse_math": False, "svg.fonttype": "path", "svg.hashsalt": "mergesec",
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

    @classmethod
    def of(cls, records: Sequence[Record]) -> Caption:
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
        return cls(records[0].grid, " · ".join(facts), f"Partial data: {told}." if told else "")


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
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    width, height = size
    letters = int(width * 15)
    title = "\n".join([what, *textwrap.wrap(f"{caption.grid} · {caption.facts}", int(width * 11.5))])
    foot = "\n".join(textwrap.wrap(f"{note} {caption.partial}".strip(), letters))
    extra = 0.5 + 0.16 * (title.count("\n") + foot.count("\n"))
    figure = Figure(figsize=(width, height + extra), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06))
    panels = figure.subplots(*shape, squeeze=False, gridspec_kw=ratios or None)
    figure.suptitle(title, x=0.01, ha="left", fontsize=9.5)
    if foot:
        figure.supxlabel(foot, x=0.01, ha="left", fontsize=7, color=GREY)
    return figure, panels


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

_CELL = (0.66, 0.34)
_LETTER = 0.068


def heat(ax: Axes, panel: Heat) -> None:
    """Numbers in percent with their interval, on colours; a dash where there is none."""
    import matplotlib

    values = panel.points[..., 0]
    rows, columns = values.shape
    colours = matplotlib.colormaps[panel.scale.colours]
    ax.set_facecolor("#efefef")
    ax.pcolormesh(
        np.arange(columns + 1), np.arange(rows + 1), np.ma.masked_invalid(values), cmap=colours,
        vmin=panel.scale.low, vmax=panel.scale.high, edgecolors="white", linewidth=1.0,
    )  # fmt: skip
    ax.set(xlim=(0, columns), ylim=(rows, 0), title="\n".join(_title(panel)))
    ax.set_xticks(np.arange(columns) + 0.5, panel.columns, rotation=35, ha="right", rotation_mode="anchor")
    ax.set_yticks(np.arange(rows) + 0.5, panel.rows)
    ax.set_ylabel(panel.sides[0], color=GREY)
    ax.set_xlabel(panel.sides[1], color=GREY)
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    span = panel.scale.high - panel.scale.low
    for i, j in np.ndindex(rows, columns):
        value, low, high = panel.points[i, j]
        red, green, blue, _ = colours(float(np.clip((value - panel.scale.low) / span, 0, 1)))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 and not np.isnan(value)
        ink = "white" if dark else "#1a1a1a"
        known = not np.isnan([value, low, high]).any()
        ax.text(
            j + 0.5, i + (0.38 if known else 0.5), "–" if np.isnan(value) else f"{100 * value:.1f}",
            ha="center", va="center", fontsize=7, color=ink,
        )  # fmt: skip
        if known:
            text = f"{100 * low:.1f} … {100 * high:.1f}"
            ax.text(j + 0.5, i + 0.74, text, ha="center", va="center", fontsize=4.6, color=ink)


def _cells_wide(panel: Heat) -> float:
    return max(_CELL[0] * len(panel.columns), 1.9)


def _title(panel: Heat) -> list[str]:
    """The title in lines that are no wider than the cells: layouts leave no room beside them."""
    return wrapped(panel.title, int(_cells_wide(panel) / 0.07))


def _height(panel: Heat) -> float:
    below = _LETTER * 0.62 * max((len(c) for c in panel.columns), default=0)
    return _CELL[1] * len(panel.rows) + below + 0.3 + 0.15 * len(_title(panel))


def _width(panel: Heat) -> float:
    return _cells_wide(panel) + _LETTER * max(map(len, panel.rows), default=0) + 0.4


def side_by_side(
    title: str, rows: Sequence[str], columns: Sequence[str], table: Sequence[Sequence[Row]],
    measures: Sequence[tuple[str, str, Scale]], sides: tuple[str, str],
) -> list[Heat]:  # fmt: skip
    """One panel for each (what, measure, scale) of the same boards' rows; an empty row is a cell that is not there."""
    return [
        Heat(
            f"{title}\n{what}", rows, columns, np.array([[point(cell, measure) for cell in line] for line in table]),
            scale, sides,
        )
        for what, measure, scale in measures
    ]  # fmt: skip


def heat_sheets(
    name: str, what: str, lines: Sequence[Sequence[Heat]], caption: Caption, note: str
) -> Iterator[Picture]:
    """Lines of panels, each line side by side if there is room and below each other if not; parted if too tall."""
    if not lines:
        return
    width = sum(_width(p) for p in max(lines, key=lambda line: sum(map(_width, line))))
    if width > TALLEST:
        lines = [[panel] for line in lines for panel in line]
        width = max(_width(line[0]) for line in lines)
    width = max(width, 6.0)
    pages = part(lines, lambda line: max(map(_height, line)))
    for page, chunk in enumerate(pages):
        heights = [max(map(_height, line)) for line in chunk]
        most = max(map(len, chunk))
        figure, panels = sheet(
            (width, sum(heights)), (len(chunk), most), what, caption,
            f"Percent; small numbers: 95 % interval. {note}", height_ratios=heights,
        )  # fmt: skip
        for line, axes in zip(chunk, panels, strict=True):
            for panel, ax in zip(line, axes, strict=False):
                heat(ax, panel)
            for ax in axes[len(line) :]:
                ax.set_axis_off()
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


def one_legend(figure: Figure, panels: NDArray[Any]) -> None:
    """One legend beside the panels, for what is in any of them."""
    shown: dict[str, Any] = {}
    for ax in panels.flat:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    figure.legend(list(shown.values()), list(shown), loc="outside right upper")


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
    """Lines of panels of curves with one legend; parted if too tall."""
    pages = part(lines, lambda line: 2.7)
    for page, chunk in enumerate(pages):
        most = max(map(len, chunk))
        figure, panels = sheet(
            (3.6 * most + 2.2, 2.7 * len(chunk)), (len(chunk), most), what, caption,
            f"Bands: 95 % intervals. {note}",
        )  # fmt: skip
        for line, axes in zip(chunk, panels, strict=True):
            for panel, ax in zip(line, axes, strict=False):
                for series in panel.series:
                    curve(ax, series)
                ax.set(
                    title="\n".join(wrapped(panel.title, 48)), xlabel=panel.x, ylabel=panel.y, ylim=(-2, 102)
                )
            for ax in axes[len(line) :]:
                ax.set_axis_off()
        one_legend(figure, panels)
        yield Picture(numbered(name, page, len(pages)), figure)


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


def write_picture(folder: Path, picture: Picture) -> list[Path]:
    """``<name>.svg`` and ``<name>.png`` without date or program names; the paths."""
    paths = []
    picture.figure.draw_without_rendering()
    picture.figure.set_layout_engine("none")  # else the second file would be laid out once more
    for ending, said in (("svg", {"Date": None, "Creator": None}), ("png", {"Software": None})):
        with io.BytesIO() as buffer:
            picture.figure.savefig(buffer, format=ending, dpi=150, metadata=said)
            paths.append(folder / f"{picture.name}.{ending}")
            write_atomic(paths[-1], buffer.getvalue())
    return paths
