"""One incoming expert from Python: ``scan``; and ``calibrate``, which makes the table that scans compare with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergesec.api.grids import plugin_files
from mergesec.api.models import _opened, _Table
from mergesec.errors import UsageError
from mergesec.threats import Threat

if TYPE_CHECKING:
    from mergesec.api.models import WeightsLike
    from mergesec.contracts import TaskView, Weights
    from mergesec.planning.catalog import Catalog
    from mergesec.planning.plan import Planner
    from mergesec.planning.resolve import Grid
    from mergesec.scanning.measures import Measured
    from mergesec.scanning.realigning import Laid
    from mergesec.scanning.reference import Reference, Specimen
    from mergesec.scanning.report import Finding


@dataclass(frozen=True)
class Scan:
    """What a scan found of one expert."""

    verdict: str
    """protected, unlike, suspicious or nothing."""
    findings: Sequence[Finding]
    could_not_tell: Sequence[str]
    measured: Measured
    data: Mapping[str, Any]
    """What the network did on tuning inputs; empty where there were none."""
    reference: Mapping[str, Any]
    """Which table of honest experts it was compared with, and how that was made; empty if with none."""

    @property
    def signs(self) -> bool:
        """Whether anything speaks against merging it as it is."""
        return any(f.sign for f in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain JSON."""
        return {
            "schema": "mergesec-scan/1", "verdict": self.verdict, "findings": [asdict(f) for f in self.findings],
            "could_not_tell": list(self.could_not_tell), "measured": self.measured.as_json(),
            "data": dict(self.data), "reference": dict(self.reference),
        }  # fmt: skip


def scan(
    expert: WeightsLike, base: WeightsLike, *, against: Mapping[str, WeightsLike] | Sequence[WeightsLike] = (),
    backbone: str | None = None, heads: int | None = None, task: str | Mapping[str, Any] | None = None,
    reference: str | Path | None = None, plugins: Iterable[str | Path] = (), **desk: Any,
) -> Scan:  # fmt: skip
    """What the weights of one expert tell before they are merged (docs/scan.md).

    ``expert``, ``base`` and ``against`` (experts that it would be merged with): named tensors or safetensors files,
    read block by block; ``base`` may also be the name of a backbone. ``backbone`` or ``heads`` tell the anatomy where
    no config.json does. ``task``: a task by name, whose tuning rows and head the network is looked at with; needs a
    backbone. ``reference``: a table made by ``calibrate``; default: the shipped one of this base, if there is one.
    """
    from mergesec.planning.catalog import load_catalog
    from mergesec.scanning.measures import measure
    from mergesec.scanning.realigning import coupled
    from mergesec.scanning.report import Subject, could_not_tell, findings, mergeable

    catalog = load_catalog(plugin_files(plugins))
    laid = _laid(base, backbone, heads, catalog)
    own, told = laid.fit(_opened(expert, "EXPERT"), "EXPERT")
    named = against if isinstance(against, Mapping) else {_name(w, i): w for i, w in enumerate(against)}
    others = {name: laid.fit(_opened(w, "--against"), f"--against {name}")[0] for name, w in named.items()}
    realign = coupled(catalog)
    measured = measure(laid.weights, own, laid.anatomy, realign, others)
    table = _table(reference, laid)
    beside = {name: measure(laid.weights, w, laid.anatomy, realign) for name, w in others.items()}
    subject = Subject(measured, beside, table, laid.why_no_blocks, told)
    found = findings(subject)
    if laid.anatomy is not None and (ready := mergeable(subject)):
        found.append(ready)
    data: dict[str, Any] = {}
    if task is not None:
        data, looked = _looked(laid, own, others, task, table, {**desk, "plugins": plugins})
        found += looked
    made = (
        {} if table is None else {"backbone": table.backbone, **table.made, "experts": len(table.specimens)}
    )
    return Scan(_verdict(found), found, could_not_tell(subject, bool(data)), measured, data, made)


def _verdict(found: Sequence[Finding]) -> str:
    signs = {f.topic for f in found if f.sign}
    if "protection" in signs:
        return "protected"
    if "unlike" in signs:
        return "suspicious"
    return "changed" if signs else "nothing"


def _name(given: Any, index: int) -> str:
    return Path(given).stem if isinstance(given, (str, Path)) else f"expert{index}"


def _laid(base: WeightsLike, backbone: str | None, heads: int | None, catalog: Catalog) -> Laid:
    """The base's weights and anatomy."""
    from mergesec.scanning.realigning import anatomy_of, laid

    named = str(base) if isinstance(base, (str, Path)) and not Path(base).exists() else None
    if named is not None and named in catalog.entries["backbone"]:
        backbone = backbone or named
    wanted = None if backbone is None else catalog.get("backbone", backbone, "--backbone")
    made = None if wanted is None else wanted.create(wanted.card.bind(backbone or "", {}))
    weights = made.base_weights() if made is not None and named == backbone else _opened(base, "--base")
    config = getattr(weights, "config", {})
    anatomy = made.anatomy() if made is not None else anatomy_of(weights, config, heads)
    return laid(weights, anatomy, backbone or "")


def _table(given: str | Path | None, at: Laid) -> Reference | None:
    from mergesec.scanning.reference import read_reference, shipped

    paths = [Path(given)] if given is not None else shipped()
    for table in map(read_reference, paths):
        if table.made.get("parameters") == at.parameters and table.base == at.digest:
            return table
        if given is not None:
            raise UsageError(
                "--reference", f"{given} speaks of another base ({table.backbone}), not of this one"
            )
    return None


def _looked(
    at: Laid, own: Weights, others: Mapping[str, Weights], task: str | Mapping[str, Any], table: Reference | None,
    desk: Mapping[str, Any],
) -> tuple[dict[str, Any], list[Finding]]:  # fmt: skip
    """What the network does on the task's tuning rows."""
    from mergesec.scanning.looking import look
    from mergesec.scanning.realigning import coupled
    from mergesec.scanning.report import told

    if not at.backbone:
        raise UsageError("--task", "needs to know the network: give --backbone NAME (bench list backbones)")
    name = task if isinstance(task, str) else str(task.get("name"))
    suite = {"backbone": at.backbone, "tasks": [task if isinstance(task, str) else dict(task)]}
    table_ = _Table.laid(suite, name, None, None, desk)
    backbone = table_.bench.component(table_.planner.grid.backbone)
    aligned = at.aligned(own, coupled(table_.desk.catalog))
    seen = look(_view(table_, name), backbone, at.weights, own, aligned, others)
    return seen, told(seen, table)


def _view(at: _Table, task: str) -> TaskView:
    """The task's tuning rows and head."""
    from mergesec.contracts import TaskView

    component = at.bench.component(at.planner.grid.task(task))
    tuning = component.unpack(at.done(at.planner.data(task))[0])["tuning"]
    return TaskView(component, at.done(at.planner.head(task))[0], tuning, tuning.inputs)


# --------------------------------------------------------------------------- the table


def calibrate(
    grid: str | Path, out: str | Path, *, cached: bool = False, report: Callable[[str], None] = lambda text: None,
    **desk: Any,
) -> Reference:  # fmt: skip
    """Measure every expert that a grid names, honest, poisoned and protected, and write them as a reference table.

    What the store lacks is trained here, one after another; ``bench run`` on the same grid first does it in parallel.
    ``cached``: leave out what the store lacks. What ``out`` has of the same experts already is kept.
    """
    from mergesec.scanning.realigning import coupled, laid

    at, spec = _calibrating(grid, desk)
    backbone = at.bench.component(spec.backbone)
    ground = laid(at.done(at.planner.base())[0], backbone.anatomy(), spec.backbone.name)
    made = _made(spec, ground, at.desk.catalog)
    realign, had, found = coupled(at.desk.catalog), _measured_before(Path(out), ground), []
    for key, known in _population(at.planner, spec):
        if cached and not at.desk.store.has(at.planner.steps[key].kind, key):
            report(f"left out, not in the store: {' '.join(map(str, known))}")
            continue
        if key not in had:
            report(" ".join(map(str, known)))
            had[key] = _measured(known, ground, at, key, realign)
            at.bench.forget(key)
            _write(Path(out), tuple(had.values()), ground, made)
        found.append(had[key])
    if not any(s.kind == "honest" for s in found):
        raise UsageError("--calibrate", "no honest expert to compare with; run the grid first")
    return _write(Path(out), tuple(found), ground, made)


def _write(out: Path, specimens: tuple[Specimen, ...], ground: Laid, made: Mapping[str, Any]) -> Reference:
    from mergesec.files import write_atomic
    from mergesec.scanning.reference import Reference

    table = Reference(ground.backbone, ground.digest, made, specimens)
    write_atomic(out, (json.dumps(table.as_json(), indent=1) + "\n").encode())
    return table


def _measured_before(out: Path, ground: Laid) -> dict[str, Specimen]:
    """By key, what an earlier calibration of the same base left."""
    from mergesec.scanning.reference import read_reference

    if not out.exists():
        return {}
    table = read_reference(out)
    return {s.key: s for s in table.specimens} if table.base == ground.digest else {}


def _calibrating(grid: str | Path, desk: Mapping[str, Any]) -> tuple[_Table, Grid]:
    from mergesec.execution.session import placed_grid, task_fingerprints
    from mergesec.planning.plan import Planner
    from mergesec.planning.resolve import resolve

    at = _Table.laid("mini", None, None, None, desk)
    spec = resolve(placed_grid(at.desk, str(grid)), at.desk.catalog)
    return replace(at, planner=Planner(spec, task_fingerprints(at.desk.data_root, at.desk.catalog))), spec


def _population(planner: Planner, grid: Grid) -> Iterator[tuple[str, tuple[str, str, str, int]]]:
    """(key, (kind, maker, task, seed)) of every honest expert of the suite, and of each poisoned and protected one
    that a cell of the grid has, once."""
    from mergesec.planning.cells import cells
    from mergesec.planning.refs import NONE
    from mergesec.scanning.reference import HONEST, POISONED, PROTECTED

    seen = set()
    for seed in grid.spec.seeds:
        for task in grid.tasks:
            yield planner.expert(task.name, seed), (HONEST, "", task.name, seed)
    for cell in cells(grid):
        owner, seed, attack, defense = cell.subject, cell.seed, cell.attack, cell.defense
        if cell.threat == Threat.BACKDOOR and attack is not NONE:
            target, aim = cell.target_class, cell.target_task
            made = planner.poisoned(attack, owner, target, seed, owner, aim, defense)
            known = (POISONED, attack.label, owner, seed)
        elif cell.threat == Threat.PROTECTION and defense is not NONE:
            made = planner.published(defense, owner, seed, cell.secrets)
            known = (PROTECTED, defense.label, owner, seed)
        else:
            continue
        if made not in seen:
            seen.add(made)
            yield made, known


def _measured(known: tuple[str, str, str, int], ground: Laid, at: _Table, key: str, realign: Any) -> Specimen:
    from mergesec.scanning.looking import turned
    from mergesec.scanning.measures import measure
    from mergesec.scanning.reference import Specimen

    weights = at.done(key)[0]
    found = measure(ground.weights, weights, ground.anatomy, realign)
    probed = turned(_view(at, known[2]), at.bench.component(at.planner.grid.backbone), weights)
    data = {} if probed is None else {"turned": probed.share}
    return Specimen(*known, found.features(), found.protection(), data, key)


def _made(grid: Grid, at: Laid, catalog: Catalog) -> dict[str, Any]:
    """How a table came about."""
    from importlib.metadata import version

    entry = catalog.get("attack", "coupled")
    return {
        "command": f"bench scan --calibrate {grid.spec.name}", "grid": grid.spec.name, "suite": grid.spec.suite.name,
        "seeds": list(grid.spec.seeds), "parameters": at.parameters, "mergesec": version("mergesec"),
        "realignment": f"coupled version {entry.card.version}", "recipe": dict(grid.recipe),
    }  # fmt: skip
