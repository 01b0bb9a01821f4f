"""Grids from Python: run and plan them, read their boards and records, list what is installed. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergesec.errors import UsageError, nearest
from mergesec.files import default_results

if TYPE_CHECKING:
    import pandas as pd

    from mergesec.evidence.records import Record
    from mergesec.execution.session import Session
    from mergesec.site.building import Built

GridLike = str | Path | Mapping[str, Any]
"""A preset's name, a YAML file, or the fields of a grid (see docs/grids.md)."""


@dataclass(frozen=True)
class Run:
    """What a run came to."""

    name: str
    done: int
    """Cells done by this run or an earlier one on the same store."""
    cells: int
    failed: Mapping[str, str]
    """Reason by cell, of those that failed or were blocked."""
    boards: Mapping[str, pd.DataFrame]
    """By name; numbers are shares in [0, 1], as ``load_board`` tells."""
    records: Sequence[Record]
    paths: Sequence[Path]
    """CSV files and ``boards.md``."""


@dataclass(frozen=True)
class Planned:
    """What a run would do."""

    name: str
    cells: int
    left_out: Mapping[str, int]
    """Combinations that make no sense, by reason."""
    steps: int
    cached: int
    seconds: float
    """Work still to do on one worker, predicted from earlier runs of the same steps here."""
    bytes: float
    """Disk it will take."""


def run(
    grid: GridLike, *, results: str | Path | None = None, store: str | Path | None = None,
    plugins: str | Path | Iterable[str | Path] = (), data_root: str | Path | None = None, device: str = "auto",
    jobs: int | None = None, step_timeout: float | None = 7200.0, progress: bool = True, contained: bool | None = None,
    engine: str | Mapping[str, Any] | None = None, drop_merges: bool = False, **overrides: Any,
) -> Run:  # fmt: skip
    """Run a grid: every cell's missing steps, in worker processes; then records and boards under ``results``.

    ``overrides`` change fields: ``seeds=[0]``, ``suite="mini-text"``, ``axes={"merging": ["ties"]}`` (fields of
    ``axes`` not named stay), or with a dot, ``**{"suite.tasks": [...]}``. ``store``: where artifacts are kept,
    by default ``$MERGESEC_CACHE``. ``contained``: plugins see neither store, data nor network (None: where this
    machine can; docs/trust.md). ``engine``: where steps run, a name or ``{"name": "slurm", "workers": 8}``
    (docs/scaling.md). ``drop_merges``: merges leave the store once nothing of this run needs them; their facts
    stay. The same call again resumes. Raises UsageError for anything that names a wrong
    field, value or file; a component that fails is told in ``failed``.
    """
    from mergesec.execution.session import run_session
    from mergesec.planning.engines import as_fields, engine_spec

    session = _session(grid, overrides, plugins, data_root, store)
    if not session.plan.cells:
        raise UsageError("grid", f"no cell is left to run ({dict(session.plan.left_out.most_common(3))})")
    folder = Path(results) if results is not None else default_results()
    where = engine_spec(session.grid.spec.engine, as_fields(engine) or {})
    finished = run_session(
        session, folder, _reporter(progress), device, jobs, 1, step_timeout, contained, where, drop_merges
    )
    if finished.outcome.interrupted:
        raise KeyboardInterrupt
    return Run(
        session.grid.spec.name,
        sum(r.status == "done" for r in finished.records),
        len(finished.records),
        {r.cell: r.reason for r in finished.records if r.status in ("failed", "blocked")},
        {b.name: b.frame for b in finished.boards},
        tuple(finished.records),
        tuple(finished.paths),
    )


def plan(
    grid: GridLike, *, store: str | Path | None = None, plugins: str | Path | Iterable[str | Path] = (),
    data_root: str | Path | None = None, **overrides: Any,
) -> Planned:  # fmt: skip
    """Cells, distinct steps, those in the store, and predicted time and disk; runs nothing. ``overrides`` and
    errors as for ``run``."""
    from mergesec.execution.scheduler import History
    from mergesec.execution.session import wanted_steps

    session = _session(grid, overrides, plugins, data_root, store)
    wanted = wanted_steps(session)
    history = History(session.store.root)
    costs = [history.predict(step) for step in wanted.values()]
    return Planned(
        session.grid.spec.name,
        len(session.plan.cells),
        dict(session.plan.left_out),
        len(session.plan.steps),
        len(session.plan.steps) - len(wanted),
        sum(seconds for seconds, _ in costs),
        sum(size for _, size in costs),
    )


def boards(grid: str, results: str | Path | None = None) -> list[str]:
    """Names of the boards a grid has; UsageError if it has none."""
    return sorted(path.stem for path in _leaderboards(grid, results))


def load_board(grid: str, board: str, results: str | Path | None = None) -> pd.DataFrame:
    """A board of a grid that was run, from its CSV: all digits.

    Rates are shares in [0, 1], not percent; ``x_low`` and ``x_high`` are the 95 % interval of ``x`` (paired
    bootstrap over seeds and test samples); rows of equal ``tier`` cannot be told apart. ``cells_done`` below
    ``cells_expected``: the row is incomplete. Columns: docs/metrics.md. UsageError names the nearest board.
    """
    import pandas as pd

    found = {path.stem: path for path in _leaderboards(grid, results)}
    if board not in found:
        raise UsageError("board", f"{grid} has no board {board!r}{nearest(board, found)}")
    return pd.read_csv(found[board], keep_default_na=False, na_values=[""])


def records(grid: str, results: str | Path | None = None) -> list[Record]:
    """The records of a grid that was run, one a cell: coordinates, counts with the outcome of every test sample,
    cost, provenance. UsageError if there are none, or if one contradicts itself."""
    from mergesec.evidence.records import read_records

    return read_records(_results(grid, results) / "records", grid)


def write_site(
    results: str | Path | None = None,
    out: str | Path | None = None,
    plugins: str | Path | Iterable[str | Path] = (),
) -> Built:
    """Write all grids under ``results`` as a static site to ``out`` (by default ``site`` below them): boards,
    pictures, a page per method and per cell; ``index.html`` opens from the disk. Records alone are read, and the
    cards of what is installed or in ``plugins``. A broken record is left out and named in ``broken``. The same
    records give the same bytes. UsageError if there are no records, or if ``out`` holds something else."""
    from mergesec.planning.catalog import load_catalog
    from mergesec.site.building import build

    home = Path(results) if results is not None else default_results()
    return build(home, Path(out) if out is not None else home / "site", load_catalog(plugin_files(plugins)))


def catalogue(kind: str | None = None, plugins: str | Path | Iterable[str | Path] = ()) -> pd.DataFrame:
    """Everything installed, a row each: kind, name, title, threat, hooks, modalities, data, knowledge, version,
    paper, origin. ``kind``: task, backbone, merging, attack or defense; UsageError for another."""
    import pandas as pd

    from mergesec.planning.cards import KINDS
    from mergesec.planning.catalog import load_catalog

    if kind is not None and kind not in KINDS:
        raise UsageError("kind", f"{kind!r}{nearest(kind, KINDS)}")
    rows = [
        {
            "kind": card.kind, "name": card.name, "title": card.title, "threat": card.threat,
            "hooks": ", ".join(card.hooks), "modalities": card.modality or ", ".join(card.modalities),
            "data": card.data, "knowledge": card.knowledge, "version": card.version, "paper": card.paper,
            "origin": origin,
        }
        for card, origin in ((entry.card, entry.origin) for entry in load_catalog(plugin_files(plugins)))
        if kind in (None, card.kind)
    ]  # fmt: skip
    return pd.DataFrame(rows)


# --------------------------------------------------------------------------- reading what is given


def _session(
    grid: GridLike, overrides: Mapping[str, Any], plugins: str | Path | Iterable[str | Path],
    data_root: str | Path | None, store: str | Path | None,
) -> Session:  # fmt: skip
    from mergesec.execution.session import open_desk, planned, with_plugins
    from mergesec.planning.gridspec import load_grid, parse_grid
    from mergesec.planning.places import placed

    desk = open_desk(
        plugin_files(plugins),
        None if data_root is None else str(data_root),
        None if store is None else Path(store),
    )
    if isinstance(grid, Mapping):
        fields = with_overrides({"name": "custom", **grid}, overrides)
        if isinstance(fields.get("suite"), str):
            fields["suite"] = suite_fields(fields["suite"])
        spec = parse_grid(fields, "grid")
        return planned(with_plugins(desk, spec), spec)
    words, rest = as_words(overrides)
    spec = load_grid(str(grid), words)
    desk = with_plugins(desk, spec, str(grid))
    spec = placed(spec, str(grid), words, desk.catalog)
    if rest:
        fields = {**spec.model_dump(mode="json"), "engine": spec.engine}
        spec = parse_grid(with_overrides(fields, rest), f"grid {grid}")
    return planned(desk, spec)


def plugin_files(plugins: str | Path | Iterable[str | Path]) -> tuple[str, ...]:
    """Plugin files, of which one need not be in a list."""
    return (str(plugins),) if isinstance(plugins, (str, Path)) else tuple(map(str, plugins))


def suite_fields(suite: str | Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a preset suite, or those given; UsageError for an unknown name."""
    import yaml

    from mergesec.planning.presets import presets_folder

    if isinstance(suite, Mapping):
        return {"name": "custom", **suite}
    folder = presets_folder() / "suite"
    path = folder / f"{suite}.yaml"
    known = sorted(p.stem for p in folder.glob("*.yaml"))
    if suite not in known:
        raise UsageError("suite", f"no suite {suite!r}{nearest(suite, known)}")
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def with_overrides(fields: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A grid's fields with some of them changed; mappings are changed field by field."""
    changed = dict(fields)
    for key, value in overrides.items():
        first, _, rest = key.partition(".")
        if rest:
            value = {rest: value}
        if isinstance(value, Mapping) and isinstance(changed.get(first, {}), Mapping):
            changed[first] = with_overrides(changed.get(first, {}), value)
        else:
            changed[first] = value
    return changed


def as_words(overrides: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Overrides as ``bench run`` takes them, ``key=value``, and those that have no such form (a task's name as a
    key). Mappings become dotted keys."""
    words: list[str] = []
    rest: dict[str, Any] = {}
    for key, value in _leaves(overrides):
        if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", ".".join(key)):
            words.append(f"{'.'.join(key)}={_hydra('.'.join(key), value)}")
        else:
            for part in reversed(key):
                value = {part: value}
            rest = with_overrides(rest, value)
    return words, rest


def _leaves(
    overrides: Mapping[str, Any], above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in overrides.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key), value


def _hydra(where: str, value: Any) -> str:
    """A value in Hydra's override grammar; NumPy's numbers are numbers."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (str, Path)):
        if "${" in str(value):
            raise UsageError(where, f"{str(value)!r} would be interpolated; give the grid as a mapping")
        return json.dumps(str(value), ensure_ascii=False)
    if isinstance(value, Mapping):
        wrong = [key for key in value if not str(key).isidentifier()]
        if wrong:
            raise UsageError(where, f"{wrong[0]!r} cannot be a field's name here; give the grid as a mapping")
        return "{" + ",".join(f"{k}:{_hydra(where, v)}" for k, v in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ",".join(_hydra(where, v) for v in value) + "]"
    raise UsageError(where, f"{type(value).__name__} cannot stand in a grid")


def _results(grid: str, results: str | Path | None) -> Path:
    if results is not None:
        return Path(results)
    return default_results(grid)


def _leaderboards(grid: str, results: str | Path | None) -> list[Path]:
    from mergesec.evidence.records import grid_folder

    home = _results(grid, results) / "leaderboards"
    found = sorted(grid_folder(home, grid).glob("*.csv"))
    if not found:
        known = sorted({path.parent.name for path in home.glob("*/*.csv")})
        raise UsageError("grid", f"no boards of {grid!r} in {home}{nearest(grid, known)}")
    return found


class _Quiet:
    """Tells nothing."""

    def start(self, total: int, cached: int, reached: Any) -> None: ...

    def running(self, labels: Iterable[str]) -> None: ...

    def finished(self, step: Any, answer: Any, reached: Any) -> None: ...

    def stopping(self, done: int, running: list[str]) -> None: ...


class _Line(_Quiet):
    """One line a minute on standard error, and one per failed step."""

    def __init__(self) -> None:
        import time

        self._now, self._spoken, self._done, self._total = time.monotonic, time.monotonic(), 0, 0

    def start(self, total: int, cached: int, reached: Any) -> None:
        self._total = total
        self._say(f"{total} steps to run, {cached} in the store")

    def finished(self, step: Any, answer: Any, reached: Any) -> None:
        self._done += 1
        if answer.status != "ok":
            self._say(f"{step.label}: {answer.message}")
        elif self._now() - self._spoken > 60:
            left = "" if reached.remaining is None else f", about {reached.remaining:.0f} s left"
            self._say(f"{self._done}/{self._total} steps{left}")

    def _say(self, text: str) -> None:
        import sys

        self._spoken = self._now()
        print(text, file=sys.stderr)


def _reporter(progress: bool) -> _Quiet:
    return _Line() if progress else _Quiet()
