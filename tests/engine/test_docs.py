"""The pages against the code and the boards: each test lists what offends."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mergesec.cli.app import VERBS
from mergesec.errors import UsageError
from mergesec.planning.catalog import load_catalog
from mergesec.planning.presets import preset_names

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "results").glob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
WIDTH = 100


def _generator() -> ModuleType:
    """docs/generate.py, which is a script and in no package."""
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = _generator()


def _said(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def _prose(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


@cache
def _written() -> str:
    """Everything under docs/."""
    return "\n".join(page.read_text(encoding="utf-8") for page in sorted(DOCS.rglob("*.md")))


@cache
def _anchors(page: Path) -> set[str]:
    """The anchors of a page: those of its headings as GitHub makes them (lower case, hyphens for spaces, no
    punctuation), and those that rows of tables name themselves."""
    headings = re.findall(r"^#+ +(.+?) *$", _prose(page), re.MULTILINE)
    named = re.findall(r'<a id="([^"]+)"></a>', _prose(page))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings} | {*named}


def _broken(page: Path) -> Iterator[str]:
    for link in LINK.findall(_prose(page)):
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = link.partition("#")
        place = (page.parent / target).resolve() if target else page
        if not place.exists() or ROOT not in (place, *place.parents):
            yield link
        elif anchor and anchor not in _anchors(place):
            yield f"{link} (no such anchor)"


def test_relative_links_resolve() -> None:
    assert not [f"{_said(page)}: {link}" for page in PAGES for link in _broken(page)]


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, todo = set[Path](), [README]
    while todo:
        page = todo.pop()
        if page in seen:
            continue
        seen.add(page)
        for link in LINK.findall(_prose(page)):
            target = (page.parent / link.partition("#")[0]).resolve()
            if target.is_dir() and target.is_relative_to(DOCS):
                todo += target.glob("*.md")
            elif target.suffix == ".md" and target.is_file():
                todo.append(target)
    assert not [_said(page) for page in PAGES if page not in seen]


def test_every_component_is_told_of() -> None:
    names = {entry.card.name for entry in load_catalog()}
    assert not [
        name
        for name in sorted(names)
        if not re.search(rf"`(?:[^`\n]*[\s,:\[/])?{re.escape(name)}(?![\w/-])[^`\n]*`", _written())
    ]


def test_readme_names_every_verb() -> None:
    text = README.read_text(encoding="utf-8")
    assert not [verb for verb in VERBS if f"bench {verb}" not in text]


def test_every_preset_grid_is_told_of() -> None:
    assert not [name for name in preset_names() if not re.search(rf"(?<![\w-]){name}(?![\w-])", _written())]


def test_every_grid_with_records_has_a_page_of_results() -> None:
    grids = {folder.name for folder in (ROOT / "results" / "records").iterdir() if folder.is_dir()}
    assert grids == {page.stem for page in (DOCS / "results").glob("*.md")}


def test_no_page_or_grid_names_a_place_on_somebodys_machine() -> None:
    files = [*PAGES, *ROOT.glob("benchmark/mergesec/conf/**/*.yaml"), *ROOT.glob("examples/*")]
    files = [file for file in files if file.is_file()]
    files += ROOT.glob("results/records/*/grid.json")
    place = re.compile(r"(?<![\w.~-])/(?:home|root|Users|tmp|mnt|work)/\w")
    assert not [f"{_said(file)}: {hit[0]}" for file in files if (hit := place.search(file.read_text()))]


def _too_wide(page: Path) -> Iterator[str]:
    """Lines of prose over the width; tables, code (fenced or indented) and comments are not prose."""
    text = COMMENT.sub("", FENCE.sub(lambda block: "\n" * block[0].count("\n"), page.read_text()))
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > WIDTH and not line.startswith("    ") and not line.lstrip().startswith("|"):
            yield f"{_said(page)}:{number}: {len(line)} columns"


def test_prose_wraps_at_100_columns() -> None:
    assert not [line for page in PAGES for line in _too_wide(page)]


def test_pages_hold_what_their_boards_hold() -> None:
    """``make docs`` fills them; the message says which marker, and its first cell that differs."""
    texts = {page: page.read_text(encoding="utf-8") for page in generate.pages()}
    found = [f"{_said(page)}: {line}" for page, text in texts.items() for line in generate.differences(text)]
    assert not found, "run `make docs`:\n" + "\n".join(found)


def test_no_line_begins_with_a_number_from_a_board() -> None:
    """Markdown would read such a line as HTML, and bold text in it as stars."""
    line = re.compile(r"^ *<!-- n:", re.MULTILINE)
    assert not [_said(page) for page in PAGES if line.search(page.read_text())]


def test_no_marker_ends_the_cell_of_its_table() -> None:
    row = re.compile(r"^\|.*<!-- n:[^>]*\|[^>]*-->", re.MULTILINE)
    assert not [_said(page) for page in PAGES if row.search(_prose(page))]


CSV = """method,seeds,accuracy,accuracy_low,accuracy_high
ties,3,0.76645,0.756,0.7762
average,3,0.72041,0.71,0.73
"""
BOARD = '<!-- board: trial/clean columns="method,accuracy:mean" method=ties -->{}<!-- /board -->'
NUMBER = "<!-- n: trial/clean method=ties column=accuracy -->{}<!-- /n -->"


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A board `trial/clean` in the place of the shipped ones."""
    (tmp_path / "trial").mkdir()
    (tmp_path / "trial" / "clean.csv").write_text(CSV)
    monkeypatch.setattr(generate, "BOARDS", tmp_path)
    generate._board.cache_clear()
    yield
    generate._board.cache_clear()


@pytest.mark.usefixtures("board")
def test_a_table_is_made_from_its_board() -> None:
    text = generate.filled(BOARD.format(""))
    assert "| method | mean |\n|---|---|\n| ties | 76.6 [75.6, 77.6] |\n" in text
    assert not list(generate.differences(text))


@pytest.mark.usefixtures("board")
def test_code_is_left_alone() -> None:
    text = f"1. like this:\n\n   ```markdown\n   {NUMBER.format('?')}\n   ```\n"
    assert generate.filled(text) == text


@pytest.mark.usefixtures("board")
def test_a_difference_names_the_marker_and_its_first_cell() -> None:
    text = generate.filled(BOARD.format("")).replace("75.6", "75.7")
    (line,) = generate.differences(text + NUMBER.format("76.6"))
    assert line.startswith("board: trial/clean")
    assert line.endswith("cell 6 holds '76.6 [75.7, 77.6]', the board '76.6 [75.6, 77.6]'")
    (line,) = generate.differences(NUMBER.format("76.7"))
    assert line == "n: trial/clean column=accuracy method=ties: cell 1 holds '76.7', the board '76.6'"


@pytest.mark.usefixtures("board")
@pytest.mark.parametrize(
    ("how", "number"),
    [("method=* take=max", "76.6"), ("take=min", "72.0"), ("method=ties;average take=count", "2"),
     ("method=ties minus=accuracy_low", "1.0"), ("method=ties interval=yes", "76.6 [75.6, 77.6]")],
)  # fmt: skip
def test_a_number_may_speak_of_several_rows_or_of_a_difference(how: str, number: str) -> None:
    marker = f"<!-- n: trial/clean column=accuracy {how} -->{{}}<!-- /n -->"
    assert generate.filled(marker.format("?")) == marker.format(number)


@pytest.mark.usefixtures("board")
@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("trial/clear column=accuracy", "trial/clear: no such board"),
        ("trial/clean method=ties column=acuracy", "did you mean 'accuracy'"),
        ("trial/clean method=tie column=accuracy", "no row fits"),
        (
            "trial/clean method=ties (scaling) column=accuracy",
            "'(scaling)' is no column=value; quote a value",
        ),
        ("trial/clean method=tie seeds=1 column=accuracy", "no row fits"),
        ("trial/clean column=accuracy", "2 rows fit"),
    ],
)
def test_a_marker_that_fits_nothing_is_refused(said: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        generate.filled(f"<!-- n: {said} --><!-- /n -->")


def test_a_verdict_names_a_claim() -> None:
    with pytest.raises(UsageError, match="lot-tie: no such claim; did you mean 'lot-ties'"):
        generate.filled("<!-- verdict: lot-tie --><!-- /verdict -->")


def test_labels_are_shortened_by_what_their_rows_share() -> None:
    labels = ["bad(patch=6, steps=3)", "bad(patch=6, trigger=checkerboard)", "ties"]
    assert generate.shortened(labels) == (
        ["bad(steps=3)", "bad(trigger=checkerboard)", "ties"],
        ["`bad` patch=6"],
    )


def _card(block: str) -> dict[str, Any]:
    """The literal CARD of a block of code."""
    (literal,) = [node.value for node in ast.parse(block).body
                  if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CARD"]  # fmt: skip
    card: dict[str, Any] = ast.literal_eval(literal)
    return card


_BLOCKS = re.findall(r"^```python\n(.*?)^```", (DOCS / "plugins.md").read_text(), re.MULTILINE | re.DOTALL)
SMALLEST = [(_card(block), block) for block in _BLOCKS]


def test_plugins_begin_with_the_smallest_of_each_kind() -> None:
    assert [card["kind"] for card, _ in SMALLEST] == ["merging", "attack", "defense", "task", "backbone"]


@pytest.mark.slow
@pytest.mark.parametrize(("card", "text"), SMALLEST, ids=[card["name"] for card, _ in SMALLEST])
def test_the_smallest_plugins_keep_the_contracts(card: dict[str, Any], text: str, tmp_path: Path) -> None:
    """The page's own text, through the battery of `bench plugin check`."""
    from mergesec.conformance.battery import check_file

    path = tmp_path / f"{card['name']}.py"
    path.write_text(text, encoding="utf-8")
    checks = check_file(path, load_catalog())
    assert checks
    assert not [f"{check.name}: {check.message}" for _, check in checks if not check.passed]


def test_the_smallest_cards_hold_what_is_required_and_no_more() -> None:
    required = {"name", "kind", "class", "version", "title", "summary"}
    more = {"attack": {"threat", "hooks"}, "defense": {"threat", "hooks"}, "task": {"modality", "classes"},
            "backbone": {"modalities"}, "merging": set[str]()}  # fmt: skip
    assert not [card["name"] for card, _ in SMALLEST if set(card) != required | more[card["kind"]]]


def test_plugins_told_of_every_moved_module() -> None:
    from mergesec import _MOVED

    table = "".join(re.findall(r"^\| `mergesec\..*$", (DOCS / "plugins.md").read_text(), re.MULTILINE))
    assert not [name for name in _MOVED if not re.search(rf"`(?:mergesec\.)?{name}`", table)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it: strict, so that a broken link or anchor is an error."""
    pytest.importorskip("mkdocs", reason="needs the extra `docs`")
    folder = tmp_path_factory.mktemp("site")
    told = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, env=told, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.mark.slow
def test_the_site_has_a_page_for_every_card(site: Path) -> None:
    missing = []
    for entry in load_catalog():
        page = site / "components" / entry.card.kind / f"{entry.card.name.replace('/', '-')}.html"
        text = page.read_text(encoding="utf-8") if page.is_file() else ""
        missing += [
            f"{page.relative_to(site)}: {word}"
            for word in (entry.card.name, *entry.card.parameters)
            if f"<code>{word}</code>" not in text
        ]
    assert not missing


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    loaded = re.compile(
        r"""<(?:script|img|iframe)[^>]+src="?https?:|<link[^>]+(?:stylesheet|preconnect)[^>]+https?:"""
    )
    assert not [page.name for page in site.rglob("*.html") if loaded.search(page.read_text("utf-8"))]


@pytest.mark.slow
def test_links_of_the_site_lead_to_files(site: Path) -> None:
    """The pages' own HTML, which is not what mkdocs checked."""
    link = re.compile(r'<(?:a[^>]+href|img[^>]+src)="(?!https?:|mailto:|#)([^"#?]+)')
    assert not [
        f"{page.relative_to(site)}: {target}"
        for page in site.rglob("*.html")
        if page.name != "404.html"
        for target in link.findall(page.read_text("utf-8"))
        if not (page.parent / target).exists()
    ]
