"""External evaluations: a worse number for a defense than the boards' own attacks found, and who found it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from mergesec.errors import UsageError
from mergesec.evidence.estimates import Board
from mergesec.files import brief

FILE = "external.json"
MEASURES = {"protection": "worst_recovery", "backdoor_defenses": "worst_backdoor"}
"""The boards on which defenses are judged by the worst that is known of them, and by which measure; lower is better."""
_MOST = 1 << 20


class External(BaseModel):
    """One finding of others, on a board of a grid."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    grid: str = Field(max_length=100)
    board: str = Field(max_length=100)
    defense: str = Field(max_length=500)
    """The row, as the board names it."""
    value: float = Field(allow_inf_nan=False)
    """Of the board's measure, a share."""
    by: str = Field(min_length=1, max_length=200)
    url: str = Field(pattern=r"^https://[!-~]{1,500}$")
    """Where the code and the records of it are."""
    date: str = Field(pattern=r"^\d{4}-\d\d-\d\d$")


def read_external(results: Path, grid: str) -> list[External]:
    """What ``results/external.json`` tells of a grid; nothing if there is no such file. UsageError if it is
    malformed."""
    path = results / FILE
    if not path.is_file():
        return []
    if path.stat().st_size > _MOST:
        raise UsageError(FILE, f"more than {_MOST} bytes")
    try:
        found = TypeAdapter(list[External]).validate_json(json.dumps(json.loads(path.read_bytes())))
    except (ValueError, RecursionError) as error:
        told = (
            error.errors(include_url=False)[0] if isinstance(error, ValidationError) else {"msg": str(error)}
        )
        spot = ".".join(map(str, told.get("loc", ())))
        raise UsageError(FILE, f"{spot}: {told['msg']}"[:300]) from None
    for one in found:
        if one.board not in MEASURES:
            raise UsageError(FILE, f"{brief(one.board)!r} is not one of {', '.join(MEASURES)}")
    return [one for one in found if one.grid == grid]


def beside(boards: Sequence[Board], external: Sequence[External]) -> list[Board]:
    """The boards with the columns ``external`` and ``external_by`` on those that judge by the worst that is known.
    UsageError for a finding whose row is not there."""
    for one in external:
        rows = [str(d) for b in boards if b.name == one.board for d in b.frame["defense"]]
        if one.defense not in rows:
            raise UsageError(FILE, f"{one.grid}: {one.board} has no row {brief(one.defense)!r}")
    return [
        _beside(board, [one for one in external if one.board == board.name])
        if board.name in MEASURES
        else board
        for board in boards
    ]


def _beside(board: Board, external: Sequence[External]) -> Board:
    """A finding that is not worse than the board's own number changes nothing. One that is decides where the row
    stands, and the row has no tier: no sample of the finding is here to be compared."""
    worst: dict[str, External] = {}
    for one in external:
        if one.defense not in worst or one.value > worst[one.defense].value:
            worst[one.defense] = one
    measure, frame = MEASURES[board.name], board.frame.copy()
    found = [worst.get(str(defense)) for defense in frame["defense"]]
    own = [float(value) for value in frame[measure]]
    beaten = [f if f is not None and not v >= f.value else None for f, v in zip(found, own, strict=True)]
    frame["external"] = [f.value if f else math.nan for f in beaten]
    frame["external_by"] = [f.by if f else "" for f in beaten]
    if not any(beaten):
        return replace(board, frame=frame)
    frame["tier"] = frame["tier"].mask(frame["external"].notna())
    known = frame[[measure, "external"]].max(axis=1)
    order = known.sort_values(kind="stable", na_position="last").index
    note = " external: a worse number that others found, which decides the order; it has no tier."
    return replace(board, frame=frame.loc[order].reset_index(drop=True), note=board.note + note)
