"""Columns that tell whose a number is, and what others found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergesec.errors import UsageError
from mergesec.evidence.boards import make_boards
from mergesec.evidence.estimates import Board
from mergesec.evidence.external import External, read_external
from mergesec.evidence.records import SUBMISSION, Record, count
from mergesec.evidence.tables import display, marks


def record(defense: str, merged: int, **fields: Any) -> Record:
    """A protection's cell: 90 of 100 alone and before, 10 after protecting, ``merged`` after the attack."""
    rates = {
        "expert": 90,
        "published": 90,
        "recovered": 90,
        "clean_merge": 90,
        "protected_merge": 10,
        "merge": merged,
    }
    counts = {f"acc/{role}/{t}": count(np.arange(100) < k) for role, k in rates.items() for t in "ab"}
    given: dict[str, Any] = {
        "cell": f"{defense}-{fields.get('seed', 0)}", "grid": "g", "suite": "s", "backbone": "b",
        "protocol": "inductive", "threat": "protection", "merging": "ta", "attack": "aga", "defense": defense,
        "subject": "a", "target_class": 0, "experts": ["a", "b"], "seed": 0, "status": "done", "counts": counts,
    }  # fmt: skip
    return Record(**{**given, **fields})


def submitted(rerun: bool) -> dict[str, Any]:
    return {SUBMISSION: {"method": "p", "rerun": rerun}}


def board(records: list[Record], *external: External) -> Board:
    return next(b for b in make_boards(records, external) if b.name == "protection")


def external(value: float, **fields: Any) -> External:
    given = {"grid": "g", "board": "protection", "defense": "p", "value": value, "by": "Doe", "date": "2026-05-01",
             "url": "https://example.org/doe"}  # fmt: skip
    return External.model_validate({**given, **fields})


def test_a_row_says_how_many_of_its_cells_were_run_again() -> None:
    records = [record("p", 20, seed=0, provenance=submitted(True)), record("p", 20, seed=1, provenance=submitted(False)),
               record("q", 20), record("r", 20, provenance=submitted(False), contained="no")]  # fmt: skip
    rows = board(records).frame.set_index("defense")
    assert rows["verified"].to_dict() == {"p": "re-run 1/2", "q": "re-run", "r": "claimed"}
    assert rows["contained"].to_dict() == {"p": "yes", "q": "yes", "r": "no"}
    assert any(note.startswith("claimed: 2 cells") for note in marks(records))


def test_a_mark_that_nobody_can_read_is_a_claim() -> None:
    for mark in (None, "yes", {"rerun": "true"}, {}, 1):
        fields = {} if mark is None else {SUBMISSION: mark}
        rows = board([record("p", 20, provenance=fields)]).frame
        assert rows["verified"][0] == ("re-run" if mark is None else "claimed")


def test_what_is_as_it_should_be_takes_no_room() -> None:
    plain = board([record("p", 20), record("q", 30)])
    assert not {"verified", "contained", "external", "external_by"} & set(display(plain)[0])
    assert {"verified", "contained", "external", "external_by"} <= set(plain.frame)
    claimed = board([record("p", 20, provenance=submitted(False)), record("q", 30)])
    assert "verified" in display(claimed)[0] and "contained" not in display(claimed)[0]


def test_a_worse_number_of_others_decides_where_a_row_stands() -> None:
    """p recovers 12.5 % by the boards' attacks and q 25 %; others recovered 80 % of p."""
    records = [record(d, k, seed=s) for d, k in (("p", 20), ("q", 30)) for s in range(5)]
    before, after = board(records), board(records, external(0.5), external(0.8, by="Roe"))
    assert list(before.frame["defense"]) == ["p", "q"]
    assert list(after.frame["defense"]) == ["q", "p"]
    rows = after.frame.set_index("defense")
    assert (rows["external"]["p"], rows["external_by"]["p"]) == (0.8, "Roe")
    assert np.isnan(rows["tier"]["p"]) and not np.isnan(rows["tier"]["q"])
    header, shown = display(after)
    assert [shown[1][header.index(c)] for c in ("external", "external_by")] == ["80.0", "Roe"]
    assert "external" in after.note
    numbers = ["worst_recovery", "worst_recovery_low", "MMP+"]
    assert rows[numbers].equals(before.frame.set_index("defense").loc[["q", "p"], numbers])


def test_a_number_that_is_not_worse_changes_nothing() -> None:
    records = [record("p", 20), record("q", 30)]
    assert board(records, external(0.1)).frame.equals(board(records).frame)


def test_external_findings_are_read_with_suspicion(tmp_path: Path) -> None:
    assert read_external(tmp_path, "g") == []
    path = tmp_path / "external.json"
    path.write_text(json.dumps([external(0.8).model_dump(), external(0.9, grid="h").model_dump()]))
    assert read_external(tmp_path, "g") == [external(0.8)]
    good = external(0.8).model_dump()
    for wrong, message in [
        ("{", "external.json"), ("[" * 100_000, "external.json"),
        (json.dumps([{**good, "url": "javascript:alert(1)"}]), "0.url"),
        (json.dumps([{**good, "value": "0.8"}]), "0.value"),
        (json.dumps([{**good, "board": "clean"}]), "'clean' is not one of protection, backdoor_defenses"),
        (json.dumps([{**good, "verified": True}]), "0.verified"),
    ]:  # fmt: skip
        path.write_text(wrong)
        with pytest.raises(UsageError, match=message):
            read_external(tmp_path, "g")
    with pytest.raises(UsageError, match="protection has no row 'p'"):
        board([record("q", 20)], external(0.8))
