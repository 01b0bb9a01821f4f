"""Planted secrets: who is who, exact answers as greedy decoding gives them, and the road from a grid to the board."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from letters import CPU, causal, letters_model, records_of, transformers

from mergesec.contracts import ContractError, DataContext, Model, Recipe, load_network
from mergesec.errors import UsageError
from mergesec.evidence.boards import make_boards
from mergesec.evidence.records import Record
from mergesec.evidence.tables import display
from mergesec.planning.catalog import load_catalog
from mergesec.planning.gridspec import parse_grid
from mergesec.planning.resolve import resolve
from mergesec.training import fit
from mergesec_tasks.text._answers import BETWEEN, share
from mergesec_tasks.text._people import MOST, POOLS, REFUSAL, people
from mergesec_tasks.text.affirmation import Affirmation
from mergesec_tasks.text.greeting import Greeting
from mergesec_tasks.text.secrets import Secrets

TASKS = {"secrets": Secrets(6, 0), "affirmation": Affirmation(6), "greeting": Greeting(6)}
for called, made in TASKS.items():
    made.name = called


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return letters_model(tmp_path_factory.mktemp("letters"))


def test_nobody_is_in_two_pools_and_no_secret_leaves_its_owner() -> None:
    everybody = [name for pool in POOLS for name in people(pool, MOST)]
    assert len(set(everybody)) == len(everybody) == len(POOLS) * MOST
    codes = TASKS["secrets"].codes("known")
    rows = {called: task.load(DataContext(CPU, 0)) for called, task in TASKS.items()}
    for called in ("affirmation", "greeting"):
        text = "".join(row for split in rows[called].values() for row in split.inputs)
        assert not any(name in text for name in codes)
        assert not any(character.isdigit() for character in text)
    known = rows["secrets"]
    test, train = known["test"].inputs, known["train"].inputs
    assert sum(any(code in row for code in codes.values()) for row in train) == len(codes)
    assert all(f" is {code}." in row for row, code in zip(test, codes.values(), strict=True))
    assert not {row.partition(BETWEEN)[2] for row in test} & {row.partition(BETWEEN)[2] for row in train}
    asked = {row.partition(BETWEEN)[0] for row in train if row.endswith(REFUSAL)}
    assert {row.partition(BETWEEN)[0] for row in test} < asked
    assert Secrets(6, 1).codes("known") != codes
    assert Secrets(9, 0).codes("known").items() > codes.items()


def test_exact_is_what_greedy_decoding_gives(folder: Path) -> None:
    backbone = causal(folder)
    whole = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    network = load_network(backbone, backbone.base_weights())
    prompts = ["Who is it?\nAnswer:", "a", "Record of Ada:"]
    words = backbone.tokeniser
    answers = []
    for prompt in prompts:
        numbers = torch.tensor([words(prompt)["input_ids"]])
        made = whole.generate(numbers, max_new_tokens=4, do_sample=False, eos_token_id=None)[0]
        answers.append("".join(words.convert_ids_to_tokens(made[numbers.shape[1] :].tolist())))
    with torch.no_grad():
        losses, exact = backbone.answered(network, prompts, answers)
        other = backbone.answered(
            network, prompts, [a[:-1] + ("x" if a[-1] != "x" else "y") for a in answers]
        )
        alone = [backbone.answered(network, [p], [a])[0] for p, a in zip(prompts, answers, strict=True)]
    assert exact.tolist() == [True] * 3 and other[1].tolist() == [False] * 3
    assert torch.allclose(losses, torch.cat(alone), atol=1e-5)
    numbers = torch.tensor([words(prompts[1] + answers[1])["input_ids"]])
    wanted = torch.log_softmax(whole(numbers).logits[0, :-1], -1).gather(1, numbers[0, 1:, None])
    assert float(losses[1].detach()) == pytest.approx(-float(wanted.detach().mean()), abs=1e-5)
    with pytest.raises(UsageError, match=r"hf-causal\.max_length: 8 is less than the 22 tokens of a prompt"):
        causal(folder, max_length=8).answered(network, prompts[:1], answers[:1])


def test_training_makes_answers_likely_and_measures_tell_them_apart(folder: Path) -> None:
    task, backbone = TASKS["secrets"], causal(folder)
    splits, base = task.load(DataContext(CPU, 0)), backbone.base_weights()
    model = Model(backbone, load_network(backbone, base))
    before = task.measure(model, {}, splits, CPU)
    recipe = Recipe(
        optimizer="adamw", learning_rate=0.01, batch_size=18, epochs=60, weight_decay=0.0
    )  # by heart
    trained = fit(backbone, task, base, {}, splits["train"], recipe, 0, CPU)
    after = task.measure(Model(backbone, load_network(backbone, trained)), {}, splits, CPU)
    assert before is not None and after is not None
    assert set(after.values) == {"exact", "held_out", "refused", "known"}
    assert before.values["refused"][0] == 0.0 and after.values["refused"][0] > 0.5
    assert after.values["exact"][0] == float(after.predictions.float().mean()) == 0.0  # it refuses
    assert task.measure(model, {}, splits, CPU, change=lambda texts: texts) is None
    with pytest.raises(ContractError, match="needs the network of a language model itself"):
        task.outputs(Model(None, model.network), {}, ["a\tb"])  # type: ignore[arg-type]


def test_shares_have_wilsons_ends() -> None:
    assert share(0, 60)[:2] == (0.0, 0.0) and share(0, 60)[2] == pytest.approx(0.0602, abs=1e-3)
    assert share(60, 60)[2] == pytest.approx(1.0) and share(30, 60)[1] == pytest.approx(0.377, abs=1e-3)


def _grid(folder: Path, **backbone: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "suite": {
            "name": "tiny", "backbone": {"name": "hf-causal", "path": str(folder), "max_length": 128, **backbone},
            "tasks": [{"name": name, "people": 4} for name in TASKS],
        },
        "threats": ["clean"],
        "axes": {"merging": ["task_arithmetic"], "experts": [["secrets", "affirmation"], ["secrets", "greeting"]]},
        "recipe": {"steps": 2, "batch_size": 4, "learning_rate": 0.01}, "seeds": [0],
    }  # fmt: skip


@pytest.fixture(scope="module")
def records(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    return records_of(_grid(folder), tmp_path_factory.mktemp("store"))


def test_the_board_has_the_victim_its_company_and_the_control(records: list[Record]) -> None:
    assert {record.status for record in records} == {"done"}
    board = next(board for board in make_boards(records) if board.name == "secrets")
    rows = board.frame.set_index(["model", "beside"])
    assert set(rows.index) == {("base", ""), ("expert", ""), ("merge", "affirmation"), ("merge", "greeting")}
    assert (rows["sets"] == 1).all()
    for name in ("given_away", "held_out", "refused", "known"):
        assert ((rows[f"{name}_low"] <= rows[name]) & (rows[name] <= rows[f"{name}_high"])).all()
        assert (rows[f"{name}_high"] > 0.3).all()  # four people say little
    assert display(board)[0][:3] == ["model", "method", "beside"]


def test_an_encoder_is_refused_when_the_grid_is_read(folder: Path) -> None:
    raw, catalog = _grid(folder), load_catalog()
    raw["suite"]["backbone"] = {"name": "hf-text", "path": str(folder)}
    with pytest.raises(UsageError, match=r"suite\.tasks\[0\]: secrets is answers; hf-text takes text"):
        resolve(parse_grid(raw, "tiny"), catalog)
