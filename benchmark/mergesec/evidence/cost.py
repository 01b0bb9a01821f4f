"""The board of each method's own steps: seconds, memory, rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from mergesec.evidence.estimates import Board, Row
from mergesec.evidence.records import Record
from mergesec.threats import Role, Threat


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


def _owners(record: Record) -> list[tuple[str, str, str, Mapping[str, float]]]:
    """(kind, method, role whose step tells runs apart, what it cost) of a record's methods."""

    def made(role: str) -> Mapping[str, float]:
        cost = record.cost.get(role, {})
        if "made_seconds" not in cost:
            return {}
        return {"seconds": cost["made_seconds"], "peak_mb": cost["made_peak_mb"]}

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
