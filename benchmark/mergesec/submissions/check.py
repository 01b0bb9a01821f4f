"""The whole check of an entry, from its files to a re-run: what a maintainer and CI run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mergesec.errors import UsageError
from mergesec.evidence.records import Record
from mergesec.execution.scheduler import Reporter
from mergesec.execution.session import Desk, Session, open_desk, placed_grid, planned
from mergesec.files import brief
from mergesec.planning.catalog import load_catalog
from mergesec.planning.gridspec import load_grid
from mergesec.planning.presets import nearest_preset, preset_names
from mergesec.planning.resolve import resolve
from mergesec.submissions import claims, method, rerun, walled
from mergesec.submissions.entry import FILE, Entry, read_entry
from mergesec.submissions.findings import Finding, Report


class Asked(NamedTuple):
    """How thorough a check is, and where it runs."""

    full: bool = False
    rerun: bool = True
    salt: str = ""
    data_root: str | None = None
    overrides: tuple[str, ...] = ()
    store: Path | None = None


class Checked(NamedTuple):
    """The report, and what an accepted entry brings."""

    entry: Entry
    report: Report
    records: dict[str, Record]
    grid: str


def check(folder: Path, asked: Asked, manner: rerun.Manner, reporter: Reporter) -> Checked:
    """Check an entry; UsageError where it is malformed. What depends on a refused part is skipped."""
    entry = read_entry(folder)
    report = Report()
    nothing = Checked(entry, report, {}, "")
    if not report.told("the name is its own", method.name_is_its_own(entry, load_catalog(method.WORLDS))):
        return nothing
    if not report.told("the files are those of the digest", method.code_is_as_digested(entry)):
        return nothing
    card, wrong = method.card_of(entry)
    if not report.told(f"{FILE} and card say the same", wrong) or card is None:
        return nothing
    sound = report.told("imports what is for plugins", method.imports_are_public(entry))
    report.findings += [Finding("worth a look", "note", why) for why in method.worth_a_look(entry)]
    desk = desk_for(entry, asked.data_root, asked.store)
    found = method.registered(entry, desk.catalog)
    sound &= _battery(entry, desk, manner.contained, report)
    session = planned(desk, placed_grid(desk, str(entry.grid), asked.overrides))
    _grid(entry, session, report)
    held = claims.held(entry, session.plan, found)
    report.cells = len(session.plan.cells)
    if not report.told("every cell has a record of this code and this grid", held.wrong):
        sound = False
    else:
        _claims(entry, list(held.records.values()), report)
    _rerun(entry, session, held.records, asked, manner, reporter, report, sound)
    return Checked(entry, report, held.records, session.grid.spec.name)


def desk_for(entry: Entry, data_root: str | None = None, store: Path | None = None) -> Desk:
    """What an entry's grid is planned with: the catalogue with its plugins and the micro worlds."""
    return open_desk([str(path) for path in (*entry.plugins, *method.WORLDS)], data_root, store)


def _battery(entry: Entry, desk: Desk, contained: bool, report: Report) -> bool:
    found = walled.battery(
        entry.plugins, entry.submission.kind, entry.submission.method, contained, desk.data_root
    )
    report.findings += found
    return not any(f.verdict == "REFUSED" for f in found)


def _grid(entry: Entry, session: Session, report: Report) -> None:
    """Whether the grid says something of the method, and holds the preset that it stands against."""
    kind, name, against = entry.submission.kind, entry.submission.method, entry.submission.against
    own = [c for c in session.plan.cells if claims.takes_part(c.cell, kind, name)]
    report.told("the method is in the grid", [] if own else [f"no cell has {kind} {name}"])
    if session.grid.spec.protocol == "transductive":
        report.findings.append(
            Finding("protocol", "note", "transductive: methods saw test inputs, without labels")
        )
    if not against:
        told = "none named: stands on a board of its own, beside no preset's"
        report.findings.append(Finding("nothing of a preset is removed", "note", told))
        return
    if against not in preset_names() or kind == "task":
        raise UsageError(
            f"{FILE}: against", f"no preset {brief(against)!r} for a {kind}{nearest_preset(against)}"
        )
    preset = resolve(load_grid(against, _places(session)), session.catalog)
    report.told("nothing of a preset is removed", claims.removed(session.grid, preset, kind))


def _places(session: Session) -> tuple[str, ...]:
    """Where this machine has the backbone, for a preset that leaves it open."""
    backbone = session.grid.spec.suite.backbone
    path = backbone.get("path") if isinstance(backbone, dict) else None
    return (f"suite.backbone.path={path}",) if path else ()


def _claims(entry: Entry, records: Sequence[Record], report: Report) -> None:
    found = claims.supported(entry.submission.claims, records)
    report.told("the records support the claims", claims.unsupported(found))
    open_cells = sum(r.contained == "no" for r in records)
    if open_cells:
        told = f"{open_cells} of {len(records)} cells say that the plugin was not contained"
        report.findings.append(Finding("contained", "note", told))


def _rerun(
    entry: Entry, session: Session, records: dict[str, Record], asked: Asked, manner: rerun.Manner,
    reporter: Reporter, report: Report, sound: bool,
) -> None:  # fmt: skip
    """Run cells again and compare them."""
    title = "the re-run agrees"
    if not asked.rerun:
        report.findings.append(Finding(title, "skip", "--no-rerun: NOTHING WAS VERIFIED"))
        return
    if not sound:
        report.findings.append(Finding(title, "skip", "what is refused above is not run"))
        return
    submission = entry.submission
    content = f"{submission.code.digest} {submission.records}"
    chosen = rerun.draw(
        session.plan.cells, submission.kind, submission.method, content, asked.salt, asked.full
    )
    again = rerun.run_again(session, chosen, reporter, manner)
    lost = {name: r for name, r in again.items() if r.status != "done"}
    if not report.told(title, [f"{name}: {r.status} when run again: {r.reason}" for name, r in lost.items()]):
        return
    report.findings.pop()  # said again below, with the numbers
    report.rerun = tuple(again)
    if wrong := rerun.lacking(records, again):
        report.told(title, wrong)
        return
    report.findings += [Finding("no rates", "note", why) for why in rerun.other_values(records, again)]
    found = rerun.pairs(records, again)
    report.differences = tuple(rerun.differences(found))
    report.told(title, rerun.too_far(found) or rerun.drifted(report.differences))
    if asked.full and not report.refused:
        _claims_again(entry, list(again.values()), report)


def _claims_again(entry: Entry, again: Sequence[Record], report: Report) -> None:
    """The claimed numbers beside those of a whole re-run."""
    for one in claims.supported(entry.submission.claims, again):
        claimed = one.claim.value
        assert claimed is not None
        interval = f"[{100 * one.low:.1f}, {100 * one.high:.1f}]"
        told = f"{one.name}: claimed {100 * claimed:.1f}, run again {100 * one.found:.1f} {interval}"
        report.findings.append(Finding("claim", "note", told))
