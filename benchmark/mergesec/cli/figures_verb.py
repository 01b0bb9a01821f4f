"""``bench figures``: pictures, from records alone; triggered samples also from the store."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergesec.cli.complete import one_of
from mergesec.cli.options import (
    DataRoot,
    Plugins,
    Results,
    RunOption,
    Words,
    asked_for,
    results_folder,
    run_name,
)

if TYPE_CHECKING:
    from mergesec.cli.options import Asked
    from mergesec.evidence.records import Record
    from mergesec.execution.session import Session
    from mergesec.figures.canvas import Picture


def main(
    words: Words = None,
    grid: RunOption = None,
    results: Results = None,
    out: Annotated[str | None, typer.Option(help="folder; default: figures/<grid> under --results")] = None,
    samples: Annotated[
        bool,
        typer.Option(
            "--samples",
            help="also draw test inputs under each attack's trigger, and generated images, from the store; give the "
            "grid, key=value, --plugin and --data-root as to bench run",
        ),
    ] = False,
    only: Annotated[
        str | None,
        typer.Option(
            "--only",
            help="pictures whose names are these or begin so, a,b; older files stay",
            show_default=False,
        ),
    ] = None,
    width: Annotated[float, typer.Option(help="inches; letters keep their printed size")] = 6.8,
    dpi: Annotated[int, typer.Option(help="dots to the inch of PNG")] = 200,
    formats: Annotated[
        str,
        typer.Option(
            "--format", help="kinds of files: svg, png, pdf", autocompletion=one_of("svg", "png", "pdf")
        ),
    ] = "svg,png",
    plugin: Plugins = None,
    data_root: DataRoot = None,
) -> None:
    from mergesec.errors import UsageError
    from mergesec.evidence.records import read_records
    from mergesec.figures.canvas import require_matplotlib
    from mergesec.figures.gallery import chosen, make_figures, write_figures
    from mergesec.figures.generated import STEM as GENERATED
    from mergesec.figures.sample_sheets import STEM
    from mergesec.files import check_writable

    asked = asked_for(words, grid)
    require_matplotlib()
    endings = _endings(formats, width, dpi)
    if not samples and (asked.overrides or plugin or data_root):
        raise UsageError("figures", "key=value, --plugin and --data-root are for --samples")
    session = _open(asked, plugin or (), data_root) if samples else None
    name = session.grid.spec.name if session else run_name(asked.grid)
    home = results_folder(results, name)
    records = read_records(home / "records", name)
    folder = Path(out) if out else home / "figures" / name
    check_writable(folder, "--out" if out else "--results")
    pictures = make_figures(records, width)
    if session is not None:
        pictures += _samples(session, records, asked.grid)
    if not pictures:
        raise UsageError("--grid", f"no cell of {name!r} is done: nothing to draw")
    names = [name.strip() for name in (only or "").split(",") if name.strip()]
    tidy, spare = out is None and not names, () if samples else (STEM, GENERATED)
    for path in write_figures(folder, chosen(pictures, names), tidy, spare, dpi, endings):
        print(path)


def _endings(formats: str, width: float, dpi: int) -> list[str]:
    """The kinds of files asked for; UsageError for one that is none, or for sizes that no page has."""
    from mergesec.errors import UsageError, nearest
    from mergesec.figures.canvas import SAID

    if not 3 <= width <= 40:
        raise UsageError("--width", f"must be between 3 and 40 inches, got {width:g}")
    if not 30 <= dpi <= 1200:
        raise UsageError("--dpi", f"must be between 30 and 1200, got {dpi}")
    endings = list(dict.fromkeys(name.strip().lower() for name in formats.split(",") if name.strip()))
    for ending in endings:
        if ending not in SAID:
            raise UsageError("--format", f"{ending!r}{nearest(ending, SAID)}")
    if not endings:
        raise UsageError("--format", f"none given; valid: {', '.join(SAID)}")
    return endings


def _open(asked: Asked, plugins: Sequence[str], data_root: str | None) -> Session:
    from mergesec.execution.session import open_session

    return open_session(*asked, plugins, data_root)


def _samples(session: Session, records: Sequence[Record], source: str) -> list[Picture]:
    """Pictures of what is in the store; what is missing is told, and an error if it is everything."""
    import torch

    from mergesec.api.models import plugin_hosts
    from mergesec.errors import UsageError
    from mergesec.execution.session import Desk
    from mergesec.execution.work import Bench
    from mergesec.figures.canvas import style
    from mergesec.figures.generated import generated_pictures, generated_sheets
    from mergesec.figures.sample_sheets import sample_pictures
    from mergesec.figures.samples import collect_samples

    hosts = plugin_hosts(Desk(session.catalog, session.store, session.plugins, session.data_root))
    bench = Bench(session.store, session.catalog, torch.device("cpu"), session.data_root, guests=hosts)
    places, missing = collect_samples(session.plan, bench, records)
    made = generated_sheets(session.plan, session.store, records)
    if missing:
        shown = ", ".join([*missing][:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        # a run makes what is needed; what is measured of a trigger needs it
        first = "bench cache clear --kind visibility, then " if any(missing.values()) else ""
        told = f"not in the store: {shown}; make it with: {first}bench run --grid {source} (and your options)"
        if not places:
            raise UsageError("--samples", told)
        print(f"left out of the samples: {told}", file=sys.stderr)
    elif not places and not made:
        raise UsageError("--samples", f"{session.grid.spec.name!r} has no records of cells with a backdoor")
    with style():
        return [*sample_pictures(places), *generated_pictures(made)]
