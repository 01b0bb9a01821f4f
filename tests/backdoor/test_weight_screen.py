"""Weight-space screen: its statistics and its detector against plain loops, whom it drops, and what it cannot know."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import outcomes
import pytest
import torch
from torch import Tensor

from mergesec.anatomy import Anatomy, Attention, Block, Linear, Mlp
from mergesec.conformance.battery import MICRO, run_here
from mergesec.conformance.micro import Bars, MicroViT
from mergesec.contracts import (
    Backbone,
    ContractError,
    Expert,
    LossFn,
    MergeContext,
    Recipe,
    Split,
    TrainContext,
    Weights,
)
from mergesec.execution.harvest import make_records
from mergesec.execution.scheduler import Outcome
from mergesec.execution.store import Store
from mergesec.execution.work import Bench
from mergesec.planning.catalog import load_catalog
from mergesec.planning.gridspec import parse_grid
from mergesec.planning.plan import Plan, make_plan
from mergesec.planning.resolve import resolve
from mergesec_methods.backdoor.defenses.weight_screen import (
    FURTHEST,
    Detector,
    Population,
    WeightScreen,
    held_out,
    ordered,
    signature,
    statistics,
    told_apart,
)

CPU = torch.device("cpu")
WIDTH, BLOCKS, TASKS = 6, 2, ("a", "b", "c", "d")


def screen(**given: Any) -> WeightScreen:
    plain = {
        "threshold": 0.5,
        "false_alarms": 0.05,
        "level": 0.05,
        "draws": 19,
        "centre": "task",
        "strength": 1.0,
    }
    return WeightScreen(**{"references": 2, **plain, **given})


# --------------------------------------------------------------------------- statistics


def in_loops(change: Tensor) -> list[float]:
    """The five, entry by entry; singular values as roots of the Gram matrix' eigenvalues."""
    rows = change.double().tolist()
    entries = [x for row in rows for x in row]
    gram = [[sum(p * q for p, q in zip(a, b, strict=True)) for b in rows] for a in rows]
    energies = [max(0.0, float(v)) for v in np.linalg.eigvalsh(np.array(gram))]
    total = sum(x * x for x in entries)
    entropy = -sum(e / total * math.log(e / total) for e in energies if e > 0)
    mean = sum(entries) / len(entries)
    second = sum((x - mean) ** 2 for x in entries) / len(entries)
    fourth = sum((x - mean) ** 4 for x in entries) / len(entries)
    return [
        math.log(math.sqrt(max(energies))), math.log(math.sqrt(total)), max(energies) / total, entropy,
        math.log(fourth / second**2),
    ]  # fmt: skip


@pytest.mark.parametrize("shape", [(4, 7), (5, 5), (1, 3)])
def test_the_five_statistics_are_those_of_plain_loops(shape: tuple[int, int]) -> None:
    for seed in outcomes.seeds(3):
        change = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(statistics(change).tolist(), in_loops(change), rtol=1e-9, atol=1e-9)


def test_statistics_of_a_rank_one_update_and_of_none() -> None:
    one = statistics(torch.outer(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0, 0.0])))
    torch.testing.assert_close(one[:4], torch.tensor([math.log(10), math.log(10), 1, 0]).double())
    assert bool(torch.isfinite(statistics(torch.zeros(3, 4))).all())


def anatomy(packed: bool) -> Anatomy:
    def block(number: int) -> Block:
        names = [f"{number}.qkv"] * 3 if packed else [f"{number}.{n}" for n in "qkv"]
        ranges = [(i * WIDTH, (i + 1) * WIDTH) if packed else None for i in range(3)]
        q, k, v = (Linear(n, None, r) for n, r in zip(names, ranges, strict=True))
        attention = Attention(q, k, v, Linear(f"{number}.o", None), 2, WIDTH // 2)
        mlp = Mlp(Linear(f"{number}.up", None), Linear(f"{number}.down", None), WIDTH)
        return Block(number, attention, mlp)

    return Anatomy(tuple(block(n) for n in range(BLOCKS)))


def packed(weights: Weights) -> dict[str, Tensor]:
    found = {n: t for n, t in weights.items() if n[-1] not in "qkv"}
    for number in range(BLOCKS):
        found[f"{number}.qkv"] = torch.cat([weights[f"{number}.{n}"] for n in "qkv"])
    return found


def base_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = [f"{b}.{n}" for b in range(BLOCKS) for n in ("q", "k", "v", "o", "up", "down")]
    return {n: torch.randn(WIDTH, WIDTH, generator=generator) for n in names}


def moved(generator: torch.Generator, size: float, spike: float) -> dict[str, Tensor]:
    """The base with noise of ``size`` added and, on values and outputs, a rank-one update ``spike`` times as large."""
    found = {}
    for name, tensor in base_weights().items():
        change = size * torch.randn(WIDTH, WIDTH, generator=generator)
        if spike and name[-1] in "vo":
            u, v = torch.randn(2, WIDTH, generator=generator)
            change = change + spike * size * torch.outer(u, v)
        found[name] = tensor + change
    return found


def test_a_signature_is_the_mean_over_blocks_and_packed_maps_are_read_as_plain_ones() -> None:
    base, own = base_weights(), moved(torch.Generator().manual_seed(1), 0.1, 0.0)
    found = signature(base, own, anatomy(packed=False))
    wanted = [
        sum(in_loops(own[f"{b}.{n}"].double() - base[f"{b}.{n}"].double())[i] for b in range(BLOCKS)) / BLOCKS
        for n in ("q", "k", "v", "o") for i in range(5)
    ]  # fmt: skip
    torch.testing.assert_close(found.tolist(), wanted, rtol=1e-9, atol=1e-9)
    together = signature(packed(base), packed(own), anatomy(packed=True))
    assert torch.equal(together, found)


def test_a_network_without_attention_is_refused() -> None:
    with pytest.raises(ContractError, match="names no attention"):
        signature({}, {}, Anatomy(()))


# --------------------------------------------------------------------------- the detector


def population(seed: int, shift: float, references: int = 3, tasks: Sequence[str] = TASKS) -> Population:
    """Normal numbers around a task's own centre; the poisoned ones' first two ``shift`` further."""
    generator = torch.Generator().manual_seed(seed)
    values, poisoned, owners, pairs = [], [], [], []
    for number, task in enumerate(tasks):
        centre = 5 * torch.randn(20, generator=generator).double()
        for bad in (False, True):
            for i in range(references):
                row = centre + torch.randn(20, generator=generator).double()
                row[:2] += shift * bad
                values.append(row)
                poisoned.append(bad)
                owners.append(task)
                pairs.append(number * references + i)
    return Population(torch.stack(values), torch.tensor(poisoned), tuple(owners), torch.tensor(pairs))


def by_hand(known: Population, values: Tensor, task: str) -> float:
    """Centred and scaled by loops; the regression minimised by Newton's method on the penalised loss."""
    rows, labels = [], []
    clean = [i for i in range(len(known.tasks)) if not known.poisoned[i]]
    for i, own in enumerate(known.tasks):
        alike = [j for j in clean if known.tasks[j] == own and j != i]
        if alike:
            rows.append(known.values[i] - sum(known.values[j] for j in alike) / len(alike))
            labels.append(float(known.poisoned[i]))
    scale = torch.stack([sum(r[d] ** 2 for r in rows) / len(rows) for d in range(20)]).sqrt()
    x = (torch.stack(rows) / scale).clamp(-FURTHEST, FURTHEST)
    x = torch.cat([x, torch.ones(len(x), 1).double()], dim=1)
    y = torch.tensor(labels).double()
    each = torch.where(y == 1, len(y) / (2 * y.sum()), len(y) / (2 * (1 - y).sum()))
    penalty = torch.eye(21).double()
    penalty[20, 20] = 0.0
    w = torch.zeros(21).double()
    for _ in range(60):
        p = torch.sigmoid(x @ w)
        gradient = x.T @ (each * (p - y)) + penalty @ w
        hessian = (x.T * (each * p * (1 - p))) @ x + penalty
        w = w - torch.linalg.solve(hessian, gradient)
    alike = [j for j in clean if known.tasks[j] == task]
    row = (values - sum(known.values[j] for j in alike) / len(alike)) / scale
    return float(torch.sigmoid(row.clamp(-FURTHEST, FURTHEST) @ w[:20] + w[20]))


def test_the_detector_is_the_penalised_regression_on_relative_statistics() -> None:
    for seed in outcomes.seeds(3):
        known = population(seed, 2.0, references=2)
        detector = Detector(known, "task", 1.0)
        for i in (0, 3, 9):
            wanted = by_hand(known, known.values[i], known.tasks[i])
            assert detector.probability(known.values[i], known.tasks[i]) == pytest.approx(wanted, abs=1e-5)


def test_held_out_references_are_judged_by_a_regression_on_the_other_pairs() -> None:
    known = population(0, 2.0)
    found = held_out(known, "task", 1.0)
    for i in (1, 4, 20):
        rest = known.without(int(known.pairs[i]))
        assert len(rest.tasks) == len(known.tasks) - 2
        assert float(found[i]) == pytest.approx(by_hand(rest, known.values[i], known.tasks[i]), abs=1e-5)


def test_too_few_references_tell_nothing() -> None:
    known = population(0, 50.0, references=2, tasks=("a",))
    found = held_out(known, "task", 1.0)
    assert bool(torch.isnan(found).all())
    assert told_apart(known, found, "task", 1.0, 19, torch.Generator()) == 1.0


def p_value(seed: int, shift: float) -> float:
    known = population(seed, shift, references=2)
    generator = torch.Generator().manual_seed(seed)
    return told_apart(known, held_out(known, "task", 1.0), "task", 1.0, 19, generator)


def test_labels_are_exchanged_within_tasks_alone() -> None:
    known = population(0, 0.0)
    other = known.exchanged(torch.Generator().manual_seed(0))
    assert not torch.equal(other.values, known.values)
    for task in TASKS:
        own = torch.tensor([t == task for t in known.tasks])
        rows = [{tuple(r) for r in k.values[own].tolist()} for k in (known, other)]
        assert rows[0] == rows[1]


def test_the_order_of_held_out_probabilities_is_counted_pair_by_pair() -> None:
    chances = torch.tensor([0.1, 0.5, 0.5, 0.7, 0.2]).double()
    poisoned = torch.tensor([False, False, True, True, True])
    assert ordered(chances, poisoned) == pytest.approx((1 + 0.5 + 1 + 1 + 1 + 0) / 6)


@pytest.mark.slow
def test_references_that_are_alike_are_told_apart_as_rarely_as_the_level_says_and_others_mostly() -> None:
    alike = torch.tensor([p_value(s, 0.0) for s in outcomes.seeds(60)])
    assert outcomes.share(alike <= 0.05).low < 0.05
    assert outcomes.share(alike <= 0.5).high > 0.3  # nor never: that would be no test
    unlike = torch.tensor([p_value(s, 8.0) for s in outcomes.seeds(20)])
    assert outcomes.share(unlike <= 0.05).low > outcomes.share(alike <= 0.05).high


# --------------------------------------------------------------------------- the screen


class Shaped:
    """As much of a backbone as the screen looks at."""

    def anatomy(self) -> Anatomy:
        return anatomy(packed=False)


def world(seed: int, spike: float, references: int = 2) -> tuple[list[Expert], MergeContext]:
    """Contributions of four tasks, of which ``b`` is planted; tasks differ in how far they move the weights."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {t: 0.05 * 2**i for i, t in enumerate(TASKS)}

    def made(task: str, bad: bool) -> Expert:
        return Expert(task, moved(generator, sizes[task], spike * bad))

    siblings = {t: [made(t, False) for _ in range(references)] for t in TASKS}
    planted = {t: [made(t, True) for _ in range(references)] for t in TASKS}
    experts = [made(t, t == "b") for t in TASKS]
    ctx = MergeContext(CPU, seed, cast(Backbone, Shaped()), {}, lambda merged: 0.0, siblings)
    return experts, replace(ctx, references=planted)


@pytest.mark.parametrize("threshold", [0.5, "held_out"])
def test_a_visibly_planted_expert_is_dropped_and_clean_ones_come_in(threshold: float | str) -> None:
    caught, alarms = [], []
    for seed in outcomes.seeds(12):
        experts, ctx = world(seed, spike=2.0)
        found = screen(threshold=threshold).screen(base_weights(), experts, ctx)
        kept = [e.task for e in found.experts]
        assert all(e in experts for e in found.experts)
        caught.append("b" not in kept)
        alarms += [t not in kept for t in "acd"]
    assert outcomes.share(torch.tensor(caught)).low > 0.35
    assert outcomes.share(torch.tensor(alarms)).low < 0.15
    assert sum(caught) / 12 > 0.5 + sum(alarms) / 36


def test_where_the_merger_cannot_tell_his_own_experts_apart_everybody_comes_in() -> None:
    """However unlike the rest a contribution is: no number is made up."""
    told = []
    for seed in outcomes.seeds(12):
        experts, ctx = world(seed, spike=2.0)
        blunt = replace(ctx, references=world(seed + 500, spike=0.0)[1].references)
        found = screen().screen(base_weights(), experts, blunt)
        told.append(found.report["told_apart"])
        if not found.report["told_apart"]:
            assert list(found.experts) == experts
            assert found.report.keys() == {"p", "references", "told_apart"}
    assert outcomes.share(torch.tensor(told)).low < 0.05
    assert not all(told)


def test_missing_references_are_named() -> None:
    experts, ctx = world(0, 1.0)
    with pytest.raises(ContractError, match="task 'a' has 2 clean references, 4 are needed"):
        screen(references=4).screen(base_weights(), experts, ctx)
    with pytest.raises(ContractError, match="task 'a' has 0 poisoned references, 2 are needed"):
        screen().screen(base_weights(), experts, replace(ctx, references={}))


def test_two_contributions_to_one_task_do_not_count_its_references_twice() -> None:
    experts, ctx = world(0, 1.0)
    again = [*experts, Expert("b", experts[1].weights)]
    found = screen().screen(base_weights(), again, ctx)
    assert found.report["references"] == 2 * 2 * len(TASKS)


def test_an_expert_equal_to_the_base_is_no_error_and_the_report_is_plain() -> None:
    experts, ctx = world(0, 1.0)
    plain = screen(level=1.0).screen(base_weights(), [Expert("a", base_weights()), *experts[1:]], ctx)
    report = json.loads(json.dumps(plain.report, allow_nan=False))
    assert set(report["probability"]) == set(TASKS)
    assert report["threshold"] == 0.5


def test_the_held_out_threshold_is_exceeded_by_no_more_clean_references_than_asked() -> None:
    known = population(0, 1.0)
    found = held_out(known, "task", 1.0)
    clean = found[~known.poisoned]
    for rate in (0.0, 0.25, 1.0):
        limit = screen(threshold="held_out", false_alarms=rate).limit(known, found)
        assert float((clean > limit).double().mean()) <= rate
    assert screen(threshold="held_out", false_alarms=0.0).limit(known, found) == float(clean.max())


# --------------------------------------------------------------------------- what the merger knows


def training(seed: int, **given: Any) -> tuple[TrainContext, list[Split]]:
    """A context whose ``fit`` keeps what it is asked to train on."""
    asked: list[Split] = []

    def fit(split: Split | None = None, loss: LossFn | None = None) -> Weights:
        assert split is not None
        assert loss is None
        asked.append(split)
        return {}

    generator = torch.Generator().manual_seed(7)
    rows = Split(
        torch.randint(0, 256, (200, 3, 16, 16), generator=generator).to(torch.uint8), torch.arange(200) % 4
    )
    ctx = TrainContext(CPU, seed, Bars(), MicroViT(), {}, {}, rows, Recipe(), fit)
    return replace(ctx, **given), asked


def planted(seed: int, **given: Any) -> tuple[Split, Split]:
    ctx, asked = training(seed, **given)
    screen().reference(ctx)
    return ctx.train, asked[0]


def test_the_mergers_own_attack_is_drawn_and_looks_at_nobody_elses() -> None:
    chosen = []
    for seed in outcomes.seeds(12):
        before, after = planted(seed)
        rows = (before.targets != after.targets).nonzero().flatten()
        changed = (before.inputs != after.inputs).flatten(1).any(dim=1)
        assert set(rows.tolist()) >= set(changed.nonzero().flatten().tolist())
        assert 0.05 <= len(rows) / len(before) <= 0.31
        (target,) = set(after.targets[rows].tolist())
        places = (before.inputs != after.inputs).any(dim=0).any(dim=0).nonzero()
        chosen.append((target, *places.amin(dim=0).tolist()))
        _, same = planted(seed, target_class=3, trigger={"mask": torch.ones(1, 16, 16)}, target_task="x")
        assert torch.equal(same.inputs, after.inputs)
        assert torch.equal(same.targets, after.targets)
    assert len({c[0] for c in chosen}) > 1
    assert len({c[1:] for c in chosen}) > 4


def plan(attack: Any, adversary: str = "micro/bars", **given: Any) -> Plan:
    axes = {
        "merging": ["simple_average"], "attacks": [attack], "adversary": [adversary],
        "defenses": [{"name": "weight_screen", "references": 2}], **given,
    }  # fmt: skip
    suite = {"backbone": "micro/vit", "tasks": ["micro/bars", "micro/blobs"]}
    recipe = {"epochs": 1, "max_train": 64, "half": "first"}
    raw = {"name": "g", "suite": suite, "threats": ["backdoor"], "axes": axes, "recipe": recipe}
    return make_plan(resolve(parse_grid(raw, "grid g"), load_catalog([MICRO])), lambda task: "")


def references(of: Plan) -> set[str]:
    return {key for key, step in of.steps.items() if step.kind == "reference"}


def test_references_are_trained_once_for_all_attacks_targets_and_adversaries() -> None:
    first = plan("badnets")
    assert len(references(first)) == 2 * 2
    for other in (
        plan("none"),
        plan("blended"),
        plan("badnets", adversary="micro/blobs"),
        plan("badnets", target_class=[1]),
        plan("badnets", adversaries=[2]),
    ):
        assert references(other) == references(first)
    swept = {
        "name": "weight_screen",
        "references": 2,
        "threshold": [0.2, 0.5, "held_out"],
        "strength": [0.1, 1.0],
    }
    assert references(plan("badnets", defenses=[swept])) == references(first)
    assert references(plan("badnets", defenses=[{**swept, "references": 3}])) > references(first)
    for key in references(first):
        step = first.steps[key]
        assert dict(json.loads(step.args)["recipe"])["half"] == "second"
        assert {kind for kind, _ in step.components} == {"task", "backbone", "defense"}


def test_what_references_cost_is_booked_on_the_defense(tmp_path: Path) -> None:
    found = plan("none")
    bench = Bench(Store(tmp_path), load_catalog([MICRO]), CPU)
    run_here(found, bench)
    for step in found.steps.values():
        blob, meta = bench.store.read(step.kind, step.key)
        measured = {"seconds": 1.0, "peak_mb": 2.0, "device": "cpu"}
        bench.store.put(step.kind, step.key, bytes(blob), {**meta["info"], **measured})
    (record,) = make_records(found, bench.store, Outcome())
    assert record.cost["defense"] == {"rows": 2 * 4 * 64.0, "seconds": 1.0 + 8, "peak_mb": 2.0}
    assert isinstance(record.facts["screen"]["report"]["told_apart"], bool)


def test_the_same_weights_give_the_same_answer_bit_for_bit() -> None:
    """Whatever the rest of the cell is: a screen is handed weights, references and a seed of its own."""
    experts, ctx = world(3, 2.0)
    reports = [
        screen(level=1.0).screen(base_weights(), experts, replace(ctx, seed=s)).report for s in (0, 0, 1)
    ]
    assert reports[0] == reports[1]
    assert reports[0]["probability"] == reports[2]["probability"]  # the seed exchanges labels and no more
