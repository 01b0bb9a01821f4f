"""Pictures of protections: landscapes, heat maps, pairs, distances, ownership marks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mergesec.evidence.estimates import Board, Reader
from mergesec.evidence.protection import KINDS, STANDARD, SUSPECTS
from mergesec.evidence.records import Record
from mergesec.figures.canvas import (
    ACCURACY,
    GREY,
    NOTHING,
    SHARE,
    Caption,
    Curves,
    Heat,
    Picture,
    Row,
    Series,
    blank,
    curve_sheets,
    handles_of,
    heat_sheets,
    legend_row,
    look_of,
    numbered,
    part,
    point,
    put_legend,
    rows_of,
    short_names,
    side_by_side,
    wrapped,
)
from mergesec.figures.frontier import frontier_pictures
from mergesec.figures.sweeps import LEAST, Methods, Sweep, axis_title, find_sweeps, methods_of
from mergesec.threats import Role, Threat

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Setting = tuple[str, int, int, str]
"""Merge method, experts merged, experts protected, whose secrets."""

MANY_PAIRS = 6
"""Ordered pairs from which on a matrix says more than its mean."""
MOST_MARKS = 6
"""Attacks beside each other in a picture of distances."""


def protection_pictures(
    records: Sequence[Record], boards: Mapping[str, Board], reader: Reader, width: float
) -> Iterator[Picture]:
    """Every picture of a protection that these cells allow."""
    if "protection_cells" not in boards:
        return
    mine = [r for r in records if r.threat == Threat.PROTECTION]
    caption = Caption.of(mine, width)
    rows: list[Row] = rows_of(boards["protection_cells"])
    yield from _heat_maps(rows, caption)
    yield from _landscapes(rows, caption, methods_of(mine))
    yield from _matrices(mine, reader, caption)
    yield from _distances(mine, caption)
    yield from frontier_pictures(mine, reader, caption)
    if "ownership" in boards:
        yield from _ownership(rows_of(boards["ownership"]), caption)


def _setting(row: Row) -> Setting:
    return row["method"], row["experts"], row.get("protected", 1), row.get("secrets", "own")


def _told(setting: Setting, caption: Caption) -> str:
    method, experts, protected, secrets = setting
    several = f", {protected} protected, {secrets} secrets" if protected > 1 else ""
    return f"{caption.name(method)}, {experts} experts{several}"


def _distinct(values: Sequence[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


# --------------------------------------------------------------------------- defense × attack


def _heat_maps(rows: Sequence[Row], caption: Caption) -> Iterator[Picture]:
    """Merged accuracy and recovery: defense × attack per setting, or setting × attack per defense if
    that makes fewer panels."""
    defenses, attacks = _distinct([r["defense"] for r in rows]), _distinct([r["attack"] for r in rows])
    settings = _distinct([_setting(r) for r in rows])
    if len(defenses) * len(attacks) * len(settings) < 2:
        return
    found = {(r["defense"], r["attack"], _setting(r)): r for r in rows}
    lines = []
    if len(settings) <= len(defenses):
        for s in settings:
            there = [d for d in defenses if any((d, a, s) in found for a in attacks)]
            run = [a for a in attacks if any((d, a, s) in found for d in defenses)]
            table = [[found.get((d, a, s), {}) for a in run] for d in there]
            names = [caption.name(d) for d in there], [caption.name(a) for a in run]
            lines.append(side_by_side(_told(s, caption), *names, table, _MEASURES, ("defense", "attack")))
    else:
        for d in defenses:
            there = [s for s in settings if any((d, a, s) in found for a in attacks)]
            run = [a for a in attacks if any((d, a, s) in found for s in settings)]
            table = [[found.get((d, a, s), {}) for a in run] for s in there]
            names = [_told(s, caption) for s in there], [caption.name(a) for a in run]
            lines.append(side_by_side(caption.name(d), *names, table, _MEASURES, ("", "attack")))
    note = (
        "Merged accuracy: of the merge on the protected task, lower protects better. Recovery: the share of what "
        "protecting cost the merge that the attack brings back; a dash where there is nothing to recover, grey where "
        f"the interval is wider than 100 points. {caption.key([*defenses, *attacks, *(s[0] for s in settings)])}"
    )
    yield from heat_sheets(
        "protection-heat", "Protections against the free-rider's attacks", lines, caption, note
    )


_MEASURES = (
    ("merged accuracy", "MMP_attacked", ACCURACY, math.inf), ("recovery", "recovery", SHARE, 1.0),
)  # fmt: skip
"""What, measure, colours, and the widest interval that says something."""


# --------------------------------------------------------------------------- curves


def _landscapes(rows: Sequence[Row], caption: Caption, methods: Methods) -> Iterator[Picture]:
    """Accuracy along a method's coefficient, the number of experts, and the number of protected ones."""
    for sweep in find_sweeps(methods):
        mine = [r for r in rows if r["method"] in sweep.values]
        lines = _along(mine, sweep, caption)
        what = f"Accuracy along the coefficient of {sweep.title}"
        key = caption.key([r["defense"] for r in mine] + [r["attack"] for r in mine])
        name = f"protection-landscape-{sweep.title.partition('(')[0]}-{sweep.parameter}"
        yield from _landscape(name, what, lines, caption, key)
    lines = _lines(
        rows, lambda r: r["experts"] - 1, lambda r: (r["method"], 0, *_setting(r)[2:]),
        "experts beside the protected one", caption,
    )  # fmt: skip
    key = caption.key([r[kind] for kind in ("defense", "attack", "method") for r in rows])
    yield from _landscape(
        "protection-experts", "Accuracy against the number of experts merged", lines, caption, key
    )
    lines = _lines(
        rows, lambda r: r.get("protected", 1), lambda r: (*_setting(r)[:2], 0, _setting(r)[3]), "experts protected",
        caption,
    )  # fmt: skip
    yield from _landscape(
        "protection-owners", "Accuracy against the number of protected experts", lines, caption, key
    )


def _landscape(
    name: str, what: str, lines: Sequence[Sequence[Curves]], caption: Caption, key: str
) -> Iterator[Picture]:
    if lines:
        note = f"Unprotected: the same merge of clean experts. Base: accuracy without any expert. {key}"
        yield from curve_sheets(name, what, lines, caption, note)


def _along(rows: Sequence[Row], sweep: Sweep, caption: Caption) -> list[list[Curves]]:
    """``_lines`` over the values of a method's parameter."""
    return _lines(
        rows, lambda r: sweep.values[r["method"]], lambda r: (sweep.title, *_setting(r)[1:]),
        axis_title(sweep.parameter), caption,
    )  # fmt: skip


def _lines(
    rows: Sequence[Row], x: Callable[[Row], float], fixed: Callable[[Row], tuple[Any, ...]], axis: str,
    caption: Caption,
) -> list[list[Curves]]:  # fmt: skip
    """A line of two panels (protected task, other tasks) per defense and whatever stays fixed."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["defense"] != "none":
            groups.setdefault((row["defense"], *fixed(row)), []).append(row)
    attacks = _distinct([r["attack"] for r in rows if r["attack"] != "none"])
    lines = []
    for (defense, method, experts, protected, secrets), group in groups.items():
        if len({x(r) for r in group}) < LEAST:
            continue
        told = [caption.name(defense), caption.name(method), f"{experts} experts" if experts else ""]
        told += [
            f"{protected} protected" if protected > 1 else "",
            f"{secrets} secrets" if protected != 1 else "",
        ]
        where = ", ".join(t for t in told if t)
        lines.append(
            [
                Curves(f"{where}\n{side}", axis, "accuracy, %", _curves(group, x, measures, attacks, caption))
                for side, measures in (
                    ("protected task", ("MMP-", "MMP+", "MMP_attacked", "base")),
                    ("other tasks", ("free_rider-", "free_rider+", "free_rider_attacked", "")),
                )
            ]
        )
    return lines


def _curves(
    rows: Sequence[Row], x: Callable[[Row], float], measures: Sequence[str], attacks: Sequence[str],
    caption: Caption,
) -> list[Series]:  # fmt: skip
    before, after, attacked, base = measures
    rows = sorted(rows, key=x)
    one = list({x(r): r for r in rows}.values())  # controls are the same beside every attack
    curves = [
        ("unprotected", one, before, "#000000", "o", "-"),
        ("protected", one, after, "#D55E00", "s", "--"),
    ]
    if base:
        curves.insert(0, ("base", one, base, GREY, "", ":"))
    rest = [i for i in range(len(attacks) + 8) if look_of(i)[0] != "#D55E00"]  # that colour is taken
    for attack, place in zip(attacks, rest, strict=False):
        mine = [r for r in rows if r["attack"] == attack]
        curves.append((f"attack {caption.name(attack)}", mine, attacked, *look_of(place)))
    return [
        Series(label, [x(r) for r in some], np.array([point(r, m) for r in some]), *look)
        for label, some, m, *look in curves
        if some
    ]


# --------------------------------------------------------------------------- victim × free-rider


def _matrices(records: Sequence[Record], reader: Reader, caption: Caption) -> Iterator[Picture]:
    """Per defense: merged accuracy on the victim's task for every pair, before, after, and after each attack."""
    done = [r for r in records if r.status == "done" and len(r.experts) == 2 and r.protected == 1]
    pairs = {(r.subject, *(t for t in r.experts if t != r.subject)) for r in done}
    if len(pairs) < MANY_PAIRS or len({v for v, _ in pairs}) < 2:
        return
    victims = _distinct([r.subject for r in done])
    others = _distinct([*victims, *(t for r in done for t in r.experts)])
    others = [t for t in others if any(t == o for _, o in pairs)]
    names = short_names([*victims, *others])
    sides = ("victim", "free-rider")
    for merging in _distinct([r.merging for r in done]):
        for defense in _distinct([r.defense for r in done if r.defense != "none" and r.merging == merging]):
            mine = [r for r in done if (r.merging, r.defense) == (merging, defense)]
            groups: dict[tuple[str, str, str], list[Record]] = {}
            for r in mine:
                other = next(t for t in r.experts if t != r.subject)
                groups.setdefault((r.attack, r.subject, other), []).append(r)
            attacks = _distinct([r.attack for r in mine])
            panels = [
                ("unprotected (MMP-)", attacks[0], Role.CLEAN_MERGE),
                ("protected (MMP+)", attacks[0], Role.PROTECTED_MERGE),
            ]
            panels += [(f"after {a}", a, Role.MERGE) for a in attacks if a != "none"]
            heats = []
            for title, attack, role in panels:
                points = np.array(
                    [[_rate(reader, groups.get((attack, v, o), []), role) for o in others] for v in victims]
                )
                rows, columns = [names[v] for v in victims], [names[o] for o in others]
                heats.append(Heat(title, rows, columns, points, ACCURACY, sides))
            lines = [heats[i : i + 2] for i in range(0, len(heats), 2)]
            told = f"{caption.name(defense)}, {caption.name(merging)}"
            what = f"Victim × free-rider: {told}, accuracy of the merge on the victim's task"
            stem = _distinct([r.defense for r in done]).index(defense)
            name = f"protection-pairs-{defense.partition('(')[0]}-{stem}"
            yield from heat_sheets(name, what, lines, caption, caption.key([defense, merging]))


def _rate(reader: Reader, records: Sequence[Record], role: str) -> tuple[float, ...]:
    if not records:
        return NOTHING
    estimate = reader.rate(records, "acc", role, "subject")
    return (estimate.value, *estimate.interval())


# --------------------------------------------------------------------------- distances


def _distances(records: Sequence[Record], caption: Caption) -> Iterator[Picture]:
    """A mark per kind of tensor, before and after attacks, on a logarithmic scale; whiskers span the cells."""
    done = [r for r in records if r.status == "done" and r.defense != "none"]
    defenses = [
        d
        for d in _distinct([r.defense for r in done])
        if _spread([r for r in done if r.defense == d], "to_base", "all")
    ]
    if not defenses:
        return
    attacks, left = _nearest(done)
    note = "Distance ‖θ − x‖ / ‖x‖ to x, mean over cells; whiskers: smallest and largest cell. Marks on the axis: 0."
    if left:
        note += f" {left} more attacks are on the board; shown are the standard one and those that come nearest to the expert."
    tall = 1.7
    pages = part(defenses, lambda d: tall)
    for page, chunk in enumerate(pages):
        labels = {"published" if a == "none" else f"after {caption.name(a)}": None for a in attacks}
        columns, legend = legend_row(labels, caption.width)
        figure = blank(
            (caption.width, tall * len(chunk) + legend), "Distances of protected experts", caption,
            f"{note} {caption.key([*chunk, *attacks])}",
        )  # fmt: skip
        grid = figure.add_gridspec(len(chunk) + 1, 2, height_ratios=[tall] * len(chunk) + [legend])
        panels = []
        for i, defense in enumerate(chunk):
            mine = [r for r in done if r.defense == defense]
            for j, which in enumerate(("to_base", "to_expert")):
                panels.append(figure.add_subplot(grid[i, j]))
                _marks(panels[-1], mine, which, attacks, caption)
                side = "to the base" if which == "to_base" else "to the owner's expert"
                panels[-1].set_title("\n".join([*wrapped(caption.name(defense), 40), side]))
        put_legend(figure.add_subplot(grid[-1, :]), handles_of(panels), columns)
        yield Picture(numbered("protection-distances", page, len(pages)), figure)


def _spread(records: Sequence[Record], which: str, kind: str) -> list[float]:
    """The distance in every cell that has it; after the attack, if there is one."""
    names = [(r, f"distance{'' if r.attack == 'none' else '_recovered'}/{which}/{kind}") for r in records]
    return [r.values[name] for r, name in names if name in r.values]


def _nearest(records: Sequence[Record]) -> tuple[list[str], int]:
    """The attacks shown: none, the standard one, then by distance to the expert; and how many are left out."""
    attacks = _distinct([r.attack for r in records])
    reach = {}
    for attack in attacks:
        found = _spread([r for r in records if r.attack == attack], "to_expert", "all")
        reach[attack] = sum(found) / len(found) if found else math.inf
    first = [a for a in ("none", STANDARD) if a in attacks]
    rest = sorted((a for a in attacks if a not in first), key=lambda a: reach[a])
    shown = [*first, *rest][:MOST_MARKS]
    return shown, len(attacks) - len(shown)


def _marks(ax: Axes, records: Sequence[Record], which: str, attacks: Sequence[str], caption: Caption) -> None:
    kinds = [k for k in KINDS if _spread(records, which, k)]
    step = 0.8 / len(attacks)
    ax.set_yscale("log")
    for i, attack in enumerate(attacks):
        mine = [r for r in records if r.attack == attack]
        colour, marker, _ = look_of(i)
        label = "published" if attack == "none" else f"after {caption.name(attack)}"
        for place, kind in enumerate(kinds):
            found = _spread(mine, which, kind)
            if not found:
                continue
            middle = sum(found) / len(found)
            spot = place + (i - (len(attacks) - 1) / 2) * step
            if middle == 0:  # has no place on a logarithmic axis: on its lower edge
                ax.plot(
                    spot, 0.0, color=colour, marker=marker, linestyle="", fillstyle="none", clip_on=False,
                    transform=ax.get_xaxis_transform(), markersize=3.0,
                )  # fmt: skip
                continue
            # equal numbers can have a mean that is off by a rounding error
            below, above = max(0.0, middle - min(found)), max(0.0, max(found) - middle)
            ends = [[below], [above]] if min(found) > 0 else None
            ax.errorbar(
                spot, middle, yerr=ends, color=colour, marker=marker, linestyle="", label=label, markersize=3.5,
                elinewidth=0.8,
            )  # fmt: skip
    for edge in range(1, len(kinds)):
        ax.axvline(edge - 0.5, color="#e4e4e4", linewidth=0.6)
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_xticks(range(len(kinds)), kinds)
    ax.set_xlim(-0.5, max(len(kinds), 1) - 0.5)
    ax.grid(False, axis="x")
    ax.set_ylabel("relative distance")


# --------------------------------------------------------------------------- ownership


def _ownership(rows: Sequence[Row], caption: Caption) -> Iterator[Picture]:
    """Per mark: what answers on each suspect, and how often the owner's test says yes."""
    lines = []
    for defense in _distinct([r["defense"] for r in rows]):
        mine = [r for r in rows if r["defense"] == defense]
        names = [
            f"{caption.name(r['method'])}, {r['experts']} experts"
            + ("" if r["attack"] == "none" else f", {caption.name(r['attack'])}")
            for r in mine
        ]
        line = []
        for what, measure in (
            ("bits or queries that answer", "mark"),
            ("share of cells that verify", "verified"),
        ):
            points = np.array([[point(r, f"{measure}/{s}") for s in SUSPECTS] for r in mine])
            line.append(
                Heat(f"{caption.name(defense)}\n{what}", names, SUSPECTS, points, SHARE, ("", "suspect"))
            )
        lines.append(line)
    note = "clean_merge, expert and base bear no mark: what verifies there is a false alarm."
    yield from heat_sheets("ownership", "Ownership marks on suspects", lines, caption, note)
