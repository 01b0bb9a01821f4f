"""The suite ``mini-diffusion``: what ships fits, what it asks for is told apart, and bad input is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergesec.contracts import Model, Split, load_network
from mergesec.errors import UsageError
from mergesec.judging import built
from mergesec.planning.catalog import load_catalog
from mergesec.planning.gridspec import load_grid, parse_grid
from mergesec.planning.plan import make_plan
from mergesec.planning.resolve import resolve
from mergesec_tasks.diffusion._network import Generator, pasted, pieces
from mergesec_tasks.diffusion._vocabulary import CLASSES, CONCEPTS, SPARE, TOKENS, first_class
from mergesec_tasks.diffusion.concepts import SignConcept, balanced, conditions, halved
from mergesec_tasks.diffusion.dit import BASE_FILE, JUDGE_FILE, MiniDiT
from mergesec_tasks.diffusion.pretrain import Plan, pretrain

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def signs() -> tuple[SignConcept, Split]:
    """Sixty real test images of signs as rows."""
    task = SignConcept()
    task.name = "mini-diffusion/signs"
    return task, task.rows(balanced(task.drawn().render(60, "test"), 60), "test")


def test_tokens_of_all_classes_are_apart_and_spare_ones_are_nobodys() -> None:
    used = [1 + first_class(name) + k for name, many in CONCEPTS.items() for k in range(many)]
    assert sorted(used) == list(range(1, 1 + CLASSES))
    assert not set(SPARE) & set(used)
    assert max(SPARE) == TOKENS - 1
    assert conditions("digits", torch.tensor([3])).tolist() == [[1 + CONCEPTS["signs"] + 3, -1]]


def test_patches_are_put_back_where_they_were() -> None:
    images = torch.arange(2 * 3 * 16 * 16.0).view(2, 3, 16, 16)
    cut = pieces(images)
    assert torch.equal(pasted(cut), images)
    assert torch.equal(cut[0, 1].view(3, 4, 4), images[0, :, :4, 4:8])


def test_halving_is_the_mean_of_four() -> None:
    images = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    images[:, :, 0, 0] = 100
    assert halved(images)[0, 0].tolist() == [[25, 0], [0, 0]]


def test_what_ships_fits_the_network_and_its_anatomy() -> None:
    backbone = MiniDiT()
    assert load_network(backbone, backbone.base_weights()).training is False
    anatomy = backbone.anatomy()
    assert len(anatomy.blocks) == 6
    assert anatomy.blocks[0].attention.heads == 4


def test_the_shipped_judge_knows_real_signs(signs: Any) -> None:
    _, split = signs
    head = MiniDiT().head("mini-diffusion/signs")
    assert head is not None
    with torch.no_grad():
        seen = built(head)(split.inputs.images.float() / 255).argmax(1) - int(head["first"])
    assert float((seen == split.targets).float().mean()) >= 0.97
    assert MiniDiT().head("mini/gtsrb") is None


def test_steps_and_guidance_decide_the_images(signs: Any) -> None:
    task, split = signs
    request = task.batch(split, torch.arange(2), CPU).inputs
    weights = MiniDiT().base_weights()

    def drawn(**given: Any) -> torch.Tensor:
        backbone = MiniDiT(**given)
        with torch.no_grad():
            return task.served(Model(backbone, load_network(backbone, weights)), {}, request)

    plain = drawn(steps=2, guidance=1.0)
    assert torch.equal(plain, drawn(steps=2, guidance=1.0))
    assert not torch.allclose(plain, drawn(steps=3, guidance=1.0), atol=1e-3)
    assert not torch.allclose(plain, drawn(steps=2, guidance=3.0), atol=1e-3)


def test_the_tokens_table_is_frozen_in_experts() -> None:
    frozen = [name for name, p in Generator().named_parameters() if not p.requires_grad]
    assert frozen == ["words"]


@pytest.mark.parametrize("name", ["mini-diffusion", "mini-diffusion-protection", "mini-diffusion-backdoor"])
def test_every_grid_of_the_suite_plans(name: str) -> None:
    grid = resolve(load_grid(name), load_catalog())
    assert make_plan(grid, lambda task: "").cells


@pytest.mark.parametrize(
    ("suite", "told"),
    [
        ({"backbone": {"name": "mini-diffusion/dit", "steps": 0}}, r"steps: 0 is outside \[1, 1000\]"),
        ({"backbone": {"name": "mini-diffusion/dit", "sampler": "ddim"}}, "no such parameter"),
        ({"backbone": "mini/vit"}, "mini-diffusion/signs is generation; mini/vit takes image"),
        ({"tasks": ["mini-diffusion/sign"]}, "mini-diffusion/signs"),
    ],
)
def test_bad_input_is_named(suite: dict[str, Any], told: str) -> None:
    given = {"name": "s", "backbone": "mini-diffusion/dit", "tasks": ["mini-diffusion/signs"], **suite}
    raw = {"name": "g", "suite": given, "axes": {"merging": ["simple_average"]}, "threats": ["clean"]}
    with pytest.raises(UsageError, match=told):
        resolve(parse_grid(raw, "grid g"), load_catalog())


@pytest.mark.slow
def test_pretraining_makes_the_same_files_again(tmp_path: Path) -> None:
    plan = Plan(images=40, phases=((2, 1e-3), (1, 1e-3)), batch=8, judge_steps=2)
    for name in ("first", "second"):
        pretrain(tmp_path / name, 3, plan=plan, card=tmp_path / f"{name}.md", report=lambda line: None)
    for file in (BASE_FILE, JUDGE_FILE):
        first, second = load_file(tmp_path / "first" / file), load_file(tmp_path / "second" / file)
        assert all(torch.equal(first[n], second[n]) for n in first)
    assert "1,146,416" in (tmp_path / "first.md").read_text()
