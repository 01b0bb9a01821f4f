"""``bench figures``: pictures, from records alone; triggered samples also from the store."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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
    plugin: Plugins = None,
    data_root: DataRoot = None,
) -> None:
    from mergesec.errors import UsageError
    from mergesec.evidence.records import read_records
    from mergesec.figures.canvas import require_matplotlib
    from mergesec.figures.gallery import make_figures, write_figures
    from mergesec.figures.generated import STEM as GENERATED
    from mergesec.figures.sample_sheets import STEM
    from mergesec.files import check_writable

    asked = asked_for(words, grid)
    require_matplotlib()
    if not samples and (asked.overrides or plugin or data_root):
        raise UsageError("figures", "key=value, --plugin and --data-root are for --samples")
    session = _open(asked, plugin or (), data_root) if samples else None
    name = session.grid.spec.name if session else run_name(asked.grid)
    home = results_folder(results, name)
    records = read_records(home / "records", name)
    folder = Path(out) if out else home / "figures" / name
    check_writable(folder, "--out" if out else "--results")
    pictures = make_figures(records)
    if session is not None:
        pictures += _samples(session, records, asked.grid)
    if not pictures:
        raise UsageError("--grid", f"no cell of {name!r} is done: nothing to draw")
    for path in write_figures(folder, pictures, tidy=out is None, spare=() if samples else (STEM, GENERATED)):
        print(path)


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
