"""Cards are read as literals and refused with the field and the nearest choice; names are registered once."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergesec.errors import UsageError, nearest
from mergesec.planning.cardfiles import read_cards
from mergesec.planning.cards import Parameter
from mergesec.planning.catalog import Catalog, Entry, add_plugin, load_catalog

BASIC: dict[str, Any] = {
    "name": "mine", "kind": "merging", "class": "Mine", "version": "1", "title": "t", "summary": "s",
}  # fmt: skip
DEFENSE = {**BASIC, "kind": "defense", "threat": "backdoor", "hooks": ["repair"]}


def _module(folder: Path, card: Any, body: str = "raise RuntimeError('imported')\n") -> Path:
    path = folder / "mine.py"
    lines = (
        repr(card)
        if isinstance(card, str)
        else "{\n" + "".join(f"    {k!r}: {v!r},\n" for k, v in card.items()) + "}"
    )
    lines = lines.replace(": inf", ": 1e999").replace("[inf", "[1e999")  # infinity has no literal of its own
    path.write_text(f"CARD = {lines}\n\n{body}")
    return path


def test_a_card_is_read_without_running_its_module(tmp_path: Path) -> None:
    (card,) = read_cards(_module(tmp_path, BASIC))
    assert (card.name, card.kind, card.class_name, card.output, card.seeded) == (
        "mine", "merging", "Mine", "static", False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        f"CARD = {BASIC!r}\n",
        f"CARD: dict[str, object] = {BASIC!r}\nother = {{\n}}\n",
        f"CARDS = [{BASIC!r}]\n",
        f"CARDS = [\n    {BASIC!r},\n]\n",
        f'"""The CARD = of this module."""\nCARD = (\n    {BASIC!r}\n)\n',
    ],
)
def test_every_layout_of_a_literal_is_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    assert [c.name for c in read_cards(path)] == ["mine"]


def test_a_module_without_a_card_has_none(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("CARDINAL = {\n}\n")
    assert read_cards(path) == []


WRONG: list[tuple[dict[str, Any], str]] = [
    ({**BASIC, "sumary": "x"}, "unknown field 'sumary'; did you mean 'summary'?"),
    ({k: v for k, v in BASIC.items() if k != "class"}, "card.class: missing or not a string"),
    ({k: v for k, v in BASIC.items() if k != "title"}, "card.title: missing"),
    ({**BASIC, "version": 1}, "card.version: missing or not a string"),
    ({**BASIC, "kind": "mergin"}, "did you mean 'merging'?"),
    ({**DEFENSE, "threat": "both"}, "card.threat: 'both'; valid: backdoor, protection"),
    ({**DEFENSE, "hooks": ["repare"]}, "'repare'; did you mean 'repair'?"),
    ({**DEFENSE, "hooks": ["protect"]}, "card.hooks: 'protect'"),
    ({**DEFENSE, "hooks": []}, "card.hooks: ''"),
    ({**BASIC, "parameters": []}, "card.parameters: expected a dictionary"),
    ({**BASIC, "parameters": {"a": 1}}, "card.parameters.a: needs at least 'type' and 'default'"),
    ({**BASIC, "parameters": {"a": {"type": "float"}}}, "needs at least 'type' and 'default'"),
    ({**BASIC, "parameters": {"a": {"type": "flaot", "default": 1}}}, "did you mean 'float'?"),
    ({**BASIC, "parameters": {"a": {"type": "int", "default": 1, "maxi": 2}}}, "did you mean 'max'?"),
    (
        {**BASIC, "parameters": {"a": {"type": "int", "default": 3, "max": 2}}},
        "a.default: 3 is outside (-∞, 2]",
    ),
    ({**BASIC, "parameters": {"a": {"type": "int", "default": "3"}}}, "a.default: expected int, got '3'"),
    ({**DEFENSE, "siblings": "number"}, "card.siblings: 'number'"),
    ({**DEFENSE, "references": "number"}, "card.references: 'number'"),
    ({**DEFENSE, "after_reference": ["number"]}, "card.after_reference: 'number'"),
    ({**DEFENSE, "hooks": ["examine", "repair"]}, "card.hooks: 'examine' goes with 'screen'"),
    (
        {**DEFENSE, "hooks": ["screen"], "after_examine": ["number"]},
        "belongs to a defense with the hook examine",
    ),
    (
        {**DEFENSE, "hooks": ["examine", "screen"], "after_examine": ["number"]},
        "card.after_examine: 'number'",
    ),
    ({**BASIC, "trial": {"step": 1}}, "card.trial.step: mine has no such parameter"),
    ({**BASIC, "requires": ["fusion_bench"]}, "card.requires: expected module → package to install"),
    ({**BASIC, "modalities": "image"}, "card.modalities: expected a list of strings, got 'image'"),
    ({**BASIC, "seeded": "no"}, "card.seeded: expected true or false, got 'no'"),
    ({**BASIC, "experts": 2}, "card.experts: expected [fewest, most] experts, got 2"),
    ({**BASIC, "classes": -1}, "card.classes: expected a whole number, got -1"),
    ({**BASIC, "images": {"train": "many"}}, "card.images: expected split → number of rows"),
    ({**BASIC, "hub": []}, "card.hub: expected a dictionary, got []"),
    ({**BASIC, "recipe": {"epoch": 1}}, "card.recipe.epoch: unknown; did you mean 'epochs'?"),
    ({**BASIC, "recipe": {"learning_rate": 1e999}}, "card.recipe.learning_rate: must be finite"),
    ({**BASIC, "parameters": {"a": {"type": ["int"], "default": 1}}}, "card.parameters.a.type: type ['int']"),
    (
        {**BASIC, "parameters": {"a": {"type": "choice", "default": "a", "choices": "abc"}}},
        "a list of strings",
    ),
    ({**BASIC, "parameters": {"a": {"type": "float", "default": 1e999}}}, "a.default: inf is outside"),
    (
        {**BASIC, "parameters": {"a": {"type": "list", "default": [1e999]}}},
        "holds a number that is not finite",
    ),
]


@pytest.mark.parametrize(("card", "message"), WRONG, ids=[m for _, m in WRONG])
def test_a_wrong_card_is_refused_by_field(tmp_path: Path, card: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_cards(_module(tmp_path, card))
    assert message in str(caught.value)
    assert str(caught.value).startswith("mine.py")


def test_all_mistakes_are_told_at_once_each_with_its_line(tmp_path: Path) -> None:
    path = _module(tmp_path, {**BASIC, "seeded": "no", "parameters": {"a": {"type": "int"}}, "sumary": "x"})
    with pytest.raises(UsageError) as caught:
        read_cards(path)
    told = str(caught.value).splitlines()
    assert [line.partition(": ")[0] for line in told] == ["mine.py:10", "mine.py:8", "mine.py:9"]
    assert [line.split(": ")[1] for line in told] == ["card.sumary", "card.seeded", "card.parameters.a"]


PARENT = {
    **BASIC,
    "parameters": {"a": {"type": "int", "default": 1, "max": 5}, "b": {"type": "bool", "default": True}},
}


def _written(folder: Path, name: str, *cards: dict[str, Any]) -> Path:
    path = folder / f"{name}.py"
    path.write_text(f"CARDS = {list(cards)!r}\n")
    return path


def test_a_card_takes_over_what_it_does_not_say_itself(tmp_path: Path) -> None:
    changed = {"a": {"default": 2}, "b": None, "c": {"type": "str", "default": ""}}
    own = {"extends": "mine", "name": "other", "title": "o", "parameters": changed}
    path = _written(tmp_path, "both", PARENT, own)
    _, card = read_cards(path)
    assert (card.name, card.title, card.summary, card.class_name) == ("other", "o", "s", "Mine")
    assert card.parameters == {"a": Parameter("int", 2, max=5), "c": Parameter("str", "")}


def test_a_card_extends_the_module_of_that_name_beside_it(tmp_path: Path) -> None:
    _written(tmp_path, "mine", PARENT)
    (card,) = read_cards(_written(tmp_path, "other", {"extends": "mine", "name": "other"}))
    assert card.parameters["a"].default == 1


def test_a_template_is_not_registered(tmp_path: Path) -> None:
    template = {**PARENT, "name": "_base"}
    cards = read_cards(_written(tmp_path, "both", template, {"extends": "_base", "name": "own"}))
    assert [c.name for c in cards] == ["own"]


@pytest.mark.parametrize(
    ("parent", "message"),
    [
        ("mien", "card.extends: no card 'mien' here or in mien.py beside it; did you mean 'mine'?"),
        (3, "card.extends: expected another card's name, got 3"),
        ("third", "card.extends: expected another card's name, got 'third'"),  # a circle
    ],
)
def test_a_parent_that_is_not_there_is_refused(tmp_path: Path, parent: Any, message: str) -> None:
    third = {"extends": "child", "name": "third"}
    with pytest.raises(UsageError) as caught:
        read_cards(_written(tmp_path, "both", PARENT, {"extends": parent, "name": "child"}, third))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"CARD = {\n    'name': compute(),\n}\n", "mine.py: CARD is not a plain literal"),
        (b"CARD = {\n    'name': 'x',\n", "mine.py, line 1: not valid Python"),
        (b"# \xe9\nCARD = {\n}\n", "mine.py: not UTF-8 text"),
        (b"CARDS = [1]\n", "mine.py: a card is a dictionary, got 1"),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "mine.py"
    path.write_bytes(text)
    with pytest.raises(UsageError, match="mine") as caught:
        read_cards(path)
    assert message in str(caught.value)


# --------------------------------------------------------------------------- parameters

SCALING = Parameter("float", 0.3, min=0.0, max=10.0, also=("tuned",))


def test_a_value_is_normalised_or_taken_from_also() -> None:
    assert SCALING.check("x", 1) == 1.0
    assert isinstance(SCALING.check("x", 1), float)
    assert SCALING.check("x", "tuned") == "tuned"
    assert Parameter("list", [1]).check("x", (1, 2)) == [1, 2]
    assert Parameter("path", None).check("x", None) is None


@pytest.mark.parametrize(
    ("parameter", "value", "message"),
    [
        (SCALING, "tune", "x: expected float or 'tuned', got 'tune'"),
        (SCALING, True, "expected float"),
        (SCALING, None, "expected float"),
        (SCALING, 10.5, "10.5 is outside [0.0, 10.0]"),
        (SCALING, -0.1, "outside"),
        (SCALING, float("nan"), "outside"),
        (Parameter("int", 1), 1.0, "expected int, got 1.0"),
        (Parameter("int", 1), True, "expected int, got True"),
        (Parameter("bool", True), 1, "expected bool, got 1"),
        (
            Parameter("choice", "sum", choices=("sum", "mean")),
            "meen",
            "'meen' is not a choice; did you mean 'mean'?",
        ),
        (Parameter("list", []), "ab", "expected list"),
    ],
)
def test_a_wrong_value_is_refused(parameter: Parameter, value: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parameter.check("x", value)
    assert message in str(caught.value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_accepted_exactly_inside_its_range(value: float) -> None:
    inside = 0.0 <= value <= 10.0
    try:
        accepted = SCALING.check("x", value) == value
    except UsageError:
        accepted = False
    assert accepted == inside


def test_binding_fills_defaults_and_knows_no_strangers() -> None:
    card = load_catalog().get("merging", "task_arithmetic").card
    assert card.bind("m", {}) == {n: p.default for n, p in card.parameters.items()}
    with pytest.raises(UsageError, match=r"m\.scalling: .*did you mean 'scaling'"):
        card.bind("m", {"scalling": 0.3})


# --------------------------------------------------------------------------- catalogue


NEEDY = {**BASIC, "requires": {"no_such_module_here": "mergesec[extra]"}}


def test_a_component_whose_package_is_missing_is_not_listed_and_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needy_package").mkdir()
    (tmp_path / "needy_package" / "__init__.py").write_text("")
    _module(tmp_path / "needy_package", NEEDY)
    monkeypatch.syspath_prepend(str(tmp_path))
    point = EntryPoint("needy", "needy_package", "mergesec.merging")
    monkeypatch.setattr("mergesec.planning.catalog.entry_points", lambda: EntryPoints([point]))
    catalog = load_catalog()
    assert [e.card.name for e in catalog] == []
    with pytest.raises(UsageError, match=r"axes\.merging: mine needs .* pip install 'mergesec\[extra\]'"):
        catalog.get("merging", "mine", "axes.merging")
    monkeypatch.setattr(
        "mergesec.planning.catalog.importable", lambda module: module == "no_such_module_here"
    )
    assert [e.card.name for e in load_catalog()] == ["mine"]


def test_a_plugin_whose_package_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"mine needs .* pip install 'mergesec\[extra\]'"):
        add_plugin(Catalog(), _module(tmp_path, NEEDY))


def test_a_clash_is_an_error_that_names_both(tmp_path: Path) -> None:
    catalog = load_catalog()
    path = _module(tmp_path, {**BASIC, "name": "ties"})
    with pytest.raises(UsageError, match=r"merging ties: registered twice, by mergesec .* and by mine.py"):
        add_plugin(catalog, path)
    assert catalog.get("merging", "ties").origin.startswith("mergesec")


def test_the_same_name_of_another_kind_is_no_clash(tmp_path: Path) -> None:
    catalog = load_catalog()
    add_plugin(catalog, _module(tmp_path, {**DEFENSE, "name": "ties"}))
    assert catalog.get("defense", "ties").origin == "mine.py"


def test_none_is_reserved(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'none' is reserved"):
        add_plugin(Catalog(), _module(tmp_path, {**DEFENSE, "name": "none"}))


@pytest.mark.parametrize(
    ("kind", "name", "close"), [("merging", "tiez", "ties"), ("attack", "badnet", "badnets")]
)
def test_an_unknown_name_finds_its_neighbour(kind: str, name: str, close: str) -> None:
    with pytest.raises(UsageError, match=f"unknown {kind} '{name}'; did you mean '{close}'"):
        load_catalog().get(kind, name)


def test_a_plugin_that_is_missing_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--plugin: no file"):
        add_plugin(Catalog(), tmp_path / "absent.py")
    empty = tmp_path / "empty.py"
    empty.write_text("x = 1\n")
    with pytest.raises(UsageError, match="no top-level CARD"):
        add_plugin(Catalog(), empty)


def test_a_class_of_the_wrong_kind_is_refused(tmp_path: Path) -> None:
    (entry,) = add_plugin(Catalog(), _module(tmp_path, BASIC, "class Mine:\n    pass\n"))
    with pytest.raises(UsageError, match="no class Mine derived from MergeMethod"):
        entry.load()


def test_an_edited_plugin_is_another_component(tmp_path: Path) -> None:
    def add(body: str) -> Entry:
        (entry,) = add_plugin(Catalog(), _module(tmp_path, BASIC, body))
        return entry

    assert add("x = 1\n").digest == add("x = 1\n").digest
    assert add("x = 1\n").digest != add("x = 2\n").digest


def test_every_builtin_card_names_a_class_of_its_kind() -> None:
    entries = list(load_catalog())
    assert {e.card.kind for e in entries} == {"task", "backbone", "merging", "attack", "defense"}
    for entry in entries:
        assert entry.load().__name__ == entry.card.class_name


@given(st.text(max_size=8), st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=5))
def test_nearest_only_suggests_what_exists(value: str, choices: list[str]) -> None:
    hint = nearest(value, choices)
    assert any(repr(c) in hint for c in choices) or hint == f"; valid: {', '.join(sorted(choices))}"
