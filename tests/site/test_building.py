"""The site's files: what is in them, that nothing in them is a record's code, that they come out the same again."""

from __future__ import annotations

import ast
import base64
import gzip
import json
import lzma
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

import pytest
from shelves import HOSTILE, backdoor, protection, shelve

import mergesec
from mergesec.errors import UsageError
from mergesec.site import cells, names, scripts
from mergesec.site.boards import unit
from mergesec.site.reading import read_grid


def data(out: Path, name: str) -> Any:
    """What a data script hands to its page."""
    text = (out / "data" / f"{name}.js").read_text()
    assert text.isascii() and text.startswith(f'MergeSec.put("{name}",')
    return json.loads(gzip.decompress(base64.b64decode(text.split(",'")[1].removesuffix("')\n"))))


class Tags(HTMLParser):
    """Every tag of a page with its attributes."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {key: value or "" for key, value in attrs}))


def pages(out: Path) -> list[Path]:
    return sorted(out.rglob("*.html"))


def links(page: Path) -> Iterator[str]:
    for _, attributes in Tags(page).found:
        yield from (attributes[name] for name in ("href", "src") if name in attributes)


def test_every_link_leads_to_a_file_of_the_site(made: Any) -> None:
    missing = []
    for page in pages(made.out):
        for link in links(page):
            target = unquote(urldefrag(link).url)
            if not link.startswith(("data:", "https://", "http://")) and target:
                place = (page.parent / target).resolve()
                if not (place.is_file() and place.is_relative_to(made.out.resolve())):
                    missing.append(f"{page.name}: {link}")
    assert not missing


def test_no_page_has_code_of_its_own_or_a_hostile_tag(made: Any) -> None:
    """Scripts and styles come from the assets alone; no handler, no script address, no image of a record."""
    assert HOSTILE not in "".join(page.read_text() for page in pages(made.out))
    for page in pages(made.out):
        for tag, attributes in Tags(page).found:
            assert not any(name.startswith("on") for name in attributes), (page, tag)
            assert tag not in ("img", "iframe", "object", "style"), (page, tag)
            assert not attributes.get("href", "").lower().startswith("javascript:")
            if tag == "script":
                assert attributes["src"].startswith(("assets/", "../assets/"))


def test_the_policy_of_every_page_lets_nothing_load_from_elsewhere(made: Any) -> None:
    for page in pages(made.out):
        (policy,) = [
            a["content"] for tag, a in Tags(page).found if a.get("http-equiv") == "Content-Security-Policy"
        ]
        assert "default-src 'none'" in policy and "http" not in policy


def test_built_twice_it_is_the_same_bytes(made: Any, tmp_path: Path) -> None:
    again = mergesec.write_site(made.results, tmp_path / "again")

    def content(folder: Path) -> dict[str, bytes]:
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    assert content(again.start.parent) == content(made.out)
    assert again._replace(start=made.built.start) == made.built


def test_a_broken_record_is_named_and_left_out(made: Any) -> None:
    (broken,) = made.built.broken
    assert broken.grid == "locks" and "is not what its bits say" in broken.why
    listed = data(made.out, "lists/locks")
    assert broken.file.removesuffix(".json") not in listed["columns"]["cell"]
    assert broken.file in (made.out / "index.html").read_text()
    assert broken.file in (made.out / "downloads" / "index.html").read_text()


def test_an_unreadable_grid_and_a_twin_are_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    one = backdoor()
    twin = one.model_copy(update={"cell": one.cell[:-10] + "0" * 10})
    shelve(tmp_path, "g", [one, twin])
    bad = tmp_path / "records" / "worse"
    bad.mkdir()
    (bad / "grid.json").write_text("[" * 100_000)
    built = mergesec.write_site(tmp_path)
    assert (built.grids, built.cells) == (1, 1)
    assert [(b.grid, b.file) for b in built.broken] == [("g", f"{twin.cell}.json"), ("worse", "grid.json")]


def test_a_record_that_no_board_expects_is_left_out(tmp_path: Path) -> None:
    """Valid by its schema: what it carries of its own is another's text."""
    good = protection(grid="g")
    odd = protection(grid="g", defense="odd", facts={"protection": 5}, values={"distance/to_base/all": 0.5})
    worse = protection(grid="g", defense="worse", provenance={"partial": 5, "components": [1]})
    shelve(tmp_path, "g", [good, odd, worse], axes={"merging": 5, "attacks": [[1]], "defenses": {}})
    built = mergesec.write_site(tmp_path)
    assert built.cells == 1
    assert sorted(b.file for b in built.broken) == sorted(f"{r.cell}.json" for r in (odd, worse))
    assert all("what no board expects" in b.why for b in built.broken)


def test_a_cell_is_told_whole_but_for_the_outcome_of_each_sample(made: Any) -> None:
    grids = data(made.out, "grids")
    (record, *_) = read_grid(made.results / "records" / "doors").records
    told = data(made.out, f"cells/doors-{scripts.spread(record.cell, grids['doors']['scripts'])}")[
        record.cell
    ]
    assert told["counts"]["acc/merge/s/a"] == [record.counts["acc/merge/s/a"].k, 100]
    assert told["steps"] == record.steps and told["experts"] == record.experts
    assert told["components"]["merging"]["parameters"] == {"scaling": 0.2}


def test_boards_and_records_are_there_to_download(made: Any) -> None:
    import pandas as pd

    frame = pd.read_csv(made.out / "downloads" / "doors" / "backdoor.csv")
    board = next(b for b in data(made.out, "boards/doors-backdoor")["boards"] if b["name"] == "backdoor")
    assert list(frame["succession"]) == pytest.approx(board["columns"]["succession"], abs=0)
    packed = lzma.decompress((made.out / "downloads" / "doors-records.tar.xz").read_bytes())
    with tarfile.open(fileobj=BytesIO(packed)) as archive:
        assert {m.mtime for m in archive} == {0}
        assert set(archive.getnames()) == {p.name for p in (made.results / "records" / "doors").iterdir()}


def test_what_readers_filter_by_stands_beside_every_row(made: Any) -> None:
    board = next(b for b in data(made.out, "boards/doors-backdoor")["boards"] if b["name"] == "backdoor")
    told = {**board["columns"], **board["told"]}
    assert set(told["protocol"]) == {"inductive"} and set(told["contained"]) == {"yes"}
    assert {"attack", "method", "defense"} <= set(board["short"])


def test_a_board_of_several_threat_models_is_parted(made: Any) -> None:
    """Costs of merges without attack do not stand among those of protections, nor the other way round."""
    for threat, kinds in (("protection", {"defense", "attack", "merging"}), ("clean", {"merging"})):
        boards = {b["name"]: b for b in data(made.out, f"boards/locks-{threat}")["boards"]}
        assert all(name.startswith((threat, "cost")) for name in boards)
        assert set(boards["cost"]["columns"]["kind"]) == kinds


def test_findings_speak_of_what_the_boards_hold(made: Any) -> None:
    page = (made.out / "index.html").read_text()
    assert "1 of 2 protections that ruin a merge survive their worst attack" in page
    assert "A backdoor survives merging" in page
    assert "f.defense=hold" in page


def test_a_finding_of_one_seed_is_called_a_trial(tmp_path: Path) -> None:
    for name, seeds in (("one", [0]), ("two", [0, 1])):
        shelve(tmp_path / name, "g", [backdoor(grid="g", seed=seed) for seed in seeds])
        mergesec.write_site(tmp_path / name, tmp_path / f"{name}_out")
    one, two = ((tmp_path / f"{name}_out" / "index.html").read_text() for name in ("one", "two"))
    assert "A trial: a backdoor survives merging" in one
    assert "A trial" not in two and "A backdoor survives merging" in two


def test_the_next_site_removes_what_it_has_no_more_and_nothing_else(made: Any, tmp_path: Path) -> None:
    results, out = tmp_path / "results", tmp_path / "out"
    shelve(results, "old", [backdoor(grid="old")])
    mergesec.write_site(results, out)
    assert (out / "boards" / "old-backdoor.html").is_file()
    (out / "mine.txt").write_text("kept")
    (results / "records" / "old").rename(tmp_path / "away")
    shelve(results, "new", [backdoor(grid="new")])
    mergesec.write_site(results, out)
    assert not (out / "boards" / "old-backdoor.html").exists()
    assert (out / "mine.txt").is_file() and (out / "boards" / "new-backdoor.html").is_file()


def test_pictures_of_triggered_samples_are_shown_if_they_are_pictures(tmp_path: Path) -> None:
    from PIL import Image

    shelve(tmp_path, "g", [backdoor()])
    home = tmp_path / "figures" / "g"
    home.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(home / "backdoor-samples-0.png")
    (home / "backdoor-samples-1.png").write_text("<svg onload='window.hacked=1'/>")
    (home / "backdoor-samples-2.svg").write_text("<svg onload='window.hacked=1'/>")
    out = mergesec.write_site(tmp_path).start.parent
    tags = Tags(out / "pictures" / "g-backdoor.html").found
    (image,) = [attributes for tag, attributes in tags if tag == "img"]
    assert image["alt"] and (out / "pictures" / image["src"]).resolve().is_file()
    assert len(list(out.rglob("*samples*"))) == 1


def test_without_its_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelve(tmp_path, "g", [backdoor()])
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UsageError, match=r"pip install 'mergesec\[site\]'"):
        mergesec.write_site(tmp_path, tmp_path / "out")


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--results: no grid was run there"):
        mergesec.write_site(tmp_path, tmp_path / "out")
    shelve(tmp_path, "g", [backdoor()])
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match=r"--out: .* holds files that are no site"):
        mergesec.write_site(tmp_path, full)
    assert (full / "thesis.txt").read_text() == "precious"


def test_a_list_of_files_that_was_tampered_with_deletes_nothing_outside(tmp_path: Path) -> None:
    results, out = tmp_path / "r", tmp_path / "out"
    shelve(results, "g", [backdoor()])
    mergesec.write_site(results, out)
    (tmp_path / "precious").write_text("kept")
    (out / ".mergesec-site.json").write_text(json.dumps(["../precious", "/etc/hostname"]))
    mergesec.write_site(results, out)
    assert (tmp_path / "precious").read_text() == "kept"


@pytest.mark.parametrize(
    "place", ["index.html", "boards/doors-backdoor.html", "pictures/doors-backdoor.html", "cell.html"]
)
def test_a_page_with_all_it_loads_stays_light(made: Any, place: str) -> None:
    """Usable within a second: at most 1.5 MB, the data of a large grid included (at most 0.5 MB, shipped ones have 0.2)."""
    page = made.out / place
    loaded = {
        (page.parent / attributes[key]).resolve()
        for tag, attributes in Tags(page).found
        for key in ("src", "href")
        if tag in ("script", "link") and not attributes.get(key, "data:").startswith("data:")
    }
    assert sum(p.stat().st_size for p in {page, *loaded}) < 1_000_000


def test_a_shipped_grid_is_shown_whole(tmp_path: Path) -> None:
    shipped = Path(__file__).resolve().parents[2] / "results" / "records" / "mini-backdoor-many"
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "mini-backdoor-many").symlink_to(shipped)
    built = mergesec.write_site(tmp_path, tmp_path / "out")
    assert not built.broken and built.cells == len(list(shipped.glob("backdoor-*.json")))
    sheet = data(tmp_path / "out", "boards/mini-backdoor-many-backdoor")
    assert {b["name"] for b in sheet["boards"]} >= {"backdoor", "backdoor_pareto", "backdoor_attacks", "cost"}
    page = (tmp_path / "out" / "methods" / "attack-badmerging.html").read_text()
    assert "BadMerging" in page and 'href="https://' in page  # its card and its paper


def test_names_become_plain_files_and_never_the_same_one() -> None:
    hostile = ["../../etc/passwd", "A", "a", "a/b", "a_b", "con", "", "é", "é" * 300, "\udc80", "x" * 300]
    found = [names.slug(name) for name in hostile]
    assert len(set(found)) == len(found)
    assert all(f.isascii() and len(f) < 100 and not set(f) & set("/\\.:") and f == f.lower() for f in found)
    assert names.web("javascript:alert(1)") == "" and names.web("https://x.org/a b") == ""


def test_units_are_those_of_the_other_tables() -> None:
    assert unit("BA", [0.5], ("BA",)) == "rate"
    assert unit("FID", [0.5], ("FID",)) == "number"
    assert unit("front_share", [0.5, None], ()) == "percent"
    assert unit("max_abs_dlogit", [0.5], ()) == "number"
    assert unit("defense_rows", [512.0], ()) == "count"
    assert unit("experts", [8, 2], ()) == "count"
    assert unit("attack", ["bad"], ()) == "text"


def test_a_hash_of_a_name_is_the_pages() -> None:
    """FNV-1a's own test vectors."""
    assert scripts.spread("", 1 << 32) == 0x811C9DC5
    assert scripts.spread("foobar", 1 << 32) == 0xBF9CF968


@pytest.mark.parametrize(
    "grid", ["mini-backdoor", "mini-protection", "mini-merging", "mini-protection-owners"]
)
def test_the_grid_of_one_cell_plans_that_cell(grid: str, tmp_path: Path) -> None:
    """As the page offers it: JSON, which is YAML, in a file of the cell's name."""
    from mergesec.execution.harvest import cell_name
    from mergesec.execution.session import open_desk, planned
    from mergesec.planning.gridspec import load_grid

    home = Path(__file__).resolve().parents[2] / "results" / "records" / grid
    shown = read_grid(home)
    desk = open_desk((), None, None)
    same = 0
    for record in shown.records[:: max(1, len(shown.records) // 8)]:
        file = tmp_path / f"{record.cell}.yaml"
        file.write_text(json.dumps(cells.narrowed(record, shown.spec), indent=1))
        plan = planned(desk, load_grid(str(file))).plan
        (cell,) = [c.cell if hasattr(c, "cell") else c for c in plan.cells]
        assert (cell.merging.label, cell.attack.label, cell.defense.label) == (
            record.merging, record.attack, record.defense,
        )  # fmt: skip
        assert (cell.subject, list(cell.experts), cell.seed) == (record.subject, record.experts, record.seed)
        same += cell_name(cell) == record.cell
    assert same, "no cell has its name: all components have other versions than the records"


def test_neither_torch_nor_the_planner_is_imported(made: Any, tmp_path: Path) -> None:
    heavy = (
        "torch",
        "hydra",
        "matplotlib",
        "mergesec.execution",
        "mergesec.planning.plan",
        "mergesec.planning.gridspec",
    )
    code = (
        "import sys\nfrom mergesec.cli.site_verb import main\n"
        f"main(results={str(made.results)!r}, out={str(tmp_path / 'out')!r})\n"
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout.splitlines()[-1]) == []
    assert "warning: left out: locks/protection-" in done.stderr
