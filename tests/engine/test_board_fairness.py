"""Boards are fair: nothing overwrites anything, like is compared with like, and claims hold as often as they say."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mergesec.errors import UsageError
from mergesec.evidence import statistics
from mergesec.evidence.boards import make_boards
from mergesec.evidence.estimates import AXES, OUTCOMES, Cell, Reader, canonical, common_cells, fewest_seeds
from mergesec.evidence.records import Count, Record, count, read_records
from mergesec.evidence.statistics import (
    DRAWS,
    Bootstrap,
    Estimate,
    holm,
    inseparable,
    largest,
    mean,
    ratio,
    tiers,
    tiers_of_largest,
)
from mergesec.evidence.tables import display, markdown, marks

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "results" / "records"
GRIDS = sorted(p.parent.name for p in SHIPPED.glob("*/grid.json"))

# --------------------------------------------------------------------------- order and collisions


def _bytes(records: list[Record]) -> dict[str, str]:
    """What is published of these records."""
    boards = {b.name: b.frame.to_csv(index=False) + markdown(b) for b in make_boards(records)}
    return {**boards, "marks": "\n".join(marks(records))}


def _thinned(records: list[Record], most: int) -> list[Record]:
    """Every so-and-so-many'th record, so that large grids stay fast and all axes are still there."""
    return records[:: max(1, len(records) // most)]


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is compared are bytes, not intervals."""
    monkeypatch.setattr(statistics, "DRAWS", 40)
    statistics._seed_weights.cache_clear()
    yield
    statistics._seed_weights.cache_clear()


@pytest.mark.usefixtures("few_draws")
@pytest.mark.parametrize("grid", GRIDS)
def test_boards_do_not_depend_on_the_order_of_records(grid: str) -> None:
    records = _thinned(read_records(SHIPPED, grid), 24)
    shuffled = random.Random(7).sample(records, len(records))
    assert _bytes(shuffled) == _bytes(records)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("grid", GRIDS)
def test_shipped_boards_are_those_of_the_shipped_records_in_any_order(grid: str, tmp_path: Path) -> None:
    from mergesec.execution.session import publish

    records = read_records(SHIPPED, grid)
    _, written = publish(random.Random(3).sample(records, len(records)), tmp_path, grid)
    shipped = ROOT / "results" / "leaderboards" / grid
    assert {p.name for p in written} == {p.name for p in shipped.iterdir()}
    assert not [p.name for p in written if p.read_bytes() != (shipped / p.name).read_bytes()]


def test_every_field_of_a_record_is_an_axis_or_an_outcome() -> None:
    assert set(AXES) | OUTCOMES == set(Record.model_fields)
    assert {"protected", "secrets", "adversaries", "target_task", "target_class", "experts", "seed"} <= set(
        AXES
    )


def _bits(k: int, n: int) -> NDArray[np.bool_]:
    return np.arange(n) < k


def _record(**fields: Any) -> Record:
    given: dict[str, Any] = {
        "cell": "c", "grid": "g", "suite": "s", "backbone": "b", "protocol": "inductive", "threat": "protection",
        "merging": "ta", "attack": "none", "defense": "p", "subject": "a", "target_class": 0,
        "experts": ["a", "b", "c"], "seed": 0, "status": "done",
    }  # fmt: skip
    return Record(**{**given, **fields})


def _accurate(k: int, **fields: Any) -> Record:
    roles = ("expert", "published", "recovered", "clean_merge", "protected_merge", "merge")
    counts = {f"acc/{role}/{t}": count(_bits(k, 100)) for role in roles for t in "abc"}
    counts |= {f"acc/clean_merge/{t}": count(_bits(90, 100)) for t in "abc"}
    return _record(counts=counts, **fields)


def test_two_records_of_one_cell_are_refused() -> None:
    with pytest.raises(UsageError, match=r"records: x and y are of one cell: no axis tells them apart"):
        make_boards([_accurate(10, cell="x"), _accurate(90, cell="y")])
    with pytest.raises(UsageError, match="are of one cell"):
        Reader().rate([_accurate(10, cell="x"), _accurate(90, cell="y")], "acc", "merge", "subject")


DIFFERENT: dict[str, Any] = {
    "grid": "h", "suite": "t", "backbone": "z", "protocol": "transductive", "threat": "backdoor", "merging": "ties",
    "attack": "aga", "defense": "q", "target_class": 1, "experts": ["a", "b"], "protected": 2, "secrets": "shared",
    "adversaries": 2, "target_task": "b", "company": "drawn", "seed": 1,
}  # fmt: skip


@pytest.mark.parametrize("axis", sorted(DIFFERENT))
def test_cells_that_differ_in_one_axis_are_never_mixed(axis: str) -> None:
    records = [_accurate(10), _accurate(90, **{axis: DIFFERENT[axis]})]
    assert len(canonical(records)) == 2
    assert Reader().rate(records, "acc", "merge", "subject").value == pytest.approx(0.5)


def test_every_axis_but_the_subject_is_tried() -> None:
    assert set(AXES) == {*DIFFERENT, "subject"}


def test_seeds_whose_target_was_drawn_are_replications() -> None:
    """Drawn, the class is part of what a seed stands for; named, it is an axis with a single seed in each value."""
    fields: list[dict[str, Any]] = [{"seed": s, "target_class": s + 1} for s in range(3)]
    named = [_accurate(10 * (s + 1), **f) for s, f in enumerate(fields)]
    drawn = [_accurate(10 * (s + 1), **f, drawn=["target_class"]) for s, f in enumerate(fields)]
    assert (fewest_seeds(named), fewest_seeds(drawn)) == (1, 3)
    rates = [Reader().rate(records, "acc", "merge", "subject") for records in (named, drawn)]
    assert rates[0].value == pytest.approx(rates[1].value)
    narrow, wide = ((r.interval()[1] - r.interval()[0]) for r in rates)
    assert wide > 2 * narrow


def test_of_drawn_experts_their_number_is_an_axis() -> None:
    sets = [["a", "b"], ["a", "c"], ["a", "b", "c"]]
    records = [_accurate(10, seed=s % 2, experts=e, drawn=["experts"]) for s, e in enumerate(sets)]
    assert fewest_seeds(records[:2]) == 2 and fewest_seeds(records) == 1
    assert len(canonical(records)) == 3


def test_the_summary_of_protections_is_the_mean_over_how_many_are_protected_and_by_whose_secret() -> None:
    records = [
        _accurate(k, protected=n, secrets=whose)
        for k, (n, whose) in zip((10, 20, 60), ((1, "own"), (2, "own"), (2, "shared")), strict=True)
    ]
    row = _frame(records, "protection").loc["p"]
    assert row["MMP+"] == pytest.approx(0.3)


def _frame(records: list[Record], board: str, index: str = "defense") -> Any:
    return {b.name: b for b in make_boards(records)}[board].frame.set_index(index)


# --------------------------------------------------------------------------- one weighting, common cells


def test_subjects_weigh_the_same_however_many_cells_they_have() -> None:
    records = [_accurate(10, merging=m) for m in ("m", "n", "o")] + [_accurate(50, subject="b")]
    assert Reader().rate(records, "acc", "merge", "subject").value == pytest.approx(0.3)
    values = [
        r.model_copy(update={"values": {"visibility/l2": r.counts["acc/merge/a"].k / 100}}) for r in records
    ]
    from mergesec.evidence.estimates import average, value

    assert average(values, value("visibility/l2")) == pytest.approx(0.3)


def _cells(text: str) -> set[Cell]:
    """``x0 x1 y0``: places and their seeds."""
    return {Cell((word[0],), int(word[1])) for word in text.split()}


@pytest.mark.parametrize(
    ("rows", "who", "what"),
    [
        ({"p": "x0 x1", "q": "x0"}, "pq", "x0"),
        ({"p": "x0 y0 z0", "q": "x0 y0", "r": "z0"}, "pq", "x0 y0"),  # 2 × 2 before 2 × 1
        ({"p": "x0 y0", "q": "x0 y0", "r": "x0"}, "pq", "x0 y0"),
        ({"p": "x0 y0", "q": "x0", "r": "x0", "s": "x0", "t": "x0"}, "pqrst", "x0"),
        ({"p": "x0 y0"}, "p", "x0 y0"),  # nobody to compare with
        ({"p": "x0 y0", "q": "z0"}, "", ""),
        ({"p": "x0", "q": "x1"}, "", ""),
        ({"p": "x0 x1 x2 y0 y1 y2", "q": "x0 y0"}, "pq", "x0 y0"),
        ({"p": "x0 x1 x2", "q": "x0 x1 x2", "r": "x0"}, "pq", "x0 x1 x2"),  # seeds count
    ],
)
def test_the_cells_that_are_compared_are_those_of_most_rows_and_cells(
    rows: dict[str, str], who: str, what: str
) -> None:
    found = common_cells({row: _cells(text) for row, text in rows.items()})
    assert found.rows == frozenset(who)
    assert found.cells == _cells(what)


def test_a_defense_that_lacks_an_attack_has_no_worst_case() -> None:
    attacks = ("none", "aga", "coupled")
    whole = [_accurate(20, defense=d, attack=a) for d in ("p", "q", "s") for a in attacks]
    part = [_accurate(20, defense="r", attack=a) for a in attacks[:2]]
    frame = _frame(whole + part, "protection")
    assert not frame.loc[["p", "q", "s"], ["MMP+", "worst_recovery"]].isna().any(axis=None)
    assert math.isnan(frame.loc["r", "worst_recovery"])
    assert frame.loc["r", "MMP+"] == pytest.approx(0.2)  # its merges without an attack are all there
    assert list(frame["cells_compared"]) == [3, 3, 3, 2]


def test_a_number_that_rests_on_fewer_seeds_than_its_row_says_so() -> None:
    records = [_accurate(20, attack=a, seed=s) for a in ("none", "aga") for s in range(3)]
    boards = make_boards([*records, _accurate(20, attack="coupled")])
    board = next(b for b in boards if b.name == "protection")
    row = board.frame.set_index("defense").loc["p"]
    assert (row["seeds"], row["worst_merged_seeds"]) == (3, 1)
    header, (shown, *_) = display(board)
    cells = dict(zip(header, shown, strict=True))
    assert cells["MMP+"].startswith("20.0 [")
    assert cells["worst_merged"].startswith("20.0 (")


# --------------------------------------------------------------------------- backdoors


def _backdoor(
    defense: str = "none", recall: int = 10, right: int = 50, asr: int = 60, **fields: Any
) -> Record:
    """Of 100 samples the last 10 are of the target class; ``recall`` of them are answered right."""
    outside = _bits(90, 100)
    accurate = np.concatenate([np.ones(80, bool), np.zeros(10, bool), _bits(recall, 10)])
    counts: dict[str, Count] = {}
    for role in ("clean_merge", "merge", "base", "poisoned"):
        clean = role == "clean_merge"
        for t in "abc":
            counts[f"acc/{role}/{t}"] = count(np.ones(100, bool) if clean else accurate)
            counts[f"asr/{role}/{t}"] = count(_bits(9 if clean else asr, 100), outside)
            counts[f"ra/{role}/{t}"] = count(_bits(81 if clean else right, 100), outside)
    named: dict[str, Any] = {"threat": "backdoor", "attack": "bad", "defense": defense, "counts": counts}
    return _record(**{**named, **fields})


def test_a_deleted_class_shows_in_recall_and_in_what_the_defense_costs() -> None:
    records = [_backdoor(), _backdoor("ibvs", recall=2, asr=9)]
    row = _frame(records, "backdoor").loc["ibvs"]
    assert row["target_recall"] == pytest.approx(0.2)
    assert row["target_recall_clean_merge"] == 1
    assert row["target_recall_cost"] == pytest.approx(0.8)
    assert row["accuracy_cost"] == pytest.approx(0.08)
    defenses = _frame(records, "backdoor_defenses")
    assert defenses.loc["ibvs", "worst_target_recall_cost"] == pytest.approx(0.8)
    cheap = [_backdoor(), _backdoor("d", recall=9, asr=50), _backdoor("ibvs", recall=8, asr=9)]
    row = _frame(cheap, "backdoor_attacks", "attack").loc["bad"]
    assert row["best_defense"] == "d"  # the other costs 2 points of accuracy, but 20 of the class's


def test_without_triggered_evaluations_nobody_knows_the_target_class() -> None:
    record = _backdoor()
    counts = {k: c for k, c in record.counts.items() if not k.startswith("asr/")}
    assert math.isnan(Reader().recall([record.model_copy(update={"counts": counts})], "merge").value)


def test_harm_to_others_is_what_they_lose_under_the_trigger() -> None:
    row = _frame([_backdoor(right=54)], "backdoor").loc["none"]
    assert row["transfer_harm"] == pytest.approx(0.9 - 0.6)


def test_the_best_defense_is_the_cheapest_that_cannot_be_told_from_the_lowest_and_ties_are_named() -> None:
    twins = [_backdoor(d, asr=20) for d in ("first", "second")]
    weaker = _backdoor("weaker", asr=50)
    for records in ([_backdoor(), *twins, weaker], [_backdoor(), weaker, *reversed(twins)]):
        row = _frame(records, "backdoor_attacks", "attack").loc["bad"]
        assert row["best_defense"] == "first or second"
        assert row["best_pair"] == "ta + first or ta + second"
        assert row["best_ASR"] == pytest.approx(20 / 90)
    dearer = _backdoor("dearer", recall=9, asr=19)  # one sample less, which is nothing, for one sample more
    cheaper = [_backdoor(), dearer, *(_backdoor(d, asr=20) for d in ("first",))]
    row = _frame(cheaper, "backdoor_attacks", "attack").loc["bad"]
    assert row["best_defense"].startswith("first")


# --------------------------------------------------------------------------- claims hold as often as they say

SAMPLES = 400


def _trained(
    rng: np.random.Generator, shared: NDArray[Any], middle: float, spread: float, seeds: int
) -> dict[int, Count]:
    """One row's counts: each seed a network whose accuracy has its own deviation, all on the same test samples,
    of which some are harder (``shared``)."""
    counts = {}
    for seed in range(seeds):
        accuracy = middle + spread * rng.standard_normal()
        noise = np.sqrt(0.5) * (shared + rng.standard_normal(SAMPLES))
        counts[seed] = count(noise < _normal_quantile(accuracy))
    return counts


def _normal_quantile(share: float) -> float:
    from scipy.special import ndtri

    return float(ndtri(min(max(share, 1e-6), 1 - 1e-6)))


def _rows(rng: np.random.Generator, middles: list[float], spread: float, seeds: int) -> list[Estimate]:
    """Estimates of rows on one test set."""
    shared = rng.standard_normal(SAMPLES)
    bootstrap = Bootstrap()
    bootstrap._samples = _WEIGHTS  # drawn once for all simulations
    return [bootstrap.rate("t", _trained(rng, shared, m, spread, seeds)) for m in middles]


_WEIGHTS: dict[tuple[str, int], NDArray[np.float32]] = {}


def _share(holds: list[bool], least: float) -> None:
    """The share that holds is at least ``least``, within three standard errors of the simulation."""
    noise = 3 * math.sqrt(least * (1 - least) / len(holds))
    assert np.mean(holds) >= least - noise, f"{np.mean(holds):.3f} of {len(holds)}"


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("spread", [0.0, 0.02, 0.06])
def test_intervals_cover_95_percent(seeds: int, spread: float) -> None:
    rng = np.random.default_rng(seeds)
    covered = []
    for _ in range(200):
        (estimate,) = _rows(rng, [0.75], spread, seeds)
        low, high = estimate.interval()
        covered.append(low <= 0.75 <= high)
    _share(covered, 0.95)


def test_intervals_of_five_seeds_are_not_needlessly_wide() -> None:
    rng = np.random.default_rng(1)
    found = [_rows(rng, [0.75], 0.03, 5)[0].interval() for _ in range(100)]
    truth = math.sqrt(0.03**2 / 5 + 0.75 * 0.25 / SAMPLES * 0.6)  # half of a sample's noise is the seed's own
    assert np.mean([high - low for low, high in found]) < 2 * 2.776 * truth * 1.15


@pytest.mark.parametrize("spread", [0.0, 0.03])
def test_intervals_of_paired_differences_cover_95_percent(spread: float) -> None:
    rng = np.random.default_rng(5)
    covered = []
    for _ in range(200):
        a, b = _rows(rng, [0.75, 0.6], spread, 5)
        low, high = (a - b).interval()
        covered.append(low <= 0.15 <= high)
    _share(covered, 0.95)


def test_intervals_of_means_and_ratios_cover_95_percent() -> None:
    rng = np.random.default_rng(6)
    means, ratios = [], []
    for _ in range(150):
        a, b, c = _rows(rng, [0.8, 0.6, 0.4], 0.02, 5)
        low, high = mean([a, b, c]).interval()
        means.append(low <= 0.6 <= high)
        low, high = ratio(b - c, a - c).interval()
        ratios.append(low <= 0.5 <= high)
    _share(means, 0.95)
    _share(ratios, 0.95)


@pytest.mark.parametrize(
    ("middles", "spread"), [([0.75] * 13, 0.0), ([0.75] * 13, 0.03), ([0.8] + [0.75] * 12, 0.01)]
)
def test_the_largest_of_many_rows_is_neither_too_high_nor_too_sure(
    middles: list[float], spread: float
) -> None:
    rng = np.random.default_rng(9)
    covered, excess, naive = [], [], []
    for _ in range(80):
        rows = _rows(rng, middles, spread, 5)
        found, place = largest(rows)
        low, high = found.interval()
        covered.append(low <= max(middles) <= high)
        excess.append(found.value - max(middles))
        naive.append(rows[place].value - max(middles))
    _share(covered, 0.95)
    error = math.sqrt(spread**2 / 5 + 0.75 * 0.25 / SAMPLES * 0.6)
    assert abs(np.mean(excess)) < 0.75 * error
    if min(middles) == max(middles):
        assert (
            np.mean(naive) > np.mean(excess) + 0.2 * error
        )  # what taking the largest estimate would have said


def test_a_clear_largest_row_is_left_as_it_is() -> None:
    a, b = _rows(np.random.default_rng(2), [0.9, 0.5], 0.01, 5)
    found, place = largest([b, a])
    assert (place, found.value, found.interval()) == (1, a.value, a.interval())
    assert largest([])[1] == -1


@pytest.mark.parametrize("spread", [0.0, 0.03])
def test_equal_rows_share_a_tier(spread: float) -> None:
    """Twenty of them, in all but one of twenty boards."""
    rng = np.random.default_rng(4)
    together = [set(tiers(_rows(rng, [0.75] * 20, spread, 5))) == {1} for _ in range(60)]
    _share(together, 0.95)


def test_equal_worst_cases_share_a_tier() -> None:
    rng = np.random.default_rng(8)
    together = []
    for _ in range(40):
        rows = _rows(rng, [0.75] * 12 + [0.75, 0.6, 0.6], 0.02, 5)
        together.append(set(tiers_of_largest([rows[i : i + 3] for i in range(0, 15, 3)])) == {1})
    _share(together, 0.95)


def test_what_is_far_apart_is_told_apart() -> None:
    rng = np.random.default_rng(3)
    rows = _rows(rng, [0.9, 0.7, 0.9, 0.4], 0.01, 5)
    assert tiers(rows) == [1, 2, 1, 3]
    assert tiers_of_largest([[rows[0], rows[3]], [rows[1]], [rows[3]]]) == [3, 2, 1]
    best = max((0, 2), key=lambda i: rows[i].value)
    assert inseparable(rows, best) == [0, 2]


def test_holm_steps_down() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]
    assert holm([0.01, 0.02, 0.03, 0.005]) == [True, True, True, True]
    assert holm([]) == []


def test_draws_are_as_many_as_the_pages_say() -> None:
    assert f"{DRAWS} draws" in (ROOT / "docs" / "metrics.md").read_text()
