"""Every picture that a grid's records allow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mergesec.errors import UsageError, nearest
from mergesec.evidence.boards import make_boards
from mergesec.evidence.estimates import Reader
from mergesec.evidence.records import Record
from mergesec.figures.backdoor import backdoor_pictures
from mergesec.figures.canvas import DPI, ENDINGS, SAID, WIDTH, Picture, style, write_picture
from mergesec.figures.clean import clean_pictures
from mergesec.figures.protection import protection_pictures


def make_figures(records: Sequence[Record], width: float = WIDTH) -> list[Picture]:
    """All pictures of these records, in the look they are to be written in, ``width`` inches wide. UsageError without
    matplotlib."""
    with style():
        boards = {b.name: b for b in make_boards(records)}
        reader = Reader()
        return [
            *clean_pictures(records, boards, reader, width),
            *protection_pictures(records, boards, reader, width),
            *backdoor_pictures(records, boards, width),
        ]


def chosen(pictures: Sequence[Picture], names: Sequence[str]) -> list[Picture]:
    """The pictures whose names are given or begin so; all of them without names. UsageError for a name that none
    has."""
    for name in names:
        if not any(picture.name.startswith(name) for picture in pictures):
            raise UsageError("--only", f"no picture {name!r}{nearest(name, [p.name for p in pictures])}")
    return [p for p in pictures if not names or p.name.startswith(tuple(names))]


def write_figures(
    folder: Path, pictures: Sequence[Picture], tidy: bool = False, spare: str | tuple[str, ...] = (), dpi: float = DPI,
    endings: Sequence[str] = ENDINGS,
) -> list[Path]:  # fmt: skip
    """Files of every picture; the same bytes for the same records.

    ``tidy``: the folder holds pictures of one grid only, so others in it are old ones and removed, but for
    those whose names begin with (one of) ``spare``.
    """
    with style():
        paths = [path for picture in pictures for path in write_picture(folder, picture, dpi, endings)]
    old = {path for ending in SAID for path in folder.glob(f"*.{ending}")} if tidy else set()
    for path in old - set(paths):
        if not (spare and path.name.startswith(spare)):
            path.unlink()
    return paths
