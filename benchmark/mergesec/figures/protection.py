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
    curve_sheets,
    heat_sheets,
    look_of,
    numbered,
    one_legend,
    part,
    point,
    rows_of,
    sheet,
    short_names,
    side_by_side,
    wrapped,
)
from mergesec.figures.sweeps import LEAST, Methods, Sweep, axis_title, find_sweeps, methods_of
from mergesec.threats import Role, Threat

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Setting = tuple[str, int, int, str]
"""Merge method, experts merged, experts protected, whose secrets."""

MANY_PAIRS = 6
"""Ordered pairs from which on a matrix says more than its mean."""
MOST_BARS = 6
"""Attacks beside each other in a bar chart."""


def protection_pictures(
    records: Sequence[Record], boards: Mapping[str, Board], reader: Reader
) -> Iterator[Picture]:
    """Every picture of a protection that these cells allow."""
    if "protection_cells" not in boards:
        return
    mine = [r for r in records if r.threat == Threat.PROTECTION]
    caption = Caption.of(mine)
    rows: list[Row] = rows_of(boards["protection_cells"])
    yield from _heat_maps(rows, caption)
    yield from _landscapes(rows, caption, methods_of(mine))
    yield from _matrices(mine, reader, caption)
    yield from _distances(mine, caption)
    if "ownership" in boards:
        yield from _ownership(rows_of(boards["ownership"]), caption)


def _setting(row: Row) -> Setting:
    return row["method"], row["experts"], row.get("protected", 1), row.get("secrets", "own")


def _told(setting: Setting) -> str:
    method, experts, protected, secrets = setting
    several = f", {protected} protected, {secrets} secrets" if protected > 1 else ""
    return f"{method}, {experts} experts{several}"


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
            lines.append(side_by_side(_told(s), there, run, table, _MEASURES, ("defense", "attack")))
    else:
        for d in defenses:
            there = [s for s in settings if any((d, a, s) in found for a in attacks)]
            run = [a for a in attacks if any((d, a, s) in found for s in settings)]
            table = [[found.get((d, a, s), {}) for a in run] for s in there]
            names = [_told(s) for s in there]
            lines.append(side_by_side(d, names, run, table, _MEASURES, ("", "attack")))
    note = (
        "Merged accuracy: of the merge on the protected task, lower protects better. Recovery: the share of what "
        "protecting cost the merge that the attack brings back; a dash where there is nothing to recover."
    )
    yield from heat_sheets(
        "protection-heat", "Protections against the free-rider's attacks", lines, caption, note
    )


_MEASURES = (("merged accuracy", "MMP_attacked", ACCURACY), ("recovery", "recovery", SHARE))


# --------------------------------------------------------------------------- curves


def _landscapes(rows: Sequence[Row], caption: Caption, methods: Methods) -> Iterator[Picture]:
    """Accuracy along a method's coefficient, the number of experts, and the number of protected ones."""
    for sweep in find_sweeps(methods):
        mine = [r for r in rows if r["method"] in sweep.values]
        lines = _along(mine, sweep)
        what = f"Accuracy along the coefficient of {sweep.title}"
        name = f"protection-landscape-{sweep.title.partition('(')[0]}-{sweep.parameter}"
        yield from _landscape(name, what, lines, caption)
    lines = _lines(
        rows, lambda r: r["experts"] - 1, lambda r: (r["method"], 0, *_setting(r)[2:]), "experts beside the protected one"
    )  # fmt: skip
    yield from _landscape(
        "protection-experts", "Accuracy against the number of experts merged", lines, caption
    )
    lines = _lines(
        rows, lambda r: r.get("protected", 1), lambda r: (*_setting(r)[:2], 0, _setting(r)[3]), "experts protected"
    )  # fmt: skip
    yield from _landscape(
        "protection-owners", "Accuracy against the number of protected experts", lines, caption
    )


def _landscape(
    name: str, what: str, lines: Sequence[Sequence[Curves]], caption: Caption
) -> Iterator[Picture]:
    if lines:
        note = "Unprotected: the same merge of clean experts. Base: accuracy without any expert."
        yield from curve_sheets(name, what, lines, caption, note)


def _along(rows: Sequence[Row], sweep: Sweep) -> list[list[Curves]]:
    """``_lines`` over the values of a method's parameter."""
    return _lines(
        rows, lambda r: sweep.values[r["method"]], lambda r: (sweep.title, *_setting(r)[1:]), axis_title(sweep.parameter)
    )  # fmt: skip


def _lines(
    rows: Sequence[Row], x: Callable[[Row], float], fixed: Callable[[Row], tuple[Any, ...]], axis: str
) -> list[list[Curves]]:
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
        told = [defense, method, f"{experts} experts" if experts else ""]
        told += [
            f"{protected} protected" if protected > 1 else "",
            f"{secrets} secrets" if protected != 1 else "",
        ]
        where = ", ".join(t for t in told if t)
        lines.append(
            [
                Curves(f"{where}\n{side}", axis, "accuracy, %", _curves(group, x, measures, attacks))
                for side, measures in (
                    ("protected task", ("MMP-", "MMP+", "MMP_attacked", "base")),
                    ("other tasks", ("free_rider-", "free_rider+", "free_rider_attacked", "")),
                )
            ]
        )
    return lines


def _curves(
    rows: Sequence[Row], x: Callable[[Row], float], measures: Sequence[str], attacks: Sequence[str]
) -> list[Series]:
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
        curves.append((f"attack {attack}", mine, attacked, *look_of(place)))
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
            what = f"Victim × free-rider: {defense}, {merging}, accuracy of the merge on the victim's task"
            stem = _distinct([r.defense for r in done]).index(defense)
            name = f"protection-pairs-{defense.partition('(')[0]}-{stem}"
            yield from heat_sheets(name, what, lines, caption, "")


def _rate(reader: Reader, records: Sequence[Record], role: str) -> tuple[float, ...]:
    if not records:
        return NOTHING
    estimate = reader.rate(records, "acc", role, "subject")
    return (estimate.value, *estimate.interval())


# --------------------------------------------------------------------------- distances


def _distances(records: Sequence[Record], caption: Caption) -> Iterator[Picture]:
    """Bars per kind of tensor, before and after attacks, on a logarithmic scale; whiskers span the cells."""
    done = [r for r in records if r.status == "done" and r.defense != "none"]
    defenses = [
        d
        for d in _distinct([r.defense for r in done])
        if _spread([r for r in done if r.defense == d], "to_base", "all")
    ]
    if not defenses:
        return
    attacks, left = _nearest(done)
    note = "Distance ‖θ − x‖ / ‖x‖ to x, mean over cells; whiskers: smallest and largest cell. A 0 marks no distance."
    if left:
        note += f" {left} more attacks are on the board; shown are the standard one and those that come nearest to the expert."
    pages = part(defenses, lambda d: 2.5)
    for page, chunk in enumerate(pages):
        figure, panels = sheet(
            (12.0, 2.5 * len(chunk)), (len(chunk), 2), "Distances of protected experts", caption, note
        )
        for defense, axes in zip(chunk, panels, strict=True):
            mine = [r for r in done if r.defense == defense]
            for which, ax in zip(("to_base", "to_expert"), axes, strict=True):
                _bars(ax, mine, which, attacks)
                side = "to the base" if which == "to_base" else "to the owner's expert"
                ax.set_title("\n".join([*wrapped(defense, 56), side]))
        one_legend(figure, panels)
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
    shown = [*first, *rest][:MOST_BARS]
    return shown, len(attacks) - len(shown)


def _bars(ax: Axes, records: Sequence[Record], which: str, attacks: Sequence[str]) -> None:
    kinds = [k for k in KINDS if _spread(records, which, k)]
    width = 0.82 / len(attacks)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    zeros = []
    for i, attack in enumerate(attacks):
        mine = [r for r in records if r.attack == attack]
        for place, kind in enumerate(kinds):
            found = _spread(mine, which, kind)
            if not found:
                continue
            middle = sum(found) / len(found)
            spot = place + (i - (len(attacks) - 1) / 2) * width
            if middle == 0:
                zeros.append(spot)
                continue
            # equal numbers can have a mean that is off by a rounding error
            below, above = max(0.0, middle - min(found)), max(0.0, max(found) - middle)
            ends = [[below], [above]] if min(found) > 0 else None
            ax.bar(
                spot, middle, width, color=look_of(i)[0], yerr=ends, error_kw={"elinewidth": 0.8},
                label="published" if attack == "none" else f"after {attack}" , hatch="" if i % 2 == 0 else "///",
                edgecolor="white", linewidth=0.4,
            )  # fmt: skip
    for spot in zeros:
        ax.annotate("0", (spot, 0), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=6)
    ax.set_xticks(range(len(kinds)), kinds)
    ax.grid(False, axis="x")
    ax.set_ylabel("relative distance")


# --------------------------------------------------------------------------- ownership


def _ownership(rows: Sequence[Row], caption: Caption) -> Iterator[Picture]:
    """Per mark: what answers on each suspect, and how often the owner's test says yes."""
    lines = []
    for defense in _distinct([r["defense"] for r in rows]):
        mine = [r for r in rows if r["defense"] == defense]
        names = [
            f"{r['method']}, {r['experts']} experts" + ("" if r["attack"] == "none" else f", {r['attack']}")
            for r in mine
        ]
        line = []
        for what, measure in (
            ("bits or queries that answer", "mark"),
            ("share of cells that verify", "verified"),
        ):
            points = np.array([[point(r, f"{measure}/{s}") for s in SUSPECTS] for r in mine])
            line.append(Heat(f"{defense}\n{what}", names, SUSPECTS, points, SHARE, ("", "suspect")))
        lines.append(line)
    note = "clean_merge, expert and base bear no mark: what verifies there is a false alarm."
    yield from heat_sheets("ownership", "Ownership marks on suspects", lines, caption, note)
