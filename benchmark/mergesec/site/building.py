"""The whole site: grid by grid, so that one grid's records are held at a time; the same records, the same bytes."""

from __future__ import annotations

import io
import json
import lzma
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from mergesec.errors import UsageError
from mergesec.evidence.boards import make_boards
from mergesec.evidence.estimates import Board
from mergesec.evidence.external import read_external
from mergesec.evidence.records import Record
from mergesec.evidence.tables import marks, write_boards
from mergesec.files import check_writable, write_atomic
from mergesec.planning.catalog import Entry
from mergesec.site import cells, findings, methods
from mergesec.site.boards import Cards, Sheet, payload, sheets
from mergesec.site.names import slug
from mergesec.site.pages import Pages
from mergesec.site.reading import Broken, Grid, brief_of, grid_names, read_grids
from mergesec.site.scripts import packed

MARKER = ".mergesec-site.json"
"""Lists the files of a site, so that the next one removes what it no longer has."""
SAMPLES = "backdoor-samples*.png"
PNG = b"\x89PNG\r\n\x1a\n"


class Built(NamedTuple):
    """A site that was written."""

    start: Path
    grids: int
    cells: int
    files: int
    bytes: int
    broken: tuple[Broken, ...]
    """Files that were left out, and why."""


class About(NamedTuple):
    """A grid as the start page lists it."""

    grid: str
    threat: str
    slug: str
    suite: str
    done: int
    cells: int
    seeds: int
    contained: bool
    figures: bool


@dataclass
class Writer:
    """Writes files into one folder and knows which."""

    folder: Path
    sizes: dict[str, int] = field(default_factory=dict)

    def write(self, name: str, data: bytes) -> None:
        write_atomic(self.folder / name, data)
        self.sizes[name] = len(data)

    def take(self, paths: Iterable[Path]) -> None:
        """Count files that somebody else wrote."""
        for path in paths:
            self.sizes[path.relative_to(self.folder).as_posix()] = path.stat().st_size

    def tidy(self) -> None:
        """Remove what an earlier site had and this one has not; remember what this one has."""
        for name in _listed(self.folder):
            if name not in self.sizes:
                (self.folder / name).unlink(missing_ok=True)
        write_atomic(self.folder / MARKER, json.dumps(sorted(self.sizes), indent=0).encode())


@dataclass
class Gathered:
    """What pages over all grids need of each."""

    cards: Cards
    abouts: list[About] = field(default_factory=list)
    methods: methods.Methods = field(default_factory=dict)
    said: list[tuple[str, findings.Candidate]] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)
    downloads: dict[str, list[str]] = field(default_factory=dict)
    scripts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Grid → slug and number of scripts: what the page of a cell looks up."""
    cells: int = 0


def build(results: Path, out: Path, entries: Iterable[Entry]) -> Built:
    """Write the site of all grids under ``results`` to ``out``; UsageError if nothing is there or ``out`` holds
    something else."""
    grid_names(results / "records")
    _check_out(out)
    known = {(entry.card.kind, entry.card.name): entry for entry in entries}
    gathered = Gathered({key: entry.card for key, entry in known.items()})
    writer, pages = Writer(out), Pages()
    _assets(writer)
    for grid in read_grids(results / "records"):
        if grid.records:
            _grid(grid, results, writer, pages, gathered)
        else:
            gathered.broken += grid.broken
    _overall(writer, pages, gathered, known)
    writer.tidy()
    return Built(
        out / "index.html", len(gathered.scripts), gathered.cells, len(writer.sizes), sum(writer.sizes.values()),
        tuple(gathered.broken),
    )  # fmt: skip


def _check_out(out: Path) -> None:
    check_writable(out, "--out")
    if any(out.iterdir()) and not (out / MARKER).is_file():
        raise UsageError(
            "--out", f"{str(out)!r} holds files that are no site; name an empty folder or a new one"
        )


def _listed(folder: Path) -> list[str]:
    """Files of the site that is there, those inside the folder alone."""
    try:
        told = json.loads((folder / MARKER).read_bytes())
        names = [str(name) for name in told]
    except (OSError, ValueError, TypeError):
        return []
    home = folder.resolve()
    return [name for name in names if (folder / name).resolve().is_relative_to(home)]


def _assets(writer: Writer) -> None:
    root = files("mergesec.site") / "assets"
    for part in (root, root / "vendor"):
        for item in sorted(part.iterdir(), key=lambda i: i.name):
            if item.is_file():
                name = f"assets/{'vendor/' if part is not root else ''}{item.name}"
                writer.write(name, item.read_bytes())


# --------------------------------------------------------------------------- one grid


def _grid(grid: Grid, results: Path, writer: Writer, pages: Pages, gathered: Gathered) -> None:
    """Everything that is of one grid."""
    grid, boards, notes = _made(grid, results, gathered.broken)
    gathered.broken += grid.broken
    mine = sheets(grid.name, boards, grid.records)
    samples = _samples(grid.name, results, writer)
    home = slug(grid.name)
    for sheet in mine:
        data = payload(sheet, gathered.cards)
        writer.write(f"data/boards/{sheet.slug}.js", packed(f"boards/{sheet.slug}", data))
        about = _about(sheet, data)
        gathered.abouts.append(about)
        gathered.said += findings.candidates(sheet)
        methods.gather(gathered.methods, sheet)
        shown = {"about": about, "notes": notes, "samples": samples if sheet.threat == "backdoor" else []}
        writer.write(f"boards/{sheet.slug}.html", pages.render("board", 1, **shown))
        if about.figures or shown["samples"]:
            writer.write(f"pictures/{sheet.slug}.html", pages.render("pictures", 1, **shown))
    methods.gather_costs(gathered.methods, grid.name, boards)
    listed = cells.index(grid.name, grid.records)
    writer.write(f"data/lists/{home}.js", packed(f"lists/{home}", listed))
    writer.write(f"cells/{home}.html", pages.render("cells", 1, grid=grid.name, slug=home))
    for name, data_of_cells in cells.scripts(grid.name, grid.spec, grid.records, listed["scripts"]).items():
        writer.write(f"data/{name}.js", data_of_cells)
    gathered.scripts[grid.name] = {"slug": home, "scripts": listed["scripts"]}
    gathered.cells += len(grid.records)
    written = write_boards(writer.folder / "downloads" / home, boards, grid.name, notes)
    writer.take(written)
    archive = f"downloads/{home}-records.tar.xz"
    writer.write(archive, packed_records(results / "records" / grid.name, grid.records))
    gathered.downloads[grid.name] = [*(p.relative_to(writer.folder).as_posix() for p in written), archive]


def _boards(grid: Grid, results: Path, broken: list[Broken]) -> list[Board]:
    """The boards of a grid, with what others found where that can be read."""
    try:
        return make_boards(grid.records, read_external(results, grid.name))
    except UsageError as error:
        broken.append(Broken(grid.name, error.field, error.message))
        return make_boards(grid.records)


def _made(grid: Grid, results: Path, broken: list[Broken]) -> tuple[Grid, list[Board], list[str]]:
    """A grid's sound records, their boards and notes. A record can be valid and still hold what no board expects:
    it is found by trying each alone, and left out like one that cannot be read."""
    try:
        return grid, _boards(grid, results, broken), marks(grid.records)
    except Exception:
        grid = _sifted(grid)
        return grid, _boards(grid, results, broken), marks(grid.records)


def _sifted(grid: Grid) -> Grid:
    good: list[Record] = []
    broken = list(grid.broken)
    for record in grid.records:
        try:
            make_boards([record])
            marks([record])
            good.append(record)
        except Exception as error:
            why = f"holds what no board expects ({type(error).__name__}: {brief_of(error)})"
            broken.append(Broken(grid.name, f"{record.cell}.json", why))
    return replace(grid, records=tuple(good), broken=tuple(broken))


def _about(sheet: Sheet, data: Mapping[str, Any]) -> About:
    records = sheet.records
    done = [r for r in records if r.status == "done"]
    names = {b["name"] for b in data["boards"]}
    suites = ", ".join(dict.fromkeys(f"{r.suite} on {r.backbone}" for r in records))
    return About(
        sheet.grid, str(sheet.threat), sheet.slug, suites, len(done), len(records), len({r.seed for r in done}),
        all(r.contained == "yes" for r in records), bool(names & {"backdoor", "protection_cells", "clean"}),
    )  # fmt: skip


def _samples(grid: str, results: Path, writer: Writer) -> list[str]:
    """Pictures of triggered samples that lie with the results, copied."""
    found = []
    for path in sorted((results / "figures" / grid).glob(SAMPLES)):
        data = path.read_bytes()
        if data.startswith(PNG):
            name = f"pictures/{slug(grid)}-{slug(path.stem)}.png"
            writer.write(name, data)
            found.append(name)
    return found


def packed_records(home: Path, records: Iterable[Record]) -> bytes:
    """Record files and the grid they are of as a tar archive without times or owners, compressed."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ["grid", *sorted(r.cell for r in records)]:
            data = (home / f"{name}.json").read_bytes()
            info = tarfile.TarInfo(f"{name}.json")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return lzma.compress(buffer.getvalue(), preset=6)


# --------------------------------------------------------------------------- over all grids


def _overall(
    writer: Writer, pages: Pages, gathered: Gathered, known: Mapping[tuple[str, str], Entry]
) -> None:
    """Pages over all grids."""
    writer.write("data/grids.js", packed("grids", gathered.scripts))
    everyone = sorted(gathered.methods.values(), key=lambda m: (m.kind, m.name))
    linked = {kind: {m.name: m.page for m in everyone if m.kind == kind} for kind in methods.COLUMN}
    writer.write("data/methods.js", packed("methods", linked))
    for method in everyone:
        entry = known.get((method.kind, method.name))
        writer.write(method.page, pages.render("method", 1, method=method, entry=entry))
    cards = {(m.kind, m.name): gathered.cards.get((m.kind, m.name)) for m in everyone}
    writer.write("methods/index.html", pages.render("methods", 1, everyone=everyone, cards=cards))
    writer.write("cell.html", pages.render("cell", 0))
    sizes = dict(writer.sizes)
    writer.write(
        "downloads/index.html",
        pages.render("downloads", 1, downloads=gathered.downloads, sizes=sizes, broken=gathered.broken),
    )
    shown = {
        "abouts": gathered.abouts,
        "findings": findings.findings(gathered.said),
        "broken": gathered.broken,
    }
    writer.write("index.html", pages.render("index", 0, cells=gathered.cells, methods=everyone, **shown))
