"""Trainings that are cut off go on with the same bits; large artifacts are mapped and verified once."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save
from torch import Tensor

from mergesec.conformance.battery import MICRO_TEXT
from mergesec.contracts import Context, ContractError, DataContext, Model, Recipe, load_network
from mergesec.execution import store as store_module
from mergesec.execution.steps import run
from mergesec.execution.store import CorruptArtifact, Store
from mergesec.execution.work import Bench, Keeper
from mergesec.images import augmented
from mergesec.planning.catalog import load_catalog
from mergesec.planning.gridspec import parse_grid
from mergesec.planning.plan import make_plan
from mergesec.planning.resolve import resolve
from mergesec.training import fit

CPU = torch.device("cpu")
MICRO = Path(__file__).resolve().parents[2] / "benchmark" / "mergesec" / "conformance" / "micro.py"
RECIPE = Recipe(learning_rate=2e-3, epochs=2, batch_size=64)  # 4 steps an epoch


class Cut(RuntimeError):
    pass


class Notebook:
    """Keeps after every step; raises ``Cut`` once ``end`` steps are done."""

    def __init__(self, end: int = 0) -> None:
        self.end = end
        self.kept: Any = None
        self.seen: list[tuple[int, int]] = []

    def resume(self) -> Any:
        return self.kept

    def due(self) -> bool:
        return True

    def step(self, done: int, steps: int, loss: float) -> None:
        self.seen.append((done, steps))

    def keep(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.kept = {n: t.clone() for n, t in tensors.items()}, dict(facts)
        if facts["done"] == self.end:
            raise Cut


@pytest.fixture(scope="module")
def world() -> Any:
    catalog = load_catalog([MICRO])
    backbone, task = (
        catalog.get("backbone", "micro/vit").create({}),
        catalog.get("task", "micro/rings").create({}),
    )
    base, train = backbone.base_weights(), task.load(DataContext(CPU, 0))["train"]
    head = task.fit_head(Model(backbone, load_network(backbone, base)), train, Context(CPU, 0))

    def train_it(recipe: Recipe = RECIPE, **other: Any) -> dict[str, Tensor]:
        return fit(backbone, task, base, head, train, recipe, 5, CPU, **other)

    return train_it


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
@pytest.mark.parametrize("end", [1, 3, 4, 5, 7])
@pytest.mark.parametrize(
    "change",
    [{}, {"lora_rank": 2, "augment": "crop+flip"}, {"optimizer": "sgd", "precision": "bfloat16"}],
    ids=str,
)
def test_a_cut_training_ends_with_the_same_bits(world: Any, end: int, change: dict[str, Any]) -> None:
    recipe = dataclasses.replace(RECIPE, **change)
    wanted = world(recipe)
    notebook = Notebook(end)
    with pytest.raises(Cut):
        world(recipe, watch=notebook)
    torch.manual_seed(77)  # another process draws other numbers before it goes on
    notebook.end = 0
    assert same(world(recipe, watch=notebook), wanted)
    assert [done for done, _ in notebook.seen] == [*range(1, end + 1), *range(end + 1, 9)]


def test_a_loss_of_its_own_starts_afresh(world: Any) -> None:
    def loss(model: Model, batch: Any) -> Tensor:
        return model.features(batch.inputs).square().mean()

    notebook = Notebook()
    first = world(loss=loss, watch=notebook)
    assert notebook.kept is None
    assert same(first, world(loss=loss))


@pytest.mark.parametrize("steps", [1, 4, 6])
def test_steps_count_optimizer_steps(world: Any, steps: int) -> None:
    notebook = Notebook()
    world(dataclasses.replace(RECIPE, steps=steps, epochs=1), watch=notebook)
    assert notebook.seen == [(i + 1, steps) for i in range(steps)]


def test_as_many_steps_as_epochs_make_change_nothing(world: Any) -> None:
    assert same(world(), world(dataclasses.replace(RECIPE, steps=8)))


def test_augmentation_matters_and_repeats(world: Any) -> None:
    views = {kind: world(dataclasses.replace(RECIPE, augment=kind)) for kind in ("crop", "flip")}
    assert not same(views["crop"], views["flip"])
    assert not same(views["crop"], world())
    assert same(views["flip"], world(dataclasses.replace(RECIPE, augment="flip")))


def test_views_are_shifted_or_mirrored_copies() -> None:
    images = torch.rand(40, 3, 16, 16)
    flipped = augmented(images, "flip", torch.Generator().manual_seed(0))
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(flipped, images, strict=True)]
    assert 5 < sum(mirrored) < 35
    assert all(torch.equal(a, b) or m for a, b, m in zip(flipped, images, mirrored, strict=True))
    cropped = augmented(images, "crop", torch.Generator().manual_seed(0))
    for view, image in zip(cropped, images, strict=True):
        padded = torch.nn.functional.pad(image[None], (2, 2, 2, 2), mode="replicate")[0]
        windows = [padded[:, r : r + 16, c : c + 16] for r in range(5) for c in range(5)]
        assert any(torch.equal(view, window) for window in windows)
    assert not torch.equal(cropped, images)
    with pytest.raises(ContractError, match="needs images"):
        augmented(images[0], "flip", torch.Generator())


def test_a_task_without_views_refuses_augmentation() -> None:
    with pytest.raises(ContractError, match="'flip' is not for the inputs of micro/animals"):
        load_catalog([MICRO_TEXT]).get("task", "micro/animals").create({}).views(
            ["a text"], "flip", torch.Generator()
        )


# --------------------------------------------------------------------------- killed while training

GRID = {
    "name": "resume",
    "suite": {"name": "micro", "backbone": "micro/vit", "tasks": ["micro/bars", "micro/rings"]},
    "axes": {"merging": ["simple_average"]}, "threats": ["clean"],
    "recipe": {"epochs": 2, "max_train": 128, "batch_size": 32},
}  # fmt: skip

KILLED = """
import os, signal, sys
import torch
sys.path.insert(0, sys.argv[1])
import test_resume as t
torch.use_deterministic_algorithms(True, warn_only=True)
bench, plan, key = t.workplace(t.Path(sys.argv[2]))
keep, seen = bench.store.keep, []
def counting(*arguments):
    keep(*arguments)
    seen.append(1)
    if len(seen) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
bench.store.keep = counting
t.go(bench, plan, key)
"""


def workplace(root: Path) -> tuple[Bench, Any, str]:
    catalog = load_catalog([MICRO])
    plan = make_plan(resolve(parse_grid(GRID, "resume"), catalog), lambda task: "")
    bench = Bench(Store(root), catalog, CPU, checkpoint_seconds=0.0)
    return bench, plan, next(k for k, s in plan.steps.items() if s.kind == "expert")


def go(bench: Bench, plan: Any, key: str) -> dict[str, Tensor]:
    """The step ``key``, after what it needs."""
    kinds = {k: s.kind for k, s in plan.steps.items()}
    for need in [*(k for k, s in plan.steps.items() if s.kind in ("data", "base", "head")), key]:
        step = plan.steps[need]
        if not bench.store.has(step.kind, need):
            blob, info = run(step, bench, kinds)
            bench.store.put(step.kind, need, blob, info)
    return load_tensors(bench.store.read("expert", key)[0])


@pytest.mark.slow
def test_a_killed_expert_goes_on_and_comes_out_the_same(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path / "killed")]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    left = list((tmp_path / "killed" / "checkpoints").glob("*.safetensors"))
    assert len(left) == 1
    bench, plan, key = workplace(tmp_path / "killed")
    assert not bench.store.has("expert", key)
    steps: list[str] = []
    step = Keeper.step

    def note(self: Keeper, done: int, total: int, loss: float) -> None:
        steps.append(f"{done}/{total}")
        step(self, done, total, loss)

    Keeper.step = note  # type: ignore[method-assign]
    try:
        resumed = go(bench, plan, key)
    finally:
        Keeper.step = step  # type: ignore[method-assign]
    assert steps == [f"{i}/8" for i in range(4, 9)]
    assert not list((tmp_path / "killed" / "checkpoints").glob("*.safetensors"))
    whole, plan, key = workplace(tmp_path / "whole")
    whole.checkpoint_seconds = 1e9
    assert same(go(whole, plan, key), resumed)


def test_a_torn_checkpoint_is_not_used(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.keep("k", 0, b"first")
    store.keep("k", 0, b"second")
    store.keep("k", 1, b"other")
    assert (store.kept("k", 0) or b"")[:] == b"second"
    (path,) = (tmp_path / "checkpoints").glob("k.0.*")
    path.write_bytes(b"secomd")
    assert store.kept("k", 0) is None
    assert (store.kept("k", 1) or b"")[:] == b"other"


def test_a_training_tells_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    bench = Bench(Store(tmp_path), load_catalog(), CPU, report=told.append)
    clock = [100.0]
    monkeypatch.setattr("mergesec.execution.work.time.monotonic", lambda: clock[0])
    keeper = Keeper(bench, "k", 0)
    for done in range(1, 5):
        clock[0] += 0.5
        keeper.step(done, 10, 0.25)
    keeper.step(10, 10, 0.125)
    assert told == ["2/10 loss 0.25, 4s left", "4/10 loss 0.25, 3s left", "10/10 loss 0.125, trained"]


# --------------------------------------------------------------------------- mapped artifacts


@pytest.fixture
def images(tmp_path: Path) -> tuple[Bench, Tensor]:
    pixels = torch.randint(0, 256, (700, 3, 32, 32), dtype=torch.uint8)
    bench = Bench(Store(tmp_path), load_catalog(), CPU)
    bench.store.put("data", "k", save({"train/inputs": pixels, "train/targets": torch.arange(700)}), {"a": 1})
    return bench, pixels


def test_data_is_mapped_and_verified_once(
    images: tuple[Bench, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, pixels = images
    hashed: list[int] = []
    digests = store_module.digests_of
    monkeypatch.setattr(store_module, "digests_of", lambda blob: hashed.append(1) or digests(blob))
    tensors, info = bench.read("data", "k")
    assert torch.equal(tensors["train/inputs"], pixels)
    assert info == {"a": 1}
    again, _ = Bench(bench.store, load_catalog(), CPU).read("data", "k")
    assert torch.equal(again["train/inputs"], pixels)
    assert len(hashed) == 1
    assert bench._bytes == 700 * 8  # the targets


def test_a_flipped_byte_is_found_after_the_first_check(images: tuple[Bench, Tensor]) -> None:
    bench, _ = images
    path, _ = bench.store.open("data", "k")
    blob = bytearray(path.read_bytes())
    blob[-5] ^= 1
    path.write_bytes(blob)
    with pytest.raises(CorruptArtifact):
        bench.store.open("data", "k")
    assert not bench.store.has("data", "k")
    assert not path.with_suffix(".checked").exists()


@pytest.mark.parametrize("ruin", [b"", b"\x00" * 7, b"\xff" * 64])
def test_ruined_files_are_corrupt(images: tuple[Bench, Tensor], ruin: bytes) -> None:
    bench, _ = images
    (bench.store.root / "artifacts" / "data" / "k.safetensors").write_bytes(ruin)
    with pytest.raises(CorruptArtifact):
        bench.store.open("data", "k")


def test_any_truncated_or_zeroed_end_of_a_mapped_file_is_corrupt(images: tuple[Bench, Tensor]) -> None:
    bench, _ = images
    path, _ = bench.store.open("data", "k")
    kept = {file: file.read_bytes() for file in path.parent.iterdir()}
    blob = kept[path]
    for place in (0, 5, 40, 200, len(blob) // 2 // 512 * 512, len(blob) - 4000, len(blob) - 1):
        for damaged in (blob[:place], blob[:place].ljust(len(blob), b"\0")):
            if damaged == blob:
                continue
            path.write_bytes(damaged)
            with pytest.raises(CorruptArtifact):
                bench.store.open("data", "k")
            for file, data in kept.items():
                file.write_bytes(data)


def test_writing_to_mapped_pixels_never_reaches_the_file(images: tuple[Bench, Tensor]) -> None:
    bench, pixels = images
    tensors, _ = bench.read("data", "k")
    tensors["train/inputs"].zero_()
    bench.forget("k")
    assert torch.equal(bench.read("data", "k")[0]["train/inputs"], pixels)
