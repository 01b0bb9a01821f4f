"""Records → leaderboards: CSV with all digits, Markdown and terminal tables rounded, from one frame."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from mergesec.files import write_atomic
from mergesec.records import Count, Record
from mergesec.statistics import Bootstrap, Estimate, mean, nothing, ratio, tiers

LEAST_LOSS = 0.01
"""Recovery is undefined where protecting cost the merge less than one point: nothing to recover."""

Row = dict[str, Any]
Which = str  # "subject" | "others" | "all"


@dataclass(frozen=True)
class Board:
    """One leaderboard. ``measures`` are the columns that have ``_low`` and ``_high`` beside them."""

    name: str
    title: str
    frame: pd.DataFrame
    measures: tuple[str, ...]
    note: str = ""


@dataclass
class Reader:
    """Estimates over a group of records."""

    bootstrap: Bootstrap = field(default_factory=Bootstrap)

    def rate(self, records: Iterable[Record], metric: str, role: str, which: Which) -> Estimate:
        """Mean rate over subjects, expert sets and tasks; seeds paired, never pooled with samples."""
        groups: dict[tuple[Any, ...], dict[int, Count]] = {}
        for record in records:
            for task in self._tasks(record, which):
                count = record.counts.get(f"{metric}/{role}/{task}")
                if count is not None:
                    row = (record.merging, record.attack, record.defense)
                    place = (row, record.subject, record.target_class, tuple(record.experts), task)
                    groups.setdefault(place, {})[record.seed] = count
        return mean([self.bootstrap.rate(place[-1], counts) for place, counts in groups.items()])

    @staticmethod
    def _tasks(record: Record, which: Which) -> list[str]:
        if which == "subject":
            return [record.subject]
        return [t for t in record.experts if which == "all" or t != record.subject]

    def task(self, records: Iterable[Record], role: str, task: str) -> Estimate:
        """Accuracy of ``role`` on one task."""
        return self.rate([r.model_copy(update={"subject": task}) for r in records], "acc", role, "subject")


def _put(row: Row, name: str, estimate: Estimate) -> None:
    row[name] = estimate.value
    row[f"{name}_low"], row[f"{name}_high"] = estimate.interval()


def _group(
    records: Iterable[Record], key: Callable[[Record], tuple[Any, ...]]
) -> dict[tuple[Any, ...], list[Record]]:
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def _cells(row: Row, records: Sequence[Record]) -> list[Record]:
    """Note how complete the row is; the records that count."""
    done = [r for r in records if r.status == "done"]
    row["cells_done"], row["cells_expected"] = len(done), len(records)
    row["seeds"] = len({r.seed for r in done})
    return done


# --------------------------------------------------------------------------- clean


def clean_board(records: Sequence[Record], reader: Reader) -> Board | None:
    """Accuracy per merge method and task, absolute and normalised by the expert, beside base and experts."""
    records = [r for r in records if r.threat == "clean"]
    if not records:
        return None
    tasks = list(dict.fromkeys(t for r in records for t in r.experts))
    rows: list[Row] = []
    estimates: list[Estimate] = []

    def add(name: str, role: str, group: Sequence[Record], experts: int | str) -> None:
        row: Row = {"method": name, "experts": experts}
        done = _cells(row, group)
        overall = reader.rate(done, "acc", role, "all")
        per_task = {t: reader.task(done, role, t) for t in tasks}
        normal = [
            ratio(e, reader.task(done, "expert", t)) for t, e in per_task.items() if not math.isnan(e.value)
        ]
        _put(row, "accuracy", overall)
        _put(row, "normalised", mean(normal))
        for task, estimate in per_task.items():
            row[task] = estimate.value
        rows.append(row)
        estimates.append(overall if role == "clean_merge" else nothing())

    for (merging, experts), group in _group(records, lambda r: (r.merging, len(r.experts))).items():
        add(merging, "clean_merge", group, experts)
    for experts in {row["experts"] for row in rows}:  # merges of two and of eight are not one contest
        mine = [i for i, row in enumerate(rows) if row["experts"] == experts]
        for i, tier in zip(mine, tiers([estimates[i] for i in mine]), strict=True):
            rows[i]["tier"] = tier
    add("(experts)", "expert", records, 1)
    add("(base)", "base", records, 0)
    frame = _sorted(pd.DataFrame(rows), "accuracy", ascending=False)
    return Board("clean", "Merging without attack or defense", frame, ("accuracy", "normalised"))


# --------------------------------------------------------------------------- protection


def protection_boards(records: Sequence[Record], reader: Reader) -> list[Board]:
    """Every defense × attack × method, and per defense its worst case over attacks and methods."""
    records = [r for r in records if r.threat == "protection"]
    if not records:
        return []
    rows: list[Row] = []
    merged: dict[int, Estimate] = {}
    recoveries: dict[int, Estimate] = {}
    several = any(r.protected > 1 for r in records)
    key = _group(records, lambda r: (r.defense, r.attack, r.merging, len(r.experts), r.protected, r.secrets))
    for (defense, attack, merging, experts, protected, secrets), group in key.items():
        row: Row = {"defense": defense, "attack": attack, "method": merging, "experts": experts}
        if several:
            row |= {"protected": protected, "secrets": secrets if protected > 1 else "own"}
        done = _cells(row, group)
        part = {
            name: reader.rate(done, "acc", role, which)
            for name, role, which in (
                ("UMP-", "expert", "subject"), ("UMP+", "published", "subject"),
                ("UMP_attacked", "recovered", "subject"), ("MMP-", "clean_merge", "subject"),
                ("MMP+", "protected_merge", "subject"), ("MMP_attacked", "merge", "subject"),
                ("free_rider-", "clean_merge", "others"), ("free_rider+", "protected_merge", "others"),
                ("free_rider_attacked", "merge", "others"), ("base", "base", "subject"),
                ("UMP+_bf16", "published_bf16", "subject"),
            )
        }  # fmt: skip
        # attack none is the protection as it stands: it recovers nothing by definition
        undefined = attack == "none" or defense == "none"
        part["recovery"] = (
            nothing()
            if undefined
            else ratio(part["MMP_attacked"] - part["MMP+"], part["MMP-"] - part["MMP+"], LEAST_LOSS)
        )
        for name, estimate in part.items():
            _put(row, name, estimate)
        gaps = [r.values["max_abs_dlogit"] for r in done if "max_abs_dlogit" in r.values]
        row["max_abs_dlogit"] = max(gaps) if gaps else math.nan
        merged[len(rows)], recoveries[len(rows)] = part["MMP_attacked"], part["recovery"]
        rows.append(row)
    measures = tuple(part)
    frame = pd.DataFrame(rows)
    detail = Board("protection_cells", "Protection: every defense × attack × method", frame, measures)
    boards = [_protection_summary(rows, records, reader, merged, recoveries), detail]
    return [b for b in (*boards, _distances(records), ownership_board(records, reader)) if b is not None]


STANDARD = "aga"
"""The published attack every protection is held to, shown beside the best known one."""


def _protection_summary(
    rows: list[Row], records: Sequence[Record], reader: Reader,
    merged: Mapping[int, Estimate], recoveries: Mapping[int, Estimate],
) -> Board:  # fmt: skip
    summary: list[Row] = []
    contest: list[Estimate] = []
    for (defense,), group in _group(records, lambda r: (r.defense,)).items():
        row: Row = {"defense": defense}
        done = _cells(row, group)
        before = reader.rate(done, "acc", "expert", "subject")
        published = reader.rate(done, "acc", "published", "subject")
        _put(row, "stand_alone", published)
        _put(row, "stand_alone_loss", before - published)
        _put(row, "stand_alone_loss_bf16", before - reader.rate(done, "acc", "published_bf16", "subject"))
        _put(row, "MMP-", reader.rate(done, "acc", "clean_merge", "subject"))
        _put(row, "MMP+", reader.rate(done, "acc", "protected_merge", "subject"))
        mine = [i for i, r in enumerate(rows) if r["defense"] == defense and r["cells_done"]]
        standard, _ = _worst([i for i in mine if rows[i]["attack"] == STANDARD], rows, recoveries)
        _put(row, f"recovery_{STANDARD}", standard)
        most, row["recovered_by"] = _worst(mine, rows, recoveries)
        _put(row, "worst_recovery", most)
        worst, row["worst_by"] = _worst(mine, rows, merged)
        _put(row, "worst_merged", worst)
        gaps = [r.values["max_abs_dlogit"] for r in done if "max_abs_dlogit" in r.values]
        row["max_abs_dlogit"] = max(gaps) if gaps else math.nan
        contest.append(most if defense != "none" else nothing())
        summary.append(row)
    for row, tier in zip(summary, tiers(contest, higher_is_better=False), strict=True):
        row["tier"] = tier
    frame = _sorted(pd.DataFrame(summary), "worst_recovery", ascending=True)
    measures = (
        "stand_alone", "stand_alone_loss", "stand_alone_loss_bf16", "MMP-", "MMP+", f"recovery_{STANDARD}",
        "worst_recovery", "worst_merged",
    )  # fmt: skip
    note = (
        f"Sorted by recovery under the strongest attack and method, lower protects better; recovery_{STANDARD} is the "
        "standard attack. Recovery is a share of what protecting cost the merge (MMP- minus MMP+): a protection that "
        "costs it little is weak whatever its recovery; no number where it cost less than one point. MMP- and MMP+ are "
        "means over a row's own cells: compare rows that were run in the same settings."
    )
    return Board("protection", "Protection: per defense, worst case", frame, measures, note)


KINDS = ("query", "key", "value", "output", "up", "gate", "down", "other", "all")


def _distances(records: Sequence[Record]) -> Board | None:
    """Per defense and attack: how far the weights lie from the base and from the owner's expert, relative to
    the norm of what they are compared with; condition numbers; largest differences of logits."""
    rows: list[Row] = []
    done = [r for r in records if r.status == "done" and r.defense != "none"]
    for (defense, attack), group in _group(done, lambda r: (r.defense, r.attack)).items():
        row: Row = {"defense": defense, "attack": attack}
        suffix = "" if attack == "none" else "_recovered"
        for which in ("to_expert", "to_base"):
            for kind in KINDS:
                found = [
                    r.values[f"distance{suffix}/{which}/{kind}"]
                    for r in group
                    if f"distance{suffix}/{which}/{kind}" in r.values
                ]
                if found:
                    row[f"{which}/{kind}"] = sum(found) / len(found)
        gaps = [r.values[f"max_abs_dlogit{suffix}"] for r in group if f"max_abs_dlogit{suffix}" in r.values]
        row["max_abs_dlogit"] = max(gaps) if gaps else math.nan
        conditions = [float(c) for r in group if (c := _reported(r, "condition")) is not None]
        row["condition"] = max(conditions) if conditions else math.nan
        rows.append(row)
    if not any(f"to_base/{kind}" in row for row in rows for kind in KINDS):
        return None
    note = "Attack none is the published expert, others what the attack made of it. to_x = ‖θ − x‖ / ‖x‖, means over cells; condition and max_abs_dlogit are maxima."
    return Board("protection_distances", "Protection: distances", pd.DataFrame(rows), (), note)


def _reported(record: Record, name: str) -> Any:
    return record.facts.get("protection", {}).get(name)


SUSPECTS = ("published", "recovered", "protected_merge", "merge", "clean_merge", "expert", "base")


def ownership_board(records: Sequence[Record], reader: Reader) -> Board | None:
    """Per mark × attack × method: share of queries or bits that answer, and share of cells that verify, on
    each suspect. ``clean_merge``, ``expert`` and ``base`` were never marked: what verifies there is a false alarm."""
    records = [r for r in records if any(name.startswith("mark/") for name in r.counts)]
    if not records:
        return None
    rows: list[Row] = []
    groups = _group(records, lambda r: (r.defense, r.attack, r.merging, len(r.experts)))
    for (defense, attack, merging, experts), group in groups.items():
        row: Row = {"defense": defense, "attack": attack, "method": merging, "experts": experts}
        done = _cells(row, group)
        for suspect in SUSPECTS:
            found = [r.values[f"detected/{suspect}"] for r in done if f"detected/{suspect}" in r.values]
            row[f"verified/{suspect}"] = sum(found) / len(found) if found else math.nan
        for suspect in SUSPECTS:
            _put(row, f"mark/{suspect}", reader.rate(done, "mark", suspect, "subject"))
        _put(
            row,
            "stand_alone_loss",
            reader.rate(done, "acc", "expert", "subject") - reader.rate(done, "acc", "published", "subject"),
        )
        rows.append(row)
    measures = (*(f"mark/{s}" for s in SUSPECTS), "stand_alone_loss")
    note = "verified = share of cells in which the owner's test says yes; merge is after the free-rider's attack. clean_merge, expert and base bear no mark."
    return Board("ownership", "Ownership: marks after merging", pd.DataFrame(rows), measures, note)


def _worst(mine: Sequence[int], rows: Sequence[Row], of: Mapping[int, Estimate]) -> tuple[Estimate, str]:
    """The owner's worst case among rows: the largest measured estimate, and what attack and method it is."""
    measured = [i for i in mine if not math.isnan(of[i].value)]
    if not measured:
        return nothing(), ""
    place = max(measured, key=lambda i: of[i].value)
    return of[place], f"{rows[place]['attack']} + {rows[place]['method']}"


# --------------------------------------------------------------------------- backdoor

_BACKDOOR = (
    ("CA", "acc", "clean_merge", "all"), ("BA", "acc", "merge", "all"),
    ("ASR_alone", "asr", "poisoned", "subject"), ("acc_alone", "acc", "poisoned", "subject"),
    ("succession", "asr", "merge", "subject"), ("transfer", "asr", "merge", "others"),
    ("succession_clean_merge", "asr", "clean_merge", "subject"),
    ("transfer_clean_merge", "asr", "clean_merge", "others"),
    ("succession_base", "asr", "base", "subject"), ("transfer_base", "asr", "base", "others"),
    ("RA", "ra", "merge", "subject"),
)  # fmt: skip


def backdoor_board(records: Sequence[Record], reader: Reader) -> Board | None:
    """Per attack × method × defense: accuracy and ASR beside the controls."""
    records = [r for r in records if r.threat == "backdoor"]
    if not records:
        return None
    rows: list[Row] = []
    parts: dict[tuple[Any, ...], dict[str, Estimate]] = {}
    groups = _group(records, lambda r: (r.attack, r.merging, len(r.experts), r.defense))
    for (attack, merging, experts, defense), group in groups.items():
        row: Row = {"attack": attack, "method": merging, "defense": defense, "experts": experts}
        done = _cells(row, group)
        part = {name: reader.rate(done, m, role, which) for name, m, role, which in _BACKDOOR}
        part["backdoor"] = part["succession"] - part["succession_clean_merge"]
        parts[attack, merging, experts, defense] = part
        rows.append(row)
    for row, (key, part) in zip(rows, parts.items(), strict=True):
        plain = parts.get((*key[:3], "none"))
        part["DER"] = _der(plain, part) if plain is not None and key[3] != "none" else nothing()
        for name, estimate in part.items():
            _put(row, name, estimate)
    for contest, keys in _by_contest(parts).items():
        ranked = tiers([parts[k]["succession"] for k in keys], higher_is_better=False)
        for k, tier in zip(keys, ranked, strict=True):
            place = list(parts).index(k)
            rows[place]["tier"] = tier if contest[0] != "none" else 0
    measures = (*(name for name, *_ in _BACKDOOR), "backdoor", "DER")
    note = "ASR on non-target samples. `backdoor` = succession minus the same trigger on the clean merge. Tiers rank defenses within one attack and method."
    return Board("backdoor", "Backdoor: attack × method × defense", pd.DataFrame(rows), measures, note)


def _by_contest(parts: Mapping[tuple[Any, ...], Any]) -> dict[tuple[Any, ...], list[tuple[Any, ...]]]:
    contests: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    for key in parts:
        contests.setdefault(key[:3], []).append(key)
    return contests


def _der(before: Mapping[str, Estimate], after: Mapping[str, Estimate]) -> Estimate:
    """Defense effectiveness rating, [max(0, ΔASR) − max(0, ΔACC) + 1] / 2."""
    asr, acc = before["succession"] - after["succession"], before["BA"] - after["BA"]
    value = (max(0.0, asr.value) - max(0.0, acc.value) + 1) / 2
    if math.isnan(asr.value) or math.isnan(acc.value):
        return nothing()
    return Estimate(value, (asr.draws.clip(min=0) - acc.draws.clip(min=0) + 1) / 2)


# --------------------------------------------------------------------------- cost


def cost_board(records: Sequence[Record]) -> Board | None:
    """Mean seconds and peak memory of each method's own step, as measured when it was computed."""
    gathered: dict[tuple[str, str], dict[str, tuple[float, float]]] = {}
    for record in records:
        owners = [("merging", record.merging, "clean_merge")]
        if record.threat == "protection":
            owners += [("defense", record.defense, "published"), ("attack", record.attack, "recovered")]
        elif record.threat == "backdoor":
            owners += [("attack", record.attack, "poisoned"), ("defense", record.defense, "merge")]
        for kind, name, role in owners:
            cost = record.cost.get(role, {})
            if name != "none" and "made_seconds" in cost:
                step = record.steps[role]
                gathered.setdefault((kind, name), {})[step] = (cost["made_seconds"], cost["made_peak_mb"])
    rows = [
        {
            "kind": kind, "name": name, "runs": len(steps),
            "seconds": sum(s for s, _ in steps.values()) / len(steps),
            "peak_mb": max(m for _, m in steps.values()),
        }
        for (kind, name), steps in gathered.items()
    ]  # fmt: skip
    if not rows:
        return None
    return Board("cost", "Cost of each method's own step", pd.DataFrame(rows), ())


# --------------------------------------------------------------------------- output


def _sorted(frame: pd.DataFrame, by: str, ascending: bool) -> pd.DataFrame:
    return frame.sort_values(by, ascending=ascending, kind="stable", na_position="last").reset_index(
        drop=True
    )


def make_boards(records: Sequence[Record]) -> list[Board]:
    """All boards these records support. The two threat models never share one."""
    reader = Reader()
    boards = [
        clean_board(records, reader),
        *protection_boards(records, reader),
        backdoor_board(records, reader),
    ]
    return [b for b in [*boards, cost_board(records)] if b is not None]


_SHOWN: dict[str, tuple[str, ...]] = {
    "protection": ("defense", "stand_alone_loss", "MMP-", "MMP+", f"recovery_{STANDARD}", "worst_recovery",
                   "recovered_by", "worst_merged", "max_abs_dlogit"),
    "protection_cells": ("defense", "attack", "method", "experts", "protected", "secrets", "UMP-", "UMP+",
                         "UMP_attacked", "MMP-", "MMP+", "MMP_attacked", "free_rider+", "recovery"),
    "protection_distances": ("defense", "attack", "to_expert/all", "to_base/all", "to_base/query",
                             "to_base/value", "to_base/up", "condition", "max_abs_dlogit"),
    "ownership": ("defense", "attack", "method", "experts", "verified/published", "verified/protected_merge",
                  "verified/merge", "verified/clean_merge", "mark/published", "mark/protected_merge",
                  "mark/merge", "mark/clean_merge", "stand_alone_loss"),
    "backdoor": ("attack", "method", "defense", "experts", "CA", "BA", "ASR_alone", "succession",
                 "succession_clean_merge", "succession_base", "transfer", "transfer_clean_merge"),
}  # fmt: skip
_PLAIN = ("max_abs_dlogit", "seconds", "peak_mb", "DER", "condition")


def display(board: Board) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text: percentages with half-widths of intervals, incomplete rows marked."""
    frame = board.frame
    hidden = {f"{m}{end}" for m in board.measures for end in ("_low", "_high")}
    hidden |= {"cells_done", "cells_expected", "seeds", "tier"}
    columns = [
        c for c in _SHOWN.get(board.name, tuple(frame.columns)) if c in frame.columns and c not in hidden
    ]
    extra = [c for c in ("tier", "cells") if (c == "cells" and "cells_done" in frame) or c in frame.columns]
    rows = []
    for _, row in frame.iterrows():
        texts = [_text(row, c, board.measures) for c in columns]
        for c in extra:
            if c == "tier":
                texts.append("" if pd.isna(row["tier"]) or row["tier"] == 0 else str(int(row["tier"])))
            else:
                done, expected = int(row["cells_done"]), int(row["cells_expected"])
                texts.append(f"{done}/{expected}" + ("" if done == expected else " incomplete"))
        rows.append(texts)
    return [*columns, *extra], rows


def _text(row: Any, column: str, measures: Sequence[str]) -> str:
    value = row[column]
    if isinstance(value, str):
        return value
    if value is None or pd.isna(value):
        return "–"
    if column in _PLAIN or column.startswith("to_"):
        return f"{value:.3g}"
    if column in measures:
        low, high = row[f"{column}_low"], row[f"{column}_high"]
        return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    if isinstance(value, float):
        return f"{100 * value:.1f}"
    return str(value)


def markdown(board: Board) -> str:
    header, rows = display(board)
    lines = [f"## {board.title}", ""]
    if board.note:
        lines += [board.note, ""]
    lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(r) + " |" for r in rows]
    return "\n".join(lines) + "\n"


def marks(records: Sequence[Record]) -> list[str]:
    """What a reader must know before comparing: partial data, the transductive protocol."""
    partial: dict[str, str] = {}
    for record in records:
        partial |= record.provenance.get("partial", {})
    notes = [f"partial data: {task} ({how})" for task, how in sorted(partial.items())]
    if any(r.protocol == "transductive" for r in records):
        notes.append("transductive: methods that adapt saw the test inputs, without labels")
    return notes


_EXPLAINED = (
    "Percent with 95 % paired bootstrap intervals over seeds and test samples; equal tiers are not separable."
)


def write_boards(folder: Path, boards: Sequence[Board], title: str, notes: Sequence[str] = ()) -> list[Path]:
    """``<name>.csv`` with all digits for each board, and one ``boards.md``; the paths written."""
    paths = []
    for old in folder.glob("*.csv"):  # a board this grid no longer has must not look current
        if old.stem not in {b.name for b in boards}:
            old.unlink()
    for board in boards:
        path = folder / f"{board.name}.csv"
        write_atomic(path, board.frame.to_csv(index=False).encode())
        paths.append(path)
    head = "\n".join([f"# {title}", "", _EXPLAINED, *(f"\n* {n}" for n in notes), "", ""])
    path = folder / "boards.md"
    write_atomic(path, (head + "\n".join(markdown(b) for b in boards)).encode())
    return [*paths, path]
