"""Pictures of backdoors: accuracy against ASR, curves, heat maps, masks."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mergesec.evidence.estimates import Board
from mergesec.evidence.records import Record
from mergesec.figures.canvas import (
    EXCESS,
    GREY,
    SHARE,
    Caption,
    Curves,
    Picture,
    Row,
    Series,
    blank,
    curve_sheets,
    heat_sheets,
    legend_row,
    limits,
    look_of,
    numbered,
    part,
    point,
    put_legend,
    rows_of,
    sheet,
    side_by_side,
    wrapped,
)
from mergesec.figures.sweeps import LEAST, Methods, Sweep, axis_title, find_sweeps, methods_of
from mergesec.threats import Threat

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TALL = 2.5
"""Inches of a panel of the scatter."""


class Merge(NamedTuple):
    """Which merge an attack is shown on."""

    experts: int
    adversaries: int
    target_task: str
    """The task the target class belongs to; empty: the adversary's own."""


def backdoor_pictures(
    records: Sequence[Record], boards: Mapping[str, Board], width: float
) -> Iterator[Picture]:
    """Every picture of a backdoor that these cells allow."""
    if "backdoor" not in boards:
        return
    mine = [r for r in records if r.threat == Threat.BACKDOOR]
    caption = Caption.of(mine, width)
    rows: list[Row] = [r for r in rows_of(boards["backdoor"]) if r["attack"] != "none"]
    if "backdoor_pareto" in boards:
        yield from _scatter(rows_of(boards["backdoor_pareto"]), rows, caption)
    yield from _heat_maps(rows, caption)
    yield from _curves(rows, caption, methods_of(mine))
    yield from _masks(mine, caption)


def _merge(row: Row) -> Merge:
    return Merge(row["experts"], row.get("adversaries", 1), row.get("target_task", ""))


def _told(merge: Merge) -> str:
    return ", ".join(filter(None, (f"{merge.experts} experts", _apart(merge))))


def _apart(merge: Merge) -> str:
    """What sets a merge apart from the usual one, its size left out; empty if nothing does."""
    malicious = f"{merge.adversaries} malicious" if merge.adversaries > 1 else ""
    return ", ".join(filter(None, (malicious, f"target of {merge.target_task}" if merge.target_task else "")))


def _distinct(values: Sequence[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


# --------------------------------------------------------------------------- accuracy against ASR


Contest = tuple[str, Merge]
"""An attack and the merge it is shown on: one panel of the scatter."""


def _scatter(fronts: Sequence[Row], rows: Sequence[Row], caption: Caption) -> Iterator[Picture]:
    """``fronts`` are the rows of the Pareto board, ``rows`` those of the detailed one (for the controls)."""
    groups: dict[Contest, list[Row]] = {}
    for row in (r for r in fronts if r["front"]):  # others were not compared
        groups.setdefault((row["attack"], _merge(row)), []).append(row)
    groups = {k: g for k, g in groups.items() if len(g) >= LEAST}
    if not groups:
        return
    methods = _distinct([r["method"] for g in groups.values() for r in g])
    note = (
        "Bars: 95 % intervals. Numbers name the pairs; boxed ones are on the front: nothing has more accuracy and less "
        "ASR at once. A hollow grey mark is the same merge of clean experts under the same trigger (control)."
    )
    lines = [list(groups.items())[i : i + 2] for i in range(0, len(groups), 2)]
    pages = part(lines, lambda line: TALL)
    for page, chunk in enumerate(pages):
        shown = dict(pair for line in chunk for pair in line)
        numbers = _numbers([r for g in shown.values() for r in g], caption)
        handles = _method_handles(methods, caption) if len(methods) > 1 else {}
        columns, legend = legend_row(handles, caption.width) if handles else (1, 0.01)
        key_columns, key = legend_row(dict.fromkeys(numbers.values()), caption.width)
        labels = [r[kind] for g in shown.values() for r in g for kind in ("attack", "method", "defense")]
        figure = blank(
            (caption.width, TALL * len(chunk) + legend + key), "Accuracy against attack success, with Pareto fronts",
            caption, f"{note} {caption.key(labels)}",
        )  # fmt: skip
        heights = [TALL] * len(chunk) + [legend, key]
        grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
        panels: dict[Contest, Axes] = {}
        for place, contest in enumerate(shown):
            panels[contest] = figure.add_subplot(grid[place // 2, place % 2])
            plain = [r for r in rows if r["defense"] == "none" and (r["attack"], _merge(r)) == contest]
            _scatter_panel(panels[contest], shown[contest], plain, methods)
            panels[contest].set_title(
                "\n".join(wrapped(f"{caption.name(contest[0])}, {_told(contest[1])}", 44))
            )
        put_legend(figure.add_subplot(grid[-2, :]), handles, columns)
        _put_key(figure.add_subplot(grid[-1, :]), list(numbers.values()), key_columns)
        figure.draw_without_rendering()  # now it is known where the marks lie
        for contest, ax in panels.items():
            _number_marks(ax, shown[contest], [int(numbers[_pair(r)].split()[0]) for r in shown[contest]])
        yield Picture(numbered("backdoor-pareto", page, len(pages)), figure)


def _pair(row: Row) -> tuple[str, str]:
    return row["method"], row["defense"]


def _numbers(rows: Sequence[Row], caption: Caption) -> dict[tuple[str, str], str]:
    """Of each pair of method and defense its number and name, the same in all panels; the method is left out where
    there is only one."""
    pairs = _distinct([_pair(r) for r in rows])
    alone = len({method for method, _ in pairs}) == 1
    names = {}
    for number, (method, defense) in enumerate(pairs, 1):
        told = (
            caption.name(method) if defense == "none" else f"{caption.name(method)} + {caption.name(defense)}"
        )
        short = ("no defense" if defense == "none" else caption.name(defense)) if alone else told
        names[method, defense] = f"{number} {short}"
    return names


def _put_key(ax: Axes, names: Sequence[str], columns: int) -> None:
    """Names in columns, read downwards."""
    ax.set_axis_off()
    ax.set(xlim=(0, columns), ylim=(0, 1))
    rows = math.ceil(len(names) / columns)
    for place, name in enumerate(names):
        ax.text(place // rows, 1 - (place % rows + 0.5) / rows, name, fontsize=6.8, va="center")


def _best(rows: Sequence[Row]) -> list[Row]:
    """The front, by falling accuracy."""
    return sorted((r for r in rows if r["front"] == "yes"), key=lambda r: (-r["BA"], r["succession"]))


def _method_handles(methods: Sequence[str], caption: Caption) -> dict[str, Any]:
    from matplotlib.lines import Line2D

    looks = [look_of(i) for i in range(len(methods))]
    return {
        caption.name(n): Line2D([], [], color=c, marker=m, linestyle="")
        for n, (c, m, _) in zip(methods, looks, strict=True)
    }


def _scatter_panel(ax: Axes, rows: Sequence[Row], plain: Sequence[Row], methods: Sequence[str]) -> None:
    for row in rows:
        colour, marker, _ = look_of(methods.index(row["method"]))
        x, y = np.array(point(row, "BA")) * 100, np.array(point(row, "succession")) * 100
        ax.errorbar(
            x[0], y[0], xerr=np.abs(x[1:] - x[0])[:, None], yerr=np.abs(y[1:] - y[0])[:, None], color=colour,
            marker=marker, elinewidth=0.5, markersize=3.2,
        )  # fmt: skip
    controls = [(100 * r["CA"], 100 * r["succession_clean_merge"], r["method"]) for r in plain]
    for x, y, method in controls:
        marker = look_of(methods.index(method))[1] if method in methods else "o"
        ax.plot(x, y, marker=marker, color=GREY, fillstyle="none", linestyle="")
    corners = [(100 * r["BA"], 100 * r["succession"]) for r in _best(rows)]
    ax.step(*zip(*corners, strict=True), where="post", color="#000000", linewidth=0.8, zorder=1)
    drawn = [100 * np.array(point(r, "succession")) for r in rows] + [np.array([y]) for _, y, _ in controls]
    ax.set(xlabel="accuracy after merging, %", ylabel="ASR after merging, %", ylim=limits(drawn))
    ax.margins(x=0.08)


def _number_marks(ax: Axes, rows: Sequence[Row], numbers: Sequence[int]) -> None:
    """A number beside each mark, where it covers neither marks nor other numbers; a line leads to it if it is far."""
    size = 100 / 72 * 7.0  # pixels of a number's box: figures are laid out at 100 to the inch
    points = np.array([(100 * r["BA"], 100 * r["succession"]) for r in rows])
    spots = ax.transData.transform(points)
    box = ax.get_window_extent()
    taken = [*spots]
    for row, number, spot in zip(rows, numbers, spots, strict=True):
        moved = _free_place(spot, taken, size, box)
        taken.append(spot + moved)
        front = row["front"] == "yes"
        far = float(np.hypot(*moved)) > 1.6 * size
        note = ax.annotate(
            str(number), (100 * row["BA"], 100 * row["succession"]), tuple(moved * 72 / ax.figure.dpi),
            textcoords="offset points", fontsize=6, ha="center", va="center", color="#000000" if front else "#444444",
            bbox={"boxstyle": "round,pad=0.12", "facecolor": "white", "linewidth": 0.5,
                  "edgecolor": "#000000" if front else "none", "alpha": 1.0 if front else 0.6},
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": GREY} if far else None, zorder=3,
        )  # fmt: skip
        note.set_in_layout(False)


def _free_place(spot: Any, taken: Sequence[Any], size: float, box: Any) -> Any:
    """The nearest of places around a mark that lies in the panel and covers nothing; of crowded ones the emptiest."""
    best, room = np.array([size, size]), -1.0
    for radius in (1.1, 1.5, 2.0, 2.6, 3.3, 4.1, 5.0):
        for turn in range(12):
            angle = math.pi / 4 + turn * math.pi / 6
            moved = radius * size * np.array([math.cos(angle), math.sin(angle)])
            place = spot + moved
            if not (
                box.x0 + size / 2 < place[0] < box.x1 - size / 2 and box.y0 + size / 2 < place[1] < box.y1
            ):
                continue
            free = min(float(np.abs(place - other).max()) for other in taken)
            if free > size:
                return moved
            if free > room:
                best, room = moved, free
    return best


# --------------------------------------------------------------------------- attack × defense


def _heat_maps(rows: Sequence[Row], caption: Caption) -> Iterator[Picture]:
    """ASR and its excess over the control, attack × defense × setting: one table per value of the shortest axis."""
    attacks, defenses = _distinct([r["attack"] for r in rows]), _distinct([r["defense"] for r in rows])
    settings = _distinct([(r["method"], _merge(r)) for r in rows])
    if len(attacks) * len(defenses) * len(settings) < 2:
        return
    found = {(r["attack"], r["defense"], (r["method"], _merge(r))): r for r in rows}
    axes: list[list[Any]] = [attacks, defenses, settings]
    # tables per setting unless another axis is shorter; of the other two the more numerous goes down
    parted = min((2, 1, 0), key=lambda axis: len(axes[axis]))
    down, across = sorted({0, 1, 2} - {parted}, key=lambda axis: -len(axes[axis]))
    lines = []
    for value in axes[parted]:
        cells = {(k[down], k[across]): row for k, row in found.items() if k[parted] == value}
        there = [v for v in axes[down] if any((v, w) in cells for w in axes[across])]
        beside = [w for w in axes[across] if any((v, w) in cells for v in there)]
        table = [[cells.get((v, w), {}) for w in beside] for v in there]
        title = f"defense {_shown(value, caption)}" if parted == 1 else _shown(value, caption)
        titles = ("attack", "defense", "")[down], ("attack", "defense", "")[across]
        shown = [_shown(v, caption) for v in there], [_shown(w, caption) for w in beside]
        lines.append(side_by_side(title, *shown, table, _MEASURES, titles))
    note = (
        "ASR on non-target samples of the adversary's task; excess: minus the same trigger on the merge of clean "
        f"experts. {caption.key([*attacks, *defenses, *(method for method, _ in settings)])}"
    )
    yield from heat_sheets("backdoor-heat", "Backdoors against defenses", lines, caption, note)


def _shown(value: Any, caption: Caption) -> str:
    """An attack or a defense by its short name, a setting as its method and what is merged."""
    return caption.name(value) if isinstance(value, str) else f"{caption.name(value[0])}, {_told(value[1])}"


_MEASURES = (
    ("ASR", "succession", SHARE, math.inf), ("excess over the control", "backdoor", EXCESS, math.inf),
)  # fmt: skip


# --------------------------------------------------------------------------- curves


def _curves(rows: Sequence[Row], caption: Caption, methods: Methods) -> Iterator[Picture]:
    """ASR along a method's coefficient, and against the number of clean experts."""
    labels = [r[kind] for kind in ("attack", "defense") for r in rows]
    note = f"Dotted: control, the same trigger on the merge of clean experts. {caption.key(labels)}"
    for sweep in find_sweeps(methods):
        mine = [r for r in rows if r["method"] in sweep.values]
        lines = _along(mine, sweep, caption)
        if lines:
            name = f"backdoor-coefficient-{sweep.title.partition('(')[0]}-{sweep.parameter}"
            yield from curve_sheets(name, f"ASR along the coefficient of {sweep.title}", lines, caption, note)
    lines = _lines(
        rows, lambda r: _merge(r).experts - _merge(r).adversaries,
        lambda r: (r["method"], _apart(_merge(r))),
        "clean experts in the merge", caption,
    )  # fmt: skip
    if lines:
        yield from curve_sheets(
            "backdoor-experts",
            "ASR against the number of clean experts",
            lines,
            caption,
            f"{note} {caption.key([r['method'] for r in rows])}",
        )


def _along(rows: Sequence[Row], sweep: Sweep, caption: Caption) -> list[list[Curves]]:
    """``_lines`` over the values of a method's parameter."""
    return _lines(
        rows, lambda r: sweep.values[r["method"]], lambda r: (sweep.title, _told(_merge(r))),
        axis_title(sweep.parameter), caption,
    )  # fmt: skip


def _lines(
    rows: Sequence[Row], x: Callable[[Row], float], fixed: Callable[[Row], tuple[str, str]], axis: str,
    caption: Caption,
) -> list[list[Curves]]:  # fmt: skip
    """A line of two panels (adversary's task, other tasks) per defense and whatever stays fixed."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["defense"], *fixed(row)), []).append(row)
    attacks = _distinct([r["attack"] for r in rows])
    lines = []
    for (defense, method, where), group in groups.items():
        if len({x(r) for r in group}) < LEAST:
            continue
        guard = "" if defense == "none" else f"defense {caption.name(defense)}"
        told = ", ".join(t for t in (caption.name(method), where, guard) if t)
        line = []
        for side, measure in (("adversary's task", "succession"), ("other tasks", "transfer")):
            series: list[Series] = []
            for i, attack in enumerate(attacks):
                mine = sorted((r for r in group if r["attack"] == attack), key=x)
                if not mine:
                    continue
                colour, marker, dash = look_of(i)
                xs = [x(r) for r in mine]
                name = caption.name(attack)
                for label, column, m, d in (
                    (name, measure, marker, dash), (f"{name}, control", f"{measure}_clean_merge", "", ":"),
                ):  # fmt: skip
                    points = np.array([point(r, column) for r in mine])
                    if not np.isnan(points[:, 0]).all():
                        series.append(Series(label, xs, points, colour, m, d))
            if series:
                line.append(Curves(f"{told}\n{side}", axis, "ASR, %", series))
        if line:
            lines.append(line)
    return lines


# --------------------------------------------------------------------------- masks


Shares = dict[str, dict[str, list[float]]]
"""Mask → layer → share of entries masked out, one per tensor of the layer."""


def mask_sparsity(record: Record) -> Shares:
    """What a masking defense reported: facts ``mask_sparsity`` and ``mask_sparsity_<mask>`` of the merge, each a
    mapping from tensors to shares."""
    told = {**record.facts, **record.facts.get("merge", {})}
    found: Shares = {}
    for name, shares in told.items():
        if name.startswith("mask_sparsity") and isinstance(shares, Mapping):
            layers = found.setdefault(name.removeprefix("mask_sparsity").strip("_") or "mask", {})
            for tensor, share in shares.items():
                layers.setdefault(layer_of(tensor), []).append(float(share))
    return found


def layer_of(tensor: str) -> str:
    """``encoder.blocks.3.attention.weight`` → ``blocks.3``; without a number the first part of the name."""
    match = re.search(r"([^.]+\.\d+)(\.|$)", tensor)
    return match[1] if match else tensor.partition(".")[0]


def _masks(records: Sequence[Record], caption: Caption) -> Iterator[Picture]:
    """Mean mask sparsity of each layer; the band spans its tensors and the cells."""
    told: dict[str, Shares] = {}
    for record in records:
        for mask, layers in mask_sparsity(record).items() if record.status == "done" else ():
            for layer, shares in layers.items():
                mine = told.setdefault(record.defense, {}).setdefault(mask, {})
                mine.setdefault(layer, []).extend(shares)
    pages = part(list(told), lambda d: 2.1)
    for page, chunk in enumerate(pages):
        layers_most = max(len(layers) for d in chunk for layers in told[d].values())
        size = (max(caption.width, 0.2 * layers_most + 1.0), 2.1 * len(chunk))
        note = f"Mean over a layer's tensors and over cells; bands from the smallest to the largest. {caption.key(chunk)}"
        figure, panels = sheet(size, (len(chunk), 1), "Mask sparsity per layer", caption, note)
        for defense, ax in zip(chunk, panels[:, 0], strict=True):
            _mask_panel(ax, told[defense])
            ax.set_title(caption.name(defense))
        yield Picture(numbered("backdoor-masks", page, len(pages)), figure)


def _mask_panel(ax: Axes, masks: Shares) -> None:
    names = _distinct([layer for layers in masks.values() for layer in layers])
    for i, (mask, layers) in enumerate(masks.items()):
        xs = [names.index(layer) for layer in layers]
        middle, low, high = (
            [100 * of(shares) for shares in layers.values()] for of in (lambda s: sum(s) / len(s), min, max)
        )
        colour, marker, dash = look_of(i)
        ax.plot(xs, middle, color=colour, marker=marker, linestyle=dash, label=mask)
        ax.fill_between(xs, low, high, color=colour, alpha=0.08, linewidth=0)
    ax.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_ylabel("masked out, %")
    if len(masks) > 1:
        ax.legend()
