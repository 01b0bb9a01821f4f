"""The grids that ship with the engine. Read without YAML, so that ``bench list`` stays instant."""

from __future__ import annotations

import re
from pathlib import Path


def presets_folder() -> Path:
    return Path(__file__).parents[1] / "conf"


def preset_names() -> list[str]:
    return sorted(p.stem for p in presets_folder().glob("*.yaml"))


def preset_descriptions() -> list[list[str]]:
    """(name, description) rows."""
    rows = []
    for name in preset_names():
        text = (presets_folder() / f"{name}.yaml").read_text(encoding="utf-8")
        match = re.search(r"^description: *(.*)$", text, re.MULTILINE)
        rows.append([name, match[1].strip("\"'") if match else ""])
    return rows
