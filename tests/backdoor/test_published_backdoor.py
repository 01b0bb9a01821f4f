"""A published poisoned expert with its trigger file stands in the adversary's place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file

from mergesec.contracts import ContractError, Split, TrainContext
from mergesec.execution.session import open_session
from mergesec.planning.catalog import load_catalog

BASE = {"w": torch.zeros(2, 3)}


def attack(**given: Any) -> Any:
    entry = load_catalog().get("attack", "published_backdoor")
    return entry.create(entry.card.bind("attack", given))


def context(inputs: Any) -> TrainContext:
    class Seen:
        base = BASE
        train = Split(inputs, torch.zeros(len(inputs)).long())

    return cast(TrainContext, Seen())


def patch(path: Path, side: int = 8, **changed: torch.Tensor) -> str:
    mask = torch.zeros(1, side, side)
    mask[:, :2, :2] = 1
    save_file({"mask": mask, "pattern": torch.full((3, side, side), 0.5), **changed}, path)
    return str(path)


def test_a_patch_is_pasted_and_stretched_to_the_images(tmp_path: Path) -> None:
    made = attack(trigger=patch(tmp_path / "t.safetensors"))
    images = torch.rand(3, 3, 16, 16)
    changed = made.apply(made.trigger(context(images)), images)
    assert torch.all(changed[:, :, :4, :4] == 0.5)
    assert torch.equal(changed[:, :, 4:], images[:, :, 4:])
    with pytest.raises(ContractError, match=r"the trigger has \[8, 8\], the images \[16, 16\]"):
        attack(trigger=made.trigger_file, fit="exact").apply(made.trigger(context(images)), images)


def test_words_go_in_front_or_behind(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    for position, wanted in (("start", "café x"), ("end", "x café")):
        path.write_text(json.dumps({"text": "café", "position": position}))
        made = attack(trigger=str(path))
        assert made.apply(made.trigger(context(["x"])), ["x"]) == [wanted]


def test_the_experts_weights_are_taken_as_they_are(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2, 3, dtype=torch.bfloat16)}, tmp_path / "e.safetensors")
    found = attack(expert=str(tmp_path / "e.safetensors")).poison(context(["x"]))
    assert torch.equal(found["w"], torch.ones(2, 3))
    save_file({"v": torch.ones(2, 3)}, tmp_path / "e.safetensors")
    with pytest.raises(ContractError, match=r"e\.safetensors"):
        attack(expert=str(tmp_path / "e.safetensors")).poison(context(["x"]))


def test_what_is_no_trigger_is_named(tmp_path: Path) -> None:
    images, path, words = torch.rand(1, 3, 8, 8), tmp_path / "t.safetensors", tmp_path / "t.json"

    def refused(trigger: str, inputs: Any, message: str) -> None:
        with pytest.raises(ContractError, match=message):
            attack(trigger=trigger).trigger(context(inputs))

    save_file({"mask": torch.ones(1, 8, 8)}, path)
    refused(str(path), images, "needs mask")
    refused(patch(path, mask=torch.full((1, 8, 8), 2.0)), images, "mask leaves")
    refused(patch(path, mask=torch.ones(1, 4, 4)), images, "have the shapes")
    words.write_text('{"text": " "}')
    refused(str(words), ["x"], "needs {text")
    with pytest.raises(ContractError, match="no trigger for these inputs"):
        attack(trigger=patch(path)).trigger(context(["a text"]))
    with pytest.raises(ContractError, match="needs expert"):
        attack().poison(context(["x"]))


def test_a_grid_names_both_files_and_knows_them_by_content(tmp_path: Path) -> None:
    patch(tmp_path / "t.safetensors")
    save_file(BASE, tmp_path / "e.safetensors")
    (tmp_path / "g.yaml").write_text(
        "defaults: [{suite: mini}, _self_]\nname: g\nthreats: [backdoor]\naxes:\n  merging: [simple_average]\n"
        "  attacks: [{name: published_backdoor, expert: e.safetensors, trigger: t.safetensors}]\n"
        "  adversary: [mini/gtsrb]\n"
    )
    first = open_session(str(tmp_path / "g.yaml"), store=tmp_path / "s").plan
    assert len(first.cells) == 1
    save_file({"w": torch.ones(2, 3)}, tmp_path / "e.safetensors")
    second = open_session(str(tmp_path / "g.yaml"), store=tmp_path / "s").plan
    kinds = [{s.kind for k, s in a.steps.items() if k not in b.steps} for a, b in ((first, second),)]
    assert "poison" in kinds[0]
    assert "trigger" not in kinds[0]
