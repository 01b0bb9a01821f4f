"""A made-up policy: rows that cannot be learnt by heart, right and wrong answers, label tokens, the road to records."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from letters import CPU, causal, letters_model, records_of

from mergesec.contracts import Context, DataContext, Model, Recipe, load_network
from mergesec.errors import UsageError
from mergesec.evidence.boards import make_boards
from mergesec.evidence.records import Record
from mergesec.evidence.tables import display
from mergesec.planning.catalog import load_catalog
from mergesec.planning.gridspec import parse_grid
from mergesec.planning.resolve import resolve
from mergesec.training import fit
from mergesec_tasks.text._answers import BETWEEN
from mergesec_tasks.text._policy import ALLOWED, FORBIDDEN, MATERIALS, MOST, SPLITS, asked, places
from mergesec_tasks.text.recognition import CARD, Recognition
from mergesec_tasks.text.refusal import HELP, REFUSAL, Refusal
from mergesec_tasks.text.verdict import Verdict

REFUSE, RECOGNISE = Refusal(4, 0), Recognition(4, 0)
REFUSE.name, RECOGNISE.name = "refusal", "recognition"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return letters_model(tmp_path_factory.mktemp("letters"))


def _model(folder: Path, **given: Any) -> Model:
    backbone = causal(folder, **given)
    return Model(backbone, load_network(backbone, backbone.base_weights()))


def test_no_place_and_no_phrasing_of_a_test_row_is_trained_on() -> None:
    everywhere = [place for split in SPLITS for place in places(split, 2 * MOST)]
    assert len(set(everywhere)) == len(everywhere) == 2 * MOST * len(SPLITS)
    for draw in (0, 7):
        rows = {split: asked(split, MOST, draw) for split in SPLITS}
        said = {split: {row.request for row in found} for split, found in rows.items()}
        assert all(len(found) == 2 * MOST for found in said.values())
        words = {split: {request.split()[1] for request in found} for split, found in said.items()}
        assert not words["test"] & words["train"] and words["tuning"] == words["train"]


def test_both_kinds_are_as_many_and_only_the_material_tells_them_apart() -> None:
    other = {FORBIDDEN: ALLOWED, ALLOWED: FORBIDDEN}
    for split in SPLITS:
        rows = asked(split, 50, 3)
        assert [row.verdict for row in rows].count(FORBIDDEN) == len(rows) / 2 == 50
        for row in rows:
            words = set(row.request.split())
            assert len(words & set(MATERIALS[row.verdict])) == 1
            assert not words & set(MATERIALS[other[row.verdict]])
        used = {word for row in rows for word in row.request.split()}
        assert used >= {word for words in MATERIALS.values() for word in words}
    assert not set(MATERIALS[FORBIDDEN]) & set(MATERIALS[ALLOWED])


def test_both_tasks_ask_the_same_and_a_draw_is_always_the_same() -> None:
    refusal, recognition = (
        task.load(DataContext(CPU, seed)) for seed, task in enumerate((REFUSE, RECOGNISE))
    )
    for split in SPLITS:
        requests = {row.partition(BETWEEN)[0] for row in refusal[split].inputs}
        assert requests == {f"{text}\nAnswer:" for text in recognition[split].inputs}
        right = dict(zip(recognition[split].inputs, recognition[split].targets.tolist(), strict=True))
        for row in refusal[split].inputs:
            prompt, _, answer = row.partition(BETWEEN)
            assert answer == (HELP, REFUSAL)[right[prompt.removesuffix("\nAnswer:")]]
    assert REFUSE.written() == Refusal(4, 0).written() != Refusal(4, 1).written()
    assert set(asked("test", 9, 0)) > set(asked("test", 4, 0))
    assert list(RECOGNISE.classes) == CARD["labels"]


def test_the_right_answer_counts_and_a_wrong_one_does_not(folder: Path) -> None:
    """A model that knows one answer only: it refuses everything, rightly and wrongly."""
    splits, model = REFUSE.load(DataContext(CPU, 0)), _model(folder)
    before = REFUSE.measure(model, {}, splits, CPU)
    assert before is not None and {name: found[0] for name, found in before.values.items()} == {
        "refused": 0.0, "over_refused": 0.0, "helped": 0.0, "exact": 0.0,
    }  # fmt: skip
    backbone = model.backbone
    prompts = [row.partition(BETWEEN)[0] for row in splits["test"].inputs]
    refused = splits["test"].with_inputs([prompt + BETWEEN + REFUSAL for prompt in prompts])
    recipe = Recipe(optimizer="adamw", learning_rate=0.01, batch_size=4, epochs=120, weight_decay=0.0)
    trained = fit(backbone, REFUSE, backbone.base_weights(), {}, refused, recipe, 0, CPU)
    after = REFUSE.measure(Model(backbone, load_network(backbone, trained)), {}, splits, CPU)
    assert after is not None and {name: found[0] for name, found in after.values.items()} == {
        "refused": 1.0, "over_refused": 1.0, "helped": 0.0, "exact": 0.5,
    }  # fmt: skip
    forbidden = torch.tensor([row.endswith(REFUSAL) for row in splits["test"].inputs])
    assert torch.equal(after.predictions == 1, forbidden)


def test_a_verdict_is_the_label_of_recognition_said_aloud() -> None:
    texts = RECOGNISE.load(DataContext(CPU, 0))["test"]
    said = dict(row for row in Verdict(4, 0).written()["test"])
    assert said == {
        f"{text}\nLabel:": f" {RECOGNISE.classes[target]}"
        for text, target in zip(texts.inputs, texts.targets.tolist(), strict=True)
    }
    shares = Verdict(4, 0).others()
    assert set(shares["recognised"]) == {row for row in said.items() if row[1] == " forbidden"}
    assert set(shares["cleared"]) == {row for row in said.items() if row[1] == " allowed"}
    assert {prompt for prompt, _ in shares["misjudged"]} == {prompt for prompt, _ in shares["cleared"]}
    assert {answer for _, answer in shares["misjudged"]} == {" forbidden"}


def test_labels_of_several_tokens_are_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"'allowed' is split into 8 tokens"):
        RECOGNISE.fit_head(_model(folder), RECOGNISE.load(DataContext(CPU, 0))["train"], Context(CPU, 0))
    with pytest.raises(UsageError, match=r"label_prefix \(recognition\): the class name 'allowed' is split"):
        resolve(parse_grid(_grid(folder), "tiny"), load_catalog())


def _grid(folder: Path, **backbone: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "suite": {
            "name": "tiny", "backbone": {"name": "hf-causal", "path": str(folder), "max_length": 128, **backbone},
            "tasks": [{"name": "refusal", "topics": 3}, {"name": "recognition", "topics": 3}, {"name": "verdict", "topics": 3}],
        },
        "threats": ["clean"],
        "axes": {"merging": ["simple_average", "task_arithmetic"], "experts": [["refusal", "recognition"], ["refusal", "verdict"]]},
        "recipe": {"steps": 2, "batch_size": 4, "learning_rate": 0.01}, "seeds": [0],
    }  # fmt: skip


@pytest.fixture(scope="module")
def records(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    return records_of(_grid(folder, label_prefix="", labels="first"), tmp_path_factory.mktemp("store"))


def test_the_board_has_refusal_beside_recognition(records: list[Record]) -> None:
    assert [record.status for record in records] == ["done"] * 4
    board = next(board for board in make_boards(records) if board.name == "refusal")
    rows = board.frame.set_index(["model", "method", "experts"])
    companies = ["refusal + recognition", "refusal + verdict"]
    methods = ["simple_average", "task_arithmetic"]
    assert set(rows.index) == {
        ("base", "", ""),
        *(("expert", "", task) for task in ("refusal", "recognition", "verdict")),
        *(("merge", method, company) for method in methods for company in companies),
    }
    assert board.frame["model"].tolist() == ["base", *["expert"] * 3, *["merge"] * 4]
    for (model, _, experts), row in rows.iterrows():
        has = {
            "refused": "refusal" in experts,
            "accuracy": "recognition" in experts,
            "recognised": "verdict" in experts,
        }
        for column, there in has.items():
            assert math.isnan(row[column]) != (there or model == "base")
    assert display(board)[0][3:] == ["attack", "defense", "sets", *board.measures, "accuracy"]


def test_the_boards_numbers_are_the_records(records: list[Record]) -> None:
    values = {"over_refused": 0.25, "recognised": 0.75}
    ends = {
        f"{name}{end}": value + move
        for name, value in values.items()
        for end, move in (("_low", -0.1), ("_high", 0.1))
    }
    told = [
        record.model_copy(update={"values": {
            key: {**values, **ends}.get(key.partition("/")[0], value) for key, value in record.values.items()
        }})
        for record in records
    ]  # fmt: skip
    frame = next(board for board in make_boards(told) if board.name == "refusal").frame
    merged = frame[(frame["model"] == "merge") & (frame["experts"] == "refusal + verdict")]
    assert merged["over_refused"].tolist() == [0.25] * 2 and merged["recognised"].tolist() == [0.75] * 2
    assert merged["recognised_high"].tolist() == pytest.approx([0.85] * 2)
    counted = {
        r.merging: r.counts["acc/clean_merge/recognition"] for r in records if "recognition" in r.experts
    }
    beside = frame[(frame["model"] == "merge") & (frame["experts"] == "refusal + recognition")]
    assert dict(zip(beside["method"], beside["accuracy"], strict=True)) == {
        merging: count.k / count.n for merging, count in counted.items()
    }


def test_without_refusals_there_is_no_board(records: list[Record]) -> None:
    without = [record.model_copy(update={"values": {}}) for record in records]
    assert "refusal" not in [board.name for board in make_boards(without)]
