"""Packing an entry: its digests, and the claimed numbers that its records say."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import yaml

from mergesec.errors import UsageError
from mergesec.evidence.records import Record, read_records
from mergesec.execution.scheduler import Reporter
from mergesec.execution.session import Finished, placed_grid, planned, run_session
from mergesec.files import write_atomic
from mergesec.submissions.check import Asked, desk_for
from mergesec.submissions.claims import supported
from mergesec.submissions.entry import (
    FILE,
    RECORDS,
    Entry,
    Submission,
    digest_of_files,
    read_entry,
    record_files,
)
from mergesec.submissions.rerun import Manner

_HEAD = """\
# An entry to the benchmark: docs/submitting.md says what each field means.
# `bench submit run` runs the grid and fills digests and claimed values; `bench submit check` is what maintainers run.
"""


class Packed(NamedTuple):
    """What was filled in."""

    submission: Submission
    records: list[Record]


def written(submission: Submission) -> str:
    """The text of a ``submission.yaml``."""
    fields = submission.model_dump(mode="json")
    return _HEAD + yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=100)


def pack(folder: Path) -> Packed:
    """Fill in the digests of files and records, and each claim's value from the records of the entry's grid.
    UsageError where there are none, or a claim names no number."""
    entry = read_entry(folder)
    homes = sorted(p.parent.name for p in (folder / RECORDS).glob("*/grid.json"))
    if len(homes) != 1:
        found = f"found: {', '.join(homes)}" if homes else "there are none"
        raise UsageError(
            RECORDS, f"an entry has the records of one grid, {found}; bench submit run makes them"
        )
    records = read_records(folder / RECORDS, homes[0])
    filled = []
    for one in supported(entry.submission.claims, records):
        if one.found != one.found:
            raise UsageError(f"{FILE}: claims", f"{one.name}: these records give no number for it")
        filled.append(one.claim.model_copy(update={"value": round(one.found, 4)}))
    submission = entry.submission.model_copy(
        update={
            "code": entry.submission.code.model_copy(
                update={"digest": digest_of_files(entry.folder, entry.code)}
            ),
            "records": digest_of_files(folder, record_files(folder)),
            "claims": filled,
        }
    )
    write_atomic(folder / FILE, written(submission).encode())
    return Packed(submission, records)


def run_entry(folder: Path, asked: Asked, manner: Manner, reporter: Reporter) -> Finished:
    """Run an entry's grid with its plugins. Where every cell is done, the records take the place of those in its
    folder, ready to be packed."""
    entry: Entry = read_entry(folder)
    desk = desk_for(entry, asked.data_root, asked.store)
    session = planned(desk, placed_grid(desk, str(entry.grid), asked.overrides))
    with tempfile.TemporaryDirectory() as results:  # a guest does not see the folder that records go to
        place = Path(results)
        finished = run_session(
            session, place, reporter, manner.device, manner.jobs, 1, manner.timeout, manner.contained
        )
        if all(record.status == "done" for record in finished.records):
            shutil.rmtree(folder / RECORDS, ignore_errors=True)
            shutil.copytree(place / "records", folder / RECORDS)
    return finished
