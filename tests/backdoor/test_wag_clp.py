"""WAG against plain averaging, CLP against the definition of its threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from mergesec.anatomy import Anatomy, Attention, Block, Linear, Mlp
from mergesec.conformance.battery import MICRO, run_here
from mergesec.contracts import Backbone, ContractError, Expert, MergeContext, Merged
from mergesec.execution.harvest import make_records
from mergesec.execution.scheduler import Outcome
from mergesec.execution.store import Store
from mergesec.execution.work import Bench
from mergesec.planning.catalog import load_catalog
from mergesec.planning.gridspec import parse_grid
from mergesec.planning.plan import make_plan
from mergesec.planning.resolve import resolve
from mergesec.weights import digest_weights
from mergesec_methods.backdoor.defenses.clp import ChannelLipschitzPruning, channel_bounds, outliers
from mergesec_methods.backdoor.defenses.wag import Wag
from mergesec_methods.merging.simple_average import SimpleAverage

WIDTH, HIDDEN = 16, 64


class Described:
    """Stands in for a backbone that only tells its anatomy."""

    def __init__(self, packed: bool) -> None:
        self.packed = packed

    def anatomy(self) -> Anatomy:
        if self.packed:
            query, key, value = (
                Linear("qkv.weight", "qkv.bias", (i * WIDTH, (i + 1) * WIDTH)) for i in range(3)
            )
        else:
            query, key, value = (Linear(f"{n}.weight", f"{n}.bias") for n in "qkv")
        attention = Attention(query, key, value, Linear("o.weight", "o.bias"), 4, 4)
        mlp = Mlp(Linear("up.weight", "up.bias"), Linear("down.weight", None), HIDDEN)
        return Anatomy((Block(0, attention, mlp),))


class Held:
    """Stands in for a network: only its tensors are looked at."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = dict(tensors)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.tensors


def weights(packed: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    sizes = {"qkv": (3 * WIDTH, WIDTH)} if packed else dict.fromkeys("qkv", (WIDTH, WIDTH))
    sizes |= {"o": (WIDTH, WIDTH), "up": (HIDDEN, WIDTH), "down": (WIDTH, HIDDEN)}
    made = {f"{n}.weight": torch.randn(*s, generator=generator) for n, s in sizes.items()}
    made |= {f"{n}.bias": torch.randn(s[0], generator=generator) for n, s in sizes.items() if n != "down"}
    return made


def context(packed: bool = False, siblings: Mapping[str, Sequence[Expert]] | None = None) -> MergeContext:
    backbone = cast(Backbone, Described(packed))
    return MergeContext(torch.device("cpu"), 0, backbone, {}, lambda merged: 0.0, siblings or {})


def shifted(amount: float) -> dict[str, torch.Tensor]:
    return {name: tensor + amount for name, tensor in weights().items()}


# --------------------------------------------------------------------------- WAG


def test_wag_averages_with_siblings_of_the_same_task_first() -> None:
    base = weights()
    experts = [Expert("a", shifted(1.0)), Expert("b", shifted(2.0))]
    siblings = {
        "a": [Expert("a", shifted(3.0)), Expert("a", shifted(100.0))],
        "b": [Expert("b", shifted(6.0))],
    }
    before = [digest_weights(e.weights) for e in experts]
    merged = Wag(1).merge(base, experts, SimpleAverage(), context(siblings=siblings))
    for name, tensor in merged.shared.items():
        torch.testing.assert_close(tensor, base[name] + ((1 + 3) / 2 + (2 + 6) / 2) / 2)
    assert before == [digest_weights(e.weights) for e in experts]
    assert merged.info["wag_models"] == 1


def test_wag_hands_every_expert_to_the_given_method() -> None:
    seen: list[Sequence[Expert]] = []

    class Spy(SimpleAverage):
        def merge(self, base: Any, experts: Sequence[Expert], ctx: MergeContext) -> Merged:
            seen.append(experts)
            return super().merge(base, experts, ctx)

    siblings = {t: [Expert(t, shifted(0.0)), Expert(t, shifted(0.0))] for t in "ab"}
    Wag(2).merge(weights(), [Expert(t, shifted(3.0)) for t in "ab"], Spy(), context(siblings=siblings))
    assert [e.task for e in seen[0]] == ["a", "b"]
    torch.testing.assert_close(dict(seen[0][0].weights), shifted(1.0))


def test_wag_without_enough_siblings_says_so() -> None:
    with pytest.raises(ContractError, match="'a' has 1 further experts, 2 are needed"):
        Wag(2).merge(
            weights(), [Expert("a", shifted(1.0))], SimpleAverage(),
            context(siblings={"a": [Expert("a", shifted(1.0))]}),
        )  # fmt: skip


# --------------------------------------------------------------------------- CLP


def test_bounds_are_the_largest_gain_of_a_channel() -> None:
    rows = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    bounds = channel_bounds(rows)
    for row, bound in zip(rows, bounds, strict=True):
        spectral = torch.linalg.svdvals(row[None].double()).max()
        torch.testing.assert_close(bound, spectral)
        worst = row / row.norm()
        torch.testing.assert_close((row @ worst).double(), bound, rtol=1e-5, atol=1e-5)


def test_outliers_follow_the_threshold() -> None:
    bounds = torch.tensor([1.0] * 20 + [10.0], dtype=torch.float64)
    threshold = (float(bounds[-1]) - float(bounds.mean())) / float(bounds.std())
    assert int(outliers(bounds, threshold - 1e-6).sum()) == 1
    assert int(outliers(bounds, threshold + 1e-6).sum()) == 0
    assert int(outliers(torch.tensor([5.0]), 0.0).sum()) == 0


@pytest.mark.parametrize("packed", [False, True])
def test_clp_zeroes_the_channel_that_sticks_out_and_nothing_else(packed: bool) -> None:
    base = weights(packed)
    grown = {n: t.clone() for n, t in base.items()}
    value, offset = ("qkv", 2 * WIDTH) if packed else ("v", 0)
    grown["up.weight"][17] *= 20
    grown[f"{value}.weight"][offset + 5] *= 20
    before = digest_weights(grown)
    repaired = ChannelLipschitzPruning(3.0, "inner").repair(Merged(grown), base, context(packed))
    wanted = {n: t.clone() for n, t in grown.items()}
    for name, row in (("up", 17), (value, offset + 5)):
        wanted[f"{name}.weight"][row] = 0
        wanted[f"{name}.bias"][row] = 0
    assert digest_weights(grown) == before
    assert digest_weights(repaired.shared) == digest_weights(wanted)
    assert repaired.info["clp_pruned"] == {"0/value": 1, "0/up": 1}


def test_clp_residual_writers_only_on_request() -> None:
    grown = weights()
    grown["down.weight"][3] *= 20
    grown["o.weight"][4] *= 20
    inner = ChannelLipschitzPruning(3.0, "inner").repair(Merged(grown), grown, context())
    assert digest_weights(inner.shared) == digest_weights(grown)
    every = ChannelLipschitzPruning(3.0, "all").repair(Merged(grown), grown, context())
    assert (every.shared["down.weight"][3] == 0).all()
    assert (every.shared["o.weight"][4] == 0).all()
    assert every.info["clp_pruned"] == {"0/output": 1, "0/down": 1}


def test_clp_repairs_each_tasks_own_network() -> None:
    """Task a overrides the up projection; its bounds are its own, and the shared outlier is not in it."""
    shared, own = weights(), weights()["up.weight"].clone()
    shared["up.weight"][17] *= 20
    own[40] *= 20
    repaired = ChannelLipschitzPruning(3.0, "inner").repair(
        Merged(shared, {"a": {"up.weight": own}}), shared, context()
    )
    served = {**repaired.shared, **repaired.per_task["a"]}
    direct = ChannelLipschitzPruning(3.0, "inner").repair(
        Merged({**shared, "up.weight": own}), shared, context()
    )
    assert digest_weights(served) == digest_weights(direct.shared)
    assert (repaired.shared["up.weight"][17] == 0).all()
    assert not (served["up.weight"][17] == 0).any()


def test_clp_prunes_what_a_mask_method_serves() -> None:
    """Task a is served shared + extra["grow"]; pruning the shared weights alone would miss its own outlier."""
    shared = weights()
    shared["up.weight"][17] *= 20
    grow = torch.zeros_like(shared["up.weight"])
    grow[40] = 20 * shared["up.weight"][40]

    def networks(merged: Merged, task: str) -> Any:
        own = merged.per_task.get(task, {})
        summed = {**merged.shared, "up.weight": merged.shared["up.weight"] + merged.extra["grow"]}
        return Held({**summed, **own})

    ctx = replace(context(), networks=networks, views={"a": cast(Any, None)})
    merged = Merged(shared, {}, {"grow": grow})
    repaired = ChannelLipschitzPruning(3.0, "inner").repair(merged, shared, ctx)
    direct, _ = ChannelLipschitzPruning(3.0, "inner")._prune(networks(merged, "a").state_dict(), context())
    assert digest_weights(networks(repaired, "a").state_dict()) == digest_weights(direct)
    assert (direct["up.weight"][40] == 0).all()
    assert set(repaired.per_task["a"]) == {"up.weight", "up.bias"}
    assert (repaired.shared["up.weight"][17] == 0).all()


def test_clp_refuses_a_router() -> None:
    ctx = replace(
        context(), networks=lambda merged, task: Held({"gate": torch.ones(1)}), views={"a": cast(Any, None)}
    )
    with pytest.raises(ContractError, match="topology"):
        ChannelLipschitzPruning(3.0, "inner").repair(Merged(weights(), {}, {"gate": torch.ones(1)}), {}, ctx)


def test_alone_the_siblings_leave_no_contributed_weight() -> None:
    base, own = weights(), {n: t + 1e6 for n, t in weights().items()}
    further = [Expert("a", {n: t + k for n, t in base.items()}) for k in (1.0, 3.0)]
    ctx = context(siblings={"a": further})
    merged = Wag(2, alone=True).merge(base, [Expert("a", own)], SimpleAverage(), ctx).shared
    for name, tensor in base.items():
        torch.testing.assert_close(merged[name], tensor + 2.0)


def test_what_siblings_cost_is_booked_on_the_defense(tmp_path: Path) -> None:
    """Their training rows and seconds: an average alone takes neither."""
    catalog, tasks = load_catalog([MICRO]), ["micro/bars", "micro/blobs"]
    raw = {
        "name": "g", "suite": {"backbone": "micro/vit", "tasks": tasks}, "threats": ["backdoor"],
        "axes": {
            "merging": ["simple_average"], "attacks": ["none"], "adversary": tasks[:1],
            "defenses": [{"name": "wag", "models": [1, 2]}, "clp"],
        },
        "recipe": {"epochs": 1, "max_train": 64},
    }  # fmt: skip
    plan = make_plan(resolve(parse_grid(raw, "grid g"), catalog), lambda task: "")
    bench = Bench(Store(tmp_path), catalog, torch.device("cpu"))
    run_here(plan, bench)
    for step in plan.steps.values():
        blob, meta = bench.store.read(step.kind, step.key)
        measured = {"seconds": 1.0, "peak_mb": 2.0, "device": "cpu"}
        bench.store.put(step.kind, step.key, bytes(blob), {**meta["info"], **measured})
    cost = {r.defense: r.cost["defense"] for r in make_records(plan, bench.store, Outcome())}
    assert cost["wag"] == {"rows": 2 * 64.0, "seconds": 1.0 + 2, "peak_mb": 2.0}
    assert cost["wag(models=2)"] == {"rows": 4 * 64.0, "seconds": 1.0 + 4, "peak_mb": 2.0}
    assert cost["clp"] == {"rows": 0.0, "seconds": 1.0, "peak_mb": 2.0}
