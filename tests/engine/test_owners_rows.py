"""An owner and a free-rider who both look at labelled tuning rows of the victim's task have different ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mergesec.conformance.battery import MICRO, run_here
from mergesec.contracts import ContractError, Split
from mergesec.execution.contexts import view
from mergesec.execution.guests.handing import handed
from mergesec.execution.store import Store
from mergesec.execution.work import Bench, Work
from mergesec.planning.catalog import load_catalog
from mergesec.planning.gridspec import parse_grid
from mergesec.planning.plan import Plan, Step, make_plan
from mergesec.planning.resolve import resolve

BARS, BLOBS = TASKS = ("micro/bars", "micro/blobs")
TUNING = 64

SIDES = """
from mergesec.contracts import Attack, Defense, Protected, Verification


CARDS = [
    {"name": "looker", "kind": "defense", "class": "Looker", "version": "1", "title": "x", "summary": "x",
     "threat": "protection", "hooks": ["protect", "verify"], "data": "tuning"},
    {"name": "blind", "kind": "defense", "class": "Blind", "version": "1", "title": "x", "summary": "x",
     "threat": "protection", "hooks": ["protect"], "data": "none"},
    {"name": "trier", "kind": "attack", "class": "Trier", "version": "1", "title": "x", "summary": "x",
     "threat": "protection", "hooks": ["recover"], "data": "tuning", "tries": True},
    {"name": "reader", "kind": "attack", "class": "Reader", "version": "1", "title": "x", "summary": "x",
     "threat": "protection", "hooks": ["recover"], "data": "tuning"},
]


class Looker(Defense):
    def protect(self, weights, ctx):
        return Protected(weights, {"rows": len(ctx.view.tuning)})

    def secret(self, weights, ctx):
        return {"targets": ctx.view.tuning.targets}

    def verify(self, network, ctx):
        return Verification(ctx.view.tuning.targets == ctx.secret["targets"], True, 1.0)


class Blind(Defense):
    def protect(self, weights, ctx):
        return Protected(weights, {"rows": len(ctx.view.tuning)})


class Trier(Attack):
    def recover(self, published, ctx):
        # half of the victim's rows, all of his own
        assert ctx.score(published) >= 0
        return published


class Reader(Attack):
    def recover(self, published, ctx):
        return published
"""


def _plan(folder: Path, **axes: Any) -> Plan:
    path = folder / "sides.py"
    path.write_text(SIDES)
    raw = {
        "name": "g", "suite": {"backbone": "micro/vit", "tasks": list(TASKS)}, "threats": ["protection"],
        "axes": {"merging": ["simple_average"], "victim": [BARS], **axes}, "recipe": {"epochs": 1, "max_train": 64},
    }  # fmt: skip
    return make_plan(resolve(parse_grid(raw, "g"), load_catalog([MICRO, path])), lambda task: "")


def _of(plan: Plan, kind: str) -> list[Step]:
    return [s for s in plan.steps.values() if s.kind == kind]


def _rows(plan: Plan, kind: str) -> set[str]:
    return {str(json.loads(s.args).get("rows", "")) for s in _of(plan, kind)}


def test_rows_are_divided_only_between_sides_that_both_look_at_them(tmp_path: Path) -> None:
    plan = _plan(tmp_path, defenses=["looker"], attacks=["trier"])
    assert _rows(plan, "recover") == {"second"}
    for kind in ("secret", "protect", "verify"):
        assert _rows(plan, kind) == {"first"}, kind
    assert _rows(_plan(tmp_path, defenses=["looker"], attacks=["reader"]), "recover") == {""}
    blind = _plan(tmp_path, defenses=["none", "blind"], attacks=["trier"])
    assert _rows(blind, "protect") | _rows(blind, "recover") == {""}


def _seen(bench: Bench, plan: Plan, step: Step, task: str) -> tuple[Split, set[bytes]]:
    """A task's rows as the step's view has them, and all that a stranger in its place would be handed."""
    work = Work(step, bench, {key: s.kind for key, s in plan.steps.items()})
    role = "data" if "data" in work.inputs else f"data:{task}"
    other = (role.replace("data", part, 1) for part in ("head", "task"))
    tuning = view(work, task, role, *other).tuning
    from safetensors.torch import load

    given = handed(work, role)
    packed = load(bytes(given.blob))
    assert {name.partition("/")[0] for name in packed} == {"tuning"}
    return tuning, {row.numpy().tobytes() for row in packed["tuning/inputs"]}


def _bytes(split: Split) -> set[bytes]:
    return {row.numpy().tobytes() for row in split.inputs}


def test_the_two_halves_share_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = _plan(tmp_path, defenses=["looker"], attacks=["trier"])
    bench = Bench(Store(tmp_path / "store"), plan.grid.catalog, torch.device("cpu"))
    run_here(plan, bench)
    # the world is a plugin here, as a stranger's task would be; of ours the worker does the cutting
    monkeypatch.setattr(Work, "foreign", lambda self, role: False)
    rows: dict[str, set[bytes]] = {}
    for kind in ("secret", "protect", "verify", "recover"):
        step = _of(plan, kind)[0]
        tuning, given = _seen(bench, plan, step, BARS)
        rows[kind] = _bytes(tuning)
        assert len(tuning) == len(rows[kind]) == TUNING // 2
        assert given == rows[kind], kind
    assert rows["secret"] == rows["protect"] == rows["verify"]
    assert not rows["protect"] & rows["recover"]
    # of his own task the free-rider keeps all rows
    (step,) = _of(plan, "recover")
    work = Work(step, bench, {key: s.kind for key, s in plan.steps.items()})
    assert len(view(work, BLOBS, f"data:{BLOBS}", f"head:{BLOBS}", f"task:{BLOBS}").tuning) == TUNING
    (protected,) = _of(plan, "protect")
    assert bench.read("protect", protected.key)[1]["report"] == {"rows": TUNING // 2}


def test_what_a_guest_was_cut_is_not_cut_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = _plan(tmp_path, defenses=["looker"])
    bench = Bench(Store(tmp_path / "store"), plan.grid.catalog, torch.device("cpu"))
    run_here(plan, bench)
    monkeypatch.setattr(Work, "foreign", lambda self, role: False)
    (step,) = _of(plan, "protect")
    work = Work(step, bench, {key: s.kind for key, s in plan.steps.items()})
    whole = view(work, BARS, "data", "head", "task").tuning
    given = handed(work, "data")
    from safetensors.torch import load

    monkeypatch.setattr(Work, "_read", lambda self, role: (load(bytes(given.blob)), given.meta["info"]))
    monkeypatch.setattr(Work, "tensors", lambda self, role: {})
    assert _bytes(view(work, BARS, "data", "head", "task").tuning) == _bytes(whole)


def test_one_row_cannot_be_halved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = _plan(tmp_path, defenses=["looker"], attacks=["trier"])
    bench = Bench(Store(tmp_path / "store"), plan.grid.catalog, torch.device("cpu"))
    run_here(plan, bench)
    (step,) = _of(plan, "recover")
    work = Work(step, bench, {key: s.kind for key, s in plan.steps.items()})
    one = Split(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    monkeypatch.setattr(Work, "splits", lambda self, role, task: {"tuning": one})
    with pytest.raises(ContractError, match=r"micro/bars: 1 tuning rows are too few to be halved"):
        view(work, BARS, f"data:{BARS}", f"head:{BARS}", f"task:{BARS}")
