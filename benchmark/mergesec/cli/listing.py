"""What ``bench list`` prints. Needs no parser of options, which takes longer to load than the list."""

from __future__ import annotations

from collections.abc import Iterable

from mergesec.cli import show
from mergesec.errors import UsageError, nearest
from mergesec.planning.cards import KINDS
from mergesec.planning.catalog import load_catalog
from mergesec.planning.presets import preset_descriptions


def print_list(kind: str = "all", plugins: Iterable[str] = ()) -> None:
    """A table for each kind that was asked for; UsageError for one that is none."""
    kinds = (*KINDS, "grid")
    wanted = kind.rstrip("s") if kind != "all" else "all"
    if wanted not in (*kinds, "all"):
        raise UsageError("kind", f"{kind!r}{nearest(kind, kinds)}")
    catalog = load_catalog(plugins)
    for name in KINDS:
        if wanted not in (name, "all"):
            continue
        cards = [catalog.entries[name][n].card for n in sorted(catalog.entries[name])]
        if name in ("attack", "defense"):
            rows = [[c.name, c.threat, " ".join(c.hooks), c.summary] for c in cards]
            show.table("", [name, "threat", "hooks", ""], rows)
        else:
            show.table("", [name, ""], [[c.name, c.summary] for c in cards])
    if wanted in ("grid", "all"):
        show.table("", ["grid", ""], preset_descriptions())
