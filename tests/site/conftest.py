"""A small folder of results and the site of it, made once."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from extras import needs
from shelves import HOSTILE, backdoor, clean, protection, shelve

import mergesec
from mergesec.evidence.records import Component, Record
from mergesec.site.building import Built

EVIL = f"evil(note={HOSTILE})"


def backdoors() -> list[Record]:
    """Two attacks, three merges along a coefficient, two defenses, two seeds; one defense's parameter is hostile."""
    found = []
    for seed in (0, 1):
        for attack, strength in (("bad(rate=0.1)", 0.9), ("bad(rate=0.2)", 0.95), ("mild", 0.3)):
            for x in (0.2, 0.4, 0.6):
                merge = Component(name="ta", parameters={"scaling": x})
                for defense, kept in (("none", 1.0), (EVIL, 0.5)):
                    parts = {"merging": merge, "attack": Component(name=attack.partition("(")[0])}
                    if defense != "none":
                        parts["defense"] = Component(name="evil", parameters={"note": HOSTILE})
                    found.append(
                        backdoor(
                            hit=strength * kept * x / 0.6, accurate=0.7 - 0.1 * x, attack=attack, defense=defense,
                            merging=f"ta(scaling={x})", seed=seed, components=parts, grid="doors",
                        )
                    )  # fmt: skip
    return found


def locks() -> list[Record]:
    """A protection that is undone and one that holds, and a cell that failed with a hostile reason."""
    found = [
        protection(merged=merged, defense=defense, attack=attack, seed=seed, grid="locks")
        for seed in (0, 1)
        for defense, attack, merged in (
            ("lock", "none", 0.2), ("lock", "aga", 0.79), ("hold", "none", 0.2), ("hold", "aga", 0.25),
        )
    ]  # fmt: skip
    failed = protection(defense="lock", attack="broken", status="failed", reason=HOSTILE, grid="locks")
    merges = [clean(0.8, merging="ta", grid="locks"), clean(0.7, merging="avg", grid="locks")]
    return [*found, failed, *merges]


class Made(NamedTuple):
    """Where results lie and what became of them."""

    results: Path
    built: Built

    @property
    def out(self) -> Path:
        return self.built.start.parent


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The site of two grids, one record of which is broken."""
    needs("jinja2")
    results = tmp_path_factory.mktemp("results")
    shelve(results, "doors", backdoors(), name="doors", axes={"merging": ["ta"]})
    home = shelve(results, "locks", locks())
    first = sorted(home.glob("protection-*.json"))[0]
    first.write_text(first.read_text().replace('"k":20', '"k":21'))
    return Made(results, mergesec.write_site(results, results / "site"))
