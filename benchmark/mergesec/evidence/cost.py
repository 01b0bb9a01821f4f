"""The board of each method's own steps: seconds, memory, rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import pandas as pd

from mergesec.evidence.estimates import Board, Row
from mergesec.evidence.records import APART, Record
from mergesec.threats import Hook, Role, Threat


def cost_board(records: Sequence[Record]) -> Board | None:
    """Mean seconds, peak memory and rows of data of each method's own steps, as measured when they were computed."""
    gathered: dict[tuple[str, str], dict[str, Mapping[str, float]]] = {}
    for record in records:
        for kind, name, role, cost in _owners(record):
            if name != "none" and cost:
                gathered.setdefault((kind, name), {})[record.steps[role]] = cost
    rows: list[Row] = []
    for (kind, name), steps in gathered.items():
        costs = list(steps.values())
        row: Row = {"kind": kind, "name": name, "runs": len(costs)}
        for what in ("seconds", "trigger_seconds", "poison_seconds", "rows"):
            found = [c[what] for c in costs if what in c]
            if found:
                row[what] = sum(found) / len(found)
        rows.append({**row, "peak_mb": max(c["peak_mb"] for c in costs)})
    if not rows:
        return None
    return Board("cost", "Cost of each method's own steps", pd.DataFrame(rows), ())


SHARES = ("clean experts", "attacks", "defenses", "merges", "evaluations")
"""What the steps of a grid are for, as the board of totals has them."""


ATTACKING = (Hook.TRIGGER, Hook.POISON, Hook.FORGE)
"""Kinds of step that are an adversary's."""


def total_board(records: Sequence[Record]) -> Board | None:
    """What all steps behind a grid's cells took, by what they are for, each counted once; preparation (data, heads, the
    base) is left out, and the screening behind a control. Records of before each step was told apart count a trigger that
    variants share, and experts that a defense trains for itself, with each."""
    shares: dict[str, dict[str, tuple[float, float]]] = {share: {} for share in SHARES}
    for record in records:
        for share, step, seconds, peak in _spent(record):
            shares[share][step] = (seconds, peak)
    rows = [_total(share, list(steps.values())) for share, steps in shares.items() if steps]
    if not rows:
        return None
    everything = [cost for steps in shares.values() for cost in steps.values()]
    rows.append(_total("all", everything))
    return Board("cost_total", "Cost of this grid", pd.DataFrame(rows), ())


def _total(share: str, costs: Sequence[tuple[float, float]]) -> Row:
    minutes = sum(seconds for seconds, _ in costs) / 60
    return {"name": share, "steps": len(costs), "minutes": minutes, "peak_mb": max(peak for _, peak in costs)}


def _spent(record: Record) -> Iterator[tuple[str, str, float, float]]:
    """(what for, the step, seconds, MiB at the peak) of everything behind a record."""
    shares = {"merging": "merges", "attack": "attacks", "defense": "defenses"}
    apart = [name for name in record.cost if APART in name]
    for name in apart:
        share = "attacks" if name.partition(APART)[0] in ATTACKING else "defenses"
        yield share, name, record.cost[name]["seconds"], record.cost[name]["peak_mb"]
    owners = [owner for owner in _owners(record) if owner[0] == "merging" or not apart]
    told = [(shares[kind], role, cost) for kind, name, role, cost in owners if name != "none"]
    plain = record.threat == Threat.PROTECTION or record.defense == "none"
    made: dict[str, str] = {Role.MERGE: "merges" if plain else "", Role.PROTECTED_MERGE: "merges",
            Role.DEFENDED_CLEAN_MERGE: "defenses"}  # fmt: skip
    made |= {role: "clean experts" for role in record.cost if role.startswith(Role.EXPERT.of(""))}
    told += [(share, role, _made(record, role)) for role, share in made.items() if share]
    told += [("evaluations", role, cost) for role, cost in record.cost.items()]
    for share, role, cost in told:
        if role in record.steps and cost:
            yield share, record.steps[role], cost["seconds"], cost["peak_mb"]


def _made(record: Record, role: str) -> Mapping[str, float]:
    """What it took to make the model that a role evaluates; empty if the record does not say."""
    cost = record.cost.get(role, {})
    if "made_seconds" not in cost:
        return {}
    return {"seconds": cost["made_seconds"], "peak_mb": cost["made_peak_mb"]}


def _owners(record: Record) -> list[tuple[str, str, str, Mapping[str, float]]]:
    """(kind, method, role whose step tells runs apart, what it cost) of a record's methods."""

    made = partial(_made, record)
    owners: list[tuple[str, str, str, Mapping[str, float]]] = [
        ("merging", record.merging, Role.CLEAN_MERGE, made(Role.CLEAN_MERGE))
    ]
    if record.threat == Threat.PROTECTION:
        owners += [("defense", record.defense, Role.PUBLISHED, made(Role.PUBLISHED))]
        owners += [("attack", record.attack, Role.RECOVERED, made(Role.RECOVERED))]
    elif record.threat == Threat.BACKDOOR:
        owners += [("attack", record.attack, Role.POISONED, record.cost.get("attack") or made(Role.POISONED))]
        owners += [("defense", record.defense, Role.MERGE, record.cost.get("defense") or made(Role.MERGE))]
    return owners
