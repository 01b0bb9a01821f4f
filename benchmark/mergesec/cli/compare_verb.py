"""``bench compare``: two folders of records beside each other, from records alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergesec.cli import show
from mergesec.errors import UsageError

if TYPE_CHECKING:
    from mergesec.evidence.comparison import Comparison
    from mergesec.evidence.estimates import Row

SHOWN = 20
"""Lines of a kind that are printed; the CSV has all."""
_WHO = ("attack", "defense", "method", "experts", "adversaries", "target_task", "protected", "secrets")
_USUAL = ("none", "own", "", 1)


def main(
    a: Annotated[str, typer.Argument(metavar="A", help="a folder of results, or of one grid's records")],
    b: Annotated[str, typer.Argument(metavar="B", help="the other; differences are B minus A")],
    grid: Annotated[str, typer.Option("--grid", help="only this grid", show_default=False)] = "",
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="points; exit code 1 if anything differs by more, or a cell of A is not there to compare"
        ),
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="with --tolerance: cells of A may be missing in B")
    ] = False,
    across_versions: Annotated[
        bool,
        typer.Option("--across-versions", help="compare cells whose components have other versions or code"),
    ] = False,
    csv: Annotated[
        str | None, typer.Option("--csv", help="file for every line, all digits", show_default=False)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="print every line that differs")] = False,
) -> None:
    from mergesec.evidence.comparison import compare
    from mergesec.evidence.sides import read_side
    from mergesec.evidence.tables import csv_bytes
    from mergesec.files import check_writable, write_atomic

    if tolerance is not None and not (math.isfinite(tolerance) and tolerance >= 0):
        raise UsageError("--tolerance", f"must be points, not negative, got {tolerance}")
    if csv is not None:
        check_writable(Path(csv).parent, "--csv")
    found = compare(read_side(a, grid), read_side(b, grid), across_versions)
    if csv is not None:
        write_atomic(Path(csv), csv_bytes(found.table))
    if not found.pairs and not found.of("incomparable"):
        raise UsageError("compare", f"no done cell is on both sides ({_counted(found, 'missing')})")
    show.prose(f"A = {a}; B = {b}")
    _tell(found, len(found.lines) if everything else SHOWN)
    if csv is not None:
        print(csv)
    if tolerance is not None and _fails(found, tolerance, allow_missing):
        raise typer.Exit(1)


def _tell(found: Comparison, most: int) -> None:
    differ = found.pairs - found.alike
    print(f"{show.many(found.pairs, 'cell')} compared: {found.alike} the same in every sample, {differ} not")
    for note in found.notes:
        show.prose(f"not the same: {note}", hang=2)
    rows = sorted((r for r in found.of("row") if r["measure"] != "all"), key=lambda r: -abs(r["difference"]))
    changed = [r for r in rows if r["difference"] or r["low"] or r["high"]]
    header = ["board", "row", "measure", "A", "B", "B - A", "95 %"]
    if changed:
        told = "paired by test sample and seed; (): one seed, its spread is not known; *: 0 lies outside"
        show.table(f"Rows that differ ({told})", header, [_difference(r) for r in changed[:most]])
        _more(len(changed), most)
    if values := found.of("value"):
        counted = Counter(line["measure"].partition("/")[0] for line in values)
        told = ", ".join(f"{n} {name}" for name, n in counted.most_common(6))
        show.prose(
            f"Numbers that are no rates and differ (no paired interval, not held to --tolerance): {told}"
        )
        for line in values[: most if most > SHOWN else 3]:
            show.prose(
                f"  {line['cell']}: {line['measure']} {_number(line['A'])}, {_number(line['B'])}", hang=4
            )
        _more(len(values), most if most > SHOWN else 3)
    if tiers := found.of("tier"):
        lines = [[r["board"], _who(r), _tier(r["A"]), _tier(r["B"])] for r in tiers]
        show.table("Tiers that changed", ["board", "row", "A", "B"], lines[:most])
        _more(len(tiers), most)
    for kind, title in (("missing", "Missing on a side"), ("incomparable", "Cannot be compared")):
        if noted := found.of(kind):
            print(f"{title}: {_counted(found, kind)}")
            for line in noted[:most]:
                show.prose(f"  {line.get('cell') or line['grid']}: {line['why']}", hang=4)
            _more(len(noted), most)


def _difference(row: Row) -> list[str]:
    mark = "*" if row["low"] > 0 or row["high"] < 0 else ""
    left, right = "[]" if row["seeds"] > 1 else "()"
    interval = f"{left}{100 * row['low']:+.2f}, {100 * row['high']:+.2f}{right}{mark}"
    values = (f"{100 * row['A']:.1f}", f"{100 * row['B']:.1f}", f"{100 * row['difference']:+.2f}")
    return [row["board"], _who(row), row["measure"], *values, interval]


def _who(row: Row) -> str:
    return ", ".join(f"{name} {row[name]}" for name in _WHO if name in row and row[name] not in _USUAL)


def _number(value: float | None) -> str:
    return "absent" if value is None else f"{value:g}"


def _tier(value: float) -> str:
    return "none" if math.isnan(value) else f"{value:.0f}"


def _more(number: int, shown: int) -> None:
    if number > shown:
        print(f"... and {number - shown} more (--all, --csv FILE)")


def _counted(found: Comparison, kind: str) -> str:
    """How many lines of a kind there are, by what is wrong."""
    counted = Counter(_cause(line["why"]) for line in found.of(kind))
    return "; ".join(f"{n} {why}" for why, n in counted.most_common(6)) or "none"


def _cause(why: str) -> str:
    return why.partition(":")[0]


def _fails(found: Comparison, tolerance: float, allow_missing: bool) -> bool:
    """Whether the sides differ by more than they may; says why."""
    beyond = found.beyond(tolerance / 100)
    lost = [] if allow_missing else _lost(found)
    for kind in ("row", "cell"):
        if mine := [r for r in beyond if r["kind"] == kind]:
            worst = max(mine, key=lambda r: abs(r["difference"]))
            where = worst.get("cell") or _who(worst)
            told = f"{100 * worst['difference']:+.2f} points of {worst['measure']} in {where}"
            typer.echo(
                f"beyond {tolerance:g} points: {show.many(len(mine), f'{kind} measure')}, most {told}",
                err=True,
            )
    if lost:
        typer.echo(
            f"{show.many(len(lost), 'cell')} of A cannot be compared with B (--allow-missing)", err=True
        )
    return bool(beyond or lost)


def _lost(found: Comparison) -> Sequence[Row]:
    """What A has and B cannot be held to."""
    gone = [line for line in found.of("missing") if " in A" not in line["why"].partition(":")[0]]
    return [*gone, *found.of("incomparable")]
