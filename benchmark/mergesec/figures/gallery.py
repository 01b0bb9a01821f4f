"""Every picture that a grid's records allow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mergesec.evidence.boards import make_boards
from mergesec.evidence.estimates import Reader
from mergesec.evidence.records import Record
from mergesec.figures.backdoor import backdoor_pictures
from mergesec.figures.canvas import Picture, style, write_picture
from mergesec.figures.clean import clean_pictures
from mergesec.figures.protection import protection_pictures


def make_figures(records: Sequence[Record]) -> list[Picture]:
    """All pictures of these records, in the look they are to be written in. UsageError without matplotlib."""
    with style():
        boards = {b.name: b for b in make_boards(records)}
        reader = Reader()
        return [
            *clean_pictures(records, boards, reader),
            *protection_pictures(records, boards, reader),
            *backdoor_pictures(records, boards),
        ]


def write_figures(
    folder: Path, pictures: Sequence[Picture], tidy: bool = False, spare: str | tuple[str, ...] = ()
) -> list[Path]:
    """SVG and PNG of every picture; the same bytes for the same records.

    ``tidy``: the folder holds pictures of one grid only, so others in it are old ones and removed, but for
    those whose names begin with (one of) ``spare``.
    """
    with style():
        paths = [path for picture in pictures for path in write_picture(folder, picture)]
    for old in {*folder.glob("*.svg"), *folder.glob("*.png")} - set(paths) if tidy else ():
        if not (spare and old.name.startswith(spare)):
            old.unlink()
    return paths
