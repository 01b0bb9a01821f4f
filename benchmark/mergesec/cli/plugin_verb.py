"""``bench plugin check FILE``: the conformance battery on a stranger's component."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergesec.cli import show


def main(
    action: Annotated[str, typer.Argument(help="check")],
    file: Annotated[Path, typer.Argument(help="the plugin file")],
) -> None:
    from mergesec.errors import UsageError, nearest

    if action != "check":
        raise UsageError("action", f"{action!r}{nearest(action, ['check'])}")
    from mergesec.conformance.battery import check_file
    from mergesec.planning.catalog import load_catalog

    found = check_file(file, load_catalog())
    word = {True: "pass", False: "FAIL", None: "skip"}
    show.table(
        "", ["component", "check", "", "why"], [[w, c.name, word[c.passed], c.message] for w, c in found]
    )
    if any(c.passed is False for _, c in found):
        raise typer.Exit(1)
