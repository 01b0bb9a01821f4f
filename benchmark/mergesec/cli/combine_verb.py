"""``bench combine``: records of several machines as one folder, with its boards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergesec.cli import show


def main(
    folders: Annotated[
        list[str], typer.Argument(metavar="A B ...", help="folders of results, or of one grid's records")
    ],
    out: Annotated[str, typer.Option("--out", help="folder of results for all of them; must be new")],
    grid: Annotated[str, typer.Option("--grid", help="only this grid", show_default=False)] = "",
    name: Annotated[
        str,
        typer.Option("--name", help="join grids of several names as one of this name", show_default=False),
    ] = "",
) -> None:
    from mergesec.evidence.combining import combine, write_joined
    from mergesec.evidence.records import grid_folder
    from mergesec.evidence.sides import read_side
    from mergesec.execution.session import publish
    from mergesec.files import check_writable

    home = Path(out)
    if name:
        grid_folder(home, name)  # a plain name, or an error
    joined = combine([read_side(folder, grid) for folder in folders], name)
    check_writable(home, "--out")
    write_joined(home / "records", joined)
    for one in joined:
        _, paths = publish(one.records, home, one.name)
        done = sum(record.status == "done" for record in one.records)
        twice = f", {show.many(one.shared, 'cell')} the same on several sides" if one.shared else ""
        print(f"{one.name}: {done} of {show.many(len(one.records), 'cell')} done{twice}")
        for path in paths:
            print(path)
