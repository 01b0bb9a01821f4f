"""``bench site``: boards, pictures, methods and cells as pages, from records alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mergesec.cli.options import Plugins, Results, results_folder

MOST_TOLD = 10
"""Files that are left out and named one by one."""


def main(
    results: Results = None,
    out: Annotated[str | None, typer.Option(help="folder; default: site under --results")] = None,
    plugin: Plugins = None,
) -> None:
    from mergesec.api.grids import write_site
    from mergesec.cli.show import many

    home = results_folder(results)
    built = write_site(home, Path(out) if out else None, plugin or ())
    for broken in built.broken[:MOST_TOLD]:
        print(f"warning: left out: {broken}", file=sys.stderr)
    if len(built.broken) > MOST_TOLD:
        print(f"warning: {len(built.broken) - MOST_TOLD} more files are left out; downloads/index.html lists them",
              file=sys.stderr)  # fmt: skip
    print(f"{many(built.grids, 'grid')}, {many(built.cells, 'cell')}, {many(built.files, 'file')}, "
          f"{built.bytes / 1e6:.1f} MB")  # fmt: skip
    print(built.start)
