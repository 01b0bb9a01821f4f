"""What a worker guards around every step: hidden randomness, inputs written to, triggered inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from mergesec.conformance.battery import MICRO, MICRO_TEXT
from mergesec.contracts import ContractError, Task
from mergesec.execution import steps
from mergesec.execution.steps import run
from mergesec.execution.store import Store
from mergesec.execution.work import Bench, Work
from mergesec.planning.catalog import Catalog, load_catalog
from mergesec.planning.plan import Step

KEY = "ab" * 20


def _bench(folder: Path) -> Bench:
    store = Store(folder)
    store.put("base", "base-key", save({"w": torch.ones(3), "v": torch.ones(2)}), {})
    return Bench(store, Catalog(), torch.device("cpu"))


def _run(monkeypatch: pytest.MonkeyPatch, bench: Bench, body: Any, key: str = KEY) -> dict[str, torch.Tensor]:
    """The tensors of a step that does ``body`` with the base as its input."""
    monkeypatch.setitem(steps.KINDS, "merge", body)
    step = Step(key, "merge", (), (("base", "base-key"),), "{}")
    return load(bytes(run(step, bench, {"base-key": "base"})[0]))


def test_draws_behind_the_contexts_back_do_not_depend_on_the_workers_past(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(work: Work) -> Any:
        return {"torch": torch.rand(3), "numpy": torch.from_numpy(np.random.rand(3))}, {}

    bench = _bench(tmp_path)
    first = _run(monkeypatch, bench, draw)
    torch.rand(5)
    np.random.rand(5)
    again = _run(monkeypatch, bench, draw)
    other = _run(monkeypatch, bench, draw, "cd" * 20)
    for name in ("torch", "numpy"):
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])


def _in_place(tensor: torch.Tensor) -> None:
    tensor.add_(1)


def _through_data(tensor: torch.Tensor) -> None:
    tensor.data[0] = 5


def _through_numpy(tensor: torch.Tensor) -> None:
    tensor.numpy()[0] = 5


def _laid_elsewhere(tensor: torch.Tensor) -> None:
    tensor.data = torch.full((3,), 5.0)


def _swapped(tensor: torch.Tensor) -> None:
    view = tensor.numpy()
    view += [1.0, -1.0, 0.0]  # the entries' sum stays


@pytest.mark.parametrize("how", [_in_place, _through_data, _through_numpy, _laid_elsewhere, _swapped])
@pytest.mark.parametrize("raises", [False, True])
def test_an_input_written_to_is_an_error_and_is_read_afresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raises: bool, how: Callable[[torch.Tensor], None]
) -> None:
    def write(work: Work) -> Any:
        how(work.tensors("base")["w"])
        if raises:
            raise ValueError("and then something else")
        return {}, {}

    def read(work: Work) -> Any:
        return dict(work.tensors("base")), {}

    bench = _bench(tmp_path)
    _run(monkeypatch, bench, read)
    expected = "and then something else" if raises else r"changed its input base\.w in place"
    with pytest.raises(ValueError, match=expected):
        _run(monkeypatch, bench, write)
    assert torch.equal(_run(monkeypatch, bench, read)["w"], torch.ones(3))


def test_results_may_share_memory_with_inputs_and_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def share(work: Work) -> Any:
        w = work.tensors("base")["w"]
        return {"a": w, "b": w, "c": w[1:], "d": w.requires_grad_(False).view(3, 1).T}, {}

    found = _run(monkeypatch, _bench(tmp_path), share)
    assert {k: tuple(v.shape) for k, v in found.items()} == {"a": (3,), "b": (3,), "c": (2,), "d": (1, 3)}


def test_tensors_come_aligned_so_that_rounding_does_not_depend_on_chance(tmp_path: Path) -> None:
    bench = _bench(tmp_path)
    weights, _ = bench.read("base", "base-key")
    assert all(t.data_ptr() % 64 == 0 for t in weights.values())


def test_what_was_read_is_kept_within_its_budget(tmp_path: Path) -> None:
    bench = _bench(tmp_path)
    for i in range(4):
        bench.store.put("base", f"k{i}", save({"w": torch.zeros(100)}), {})
    bench.cache_bytes = 900  # two of 400 bytes
    kept = [bench.read("base", f"k{i}")[0] for i in (0, 1, 0, 2)]
    assert bench.read("base", "k0")[0] is kept[0]  # used last but one
    assert bench.read("base", "k1")[0] is not kept[1]


IMAGES = torch.rand(2, 3, 4, 4)


def _task(name: str) -> Task:
    task: Task = load_catalog([MICRO, MICRO_TEXT]).get("task", name).create({})
    return task


@pytest.mark.parametrize(
    ("triggered", "message"),
    [
        (IMAGES[:1], r"bad\.apply returned \[1, 3, 4, 4\] for inputs \[2, 3, 4, 4\]"),
        (IMAGES * float("nan"), "bad: tensor 'apply' holds 96 non-finite"),
        (None, r"bad\.apply returned NoneType"),
    ],
)
def test_a_trigger_that_breaks_its_inputs_is_an_error(triggered: Any, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        _task("micro/bars").check_triggered(triggered, IMAGES, "bad")


def test_a_trigger_on_text_keeps_the_number_of_samples() -> None:
    task = _task("micro/animals")
    assert task.check_triggered(["a x", "b x"], ["a", "b"], "bad") == ["a x", "b x"]
    with pytest.raises(ContractError, match=r"bad\.apply returned 1 inputs for 2"):
        task.check_triggered(["a x"], ["a", "b"], "bad")
    with pytest.raises(ContractError, match="not a list of strings"):
        task.check_triggered("ab", ["a", "b"], "bad")


def test_a_head_that_is_not_finite_is_no_head() -> None:
    """The largest of NaN is the first class: an accuracy would come out of it."""
    shipped = {"weight": torch.tensor([[1.0], [math.nan]]), "scale": torch.tensor(1.0)}
    work: Any = SimpleNamespace(
        component=lambda role: SimpleNamespace(name="t"), args={}, backbone=SimpleNamespace(head=lambda task: shipped)
    )  # fmt: skip
    with pytest.raises(ContractError, match="head of t: tensor 'weight' holds 1 non-finite values of 2"):
        steps.head(work)
