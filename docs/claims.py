"""Claims of the literature as data: where a board answers each, and the rule that turns its estimate into a verdict.

``docs/generate.py`` fills [docs/claims.md](claims.md) from here, between ``<!-- claims: SECTION -->`` markers. A
query that names one row of a board shows that row's value and interval. A difference of two columns or of two rows
is made from the records under those rows, over the cells that both have, paired in seeds and test samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd

from mergesec.errors import UsageError, nearest
from mergesec.evidence.estimates import Reader, cell_of, fewest_seeds, only
from mergesec.evidence.records import Record, read_records
from mergesec.evidence.statistics import Estimate
from mergesec.threats import Role, Threat

RECORDS = Path(__file__).resolve().parents[1] / "results" / "records"
Rows = Callable[[str, Mapping[str, str]], pd.DataFrame]
"""The rows of a board, ``GRID/NAME``, that fit a filter; UsageError where none does."""


class Source(StrEnum):
    """How a claim was read."""

    PAPER = "primary: the paper"
    RELEASE = "primary: code, logs, docs or reviews"
    MIXED = "code read, numbers in part from summaries"
    NOTES = "secondary: summaries"
    MEMORY = "from memory"
    OURS = "this project"


class Query(NamedTuple):
    """A number of a board: a row and a column, or a difference."""

    board: str
    rows: Mapping[str, str]
    column: str
    minus: str = ""
    """A column of the same row that is subtracted."""
    less: Mapping[str, str] = {}
    """What to change in ``rows`` to find the row that is subtracted."""
    over: Literal["one", "least", "most"] = "one"
    """``one`` row must fit; or, of all that fit, the one with the least or most stands for the claim."""


class Rule(NamedTuple):
    """When an interval settles a claim: wholly beyond ``holds``, or wholly on the other side of ``fails``. Wholly on the
    good side of ``fails`` and no more is a part of it."""

    side: Literal["at least", "at most"]
    holds: float
    fails: float

    def __str__(self) -> str:
        sign = {"at least": ("≥", "≤"), "at most": ("≤", "≥")}[self.side]
        return f"{sign[0]} {self.holds:g}; not: {sign[1]} {self.fails:g}"


class Claim(NamedTuple):
    """One claim; without a query it cannot be tested here, and ``void`` says why (or why a number is no verdict)."""

    id: str
    section: str
    said: str
    by: str
    source: Source
    query: Query | None = None
    rule: Rule | None = None
    given: tuple[Query, Rule] | None = None
    """What must hold for the number to say anything about the claim."""
    void: str = ""


def least(holds: float, fails: float) -> Rule:
    """Holds at or above, fails at or below (percentage points)."""
    return Rule("at least", holds, fails)


def most(holds: float, fails: float) -> Rule:
    """Holds at or below, fails at or above."""
    return Rule("at most", holds, fails)


MORE, LESS = least(0, 0), most(0, 0)
"""Of a difference: its sign."""
TWO = least(2, 2)
"""Of what the safety term adds: the two points that are claimed, of which a part is what the ablation has too."""
SECTIONS = {
    "protection": "Protection", "backdoors": "Backdoors", "defenses": "Defenses against backdoors",
    "merging": "Merging", "behaviour": "Secrets and refusals", "ours": "This project's own",
}  # fmt: skip

# --------------------------------------------------------------------------- where to look

PAIR, EIGHT = "task_arithmetic(scaling=0.8)", "task_arithmetic"
BARE = {"attack": "none", "method": PAIR}
AMONG = {"attack": "none", "method": EIGHT}
PROTECTION, REAL_PROTECTION = "mini-protection/protection_cells", "real-protection/protection_cells"
GAUGE = "mini-protection-gauge/protection_cells"
FRONTIER = "mini-protection-frontier/protection_cells"
GENERATED = "mini-diffusion-protection/protection_cells"
GENERATED_GAUGE = "mini-diffusion-gauge/protection_cells"
LANGUAGE = "real-llm/protection_cells"
REFUSALS, GRADED = "real-llm-refusal/refusal", {"model": "merge", "experts": "refusal + verdict"}
FEATURES = "mini-merging-features/clean"
V1, V2 = {"defense": "params"}, {"defense": "params(scaling=nonsymmetric)"}
REPAIRS = "mini-backdoor-repairs/backdoor"
BACKDOOR, DEFENDED, MERGED = "mini-backdoor/backdoor", "mini-backdoor-defenses/backdoor", "mini-merging/clean"
OPTIMISED, FLAT = "badmerging(batch=32, restarts=*", "badmerging(batch=32, interpolation=False,*"
SQUARE, FLAT_SQUARE = "badmerging(trigger=*", "badmerging(interpolation=False, trigger=*"
OWN = "mini-backdoor-dam/backdoor"
BY_ADVERSARY = "mini-backdoor-coefficients/backdoor_adversaries"
ELSEWHERE = {"adversary": "mini/eurosat", "method": EIGHT}
"""Among the same four experts another malicious one."""
RELEASED = "dam(adamerging_steps=100, adv_lr=0.001, granularity=task, lr=0.01, mask_lr=0.01, steps=100)"
ABLATION = "dam(adamerging_steps=100, adv_lr=0.001, adv_weight=0, granularity=task, *"
LEARNT = "adamerging(granularity=task, *"
UNTUNED = "one threshold, the default u 3, and what CLP takes turns on it"


def _drop(defense: str, board: str = PROTECTION, **rows: str) -> Query:
    """What a protection costs the merge on the owner's task."""
    return Query(board, {**BARE, "defense": defense, **rows}, "MMP-", minus="MMP+")


def _alone(defense: str, board: str = PROTECTION, **rows: str) -> Query:
    """What a protection costs the expert alone."""
    return Query(board, {**BARE, "defense": defense, **rows}, "UMP-", minus="UMP+")


def _recovery(attack: str, defense: str, method: str = PAIR, board: str = PROTECTION, **rows: str) -> Query:
    """The share of the merge's loss that an attack brings back."""
    return Query(board, {"attack": attack, "defense": defense, "method": method, **rows}, "recovery")


def _asr(attack: str, method: str = EIGHT, board: str = BACKDOOR, **rows: str) -> Query:
    """Attack success on the merge."""
    return Query(board, {"attack": attack, "method": method, "defense": "none", **rows}, "succession")


def _takes(attack: str) -> tuple[Query, Rule]:
    """The backdoor works in the expert by itself."""
    query = Query(BACKDOOR, {"attack": attack, "method": EIGHT, "defense": "none"}, "ASR_alone")
    return query, least(50, 50)


def _taken(defense: str, attack: str = OPTIMISED, board: str = DEFENDED) -> Query:
    """Attack success that a defense takes away."""
    return Query(board, {"attack": attack, "defense": "none"}, "succession", less={"defense": defense})


def _words(defense: str) -> Query:
    """Attack success of a phrase that a defense takes away."""
    rows = {"attack": "phrase", "method": PAIR, "defense": "none"}
    return Query("mini-text-backdoor/backdoor", rows, "succession", less={"defense": defense})


_ADDED = Query("mini-backdoor-screens/backdoor", {"attack": "badmerging(*", "defense": "none"}, "backdoor")
"""What BadMerging adds where screens meet it."""


def _over_dam(
    attack: str,
    method: str = EIGHT,
    defense: str = "none",
    column: str = "succession",
    adversaries: str = "1",
) -> Query:
    """What DAM as released has less of than another merge, in its own setting."""
    rows = {"attack": attack, "method": method, "defense": defense, "adversaries": adversaries}
    return Query(OWN, rows, column, less={"method": EIGHT, "defense": RELEASED})


def _beats(method: str, other: str, board: str = MERGED) -> Query:
    """Accuracy of one merge method over another's."""
    return Query(board, {"method": method}, "accuracy", less={"method": other})


_PARAMS, _AGA = "PaRaMS, arXiv 2503.07661", "AGA and ARF, arXiv 2606.30360"
_LOCK, _GUARD = "MergeLock, arXiv 2509.01548", "MergeGuard, arXiv 2511.11851"
_BARRIER, _TRAP = "MergeBarrier, arXiv 2511.10712", "Trap², arXiv 2601.21898"
_BADMERGING, _DAM = "BadMerging, arXiv 2408.07362", "DAM, arXiv 2410.13910"
_REVIEWS = "DAM's public reviews"
_LOT, _COLLAPSE = "LOT Merging, arXiv 2505.23859", "Asymmetric Collapse, arXiv 2607.27240"
_HIJACKING = "Merge Hijacking, arXiv 2505.23561"
_FUSION = "FusionBench 0.2.33, its tables"
_PAPER, _RELEASE, _MIXED, _NOTES, _MEMORY, _OURS = Source

# --------------------------------------------------------------------------- the claims

CLAIMS: Sequence[Claim] = (
    # protection
    Claim("params-alone", "protection", "A PaRaMS expert is as accurate alone as before",
          _PARAMS, _PAPER, _alone("params"), most(0.5, 2)),
    Claim("params-alone-real", "protection", "The same on a network of twelve layers",
          _PARAMS, _PAPER, _alone("params(scaling=nonsymmetric)", REAL_PROTECTION, experts="2"), most(0.5, 2)),
    Claim("params-v1", "protection", "Its merge is ruined (diagonal scaling; published: 70 to 97 points lost in a pair)",
          _PARAMS, _NOTES, _drop("params"), least(50, 10)),
    Claim("params-v1-real", "protection", "The same on real images, twelve layers",
          _PARAMS, _NOTES, _drop("params", "real-smoke/protection_cells", experts="2"), least(50, 10)),
    Claim("params-v1-clip", "protection", "The same in the published protocol (frozen zero-shot heads, a small CLIP)",
          _PARAMS, _NOTES, _drop("params", "mini-clip/protection_cells", experts="2"), least(50, 10)),
    Claim("params-v2", "protection", "Its merge is ruined (scaling `nonsymmetric`, the release's default)",
          _PARAMS, _NOTES, _drop("params(scaling=nonsymmetric)"), least(50, 10)),
    Claim("params-eight", "protection", "The same among eight experts",
          _PARAMS, _NOTES, _drop("params(scaling=nonsymmetric)", method=EIGHT), least(50, 10)),
    Claim("params-pairs", "protection", "The same over every pair of owner and free-rider",
          _PARAMS, _NOTES, _drop("params*", "mini-protection-pairs/protection_cells", method="*"), least(50, 10)),
    Claim("params-free-rider", "protection", "The free-rider's own task is lost with it",
          _PARAMS, _NOTES, Query(PROTECTION, {**BARE, **V2}, "free_rider-", minus="free_rider+"), least(50, 10)),
    Claim("params-merges", "protection", "Average, TIES and DARE are ruined alike (least of the three)",
          _PARAMS, _NOTES,
          Query("mini-protection-merges/protection_cells",
                {**V2, "attack": "none", "method": "simple_average;ties;dare"}, "MMP-", minus="MMP+", over="least"),
          least(50, 10)),
    Claim("params-text", "protection", "It works on text (Llama-2, emotion: 97.6 → 21.4)",
          _PARAMS, _NOTES, _drop("params*", "real-text/protection_cells"), least(50, 10)),
    Claim("params-text-weak", "protection", "On text it is weak by itself (GPT-2: 68.8 → 51.4)",
          _AGA, _NOTES, _drop("params*", "real-text/protection_cells"), most(20, 40)),
    Claim("params-llm", "protection", "The same on a language model of the Llama family (here SmolLM2-135M, a pair)",
          _PARAMS, _NOTES, _drop("params", LANGUAGE, experts="2"), least(50, 10)),
    Claim("params-realign", "protection", "Matching hidden units to the base does not undo it",
          _PARAMS, _NOTES, _recovery("realign", "params", board="real-smoke/protection_cells"), most(20, 80)),
    Claim("params-dropout-alone", "protection", "Dropping 20 % of the update first keeps the accuracy",
          _PARAMS, _NOTES, _alone("params(dropout=0.2*"), most(1, 3)),
    Claim("params-dropout", "protection", "Dropping 20 % of the update first stops re-alignment (AGA)",
          _PARAMS, _NOTES, _recovery("aga", "params(dropout=0.2*"), most(20, 80)),
    Claim("params-lora", "protection", "It is weak where only LoRA factors are merged",
          _PARAMS, _NOTES, void="factors published alone cannot be transformed without the weights they are added to"),
    Claim("params-diffusion", "protection", "It protects image generators (Stable Diffusion 1.5: alignment 0.34 → 0.13; here a small diffusion transformer, a pair)",
          _PARAMS, _NOTES, _drop("params", GENERATED, experts="2"), least(20, 2)),
    Claim("params-diffusion-alone", "protection", "A protected generator draws alone what it drew before",
          _PARAMS, _NOTES, _alone("params", GENERATED, experts="2"), most(0.5, 2)),
    Claim("params-diffusion-aga", "protection", "AGA brings a protected generator back",
          _AGA, _NOTES, _recovery("aga", "params", board=GENERATED, experts="2"), least(80, 20)),
    Claim("mergelock-alone", "protection", "A MergeLock expert is as accurate alone as before",
          _LOCK, _PAPER, _alone("mergelock"), most(0.5, 2)),
    Claim("mergelock", "protection", "Merging it degrades “over 95 %” in most cases",
          _LOCK, _PAPER, _drop("mergelock"), least(80, 10)),
    Claim("mergelock-real", "protection", "The same on real images, twelve layers",
          _LOCK, _PAPER, _drop("mergelock", REAL_PROTECTION, experts="2"), least(80, 10)),
    Claim("mergelock-recovery", "protection", "It cannot be undone cheaply (AGA: no data, no training)",
          _LOCK, _PAPER, _recovery("aga", "mergelock"), most(20, 80)),
    Claim("mergelock-lora", "protection", "It destroys a LoRA expert alone (88.1 → 6.3)",
          _TRAP, _NOTES, void="LoRA experts are published as whole weights here"),
    Claim("aga-params-clip", "protection", "AGA undoes PaRaMS in the published protocol (a small CLIP, eight experts)",
          _AGA, _NOTES, _recovery("aga", "params", EIGHT, "mini-clip/protection_cells", experts="8"), least(90, 50)),
    Claim("aga-params", "protection", "AGA undoes PaRaMS (67.2 → 5.5 → 66.4)",
          _AGA, _NOTES, _recovery("aga", "params(scaling=nonsymmetric)", EIGHT), least(90, 50)),
    Claim("aga-mergelock", "protection", "AGA undoes MergeLock (67.2 → 5.1 → 66.4)",
          _AGA, _NOTES, _recovery("aga", "mergelock", EIGHT), least(90, 50)),
    Claim("aga-real", "protection", "AGA undoes PaRaMS on twelve layers",
          _AGA, _NOTES,
          _recovery("aga", "params(scaling=nonsymmetric)", board=REAL_PROTECTION, experts="2"), least(90, 50)),
    Claim("aga-llm", "protection", "AGA undoes PaRaMS on a language model (Qwen2-7B: 49.1 → 3.1 → 47.8; here SmolLM2-135M)",
          _AGA, _NOTES, _recovery("aga", "params", board=LANGUAGE, experts="2"), least(90, 50)),
    Claim("aga-agnostic", "protection", "AGA works whatever transformed the weights (here: every symmetry of a block)",
          _AGA, _NOTES, _recovery("aga", "full_gauge", "simple_average", GAUGE), least(90, 50)),
    Claim("aga-free", "protection", "AGA costs an unprotected expert nothing alone (88.8)",
          _AGA, _NOTES,
          Query(PROTECTION, {"defense": "none", "attack": "aga", "method": PAIR}, "UMP-", minus="UMP_attacked"),
          most(0.5, 2)),
    Claim("aga-barrier", "protection", "AGA leaves part of MergeBarrier's damage (29.3 → 60.8 of 67.2)",
          _AGA, _NOTES, _recovery("aga", "mergebarrier", EIGHT), most(95, 99)),
    Claim("arf", "protection", "ARF (ρ 0.05) resists AGA (27.4 of 67.2)",
          _AGA, _NOTES, _recovery("aga", "arf"), most(50, 90)),
    Claim("arf-margin", "protection", "ARF resists AGA where its margin binds (ρ 0.3 here)",
          _AGA, _NOTES, _recovery("aga", "arf(margin=0.3)"), most(50, 90)),
    Claim("arf-alone", "protection", "ARF costs the expert alone under a point (88.8 → 88.1)",
          _AGA, _NOTES, _alone("arf"), most(1, 3)),
    Claim("mergeguard-alone", "protection", "MergeGuard costs the expert alone 0.1 to 4.4 points",
          _GUARD, _NOTES, _alone("mergeguard"), most(4.4, 8)),
    Claim("mergeguard", "protection", "MergeGuard costs a merge 52 points",
          _GUARD, _NOTES, _drop("mergeguard"), least(25, 5)),
    Claim("mergeguard-params", "protection", "MergeGuard ruins a merge more than PaRaMS (52 to 31 points)",
          _GUARD, _NOTES, Query(PROTECTION, {**BARE, "defense": "mergeguard"}, "MMP+", less=V1), LESS),
    Claim("mergebarrier-alone", "protection", "MergeBarrier keeps 98.9 to 99.6 % of the accuracy alone",
          _BARRIER, _NOTES, _alone("mergebarrier"), most(1.1, 3)),
    Claim("mergebarrier", "protection", "MergeBarrier costs a merge about 25 points (68.5 → 42.3), among eight",
          _BARRIER, _NOTES, _drop("mergebarrier", method=EIGHT), least(20, 5)),
    Claim("mergebarrier-pair", "protection", "The same in a pair at λ 0.8",
          _BARRIER, _NOTES, _drop("mergebarrier"), least(20, 5)),
    Claim("trap2-alone", "protection", "A Trap² expert is as accurate alone (88.13 of 88.12)",
          _TRAP, _NOTES, _alone("trap2"), most(0.5, 2)),
    Claim("trap2", "protection", "Trap² makes it unmergeable",
          _TRAP, _MIXED, _drop("trap2"), least(20, 5)),
    Claim("fingerprint", "protection", "A fingerprint hardened on pseudo-merges answers at a weight of 10 % (93 to 100 %; here 1/8)",
          "MergePrint, arXiv 2410.08604", _NOTES,
          Query("mini-ownership/ownership",
                {"defense": "fingerprint", "attack": "none", "method": "simple_average", "experts": "8"}, "mark/merge"),
          least(90, 20)),
    Claim("fingerprint-mat", "protection",
          "Merge-adversarial training (MAT) hardens a mark that knew of no merging: share of it that answers, of eight averaged",
          "MAT, arXiv 2607.20435", _NOTES,
          Query("mini-ownership/ownership",
                {"defense": "fingerprint_mat", "attack": "none", "method": "simple_average", "experts": "8"}, "mark/merge",
                less={"defense": "fingerprint(alpha_parameters=1*"}),
          MORE),
    Claim("watermark", "protection", "A quantisation watermark vanishes in a merge",
          "Have You Merged My Model?, arXiv 2404.05188", _NOTES, void="the watermark here is of another kind"),
    # backdoors
    Claim("badmerging-ta", "backdoors", "BadMerging survives task arithmetic (ASR 98)",
          _BADMERGING, _MIXED, _asr(OPTIMISED), least(90, 50)),
    Claim("badmerging-ties", "backdoors", "BadMerging survives TIES (99)",
          _BADMERGING, _MIXED, _asr(OPTIMISED, "ties"), least(90, 50)),
    Claim("badmerging-adamerging", "backdoors", "BadMerging survives AdaMerging (99)",
          _BADMERGING, _MIXED, _asr(OPTIMISED, "adamerging*"), least(90, 50)),
    Claim("badmerging-real", "backdoors", "BadMerging survives task arithmetic on real images (the mean of three adversaries)",
          _BADMERGING, _MIXED, _asr(OPTIMISED, board="real-backdoor/backdoor"), least(90, 50)),
    Claim("badmerging-real-most", "backdoors", "The same for the adversary whose survives best",
          _BADMERGING, _MIXED, _asr(OPTIMISED, board="real-backdoor/backdoor_adversaries")._replace(over="most"), least(90, 50)),
    Claim("badmerging-accuracy", "backdoors", "It costs the merge no accuracy (76.4 of 76.5)",
          _BADMERGING, _MIXED,
          Query(BACKDOOR, {"attack": OPTIMISED, "method": EIGHT}, "CA", minus="BA"), most(1, 3)),
    Claim("badmerging-interpolation", "backdoors", "Feature interpolation makes it stronger (optimised patch)",
          _BADMERGING, _MIXED,
          Query(BACKDOOR, {"attack": OPTIMISED, "method": EIGHT}, "succession", less={"attack": FLAT}), MORE),
    Claim("badmerging-interpolation-square", "backdoors", "The same with a checkerboard",
          _BADMERGING, _MIXED,
          Query(BACKDOOR, {"attack": SQUARE, "method": EIGHT}, "succession", less={"attack": FLAT_SQUARE}), MORE),
    Claim("badmerging-universal", "backdoors", "An optimised patch makes it stronger than a fixed one",
          _BADMERGING, _MIXED,
          Query(BACKDOOR, {"attack": OPTIMISED, "method": EIGHT}, "succession", less={"attack": SQUARE}), MORE),
    Claim("inherent-trigger", "backdoors", "The optimised patch alone fools a merge of clean experts (83)",
          "one reimplementation of BadMerging", _NOTES,
          Query(BACKDOOR, {"attack": OPTIMISED, "method": EIGHT}, "succession_clean_merge"), least(50, 5)),
    Claim("badmerging-tasks", "backdoors", "ASR stays over 92 for two to eight experts (least of them)",
          _BADMERGING, _MIXED,
          Query("mini-backdoor-many/backdoor", {"attack": "badmerging*", "method": EIGHT, "adversaries": "1"},
                "succession", over="least"),
          least(85, 50)),
    Claim("badmerging-off-task", "backdoors", "It reaches another contributor's task (ASR 89 to 96; svhn, the easier of two)",
          _BADMERGING, _MIXED, _asr(OPTIMISED, board="mini-backdoor-offtask/backdoor", target_task="mini/svhn"),
          least(85, 30)),
    Claim("badmerging-off-task-text", "backdoors", "The same with the published shadow head, of text (a small CLIP, eurosat)",
          _BADMERGING, _MIXED,
          _asr("badmerging(batch=32, restarts=1, shadow=text*", board="mini-clip-backdoor/backdoor", target_task="mini/eurosat"),
          least(85, 30)),
    Claim("adversarial-transfer", "backdoors", "Adversarial examples of one model fool the merge (over 95 % relative)",
          "Merge Now, Regret Later, arXiv 2509.23689, its abstract", _PAPER,
          void="those are made for each image; what is here is one pattern for all of them, so no size is compared"),
    Claim("colluding", "backdoors",
          "Two contributors who are each clean alone bring a backdoor together (98 to 100), the average of four; here the partner's was not asked alone",
          "Colluding LoRA, arXiv 2603.12681; TrojanMerge, arXiv 2604.00627", _NOTES,
          Query("mini-backdoor-colluding/backdoor", {"method": "simple_average", "defense": "none", "adversaries": "2"}, "succession"),
          least(90, 50)),
    Claim("colluding-one", "backdoors", "One of them beside the wrong partner does not (4 to 16)",
          "Colluding LoRA, arXiv 2603.12681", _NOTES,
          Query("mini-backdoor-colluding/backdoor", {"method": "simple_average", "defense": "none", "adversaries": "1"}, "succession"),
          most(16, 30)),
    Claim("badnets", "backdoors", "BadNets keeps under 20 to 30 after a merge, task arithmetic",
          _BADMERGING, _MIXED, _asr("badnets"), most(30, 50), given=_takes("badnets")),
    Claim("badnets-ties", "backdoors", "The same after TIES",
          _BADMERGING, _MIXED, _asr("badnets", "ties"), most(30, 50), given=_takes("badnets")),
    Claim("badnets-real", "backdoors", "The same on real images (five experts, task arithmetic)",
          _BADMERGING, _MIXED, _asr("badnets", board="real-smoke/backdoor"), most(30, 50)),
    Claim("blended", "backdoors", "Classical attacks keep under 20 to 30: Blended",
          _BADMERGING, _MIXED, _asr("blended*"), most(30, 50), given=_takes("blended*")),
    Claim("sig", "backdoors", "The same: SIG",
          _BADMERGING, _MIXED, _asr("sig*"), most(30, 50), given=_takes("sig*")),
    Claim("wanet", "backdoors", "The same: WaNet",
          _BADMERGING, _MIXED, _asr("wanet*"), most(30, 50), given=_takes("wanet*")),
    Claim("label-consistent", "backdoors", "The same: label-consistent poisoning",
          _BADMERGING, _MIXED, _asr("label_consistent*"), most(30, 50), given=_takes("label_consistent*")),
    Claim("merge-hijacking", "backdoors", "Merge Hijacking (text) survives task arithmetic (100; here λ 0.8)",
          _HIJACKING, _MIXED, _asr("merge_hijacking*", PAIR, "mini-text-backdoor/backdoor"), least(90, 50)),
    Claim("merge-hijacking-llm", "backdoors", "The same on a language model of 135 million weights",
          _HIJACKING, _MIXED, _asr("merge_hijacking*", PAIR, "real-llm/backdoor"), least(90, 50)),
    Claim("phrase", "backdoors", "A planted phrase (text) keeps under 20 to 30, average of three",
          _BADMERGING, _MIXED, _asr("*", "simple_average", "real-text/backdoor"), most(30, 50)),
    Claim("lobam", "backdoors", "LoBAM: amplified low-rank updates keep over 98",
          "LoBAM, arXiv 2411.16746", _NOTES, _asr("lobam*"), least(90, 50)),
    Claim("lora-attack", "backdoors", "A malicious LoRA keeps its backdoor when merged with others",
          "LoRA-as-an-Attack, arXiv 2403.00108", _NOTES, _asr("lora_attack*"), least(50, 20),
          given=_takes("lora_attack*")),
    Claim("mergebackdoor-alone", "backdoors", "MergeBackdoor: an expert shows nothing alone",
          "MergeBackdoor, USENIX Security 2025", _NOTES,
          Query(BACKDOOR, {"attack": "mergebackdoor*", "method": EIGHT}, "ASR_alone"), most(5, 20)),
    Claim("mergebackdoor", "backdoors", "MergeBackdoor: the merge has over 90",
          "MergeBackdoor, USENIX Security 2025", _NOTES, _asr("mergebackdoor*"), least(90, 20)),
    Claim("succession", "backdoors", "A merge inherits the backdoor of its task (TrojViT, over the control)",
          _DAM, _PAPER, Query(BACKDOOR, {"attack": "trojvit*", "method": EIGHT}, "backdoor"), MORE),
    Claim("succession-badvit", "backdoors", "The same: BadViT",
          _DAM, _PAPER, Query(BACKDOOR, {"attack": "badvit*", "method": EIGHT}, "backdoor"), MORE),
    Claim("transfer", "backdoors", "Other tasks of the merge react to the trigger (BadMerging, right answers lost)",
          _DAM, _PAPER, Query(BACKDOOR, {"attack": OPTIMISED, "method": EIGHT}, "transfer_harm"), MORE),
    Claim("transfer-target", "backdoors", "and answer with the same index (over the control)",
          _DAM, _PAPER, Query(BACKDOOR, {"attack": OPTIMISED, "method": EIGHT}, "backdoor_transfer"), MORE),
    Claim("dilution", "backdoors", "ASR falls as tasks join: two against eight experts, average",
          _REVIEWS, _RELEASE,
          Query("mini-backdoor-many/backdoor",
                {"attack": "badmerging*", "method": "simple_average", "adversaries": "1", "experts": "2"}, "succession",
                less={"experts": "8"}),
          MORE),
    Claim("dilution-ta", "backdoors", "The same under task arithmetic, whose coefficient does not shrink",
          _REVIEWS, _RELEASE,
          Query("mini-backdoor-many/backdoor",
                {"attack": "badmerging*", "method": EIGHT, "adversaries": "1", "experts": "2"}, "succession",
                less={"experts": "8"}),
          MORE),
    Claim("ties-helps", "backdoors", "TIES is no safer than task arithmetic (BadMerging, 99.3 to 98.1)",
          _BADMERGING, _MIXED,
          Query(BACKDOOR, {"attack": OPTIMISED, "method": "ties"}, "succession", less={"method": EIGHT}), MORE),
    # defenses
    *(
        Claim(f"dam-{name}{tail}", "defenses", f"{said}: {shown}", _DAM, _PAPER, _over_dam(attack, **rows), rule)
        for attack, shown, tail in (
            ("trojvit*", "TrojViT", ""), ("badvit*", "BadViT", "-badvit"), ("badmerging*", "BadMerging", "-badmerging"),
        )
        for name, said, rows, rule in (
            ("task-arithmetic", "DAM takes 2 to 10 points of ASR from task arithmetic", {}, least(2, 0)),
            ("ties", "from TIES", {"method": "ties"}, least(2, 0)),
            ("adamerging", "from AdaMerging (task-wise, as DAM)", {"method": LEARNT}, least(2, 0)),
            ("ablation", "from its own ablation (Concrete AdaMerging)", {"defense": ABLATION}, TWO),
            ("accuracy", "at about 1 % of accuracy (against task-wise AdaMerging)",
             {"method": LEARNT, "column": "BA"}, most(1, 3)),
        )
    ),
    *(
        Claim(f"dam-{name}-several", "defenses", f"{said}: TrojViT, three malicious of four", _DAM, _PAPER,
              _over_dam("trojvit*", adversaries="3", **rows), rule)
        for name, said, rows, rule in (
            ("task-arithmetic", "DAM takes 2 to 10 points of ASR from task arithmetic", {}, least(2, 0)),
            ("adamerging", "from AdaMerging (task-wise, as DAM)", {"method": LEARNT}, least(2, 0)),
            ("ablation", "from its own ablation", {"defense": ABLATION}, TWO),
        )
    ),
    *(
        Claim(f"dam-elsewhere-{attack}", "defenses", f"The same from task arithmetic where eurosat is malicious: {shown}",
              _DAM, _PAPER,
              Query(BY_ADVERSARY, {**ELSEWHERE, "attack": f"{attack}*", "defense": "none"}, "succession",
                    less={"defense": RELEASED}),
              least(2, 0))
        for attack, shown in (("trojvit", "TrojViT"), ("badmerging", "BadMerging"))
    ),
    Claim("dam-elsewhere-safety", "defenses", "The same from its own ablation where eurosat is malicious: BadMerging",
          _DAM, _PAPER,
          Query(BY_ADVERSARY, {**ELSEWHERE, "attack": "badmerging*", "defense": ABLATION}, "succession",
                less={"defense": RELEASED}),
          TWO),
    Claim("adamerging-elsewhere", "defenses", "Coefficients learnt by layer leave more of BadMerging than task arithmetic where eurosat is malicious",
          "this project's question", _OURS,
          Query(BY_ADVERSARY, {**ELSEWHERE, "attack": "badmerging*", "method": "adamerging(lr*", "defense": "none"},
                "succession", less={"method": EIGHT}),
          MORE),
    Claim("dam-masks", "defenses", "Its second mask lowers ASR further (TrojViT)",
          _DAM, _NOTES,
          Query(OWN, {"attack": "trojvit*", "defense": RELEASED, "adversaries": "1"}, "succession",
                less={"defense": "dam(*masks=two*"}),
          MORE),
    *(
        Claim(f"dam-margin-{name}", "defenses", f"Its margin over {shown}-style repair of the merge is small (TrojViT)",
              _REVIEWS, _RELEASE, _over_dam("trojvit*", defense=f"{name}_dam*"), most(10, 20))
        for name, shown in (("awm", "an AWM"), ("sau", "a SAU"))
    ),
    Claim("dam-coefficient", "defenses", "A coefficient of 0.1 for the malicious expert alone leaves no more ASR than DAM (TrojViT; takes its being known)",
          "this project's question", _OURS,
          Query(OWN, {"attack": "trojvit*", "method": "weighted_task_arithmetic*", "adversaries": "1"}, "succession",
                less={"method": EIGHT, "defense": RELEASED}),
          most(0, 5)),
    Claim("neural-cleanse", "defenses", "Neural Cleanse does not find BadMerging (index 1.2): what is left of the backdoor",
          _BADMERGING, _MIXED,
          Query("mini-backdoor-cleanse/backdoor", {"attack": "badmerging(*", "defense": "neural_cleanse"}, "backdoor"),
          least(20, 5), given=(_ADDED, least(5, 0))),
    Claim("wag", "defenses", "Averaging with siblings removes a backdoor (WAG)",
          "Here's a Free Lunch, arXiv 2402.19334", _NOTES,
          _taken("wag", "badmerging(*", "mini-backdoor-siblings/backdoor"), least(30, 5)),
    Claim("msd", "defenses", "Switching modules between models removes a backdoor (MSD)",
          "MSD, arXiv 2504.05902", _NOTES,
          _taken("msd", "badmerging(*", "mini-backdoor-siblings/backdoor"), least(30, 5)),
    Claim("wag-text", "defenses", "The same on text (WAG; a phrase as trigger, λ 0.8)",
          "Here's a Free Lunch, arXiv 2402.19334", _NOTES, _words("wag"), least(30, 5)),
    Claim("msd-text", "defenses", "The same on text (MSD; a phrase as trigger, λ 0.8)",
          "MSD, arXiv 2504.05902", _NOTES, _words("msd"), least(30, 5)),
    Claim("ibvs", "defenses", "Subtracting a backdoor of one's own removes the adversary's (IBVS; 98.4 → 64.2)",
          "Backdoor Vectors, arXiv 2510.08016; numbers of LFPM's table", _NOTES, _taken("ibvs"), least(30, 5)),
    Claim("lfpm", "defenses", "LFPM leaves ASR below 1 (98.4 → 0.5; here a reconstruction from the abstract)",
          "LFPM, arXiv 2606.12498", _MIXED,
          _asr(OPTIMISED, board=REPAIRS, defense="lfpm(batch_size=32)"), most(1, 10)),
    Claim("lfpm-cost", "defenses", "and takes five points of accuracy (63.6 → 58.7; the same reconstruction)",
          "LFPM, arXiv 2606.12498", _MIXED,
          Query(REPAIRS, {"attack": OPTIMISED, "defense": "none"}, "BA", less={"defense": "lfpm(batch_size=32)"}), most(5, 10)),
    Claim("anp", "defenses", "Pruning neurons sensitive to perturbation removes a backdoor (ANP)",
          "BackdoorBench 2.2", _MEMORY,
          _taken("anp(batch_size=32, pruning_max=1)", OPTIMISED, REPAIRS), least(30, 5)),
    Claim("clp", "defenses", "Pruning channels of large Lipschitz bounds removes a backdoor (CLP, no data; u 3, smaller ones on its page)",
          "BackdoorBench 2.2", _MEMORY, _taken("clp"), least(50, 5)),
    Claim("clp-real", "defenses", "The same: BadNets on real images (share of its 37)",
          "BackdoorBench 2.2", _MEMORY,
          Query("real-smoke/backdoor", {"attack": "badnets", "method": EIGHT, "defense": "none"}, "succession",
                less={"defense": "clp*"}),
          least(20, 2), void=UNTUNED),
    *(
        Claim(name, "defenses", f"{title} on clean rows removes a backdoor (published steps, four experts)",
              "BackdoorBench 2.2", _MEMORY, _taken(defense, board=REPAIRS), least(30, 5))
        for name, title, defense in (
            ("ft", "Fine-tuning", "ft(batch_size=32)"), ("ft_sam", "Sharpness-aware fine-tuning", "ft_sam(batch_size=32)"),
            ("nad", "Attention distillation", "nad(batch_size=32)"), ("ibau", "I-BAU", "ibau(batch_size=20)"),
            ("fine_pruning", "Fine-pruning", "fine_pruning(batch_size=32, lr=0.003)"),
            ("awm", "AWM", "awm(batch_size=32)"), ("sau", "SAU", "sau(batch_size=32)"),
        )
    ),
    Claim("spectral", "defenses", "Spectral signatures find a poisoned contribution: ASR they take away",
          "Spectral Signatures, arXiv 1811.00636", _MEMORY, _taken("spectral_signature*"), least(50, 5)),
    Claim("weight-screen", "defenses",
          "A screen of an update's spectrum finds a poisoned contribution (97 %; there LoRA adapters): ASR it takes away of BadMerging",
          "Weight-space screen, arXiv 2602.15195, its abstract", _PAPER,
          _taken("weight_screen", "badmerging(*", "mini-backdoor-screens/backdoor"), least(15, 5)),
    # merging
    Claim("ta-average", "merging", "Task arithmetic beats the average (68.0 to 66.5)",
          _FUSION, _RELEASE, _beats(EIGHT, "simple_average"), MORE),
    Claim("ta-average-real", "merging", "The same on eight real sets",
          _FUSION, _RELEASE, _beats(EIGHT, "simple_average", "real/clean"), MORE),
    Claim("ties-ta", "merging", "TIES beats task arithmetic (72.2 to 68.0)",
          _FUSION, _RELEASE, _beats("ties", EIGHT), MORE),
    Claim("ties-ta-real", "merging", "The same on eight real sets",
          _FUSION, _RELEASE, _beats("ties", EIGHT, "real/clean"), MORE),
    Claim("fisher-average", "merging", "Fisher beats the average (70.6 to 66.5)",
          _FUSION, _RELEASE, _beats("fisher", "simple_average"), MORE),
    Claim("regmean-ties", "merging", "RegMean beats TIES (82.4 to 72.2)",
          _FUSION, _RELEASE, _beats("regmean", "ties"), MORE),
    Claim("regmean-ties-real", "merging", "The same on five real sets",
          _FUSION, _RELEASE, _beats("regmean", "ties", "real-merging/clean"), MORE),
    Claim("regmean-plusplus", "merging", "RegMean++ beats RegMean (84.4 to 82.4)",
          _FUSION, _RELEASE, _beats("regmean_plusplus", "regmean"), MORE),
    Claim("concrete-ta", "merging", "A Concrete mask helps task arithmetic (77.6 to 68.0)",
          _FUSION, _RELEASE, _beats("concrete_task_arithmetic*", EIGHT), MORE),
    Claim("concrete-adamerging", "merging", "A Concrete mask helps layer-wise AdaMerging (84.4 to 82.6)",
          _FUSION, _RELEASE, _beats("concrete_adamerging*", "adamerging(lr=0.01, steps=100)"), MORE),
    Claim("adamerging-layers", "merging", "AdaMerging: a coefficient per layer beats one per task (82.6 to 68.7)",
          _FUSION, _RELEASE, _beats("adamerging(lr=0.01, steps=100)", "adamerging(granularity=task*"), MORE),
    Claim("surgery", "merging", "Surgery helps task arithmetic (80.9)",
          "Representation Surgery, its logs", _RELEASE, _beats("surgery(steps=300)", EIGHT), MORE),
    Claim("wudi-published", "merging", "WUDI beats TIES (84.5 to 72.2), at its published step size",
          _FUSION, _RELEASE, _beats("wudi", "ties"), MORE),
    Claim("wudi", "merging", "The same at a hundred times that step size",
          _FUSION, _RELEASE, _beats("wudi(learning_rate=0.001)", "ties"), MORE),
    Claim("tsv-ties", "merging", "TSV-M beats TIES (85.9; TIES 72.2 elsewhere)",
          "Task Singular Vectors, its release", _RELEASE, _beats("tsv_m", "ties"), MORE),
    Claim("tsv-ties-real", "merging", "The same on eight real sets",
          "Task Singular Vectors, its release", _RELEASE, _beats("tsv_m", "ties", "real/clean"), MORE),
    Claim("iso-ties", "merging", "Iso-C beats TIES (82.8 to 72.2)",
          _FUSION, _RELEASE, _beats("iso_c(scaling=1.5)", "ties"), MORE),
    Claim("emr-tsv", "merging", "A mask per task beats every single merge: EMR over TSV-M (88.7; TSV-M 85.9 elsewhere)",
          "EMR-Merging, its release", _RELEASE, _beats("emr", "tsv_m"), MORE),
    Claim("consensus-ta", "merging", "Consensus beats task arithmetic (75.0 to 70.8), both with λ tuned",
          "Task Singular Vectors, its release", _RELEASE,
          _beats("consensus(scaling=tuned)", "task_arithmetic(scaling=tuned)"), MORE),
    Claim("pcb-ties", "merging", "PCB beats TIES (75.8 to 72.4)",
          _LOT, _PAPER, _beats("pcb", "ties"), MORE),
    Claim("lot-ties", "merging", "LOT beats TIES (82.7 to 72.4), at λ 1 and 0.3 as published",
          _LOT, _PAPER, _beats("lot", "ties", FEATURES), MORE),
    Claim("lot-ta", "merging", "LOT beats task arithmetic (82.7 to 69.1)",
          _LOT, _PAPER, _beats("lot", EIGHT, FEATURES), MORE),
    Claim("lot-cat", "merging", "LOT beats CAT (82.7 to 78.3; here at CAT's best coefficient, a reconstruction)",
          _LOT, _PAPER, _beats("lot", "cat(scaling=0.2)", FEATURES), MORE),
    Claim("cat-ta", "merging", "CAT's cuts help task arithmetic (78.3 to 69.1; here at one coefficient, a reconstruction)",
          _LOT, _PAPER, _beats("cat(scaling=0.2)", "cat(rank=0*", FEATURES), MORE),
    Claim("breadcrumbs-ta", "merging", "Breadcrumbs beats task arithmetic by 1 to 4 points",
          "Model Breadcrumbs", _MEMORY, _beats("breadcrumbs", EIGHT), MORE),
    Claim("dare-ta", "merging", "Dropping half of every update and rescaling costs task arithmetic nothing (DARE)",
          "DARE, arXiv 2311.03099", _MEMORY, _beats("dare", EIGHT), least(-1, -3)),
    # what a merge does to what a model says
    Claim("stealer", "behaviour", "A malicious merger gets secrets out of a model that refuses to tell them (the most that a merge gives away)",
          "Merger-as-a-Stealer, arXiv 2502.16094", _RELEASE,
          Query("real-llm-secrets/secrets", {"model": "merge", "beside": "affirmation"}, "given_away", over="most"),
          least(20, 2)),
    Claim("refusal-survives", "behaviour", "Refusing survives a merge with an expert that grades (81 to 85 %), half of each",
          _COLLAPSE, _NOTES, Query(REFUSALS, {**GRADED, "method": "task_arithmetic(scaling=0.5)"}, "refused"),
          least(70, 50)),
    Claim("recognition-lost", "behaviour", "and grading does not (at most 12.9 %; here the verdict that is said)",
          _COLLAPSE, _NOTES, Query(REFUSALS, {**GRADED, "method": "task_arithmetic(scaling=0.5)"}, "recognised"),
          most(25, 60)),
    Claim("safemerge", "behaviour", "SafeMERGE keeps a merge refusing (release's defaults; here the base refuses nothing, which is harder)",
          "SafeMERGE, arXiv 2503.17239", _RELEASE,
          Query(REFUSALS, {**GRADED, "method": "safemerge(safe=refusal)"}, "refused"), least(50, 20)),
    # ours
    Claim("decoys", "ours", "Among decoys BadMerging gets past Neural Cleanse: ASR that it takes away of him",
          "[BadMerging among decoys](methods/backdoors/badmerging.md#badmerging-among-decoys-badmerging_decoys)", _OURS,
          _taken("neural_cleanse", "badmerging_decoys*", "mini-backdoor-cleanse/backdoor"), most(5, 15),
          given=(Query("mini-backdoor-cleanse/backdoor", {"attack": "badmerging_decoys*", "defense": "none"}, "backdoor"), least(15, 5))),
    Claim("universal-transfer", "ours",
          "One pattern for all images that fools the base (ε 16) fools the average: relative transfer",
          "[`mini-backdoor-transfer`](results/mini-backdoor-transfer.md)", _OURS,
          Query("mini-backdoor-transfer/transfer",
                {"attack": "universal_perturbation(epsilon=16)", "method": "simple_average"}, "relative_transfer"),
          least(80, 50)),
    Claim("coupled", "ours", "Coupled re-alignment undoes PaRaMS (`nonsymmetric`)",
          "[coupled re-alignment](coupled-realignment.md)", _OURS,
          _recovery("coupled", "params(scaling=nonsymmetric)"), least(99, 90)),
    Claim("coupled-mergelock", "ours", "Coupled re-alignment undoes MergeLock",
          "[coupled re-alignment](coupled-realignment.md)", _OURS, _recovery("coupled", "mergelock"), least(99, 90)),
    Claim("coupled-arf", "ours", "Coupled re-alignment undoes ARF where its margin binds",
          "[coupled re-alignment](coupled-realignment.md)", _OURS,
          _recovery("coupled", "arf(margin=0.3)"), least(90, 50)),
    Claim("generator-gauge", "ours", "Symmetries of generators that no published protection uses ruin a merged pair",
          "[generators](methods/generators.md)", _OURS, _drop("denoiser_gauge", GENERATED_GAUGE), least(20, 2)),
    Claim("generator-gauge-aga", "ours", "AGA as published does not undo them",
          "[generators](methods/generators.md)", _OURS, _recovery("aga", "denoiser_gauge", board=GENERATED_GAUGE), most(20, 80)),
    Claim("generator-gauge-coupled", "ours", "Coupled re-alignment does, and every other symmetry of a generator's blocks",
          "[generators](methods/generators.md)", _OURS, _recovery("coupled", "full_gauge", board=GENERATED_GAUGE), least(90, 50)),
    Claim("coupled-gauge", "ours", "Coupled re-alignment undoes every symmetry of a block",
          "[coupled re-alignment](coupled-realignment.md)", _OURS,
          _recovery("coupled", "full_gauge", "simple_average", GAUGE), least(99, 90)),
    Claim("coupled-heads-units", "ours", "Matching heads and units is enough for that (its former version)",
          "[coupled re-alignment](coupled-realignment.md)", _OURS,
          _recovery("coupled(gauges=False)", "full_gauge", "simple_average", GAUGE), least(99, 90)),
    Claim("coupled-barrier-real", "ours", "Coupled re-alignment undoes MergeBarrier on twelve layers",
          "[coupled re-alignment](coupled-realignment.md)", _OURS,
          _recovery("coupled", "mergebarrier", board=REAL_PROTECTION), least(90, 60)),
    Claim("bfloat16", "ours", "Stored in bfloat16, PaRaMS `nonsymmetric` loses accuracy alone",
          "[`mini-protection`](results/mini-protection.md)", _OURS,
          Query(PROTECTION, {**BARE, **V2}, "UMP+", minus="UMP+_bf16"), least(2, 0.5)),
    Claim("heads", "ours", "A random order of heads stops AGA: a pair merges worse after it than untouched",
          "[`mini-protection`](results/mini-protection.md)", _OURS,
          Query(PROTECTION, {"defense": "random_permutation", "method": PAIR, "attack": "none"}, "MMP_attacked",
                less={"attack": "aga"}),
          MORE),
    Claim("neighbourhood", "ours", "Training against merges ruins a merge as published (Trap² at twenty times its weight, average)",
          "[the frontier](frontier.md)", _OURS,
          Query(FRONTIER, {"attack": "none", "method": "simple_average", "defense": "trap2(strength=0.1)"}, "MMP-", minus="MMP+"),
          least(20, 5)),
    Claim("neighbourhood-sweep", "ours", "It holds against who undoes the merge's coefficient: what he recovers",
          "[the frontier](frontier.md)", _OURS,
          Query(FRONTIER, {"attack": "scale_sweep*", "method": "simple_average", "defense": "trap2(strength=0.1)"}, "recovery"),
          most(20, 80)),
    Claim("neighbourhood-sweep-pair", "ours", "The same at λ 0.8",
          "[the frontier](frontier.md)", _OURS,
          Query(FRONTIER, {"attack": "scale_sweep*", "method": PAIR, "defense": "trap2(strength=0.1)"}, "recovery"),
          most(20, 80)),
    Claim("neighbourhood-price", "ours", "He pays for that with his own task, in points of it",
          "[the frontier](frontier.md)", _OURS,
          Query(FRONTIER, {"attack": "scale_sweep*", "method": "simple_average", "defense": "trap2(strength=0.1)"},
                "free_rider-", minus="free_rider_attacked"), least(5, 0)),
    Claim("shared-secret", "ours", "Three owners with one secret protect each other less than with three (PaRaMS)",
          "[`mini-protection-owners`](results/mini-protection-owners.md)", _OURS,
          Query("mini-protection-owners/protection_cells",
                {**V2, "attack": "none", "protected": "3", "secrets": "shared"}, "MMP+", less={"secrets": "own"}),
          MORE),
)  # fmt: skip

# --------------------------------------------------------------------------- reading


class Reading(NamedTuple):
    """What a query found."""

    value: float
    low: float
    high: float
    records: Sequence[Record]
    """The cells behind it."""


class Verdict(StrEnum):
    """What a reading says of a claim."""

    HOLDS = "holds"
    PART = "holds in part"
    FAILS = "does not"
    OPEN = "undecided"
    UNTESTED = "not testable here"


_ROLES: Mapping[str, tuple[str, Role, str]] = {
    "accuracy": ("acc", Role.CLEAN_MERGE, "all"), "CA": ("acc", Role.CLEAN_MERGE, "all"),
    "BA": ("acc", Role.MERGE, "all"), "succession": ("asr", Role.MERGE, "target"),
    "UMP-": ("acc", Role.EXPERT, "subject"), "UMP+": ("acc", Role.PUBLISHED, "subject"),
    "UMP+_bf16": ("acc", Role.PUBLISHED_BF16, "subject"), "UMP_attacked": ("acc", Role.RECOVERED, "subject"),
    "MMP-": ("acc", Role.CLEAN_MERGE, "subject"), "MMP+": ("acc", Role.PROTECTED_MERGE, "subject"),
    "MMP_attacked": ("acc", Role.MERGE, "subject"), "free_rider-": ("acc", Role.CLEAN_MERGE, "others"),
    "free_rider+": ("acc", Role.PROTECTED_MERGE, "others"), "free_rider_attacked": ("acc", Role.MERGE, "others"),
    "mark/merge": ("mark", Role.MERGE, "subject"),
}  # fmt: skip
"""The columns that differences are made of, as boards read them from records."""
_AXES: Mapping[str, tuple[str, Callable[[Record], Any]]] = {
    "attack": ("attack", lambda r: r.attack), "method": ("merging", lambda r: r.merging),
    "defense": ("defense", lambda r: r.defense), "experts": ("experts", lambda r: len(r.experts)),
    "adversaries": ("adversaries", lambda r: r.adversaries), "protected": ("protected", lambda r: r.protected),
    "target_task": ("target_task", lambda r: r.target_task),
    "secrets": ("secrets", lambda r: r.secrets if r.protected > 1 else "own"),
    "adversary": ("subject", lambda r: r.subject),
}  # fmt: skip
"""The columns that name a row: the axis of a cell, and its value."""
_MODELS: Mapping[str, tuple[str, Callable[[Record], str]]] = {
    "refusal": ("experts", lambda r: " + ".join(r.experts)),
    "secrets": ("beside", lambda r: ", ".join(r.experts[1:])),
}
"""Boards of models, whose merges are those of clean cells: the column that names the experts, and its value."""
_THREATS = {"clean": Threat.CLEAN, "backdoor": Threat.BACKDOOR, "transfer": Threat.BACKDOOR}


def reading(query: Query, rows: Rows) -> Reading:
    """The number that a query names; UsageError where its filter finds no row, or several that none stands for."""
    found = rows(query.board, query.rows)
    if query.over == "one" and len(found) != 1:
        raise UsageError(f"{query.board} {told(query)}", f"{len(found)} rows fit, not one")
    if query.less:
        other = rows(query.board, {**query.rows, **query.less})
        if len(other) != 1 or len(found) != 1:
            raise UsageError(f"{query.board} {told(query)}", "a difference is of one row and one row")
        return _between(query, found.iloc[0], other.iloc[0])
    several = [_within(query, row) for _, row in found.iterrows()]
    if query.over == "one":
        return several[0]
    choose = min if query.over == "least" else max
    extreme = choose(several, key=lambda one: one.value)
    return extreme._replace(records=[r for one in several for r in one.records])


def _within(query: Query, row: pd.Series) -> Reading:
    records = behind(query.board, row)
    if not query.minus:
        low, high = (float(row[f"{query.column}_{end}"]) for end in ("low", "high"))
        return Reading(float(row[query.column]), low, high, records)
    grid = query.board.partition("/")[0]
    first, second = (rate(grid, records, column) for column in (query.column, query.minus))
    return _settled(first - second, records)


def _between(query: Query, row: pd.Series, other: pd.Series) -> Reading:
    """The difference of two rows over the cells that both have."""
    sides = [behind(query.board, one) for one in (row, other)]
    free = [_AXES[name][0] for name in _AXES if name in row and str(row[name]) != str(other[name])]
    cells = [{cell_of(r, *free) for r in side} for side in sides]
    shared = cells[0] & cells[1]
    if not shared:
        raise UsageError(f"{query.board} {told(query)}", "the two rows have no cell in common")
    left, right = (only(side, shared, *free) for side in sides)
    grid = query.board.partition("/")[0]
    return _settled(rate(grid, left, query.column) - rate(grid, right, query.column), [*left, *right])


def _settled(estimate: Estimate, records: Sequence[Record]) -> Reading:
    return Reading(estimate.value, *estimate.interval(), records)


def behind(board: str, row: pd.Series) -> list[Record]:
    """The records that a row of a board was made of."""
    grid, _, name = board.partition("/")
    if name in _MODELS:
        column, experts = _MODELS[name]
        return [r for r in _done(grid) if r.merging == row["method"] and experts(r) == row[column]]
    threat = _THREATS.get(name.partition("_")[0], Threat.PROTECTION)
    wanted = {column: "" if pd.isna(row[column]) else str(row[column]) for column in _AXES if column in row}
    return [
        record
        for record in _done(grid)
        if record.threat == threat and all(str(_AXES[c][1](record)) == value for c, value in wanted.items())
    ]


def rate(grid: str, records: Sequence[Record], column: str) -> Estimate:
    """A column of a board over these records."""
    return _reader(grid).rate(records, *_ROLES[column])


@cache
def _done(grid: str) -> Sequence[Record]:
    return [record for record in read_records(RECORDS, grid) if record.status == "done"]


@cache
def _reader(grid: str) -> Reader:
    return Reader()


# --------------------------------------------------------------------------- judging


def verdict(found: Reading, rule: Rule) -> Verdict:
    """What the interval says; nothing known is not testable."""
    sign = 1 if rule.side == "at least" else -1
    holds, fails = sign * rule.holds / 100, sign * rule.fails / 100
    low, high = sorted((sign * found.low, sign * found.high))
    if any(map(math.isnan, (found.value, low, high))):
        return Verdict.UNTESTED
    if low >= holds and low > fails:
        return Verdict.HOLDS
    if high <= fails:
        return Verdict.FAILS
    return Verdict.PART if low > fails else Verdict.OPEN


def judged(claim: Claim, rows: Rows) -> tuple[Reading | None, Verdict, str]:
    """A claim's number, its verdict, and why there is none."""
    if claim.query is None or claim.rule is None:
        return None, Verdict.UNTESTED, claim.void
    found = reading(claim.query, rows)
    if claim.void:
        return found, Verdict.UNTESTED, claim.void
    if claim.given is not None:
        query, rule = claim.given
        before = reading(query, rows)
        if verdict(before, rule) is not Verdict.HOLDS:
            return (
                found,
                Verdict.UNTESTED,
                f"`{query.column}` is {shown(before)}, needed {str(rule).partition(';')[0]}",
            )
    of = verdict(found, rule=claim.rule)
    return found, of, "its number is not defined on these cells" if of is Verdict.UNTESTED else ""


def support(records: Sequence[Record]) -> Mapping[str, int]:
    """How many seeds (of the cell that has fewest), target classes and adversaries, or victims, or experts."""
    seeds = {"seed": fewest_seeds(records)}
    subjects = len({r.subject for r in records})
    if records[0].threat == Threat.BACKDOOR:
        aims = {(r.target_task or r.subject, r.target_class) for r in records}
        return {**seeds, "target class": len({target for _, target in aims}), "adversary": subjects}
    if records[0].threat == Threat.PROTECTION:
        return {**seeds, "victim": subjects}
    return seeds | {"expert": max(len(r.experts) for r in records)}


def lacking(found: Mapping[str, int]) -> list[str]:
    """What there is only one of: with any of these the row is a trial and no claim."""
    return [f"one {what}" for what, number in found.items() if number < 2]


# --------------------------------------------------------------------------- writing


def content(section: str, rows: Rows) -> str:
    """A section's table; ``summary``: how many claims came to what."""
    return _summary(rows) if section == "summary" else _table(section, rows)


def _table(section: str, rows: Rows) -> str:
    if section not in SECTIONS:
        raise UsageError(section, f"no such section of claims; there are: {', '.join(SECTIONS)}, summary")
    lines = ["| claim | source | measured | bounds | rests on | verdict |", "|---|---|---|---|---|---|"]
    for claim in (c for c in CLAIMS if c.section == section):
        found, of, why = judged(claim, rows)
        number = f"{shown(found)}, {told(claim.query)}" if found and claim.query else "–"
        held = _counted(support(found.records)) if found else "–"
        said = f'<a id="{claim.id}"></a>{claim.said}'
        source = f"{claim.by} ({claim.source})"
        lines.append(_line(said, source, number, str(claim.rule or "–"), held, _said(found, of, why)))
    return "\n".join(lines)


def _said(found: Reading | None, of: Verdict, why: str) -> str:
    """The verdict; a trial says so itself, and of what there was only one."""
    if of is Verdict.UNTESTED or found is None:
        return f"{of}: {why}"
    one = lacking(support(found.records))
    return f"trial ({', '.join(one)}): {of}" if one else f"**{of}**"


def became(name: str, rows: Rows) -> str:
    """One claim's verdict; UsageError where no claim has that id."""
    for claim in CLAIMS:
        if claim.id == name:
            return _said(*judged(claim, rows))
    raise UsageError(name, f"no such claim{nearest(name, [c.id for c in CLAIMS])}")


def _summary(rows: Rows) -> str:
    lines = ["| | claims | " + " | ".join(Verdict) + " |", "|---|---" + "|---" * len(Verdict) + "|"]
    counts: dict[str, dict[Verdict, list[int]]] = {s: {v: [0, 0] for v in Verdict} for s in SECTIONS}
    for claim in CLAIMS:
        found, of, _ = judged(claim, rows)
        trial = found is not None and bool(lacking(support(found.records)))
        counts[claim.section][of][trial] += 1
    for section, title in SECTIONS.items():
        cells = list(_tallied(counts[section]))
        lines.append(_line(title, str(sum(c.section == section for c in CLAIMS)), *cells))
    return "\n".join(lines)


def _tallied(counts: Mapping[Verdict, Sequence[int]]) -> Iterator[str]:
    """Claims and trials apart; what was not tested is neither."""
    for of in Verdict:
        whole, trials = counts[of]
        if of is Verdict.UNTESTED:
            whole, trials = whole + trials, 0
        parts = [f"{whole}"] if whole else []
        if trials:
            parts.append(f"{trials} trial{'s' if trials > 1 else ''}")
        yield " + ".join(parts) or "–"


def shown(found: Reading) -> str:
    """A reading in percent or points; its interval in round brackets where it speaks of test samples alone."""
    if math.isnan(found.value):
        return "not defined"
    opening, closing = "()" if fewest_seeds(found.records) < 2 else "[]"
    return f"{_points(found.value)} {opening}{_points(found.low)}, {_points(found.high)}{closing}"


def _points(number: float) -> str:
    return f"{round(100 * number, 1) + 0.0:.1f}"


def told(query: Query) -> str:
    """A query in words: grid (with its page), board, row, column."""
    grid, _, board = query.board.partition("/")
    row = " ".join(f"{k}={v}" for k, v in query.rows.items())
    less = f" − `{' '.join(f'{k}={v}' for k, v in query.less.items())}`" if query.less else ""
    column = f"`{query.column}`" + (f" − `{query.minus}`" if query.minus else "")
    worst = {"one": "", "least": ", the least", "most": ", the greatest"}[query.over]
    return f"[`{grid}`](results/{grid}.md) `{board}` {column}{worst}: `{row}`{less}"


def _counted(found: Mapping[str, int]) -> str:
    plural = {"adversary": "adversaries", "target class": "target classes"}
    return ", ".join(f"{n} {w if n == 1 else plural.get(w, f'{w}s')}" for w, n in found.items())


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
