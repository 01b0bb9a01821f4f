"""docs/claims.md against docs/claims.py, the boards and the records."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest

from mergesec.errors import UsageError

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "claims.md"


def _generator() -> ModuleType:
    """docs/generate.py, which is a script and in no package."""
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = _generator()
claims = generate.script("claims")
QUERIES = [(c.id, q) for c in claims.CLAIMS for q in (c.query, c.given and c.given[0]) if q is not None]
NOTHING = float("nan")


def _says(query: Any) -> str:
    try:
        claims.reading(query, generate.rows)
    except UsageError as error:
        return str(error)
    return ""


def test_every_query_finds_its_row() -> None:
    found = [f"{name}: {message}" for name, query in QUERIES if (message := _says(query))]
    assert not found, "docs/claims.py asks boards for what they do not have:\n" + "\n".join(found)


def test_the_page_is_what_the_generator_writes() -> None:
    found = list(generate.differences(PAGE.read_text(encoding="utf-8")))
    assert not found, "run `make docs`:\n" + "\n".join(found)


def test_every_claim_is_on_the_page_once() -> None:
    said = re.findall(r'<a id="([^"]+)"></a>', PAGE.read_text(encoding="utf-8"))
    assert sorted(said) == sorted(c.id for c in claims.CLAIMS)
    assert len(set(said)) == len(said)


def test_what_has_no_verdict_says_why() -> None:
    for claim in claims.CLAIMS:
        assert claim.section in claims.SECTIONS, claim.id
        assert (claim.query is None) == (claim.rule is None), claim.id
        assert claim.query is not None or claim.void, claim.id


def _versions(records: Sequence[Any]) -> Iterator[str]:
    """Of the defenses that a claim is about: DAM only stands beside them."""
    for record in records:
        if (name := record.defense.partition("(")[0]) not in ("none", "dam"):
            yield record.provenance["components"][name]["version"]


def test_a_number_that_was_no_fair_test_is_of_a_defense_since_mended() -> None:
    """Once such a row is measured anew its claim must be judged again, and lose its ``void``."""
    for claim in claims.CLAIMS:
        if claim.void and claim.query is not None:
            versions = set(_versions(claims.reading(claim.query, generate.rows).records))
            assert versions == {"1"}, f"{claim.id}: measured anew, so is it still true that {claim.void}?"


def test_records_behind_a_row_give_the_numbers_of_that_row() -> None:
    """The columns that differences are made of, and how many cells and seeds."""
    seen = set()
    for _, query in QUERIES:
        columns = {c for c in (query.column, query.minus) if c in claims._ROLES}
        for filters in (query.rows, {**query.rows, **query.less}):
            for _, row in generate.rows(query.board, filters).iterrows():
                records = claims.behind(query.board, row)
                assert len(records) == row["cells_done" if "cells_done" in row else "sets"], (query, row)
                for column in columns if query.minus or query.less else ():
                    made = claims.rate(query.board.partition("/")[0], records, column).value
                    assert made == pytest.approx(row[column], abs=1e-9), (query, column)
                    seen.add(column)
    assert {"accuracy", "succession", "BA", "MMP-", "MMP+", "UMP-"} <= seen


def _found(value: float, low: float, high: float) -> Any:
    return claims.Reading(value, low, high, [])


@pytest.mark.parametrize(
    ("interval", "rule", "wanted"),
    [
        ((0.60, 0.55, 0.65), claims.least(50, 10), "holds"),
        ((0.55, 0.45, 0.65), claims.least(50, 10), "holds in part"),
        ((0.30, 0.20, 0.40), claims.least(50, 10), "holds in part"),
        ((0.30, 0.05, 0.55), claims.least(50, 10), "undecided"),
        ((0.05, 0.01, 0.10), claims.least(50, 10), "does not"),
        ((0.05, 0.01, 0.10), claims.most(20, 80), "holds"),
        ((0.50, 0.40, 0.60), claims.most(20, 80), "holds in part"),
        ((0.78, 0.70, 0.86), claims.most(20, 80), "undecided"),
        ((0.90, 0.85, 0.95), claims.most(20, 80), "does not"),
        ((0.02, 0.01, 0.03), claims.MORE, "holds"),
        ((0.00, 0.00, 0.00), claims.MORE, "does not"),
        ((0.01, -0.01, 0.03), claims.MORE, "undecided"),
        ((-0.02, -0.03, -0.01), claims.LESS, "holds"),
        ((NOTHING, NOTHING, NOTHING), claims.MORE, "not testable here"),
    ],
)
def test_an_interval_and_bounds_make_a_verdict(
    interval: tuple[float, float, float], rule: Any, wanted: str
) -> None:
    assert claims.verdict(_found(*interval), rule) == wanted


@pytest.mark.parametrize(
    ("support", "lacks"),
    [
        ({"seed": 1, "target class": 3, "adversary": 3}, ["one seed"]),
        ({"seed": 3, "target class": 1, "adversary": 1}, ["one target class", "one adversary"]),
        ({"seed": 3, "victim": 1}, ["one victim"]),
        ({"seed": 3, "target class": 3, "adversary": 3}, []),
    ],
)
def test_one_of_anything_is_a_trial(support: Mapping[str, int], lacks: list[str]) -> None:
    assert claims.lacking(support) == lacks


def test_the_table_itself_says_what_is_a_trial() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith('| <a id="')]
    for row in rows:
        rests_on, said = (cell.strip() for cell in row.strip("| ").split(" | ")[-2:])
        single = re.search(r"\b1 (?:seed|target class|adversary|victim)\b", rests_on)
        if single and not said.startswith("not testable here"):
            assert said.startswith("trial (") and "one" in said, row
    assert any(" trial (" in row for row in rows) and any(row.endswith("| **holds** |") for row in rows)


def test_a_query_that_fits_too_much_or_nothing_is_refused() -> None:
    board = claims.MERGED
    with pytest.raises(UsageError, match="rows fit, not one"):
        claims.reading(claims.Query(board, {"method": "ties*"}, "accuracy"), generate.rows)
    with pytest.raises(UsageError, match="no row fits"):
        claims.reading(claims.Query(board, {"method": "tie"}, "accuracy"), generate.rows)
    with pytest.raises(UsageError, match="one row and one row"):
        claims.reading(
            claims.Query(board, {"method": "ties"}, "accuracy", less={"method": "dare*"}), generate.rows
        )
    with pytest.raises(UsageError, match="no such section"):
        claims.content("mergings", generate.rows)


def test_the_least_of_several_rows_speaks_for_all_of_them() -> None:
    several = claims.Query(claims.MERGED, {"method": "ties;dare;simple_average"}, "accuracy", over="least")
    frame = pd.DataFrame(generate.rows(several.board, several.rows))
    found = claims.reading(several, generate.rows)
    assert found.value == frame["accuracy"].min()
    assert len(found.records) == frame["cells_done"].sum()
    assert not math.isnan(found.low)
