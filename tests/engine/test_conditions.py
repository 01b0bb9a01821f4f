"""Values of parameters that contradict each other are refused when a grid is read."""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergesec.errors import UsageError
from mergesec.planning.cardfiles import read_cards
from mergesec.planning.cards import Parameter
from mergesec.planning.catalog import load_catalog
from mergesec.planning.conditions import is_broken, names_in
from mergesec.planning.refs import expand

NUMBERS = st.integers(-3, 3) | st.sampled_from([0.5, -0.25])
ORDERS: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip


@given(
    a=NUMBERS, b=NUMBERS, c=NUMBERS, first=st.sampled_from(list(ORDERS)), second=st.sampled_from(list(ORDERS))
)
def test_a_condition_means_what_python_means(a: float, b: float, c: float, first: str, second: str) -> None:
    values = {"a": a, "b": b, "c": c}
    one, two = ORDERS[first], ORDERS[second]
    wanted = {
        f"a {first} b {second} c": one(a, b) and two(b, c),
        f"a {first} b - 2 * c": one(a, b - 2 * c),
        f"a + c {first} -b": one(a + c, -b),
        f"a {first} b or b {second} c": one(a, b) or two(b, c),
        f"not a {first} b and b {second} c": not one(a, b) and two(b, c),
    }
    for text, holds in wanted.items():
        assert is_broken(text, values) is not holds, text


def test_a_text_is_not_compared_with_a_number() -> None:
    assert not is_broken("low <= high", {"low": "published", "high": 3.0})
    assert is_broken("law != 'even'", {"law": "even"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a condition"),
        ("low <=", "not a condition"),
        ("low", "compares parameters"),
        ("1 < 2", "compares parameters"),
        ("low + high", "compares parameters"),
        ("low < len(high)", "no Call"),
        ("low.real < 1", "no Attribute"),
        ("low < high[0]", "no Subscript"),
        ("low in [1]", "no In"),
        ("low / high < 1", "no Div"),
        ("(low := 3) < high", "no NamedExpr"),
    ],
)
def test_anything_else_is_no_condition(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        names_in(text)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("low <= hihg", "'low <= hihg': 'hihg'; did you mean 'high'?"),
        ("low <= high()", "a condition has no Call"),
    ],
)
def test_a_card_with_a_wrong_condition_is_refused(tmp_path: Path, condition: str, message: str) -> None:
    number = {"type": "float", "default": 1.0}
    card = {
        "name": "mine", "kind": "merging", "class": "Mine", "version": "1", "title": "t", "summary": "s",
        "parameters": {"low": number, "high": number}, "holds": [condition],
    }  # fmt: skip
    (tmp_path / "mine.py").write_text(f"CARD = {card!r}\n")
    with pytest.raises(UsageError) as refused:
        read_cards(tmp_path / "mine.py")
    assert "card.holds" in str(refused.value) and message in str(refused.value)


CONTRADICTIONS = [
    ("defense", {"name": "merge_trap", "low": 0.9, "high": 0.3}, "low", "0.9 does not go with high 0.3"),
    ("defense", {"name": "merge_trap", "high": 0.1}, "high", "0.1 does not go with low 0.2"),
    ("defense", {"name": "trap2", "low": 0.99, "high": 1.0}, "low", "does not go with gap 0.05, high 1.0"),
    ("defense", {"name": "params", "range_low": 3, "range_high": 2}, "range_low", "3.0 does not go with range_high 2.0"),
    ("defense", {"name": "mergelock", "condition": 0.5}, "condition", "0.5 does not go with distribution 'gaussian'"),
    ("attack", {"name": "merge_hijacking", "density": 0.1}, "density", "0.1 does not go with epsilon 0.2"),
    ("attack", {"name": "scale_sweep", "scales": [0.5, -1.0]}, "scales", "takes numbers in [0.0, ∞), got -1.0"),
    ("attack", {"name": "scale_sweep", "scales": []}, "scales", "got an empty list"),
    ("attack", {"name": "scale_sweep", "scales": [0.5, "two"]}, "scales", "got 'two'"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "named", "parameter", "message"), CONTRADICTIONS)
def test_a_grid_that_breaks_one_names_parameter_and_values(
    kind: str, named: dict[str, Any], parameter: str, message: str
) -> None:
    given = {k: [v] if isinstance(v, list) else v for k, v in named.items()}  # a list of values is a product
    with pytest.raises(UsageError) as refused:
        expand([given], kind, "axes", load_catalog())
    assert refused.value.field == f"axes[0].{parameter}"
    assert message in refused.value.message


def test_info_tells_them(bench: Any) -> None:
    assert "asks for      low <= high" in bench("info", "merge_trap").out
    assert "asks for" not in bench("info", "ties").out


def test_no_card_breaks_its_own_conditions() -> None:
    """With its defaults and with the values of its trial."""
    seen = 0
    for entry in load_catalog():
        for values in ({}, entry.card.trial):
            bound = entry.card.bind("here", values)
            seen += len(entry.card.holds)
            assert not [c for c in entry.card.holds if is_broken(c, bound)]
    assert seen >= 10


def test_an_open_range_of_a_list_is_open() -> None:
    assert Parameter("list", [1.0], max=2.0).check("here", [-1e9, 2.0]) == [-1e9, 2.0]
    with pytest.raises(UsageError, match=r"got 2\.5"):
        Parameter("list", [1.0], max=2.0).check("here", [1.0, 2.5])
