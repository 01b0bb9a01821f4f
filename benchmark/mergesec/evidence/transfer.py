"""The board of adversarial transfer: what a trigger made on the public base does to models of clean experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from mergesec.evidence.estimates import Board, Reader, Row, grouped, put, settled
from mergesec.evidence.records import Record
from mergesec.evidence.statistics import Estimate, ratio
from mergesec.threats import Role, Threat

LEAST_BASE = 0.10
"""Where a trigger reaches less of the base, what share of it reaches a merge says nothing."""

_RATES = (
    ("acc_base", "acc", Role.BASE), ("acc_merge", "acc", Role.MERGE),
    ("succession_base", "asr", Role.BASE), ("ASR_alone", "asr", Role.POISONED), ("succession", "asr", Role.MERGE),
)  # fmt: skip
_RATIOS = {"relative_transfer_alone": "ASR_alone", "relative_transfer": "succession"}
_SETTING = ("attack", "method", "defense", "experts", "adversaries", "target_task")
_USUAL = {"adversaries": 1, "target_task": ""}
"""Columns that are left out where every row has this."""


def transfer_board(records: Sequence[Record], reader: Reader) -> Board | None:
    """Per attack that changes no expert, merge method and defense: attack success on base, expert and merge, and
    what share of the base's reaches the others. None where every attack changes experts."""
    mine = [r for r in records if r.threat == Threat.BACKDOOR and r.attack != "none"]
    clean = {r.attack for r in mine if _leaves_experts_alone(r)}
    rows: list[Row] = []
    groups = grouped(
        [r for r in mine if r.attack in clean],
        lambda r: (r.attack, r.merging, r.defense, len(r.experts), r.adversaries, r.target_task),
    )
    for setting, group in groups.items():
        row: Row = dict(zip(_SETTING, setting, strict=True))
        done = settled(row, group)
        for name, estimate in transfer_rates(done, reader).items():
            put(row, name, estimate)
        rows.append(row)
    if not rows:
        return None
    frame = pd.DataFrame(rows)
    frame = frame.drop(columns=[name for name, usual in _USUAL.items() if (frame[name] == usual).all()])
    note = (
        "Every expert is clean; the trigger was made on the base. relative_transfer: attack success on the merge by that "
        "on the base (relative_transfer_alone: on the expert), a ratio of means; no number where at most a tenth of the "
        "base's samples follow the trigger."
    )
    measures = (*(name for name, *_ in _RATES), *_RATIOS)
    return Board("transfer", "Adversarial transfer from the base to the merge", frame, measures, note)


def _leaves_experts_alone(record: Record) -> bool:
    """Whether the adversary's expert is the clean one: then one evaluation serves both."""
    alone = record.steps.get(Role.POISONED)
    return alone is not None and alone == record.steps.get(Role.EXPERT.of(record.subject))


def transfer_rates(records: Sequence[Record], reader: Reader) -> dict[str, Estimate]:
    """The rates of one row, all on the task aimed at."""
    rates = reader.rates(records, [(metric, role, "target") for _, metric, role in _RATES])
    part = dict(zip((name for name, *_ in _RATES), rates, strict=True))
    base = part["succession_base"]
    ratios = {name: ratio(part[of], base, LEAST_BASE) for name, of in _RATIOS.items()}
    # draws of a rate may leave its range; what is cut there is cut here
    return part | {name: replace(found, limits=(0.0, math.inf)) for name, found in ratios.items()}
