"""Subjects from photographs and prompts: rows, alignment, the preset down the whole road, and what is refused."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from extras import needs
from PIL import Image
from pipelines import clip

from mergesec.contracts import Context, ContractError, DataContext, load_network
from mergesec.contracts import Model as Loaded
from mergesec.recipes import Recipe
from mergesec.training import fit
from mergesec_tasks.diffusers._backbone import Denoising, texts_of
from mergesec_tasks.diffusers.dreambooth import CARDS, Subject
from mergesec_tasks.diffusers.sd3 import StableDiffusion3
from mergesec_tasks.diffusers.unet import Unet

needs("diffusers")
CPU = torch.device("cpu")
DEFAULTS = {name: card["default"] for name, card in CARDS[0]["parameters"].items()}
OTHER = {"subject": "olis backpack", "class_name": "backpack"}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two photographs of each of two subjects."""
    root = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for task in ("one", "two"):
        (root / "dreambooth" / task).mkdir(parents=True)
        for i in range(2):
            pixels = torch.randint(0, 255, (20, 24, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / "dreambooth" / task / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def judge(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first CLIP with random weights that finds both classes in these photographs: which that is depends on how
    its library draws them."""
    home = tmp_path_factory.mktemp("judges")
    for seed in range(200):
        folder = clip(home / str(seed), seed)
        if _finds(subject(folder), photographs) and _finds(
            subject(folder, "dreambooth/two", **OTHER), photographs
        ):
            return folder
    pytest.fail("no CLIP with random weights is a judge")


def _finds(task: Subject, photographs: Path) -> bool:
    splits = loaded(task, photographs)
    head = head_of(task, splits)
    try:
        task._check_clip(task._cosines(splits["train"].inputs.images.float() / 255, head))
    except ContractError:
        return False
    return True


def subject(judge: Path, name: str = "dreambooth/one", **given: Any) -> Subject:
    task = Subject(**{**DEFAULTS, "judge": str(judge), "size": 16, "rows": 3, **given})
    task.name = name
    return task


def head_of(task: Subject, splits: dict) -> dict:
    """The judge's texts, for which no model is asked."""
    return task.fit_head(None, splits["train"], Context(CPU, 0))  # type: ignore[arg-type]


def loaded(task: Subject, photographs: Path) -> dict:
    return task.load(DataContext(CPU, 0, str(photographs / task.name)))


def test_rows_ask_for_two_scenes_and_training_for_the_subject(photographs: Path, judge: Path) -> None:
    task = subject(judge)
    splits = loaded(task, photographs)
    assert texts_of(splits["train"].inputs.conditions) == ["a photo of sks dog"] * 2
    assert texts_of(splits["test"].inputs.conditions)[:2] == [
        "a photo of sks dog on a beach", "a photo of sks dog in the snow",
    ]  # fmt: skip
    assert splits["test"].targets.tolist() == [0, 1] * 3
    seeds = torch.cat([splits[name].inputs.seeds for name in splits])
    assert len(seeds.unique()) == len(seeds)
    assert task.classes == ["a photo of dog on a beach", "a photo of dog in the snow"]
    again = task.unpack(task.pack(splits))
    assert all(torch.equal(again[n].inputs.images, splits[n].inputs.images) for n in splits)


def test_alignment_is_the_mean_cosine_with_what_was_asked_for(
    photographs: Path, judge: Path, pipeline: Callable[[str], Path]
) -> None:
    task, backbone = subject(judge), Unet(str(pipeline("unet")), steps=2)
    splits = loaded(task, photographs)
    model = Loaded(backbone, load_network(backbone, backbone.base_weights()))
    head = task.fit_head(model, splits["train"], Context(CPU, 0))
    assert torch.allclose(head["texts"].norm(dim=1), torch.ones(7), atol=1e-5)
    found = task.measure(model, head, splits, CPU)
    batch = task.batch(splits["test"], torch.arange(6), CPU)
    with torch.no_grad():
        cosines = task.outputs(model, head, batch.inputs)
    assert cosines.shape == (6, 6)
    aligned = cosines[torch.arange(6), splits["test"].targets]
    value, low, high = found.values["alignment"]
    assert value == pytest.approx(float(aligned.mean()), abs=1e-5) and low < value < high
    halves = [found.values[f"alignment_{which}"][0] for which in ("first", "second")]
    assert sum(halves) / 2 == pytest.approx(value, abs=1e-6)
    assert torch.equal(found.predictions, task.predictions(cosines))
    assert found.kept["images"].shape == (4, 3, 16, 16)


@pytest.mark.parametrize("kind", [Unet, StableDiffusion3])
def test_experts_are_trained_whole_or_as_low_rank_updates(
    photographs: Path, judge: Path, pipeline: Callable[[str], Path], kind: type[Denoising]
) -> None:
    backbone = kind(str(pipeline("unet" if kind is Unet else "mmdit_normed")), 2, 2.0)
    task, base = subject(judge), backbone.base_weights()
    splits = loaded(task, photographs)
    for rank in (0, 2):
        recipe = Recipe(steps=2, batch_size=2, learning_rate=1e-3, lora_rank=rank)
        expert = fit(backbone, task, base, {}, splits["train"], recipe, 0, CPU)
        changed = {n for n, t in expert.items() if not torch.equal(t, base[n])}
        if not rank:
            assert len(changed) > 0.9 * len(base) - 10
            continue
        assert changed <= set(backbone.anatomy().matrices) and len(changed) > 10
        name = sorted(changed)[0]
        assert torch.linalg.matrix_rank((expert[name] - base[name]).double(), rtol=1e-4) <= rank


def test_a_judge_that_sees_no_subject_is_none(photographs: Path, judge: Path) -> None:
    task = subject(judge)
    splits = loaded(task, photographs)
    head = head_of(task, splits)
    turned = {"texts": head["texts"].clone()}
    turned["texts"][-1] *= -1
    with pytest.raises(ContractError, match=r"its judge finds a dog in 0\.0% of the photographs"):
        task.measure(None, turned, splits, CPU)  # type: ignore[arg-type]


def test_folders_without_photographs_are_named(tmp_path: Path, judge: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .* with photographs"):
        subject(judge).load(DataContext(CPU, 0, str(tmp_path / "none")))
    with pytest.raises(ContractError, match="holds no image"):
        subject(judge).load(DataContext(CPU, 0, str(tmp_path)))
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ContractError, match=r"a\.png"):
        subject(judge).load(DataContext(CPU, 0, str(tmp_path)))


def arguments(folder: Path, judge: Path, photographs: Path) -> list[str]:
    small = [f"suite.tasks.{i}.{name}" for i in range(2) for name in ("judge={}", "size=16", "rows=2")]
    return [
        "--grid", "real-diffusion", "--data-root", str(photographs), f"suite.backbone.path={folder}",
        *(text.format(judge) for text in small), "suite.backbone.steps=1", "recipe.steps=2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("suite.tasks.0.subject=sks", "suite.tasks[0].subject: 'sks' does not name its class 'dog'"),
        ("suite.tasks.1.subject=backpack", "suite.tasks[1].subject: 'backpack' has no word beside its class"),
        ("suite.tasks.0.prompt=a photo", "suite.tasks[0].prompt: 'a photo' has to have one {}"),
        ("suite.backbone.steps=0", "suite.backbone.steps: 0 is outside [1, 1000]"),
        ("suite.backbone.name=diffusers-dit", "that is a base for diffusers-unet"),
    ],
)
def test_bad_input_is_named_with_code_2(
    bench: Any, pipeline: Callable[[str], Path], judge: Path, photographs: Path, change: str, told: str
) -> None:
    ran = bench("plan", *arguments(pipeline("unet"), judge, photographs), change)
    assert (ran.code, "Traceback" in ran.err) == (2, False)
    assert told in ran.err


def test_the_preset_runs_on_a_random_model_of_the_same_class(
    bench: Any, pipeline: Callable[[str], Path], judge: Path, photographs: Path
) -> None:
    """Training, protecting, an attack, a merge and alignment scores: every step of the paper's protocol."""
    ran = bench(
        "run", *arguments(pipeline("unet"), judge, photographs), "threats=[protection]", "axes.attacks=[none,coupled]",
        "axes.merging=[simple_average]", "axes.victim=[dreambooth/one]",
        "axes.defenses=[denoiser_gauge]", "--jobs", "1", "--results", str(bench.results),
    )  # fmt: skip
    assert ran.code == 0, ran.err[-2000:]
    board = bench.results / "leaderboards" / "real-diffusion" / "protection_distances.csv"
    rows = {row["attack"]: row for row in csv.DictReader(board.open())}
    assert float(rows["none"]["to_expert/all"]) > 1.0
    assert float(rows["coupled"]["to_expert/all"]) < 1e-3
    assert float(rows["none"]["max_abs_dlogit"]) < 1e-3
