"""From measures to sentences: each with the numbers behind it, and how often its kind is wrong. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mergesec.scanning.reference import (
    HONEST,
    NEARER,
    POISONED,
    PROTECTED,
    Rate,
    Reference,
    Specimen,
    deviations,
    re_alignable,
    spreads,
    unlike_honest,
)

if TYPE_CHECKING:
    from mergesec.scanning.measures import Measured

FEW_OTHERS = 3
OUTLIER = 3.5
"""The usual limit of a robust z-score; only where there is no table."""
WORDS = {
    "length": "length", "rank": "effective rank of the maps' changes", "direction": "share of the top direction",
    "entries": "share of the largest hundredth of the entries", "row": "row or column that changed most",
    "untouched": "share of untouched entries", "depth": "depth at which it changed", "last": "share of the last block",
    "outside": "share outside the blocks", "scores": "share of query and key", "values": "share of value and output",
    "down": "share of the MLP's second map",
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """A sentence and what it rests on. ``sign``: something that speaks against merging."""

    topic: str
    sentence: str
    sign: bool = False
    numbers: Mapping[str, Any] = field(default_factory=dict)
    errors: Mapping[str, Any] = field(default_factory=dict)
    """How often a test like this one is wrong, on experts that its threshold was not chosen on."""


@dataclass(frozen=True)
class Subject:
    """What was measured of an expert, and beside what."""

    measured: Measured
    others: Mapping[str, Measured]
    reference: Reference | None
    why_no_blocks: str = ""
    told: str = ""
    """What of its tensors did not fit the base, and was left out."""


def findings(of: Subject) -> list[Finding]:
    """Everything that needs no data."""
    found = [_length(of)]
    if of.measured.blocks:
        found += [_where(of), _shape(of), _protection(of)]
    if of.reference is not None and of.measured.blocks:
        found.append(_unlike(of, of.reference))
    if of.others:
        found.append(_others(of))
    if of.told:
        found.insert(0, Finding("layout", f"Of its tensors, beside the base's: {of.told}."))
    if of.measured.moved_integers:
        found.append(
            Finding("layout", "Integer tensors differ from the base's; a merge keeps the base's.", True)
        )
    return found


def _length(of: Subject) -> Finding:
    m = of.measured
    sentence = f"The task vector is {100 * m.plain_length:.3g} % as long as the base"
    numbers: dict[str, Any] = {"plain": m.plain_length}
    if m.blocks:
        sentence += f", {100 * m.length:.3g} % after coupled re-alignment"
        numbers["aligned"] = m.length
    if of.reference is not None:
        lengths = [math.exp(h.features["length"]) for h in of.reference.honest]
        numbers["honest"] = [min(lengths), max(lengths)]
        sentence += f" (honest experts of this base: {100 * min(lengths):.3g} to {100 * max(lengths):.3g} %)"
    return Finding("length", f"{sentence}.", numbers=numbers)


def _where(of: Subject) -> Finding:
    blocks = of.measured.blocks
    total = sum(b.aligned for b in blocks) + sum(c for c, _ in of.measured.outside.values())
    shares = [b.aligned / total if total else 0.0 for b in blocks]
    top = max(range(len(blocks)), key=shares.__getitem__)
    kinds = {k: sum(b.maps[k].energy for b in blocks if k in b.maps) for b in blocks for k in b.maps}
    kind = max(kinds, key=kinds.__getitem__)
    return Finding(
        "where",
        f"Block {top + 1} of {len(blocks)} has {100 * shares[top]:.0f} % of its energy, the {kind} maps "
        f"{100 * kinds[kind] / max(sum(kinds.values()), 1e-300):.0f} % of that of all maps; "
        f"{100 * (1 - sum(shares)):.0f} % lies outside the blocks.",
        numbers={"by_block": shares, "by_map": kinds},
    )


def _shape(of: Subject) -> Finding:
    maps = [m for b in of.measured.blocks for m in b.maps.values() if m.energy > 0]
    if not maps:
        return Finding("shape", "No map of a block changed.", numbers={"maps": 0})
    rank, top = (_middle([getattr(m, n) for m in maps]) for n in ("effective_rank", "top_direction"))
    untouched = sum(m.untouched for m in maps) / len(maps)
    return Finding(
        "shape",
        f"Of a map's change the top direction holds {100 * top:.0f} % (median), and the effective rank is "
        f"{100 * rank:.1f} % of the full one; {100 * untouched:.0f} % of the entries are the base's, bit for bit.",
        numbers={"top_direction": top, "effective_rank": rank, "untouched": untouched},
    )


def _middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


# --------------------------------------------------------------------------- the two tests


def specimen(measured: Measured) -> Specimen:
    """The expert as the tests take it."""
    return Specimen("", "", "", 0, measured.features(), measured.protection())


def _protection(of: Subject) -> Finding:
    measured = of.measured
    limit = NEARER if of.reference is None else of.reference.limits["protected"]
    score = re_alignable(specimen(measured), ())
    condition = max(b.condition for b in measured.blocks)
    moved = [
        sum(getattr(b, n) for b in measured.blocks) / len(measured.blocks)
        for n in ("moved_heads", "moved_units")
    ]
    rounding = max(b.rounding for b in measured.blocks)
    nearer = f"{math.exp(score):.3g} times nearer to the base (flagged above {math.exp(limit):.3g})"
    facts = (
        f"it multiplies heads by matrices of condition number up to {condition:.3g} and moves {100 * moved[0]:.0f} % "
        f"of the heads and {100 * moved[1]:.0f} % of the hidden units; rounding to bfloat16 costs a head's products up "
        f"to {rounding:.3g} times what it costs the base's"
    )
    sign = score > limit
    start = (
        "Signs of a protection that keeps the function"
        if sign
        else "No sign of a protection that keeps the function"
    )
    return Finding(
        "protection", f"{start}: coupled re-alignment brings the blocks {nearer}; {facts}.", sign,
        {"nearer": math.exp(score), "limit": math.exp(limit), "condition": condition, "moved_heads": moved[0],
         "moved_units": moved[1], "rounding": rounding},
        _errors(of.reference, "protected", PROTECTED),
    )  # fmt: skip


def mergeable(of: Subject) -> Finding | None:
    """Of a protected expert: whether what re-alignment makes of it looks like an honest expert."""
    protection = _protection(of)
    if not protection.sign:
        return None
    if of.reference is None:
        return Finding(
            "mergeable", "Whether the re-aligned weights can be merged was not compared with honest experts: there is "
            "no reference table of this base.",
        )  # fmt: skip
    unlike = _unlike(of, of.reference)
    verdict = "are unlike" if unlike.sign else "look like"
    return Finding(
        "mergeable",
        f"The re-aligned weights {verdict} those of honest experts (score {unlike.numbers['score']:.3g}, flagged above "
        f"{unlike.numbers['limit']:.3g}): {'do not count on' if unlike.sign else 'merge'} these, not the published ones.",
        numbers=unlike.numbers, errors=unlike.errors,
    )  # fmt: skip


def _unlike(of: Subject, reference: Reference) -> Finding:
    own = specimen(of.measured)
    score, limit = unlike_honest(own, reference.honest), reference.limits["unlike"]
    among = spreads([h.features for h in reference.honest])
    z = deviations(own.features, among)
    leading = sorted(z, key=lambda n: -abs(z[n]))[:3]
    why = ", ".join(f"{WORDS.get(n, n)} {'above' if z[n] > 0 else 'below'} ({z[n]:+.1f})" for n in leading)
    sign = score > limit
    start = "Unlike honest experts of this base" if sign else "Not unlike honest experts of this base"
    return Finding(
        "unlike", f"{start}: score {score:.3g} (flagged above {limit:.3g}); most in {why}.", sign,
        {"score": score, "limit": limit, "z": z, "honest": len(reference.honest)},
        _errors(reference, "unlike", POISONED),
    )  # fmt: skip


def _errors(reference: Reference | None, test: str, kind: str) -> dict[str, Any]:
    """False alarms among honest experts, and misses by attack or protection."""
    if reference is None:
        return {}
    rates = reference.rates[test]
    missed = {maker: _rate(Rate(r.n - r.k, r.n, r.tasks)) for (k, maker), r in rates.items() if k == kind}
    return {"false_alarms": _rate(rates[HONEST, ""]), "missed": missed}


def _rate(rate: Rate) -> dict[str, Any]:
    return {"k": rate.k, "n": rate.n, "tasks": rate.tasks, "interval": list(rate.interval)}


def error_line(errors: Mapping[str, Any]) -> str:
    """False alarms and misses in words; empty where nobody measured them."""
    if not errors:
        return ""
    alarms = _shown(errors["false_alarms"])
    missed = ", ".join(f"{maker} {_shown(r)}" for maker, r in errors["missed"].items())
    return f"wrong, on experts of other tasks: false alarms {alarms}; missed: {missed or 'nobody counted'}"


def _shown(rate: Mapping[str, Any]) -> str:
    return str(Rate(rate["k"], rate["n"], rate["tasks"]))


# --------------------------------------------------------------------------- beside the others


def _others(of: Subject) -> Finding:
    cosines = {name: c[0] for name, c in of.measured.cosines.items()}
    top = max(cosines, key=lambda n: abs(cosines[n]))
    lengths = {name: m.length for name, m in of.others.items()}
    sentence = (
        f"Beside {len(lengths)} other expert{'s' * (len(lengths) > 1)} (lengths {100 * min(lengths.values()):.3g} to "
        f"{100 * max(lengths.values()):.3g} %): its cosine is largest with {top}, {cosines[top]:+.3f}"
    )
    numbers: dict[str, Any] = {"cosines": cosines, "lengths": lengths}
    if len(of.others) < FEW_OTHERS:
        return Finding("others", f"{sentence}; too few to call anything an outlier.", numbers=numbers)
    z = deviations(of.measured.features(), spreads([m.features() for m in of.others.values()]))
    lead = max(z, key=lambda n: abs(z[n]))
    numbers["z"] = z
    ending = (
        f"furthest from them in {WORDS.get(lead, lead)} ({z[lead]:+.1f}; not calibrated, few are compared)"
    )
    return Finding("others", f"{sentence}; {ending}.", numbers=numbers)


# --------------------------------------------------------------------------- on inputs

GAIN = 0.05
"""Accuracy that re-alignment has to bring to a merge before it is said to make the expert mergeable."""


def told(seen: Mapping[str, Any], reference: Reference | None) -> list[Finding]:
    """Sentences about what a network did on a task's tuning rows."""
    shares = {name: 100 * value for name, value in seen["accuracy"].items()}
    gain = (shares["aligned_merge"] - shares["merge"]) / 100
    ending = "makes it mergeable" if gain > GAIN else "does not change what is left of it"
    found = [
        Finding(
            "accuracy", f"On {seen['rows']} tuning rows of {seen['task']} it is right in {shares['expert']:.1f} % (the "
            f"base in {shares['base']:.1f} %).", numbers=seen["accuracy"],
        ),
        Finding(
            "merge", f"A merge of {seen['experts']} with coefficient 0.3 is right in {shares['merge']:.1f} % with the "
            f"published weights and in {shares['aligned_merge']:.1f} % with the re-aligned ones: coupled re-alignment "
            f"{ending}.", numbers={"gain": gain},
        ),
    ]  # fmt: skip
    return found + ([_probed(seen["probe"], reference)] if "probe" in seen else [])


def _probed(probe: Mapping[str, Any], reference: Reference | None) -> Finding:
    """Never a sign: where it was measured, it flags honest and poisoned experts of a task alike."""
    limit = None if reference is None else reference.limits.get("trigger")
    above = limit is not None and probe["share"] > limit
    start = "A probe turns more of its inputs than usual" if above else "No probe turns it unusually"
    beyond = "not calibrated" if limit is None else f"unusual above {100 * limit:.0f} %"
    return Finding(
        "trigger", f"{start}: {probe['probe']} sends {100 * probe['share']:.0f} % to class {probe['label']} ({beyond}); "
        "it tells little, and is no sign.", False, {**probe, "limit": limit},
        _errors(reference if limit is not None else None, "trigger", POISONED),
    )  # fmt: skip


# --------------------------------------------------------------------------- what stays open


def could_not_tell(of: Subject, data: bool) -> list[str]:
    """What nobody should take this scan to have answered."""
    open_ = []
    if not of.measured.blocks:
        open_.append(f"where it changed, and whether it is protected: {of.why_no_blocks}")
    if of.reference is None:
        open_.append(
            "what is usual for experts of this base: no reference table of it (bench scan --calibrate makes one)"
        )
    if len(of.others) < FEW_OTHERS:
        open_.append(
            f"whether it is an outlier among those it would be merged with: give {FEW_OTHERS} or more, --against"
        )
    if not data:
        open_.append("what it does on inputs, and what a trigger would do: no task was given (--task)")
    open_.append(
        "whether a backdoor is there that changes weights no more than fine-tuning does: see the rates of misses"
    )
    open_.append(
        "protections by training, which leave nothing to align, and attacks that no expert of the table was made by"
    )
    return open_
