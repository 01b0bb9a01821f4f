"""``bench run``: the main job."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from mergesec.cli import show
from mergesec.cli.options import (
    Columns,
    DataRoot,
    GridOption,
    Plugins,
    Results,
    Wide,
    Words,
    asked_for,
    results_folder,
)
from mergesec.cli.progress import Progress

if TYPE_CHECKING:
    from mergesec.evidence.estimates import Board
    from mergesec.execution.session import Finished

SHOWN = 20
"""Reasons of failures that are listed."""


def main(
    words: Words = None,
    grid: GridOption = None,
    plugin: Plugins = None,
    jobs: Annotated[
        int | None, typer.Option(help="workers (per GPU, or on the CPU; default one per core)")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:0,1 or mps")] = "auto",
    per_gpu: Annotated[
        int | None, typer.Option(help="workers on each GPU, for small networks; default: as --jobs")
    ] = None,
    data_root: DataRoot = None,
    results: Results = None,
    threads: Annotated[int, typer.Option(help="threads per worker")] = 1,
    step_timeout: Annotated[float, typer.Option(help="seconds one step may take; 0 = no limit")] = 7200.0,
    columns: Columns = None,
    wide: Wide = False,
    contained: Annotated[
        bool | None,
        typer.Option(
            "--contained/--not-contained",
            help="plugins see neither store, data nor network; default: where this machine can (docs/trust.md)",
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="where steps run: local, ray or slurm (docs/scaling.md); default: as the grid says"
        ),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="ray: steps at once; slurm: jobs at once")] = None,
    address: Annotated[
        str | None, typer.Option(help="ray: host:port of a cluster, or auto; without it one is started here")
    ] = None,
    cpus: Annotated[float | None, typer.Option(help="cores a step (ray) or a worker (slurm) needs")] = None,
    gpus: Annotated[float | None, typer.Option(help="GPUs likewise; ray takes fractions too")] = None,
    memory: Annotated[float | None, typer.Option(help="memory likewise, GB")] = None,
    time_limit: Annotated[
        str | None, typer.Option(help="slurm: how long a worker's job lasts, as 90s, 30m, 4h, 2d")
    ] = None,
    drop_merges: Annotated[
        bool,
        typer.Option(
            "--drop-merges",
            help="merges leave the store once nothing of this run needs them; their facts stay",
        ),
    ] = False,
    slurm: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="slurm: an option of sbatch, as partition=gpu"),
    ] = None,
) -> None:
    from mergesec.execution.session import open_session, run_session
    from mergesec.planning.engines import engine_spec

    asked = asked_for(words, grid)
    if not step_timeout >= 0:
        from mergesec.errors import UsageError

        raise UsageError("--step-timeout", f"must not be negative, got {step_timeout}")
    started = time.monotonic()
    session = open_session(*asked, plugin or (), data_root)
    if not session.plan.cells:
        from mergesec.errors import UsageError

        reasons = "; ".join(f"{n}× {r}" for r, n in session.plan.left_out.most_common(3))
        raise UsageError("grid", f"no cell is left to run ({reasons})")
    given = {
        "name": engine, "workers": workers, "address": address, "cpus": cpus, "gpus": gpus, "memory": memory,
        "time_limit": time_limit, "slurm": _pairs(slurm or ()),
    }  # fmt: skip
    where = engine_spec(session.grid.spec.engine, given)
    progress = Progress()
    try:
        finished = run_session(
            session,
            results_folder(results),
            progress,
            device if per_gpu is None else f"{device}*{per_gpu}",
            jobs,
            threads,
            step_timeout or None,
            contained,
            where,
            drop_merges,
        )
    finally:
        progress.stop()
    if not finished.outcome.interrupted:  # half a grid is no board to look at; `bench board` shows it
        print_boards(finished.boards, columns, wide)
    _summary(finished, time.monotonic() - started, session.grid.spec.name)


def _pairs(words: Sequence[str]) -> dict[str, str]:
    """``KEY=VALUE`` words as a mapping; UsageError for one that is not."""
    from mergesec.errors import UsageError

    for word in words:
        if not word.partition("=")[0] or "=" not in word:
            raise UsageError("--slurm", f"{word!r} must be KEY=VALUE, as partition=gpu")
    return {key: value for key, _, value in (word.partition("=") for word in words)}


def print_boards(boards: list[Board], columns: str | None, wide: bool) -> None:
    from mergesec.evidence.fitting import check_columns

    chosen = [name.strip() for name in (columns or "").split(",") if name.strip()]
    check_columns(boards, chosen)
    show.boards([b for b in boards if not chosen or any(c in b.frame for c in chosen)], chosen, wide)


def _summary(finished: Finished, seconds: float, grid: str) -> None:
    for path in finished.paths:
        print(path)
    total = len(finished.records)
    done = sum(r.status == "done" for r in finished.records) - len(finished.older)
    print(f"{done} of {total} cells done, {finished.outcome.done} steps run, {show.duration(seconds)}")
    reasons: dict[str, int] = {}
    for record in finished.records:
        if record.status in ("failed", "blocked"):
            reasons[record.reason] = reasons.get(record.reason, 0) + 1
    for reason in dict.fromkeys(finished.outcome.failed.values()):
        if not any(told.endswith(reason) for told in reasons):
            reasons[reason] = 0
    for reason, n in list(reasons.items())[:SHOWN]:
        print(f"failed ({show.many(n, 'cell')}): {reason}", file=sys.stderr)
    if len(reasons) > SHOWN:
        print(f"... and {len(reasons) - SHOWN} more reasons", file=sys.stderr)
    if reasons:
        print(f"tracebacks: bench status {grid} --why (and your --results)", file=sys.stderr)
    if finished.uncontained:
        print(f"plugins were not contained ({finished.uncontained}); records say so", file=sys.stderr)
    if finished.older:
        shown = ", ".join(finished.older[:SHOWN]) + (", ..." if len(finished.older) > SHOWN else "")
        print(f"{len(finished.older)} cells stand as an earlier run left them: {shown}", file=sys.stderr)
    if finished.outcome.interrupted:
        raise typer.Exit(130)  # told where every interrupt is
    if done < total:
        raise typer.Exit(1)
