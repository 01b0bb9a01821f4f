"""Records → all boards they support."""

from __future__ import annotations

from collections.abc import Sequence

from mergesec.evidence.backdoor import backdoor_boards
from mergesec.evidence.clean import clean_board
from mergesec.evidence.cost import cost_board, total_board
from mergesec.evidence.estimates import Board, Reader, canonical
from mergesec.evidence.external import External, beside
from mergesec.evidence.generation import generation_board
from mergesec.evidence.language import language_board
from mergesec.evidence.protection import protection_boards
from mergesec.evidence.records import Record
from mergesec.evidence.refusal import refusal_board
from mergesec.evidence.secrets import secrets_board
from mergesec.evidence.transfer import transfer_board


def make_boards(records: Sequence[Record], external: Sequence[External] = ()) -> list[Board]:
    """All boards these records support, whatever order they come in. The two threat models never share one.
    ``external``: what others found, to stand beside. UsageError if two records are of the same cell."""
    records = canonical(records)
    reader = Reader()
    boards = [
        clean_board(records, reader),
        *protection_boards(records, reader),
        *backdoor_boards(records, reader),
        transfer_board(records, reader),
        generation_board(records),
        language_board(records),
        secrets_board(records),
        refusal_board(records),
    ]
    boards += [cost_board(records), total_board(records)]
    return beside([b for b in boards if b is not None], external)
