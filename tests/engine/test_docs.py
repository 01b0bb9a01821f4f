"""The pages against the code: links resolve, components, verbs and preset grids are told of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from mergesec.cli.main import VERBS
from mergesec.planning.catalog import Entry, load_catalog
from mergesec.planning.presets import preset_names

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "results").glob("*.md")])
ENTRIES = list(load_catalog())
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


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
    """The anchors of a page's headings as GitHub makes them: lower case, hyphens for spaces, no punctuation."""
    headings = re.findall(r"^#+ +(.+?) *$", _prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _broken(page: Path) -> Iterator[str]:
    for link in LINK.findall(_prose(page)):
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = link.partition("#")
        place = (page.parent / target).resolve() if target else page
        if not place.exists() or ROOT not in (place, *place.parents):
            yield link
        elif anchor and anchor not in _anchors(place):
            yield f"{link} (no such heading)"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page: Path) -> None:
    assert not list(_broken(page))


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
    assert not [str(page.relative_to(ROOT)) for page in PAGES if page not in seen]


@pytest.mark.parametrize("entry", ENTRIES, ids=[f"{e.card.kind}-{e.card.name}" for e in ENTRIES])
def test_every_component_is_told_of(entry: Entry) -> None:
    assert re.search(rf"`(?:[^`\n]*[\s,:\[/])?{re.escape(entry.card.name)}(?![\w/-])[^`\n]*`", _written())


def test_readme_names_every_verb() -> None:
    text = README.read_text(encoding="utf-8")
    assert not [verb for verb in VERBS if f"bench {verb}" not in text]


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_grid_is_told_of(name: str) -> None:
    assert re.search(rf"(?<![\w-]){name}(?![\w-])", _written())


def test_no_page_or_grid_names_a_place_on_somebodys_machine() -> None:
    files = [*PAGES, *ROOT.glob("benchmark/mergesec/conf/**/*.yaml"), *ROOT.glob("examples/*")]
    files += ROOT.glob("results/records/*/grid.json")
    place = re.compile(r"(?<![\w.~-])/(?:home|root|Users|tmp|mnt|work)/\w")
    assert not [
        f"{file.relative_to(ROOT)}: {hit[0]}" for file in files if (hit := place.search(file.read_text()))
    ]
