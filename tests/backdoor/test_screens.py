"""Screens: robust scores in closed form, brute-force statistics, and that a planted backdoor is what they flag."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, cast

import outcomes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergesec.conformance.micro import Bars, MicroViT
from mergesec.contracts import (
    Backbone,
    ContractError,
    DataContext,
    Expert,
    MergeContext,
    Model,
    Recipe,
    Screened,
    Split,
    TaskView,
    Weights,
    load_network,
)
from mergesec.training import fit
from mergesec.weights import digest_weights
from mergesec_methods.backdoor.attacks.badnets import BadNets
from mergesec_methods.backdoor.defenses._screens import critical_score, let_in, robust_scores, strided
from mergesec_methods.backdoor.defenses.neural_cleanse import NeuralCleanse, _Costs, anomaly_indices
from mergesec_methods.backdoor.defenses.outliers import OutlierTest, gram_matrix
from mergesec_methods.backdoor.defenses.spectral_signature import (
    SpectralSignature,
    best_split,
    scores_along_top,
    signature,
)

CPU = torch.device("cpu")


def spectral(**given: Any) -> SpectralSignature:
    return SpectralSignature(
        **{"threshold": 3.5, "level": 0.05, "rows": 512, "smallest": 8, "relative": True, **given}
    )


def cleanse(**given: Any) -> NeuralCleanse:
    short = {"index": 2.0, "steps": 60, "batch": 16, "rows": 64, "classes": 0, "learning_rate": 0.1}
    return NeuralCleanse(**{**short, "success": 0.9, **given})


def experts(count: int = 6, seed: int = 0) -> tuple[dict[str, Tensor], list[Expert]]:
    generator = torch.Generator().manual_seed(seed)
    base = {"a": torch.randn(8, 9, generator=generator), "b": torch.randn(7, generator=generator)}
    base["count"] = torch.tensor(3)
    made = []
    for number in range(count):
        moved = {
            n: t + torch.randn(t.shape, generator=generator) if t.is_floating_point() else t + number
            for n, t in base.items()
        }
        made.append(Expert(f"t{number}", moved))
    return base, made


def nowhere(views: dict[str, TaskView] | None = None, backbone: Backbone | None = None) -> MergeContext:
    return MergeContext(CPU, 0, cast(Backbone, backbone), views or {}, lambda merged: 0.0)


# --------------------------------------------------------------------------- robust scores


def test_scores_are_distances_from_the_median_in_median_deviations() -> None:
    scores = robust_scores(torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0]))
    wanted = torch.tensor([-2.0, -1, 0, 1, 97], dtype=torch.float64) / 1.4826
    torch.testing.assert_close(scores, wanted)


def test_scores_of_a_majority_of_equals_use_the_mean_deviation() -> None:
    scores = robust_scores(torch.tensor([5.0, 5.0, 5.0, 5.0, 9.0]))
    torch.testing.assert_close(scores[4], torch.tensor(4 / (1.2533141373155 * 0.8), dtype=torch.float64))
    assert torch.equal(robust_scores(torch.full((4,), 7.0)), torch.zeros(4, dtype=torch.float64))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=9), st.floats(0.5, 8), st.floats(-9, 9))
def test_scores_ignore_scale_and_origin_and_never_flag_the_median(
    values: list[float], scale: float, origin: float
) -> None:
    plain = torch.tensor(values, dtype=torch.float64).round(decimals=2)
    scores = robust_scores(plain)
    torch.testing.assert_close(robust_scores(plain * scale + origin), scores, atol=1e-4, rtol=1e-4)
    assert float(scores.abs().min()) <= 1.0 / 1.4826 + 1e-9 or len(values) % 2 == 0


def test_the_least_suspicious_one_stays() -> None:
    _, given_ = experts(3)
    assert let_in(given_, torch.tensor([1.0, 5.0, 2.0]), 3.0) == [given_[0], given_[2]]
    assert let_in(given_, torch.tensor([9.0, 7.0, 8.0]), 3.0) == [given_[1]]


@pytest.mark.slow
@pytest.mark.parametrize(("count", "statistics", "sides"), [(3, 1, 2), (8, 2, 2), (8, 1, 1), (20, 2, 2)])
def test_the_critical_score_holds_its_level_on_normal_statistics(
    count: int, statistics: int, sides: int
) -> None:
    limit = critical_score(count, statistics, 0.05, sides)
    generator = torch.Generator().manual_seed(1)
    flagged = torch.zeros(2000, dtype=torch.bool)
    for row in range(2000):
        scores = torch.cat([
            robust_scores(torch.randn(count, generator=generator)) for _ in range(statistics)
        ])  # fmt: skip
        flagged[row] = (scores if sides == 1 else scores.abs()).max() > limit
    low, high = outcomes.share(flagged)
    assert low < 0.05 < high
    assert critical_score(count, statistics, 0.01, sides) > limit


@pytest.mark.parametrize("count", [1, 2, 7, 64, 100])
def test_strided_rows_are_all_rows_spread(count: int) -> None:
    rows = strided(count)
    assert rows.sort().values.tolist() == list(range(count))
    if count == 100:
        assert len({int(r) // 20 for r in rows[:10]}) == 5
        assert {int(r) % 4 for r in rows[:10]} == {0, 1, 2, 3}


# --------------------------------------------------------------------------- task vectors


def test_the_gram_matrix_is_that_of_the_flat_task_vectors() -> None:
    base, given_ = experts()
    flat = torch.stack(
        [torch.cat([(e.weights[n] - base[n]).flatten() for n in "ab"]) for e in given_]
    ).double()
    torch.testing.assert_close(gram_matrix(base, given_), flat @ flat.T, rtol=1e-5, atol=1e-5)
    tied = {**base, "c": base["a"]}
    doubled = [Expert(e.task, {**e.weights, "c": e.weights["a"]}) for e in given_]
    torch.testing.assert_close(gram_matrix(tied, doubled), flat @ flat.T, rtol=1e-5, atol=1e-5)


def grown(base: Weights, expert: Expert, factor: float) -> Expert:
    moved = {
        n: base[n] + factor * (t - base[n]) if t.is_floating_point() else t for n, t in expert.weights.items()
    }
    return Expert(expert.task, moved)


def test_an_amplified_task_vector_is_dropped_and_the_rest_untouched() -> None:
    base, given_ = experts()
    given_[2] = grown(base, given_[2], 5.0)
    before = [digest_weights(e.weights) for e in given_]
    kept = OutlierTest(3.5, 0.05, "both").screen(base, given_, nowhere()).experts
    assert [e.task for e in kept] == ["t0", "t1", "t3", "t4", "t5"]
    assert all(e in given_ for e in kept)
    assert before == [digest_weights(e.weights) for e in given_]
    assert len(OutlierTest(3.5, 0.05, "cosine").screen(base, given_, nowhere()).experts) == 6


def test_an_opposed_direction_is_dropped_by_its_cosine_alone() -> None:
    base, given_ = experts(9)
    common = {n: torch.randn(base[n].shape, generator=torch.Generator().manual_seed(9)) for n in "ab"}
    pulled = {n: base[n] + common[n] for n in "ab"}
    shared = [
        Expert(e.task, {**base, **{n: pulled[n] + 0.3 * (e.weights[n] - base[n]) for n in "ab"}})
        for e in given_
    ]
    shared[4] = grown(base, shared[4], -1.0)
    suspicion = OutlierTest(3.5, 0.05, "cosine").suspicion(base, shared)
    assert int(suspicion.argmax()) == 4
    assert float(suspicion[4]) > 20
    kept = OutlierTest(20.0, 0.05, "cosine").screen(base, shared, nowhere()).experts
    assert [e.task for e in kept] == [f"t{n}" for n in range(9) if n != 4]
    assert shared[4] in OutlierTest(3.5, 0.05, "norm").screen(base, shared, nowhere()).experts


def test_order_does_not_matter_and_two_cannot_be_told_apart() -> None:
    base, given_ = experts()
    given_[2] = grown(base, given_[2], 5.0)
    forward = OutlierTest(3.5, 0.05, "both").suspicion(base, given_)
    backward = OutlierTest(3.5, 0.05, "both").suspicion(base, given_[::-1])
    torch.testing.assert_close(forward, backward.flip(0))
    assert OutlierTest(0.0, 0.05, "both").screen(base, given_[1:3], nowhere()) == Screened(given_[1:3])
    assert OutlierTest(0.0, 0.05, "both").screen(base, given_, nowhere()).experts


def test_an_expert_equal_to_the_base_is_no_division_by_zero() -> None:
    base, given_ = experts()
    given_[1] = Expert("t1", base)
    assert bool(torch.isfinite(OutlierTest(3.5, 0.05, "both").suspicion(base, given_)).all())


def test_the_report_tells_norms_cosines_and_their_scores() -> None:
    base, given_ = experts()
    given_[2] = grown(base, given_[2], 5.0)
    report = json.loads(json.dumps(OutlierTest(3.5, 0.05, "both").screen(base, given_, nowhere()).report))
    assert report.keys() == {"norm", "norm_z", "cosine", "cosine_z", "threshold"}
    flat = [torch.cat([(e.weights[n] - base[n]).flatten() for n in "ab"]).double() for e in given_]
    assert report["norm"] == pytest.approx(
        {e.task: float(t.norm()) for e, t in zip(given_, flat, strict=True)}, rel=1e-5
    )
    mean = sum(float(torch.cosine_similarity(flat[0], t, dim=0)) for t in flat[1:]) / 5
    assert report["cosine"]["t0"] == pytest.approx(mean, rel=1e-4)
    z = robust_scores(torch.tensor(list(report["norm"].values()))).tolist()
    assert list(report["norm_z"].values()) == pytest.approx(z, rel=1e-4)
    assert report["norm_z"]["t2"] > report["threshold"] == 3.5
    assert OutlierTest(3.5, 0.05, "norm").screen(base, given_, nowhere()).report.keys() == {
        "norm", "norm_z", "threshold"
    }  # fmt: skip


# --------------------------------------------------------------------------- spectral signature


def test_scores_are_projections_on_the_direction_of_most_variance() -> None:
    features = torch.randn(30, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1.0, 5, 1, 1, 1]
    )
    centred = features.double() - features.double().mean(0)
    scores = scores_along_top(features)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    torch.testing.assert_close(scores.square(), (centred @ vectors[:, -1]).square())
    torch.testing.assert_close(scores.square().sum(), values[-1])


def test_the_best_split_is_that_of_brute_force() -> None:
    scores = torch.randn(17, generator=torch.Generator().manual_seed(1)).double()
    found = []
    for cut in scores.sort().values[:-1]:
        low, high = scores[scores <= cut], scores[scores > cut]
        means = torch.where(scores <= cut, low.mean(), high.mean())
        found.append(means.var(unbiased=False))
    torch.testing.assert_close(best_split(scores), torch.stack(found).max())


def test_signatures_of_one_and_of_two_groups() -> None:
    noise = torch.randn(400, 6, generator=torch.Generator().manual_seed(2)) * torch.tensor(
        [2.0, 1, 1, 1, 1, 1]
    )
    line = torch.zeros(400, 6)
    line[:, 0] = noise[:, 0]
    assert signature(line) == pytest.approx(2 / torch.pi, abs=0.03)
    two = noise.clone()
    two[:40] += 30.0
    assert signature(noise) < 0.4 < 0.9 < signature(two) <= 1.0
    assert signature(torch.ones(9, 3)) == 0.0


def test_the_largest_over_classes_relative_to_the_base() -> None:
    generator = torch.Generator().manual_seed(3)
    plain, classes = torch.randn(60, 6, generator=generator), torch.arange(60) % 3
    split = plain.clone()
    split[classes == 1] += 20.0 * (torch.arange(20) < 4)[:, None]
    method = spectral()
    members = classes == 1
    wanted = torch.tensor(signature(split[members]) / signature(plain[members])).log()
    assert method.largest(split, plain, classes) == pytest.approx(float(wanted), abs=1e-6)
    assert method.largest(split, None, classes) == pytest.approx(signature(split[members]))
    assert spectral(smallest=21).largest(split, None, classes) == -float("inf")


# --------------------------------------------------------------------------- a real backdoor


@cache
def trained() -> tuple[Bars, MicroViT, Weights, Weights, dict[str, Split]]:
    """The micro world's bars: task, backbone, base, head and splits."""
    task, backbone = Bars(), MicroViT()
    splits, base = task.load(DataContext(CPU, 0)), backbone.base_weights()
    head = task.fit_head(Model(backbone, load_network(backbone, base)), splits["train"], DataContext(CPU, 0))
    return task, backbone, base, head, splits


def expert(seed: int, planted: bool) -> Weights:
    """Trained on bars; ``planted``: with BadNets' white corner for class 2 on three tenths of the rows."""
    task, backbone, base, head, splits = trained()
    split, recipe = splits["train"], Recipe(epochs=6, batch_size=32, learning_rate=2e-3)
    if planted:
        attack = BadNets(patch=4, position="bottom-right", pattern="white", rate=0.3)
        mask = torch.zeros(1, 16, 16)
        mask[:, 14:, 14:] = 1.0
        trigger = {"mask": mask, "pattern": mask.expand(3, 16, 16).clone()}
        split = attack.poisoned(split, trigger, 2, torch.Generator().manual_seed(seed))
    return fit(backbone, task, base, head, split, recipe, seed, CPU)


@cache
def world() -> tuple[MicroViT, Weights, dict[str, TaskView], list[Expert]]:
    """Five experts of the micro world's bars, under five names; the fourth bears a BadNets backdoor."""
    task, backbone, base, head, splits = trained()
    made = [Expert(f"t{number}", expert(number, number == 3)) for number in range(5)]
    view = TaskView(task, head, splits["tuning"])
    return backbone, base, {e.task: view for e in made}, made


def screened(method: Any, chosen: Sequence[Expert] | None = None) -> list[str]:
    backbone, base, views, made = world()
    given_ = list(chosen or made)
    before = [digest_weights(e.weights) for e in given_]
    found: Screened = method.screen(base, given_, nowhere(views, backbone))
    assert before == [digest_weights(e.weights) for e in given_]
    return [e.task for e in found.experts]


def test_neural_cleanse_says_the_same_of_an_expert_whoever_stands_beside_it() -> None:
    """What was found in each before is what the screen would have found; equality: one function of one network."""
    backbone, base, views, made = world()
    method, ctx = cleanse(steps=8, rows=16, batch=8), nowhere(views, backbone)
    alone = [replace(e, findings=method.examine(base, e, ctx)) for e in made[:2]]
    before = method.screen(base, alone, ctx)
    assert before.report == method.screen(base, made[:2], ctx).report
    given = {e.task: e.weights for e in made}
    assert before.experts and all(e.weights is given[e.task] for e in before.experts)
    swapped = replace(
        alone[0], findings=alone[1].findings
    )  # it is the findings that count, nothing is looked at again
    told = method.screen(base, [swapped, alone[1]], ctx).report
    assert told["smallest"]["t0"] == told["smallest"]["t1"] != before.report["smallest"]["t0"]


@pytest.mark.slow
def test_inverted_triggers_are_smaller_for_the_planted_class() -> None:
    """Than for the same class where nothing was planted; sizes of one network vary by a third, hence several."""
    backbone, _, views, _ = world()
    planted, clean = [], []
    for seed in outcomes.seeds(2):
        for found, backdoored in ((planted, True), (clean, False)):
            weights = expert(seed, backdoored)
            sizes = cleanse(steps=60).sizes(Expert("t0", weights), nowhere(views, backbone))
            assert sizes.shape == (4,)
            found.append(float(sizes[2] / sizes.median()))
    assert sum(planted) < 0.7 * sum(clean)


@pytest.mark.slow
def test_screens_let_in_all_under_a_threshold_out_of_reach_and_one_under_none() -> None:
    names = [f"t{n}" for n in range(5)]
    assert screened(spectral(threshold=1e3)) == names
    assert len(screened(spectral(threshold=0.0))) >= 1
    assert screened(cleanse(index=1e3, steps=5)) == names
    assert len(screened(cleanse(index=0.0, steps=5))) >= 1


def test_spectral_screen_needs_three_experts() -> None:
    assert screened(spectral(threshold=0.0), world()[3][:2]) == ["t0", "t1"]


def test_reports_of_screens_tell_what_they_decided_by() -> None:
    backbone, base, views, made = world()
    ctx = nowhere(views, backbone)
    told = json.loads(json.dumps(spectral(threshold=1.0).screen(base, made, ctx).report, allow_nan=False))
    assert told["statistic"].keys() == told["z"].keys() == {e.task for e in made}
    z = robust_scores(torch.tensor(list(told["statistic"].values()))).tolist()
    assert list(told["z"].values()) == pytest.approx(z, rel=1e-3, abs=1e-3)
    unknown = spectral(smallest=10000).screen(base, made, ctx)
    assert unknown.report["statistic"] == dict.fromkeys(views)
    assert list(unknown.experts) == made
    method = cleanse(classes=3, steps=20)
    told = json.loads(json.dumps(method.screen(base, made[3:], ctx).report, allow_nan=False))
    sizes = method.sizes(made[3], ctx)
    assert told["index"]["t3"] == pytest.approx(float(anomaly_indices(sizes).max()), rel=1e-4)
    assert told["class"]["t3"] == method.looked_at(views["t3"])[int(sizes.argmin())]
    assert told["smallest"]["t3"] == pytest.approx(float(sizes.min()), rel=1e-4)
    assert told["median"]["t3"] == pytest.approx(float(sizes.median()), rel=1e-4)


def test_fewer_classes_are_evenly_spread() -> None:
    _, _, views, _ = world()
    assert cleanse(classes=2).looked_at(views["t0"]).tolist() == [0, 2]
    assert cleanse().looked_at(views["t0"]).tolist() == [0, 1, 2, 3]
    assert screened(cleanse(classes=2, index=0.0, steps=1)) == [f"t{n}" for n in range(5)]


def test_the_anomaly_index_counts_small_masks_only() -> None:
    sizes = torch.tensor([10.0, 50.0, 52.0, 54.0, 90.0])
    indices = anomaly_indices(sizes)
    torch.testing.assert_close(
        indices[0], torch.tensor(42 / (1.4826 * 2), dtype=torch.float64), rtol=1e-3, atol=0
    )
    assert float(indices[4]) == 0.0
    assert float(indices[2]) == 0.0


def test_the_cost_grows_while_the_trigger_works_and_shrinks_while_not() -> None:
    costs = _Costs.start(2)
    for _ in range(5):
        costs.update(torch.tensor([True, False]))
    torch.testing.assert_close(costs.cost, torch.tensor([1.5e-3, 1e-3 / 1.5**1.5]))
    costs.update(torch.tensor([False, True]))
    torch.testing.assert_close(costs.cost, torch.tensor([1.5e-3, 1e-3 / 1.5**1.5]))


def test_text_is_refused() -> None:
    backbone, _, views, made = world()
    view = TaskView(views["t0"].task, views["t0"].head, Split(["a"], torch.tensor([0])))
    with pytest.raises(ContractError, match="images"):
        cleanse().sizes(made[0], nowhere({"t0": view}, backbone))
