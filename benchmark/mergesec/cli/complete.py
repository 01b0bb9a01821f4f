"""What a shell may fill in for a word. Nothing here reads more than names and cards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mergesec.planning.presets import preset_names


def grid_names(incomplete: str) -> list[str]:
    """Presets, and grid files below what is typed so far."""
    return [*_starting(preset_names(), incomplete), *_yaml_files(incomplete)]


def run_names(incomplete: str) -> list[str]:
    """Grids that have records in the default folder, and grid files."""
    runs = sorted(
        {
            path.parent.name
            for path in Path().glob("*/records/*/grid.json")
            if path.parts[0] in ("results", "outputs")
        }
    )
    return [*_starting(runs, incomplete), *_yaml_files(incomplete)]


def one_of(*names: str) -> Callable[[str], list[str]]:
    """Words of a fixed choice."""
    return lambda incomplete: _starting(list(names), incomplete)


def component_names(incomplete: str) -> list[str]:
    """Everything installed, whatever its kind."""
    from mergesec.planning.catalog import load_catalog

    return _starting(sorted({entry.card.name for entry in load_catalog()}), incomplete)


def merge_names(incomplete: str) -> list[str]:
    """Merge methods."""
    from mergesec.planning.catalog import load_catalog

    return _starting(sorted(load_catalog().entries["merging"]), incomplete)


def _starting(names: list[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _yaml_files(incomplete: str) -> list[str]:
    folder = incomplete.rpartition("/")[0]
    place = Path(folder or ("/" if incomplete.startswith("/") else "."))
    found = sorted(place.glob("*/")) + sorted(place.glob("*.yaml"))
    shown = [f"{path.as_posix()}/" if path.is_dir() else path.as_posix() for path in found]
    return _starting(shown, incomplete)
