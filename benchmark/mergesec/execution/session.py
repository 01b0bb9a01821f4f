"""From a grid's name to its records and boards: what the verbs share. Torch-free."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mergesec.errors import UsageError, nearest
from mergesec.evidence.boards import make_boards
from mergesec.evidence.estimates import Board
from mergesec.evidence.external import read_external
from mergesec.evidence.records import Record
from mergesec.evidence.tables import marks, write_boards
from mergesec.execution.claims import Claims
from mergesec.execution.engines.engine import Assignment, Engine, Ways, make_engine
from mergesec.execution.engines.worker import Workplace
from mergesec.execution.guests.containment import Walls, survey
from mergesec.execution.harvest import make_records, read_evaluation, write_records
from mergesec.execution.scheduler import MERGED, History, Outcome, Reporter, completed
from mergesec.execution.store import CorruptArtifact, Store
from mergesec.files import check_writable, default_root, fingerprint
from mergesec.planning.catalog import Catalog, add_plugin, importable, load_catalog
from mergesec.planning.engines import EngineSpec
from mergesec.planning.gridspec import GridSpec, load_grid
from mergesec.planning.places import placed
from mergesec.planning.plan import Plan, Step, make_plan, needed_steps, read_facts
from mergesec.planning.resolve import Grid, resolve

REPAIRS = 5
"""Rounds of recomputing evaluations that turn out corrupt when they are read for the boards."""


@dataclass(frozen=True)
class Session:
    """A resolved grid with its plan and the store it runs on."""

    catalog: Catalog
    grid: Grid
    plan: Plan
    store: Store
    plugins: tuple[str, ...]
    data_root: Path | None


def open_session(
    source: str,
    overrides: Sequence[str] = (),
    plugins: Iterable[str] = (),
    data_root: str | None = None,
    store: Path | None = None,
) -> Session:
    """Read, resolve and plan a grid; UsageError for anything the user can mend."""
    desk = open_desk(plugins, data_root, store)
    spec = load_grid(source, overrides)
    desk = with_plugins(desk, spec, source)
    return planned(desk, placed(spec, source, overrides, desk.catalog))


class Desk(NamedTuple):
    """What every grid is planned with."""

    catalog: Catalog
    store: Store
    plugins: tuple[str, ...]
    data_root: Path | None


def open_desk(plugins: Iterable[str] = (), data_root: str | None = None, store: Path | None = None) -> Desk:
    """Catalogue, store and data; UsageError for a plugin or folder that is not there."""
    plugins = tuple(str(Path(p).resolve()) if Path(p).is_file() else p for p in plugins)
    catalog = load_catalog(plugins)
    root = local_data(data_root)
    home = store or default_root()
    check_writable(home, "MERGESEC_CACHE")
    return Desk(catalog, Store(home), plugins, root)


def with_plugins(desk: Desk, spec: GridSpec, source: str = "") -> Desk:
    """The desk with the plugins that a grid names itself; their paths start where its file lies."""
    home = Path(source).resolve().parent if Path(source).is_file() else Path()
    named = [(home / plugin).resolve() for plugin in spec.plugins]
    lost = [plugin for plugin, path in zip(spec.plugins, named, strict=True) if not path.is_file()]
    if lost:
        raise UsageError("plugins", f"no file {lost[0]!r}")
    fresh = [path for path in dict.fromkeys(named) if str(path) not in desk.plugins]
    for path in fresh:
        add_plugin(desk.catalog, path)
    return desk._replace(plugins=(*desk.plugins, *map(str, fresh)))


def placed_grid(desk: Desk, source: str, overrides: Sequence[str] = ()) -> GridSpec:
    """A preset or file, composed; its paths start where it lies."""
    return placed(load_grid(source, overrides), source, overrides, desk.catalog)


def planned(desk: Desk, spec: GridSpec) -> Session:
    """A grid resolved and planned; UsageError names the field that does not fit."""
    grid = resolve(spec, desk.catalog)
    plan = make_plan(grid, task_fingerprints(desk.data_root, desk.catalog))
    return Session(desk.catalog, grid, plan, desk.store, desk.plugins, desk.data_root)


def local_data(given: str | None) -> Path | None:
    """The folder of local tasks: what was given, else ``$MERGESEC_DATA``; UsageError if it is not there."""
    place = given or os.environ.get("MERGESEC_DATA")
    if place and not Path(place).is_dir():
        raise UsageError("--data-root", f"no folder {place!r}")
    return Path(place) if place else None


def task_fingerprints(root: Path | None, catalog: Catalog) -> Callable[[str], str]:
    """What a task's data is known by: the content of its folder, else the commit of the hub's copy."""

    def of(task: str) -> str:
        hub = catalog.get("task", task).card.hub
        if root is not None and (root / task).is_dir():
            return fingerprint(root / task)
        if hub and importable("datasets"):  # a revision given in the grid is a parameter, and counts as such
            return f"hub:{hub['name']}@{hub['revision']}"
        also = f"; or fetch {hub['name']} from the hub: pip install 'mergesec[hub]'" if hub else ""
        if root is None:
            raise UsageError(
                "--data-root",
                f"task {task} reads a local folder; give --data-root DIR with DIR/{task}/ in it{also}",
            )
        known = [p.name for p in root.iterdir() if p.is_dir()]
        raise UsageError("--data-root", f"no folder {task!r} in {str(root)!r}{nearest(task, known)}{also}")

    return of


def wanted_steps(session: Session) -> dict[str, Step]:
    """What is still to run, by key."""
    steps = session.plan.steps
    return needed_steps(
        session.plan, completed(session.store, steps), completed(session.store, steps, spent=True)
    )


class Pace(NamedTuple):
    """What runs on a store are at, of one grid."""

    running: list[tuple[str, float]]
    """Labels of steps under way, with seconds since they began."""
    recent: int
    """Steps committed within the last ``RECENT`` seconds."""
    left: float | None
    """Seconds left with as many steps at once as now; None while what was measured does not tell."""


RECENT = 600.0


def pace_of(session: Session, wanted: Mapping[str, Step]) -> Pace:
    """How a run that goes on elsewhere fares, from claims, artifacts and history alone."""
    steps, store = session.plan.steps, session.store
    under_way = {key: s for key, s in Claims(store.root).elsewhere().items() if key in wanted}
    recent = store.made_since(((s.kind, key) for key, s in steps.items() if key not in wanted), RECENT)
    work = History(store.root).left((step, 1) for step in wanted.values())
    running = sorted(((steps[k].label, s) for k, s in under_way.items()), key=lambda pair: -pair[1])
    return Pace(running, recent, None if work is None else work / max(1, len(running)))


@dataclass(frozen=True)
class Finished:
    """What a run left: records, boards and the files they were written to."""

    outcome: Outcome
    records: list[Record]
    boards: list[Board]
    paths: list[Path]
    older: tuple[str, ...] = ()
    """Cells that stand as an earlier run left them, because this one did not get to them."""
    uncontained: str = ""
    """Why plugins that took part were not contained; empty if they were, or if there were none."""


def run_session(
    session: Session,
    results: Path,
    reporter: Reporter,
    device: str = "auto",
    jobs: int | None = None,
    threads: int = 1,
    timeout: float | None = None,
    contained: bool | None = None,
    engine: EngineSpec | None = None,
    drop_merges: bool = False,
) -> Finished:
    """Run what is missing, then write records and boards. Full if the disk is. ``engine``: where, if not where the
    grid says.

    ``contained``: plugins run behind walls (True: or not at all), do not (False), or do where this machine can
    (None). Artifacts of plugins that were not contained do not count where they must be. ``drop_merges``: merges
    leave the store once every step that was to read them is done; their facts stay.
    """
    check_writable(results, "--results")
    if threads < 1:
        raise UsageError("--threads", f"must be at least 1, got {threads}")
    walls, obstacle = _walls(session, results, contained)
    place = Workplace(
        str(session.store.root.resolve()), session.plugins,
        str(session.data_root.resolve()) if session.data_root else None, threads, bool(session.plan.plugins), walls,
    )  # fmt: skip
    runs = make_engine(engine or session.grid.spec.engine or EngineSpec(), Ways(device, jobs, timeout))
    session.store.sweep()
    try:
        outcome = _run(session, runs, place, reporter, contained, drop_merges)
    finally:
        runs.close()
    if drop_merges:
        _drop_merges(session)
    records = make_records(session.plan, session.store, outcome)
    standing = write_records(results / "records", records, session.grid)
    boards, paths = publish(standing.records, results, session.grid.spec.name, standing.older)
    return Finished(outcome, standing.records, boards, paths, tuple(standing.older), obstacle)


def _run(
    session: Session,
    engine: Engine,
    place: Workplace,
    reporter: Reporter,
    contained: bool | None,
    frees: bool = False,
) -> Outcome:
    """Have an engine do what is missing; again, if results turn out corrupt when they are read."""
    plan, store = session.plan, session.store
    goals = [{key for _, key in cell.roles} for cell in plan.cells]
    outcome = Outcome()
    fresh: Collection[str] = plan.steps
    for _ in range(REPAIRS):
        _drop_corrupt(session, fresh)
        if contained:
            _drop_uncontained(session)
        wanted = wanted_steps(session)
        if not wanted or outcome.failed:
            break
        fresh = wanted  # the rest was verified in the round before
        work = Assignment(session.grid.spec.name, plan.steps, wanted, goals, store, place, reporter, frees)
        outcome = engine.run(work)
        if outcome.interrupted:
            break
    return outcome


def _walls(session: Session, results: Path, contained: bool | None) -> tuple[Walls | None, str]:
    """Walls for the plugins of a grid, or why they are not contained; neither where there are none. UsageError if
    they must be and cannot."""
    if not (session.plan.plugins or contained):
        return None, ""
    if contained is False:
        return None, "--not-contained"
    walls, obstacle = walls_of(session.catalog, [session.store.root, results, session.data_root])
    if contained and obstacle:
        raise UsageError("--contained", f"plugins cannot be contained on this machine: {obstacle}")
    return walls, obstacle


def walls_of(catalog: Catalog, hidden: Iterable[Path | None]) -> tuple[Walls | None, str]:
    """What contained plugins may see (code, and their own files; nothing ``hidden``), or why this machine cannot
    contain them."""
    ground = survey()
    if ground.obstacle:
        return None, ground.obstacle
    files = [str(e.path if e.path.name == e.origin else e.path.parent) for e in catalog if e.foreign]
    return Walls((*ground.code, *files), tuple(str(place.resolve()) for place in hidden if place)), ""


def _drop_uncontained(session: Session) -> None:
    """Remove what plugins made where they could see more than they should, and what was made from that."""
    plan, store = session.plan, session.store
    has = completed(store, plan.steps, spent=True)
    dropped: set[str] = set()
    for key, step in plan.steps.items():  # in the order of their making
        suspect = any(k in dropped for _, k in step.inputs)
        if not has(key) or not (suspect or step.plugins):
            dropped |= {key} if suspect else set()
            continue
        with contextlib.suppress(CorruptArtifact):
            if suspect or store.facts(step.kind, key).get("contained") is not True:
                store.remove(step.kind, key)
                dropped.add(key)


def _drop_merges(session: Session) -> None:
    """Let go of merges that an earlier run left, or one that was killed, where all that reads them is done."""
    steps, store = session.plan.steps, session.store
    done = completed(store, steps, spent=True)
    unread = {k for key, step in steps.items() if not done(key) for _, k in step.inputs}
    for key, step in steps.items():
        if step.kind in MERGED and key not in unread and store.has(step.kind, key):
            store.spend(step.kind, key)


def publish(
    records: list[Record], results: Path, name: str, older: Sequence[str] = ()
) -> tuple[list[Board], list[Path]]:
    """Boards of these records, written under ``results/leaderboards/<grid>/``; ``older`` names cells of an
    earlier run."""
    boards = make_boards(records, read_external(results, name))
    notes = marks(records)
    if older:
        notes.append(f"{len(older)} cells are as an earlier run left them: {', '.join(older)}")
    return boards, write_boards(results / "leaderboards" / name, boards, f"Grid {name}", notes)


def _drop_corrupt(session: Session, among: Collection[str]) -> None:
    """Verify what records are read from before trusting the store, as far as it is ``among`` these steps:
    evaluations whole (they are small), of the steps behind them the facts."""
    plan, store = session.plan, session.store
    has = completed(store, plan.steps, spent=True)
    evaluations = {k for c in plan.cells for _, k in c.roles}
    for key in evaluations | read_facts(plan):
        if key in among and has(key):
            with contextlib.suppress(CorruptArtifact):  # removed by the store; it is wanted again now
                kind = plan.steps[key].kind
                read_evaluation(store, kind, key) if key in evaluations else store.facts(kind, key)
