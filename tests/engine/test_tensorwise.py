"""The drivers of tensorwise merges: threads, batches, tied weights, memory of the results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from mergesec import tensorwise
from mergesec.contracts import Backbone, ContractError, Expert, MergeContext
from mergesec.planning.catalog import Entry, load_catalog
from mergesec.streaming.merging import context as file_context
from mergesec.streaming.merging import unfit
from mergesec.tensorwise import BLOCK, Piece, Span, TensorwiseMerge, Workspace, slab, spans, sweep


def context() -> MergeContext:
    return MergeContext(torch.device("cpu"), 0, cast(Backbone, None), {}, lambda merged: 0.0)


class Mean(TensorwiseMerge):
    """θ = mean θ_i, in the plainest way; wide tensors by ``whole``."""

    name = "mean"
    yields = "weights"

    def combine(self, piece: Piece, out: Tensor, facts: Any) -> None:
        torch.mean(torch.stack(list(piece.experts)), 0, out=out)

    def whole(self, name: str, base: Tensor, experts: Any, facts: Any) -> Tensor | None:
        return torch.stack([e.float() for e in experts]).mean(0) if name.startswith("whole") else None


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def network(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"a": (3, BLOCK), "b": (5,), "whole": (4, 4), "c": (BLOCK + 1,), "none": (0, 3), "d": ()}
    drawn = {n: torch.randn(shape, generator=generator).to(dtype) for n, shape in sizes.items()}
    return {**drawn, "steps": torch.arange(4)}


@pytest.mark.parametrize("batch", [1, BLOCK, 1 << 23])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_batches_change_nothing(
    threads: int, batch: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorwise, "BATCH", batch)
    base, members = network(0, dtype), [Expert(str(i), network(i + 1, dtype)) for i in range(3)]
    merged = Mean().merge(base, members, context()).shared
    assert list(merged) == list(base)
    assert torch.get_num_threads() == threads
    for name, tensor in base.items():
        assert merged[name].dtype == tensor.dtype
        rows = torch.stack([e.weights[name].float() for e in members])
        wanted = rows.mean(0).to(dtype) if tensor.is_floating_point() else tensor
        assert torch.equal(merged[name], wanted), name


@pytest.mark.parametrize("names", [("a", "z"), ("z", "a")])
@pytest.mark.parametrize("batch", [1, 1 << 23])
def test_tied_weights_stay_tied(names: tuple[str, str], batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the name that owns the memory comes first or last, in one batch or in two."""
    monkeypatch.setattr(tensorwise, "BATCH", batch)

    def tied(value: float) -> dict[str, Tensor]:
        one = torch.full((2, 3), value)
        return {names[0]: one, "middle": torch.full((7,), value), names[1]: one}

    merged = Mean().merge(tied(0.0), [Expert("x", tied(1.0)), Expert("y", tied(2.0))], context()).shared
    assert list(merged) == [names[0], "middle", names[1]]
    assert merged["a"].data_ptr() == merged["z"].data_ptr()
    assert torch.equal(merged["a"], torch.full((2, 3), 1.5))
    untied = {names[0]: torch.ones(2, 3), "middle": torch.ones(7), names[1]: torch.zeros(2, 3)}
    with pytest.raises(ContractError, match="tied in the base"):
        Mean().merge(tied(0.0), [Expert("x", untied)], context())


def test_results_share_memory_but_not_entries() -> None:
    cut = slab(
        [((3, 5), torch.float32), ((0,), torch.int64), ((), torch.float64), ((7,), torch.bfloat16)],
        torch.device("cpu"),
    )
    assert [tuple(t.shape) for t in cut] == [(3, 5), (0,), (), (7,)]
    for value, tensor in enumerate(cut):
        assert not tensor.numel() or tensor.data_ptr() % tensor.element_size() == 0
        tensor.fill_(value)
    assert [t.float().unique().tolist() for t in cut] == [[0.0], [], [2.0], [3.0]]


def test_sweep_visits_every_span_once(threads: int) -> None:
    base = torch.zeros(7 * 100 + 3)
    seen: list[int] = []

    def visit(span: Span, workspace: Workspace) -> None:
        piece = span.piece(workspace)
        assert torch.equal(piece.experts[0], torch.arange(len(piece.base)) + float(piece.start))
        seen.append(span.start)

    sweep(spans("w", base, [torch.arange(703.0)], 100), visit)
    assert sorted(seen) == list(range(0, 703, 100))
    sweep(iter(()), visit)
    assert len(seen) == 8


def test_an_error_in_a_thread_comes_out_and_stops_the_others(threads: int) -> None:
    visited: list[int] = []

    def visit(span: Span, workspace: Workspace) -> None:
        visited.append(span.start)
        if span.start >= 3:
            raise ContractError("no")

    with pytest.raises(ContractError, match="no"):
        sweep(spans("w", torch.zeros(10_000), [], 1), visit)
    assert len(visited) < 10_000
    assert torch.get_num_threads() == threads


def test_a_rule_of_the_wrong_shape_is_named() -> None:
    class Wrong(Mean):
        def whole(self, name: str, base: Tensor, experts: Any, facts: Any) -> Tensor | None:
            return torch.zeros(2)

    with pytest.raises(ContractError, match=r"'w' came out as \[2\], not \[3\]"):
        Wrong().merge({"w": torch.zeros(3)}, [Expert("x", {"w": torch.ones(3)})], context())


def tensorwise_methods() -> list[Entry]:
    return [
        entry
        for entry in load_catalog()
        if entry.card.kind == "merging" and unfit(entry.load(), entry.card.output, entry.card.wraps) is None
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "entry", [e for e in tensorwise_methods() if e.load().pointwise], ids=lambda entry: entry.card.name
)
def test_small_tensors_side_by_side_give_the_same_bits(
    entry: Entry, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {f"t{i:03}": (i % 9, 1 + i % 5) if i % 3 else (i % 37,) for i in range(120)}
    shapes |= {"scalar": (), "wide": (70, 90)}

    def weights(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {n: torch.randn(shape, generator=generator).to(dtype) for n, shape in shapes.items()}

    members = [Expert(str(i), weights(i + 1)) for i in range(2)]
    method = entry.create(entry.card.bind(entry.card.name, entry.card.trial))
    found = []
    for small in (0, tensorwise.SMALL):
        monkeypatch.setattr(tensorwise, "SMALL", small)
        found.append(method.merge(weights(0), members, file_context(entry.card.name, 5)).shared)
    apart, beside = found
    assert list(apart) == list(beside)
    assert all(torch.equal(apart[name], beside[name]) for name in apart)


@pytest.mark.slow
@pytest.mark.parametrize("entry", tensorwise_methods(), ids=lambda entry: entry.card.name)
def test_rules_may_run_in_several_threads(entry: Entry) -> None:
    """Tensors of more than two blocks, so that threads meet; the result is that of one thread, bit by bit."""

    def weights(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shapes = {"tall": (BLOCK // 2 + 3, 4), "matrix": (30, 20), "bias": (20,), "long": (2 * BLOCK + 7,)}
        return {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}

    base = weights(0)
    count = 2 if entry.card.experts[1] == 2 else 3
    names = ("micro/bars", "micro/blobs", "micro/third")[:count]  # the first one is named by a card's trial
    members = [
        Expert(name, {n: base[n] + 0.1 * t for n, t in weights(i + 1).items()})
        for i, name in enumerate(names)
    ]
    method = entry.create(entry.card.bind(entry.card.name, entry.card.trial))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(method.merge(base, members, file_context(entry.card.name, 5)).shared)
    finally:
        torch.set_num_threads(before)
    exact = type(method).whole is TensorwiseMerge.whole  # BLAS may sum in another order
    for name in base:
        if exact:
            assert torch.equal(found[0][name], found[1][name]), name
        else:
            torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-5)
