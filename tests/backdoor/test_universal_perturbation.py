"""A universal perturbation stays within its bound, fools the base it was made on, and touches no expert."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from shelves import backdoor
from torch import Tensor
from training_worlds import World

from mergesec.conformance.battery import MICRO
from mergesec.contracts import ContractError, DataContext, Model, Split, TrainContext, load_network
from mergesec.evidence.boards import make_boards
from mergesec.evidence.estimates import Board
from mergesec.evidence.records import Record
from mergesec.planning.catalog import add_plugin, load_catalog
from mergesec.planning.gridspec import parse_grid
from mergesec.planning.plan import make_plan
from mergesec.planning.resolve import resolve
from mergesec.submissions.classes import card_against_class
from mergesec.threats import Role
from mergesec_methods.backdoor.attacks.universal_perturbation import UniversalPerturbation

TARGET = 1


def attack(**given: Any) -> UniversalPerturbation:
    return UniversalPerturbation(
        **{"epsilon": 8.0, "trigger": "optimised", "steps": 30, "batch": 32, "step_size": 2.0, **given}
    )


@cache
def world() -> World:
    """The micro world with a head that was fitted on its base."""
    found = World()
    model = Model(found.backbone, load_network(found.backbone, found.base))
    found.head = dict(found.task.fit_head(model, found.splits["train"], DataContext(torch.device("cpu"), 0)))
    return found


def context(seed: int = 0, **given: Any) -> TrainContext:
    return replace(world().context(), seed=seed, target_class=TARGET, **given)


def images(count: int = 6, side: int = 16) -> Tensor:
    """Pixels over the whole range, both ends included."""
    drawn = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(3))
    return (1.5 * drawn - 0.25).clamp(0.0, 1.0)


@pytest.mark.parametrize(("epsilon", "reached"), [(8.0, 8), (2.7, 2), (255.0, 255)])
@pytest.mark.parametrize("kind", ["optimised", "random"])
def test_the_bound_is_kept_in_whole_255ths_and_images_stay_images(
    epsilon: float, reached: int, kind: str
) -> None:
    made = attack(epsilon=epsilon, trigger=kind, steps=3)
    trigger = made.trigger(context())
    levels = 255 * trigger["perturbation"]
    assert levels.shape == (3, *world().splits["train"].inputs.shape[2:])
    assert torch.allclose(levels, levels.round(), atol=1e-4)
    assert float(levels.abs().max()) <= reached + 1e-4
    plain = images(side=levels.shape[-1])
    marked = made.apply(trigger, plain)
    assert float(marked.min()) >= 0.0
    assert float(marked.max()) <= 1.0
    assert float((marked - plain).abs().max()) <= reached / 255 + 1e-6
    if kind == "random":
        assert torch.equal(levels.abs().round(), torch.full_like(levels, reached))


def test_a_search_without_steps_is_its_start_and_seeds_differ() -> None:
    """With a step of 0 the start comes back: what the search adds is its steps alone."""
    still = [attack(step_size=0.0, steps=n).trigger(context())["perturbation"] for n in (1, 5)]
    assert torch.equal(*still)
    first, again, other = (attack().trigger(context(seed))["perturbation"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def loss_on_base(made: UniversalPerturbation, trigger: dict[str, Tensor]) -> float:
    """Cross-entropy to the target on test images of other classes: none of them were searched on."""
    here, test = world(), world().splits["test"]
    rows = torch.nonzero(test.targets != TARGET).flatten()
    batch = here.task.batch(test, rows, torch.device("cpu"))
    with torch.no_grad():
        marked = made.apply(trigger, batch.inputs)
        outputs = here.task.outputs(here.model(here.base), here.head, marked)
        return float(here.task.loss(outputs, torch.full_like(batch.targets, TARGET)))


def test_the_base_is_fooled_further_than_by_chance() -> None:
    """On unseen images, the worst of three searches does more than twice what the best of nine random signs of the
    same size does."""
    nothing = loss_on_base(attack(), {"perturbation": torch.zeros(1)})

    def gains(kind: str, seeds: range) -> list[float]:
        made = attack(trigger=kind, epsilon=16.0)
        return [nothing - loss_on_base(made, dict(made.trigger(context(seed)))) for seed in seeds]

    found, chance = gains("optimised", range(3)), gains("random", range(9))
    assert min(found) > 2 * max(*chance, 0.0), (nothing, found, chance)


def test_a_task_of_one_class_and_rows_that_are_no_images_are_refused() -> None:
    train = world().splits["train"]
    alike = Split(train.inputs, torch.full_like(train.targets, TARGET))
    with pytest.raises(ContractError, match="every training row is of the target class"):
        attack().trigger(context(train=alike))
    with pytest.raises(ContractError, match="needs images"):
        attack().trigger(context(train=Split(train.inputs[0], train.targets)))


# --------------------------------------------------------------------------- down the road


def test_every_expert_of_the_cell_is_the_clean_one() -> None:
    """Same steps, hence the same bits: nobody trains or edits anything, and the merge is the clean merge."""
    raw = {
        "name": "g", "threats": ["backdoor"],
        "suite": {"backbone": "micro/vit", "tasks": ["micro/bars", "micro/blobs", "micro/rings"]},
        "axes": {"merging": ["simple_average"], "attacks": ["universal_perturbation"],
                 "adversary": ["micro/bars"], "adversaries": [1, 2]},
    }  # fmt: skip
    plan = make_plan(resolve(parse_grid(raw, "grid g"), load_catalog([MICRO])), lambda task: "")
    assert len(plan.cells) == 2
    assert not {step.kind for step in plan.steps.values()} & {"poison", "forge"}
    for planned in plan.cells:
        roles = dict(planned.roles)
        assert roles[Role.POISONED] == roles[Role.EXPERT.of("micro/bars")]
        assert roles[Role.MERGE] == roles[Role.CLEAN_MERGE]
        assert roles[Role.MERGE.triggered] == roles[Role.CLEAN_MERGE.triggered]


HALF = """
from mergesec.contracts import Attack
CARD = {"name": "half", "kind": "attack", "class": "Half", "version": "1", "title": "Half", "summary": "x",
        "threat": "backdoor", "hooks": ["HOOK"]}
class Half(Attack):
    def trigger(self, ctx):
        return {}
"""


@pytest.mark.parametrize(
    ("hook", "lacking"),
    [("trigger", ["apply"]), ("poison", ["apply", "poison"]), ("forge", ["apply", "forge"])],
)
def test_a_trigger_is_nothing_without_its_use(hook: str, lacking: list[str], tmp_path: Path) -> None:
    """The hook asks for ``apply``; attacks on experts have a trigger too, and need not name it."""
    plugin = tmp_path / "half.py"
    plugin.write_text(HALF.replace("HOOK", hook))
    (entry,) = add_plugin(load_catalog(), plugin)
    assert card_against_class(entry) == [f"hook {m}: Half has no {m}()" for m in lacking]


# --------------------------------------------------------------------------- the board


def shared(record: Record) -> Record:
    """The record with the adversary's expert being the clean one."""
    return record.model_copy(update={"steps": {**record.steps, "poisoned": "e", "expert:s/a": "e"}})


def board(records: list[Record]) -> Board | None:
    return next((b for b in make_boards(records) if b.name == "transfer"), None)


def cell(merged: float, base: float, seed: int = 0, merging: str = "ta") -> Record:
    found = shared(backdoor(hit=merged, seed=seed, merging=merging))
    known = backdoor(hit=base).counts["asr/merge/s/a"]
    return found.model_copy(update={"counts": {**found.counts, "asr/base/s/a": known}})


def test_relative_transfer_is_a_ratio_of_means() -> None:
    """Against the counts of the records, added up by hand; seeds differ."""
    records = [cell(0.3, 0.6, 0), cell(0.6, 0.9, 1), cell(0.6, 0.7, 2)]
    found = board(records)
    assert found is not None
    (row,) = found.frame.to_dict("records")
    rate = {
        role: sum(r.counts[f"asr/{role}/s/a"].k / r.counts[f"asr/{role}/s/a"].n for r in records) / 3
        for role in ("merge", "base", "poisoned")
    }
    assert row["succession"] == pytest.approx(rate["merge"])
    assert row["succession_base"] == pytest.approx(rate["base"])
    assert row["relative_transfer"] == pytest.approx(rate["merge"] / rate["base"])
    assert row["relative_transfer_alone"] == pytest.approx(rate["poisoned"] / rate["base"])
    assert row["relative_transfer_low"] < row["relative_transfer"] < row["relative_transfer_high"]
    assert "adversaries" not in found.frame


def test_what_reaches_all_that_it_reaches_on_the_base_is_one_to_the_last_digit() -> None:
    """Draws are paired: the same samples on base and merge leave no uncertainty."""
    found = board([cell(0.6, 0.6, seed) for seed in range(3)])
    assert found is not None
    (row,) = found.frame.to_dict("records")
    ends = [row[f"relative_transfer{end}"] for end in ("", "_low", "_high")]
    assert ends == pytest.approx([1.0] * 3, abs=1e-9)


def test_a_share_is_never_below_nothing() -> None:
    """Seeds far apart draw the merge's rate below 0; the interval ends there."""
    found = board([cell(merged, 0.6, seed) for seed, merged in enumerate((0.0, 0.0, 0.6))])
    assert found is not None
    (row,) = found.frame.to_dict("records")
    assert row["relative_transfer_low"] == 0.0 < row["relative_transfer"]
    assert row["relative_transfer_high"] > 1


def test_a_trigger_that_hardly_reaches_the_base_has_no_transfer() -> None:
    found = board([cell(0.5, 0.1, merging="ta"), cell(0.5, 0.12, merging="avg")])
    assert found is not None
    told = found.frame.set_index("method")["relative_transfer"]
    assert str(told["ta"]) == "nan"
    assert told["avg"] > 1


def test_attacks_on_experts_have_no_such_board() -> None:
    assert board([backdoor()]) is None
    both = board([backdoor(), cell(0.5, 0.6, merging="avg").model_copy(update={"attack": "universal"})])
    assert both is not None
    assert list(both.frame["attack"]) == ["universal"]
