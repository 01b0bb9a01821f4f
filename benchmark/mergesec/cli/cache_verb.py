"""``bench cache``: look after the artifact store."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import typer

from mergesec.cli import show
from mergesec.cli.complete import one_of

ACTIONS = ("show", "verify", "clear")


def main(
    action: Annotated[
        str, typer.Argument(help="show, verify or clear", autocompletion=one_of(*ACTIONS))
    ] = "show",
    kind: Annotated[str | None, typer.Option(help="only steps of this kind, e.g. merge")] = None,
) -> None:
    from mergesec.errors import UsageError, nearest
    from mergesec.execution.failures import Failures
    from mergesec.execution.store import CorruptArtifact, Store
    from mergesec.files import default_root

    if action not in ACTIONS:
        raise UsageError("action", f"{action!r}{nearest(action, ACTIONS)}")
    store = Store(default_root())
    found = [a for a in store.artifacts() if kind in (None, a[0])]
    if kind is not None and not found:
        kinds = {k for k, _, _ in store.artifacts()}
        raise UsageError("--kind", f"nothing stored of kind {kind!r}{nearest(kind, kinds)}")
    if action == "show":
        number, size = Counter[str](), Counter[str]()
        for name, _, n in found:
            number[name] += 1
            size[name] += n
        show.table(
            str(store.root),
            ["kind", "artifacts", "MB"],
            [[k, str(number[k]), f"{size[k] / 1e6:.1f}"] for k in number],
        )
    elif action == "verify":
        bad = 0
        for name, key, _ in found:
            try:
                store.read(name, key)
            except CorruptArtifact:
                bad += 1
                print(f"corrupt, removed: {name} {key}")
        print(f"{len(found)} artifacts read, {bad} corrupt")
        raise typer.Exit(1 if bad else 0)
    else:
        for name, key, _ in found:
            store.remove(name, key)
        Failures(store.root).clear(kind)
        print(f"removed {len(found)} artifacts")
