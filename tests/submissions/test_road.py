"""The whole way: a new entry of each kind, the shipped ones, a draw, an acceptance, the marks on boards."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mergesec.conformance.battery import check_file
from mergesec.evidence.records import read_records
from mergesec.execution.harvest import cell_name
from mergesec.execution.session import placed_grid, planned
from mergesec.planning.catalog import add_plugin, load_catalog
from mergesec.submissions import rerun, walled
from mergesec.submissions.accepting import accept
from mergesec.submissions.check import desk_for
from mergesec.submissions.classes import card_against_class
from mergesec.submissions.entry import FILE, KINDS, read_entry
from mergesec.submissions.method import WORLDS

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(p.parent.name for p in (ROOT / "examples" / "entries").glob(f"*/{FILE}"))


@pytest.mark.slow
def test_new_and_shipped_entries_pass_their_own_tests(desk_class: Any, tmp_path: Path) -> None:
    for kind in KINDS:
        desk_class(tmp_path).new(f"own_{kind}", kind)
    for name in SHIPPED:
        shutil.copytree(ROOT / "examples" / "entries" / name, tmp_path / name)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    told = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    ran = subprocess.run(command, cwd=tmp_path, env=told, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout
    assert len(SHIPPED) == 3 and "9 passed" in ran.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_entry_keeps_the_contracts_runs_and_is_accepted(kind: str, desk: Any, no_battery: None) -> None:
    entry = desk.new(f"own_{kind}", kind)
    checks = check_file(entry / f"own_{kind}.py", load_catalog(WORLDS))
    assert checks and not [f"{c.name}: {c.message}" for _, c in checks if not c.passed]
    desk.run(entry)
    again = kind == "task"  # of the other kinds there is a shipped entry that goes the whole way
    report = desk.check(entry, rerun=again).report
    assert not report.refused, report.findings
    assert report.verified == bool(report.rerun) == again


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_entries_go_the_whole_way(name: str, desk: Any) -> None:
    """Run, packed, and checked with the battery behind walls and every cell run again."""
    entry = desk.home / name
    shutil.copytree(ROOT / "examples" / "entries" / name, entry)
    desk.run(entry)
    report = desk.check(entry, full=True).report
    assert not report.refused, report.findings
    assert len(report.rerun) == report.cells > 1
    assert all(d.submitted == d.again and (d.low, d.high) == (0, 0) for d in report.differences)
    assert {"the card is true of its class", "same coordinates, same numbers"} <= {
        f.check for f in report.findings if f.verdict == "pass"
    }


def test_a_stranger_sees_nothing_of_the_machine_in_the_battery(desk: Any, entry: Path) -> None:
    if not desk.contained:
        pytest.skip("this machine cannot contain plugins")
    plugin = entry / "halfback.py"
    spy = f"import os\nif os.path.exists({str(desk.store)!r}) or 'SECRET' in os.environ:\n    raise SystemExit('seen')\n"
    plugin.write_text(plugin.read_text() + spy)
    os.environ["SECRET"] = "1"
    try:
        found = walled.battery([plugin], "defense", "halfback", True)
        free = walled.battery([plugin], "defense", "halfback", False)
    finally:
        del os.environ["SECRET"]
    assert [f for f in found if f.verdict == "REFUSED"] == []
    assert free[0].verdict == "REFUSED" and "seen" in free[0].why


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (('"hooks": ["repair"]', '"hooks": ["screen"]'), ["hook screen: Halfback has no screen()",
         "Halfback has repair(), which the card's hooks do not name"]),
        (("def __init__(self, share: float)", "def __init__(self, part: float, share: float = 0.5)"),
         ["the class needs 'part', which the card does not tell of"]),
        (('"share": {', '"shares": {'), ["the class takes no parameter 'shares'",
         "the class needs 'share', which the card does not tell of"]),
    ],
)  # fmt: skip
def test_a_card_that_is_not_true_of_its_class(change: tuple[str, str], told: list[str], entry: Path) -> None:
    plugin = entry / "halfback.py"
    assert change[0] in plugin.read_text()
    plugin.write_text(plugin.read_text().replace(*change))
    (registered,) = add_plugin(load_catalog(), plugin)
    assert card_against_class(registered) == told


@pytest.mark.slow
def test_every_shipped_card_is_true_of_its_class() -> None:
    wrong = {e.card.name: told for e in load_catalog() if (told := card_against_class(e))}
    assert wrong == {}


def test_a_draw_is_a_tenth_and_nobody_chooses_it(desk: Any, entry: Path) -> None:
    found = read_entry(entry)
    place = desk_for(found, store=desk.store)
    session = planned(
        place, placed_grid(place, str(found.grid), ("seeds=[" + ",".join(map(str, range(25))) + "]",))
    )
    cells = session.plan.cells
    assert len(cells) == 50

    def draw(content: str, salt: str = "", full: bool = False) -> set[str]:
        drawn = rerun.draw(cells, "defense", "halfback", content, salt, full)
        return {cell_name(c.cell) for c in drawn}

    assert len(draw("a")) == 6  # three of 25 defended cells, three of the others
    assert sum("halfback" in name for name in draw("a")) == 3
    assert draw("a") == draw("a")
    assert len({frozenset(draw(content, salt)) for content in "abcd" for salt in "xyz"}) == 12
    assert len(draw("a", full=True)) == 50


def test_an_accepted_entry_is_marked_on_its_boards(desk: Any, entry: Path, no_battery: None) -> None:
    checked = desk.check(entry)
    assert len(checked.report.rerun) == 2
    results = desk.home / "results"
    accept(checked, results)
    board = pd.read_csv(results / "leaderboards" / "halfback" / "backdoor_defenses.csv").set_index("defense")
    assert board["verified"].to_dict() == {"none": "re-run 1/2", "halfback": "re-run 1/2"}
    assert set(board["contained"]) == {"yes" if desk.contained else "no"}
    text = (results / "leaderboards" / "halfback" / "boards.md").read_text()
    assert "claimed: 2 cells are a submission's that was not run again" in text
    assert "re-run 1/2" in text
    accept(desk.check(entry, full=True), results)
    assert set(pd.read_csv(results / "leaderboards" / "halfback" / "backdoor.csv")["verified"]) == {"re-run"}
    records = read_records(results / "records", "halfback")
    assert all(r.provenance["submission"]["method"] == "halfback" for r in records)


def test_results_of_another_grid_of_that_name_stay(desk: Any, entry: Path, no_battery: None) -> None:
    from mergesec.errors import UsageError

    results = desk.home / "results"
    shutil.copytree(entry / "records", results / "records")  # one's own run, of no entry
    checked = desk.check(entry, rerun=False)
    with pytest.raises(UsageError, match="has a grid 'halfback' already"):
        accept(checked, results)
