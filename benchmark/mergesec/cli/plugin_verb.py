"""``bench plugin check FILE``: the conformance battery on a stranger's component."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergesec.cli import show
from mergesec.cli.complete import one_of
from mergesec.cli.options import DataRoot


def main(
    action: Annotated[str, typer.Argument(help="check", autocompletion=one_of("check"))],
    file: Annotated[Path, typer.Argument(help="the plugin file")],
    data_root: DataRoot = None,
    why: Annotated[bool, typer.Option("--why", help="also the tracebacks of checks that raised")] = False,
) -> None:
    from mergesec.errors import UsageError, nearest

    if action != "check":
        raise UsageError("action", f"{action!r}{nearest(action, ['check'])}")
    from mergesec.conformance.battery import check_file
    from mergesec.execution.session import local_data
    from mergesec.planning.catalog import load_catalog

    found = check_file(file, load_catalog(), local_data(data_root))
    word = {True: "pass", False: "FAIL", None: "skip"}
    show.table(
        "", ["component", "check", "", "why"], [[w, c.name, word[c.passed], c.message] for w, c in found]
    )
    failed = [(w, c) for w, c in found if c.passed is False]
    for component, check in failed:
        if check.trace and why:
            print(f"{component}: {check.name}\n{check.trace}")
    if any(check.trace for _, check in failed) and not why:
        print("--why shows the tracebacks")
    if failed:
        raise typer.Exit(1)
