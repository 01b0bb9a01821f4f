"""The pages in a real browser: sorting, filtering, addresses, keys, hostile names, many rows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, Page, started
from shelves import HOSTILE, clean, protection, shelve

import mergesec

ROWS = "MergeSec.shownTable && MergeSec.shownTable.getRows('active').map(r => r.getData())"
SHOWN = f"typeof MergeSec !== 'undefined' && document.querySelector('.tabulator-row') && {ROWS}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with started() as found:
        yield found


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page at a desk; whatever it complains of fails the test."""
    browser.told.clear()
    found = browser.page()
    found.sized(1280, 900)
    yield found
    assert found.ask("window.hacked === undefined")
    assert not browser.complaints()


def board(page: Page, made: Any, fragment: str = "", sheet: str = "doors-backdoor") -> list[dict[str, Any]]:
    """Open a board; its rows as they are shown."""
    page.go(f"{(made.out / 'boards' / f'{sheet}.html').as_uri()}#{fragment}")
    found: list[dict[str, Any]] = page.until(SHOWN)
    return found


def values(page: Page, column: str) -> list[Any]:
    found: list[Any] = page.ask(f"({ROWS}).map(r => r[{json.dumps(column)}])")
    return found


def choose(page: Page, name: str, value: str) -> None:
    """Choose in one of the filters."""
    page.ask(f"""(() => {{ const s = document.querySelector('[data-filter="{name}"]'); s.value = {json.dumps(value)};
                 s.dispatchEvent(new Event(s.tagName === 'SELECT' ? 'change' : 'input')); }})()""")


def head(page: Page, title: str) -> str:
    """An expression for a column's head."""
    return f"[...document.querySelectorAll('.tabulator-col')].find(c => c.textContent.trim() === '{title}')"


def test_a_click_on_a_head_sorts_and_the_address_says_so(page: Page, made: Any) -> None:
    board(page, made, "board=backdoor")
    for order in (True, False):
        page.ask(
            f"{head(page, 'succession')}.querySelector('.tabulator-col-sorter, .tabulator-col-content').click()"
        )
        found = values(page, "succession")
        assert found == sorted(found, reverse=order) and len(set(found)) > 3
    assert page.ask("location.hash") == "#board=backdoor&sort=succession"
    assert page.ask(f"{head(page, 'succession')}.getAttribute('aria-sort')") == "ascending"


def test_a_key_sorts(page: Page, made: Any) -> None:
    board(page, made, "board=backdoor")
    page.ask(f"{head(page, 'BA')}.focus()")
    page.press("Enter")
    found = values(page, "BA")
    assert found == sorted(found, reverse=True)


def test_filters_narrow_and_the_count_is_told(page: Page, made: Any) -> None:
    every = board(page, made, "board=backdoor")
    choose(page, "attack", "bad*")
    assert set(values(page, "attack")) == {"bad(rate=0.1)", "bad(rate=0.2)"}
    choose(page, "attack", "mild")
    choose(page, "defense", "none")
    assert set(values(page, "attack")) == {"mild"} and set(values(page, "defense")) == {"none"}
    kept = len(values(page, "attack"))
    assert page.ask("document.querySelector('.count').textContent") == f"{kept} of {len(every)} rows"
    choose(page, "q", "nothing has this")
    page.until("document.querySelector('.tabulator-placeholder')?.textContent.includes('No row fits')")


def test_an_address_opens_what_it_names(page: Page, made: Any) -> None:
    found = board(page, made, "board=backdoor&f.attack=mild&sort=-succession&cols=all&intervals=no")
    assert {row["attack"] for row in found} == {"mild"}
    asr = [row["succession"] for row in found]
    assert asr == sorted(asr, reverse=True)
    assert page.ask("document.querySelector('[data-set=cols]').value") == "all"
    assert not page.ask("document.querySelector('.tabulator-row .ends')")
    assert page.ask("document.querySelector('.tabs.boards a[aria-current]').dataset.board") == "backdoor"


def test_column_sets_and_tabs(page: Page, made: Any) -> None:
    board(page, made, "board=backdoor")
    short = page.ask("document.querySelectorAll('.tabulator-col').length")
    page.ask(
        "(s => { s.value = 'all'; s.dispatchEvent(new Event('change')); })(document.querySelector('[data-set=cols]'))"
    )
    page.until(f"document.querySelectorAll('.tabulator-col').length > {short}")
    page.ask("document.querySelector('[data-board=backdoor_pareto]').click()")
    page.until("document.querySelector('h2').textContent.includes('Pareto')")


def test_numbers_look_as_they_do_in_markdown(page: Page, made: Any) -> None:
    """Page and boards.md show the same text for every number, brackets included."""
    board(page, made, "board=protection", "locks-protection")
    copied = page.ask("""(() => { let text; navigator.clipboard.writeText = async t => { text = t; };
        document.querySelector('[data-copy=markdown]').click(); return new Promise(done => setTimeout(() => done(text), 50)); })()""")
    written = (made.out / "downloads" / "locks" / "boards.md").read_text()
    numbers = re.findall(r"\| (-?\d[^|]*) (?=\|)", copied)
    assert any("[" in n for n in numbers) and any("(" in n for n in numbers)
    assert [n for n in numbers if f"| {n} |" not in written] == []


@pytest.mark.parametrize(
    ("kind", "told"), [("csv", "attack,"), ("latex", "\\begin{tabular}"), ("markdown", "| attack |")]
)
def test_copies(page: Page, made: Any, kind: str, told: str) -> None:
    found = board(page, made, "board=backdoor&f.attack=mild")
    text = page.ask(f"""(() => {{ let text; navigator.clipboard.writeText = async t => {{ text = t; }};
        document.querySelector('[data-copy={kind}]').click(); return new Promise(done => setTimeout(() => done(text), 50)); }})()""")
    assert text.startswith(told) and "bad(" not in text
    if kind == "csv":
        assert str(found[0]["succession_low"]) in text  # all digits
    page.until("document.querySelector('.copies [role=status]').textContent.includes('copied')")


def test_hostile_names_are_text_everywhere(page: Page, made: Any) -> None:
    """A record that is full of markup: no page runs it, and readers see it as it was written."""
    board(page, made, "board=backdoor&cols=all")
    seen = page.until(
        "[...document.querySelectorAll('.tabulator-cell')].map(c => c.textContent).find(t => t.startsWith('evil'))"
    )
    assert seen == f"evil(note={HOSTILE})"
    for place in ("pictures/doors-backdoor.html", "cells/doors.html", "methods/defense-evil.html", "methods/index.html",
                  "index.html", "downloads/index.html"):  # fmt: skip
        page.go((made.out / place).as_uri())
        page.until(
            "document.readyState === 'complete' && !document.querySelector('[role=status]')?.textContent.startsWith('Loading')"
        )
        assert not page.ask("document.querySelector('main img, main script')")
    (failed,) = (made.results / "records" / "locks").glob("protection-ta-broken-*.json")
    page.go(f"{(made.out / 'cell.html').as_uri()}#locks/{failed.stem}")
    assert HOSTILE in page.until("document.querySelector('.warn')?.textContent")


def test_the_page_of_a_cell_shows_its_counts_and_how_to_make_it(page: Page, made: Any) -> None:
    name = next(
        p.stem for p in sorted((made.results / "records" / "doors").glob("backdoor-ta-mild-*s0-*.json"))
    )
    page.go(f"{(made.out / 'cell.html').as_uri()}#doors/{name}")
    page.until("!!document.querySelector('h1.cell')")
    text = page.ask("document.body.innerText")
    record = json.loads((made.results / "records" / "doors" / f"{name}.json").read_text())
    count = record["counts"]["acc/merge/s/a"]
    assert f"{count['k']}/{count['n']}" in text and f"bench run --grid {name}.yaml" in text
    grid = page.ask(
        "[...document.querySelectorAll('pre')].map(p => p.textContent).find(t => t.includes('\"axes\"'))"
    )
    assert json.loads(grid)["seeds"] == [0]


@pytest.mark.parametrize(
    "fragment", ["", "doors", "doors/none", "constructor/x", "__proto__/x", "doors/%E0%A4%A"]
)
def test_an_address_of_no_cell_is_told(page: Page, made: Any, fragment: str) -> None:
    page.go(f"{(made.out / 'cell.html').as_uri()}#{fragment}")
    assert "cannot show" in page.until("document.querySelector('[role=alert]')?.textContent")


def test_pictures_are_drawn_and_every_point_is_named(page: Page, made: Any) -> None:
    page.go((made.out / "pictures" / "doors-backdoor.html").as_uri())
    page.until(
        "document.querySelectorAll('table.heat td a').length > 3 && document.querySelectorAll('.plot svg').length >= 3"
    )
    assert page.ask("[...document.querySelectorAll('h2')].map(h => h.textContent)") == [
        "Attacks against defenses", "Accuracy against attack success", "Curves",
    ]  # fmt: skip
    numbers = page.ask("[...document.querySelectorAll('.points tbody th')].map(t => t.textContent)")
    texts = page.ask("[...document.querySelectorAll('.plot svg text')].map(t => t.textContent)")
    ends = [
        text.split("–") for told in texts for text in told.split(", ") if re.fullmatch(r"\d+(–\d+)?", text)
    ]
    assert numbers and {int(n) for n in numbers} <= {
        n for e in ends for n in range(int(e[0]), int(e[-1]) + 1)
    }


@pytest.mark.parametrize(
    "place",
    ["index.html", "boards/doors-backdoor.html", "pictures/doors-backdoor.html", "cells/doors.html", "methods/index.html",
     "methods/attack-bad.html", "downloads/index.html", "pictures/locks-protection.html", "pictures/locks-clean.html"],
)  # fmt: skip
def test_no_page_is_wider_than_a_phone(page: Page, made: Any, place: str) -> None:
    """What is wide scrolls by itself; every control has a name; one main heading."""
    page.sized(390, 800)
    page.go((made.out / place).as_uri())
    page.until(
        "document.readyState === 'complete' && !document.querySelector('[role=status]')?.textContent.startsWith('Loading')"
    )
    assert page.ask("document.documentElement.scrollWidth") <= 390
    assert page.ask("document.querySelectorAll('h1').length") == 1
    nameless = """[...document.querySelectorAll('button, select, input, a[href], [role=region]')].filter(e =>
        !(e.textContent.trim() || e.getAttribute('aria-label') || e.labels?.length)).map(e => e.outerHTML.slice(0, 200))"""
    assert page.ask(nameless) == []


def test_the_reader_chooses_light_or_dark(page: Page, made: Any) -> None:
    page.go((made.out / "index.html").as_uri())
    before = page.until("getComputedStyle(document.body).backgroundColor")
    page.ask("document.getElementById('theme').click()")
    assert page.ask("getComputedStyle(document.body).backgroundColor") != before
    page.call("Emulation.setEmulatedMedia", media="print")
    assert page.ask("getComputedStyle(document.querySelector('.top nav')).display") == "none"


def _shelve_many(results: Path, defenses: int, seeds: int) -> None:
    """A grid of four attacks; the cells of a row differ in their seed alone, so that each is written once and copied."""
    attacks = (("none", 0.2), ("aga", 0.5), ("x", 0.6), ("y", 0.7))
    first = [
        protection(merged, defense=f"lock(at={at})", attack=attack, grid="many")
        for at in range(defenses)
        for attack, merged in attacks
    ]
    home = shelve(results, "many", first)
    names = [one.cell for one in first]
    for one in first:
        text = one.model_dump_json()
        for seed in range(1, seeds):
            name = one.cell.replace("-s0-", f"-s{seed}-")
            (home / f"{name}.json").write_text(
                text.replace(one.cell, name).replace('"seed":0', f'"seed":{seed}')
            )
            names.append(name)
    (home / "grid.json").write_text(json.dumps({"cells": names, "spec": {}}))


@pytest.mark.slow
def test_twenty_thousand_cells(page: Page, tmp_path: Path) -> None:
    """Built and looked at: the list of all cells answers at once, since only rows in sight are drawn."""
    _shelve_many(tmp_path, defenses=25, seeds=200)
    built = mergesec.write_site(tmp_path)
    assert (built.cells, built.broken) == (20_000, ())
    page.go((built.start.parent / "cells" / "many.html").as_uri())
    page.until("document.querySelector('.count')?.textContent === '20000 of 20000 cells'")
    assert page.ask("document.querySelectorAll('.tabulator-row').length") < 200
    choose(page, "defense", "lock(at=7)")
    page.until("document.querySelector('.count').textContent === '800 of 20000 cells'")


def test_tasks_may_have_any_name(page: Page, tmp_path: Path) -> None:
    """Names that mean something to JavaScript, to the pages or to a browser are columns like others."""
    tasks = ["__proto__", "constructor", "c0", "text_", HOSTILE, "a/b/c"]
    one = clean(0.8, experts=tasks)
    shelve(tmp_path, "g", [one, clean(0.7, merging="avg", experts=tasks)])
    out = mergesec.write_site(tmp_path).start.parent
    page.go(f"{(out / 'boards' / 'g-clean.html').as_uri()}#cols=all")
    page.until(SHOWN)
    heads = page.ask("[...document.querySelectorAll('.tabulator-col')].map(c => c.textContent.trim())")
    assert set(tasks) <= set(heads)
    cells = page.ask("[...document.querySelectorAll('.tabulator-row')].map(r => r.textContent)")
    assert all("undefined" not in text and "[object" not in text for text in cells)
    assert sum("80.0" in text for text in cells) == 1 and sum("70.0" in text for text in cells) == 1
    page.go(f"{(out / 'cell.html').as_uri()}#g/{one.cell}")
    page.until("!!document.querySelector('h1.cell')")
    assert set(tasks) <= set(page.ask("[...document.querySelectorAll('tbody th')].map(t => t.textContent)"))
    assert page.ask("({}).expert === undefined")


def test_what_is_of_no_board_is_told(page: Page, tmp_path: Path) -> None:
    """A grid none of whose cells is done still has its page."""
    shelve(tmp_path, "g", [clean(status="failed", reason="it broke")])
    built = mergesec.write_site(tmp_path)
    page.go((built.start.parent / "boards" / "g-clean.html").as_uri())
    page.until("!document.querySelector('#board').textContent.startsWith('Loading')")
