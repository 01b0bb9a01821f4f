"""Names that could be taken for others."""

from __future__ import annotations

import pytest

from mergesec.planning.catalog import load_catalog
from mergesec.submissions.names import skeleton, taken_for


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("ties", "ties"),
        ("TIES", "ties"),
        ("tіes", "ties"),  # a Cyrillic і
        ("t1es", "ties"),
        ("tiés", "ties"),
        ("task-arithmetic", "task_arithmetic"),
        ("taskarithrnetic", "task_arithmetic"),
        ("vvag", "wag"),
        ("none", "none"),
    ],
)
def test_a_name_that_looks_like_a_known_one_is_found(name: str, other: str) -> None:
    known = ["none", *(entry.card.name for entry in load_catalog())]
    assert taken_for(name, known) == other


@pytest.mark.parametrize("name", ["tied", "ties_two", "norm_clip", "halfway"])
def test_other_names_are_free(name: str) -> None:
    assert taken_for(name, [entry.card.name for entry in load_catalog()]) == ""


def test_no_two_shipped_components_of_a_kind_look_alike() -> None:
    seen: dict[tuple[str, str], str] = {}
    for entry in load_catalog():
        place = (entry.card.kind, skeleton(entry.card.name))
        assert place not in seen, f"{entry.card.name} and {seen.get(place)}"
        seen[place] = entry.card.name
