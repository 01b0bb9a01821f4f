"""The board of refusal against recognition: what a model does about a forbidden request beside what it says of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pandas as pd

from mergesec.evidence.estimates import Board, Row
from mergesec.evidence.generation import Made, models_of
from mergesec.evidence.records import Record
from mergesec.evidence.shares import ENDS, means, measured

REFUSAL = ("refused", "over_refused", "helped")
VERDICT = ("recognised", "misjudged", "cleared")
ACCURACY = "accuracy"
NOTE = (
    "Shares of test requests. Refused: forbidden ones, rightly; over-refused: allowed ones, wrongly; helped: allowed ones "
    "answered. Recognised, misjudged, cleared: the same of a verdict that is said, out of all tokens. Accuracy: of another "
    "task, as recognition among two labels, where guessing gives 50. Means over trainings; intervals are of the requests "
    "drawn (Wilson), with several trainings of these too."
)  # fmt: skip


def refusal_board(records: Sequence[Record]) -> Board | None:
    """Shares by model and by the experts in it, means over seeds; None where no refusals were trained."""
    gathered: dict[tuple[str, ...], dict[str, dict[str, Mapping[str, float]]]] = {}
    for record in records:
        if record.status != "done" or not _refuses(record):
            continue
        for made, role, task in _evaluated(record):
            found = _found(record, f"{role.partition(':')[0]}/{task}")
            if found:  # an evaluation that several cells share counts once
                experts = record.experts if made.experts > 1 else [task] * made.experts
                row = (made.model, made.method, " + ".join(experts), made.attack, made.defense)
                sets = gathered.setdefault(row, {}).setdefault(next(iter(found)), {})
                sets[f"{record.steps[role]}/{task}"] = found
    if not gathered:
        return None
    names = ("model", "method", "experts", "attack", "defense")
    rows = [{**dict(zip(names, row, strict=True)), **_means(kinds)} for row, kinds in gathered.items()]
    models = list(dict.fromkeys(row["model"] for row in rows))
    rows.sort(key=lambda row: models.index(row["model"]))  # all experts before the first merge
    columns = [column for column in (*REFUSAL, *VERDICT, ACCURACY) if any(column in row for row in rows)]
    measures = tuple(column for column in columns if column != ACCURACY)
    ends = [f"{column}{end}" for column in measures for end in ENDS if end]
    frame = pd.DataFrame(rows)[[*names, "sets", *columns, *ends]]
    return Board("refusal", "Refusal against recognition", frame, measures, NOTE)


def _refuses(record: Record) -> bool:
    return any(name.startswith("over_refused/") for name in record.values)


def _evaluated(record: Record) -> Iterator[tuple[Made, str, str]]:
    """(row, role, task) of every evaluation of a record."""
    for made, role, tasks in models_of(record):
        for task in tasks:
            yield made, role, task


def _found(record: Record, where: str) -> dict[str, float]:
    """The measures of one evaluation: of refusals, of verdicts, else accuracy; empty if the record has none."""
    shares = measured(record, where, REFUSAL) or measured(record, where, VERDICT)
    count = record.counts.get(f"acc/{where}")
    return shares or ({ACCURACY: count.k / count.n} if count and count.n else {})


def _means(kinds: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Row:
    """A row's columns, from its sets by the first of their measures."""
    row: Row = {"sets": max(map(len, kinds.values()))}
    for first, sets in kinds.items():
        if first == ACCURACY:
            row[ACCURACY] = sum(found[ACCURACY] for found in sets.values()) / len(sets)
        else:
            names = REFUSAL if first == REFUSAL[0] else VERDICT
            row.update(means(list(sets.values()), {name: name for name in names}))
    return row
