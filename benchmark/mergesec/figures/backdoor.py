"""Pictures of backdoors: accuracy against ASR, curves, heat maps, masks."""

from __future__ import annotations

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
    curve_sheets,
    heat_sheets,
    look_of,
    numbered,
    part,
    point,
    rows_of,
    sheet,
    side_by_side,
    wrapped,
)
from mergesec.figures.sweeps import LEAST, Methods, Sweep, axis_title, find_sweeps, methods_of
from mergesec.threats import Threat

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KEY_LETTERS = 62
"""What fits under a panel of the scatter."""


class Merge(NamedTuple):
    """Which merge an attack is shown on."""

    experts: int
    adversaries: int
    target_task: str
    """The task the target class belongs to; empty: the adversary's own."""


def backdoor_pictures(records: Sequence[Record], boards: Mapping[str, Board]) -> Iterator[Picture]:
    """Every picture of a backdoor that these cells allow."""
    if "backdoor" not in boards:
        return
    mine = [r for r in records if r.threat == Threat.BACKDOOR]
    caption = Caption.of(mine)
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


def _scatter(fronts: Sequence[Row], rows: Sequence[Row], caption: Caption) -> Iterator[Picture]:
    """``fronts`` are the rows of the Pareto board, ``rows`` those of the detailed one (for the controls)."""
    groups: dict[tuple[str, Merge], list[Row]] = {}
    for row in (r for r in fronts if r["front"]):  # others were not compared
        groups.setdefault((row["attack"], _merge(row)), []).append(row)
    groups = {k: g for k, g in groups.items() if len(g) >= LEAST}
    if not groups:
        return
    measured = {r["method"] for g in groups.values() for r in g}
    methods = [m for m in _distinct([r["method"] for r in rows]) if m in measured]
    lines = [list(groups.items())[i : i + 2] for i in range(0, len(groups), 2)]
    heights = {id(line): 3.0 + 0.15 * max(len(_front_key(_best(g))) for _, g in line) for line in lines}
    pages = part(lines, lambda line: heights[id(line)])
    for page, chunk in enumerate(pages):
        most = max(map(len, chunk))
        figure, panels = sheet(
            (4.6 * most + 1.8, sum(heights[id(line)] for line in chunk)), (len(chunk), most),
            "Accuracy against attack success, with Pareto fronts", caption,
            "Bars: 95 % intervals. Numbers mark the front: nothing has more accuracy and less ASR at once. A hollow "
            "grey mark is the same merge of clean experts under the same trigger (control).",
            height_ratios=[heights[id(line)] for line in chunk],
        )  # fmt: skip
        for line, axes in zip(chunk, panels, strict=True):
            for (key, group), ax in zip(line, axes, strict=False):
                plain = [r for r in rows if r["defense"] == "none" and (r["attack"], _merge(r)) == key]
                _scatter_panel(ax, group, plain, methods)
                ax.set_title(f"{key[0]}, {_told(key[1])}")
            for ax in axes[len(line) :]:
                ax.set_axis_off()
        handles = _method_handles(methods)
        figure.legend(handles=handles, loc="outside right upper", title="merge method")
        yield Picture(numbered("backdoor-pareto", page, len(pages)), figure)


def _best(rows: Sequence[Row]) -> list[Row]:
    """The front, by falling accuracy."""
    return sorted((r for r in rows if r["front"] == "yes"), key=lambda r: (-r["BA"], r["succession"]))


def _front_key(best: Sequence[Row]) -> list[str]:
    """Lines under a panel that say what the numbers on its front are."""
    named = (f"{n} {r['method']} + {r['defense']}" for n, r in enumerate(best, 1))
    return [line for text in named for line in wrapped(text, KEY_LETTERS)]


def _method_handles(methods: Sequence[str]) -> list[Any]:
    from matplotlib.lines import Line2D

    looks = [look_of(i) for i in range(len(methods))]
    return [
        Line2D([], [], color=c, marker=m, linestyle="", label=n)
        for n, (c, m, _) in zip(methods, looks, strict=True)
    ]


def _scatter_panel(ax: Axes, rows: Sequence[Row], plain: Sequence[Row], methods: Sequence[str]) -> None:
    best = _best(rows)
    for row in rows:
        colour, marker, _ = look_of(methods.index(row["method"]))
        x, y = np.array(point(row, "BA")) * 100, np.array(point(row, "succession")) * 100
        ax.errorbar(
            x[0], y[0], xerr=np.abs(x[1:] - x[0])[:, None], yerr=np.abs(y[1:] - y[0])[:, None], color=colour,
            marker=marker, elinewidth=0.6, alpha=0.85,
        )  # fmt: skip
    for row in plain:
        marker = look_of(methods.index(row["method"]))[1] if row["method"] in methods else "o"
        x, y = 100 * row["CA"], 100 * row["succession_clean_merge"]
        ax.plot(x, y, marker=marker, color=GREY, fillstyle="none", linestyle="")
    corners = [(100 * r["BA"], 100 * r["succession"]) for r in best]
    ax.step(*zip(*corners, strict=True), where="post", color="#000000", linewidth=0.9, zorder=1)
    for number, corner in enumerate(corners, 1):
        ax.annotate(
            str(number), corner, (4, 4), textcoords="offset points", fontsize=6.5,
            bbox={"boxstyle": "circle,pad=0.12", "facecolor": "white", "edgecolor": "#000000", "linewidth": 0.6},
        )  # fmt: skip
    key = _front_key(best)
    ax.set(ylabel="ASR after merging, %", ylim=(-4, 104))
    ax.set_xlabel("\n".join(["accuracy after merging, mean over tasks, %", *key]), loc="left")
    ax.margins(x=0.1)


# --------------------------------------------------------------------------- attack × defense


def _heat_maps(rows: Sequence[Row], caption: Caption) -> Iterator[Picture]:
    """ASR and its excess over the control, attack × defense × setting: one table per value of the shortest axis."""
    attacks, defenses = _distinct([r["attack"] for r in rows]), _distinct([r["defense"] for r in rows])
    settings = _distinct([(r["method"], _merge(r)) for r in rows])
    if len(attacks) * len(defenses) * len(settings) < 2:
        return
    found = {(r["attack"], r["defense"], (r["method"], _merge(r))): r for r in rows}
    axes: list[list[Any]] = [attacks, defenses, settings]
    # tables per setting unless another axis is shorter; the more numerous of attack and setting goes down
    parted = min((2, 1, 0), key=lambda axis: len(axes[axis]))
    down, across = {2: (0, 1), 1: (0, 2), 0: (2, 1)}[parted]
    lines = []
    for value in axes[parted]:
        cells = {(k[down], k[across]): row for k, row in found.items() if k[parted] == value}
        there = [v for v in axes[down] if any((v, w) in cells for w in axes[across])]
        beside = [w for w in axes[across] if any((v, w) in cells for v in there)]
        table = [[cells.get((v, w), {}) for w in beside] for v in there]
        title = f"defense {value}" if parted == 1 else _shown(value)
        titles = ("attack", "defense", "")[down], ("attack", "defense", "")[across]
        shown = [_shown(v) for v in there], [_shown(w) for w in beside]
        lines.append(side_by_side(title, *shown, table, _MEASURES, titles))
    note = "ASR on non-target samples of the adversary's task; excess: minus the same trigger on the merge of clean experts."
    yield from heat_sheets("backdoor-heat", "Backdoors against defenses", lines, caption, note)


def _shown(value: Any) -> str:
    """An attack or a defense by its label, a setting as its method and what is merged."""
    return value if isinstance(value, str) else f"{value[0]}, {_told(value[1])}"


_MEASURES = (("ASR", "succession", SHARE), ("excess over the control", "backdoor", EXCESS))


# --------------------------------------------------------------------------- curves


def _curves(rows: Sequence[Row], caption: Caption, methods: Methods) -> Iterator[Picture]:
    """ASR along a method's coefficient, and against the number of clean experts."""
    note = "Dotted: control, the same trigger on the merge of clean experts."
    for sweep in find_sweeps(methods):
        mine = [r for r in rows if r["method"] in sweep.values]
        lines = _along(mine, sweep)
        if lines:
            name = f"backdoor-coefficient-{sweep.title.partition('(')[0]}-{sweep.parameter}"
            yield from curve_sheets(name, f"ASR along the coefficient of {sweep.title}", lines, caption, note)
    lines = _lines(
        rows, lambda r: _merge(r).experts - _merge(r).adversaries,
        lambda r: (r["method"], _apart(_merge(r))),
        "clean experts in the merge",
    )  # fmt: skip
    if lines:
        yield from curve_sheets(
            "backdoor-experts", "ASR against the number of clean experts", lines, caption, note
        )


def _along(rows: Sequence[Row], sweep: Sweep) -> list[list[Curves]]:
    """``_lines`` over the values of a method's parameter."""
    return _lines(
        rows, lambda r: sweep.values[r["method"]], lambda r: (sweep.title, _told(_merge(r))), axis_title(sweep.parameter)
    )  # fmt: skip


def _lines(
    rows: Sequence[Row], x: Callable[[Row], float], fixed: Callable[[Row], tuple[str, str]], axis: str
) -> list[list[Curves]]:
    """A line of two panels (adversary's task, other tasks) per defense and whatever stays fixed."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["defense"], *fixed(row)), []).append(row)
    attacks = _distinct([r["attack"] for r in rows])
    lines = []
    for (defense, method, where), group in groups.items():
        if len({x(r) for r in group}) < LEAST:
            continue
        told = ", ".join(t for t in (method, where, "" if defense == "none" else f"defense {defense}") if t)
        line = []
        for side, measure in (("adversary's task", "succession"), ("other tasks", "transfer")):
            series: list[Series] = []
            for i, attack in enumerate(attacks):
                mine = sorted((r for r in group if r["attack"] == attack), key=x)
                if not mine:
                    continue
                colour, marker, dash = look_of(i)
                xs = [x(r) for r in mine]
                for label, column, m, d in (
                    (attack, measure, marker, dash), (f"{attack}, control", f"{measure}_clean_merge", "", ":"),
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
    pages = part(list(told), lambda d: 3.0)
    for page, chunk in enumerate(pages):
        layers_most = max(len(layers) for d in chunk for layers in told[d].values())
        size = (max(7.0, 0.3 * layers_most + 2.5), 3.0 * len(chunk))
        note = "Mean over a layer's tensors and over cells; bands from the smallest to the largest."
        figure, panels = sheet(size, (len(chunk), 1), "Mask sparsity per layer", caption, note)
        for defense, ax in zip(chunk, panels[:, 0], strict=True):
            _mask_panel(ax, told[defense])
            ax.set_title(defense)
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
