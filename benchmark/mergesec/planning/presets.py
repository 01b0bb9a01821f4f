"""The grids that ship with the engine. Read without YAML, so that ``bench list`` stays instant."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from mergesec.errors import nearest


def presets_folder() -> Path:
    return Path(__file__).parents[1] / "conf"


def preset_names() -> list[str]:
    return sorted(p.stem for p in presets_folder().glob("*.yaml"))


def nearest_preset(grid: str, also: Iterable[str] = ()) -> str:
    """What a message says to a name that no preset has: the closest one, or all of them, small siblings in one word."""
    known = {*preset_names(), *also}
    close = nearest(grid, known)
    if close.startswith("; did"):
        return close
    return nearest(grid, {n for n in known if not n.endswith("-smoke")}) + ", and several with -smoke behind"


def preset_descriptions() -> list[list[str]]:
    """(name, description) rows."""
    rows = []
    for name in preset_names():
        text = (presets_folder() / f"{name}.yaml").read_text(encoding="utf-8")
        match = re.search(r"^description: *(.*)$", text, re.MULTILINE)
        rows.append([name, match[1].strip("\"'") if match else ""])
    return rows
