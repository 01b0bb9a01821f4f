"""``bench cache``: look after the artifact store."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from mergesec.cli import show
from mergesec.cli.complete import one_of
from mergesec.errors import UsageError, nearest

if TYPE_CHECKING:
    from mergesec.execution.failures import Failures
    from mergesec.execution.store import Store, Stored

ACTIONS = ("show", "list", "verify", "clear")
FAILURES = "failures"
_AGES = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SIZES = {
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}


def main(
    action: Annotated[
        str, typer.Argument(help="show, list, verify or clear", autocompletion=one_of(*ACTIONS))
    ] = "show",
    kind: Annotated[
        str | None, typer.Option(help="only steps of this kind, e.g. merge; or checkpoints, failures")
    ] = None,
    older_than: Annotated[
        str | None, typer.Option(help="clear only what no run made or read for so long: 30d, 12h, 45m, 2w")
    ] = None,
    keep_under: Annotated[
        str | None,
        typer.Option(help="clear what was not used for longest until the store is this small: 20GB"),
    ] = None,
) -> None:
    from mergesec.execution.failures import Failures
    from mergesec.execution.store import Store
    from mergesec.files import default_root

    if action not in ACTIONS:
        raise UsageError("action", f"{action!r}{nearest(action, ACTIONS)}")
    for option, given in (("--older-than", older_than), ("--keep-under", keep_under)):
        if given is not None and action != "clear":
            raise UsageError(option, f"goes with clear, not with {action}")
    age = 0.0 if older_than is None else _seconds(older_than)
    most = None if keep_under is None else _bytes(keep_under)
    store, failures = Store(default_root()), Failures(default_root())
    stored = store.contents()
    found = _of_kind(kind, stored, failures)
    if action == "show":
        _show(store, found, failures if kind in (None, FAILURES) else ())
    elif action == "list":
        _list(found, failures, kind)
    elif action == "verify":
        _verify(store, found)
    else:
        found = [item for item in found if time.time() - item.used >= age]
        if most is not None:
            found = _least_recent(found, sum(item.bytes for item in stored) - most)
        _clear(store, found)
        if most is None:
            _forget(failures, kind, age)


def _of_kind(kind: str | None, stored: list[Stored], failures: Iterable[object]) -> list[Stored]:
    """What is stored of a kind; UsageError if nothing is."""
    found = [item for item in stored if kind in (None, item.kind)]
    has_failures = any(True for _ in failures)
    if kind is not None and not found and not (kind == FAILURES and has_failures):
        kinds = {item.kind for item in stored} | ({FAILURES} if has_failures else set())
        raise UsageError("--kind", f"nothing stored of kind {kind!r}{nearest(kind, kinds)}")
    return found


def _show(store: Store, found: Iterable[Stored], failures: Iterable[object]) -> None:
    number, size = Counter[str](), Counter[str]()
    for item in found:
        number[item.kind] += 1
        size[item.kind] += item.bytes
    rows = [[kind, str(number[kind]), f"{size[kind] / 1e6:.1f}"] for kind in number]
    failed = sum(1 for _ in failures)
    rows += [[FAILURES, str(failed), ""]] if failed else []
    rows.append(["all", str(number.total()), f"{size.total() / 1e6:.1f}"])
    show.table(str(store.root), ["kind", "number", "MB"], rows)


def _list(found: Iterable[Stored], failures: Failures, kind: str | None) -> None:
    now = time.time()
    rows = [
        [item.kind, item.key, f"{item.bytes / 1e6:.3f}", show.duration(max(0.0, now - item.used))]
        for item in sorted(found, key=lambda item: item.used)
    ]
    if kind in (None, FAILURES):
        rows += [[FAILURES, f"{f.key} {f.label}", "", show.duration(failures.age(f.key))] for f in failures]
    show.table("", ["kind", "what", "MB", "last used before"], rows)


def _verify(store: Store, found: list[Stored]) -> None:
    bad = 0
    for item in found:
        if not store.verify(item):
            bad += 1
            print(f"corrupt, removed: {item.kind} {item.key}")
    print(f"{len(found)} artifacts and checkpoints read, {bad} corrupt")
    raise typer.Exit(1 if bad else 0)


def _least_recent(found: list[Stored], excess: int) -> list[Stored]:
    """What goes, longest unused first, so that ``excess`` bytes are freed."""
    chosen = []
    for item in sorted(found, key=lambda item: item.used):
        if excess <= 0:
            break
        chosen.append(item)
        excess -= item.bytes
    return chosen


def _clear(store: Store, found: list[Stored]) -> None:
    for item in found:
        store.drop(item)
    size = sum(item.bytes for item in found) / 1e6
    print(f"removed {show.many(len(found), 'artifact')}, {size:.1f} MB")
    if found:
        print("what records rest on and is gone, the next run of their grids computes again")


def _forget(failures: Failures, kind: str | None, age: float) -> None:
    forgotten = failures.clear(None if kind == FAILURES else kind, age)
    if forgotten:
        print(f"forgot {show.many(forgotten, 'failure')}")


def _seconds(text: str) -> float:
    """``30d`` in seconds; UsageError if it is no age."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([mhdw])", text.strip())
    if match is None:
        raise UsageError("--older-than", f"{text!r} is no age; valid: a number and m, h, d or w, as in 30d")
    return float(match[1]) * _AGES[match[2]]


def _bytes(text: str) -> int:
    """``20GB`` in bytes; UsageError if it is no size."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?([KMGT]i?B)", text.strip())
    if match is None:
        units = ", ".join(_SIZES)
        raise UsageError(
            "--keep-under", f"{text!r} is no size; valid: a number and one of {units}, as in 20GB"
        )
    return int(float(match[1]) * _SIZES[match[2]])
