"""What an entry's grid may not leave out of a preset, and when two outcomes are too far apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mergesec.evidence.records import count
from mergesec.planning.catalog import load_catalog
from mergesec.planning.gridspec import load_grid, parse_grid
from mergesec.planning.resolve import Grid, resolve
from mergesec.submissions.claims import removed
from mergesec.submissions.rerun import Pair, differences, drifted, too_far

PRESET = "mini-backdoor-defenses"


@pytest.fixture(scope="module")
def preset() -> Grid:
    return resolve(load_grid(PRESET), load_catalog())


def grid(preset: Grid, **changes: Any) -> Grid:
    fields = preset.spec.model_dump(mode="json")
    axes = changes.pop("axes", {})
    return resolve(parse_grid({**fields, **changes, "axes": {**fields["axes"], **axes}}, "g"), preset.catalog)


def test_the_whole_preset_with_another_defense_lacks_nothing(preset: Grid) -> None:
    assert removed(grid(preset, axes={"defenses": ["none", "wag"]}), preset, "defense") == []


def test_what_is_missing_is_named(preset: Grid) -> None:
    seeds = list(preset.spec.seeds)
    attacks = [a for a in preset.spec.model_dump(mode="json")["axes"]["attacks"] if a != "none"]
    assert len(seeds) > 1 and len(attacks) > 1

    def told(kind: str = "defense", **changes: Any) -> list[str]:
        return removed(grid(preset, **changes), preset, kind)

    assert told(seeds=seeds[:-1]) == [f"seeds: {seeds[-1]} of the preset is missing"]
    (reason,) = told(axes={"attacks": attacks[:-1]})
    assert reason.startswith("axes.attacks: ") and preset.attacks[-1].label in reason
    assert told(protocol="transductive") == ["protocol is not the preset's"]
    assert told(recipe={"epochs": 1}) == ["recipe is not the preset's"]
    assert told(exclude=[{"seed": 0}]) == ["exclude is not the preset's"]
    (reason,) = told("attack", axes={"defenses": ["none"]})
    assert reason.startswith("axes.defenses: ")


def pair(old: np.ndarray[Any, Any], new: np.ndarray[Any, Any], cell: str = "c") -> Pair:
    return Pair("acc", "merge", "a", 0, cell, count(old), count(new))


def test_the_same_outcomes_are_no_difference() -> None:
    bits = np.arange(100) < 50
    found = [pair(bits, bits)]
    assert too_far(found) == []
    (one,) = differences(found)
    assert (one.submitted, one.again, one.low, one.high) == (0.5, 0.5, 0.0, 0.0)


def test_as_many_changes_either_way_are_another_processor() -> None:
    old, new = np.arange(100) < 50, (np.arange(100) + 10) % 100 < 50
    assert old.sum() == new.sum() and (old != new).sum() == 20
    assert too_far([pair(old, new)]) == []
    assert drifted(differences([pair(old, new)])) == []


def test_changes_one_way_are_named_unless_they_are_small() -> None:
    old = np.arange(1000) < 500
    assert too_far([pair(old, np.arange(1000) < 485)]) == []  # 1.5 points: certain, and within the tolerance
    (reason,) = too_far([pair(old, np.arange(1000) < 460, "the-cell")])
    assert reason == "the-cell: acc of merge on a: submitted 50.0, run again 46.0"
    (reason,) = drifted(differences([pair(old, np.arange(1000) < 460)]))
    assert reason.startswith("acc of merge: submitted 50.0, run again 46.0; difference [-5.")


def test_small_changes_one_way_in_many_cells_add_up() -> None:
    """Three of 100 each: no cell for itself is beyond chance once all are counted, their mean is."""
    old, new = np.arange(100) < 50, np.arange(100) < 47
    found = [Pair("acc", "merge", f"t{i}", 0, f"c{i}", count(old), count(new)) for i in range(20)]
    assert too_far(found) == []
    assert len(drifted(differences(found))) == 1


def test_outcomes_over_other_samples_are_never_the_same() -> None:
    old = count(np.zeros(100, bool), np.arange(100) < 50)
    new = count(np.zeros(100, bool), np.arange(100) >= 40)
    assert too_far([Pair("asr", "merge", "a", 0, "c", old, new)]) == []  # no rate differs
    new = count(np.arange(100) >= 90, np.arange(100) >= 40)
    assert len(too_far([Pair("asr", "merge", "a", 0, "c", old, new)])) == 1
