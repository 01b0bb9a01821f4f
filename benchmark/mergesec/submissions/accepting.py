"""An accepted entry's records among the results, each marked with what was verified of it."""

from __future__ import annotations

import json
from pathlib import Path

from mergesec.errors import UsageError
from mergesec.evidence.records import SUBMISSION, Record, grid_folder, read_records
from mergesec.execution.session import publish
from mergesec.files import write_atomic
from mergesec.submissions.check import Checked
from mergesec.submissions.entry import RECORDS


def accept(checked: Checked, results: Path) -> list[Path]:
    """Write the records and boards of an entry that was not refused; the paths of the boards. UsageError if the
    results hold a grid of that name which is not of the same method's entry."""
    home = grid_folder(results / "records", checked.grid)
    method = checked.entry.submission.method
    if (home / "grid.json").is_file():
        before = read_records(results / "records", checked.grid)
        if any(_mark(record).get("method") != method for record in before):
            raise UsageError("--results", f"has a grid {checked.grid!r} already; name the entry's grid anew")
    records = [_marked(record, checked) for record in checked.records.values()]
    for record in records:
        data = json.dumps(record.model_dump(mode="json"), sort_keys=True) + "\n"
        write_atomic(home / f"{record.cell}.json", data.encode())
    manifest = checked.entry.folder / RECORDS / checked.grid / "grid.json"
    write_atomic(home / "grid.json", manifest.read_bytes())
    return publish(records, results, checked.grid)[1]


def _mark(record: Record) -> dict[str, object]:
    found = record.provenance.get(SUBMISSION)
    return found if isinstance(found, dict) else {}


def _marked(record: Record, checked: Checked) -> Record:
    """A record with whose it is, and whether this cell was run again here."""
    submission = checked.entry.submission
    mark = {
        "method": submission.method, "code": submission.code.digest, "records": submission.records,
        "rerun": record.cell in checked.report.rerun,
    }  # fmt: skip
    return record.model_copy(update={"provenance": {**record.provenance, SUBMISSION: mark}})
