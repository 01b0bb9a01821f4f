"""Intervals against closed forms, records bit by bit, boards against numbers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mergesec.errors import UsageError
from mergesec.evidence.boards import make_boards
from mergesec.evidence.estimates import Board
from mergesec.evidence.records import Count, Record, count, read_records
from mergesec.evidence.statistics import DRAWS, FEWEST_SEEDS, Bootstrap, Estimate, mean, nothing, ratio, tiers
from mergesec.evidence.tables import cell_text, display, escaped, markdown, write_boards

# --------------------------------------------------------------------------- statistics


def _bits(k: int, n: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.arange(n) < k


@pytest.mark.parametrize(("k", "n"), [(300, 1000), (500, 1000), (90, 100), (40, 400)])
def test_one_seed_gives_the_binomial_interval(k: int, n: int) -> None:
    estimate = Bootstrap().rate("t", {0: count(_bits(k, n))})
    p = k / n
    assert estimate.value == p
    low, high = estimate.interval()
    half = 1.96 * math.sqrt(p * (1 - p) / n)
    assert low == pytest.approx(p - half, abs=0.25 * half)
    assert high == pytest.approx(p + half, abs=0.25 * half)


@pytest.mark.parametrize(
    ("ks", "quantile"), [((1000, 1200, 1400), 4.303), ((1000, 1100, 1200, 1300, 1400), 2.776)]
)
def test_several_seeds_give_the_t_interval_of_their_spread(ks: tuple[int, ...], quantile: float) -> None:
    n = 10_000
    estimate = Bootstrap().rate("t", {s: count(_bits(5 * k, n)) for s, k in enumerate(ks)})
    assert estimate.value == pytest.approx(0.6)
    assert estimate.seeds == len(ks)
    half = quantile * np.std([5 * k / n for k in ks], ddof=1) / math.sqrt(len(ks))
    low, high = np.percentile(estimate.draws, [2.5, 97.5])
    assert (high - low) / 2 == pytest.approx(half, rel=0.15)
    assert estimate.interval()[1] <= 1  # a rate


def test_identical_rows_differ_by_exactly_nothing() -> None:
    bootstrap = Bootstrap()
    rows = {s: count(_bits(30 + s, 100)) for s in range(3)}
    difference = bootstrap.rate("t", rows) - bootstrap.rate("t", rows)
    assert difference.value == 0
    assert difference.interval() == (0.0, 0.0)


def test_pairing_makes_a_difference_of_correlated_rows_narrow() -> None:
    bootstrap = Bootstrap()
    a, b = (
        bootstrap.rate("t", {0: count(_bits(500, 1000))}),
        bootstrap.rate("t", {0: count(_bits(510, 1000))}),
    )
    low, high = (b - a).interval()
    assert low > 0  # ten samples more, and none less: separated although the intervals overlap
    assert a.interval()[1] > b.interval()[0]
    assert high == pytest.approx(0.01 + 1.96 * 0.1 / math.sqrt(1000), abs=0.002)


def test_a_masked_rate_counts_inside_its_mask_only() -> None:
    hits, mask = _bits(60, 100), ~_bits(50, 100)
    c = count(hits, mask)
    assert (c.k, c.n, c.total) == (10, 50, 100)
    estimate = Bootstrap().rate("t", {0: c})
    assert estimate.value == 0.2
    assert np.nanmin(estimate.draws) >= 0
    assert np.nanmax(estimate.draws) <= 1


def test_what_was_not_measured_has_no_number() -> None:
    empty = count(_bits(0, 10), np.zeros(10, bool))
    for estimate in (nothing(), Bootstrap().rate("t", {}), Bootstrap().rate("t", {0: empty}), mean([])):
        assert math.isnan(estimate.value)
        assert all(map(math.isnan, estimate.interval()))


def _near(value: float, noise: float = 0.0, seed: int = 0, seeds: int = 5) -> Estimate:
    draws = value + noise * np.random.default_rng(seed).standard_normal(DRAWS)
    return Estimate(value, draws, draws, {tuple(range(seeds)): np.zeros(seeds)})


def test_a_ratio_is_undefined_where_its_bottom_is_too_small() -> None:
    assert ratio(_near(0.5), _near(0.25)).value == 2
    assert ratio(_near(0.5), _near(0.25)).interval() == (2.0, 2.0)
    for bottom in (0.0, 0.01, -0.01, -0.02, -0.5):  # one-sided: a negative loss is a gain
        assert math.isnan(ratio(_near(0.5), _near(bottom), 0.01).value)
    assert math.isnan(ratio(_near(0.5), _near(0.02, 0.02), 0.01).value)  # cannot be told from no loss
    assert ratio(_near(0.5), _near(0.02), 0.01).value == 25


def test_tiers_part_where_the_difference_to_the_leader_is_separated() -> None:
    rows = [_near(0.5, 0.01, 1), _near(0.90, 0.01, 2), _near(0.91, 0.01, 3), _near(0.7, 0.01, 4), nothing()]
    assert tiers(rows) == [3, 1, 1, 2, 0]
    assert tiers(rows, higher_is_better=False) == [1, 3, 3, 2, 0]
    assert tiers([]) == []


def test_there_are_no_tiers_where_seeds_are_too_few() -> None:
    for seeds, found in ((FEWEST_SEEDS - 1, [0, 0]), (FEWEST_SEEDS, [1, 2])):
        assert tiers([_near(0.9, 0.01, 1, seeds), _near(0.5, 0.01, 2, seeds)]) == found


def test_draws_do_not_depend_on_who_asks_first() -> None:
    c = {0: count(_bits(30, 100)), 1: count(_bits(40, 100))}
    other = Bootstrap()
    other.rate("elsewhere", c)
    assert (other.rate("t", c).draws == Bootstrap().rate("t", c).draws).all()


# --------------------------------------------------------------------------- records


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=70))
def test_bits_survive_packing(pairs: list[tuple[bool, bool]]) -> None:
    hits, mask = (np.array(column) for column in zip(*pairs, strict=True))
    c = Count.model_validate_json(count(hits, mask).model_dump_json())
    again, inside = c.arrays()
    assert (inside == mask).all()
    assert (again == (hits & mask)).all()
    assert (c.k, c.n) == (int((hits & mask).sum()), int(mask.sum()))
    whole = count(hits)
    assert (whole.arrays()[0] == hits).all()
    assert whole.arrays()[1].all()


def _record(threat: str = "clean", counts: dict[str, Count] | None = None, **fields: Any) -> Record:
    given: dict[str, Any] = {
        "cell": "c", "grid": "g", "suite": "s", "backbone": "b", "protocol": "inductive", "threat": threat,
        "merging": "ta", "attack": "none", "defense": "none", "subject": "" if threat == "clean" else "a",
        "target_class": 0, "experts": ["a", "b"], "seed": 0, "status": "done", "counts": counts or {},
    }  # fmt: skip
    return Record(**{**given, **fields})


def test_records_are_strict() -> None:
    with pytest.raises(ValidationError, match="accuracy"):
        _record(accuracy=1.0)
    raw = _record().model_dump()
    del raw["threat"]
    with pytest.raises(ValidationError, match="threat"):
        Record.model_validate(raw)


def test_reading_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"grid: no records of 'g' .*valid: none"):
        read_records(tmp_path, "g")
    (tmp_path / "g").mkdir()
    manifest = tmp_path / "g" / "grid.json"
    for damage in ("{", "[]", "{}"):
        manifest.write_text(damage)
        with pytest.raises(UsageError, match=r"g/grid\.json: unreadable"):
            read_records(tmp_path, "g")
    manifest.write_text('{"cells": ["c"]}')
    (tmp_path / "g" / "c.json").write_text("{}")
    with pytest.raises(UsageError, match=r"c\.json: not a record: cell: Field required"):
        read_records(tmp_path, "g")


# --------------------------------------------------------------------------- boards


def _k(k: int, n: int = 100) -> Count:
    return count(_bits(k, n))


def _boards(records: list[Record]) -> dict[str, Board]:
    return {b.name: b for b in make_boards(records)}


def _accuracies(**roles: tuple[int, int]) -> dict[str, Count]:
    """Hits of 100 on tasks a and b, by role."""
    return {f"acc/{role}/{t}": _k(k) for role, ks in roles.items() for t, k in zip("ab", ks, strict=True)}


def test_the_clean_board_averages_tasks_and_normalises_by_each_expert() -> None:
    counts = _accuracies(base=(30, 40), expert=(80, 50), clean_merge=(60, 45))
    frame = _boards([_record(counts=counts)])["clean"].frame.set_index("method")
    assert frame.loc["ta", "accuracy"] == pytest.approx(0.525)
    assert frame.loc["ta", "normalised"] == pytest.approx((60 / 80 + 45 / 50) / 2)
    assert frame.loc["(experts)", "accuracy"] == pytest.approx(0.65)
    assert frame.loc["(base)", "accuracy"] == pytest.approx(0.35)
    assert frame.loc["(base)", "b"] == pytest.approx(0.4)


def test_seeds_are_averaged_and_methods_ranked() -> None:
    records = [
        _record(merging=m, seed=s, counts=_accuracies(base=(30, 30), expert=(90, 90), clean_merge=(k + s, k)))
        for m, k in (("low", 40), ("high", 80))
        for s in range(5)
    ]
    frame = _boards(records)["clean"].frame.set_index("method")
    assert frame.loc["high", "accuracy"] == pytest.approx(0.81)
    assert frame.loc["high", "seeds"] == 5
    assert (frame.loc["high", "tier"], frame.loc["low", "tier"]) == (1, 2)


def _protection(attack: str, attacked: int, defense: str = "p", merged: int = 20, **fields: Any) -> Record:
    counts = _accuracies(
        base=(10, 10), expert=(90, 85), published=(88, 0), recovered=(88, 0), clean_merge=(80, 75),
        protected_merge=(merged, 70), merge=(attacked, 72),
    )  # fmt: skip
    return _record("protection", counts, attack=attack, defense=defense, **fields)


def test_recovery_is_the_share_of_the_loss_an_attack_brings_back() -> None:
    records = [
        _protection("none", 20), _protection("weak", 35, values={"max_abs_dlogit": 2e-6}),
        _protection("strong", 65, values={"max_abs_dlogit": 1e-6}),
    ]  # fmt: skip
    boards = _boards(records)
    cells = boards["protection_cells"].frame.set_index("attack")
    assert cells.loc["weak", "recovery"] == pytest.approx((35 - 20) / (80 - 20))
    assert cells.loc["strong", "recovery"] == pytest.approx((65 - 20) / (80 - 20))
    assert math.isnan(cells.loc["none", "recovery"])
    assert cells.loc["weak", "free_rider+"] == pytest.approx(0.70)  # the other tasks, not the protected one
    assert cells.loc["weak", "free_rider_attacked"] == pytest.approx(0.72)
    row = boards["protection"].frame.set_index("defense").loc["p"]
    assert row["stand_alone_loss"] == pytest.approx(0.02)
    assert row["worst_recovery"] == pytest.approx(0.75)
    assert row["recovered_by"] == "strong + ta"
    assert row["worst_merged"] == pytest.approx(0.65)
    assert row["max_abs_dlogit"] == 2e-6


def test_the_summary_averages_over_methods_instead_of_keeping_the_last() -> None:
    records = [_protection("none", 20, merged=20), _protection("none", 40, merged=40, merging="ties")]
    row = _boards(records)["protection"].frame.set_index("defense").loc["p"]
    assert row["MMP+"] == pytest.approx(0.30)


def test_recovery_is_undefined_where_nothing_was_lost() -> None:
    boards = _boards([_protection("strong", 80, merged=80)])
    assert math.isnan(boards["protection_cells"].frame["recovery"].item())
    assert math.isnan(boards["protection"].frame["worst_recovery"].item())
    assert boards["protection"].frame["recovered_by"].item() == ""


def _asr(k: int, n: int = 90, total: int = 100) -> Count:
    """k of the n samples outside the target class."""
    return count(_bits(k, total), _bits(n, total))


def _backdoor(defense: str, hit: tuple[int, int], accurate: tuple[int, int], **fields: Any) -> Record:
    counts = _accuracies(clean_merge=(80, 70), merge=accurate, poisoned=(85, 0), base=(10, 10))
    for role, (a, b) in {"merge": hit, "clean_merge": (9, 18), "base": (0, 9), "poisoned": (90, 0)}.items():
        counts |= {f"asr/{role}/a": _asr(a), f"asr/{role}/b": _asr(b)}
    counts |= {"ra/merge/a": _asr(45), "ra/merge/b": _asr(45)}
    return _record("backdoor", counts, attack=fields.pop("attack", "bad"), defense=defense, **fields)


def test_the_backdoor_board_parts_succession_from_transfer_and_shows_controls() -> None:
    frame = _boards([_backdoor("none", (72, 27), (78, 68)), _backdoor("d", (18, 9), (70, 60))])[
        "backdoor"
    ].frame
    row = frame.set_index("defense").loc["none"]
    assert row["succession"] == pytest.approx(72 / 90)
    assert row["transfer"] == pytest.approx(27 / 90)
    assert row["succession_clean_merge"] == pytest.approx(0.1)
    assert row["transfer_clean_merge"] == pytest.approx(0.2)
    assert (row["succession_base"], row["transfer_base"]) == (0, pytest.approx(0.1))
    assert row["backdoor"] == pytest.approx(0.7)
    assert row["ASR_alone"] == 1
    assert (row["CA"], row["BA"]) == (pytest.approx(0.75), pytest.approx(0.73))
    assert math.isnan(row["DER"])
    defended = frame.set_index("defense").loc["d"]
    # [max(0, ΔASR) − max(0, ΔACC) + 1] / 2 with ΔASR = 0.8 − 0.2 and ΔACC = 0.73 − 0.65
    assert defended["DER"] == pytest.approx((0.6 - 0.08 + 1) / 2)
    assert math.isnan(row["tier"])  # of one seed


def _seeded(*records: Record, seeds: int = 5) -> list[Record]:
    """The same cells for several seeds."""
    return [r.model_copy(update={"seed": s}) for r in records for s in range(seeds)]


def test_defenses_are_ranked_within_one_attack_and_method_on_their_common_cells() -> None:
    plain, good = _backdoor("none", (72, 27), (78, 68)), _backdoor("d", (18, 9), (70, 60))
    frame = _frames(*_seeded(plain, good))["backdoor"].set_index("defense")
    assert dict(frame["tier"]) == {"none": 2, "d": 1}
    more = [
        _backdoor("none", (0, 0), (78, 68), seed=s) for s in range(5, 9)
    ]  # would lift none, if it counted
    frame = _frames(*_seeded(plain, good), *more)["backdoor"].set_index("defense")
    assert dict(frame["tier"]) == {"none": 2, "d": 1}


def test_der_does_not_depend_on_the_order_of_records() -> None:
    records = [_backdoor("d", (18, 9), (70, 60)), _backdoor("none", (72, 27), (78, 68))]
    frame = _boards(records)["backdoor"].frame.set_index("defense")
    assert frame.loc["d", "DER"] == pytest.approx(0.76)


def _frames(*records: Record) -> dict[str, Any]:
    return {name: board.frame for name, board in _boards(list(records)).items()}


def test_an_off_task_backdoor_is_read_on_the_task_it_aims_at() -> None:
    record = _backdoor("none", (9, 72), (78, 68), target_task="b")
    counts = {**record.counts, "asr/poisoned/b": _asr(63)}
    row = _frames(record.model_copy(update={"counts": counts}))["backdoor"].iloc[0]
    assert row["target_task"] == "b"
    assert row["succession"] == pytest.approx(72 / 90)
    assert row["succession_clean_merge"] == pytest.approx(18 / 90)
    assert row["backdoor"] == pytest.approx(54 / 90)
    assert row["ASR_alone"] == pytest.approx(63 / 90)
    assert row["acc_alone"] == pytest.approx(0.85)  # of the adversary's own task
    assert math.isnan(row["transfer"])  # no task is left that is neither malicious nor aimed at


def test_tasks_of_accomplices_are_no_transfer() -> None:
    counts = {f"asr/merge/{t}": _asr(k) for t, k in zip("abcd", (90, 81, 9, 0), strict=True)}
    two, one = (
        _record("backdoor", counts, attack="bad", experts=list("abcd"), subject="d", adversaries=n)
        for n in (2, 1)
    )
    frame = _frames(two, one)["backdoor"].set_index("adversaries")
    assert frame.loc[2, "succession"] == 0
    assert frame.loc[2, "transfer"] == pytest.approx((81 + 9) / 2 / 90)  # a, next after d, is an accomplice
    assert frame.loc[1, "transfer"] == pytest.approx((90 + 81 + 9) / 3 / 90)


def test_the_front_holds_what_nothing_beats_in_both() -> None:
    accurate, safe = _backdoor("none", (72, 27), (78, 68)), _backdoor("safe", (18, 9), (60, 50))
    beaten = _backdoor("beaten", (36, 9), (40, 30))
    frame = _frames(accurate, safe, beaten)["backdoor_pareto"].set_index("defense")
    assert dict(frame["front"]) == {"none": "yes", "safe": "yes", "beaten": "no"}
    assert frame.loc["beaten", "dominated_by"] == "ta + safe"
    assert frame.loc["beaten", "front_share"] == 0
    assert math.isnan(frame.loc["none", "tier"])
    assert list(frame["succession"]) == pytest.approx([0.8, 0.2, 0.4])
    frame = _frames(*_seeded(accurate, safe, beaten))["backdoor_pareto"].set_index("defense")
    assert (frame.loc["none", "tier"], frame.loc["beaten", "tier"]) == (1, 2)


def test_what_equals_a_pair_of_the_front_is_on_it_too() -> None:
    twins = [_backdoor(d, (18, 9), (70, 60)) for d in ("d", "e")]
    frame = _frames(*twins)["backdoor_pareto"]
    assert list(frame["front"]) == ["yes", "yes"]
    assert list(frame["front_share"]) == [1, 1]


def test_different_attacks_do_not_share_a_front() -> None:
    weak, strong = _backdoor("none", (9, 9), (78, 68), attack="weak"), _backdoor("none", (90, 9), (70, 60))
    frame = _frames(weak, strong)["backdoor_pareto"]
    assert list(frame["front"]) == ["yes", "yes"]


def test_a_defense_is_as_good_as_under_its_worst_attack() -> None:
    records = [
        _backdoor("none", (72, 27), (78, 68)), _backdoor("none", (45, 9), (78, 68), attack="mild"),
        _backdoor("d", (9, 9), (70, 60)), _backdoor("d", (27, 9), (77, 67), attack="mild"),
    ]  # fmt: skip
    frame = _frames(*records)["backdoor_defenses"].set_index("defense")
    row = frame.loc["d"]
    assert row["worst_backdoor"] == pytest.approx(0.2)  # 27 of 90 less the control's 9
    assert row["worst_by"] == "mild + ta"
    assert row["worst_ASR"] == pytest.approx(0.3)
    assert row["mean_backdoor"] == pytest.approx(0.1)
    assert row["accuracy_cost"] == pytest.approx((0.08 + 0.01) / 2)
    assert row["worst_accuracy_cost"] == pytest.approx(0.08)
    assert math.isnan(frame.loc["none", "accuracy_cost"])
    assert frame.loc["none", "worst_by"] == "bad + ta"
    frame = _frames(*_seeded(*records))["backdoor_defenses"].set_index("defense")
    assert (frame.loc["d", "tier"], frame.loc["none", "tier"]) == (1, 2)


def test_an_attacks_best_answer_may_cost_two_points() -> None:
    plain, dear = _backdoor("none", (72, 27), (78, 68)), _backdoor("dear", (0, 9), (75, 66))
    cheap, cheaper = _backdoor("cheap", (18, 9), (77, 67)), _backdoor("cheaper", (36, 9), (78, 68))
    other = _backdoor("none", (54, 9), (76, 68), merging="ties")
    row = _frames(plain, dear, cheap, cheaper, other)["backdoor_attacks"].iloc[0]
    assert row["best_defense"] == "cheap"
    assert row["best_ASR"] == pytest.approx(0.2)
    assert row["best_backdoor"] == pytest.approx(0.1)
    assert row["best_cost"] == pytest.approx(0.01)
    assert row["best_pair"] == "ta + cheap"
    assert row["succession"] == pytest.approx((72 + 54) / 2 / 90)  # over methods, undefended
    assert row["backdoor_transfer"] == pytest.approx(((27 - 18) + (9 - 18)) / 2 / 90)
    alone = _frames(plain, dear)["backdoor_attacks"].iloc[0]
    assert (alone["best_defense"], alone["best_pair"]) == ("", "ta")
    assert math.isnan(alone["best_ASR"])


def test_a_defense_is_held_against_the_same_cells_without_it() -> None:
    plain = [_backdoor("none", (72, 27), (78, 68), seed=0), _backdoor("none", (0, 0), (38, 28), seed=1)]
    boards = _frames(*plain, _backdoor("d", (18, 9), (70, 60), seed=0))
    row = boards["backdoor"].set_index("defense").loc["d"]
    assert row["accuracy_cost"] == pytest.approx(0.08)  # of seed 0; seed 1 was not defended
    assert row["DER"] == pytest.approx((0.6 - 0.08 + 1) / 2)
    front = boards["backdoor_pareto"].set_index("defense")
    assert (front.loc["none", "succession"], front.loc["none", "cells_compared"]) == (pytest.approx(0.8), 1)
    assert dict(front["front"]) == {"none": "yes", "d": "yes"}
    apart = _frames(plain[0], _backdoor("d", (18, 9), (70, 60), seed=1))
    assert math.isnan(apart["backdoor"].set_index("defense").loc["d", "accuracy_cost"])
    assert list(apart["backdoor_pareto"]["cells_compared"]) == [0, 0]


def test_coefficients_of_the_malicious_are_beside_those_of_others_and_of_the_control() -> None:
    values = {"coefficient/malicious": 0.1, "coefficient/others": 0.5, "coefficient/control": 0.4}
    more = {"coefficient/malicious": 0.3, "coefficient/others": 0.7, "coefficient/control": 0.2}
    boards = _frames(
        _backdoor("d", (18, 9), (70, 60), values=values), _backdoor("d", (18, 9), (70, 60), seed=1, values=more),
        _backdoor("none", (72, 27), (78, 68)),
    )  # fmt: skip
    rows = boards["backdoor"].set_index("defense")[
        ["coefficient", "coefficient_others", "coefficient_control"]
    ]
    assert list(rows.loc["d"]) == pytest.approx([0.2, 0.6, 0.3])
    assert rows.loc["none"].isna().all()
    assert "coefficient" not in _frames(_backdoor("none", (72, 27), (78, 68)))["backdoor"]


def test_looks_screens_and_costs_are_averaged_where_they_are_known() -> None:
    values = {"visibility/area": 0.02, "visibility/ssim": 0.9, "screen/caught": 1.0, "screen/false": 0.5}
    cost = {
        "attack": {"seconds": 5.0, "trigger_seconds": 2.0, "poison_seconds": 3.0, "rows": 100.0, "peak_mb": 9.0},
        "defense": {"seconds": 7.0, "rows": 64.0, "peak_mb": 8.0},
    }  # fmt: skip
    steps = {"poisoned": "p", "merge": "m", "clean_merge": "c"}
    told = _backdoor("d", (18, 9), (70, 60), values=values, cost=cost, steps=steps)
    boards = _frames(told, _backdoor("none", (72, 27), (78, 68)))
    row = boards["backdoor"].set_index("defense").loc["d"]
    assert (row["visibility/area"], row["visibility/ssim"]) == (0.02, 0.9)
    assert (row["caught"], row["false_alarms"]) == (1.0, 0.5)
    assert (row["attack_rows"], row["defense_rows"]) == (100, 64)
    assert not [c for name, frame in boards.items() if name != "cost" for c in frame if c.endswith("seconds")]
    assert "visibility/l2" not in boards["backdoor"]
    cost_row = boards["cost"].set_index("name").loc["bad"]
    assert (cost_row["trigger_seconds"], cost_row["poison_seconds"], cost_row["rows"]) == (2, 3, 100)
    text = markdown(_boards([told])["backdoor_attacks"])
    assert "0.9" in text
    assert "90.0" not in text  # similarity is not a percentage


def test_threat_models_never_share_a_board() -> None:
    clean = _record(counts=_accuracies(base=(30, 40), expert=(80, 50), clean_merge=(60, 45)))
    records = [clean, _protection("none", 20), _backdoor("none", (72, 27), (78, 68))]
    together, alone = _boards(records), {}
    for record in records:
        alone |= _boards([record])
    backdoor = {"backdoor", "backdoor_pareto", "backdoor_defenses", "backdoor_attacks"}
    assert together.keys() == alone.keys() == {"clean", "protection", "protection_cells", *backdoor}
    for name, board in together.items():
        assert board.frame.equals(alone[name].frame)


def test_what_is_missing_is_visible_and_not_averaged_away() -> None:
    counts = _accuracies(base=(30, 40), expert=(80, 50), clean_merge=(60, 45))
    failed = {"status": "failed", "reason": "ValueError: no"}
    records = [_record(counts=counts), _record(seed=1, **failed), _record(merging="gone", **failed)]
    board = _boards(records)["clean"]
    frame = board.frame.set_index("method")
    assert (frame.loc["ta", "cells_done"], frame.loc["ta", "cells_expected"], frame.loc["ta", "seeds"]) == (
        1,
        2,
        1,
    )
    assert math.isnan(frame.loc["gone", "accuracy"])
    assert math.isnan(frame.loc["gone", "tier"])
    header, rows = display(board)
    shown = {r[0]: dict(zip(header, r, strict=True)) for r in rows}
    assert shown["ta"]["cells"].startswith("1/2 incomplete (1 failed: ")
    assert shown["gone"]["cells"] == "0/1 incomplete (1 failed: ValueError: no)"
    assert shown["gone"]["accuracy"] == "–"
    assert "1/2 incomplete" in markdown(board)


def test_markdown_rounds_and_the_frame_does_not() -> None:
    counts = {k: count(_bits(1, 3)) for k in _accuracies(base=(0, 0), expert=(0, 0), clean_merge=(0, 0))}
    board = _boards([_record(counts=counts)])["clean"]
    assert board.frame["accuracy"].iloc[0] == pytest.approx(1 / 3, abs=1e-15)
    assert "33.3 (" in markdown(board)  # one seed: an interval of test samples alone
    assert "33.33" not in markdown(board)
    two = [_record(counts=counts, seed=s) for s in (0, 1)]
    assert "33.3 [" in markdown(_boards(two)["clean"])


HOSTILE = "a | 99.9 | 0.0 | b\n| c |"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (HOSTILE, "a &#124; 99.9 &#124; 0.0 &#124; b\ufffd&#124; c &#124;"),
        ("<script>x</script>", "&#60;script&#62;x&#60;/script&#62;"),
        ("[x](https://y)", "[x&#93;(https&#58;&#47;&#47;y)"),
        ("\x1b[31mred\u202e", "\ufffd[31mred\ufffd"),
        ("task_arithmetic(scaling=0.3, grid=[0.1, 0.2])", "task_arithmetic(scaling=0.3, grid=[0.1, 0.2])"),
        ("-3.0 [-4.0, -2.0]", "-3.0 [-4.0, -2.0]"),
        ("-3.0 (-4.0, -2.0)", "-3.0 (-4.0, -2.0)"),
    ],
)
def test_names_of_others_are_only_text_in_markdown(text: str, shown: str) -> None:
    assert escaped(text) == shown


def test_a_hostile_name_moves_no_column_and_computes_nothing(tmp_path: Path) -> None:
    records = [_record(merging=name) for name in (HOSTILE, "=cmd|' /c calc'!A0", "@SUM(1)")]
    boards = make_boards(records)
    write_boards(tmp_path, boards, "t")
    table = [line for line in (tmp_path / "boards.md").read_text().splitlines() if line.startswith("|")]
    clean = next(b for b in boards if b.name == "clean")
    width = len(display(clean)[0])
    assert {line.count("|") - 1 for line in table[: 2 + len(clean.frame)]} == {width}
    again = pd.read_csv(tmp_path / "clean.csv")
    assert len(again) == len(clean.frame)
    assert not [name for name in again["method"] if name.startswith(("=", "@"))]


def test_what_a_grid_took_counts_each_step_once() -> None:
    def cost(seconds: float, made: float, peak: float = 10.0) -> dict[str, float]:
        return {"seconds": seconds, "peak_mb": peak, "made_seconds": made, "made_peak_mb": 2 * peak}

    steps = {"expert:t": "e", "clean_merge": "c", "merge": "m", "poisoned": "p", "defended_clean_merge": "d"}
    shared = {"expert:t": cost(1.0, 60.0), "clean_merge": cost(2.0, 3.0)}
    sides = {"attack": {"seconds": 120.0, "peak_mb": 50.0}, "defense": {"seconds": 30.0, "peak_mb": 8.0}}
    # a defended merge is the defense's, as is what it makes of clean experts; an undefended one is a merge
    defended = {**shared, **sides, "merge": cost(4.0, 1000.0), "defended_clean_merge": cost(5.0, 6.0)}
    plain = {**shared, "attack": sides["attack"], "merge": cost(7.0, 8.0)}
    records = [
        _backdoor("d", (18, 9), (70, 60), cost=defended, steps=steps),
        _backdoor("none", (72, 27), (78, 68), cost=plain, steps={**steps, "merge": "n"}),
    ]
    told = _frames(*records)["cost_total"].set_index("name")
    seconds = {
        "clean experts": 60,
        "attacks": 120,
        "defenses": 30 + 6,
        "merges": 3 + 8,
        "evaluations": 1 + 2 + 4 + 5 + 7,
    }
    assert dict(60 * told["minutes"]) == pytest.approx({**seconds, "all": sum(seconds.values())})
    counted = {"clean experts": 1, "attacks": 1, "defenses": 2, "merges": 2, "evaluations": 5, "all": 11}
    assert dict(told["steps"]) == counted
    assert dict(told["peak_mb"]) == {"clean experts": 20, "attacks": 50, "defenses": 20, "merges": 20,
                                     "evaluations": 10, "all": 50}  # fmt: skip
    assert "cost_total" not in _frames(_backdoor("none", (72, 27), (78, 68)))


def test_what_cells_share_is_counted_once_for_the_grid_and_in_full_for_each() -> None:
    """Two screened cells with one trigger and two looks in common."""
    sides = {"attack": {"seconds": 50.0, "peak_mb": 9.0}, "defense": {"seconds": 900.0, "peak_mb": 8.0}}
    common = {"trigger@t": 20.0, "examine@a": 300.0, "examine@b": 300.0}
    records = []
    for name in "xy":
        apart = {**common, f"poison@{name}": 30.0, f"examine@{name}": 299.0, f"screen@{name}": 1.0}
        cost = {**sides, **{k: {"seconds": v, "peak_mb": 4.0} for k, v in apart.items()}}
        steps = {"poisoned": f"p{name}", "merge": f"m{name}", "clean_merge": "c"}
        records.append(_backdoor(f"screen{name}", (18, 9), (70, 60), cost=cost, steps=steps))
    boards = _frames(*records)
    told = boards["cost_total"].set_index("name")["minutes"] * 60
    assert told["attacks"] == pytest.approx(20 + 2 * 30)
    assert told["defenses"] == pytest.approx(2 * 300 + 2 * 300)
    assert set(boards["cost"].set_index("name").loc[["screenx", "screeny"], "seconds"]) == {900.0}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2543.0, "2540"),
        (999_400.0, "999000"),
        (999_600.0, "1e+06"),
        (999.6, "1000"),
        (61.04, "61"),
        (0.0123, "0.0123"),
    ],
)
def test_seconds_and_sizes_have_three_digits_and_no_exponent_below_a_million(value: float, text: str) -> None:
    assert cell_text({"seconds": value}, "seconds", ()) == text
