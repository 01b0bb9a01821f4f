"""The pictures on pages of results, drawn again from the shipped records: ``python docs/pictures.py [NAME ...]``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from mergesec.errors import UsageError, nearest
from mergesec.evidence.records import read_records
from mergesec.figures.canvas import Picture
from mergesec.figures.gallery import make_figures, write_figures

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "figures"


class Shown(NamedTuple):
    """Which picture of which grid a page shows, and how wide it is drawn."""

    grid: str
    picture: str
    width: float = 6.8


SHOWN = {
    "backdoor-attacks": Shown("mini-backdoor", "backdoor-heat"),
    "backdoor-coefficient": Shown("mini-backdoor-landscape", "backdoor-coefficient-task_arithmetic-scaling"),
    "backdoor-defenses": Shown("mini-backdoor-defenses", "backdoor-heat"),
    "backdoor-experts": Shown("mini-backdoor-many", "backdoor-experts"),
    "backdoor-pareto": Shown("mini-backdoor-defenses", "backdoor-pareto"),
    "protection-frontier": Shown("mini-protection", "protection-frontier"),
    "protection-heat": Shown("mini-protection", "protection-heat-2", 7.6),
    "protection-interpolation": Shown("mini-protection-interpolation", "protection-landscape-slerp-t"),
    "protection-landscape": Shown(
        "mini-protection-landscape", "protection-landscape-task_arithmetic-scaling"
    ),
    "protection-owners": Shown("mini-protection-owners", "protection-owners"),
    "protection-pairs": Shown("mini-protection-pairs", "protection-pairs-params-1"),
}


def main(names: list[str]) -> None:
    """Draw these, or all."""
    for name in names or SHOWN:
        if name not in SHOWN:
            raise UsageError("NAME", f"{name!r}{nearest(name, SHOWN)}")
    drawn: dict[tuple[str, float], dict[str, Picture]] = {}
    for name in names or SHOWN:
        shown = SHOWN[name]
        place = (shown.grid, shown.width)
        if place not in drawn:
            records = read_records(ROOT / "results" / "records", shown.grid)
            drawn[place] = {picture.name: picture for picture in make_figures(records, shown.width)}
        picture = drawn[place][shown.picture]
        print(*write_figures(FOLDER, [Picture(name, picture.figure)], endings=["svg"]))


if __name__ == "__main__":
    main(sys.argv[1:])
